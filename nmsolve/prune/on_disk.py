"""Prunes and evaluates models on disk: what ``nmsolve prune`` and ``nmsolve eval-ppl`` do, with the same
arguments. torch and transformers are imported once it is certain that there is work for them.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.backends.devices import check_device, chosen_device
from nmsolve.backends.dispatch import AUTO, check_backend, check_mask_method
from nmsolve.checkpoint.format import REPORT_NAME, SUFFIX, open_checkpoint
from nmsolve.errors import NMSolveError, NMSolveWarning, WorkFailed, counted
from nmsolve.files import Interrupts, Staging, check_out, check_space, is_regular
from nmsolve.prune.methods import PRUNING_METHODS, check_offload, check_pruning_method
from nmsolve.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from nmsolve.checkpoint.format import Checkpoint
    from nmsolve.prune.arguments import Patterns
    from nmsolve.prune.evaluation import Perplexity
    from nmsolve.prune.model import PruneResult
    from nmsolve.prune.stored import Place

__all__ = ["DTYPES", "check_dtype", "evaluate_checkpoint", "prune_checkpoint"]

DTYPES = ("float32", "bfloat16", "float16")
"""What a model can be run and saved in."""


def prune_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    pattern: Patterns,
    *,
    calibration: str | os.PathLike[str] | None = None,
    transposable: bool = False,
    method: str = "alps",
    mask_method: str | None = None,
    backend: str = AUTO,
    device: str | None = None,
    dtype: str | None = None,
    sequential: str = "layer",
    initial_masks: str | os.PathLike[str] | None = None,
    dense: Sequence[str] = (),
    samples: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    bos: bool | None = None,
    iterations: int | None = None,
    damping: float | None = None,
    all_experts: bool = False,
    exact_error: bool = False,
    offload: str | None = None,
    picture: bool = True,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    progress: bool | None = None,
    interrupts: Interrupts | None = None,
) -> PruneResult:
    """Prunes the model in a checkpoint folder with :func:`nmsolve.prune.prune_model`, and saves it elsewhere.

    Only pruned weights change: other tensors, the names of all, and the files of configuration and tokenizer
    are those of the input.

    Finished layers are kept in a hidden folder beside ``out`` until the end: the same call goes on where one
    that was interrupted or killed had stopped.

    Parameters
    ----------
    model : path
        A checkpoint folder with safetensors weights, of a model that transformers knows.
    out : path
        Gets a folder that transformers loads, with ``masks/``, ``nmsolve_report.json`` and
        ``nmsolve_report.png`` in it. It appears whole or not at all.
    calibration : path, optional
        Text in UTF-8, or tokens (or images) in a .safetensors file with one tensor. Methods that need none
        do without.
    device : str, optional
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; by default a GPU if there is one.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Of the model while it runs and of what is saved; by default the checkpoint's.
    offload : {"cpu", "disk"}, optional
        Keeps one block at a time on the device, and the rest of the weights on the host, or in the files of
        ``model`` (those that were pruned in the hidden folder beside ``out``). By default all of them are
        on the device.
    picture : bool
        Whether to draw ``nmsolve_report.png`` (this needs matplotlib).
    overwrite : bool
        Whether a folder ``out`` that nmsolve wrote may be replaced.
    ranks : Ranks, optional
        The processes that share the work, from :func:`nmsolve.ranks.joined`: each makes the same call, has
        the model (or with ``offload`` a block of it), and runs its share of the calibration; the first one
        writes. By default this one alone.
    progress, interrupts
        As in :func:`nmsolve.checkpoint.mask_checkpoint`.
    pattern, transposable, method, mask_method, backend, sequential, initial_masks, dense, samples, \
sequence_length, batch_size, seed, bos, iterations, damping, all_experts, exact_error
        As in :func:`nmsolve.prune.prune_model`; ``iterations`` and ``damping`` are refused where the method
        has none.

    Returns
    -------
    PruneResult
        Masks, by the names that their tensors have in ``out``, and report.

    Raises
    ------
    NMSolveError
        If an argument or the input is not as described, before any work.
    WorkFailed
        If weights, or the inputs of a layer, are not finite, for one; the message says where finished layers
        are kept.
    KeyboardInterrupt
        With a message that says the same.

    Examples
    --------
    >>> result = prune_checkpoint("SmolLM2", "sparse", "2:4", calibration="text.txt")   # doctest: +SKIP
    >>> result.report.totals()["layers"]                                                # doctest: +SKIP
    210
    """
    ranks = ALONE if ranks is None else ranks
    check_dtype(dtype)
    options = _check(
        method, transposable, mask_method, backend, device, iterations=iterations, damping=damping
    )
    text = _calibration_file(calibration, method)
    check_offload(offload)
    folder = Path(model)
    target = check_out(Path(out), overwrite, source=folder, mark=REPORT_NAME)

    device = chosen_device(device, ranks.local if ranks.count > 1 else None)

    from nmsolve.prune.model import prune_model
    from nmsolve.prune.peers import together
    from nmsolve.prune.placed import earlier_masks, placed
    from nmsolve.prune.pretrained import load_model, load_tokenizer, open_model
    from nmsolve.prune.report import need_matplotlib
    from nmsolve.prune.store import finished_in, stored_part
    from nmsolve.prune.stored import write_checkpoint

    if picture:
        need_matplotlib()
    loaded, held = open_model(folder, dtype) if offload == "disk" else (load_model(folder, dtype), None)
    checkpoint = open_checkpoint(folder)
    check_space(target.parent, sum(shard.nbytes for shard in checkpoint.shards))
    tokenizer = load_tokenizer(folder) if text is not None and text.suffix != SUFFIX else None
    weights = placed(checkpoint, loaded, pattern, dense, held)
    _tell_left_out(checkpoint)

    interrupts = interrupts or Interrupts()
    resume = target.with_name(f".{target.name}.unfinished")

    def check() -> None:
        interrupts.check()
        ranks.check()

    def prune() -> PruneResult:
        result = prune_model(
            loaded if offload else loaded.to(device),
            text,
            pattern,
            transposable=transposable,
            method=method,
            mask_method=mask_method or "exact",
            backend=backend,
            sequential=sequential,
            initial_masks=None
            if initial_masks is None
            else earlier_masks(initial_masks, weights.places, checkpoint),
            dense=dense,
            tokenizer=tokenizer,
            samples=samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            seed=seed,
            bos=bos,
            all_experts=all_experts,
            exact_error=exact_error,
            replicated=ranks.count > 1,
            offload=held or offload,
            device=device if offload else None,
            resume=resume,
            progress=progress,
            check=check,
            **options,
        )
        result.report.files = _files(folder, out, text, checkpoint) | {
            "device": device,
            "dtype": dtype,
            "offload": offload,
        }
        return result

    def write(result: PruneResult, staging: Staging | None) -> None:
        assert staging is not None  # on the first rank, which alone writes
        changed: dict[str, list[tuple[Place, Callable[[], Tensor]]]] = {}
        for name in result.masks:
            for place in weights.places[name]:
                new = partial(stored_part, resume, weights.layers[name], place.of)
                changed.setdefault(place.entry, []).append((place, new))
        write_checkpoint(checkpoint, staging.path, loaded, changed, dtype, check)
        result.renamed(weights.places).write_masks(staging.path, picture=picture)
        interrupts.hold()
        staging.publish_folder(replace=overwrite)

    with together(ranks):
        try:
            with Staging(target) if ranks.rank == 0 else nullcontext() as staging:
                result = prune()
                ranks.first(lambda: write(result, staging))
        except KeyboardInterrupt:
            kept = f"finished layers are in {resume}; " if finished_in(resume) else ""
            raise KeyboardInterrupt(f"{kept}the same command goes on") from None
        except (NMSolveError, OSError) as error:
            if not finished_in(resume) or str(error).startswith("resume: "):  # which says what to do with it
                raise
            what = getattr(error, "strerror", None) or error
            raise WorkFailed(f"{what}; finished layers are in {resume}") from error
        if ranks.rank == 0:
            shutil.rmtree(resume, ignore_errors=True)
    return result.renamed(weights.places)


def _tell_left_out(checkpoint: Checkpoint) -> None:
    if checkpoint.left_out:
        names = ", ".join(path.as_posix() for path in checkpoint.left_out[:3])
        warnings.warn(
            f"{counted(len(checkpoint.left_out), 'file')} with the dense weights in another form will not be "
            f"in the output: {names}{', ...' if len(checkpoint.left_out) > 3 else ''}",
            NMSolveWarning,
            stacklevel=3,
        )


def _files(
    folder: Path, out: str | os.PathLike[str], text: Path | None, checkpoint: Checkpoint
) -> dict[str, object]:
    """What was read and written, for the report."""
    found: dict[str, object] = {"model": os.fspath(folder), "output": os.fspath(out)}
    if text is not None:
        digest = hashlib.sha256()
        with text.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        found |= {"calibration": os.fspath(text), "calibration_sha256": digest.hexdigest()}
    return found | {"left_out": [path.as_posix() for path in checkpoint.left_out]}


def evaluate_checkpoint(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    window: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    bos: bool | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: bool | None = None,
) -> Perplexity:
    """The perplexity of the causal language model in a checkpoint folder on a text.

    Parameters
    ----------
    model : path
        A checkpoint folder with safetensors weights.
    text : path
        Text in UTF-8, or tokens in a .safetensors file with one tensor.
    window, windows, batch_size, progress
        As in :func:`nmsolve.prune.perplexity`.
    bos : bool, optional
        Whether each window of a text begins with the tokenizer's BOS token; by default as the tokenizer does
        it. Models that are trained so are far worse without.
    device, dtype
        As in :func:`prune_checkpoint`.

    Returns
    -------
    Perplexity

    Raises
    ------
    NMSolveError
        If an argument or the input is not as described.

    Examples
    --------
    >>> evaluate_checkpoint("SmolLM2", "test.txt", window=512).perplexity               # doctest: +SKIP
    22.41
    """
    check_device(device)
    check_dtype(dtype)
    file = Path(text)
    if not is_regular(file):
        raise NMSolveError(f"text: {file} is not a file")
    device = chosen_device(device)

    from nmsolve.prune.calibration import read_tokens
    from nmsolve.prune.evaluation import perplexity
    from nmsolve.prune.pretrained import load_model, load_tokenizer

    folder = Path(model)
    loaded = load_model(folder, dtype)
    if not loaded.can_generate() or loaded.config.is_encoder_decoder:
        raise NMSolveError(f"{folder}: {type(loaded).__name__} is no causal language model")
    tokenizer = None if file.suffix == SUFFIX else load_tokenizer(folder)
    tokens = read_tokens(file, tokenizer, bos)
    return perplexity(
        loaded.to(device),
        tokens.ids,
        window=window,
        windows=windows,
        batch_size=batch_size,
        progress=progress,
        bos=tokens.bos,
    )


def _check(
    method: str, transposable: bool, mask_method: str | None, backend: str, device: str | None, **options: Any
) -> dict[str, Any]:
    """The options that were given, once it is certain that the method has them."""
    check_pruning_method(method)
    check_backend(backend)
    check_device(device)
    if mask_method is not None:
        check_mask_method(mask_method, "mask_method")
        if not transposable:
            raise NMSolveError(f"mask_method: {mask_method!r} needs transposable=True")
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in PRUNING_METHODS[method].options:
            raise NMSolveError(f"{name}: method {method!r} has none")
    return given


def check_dtype(dtype: str | None) -> None:
    """Raise NMSolveError unless a model can be run in it."""
    if dtype is not None and dtype not in DTYPES:
        raise NMSolveError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")


def _calibration_file(calibration: str | os.PathLike[str] | None, method: str) -> Path | None:
    if calibration is None:
        if PRUNING_METHODS[method].needs_calibration:
            raise NMSolveError(f"calibration: needed for method {method!r}")
        return None
    file = Path(calibration)
    if not is_regular(file):
        raise NMSolveError(f"calibration: {file} is not a file")
    return file
