"""Pruning a whole model: layer by layer, each calibrated on what the pruned ones before it put out."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nmsolve.backends.dispatch import select
from nmsolve.checkpoint.format import (
    MASKS_FOLDER,
    MASKS_SUFFIX,
    PICTURE_NAME,
    REPORT_NAME,
    SUFFIX,
    open_checkpoint,
)
from nmsolve.checkpoint.mask_files import save_masks
from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import is_dtensor
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import (
    Patterns,
    check_in_memory,
    check_initial_masks,
    check_settings,
    check_tokens,
    check_weights,
    fingerprints,
    parse_patterns,
    sequence_length_of,
    used_settings,
)
from nmsolve.prune.calibration import Batch, make_batches, read_tokens
from nmsolve.prune.experts import eager_experts
from nmsolve.prune.homes import OnDisk, home_of
from nmsolve.prune.kept import Kept
from nmsolve.prune.layers import select_layers, uncompiled
from nmsolve.prune.layerwise.problem import DAMPING
from nmsolve.prune.masks import ChosenMasks
from nmsolve.prune.methods import PRUNING_METHODS
from nmsolve.prune.peers import peers_of
from nmsolve.prune.report import PruneReport, need_matplotlib
from nmsolve.prune.run import Run
from nmsolve.prune.shares import share
from nmsolve.prune.store import LayerStore
from nmsolve.prune.stored import Place, StoredMasks, find_places, names_of
from nmsolve.prune.walk import quiet_model

if TYPE_CHECKING:
    from nmsolve.prune.unloaded import StoredWeights

__all__ = ["PruneResult", "prune_model"]


@dataclass
class PruneResult:
    """What :func:`prune_model` returns: the model itself is pruned in place.

    Attributes
    ----------
    masks : mapping of str to Tensor
        Name of each pruned weight, and its bool mask (True = keep) on the CPU. They are held as bits and
        unpacked one by one.
    patterns : dict of str to NMPattern
        The pattern of each.
    report : PruneReport
    """

    masks: Mapping[str, Tensor]
    patterns: dict[str, NMPattern]
    report: PruneReport

    def save(
        self, model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, picture: bool = True
    ) -> None:
        """Saves a transformers model with ``save_pretrained``; masks, report and picture beside it.

        The masks are packed to bits, one file for each pattern in ``masks/``;
        :func:`nmsolve.load_masks` reads the folder. Masks of an earlier ``save`` there are removed.

        Raises
        ------
        NMSolveError
            If the model has no ``save_pretrained`` or is sharded, or a picture is asked for and matplotlib is
            missing.
        """
        if not hasattr(model, "save_pretrained"):
            raise NMSolveError(
                f"model: expected a transformers model, got {type(model).__name__} without save_pretrained; "
                "nmsolve.save_masks saves the masks of any"
            )
        if any(is_dtensor(parameter) for parameter in model.parameters()):
            raise NMSolveError(
                "model: sharded; gather it with get_model_state_dict(model, "
                "options=StateDictOptions(full_state_dict=True, cpu_offload=True)), then call "
                "model.save_pretrained(folder, state_dict=...) and result.write_masks(folder) on rank 0"
            )
        if picture:
            need_matplotlib()
        folder = Path(folder)
        model.save_pretrained(folder)  # type: ignore[operator]
        for path in folder.glob(f"*{SUFFIX}"):
            _by_umask(path)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        self._as_saved(uncompiled(model), folder).write_masks(folder, picture=picture)

    def _as_saved(self, model: nn.Module, folder: Path) -> PruneResult:
        """With the names that the tensors have in the files: save_pretrained may give them others."""
        weights = {name: parameter for name, parameter in model.named_parameters() if name in self.masks}
        try:
            places = find_places(open_checkpoint(folder), weights, names_of(model, weights))
        except NMSolveError:  # other models lie there as well
            return self
        return self.renamed(places)

    def renamed(self, places: Mapping[str, list[Place]]) -> PruneResult:
        """With the names of a checkpoint's tensors in place of those of the model's weights."""
        masks = StoredMasks(self.masks, places)
        patterns = {entry: self.patterns[parts[0][0]] for entry, parts in masks.weights.items()}
        return PruneResult(masks, patterns, self.report)

    def write_masks(self, folder: str | os.PathLike[str], *, picture: bool = True) -> None:
        """Writes masks, report and picture into a folder; masks of an earlier run there are removed."""
        folder = Path(folder)
        (folder / MASKS_FOLDER).mkdir(exist_ok=True)
        for earlier in (folder / MASKS_FOLDER).glob(f"*{MASKS_SUFFIX}"):
            earlier.unlink()
        for pattern in dict.fromkeys(self.patterns.values()):
            masks = ChosenMasks(self.masks, [name for name in self.masks if self.patterns[name] == pattern])
            file = folder / MASKS_FOLDER / f"{pattern.n}of{pattern.m}{MASKS_SUFFIX}"
            save_masks(file, masks, pattern, transposable=bool(self.report.settings["transposable"]))
        self.report.write(folder / REPORT_NAME)
        if picture:
            self.report.draw(folder / PICTURE_NAME)


def _by_umask(path: Path) -> None:
    """Gives a file the mode of any new one: safetensors makes files that only their owner reads."""
    probe = path.with_name(f".{path.name}.mode")
    try:
        probe.touch(exist_ok=False)
        path.chmod(probe.stat().st_mode & 0o777)
    finally:
        probe.unlink(missing_ok=True)


def _uncompiled_calls() -> AbstractContextManager[object]:
    """Modules that torch.compile has compiled run as they are written: compiled code may skip hooks."""
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled, and importing it takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def prune_model(
    model: nn.Module,
    calibration: object = None,
    pattern: Patterns = "16:32",
    *,
    transposable: bool = True,
    method: str = "alps",
    mask_method: str = "exact",
    backend: str = "auto",
    sequential: str = "layer",
    initial_masks: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    dense: str | Sequence[str] = (),
    tokenizer: Any = None,
    samples: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    bos: bool | None = None,
    damping: float = DAMPING,
    iterations: int | None = None,
    all_experts: bool = False,
    exact_error: bool = False,
    replicated: bool = False,
    offload: str | StoredWeights | None = None,
    device: str | torch.device | None = None,
    resume: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    check: Callable[[], None] | None = None,
) -> PruneResult:
    """Prunes the linear layers, convolutions and experts of a model to N:M, in place.

    Parameters
    ----------
    model : nn.Module
        A transformers model or any other; on any device. It runs in evaluation mode, as it is, and not
        compiled; of a model from ``torch.compile`` the module inside is pruned. A model that ``fully_shard``
        (FSDP2) has spread over all ranks stays so; every rank makes the same call.
    calibration : path, Tensor or iterable
        What the layers' inputs are measured on; see :func:`nmsolve.prune.make_batches`. Only "magnitude" does
        without (and then reports no reconstruction error). Of several ranks each gives its own share, or all
        give the same, which is dealt.
    pattern : str, (int, int), NMPattern or mapping of glob to pattern
        One for all layers, or by name: ``{"*": "8:16", "mlp.*": "16:32", "layers.0.*": None}``. The last glob
        that matches a layer's name, or its name from any dot on, decides; None leaves the layer dense.
        ``"*"`` leaves embeddings, heads, routers and layers smaller than one block dense; any other glob is
        taken at its word.
    transposable : bool
        N:M along rows and columns of every M x M block, or only along the input of each output.
    method : {"alps", "sparsegpt", "frank-wolfe", "wanda", "ria", "magnitude"}
        The first two update the weights that stay.
    mask_method, backend
        How masks are solved; see :func:`nmsolve.transposable_mask`.
    sequential : {"layer", "block", "off"}
        Where inputs are measured: "layer" after all earlier layers have been pruned; "block" once for all
        layers of a block, after the earlier blocks have been pruned (two passes instead of one for each group
        of layers with a common input); "off" in the dense model.
    initial_masks : mapping of weight name to bool Tensor, or path
        Earlier masks to keep: what is False there stays zero, so that a line may keep fewer than N.
    dense : str or sequence of str
        Globs of layers to leave dense.
    tokenizer, samples, sequence_length, batch_size, seed, bos
        For calibration text and tokens; see :func:`nmsolve.prune.make_batches`. By default sequences are as
        long as the model takes, 2048 tokens at most.
    damping : float
        Share of the mean diagonal added to the diagonal of the Hessian ("sparsegpt", "alps").
    iterations : int, optional
        At most this many: of ADMM ("alps", 300 by default) or steps of Frank-Wolfe ("frank-wolfe", 40).
    all_experts : bool
        Whether experts are calibrated on every token, and not only on those that their router sends them.
    exact_error : bool
        Whether the report's error is over all tokens for the methods that need no Hessian, too: it is kept
        for that, ``in x in`` numbers. By default theirs is over at most 512 tokens drawn at random.
    replicated : bool
        Whether all processes of torch.distributed have this model and make this call: they share the
        calibration and the layers.
    offload : {"cpu"}, optional
        Keeps the weights on the host, where the model is to be: those of a block are on the device while it
        is at work, those outside of blocks while the whole model is called. ``"disk"`` is for
        :func:`nmsolve.prune.prune_checkpoint`, which gives the weights of a model that was built without.
    device : str or torch.device, optional
        With ``offload``, where blocks are at work; by default a GPU if there is one.
    resume : path, optional
        Folder in which finished layers are kept. A run that was killed goes on from there, given the model as
        it was before, and ends with the same weights as an undisturbed one.
    progress : bool, optional
        Whether to show a progress bar; by default on a terminal.
    check : callable, optional
        Called before each layer; it may raise to end the run.

    Returns
    -------
    PruneResult
        Masks and report.

    Raises
    ------
    NMSolveError
        If an argument is not as described, before the model is touched.
    WorkFailed
        If a weight is not finite, before the model is touched; or, while it works, if the inputs of a layer
        are not finite or its Hessian cannot be factored.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    >>> result = prune_model(model, torch.randn(64, 16), "2:4", method="wanda")
    >>> sorted(result.masks)
    ['0.weight', '2.weight']
    >>> nmsolve.check_mask(model[0].weight != 0, 2, 4)
    """
    start = time.perf_counter()
    if not isinstance(model, nn.Module):
        raise NMSolveError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    if offload is None or isinstance(offload, str):
        check_in_memory(model)
    peers = peers_of(model, replicated)
    home = home_of(model, peers, offload, None if device is None else torch.device(device))
    if peers.sharded and resume is not None:
        raise NMSolveError("resume: a model that is sharded by fully_shard cannot be resumed; leave it out")
    with peers.agreed():
        settings = check_settings(
            method,
            transposable,
            mask_method,
            backend,
            sequential,
            damping,
            iterations,
            all_experts,
            exact_error,
            model,
        )
        patterns = parse_patterns(pattern)
        globs = [dense] if isinstance(dense, str) else dense
        selected = select_layers(model, patterns, globs, stacks=True, away=home.away)
        for layer, layer_pattern in selected.layers.items():
            select(backend, home.device_of(layer), layer_pattern.m)
        zeros = check_weights(selected, home)
        allowed = check_initial_masks(initial_masks, selected)
        if transposable:
            for layer in allowed:  # masks within these are corners of larger blocks (rule.py)
                select(backend, home.device_of(layer), 2 * selected.layers[layer].m)
        batches: list[Batch] = []
        begins: dict[str, object] = {}
        if calibration is None:
            if PRUNING_METHODS[method].needs_calibration:
                raise NMSolveError(f"calibration: needed for method {method!r}")
        else:
            data = calibration
            if isinstance(calibration, str | os.PathLike):
                data = read_tokens(calibration, tokenizer, bos)
                begins, bos = {"bos": data.bos is not None}, None
            batches = make_batches(
                data,
                tokenizer=tokenizer,
                samples=samples,
                sequence_length=sequence_length_of(model, sequence_length),
                batch_size=batch_size,
                seed=seed,
                bos=bos,
            )
            check_tokens(model, batches)
    peers.same(
        (settings, list(selected.layers.values()), seed),
        "settings: the ranks were called with different ones",
    )
    zeros = sum(peers.gather(zeros)) if peers.sharded else zeros
    shared = share(batches, peers)

    shown = {glob: None if value is None else str(value) for glob, value in patterns.items()}
    report = PruneReport(
        settings={
            **used_settings(settings, bool(batches)),
            "pattern": next(iter(shown.values())) if list(shown) == ["*"] else shown,
            "calibration_batches": shared.count,
            **shared.measures,
            **({"seed": seed} if batches else {}),
            **begins,
        },
        zeros=zeros,
        skipped=dict(selected.skipped),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    with ExitStack() as stack:
        store = None
        with peers.agreed():
            if resume is not None and peers.rank == 0:
                prints = fingerprints(home, selected, batches, allowed)
                store = stack.enter_context(LayerStore(resume, {**report.settings, **prints}))
        if isinstance(home, OnDisk):
            assert resume is not None
            home.pruned_in = Path(resume)
        stack.enter_context(home)
        stack.enter_context(quiet_model(model))
        stack.enter_context(_uncompiled_calls())
        stack.enter_context(eager_experts(selected.layers))
        quiet = progress if peers.rank == 0 else False
        run = Run(
            model,
            settings,
            selected,
            allowed,
            shared.mine,
            shared.tried,
            report,
            Kept(store, peers),
            quiet,
            check,
            home,
            peers,
            shared.counted,
        )
        run.all()
    report.seconds = time.perf_counter() - start
    return PruneResult(run.masks, {layer.weight_name: p for layer, p in run.pruned.items()}, report)
