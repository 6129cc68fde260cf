"""Reorders a checkpoint on disk: what ``nmsolve permute`` does, with the same arguments.

torch is imported once it is certain that there is work for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.about import __version__, versions
from nmsolve.backends.devices import check_device, chosen_device
from nmsolve.checkpoint.format import (
    ORDERS_FOLDER,
    ORDERS_NAME,
    ORDERS_SUFFIX,
    REPORT_NAME,
    SUFFIX,
    Checkpoint,
    open_checkpoint,
)
from nmsolve.checkpoint.output import check_output, publish
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.checkpoint.streams import StreamWriter
from nmsolve.errors import NMSolveError, begun, counted
from nmsolve.files import Interrupts, Staging, check_space, is_regular, write_text
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.strategies import check_learning
from nmsolve.permute.windows import check_window
from nmsolve.prune.on_disk import check_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from nmsolve.permute.couplings import Coupling

__all__ = ["ORDERS_FOLDER", "ORDERS_SUFFIX", "SCORES", "PermuteReport", "permute_checkpoint", "prepare"]

SCORES = ("magnitude", "wanda")
"""What the masks to come will go by."""

# Passes of a search where nothing else is said: more gain little (docs/permutation.md).
_PASSES = 10
_TRANSPOSABLE_PASSES = 3

# One of several files of a checkpoint.
_SHARD = re.compile(r"-\d+-of-\d+\.")


@dataclass(frozen=True)
class PermuteReport:
    """What was reordered. Scores are summed in float64.

    ``couplings`` has a row for each: name, heads, channels, what its ``scores`` are ("magnitude" or "wanda"),
    whether its order was ``learned``, what masks keep of these scores ``before`` and ``after``, and the
    ``score``, what there is to keep. ``calibration`` has the data for scores and learning, ``learn`` how was
    learned, and ``learning`` the checks on the way (:class:`~nmsolve.permute.LearnedPermutations`).
    """

    input: str
    output: str
    pattern: str
    transposable: bool
    passes: int
    window: int | None
    couplings: list[dict[str, Any]]
    scores: str = "magnitude"
    calibration: dict[str, Any] | None = None
    learn: dict[str, Any] | None = None
    learning: list[dict[str, Any]] | None = None

    def totals(self) -> dict[str, float]:
        """The sums over the couplings."""
        return {key: sum(row[key] for row in self.couplings) for key in ("before", "after", "score")}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data."""
        return {
            "nmsolve": __version__,
            "versions": versions(),
            "input": self.input,
            "output": self.output,
            "pattern": self.pattern,
            "transposable": self.transposable,
            "passes": self.passes,
            "window": self.window,
            "scores": self.scores,
            "learn": self.learn,
            "calibration": self.calibration,
            "learning": self.learning,
            "couplings": self.couplings,
        }


@dataclass(frozen=True)
class CalibrationData:
    """A file, what is drawn from it, and the dtype of the model; see :func:`permute_checkpoint`."""

    file: Path
    samples: int
    sequence_length: int | None
    batch_size: int
    seed: int
    bos: bool | None
    dtype: str | None

    def to_json(self) -> dict[str, Any]:
        """The same as JSON data."""
        return {**asdict(self), "file": os.fspath(self.file)}


@dataclass(frozen=True)
class Learning:
    """How orders are learned; see :func:`~nmsolve.permute.learn_permutation`."""

    strategy: str
    steps: int
    block_size: int | None
    groups: int | None
    seed: int


@dataclass(frozen=True)
class Prepared:
    """What is certain before any work: input, output if there is one, what is reordered and what is not."""

    checkpoint: Checkpoint
    out: Path | None
    chosen: list[Coupling]
    others: list[tuple[Coupling, str]]


def prepare(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    pattern: PatternLike,
    passes: int | None = None,
    window: int | None = None,
    include: Sequence[str] = (),
    heads: int | None = None,
    key_value_heads: int | None = None,
    transposable: bool = False,
    scores: str = "magnitude",
    learn: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Prepared:
    """Checks the arguments of :func:`permute_checkpoint` and reads the headers; writes nothing.

    Raises
    ------
    NMSolveError
        If an argument is not as described there.
    """
    if passes is not None and (isinstance(passes, bool) or not isinstance(passes, int) or passes < 1):
        raise NMSolveError(f"passes: expected at least 1, got {passes!r}")
    check_window(window, NMPattern.of(pattern), 0)
    for name, count in (("heads", heads), ("key_value_heads", key_value_heads)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise NMSolveError(f"{name}: expected at least 1, got {count!r}")
    if key_value_heads is not None and (heads is None or heads % key_value_heads):
        raise NMSolveError(f"key_value_heads: expected a divisor of heads={heads}, got {key_value_heads}")
    if scores not in SCORES:
        raise NMSolveError(f"scores: expected one of {', '.join(SCORES)}, got {scores!r}")
    if learn is not None:
        check_learning(learn, transposable, "learn")
    check_device(device)
    check_dtype(dtype)
    calibrated = learn is not None or scores != "magnitude"
    if calibrated and calibration is None:
        raise NMSolveError(f"calibration: needed for {f'learn={learn!r}' if learn else f'scores={scores!r}'}")
    if calibration is not None and not calibrated:
        raise NMSolveError("calibration: nothing uses it; ask for scores='wanda' or learn")
    if calibration is not None and not is_regular(Path(calibration)):
        raise NMSolveError(f"calibration: {Path(calibration)} is not a file")
    found = open_checkpoint(Path(checkpoint))
    if calibrated and not found.is_folder:
        raise NMSolveError(f"{found.root}: calibration needs the folder of a model, not a file")
    if not found.is_folder and _SHARD.search(found.root.name):
        raise NMSolveError(f"{found.root}: a shard has a part of the layers; give the folder that it is in")
    target = check_output(found, out, overwrite, _names)
    return Prepared(found, target, *_choose(found, include, heads, key_value_heads))


def permute_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    pattern: PatternLike,
    *,
    transposable: bool = False,
    passes: int | None = None,
    window: int | None = None,
    include: Sequence[str] = (),
    heads: int | None = None,
    key_value_heads: int | None = None,
    scores: str = "magnitude",
    learn: str | None = None,
    steps: int = 50,
    block_size: int | None = None,
    groups: int | None = None,
    calibration: str | os.PathLike[str] | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    bos: bool | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: bool | None = None,
    interrupts: Interrupts | None = None,
) -> PermuteReport:
    """A checkpoint with its channels in a better order for N:M masks, computing what it did before.

    Every order is folded into the layers that write the channels; those that would need a gather at run time
    are left alone.

    Parameters
    ----------
    checkpoint : path
        A .safetensors file or a checkpoint folder of a transformer.
    out : path
        A file for a file, with the orders beside it (``*.permutations.safetensors``); a folder for a folder,
        with ``permutations/`` in it. It appears whole or not at all.
    pattern : str, (int, int) or NMPattern
        The masks to come: ``"2:4"`` keeps 2 of 4.
    transposable : bool
        Whether they will be transposable.
    passes : int, optional
        At most this many passes of the search over all slots; if left out, 10, or 3 for transposable masks.
    window : int, optional
        Channels that are given to groups together; by default as in
        :func:`~nmsolve.permute.ria_permutation` and :func:`~nmsolve.permute.transposable_permutation`.
    include : sequence of str
        Globs of the couplings to reorder; all where there are none.
    heads, key_value_heads : int, optional
        Attention heads, where no config.json says it.
    scores : {"magnitude", "wanda"}
        What the masks to come will go by. Experts, which calibration does not see one by one, and layers that
        are not linear, are ordered by magnitude.
    learn : str, optional
        A strategy of :func:`~nmsolve.permute.learn_permutation`, which then starts from the orders found. The
        model must be a causal language model, but for "permllm".
    steps, block_size, groups : int
        Of learning, as there.
    calibration : path, optional
        Text in UTF-8, or tokens (or images) in a .safetensors file with one tensor; for "wanda" and learning.
    samples, sequence_length, batch_size, seed, bos
        As in :func:`nmsolve.prune.prune_checkpoint`.
    device, dtype : str, optional
        Where calibration and learning run, and in what dtype; as there.
    overwrite : bool
        Whether ``out`` may be replaced: a file, or a folder that nmsolve wrote.
    progress : bool, optional
        Whether to show a progress bar; by default on a terminal.
    interrupts : Interrupts, optional
        Signals to be obeyed between pieces of work, and held back while the output is put in place.

    Returns
    -------
    PermuteReport
        Also written into a folder.

    Raises
    ------
    NMSolveError
        If an argument or the input is not as described, before any work.
    WorkFailed
        If a weight is not finite, for one.
    OSError
        If reading or writing fails.

    Examples
    --------
    >>> report = permute_checkpoint("Llama-3.2-1B", "ordered", "2:4")                   # doctest: +SKIP
    >>> report.totals()["after"] >= report.totals()["before"]                           # doctest: +SKIP
    True
    """
    pattern = NMPattern.of(pattern)
    prepared = prepare(
        checkpoint,
        out,
        pattern=pattern,
        passes=passes,
        window=window,
        include=include,
        heads=heads,
        key_value_heads=key_value_heads,
        transposable=transposable,
        scores=scores,
        learn=learn,
        calibration=calibration,
        device=device,
        dtype=dtype,
        overwrite=overwrite,
    )
    found, target, chosen = prepared.checkpoint, prepared.out, prepared.chosen
    assert target is not None
    if not chosen:
        raise NMSolveError(f"{found.root}: no channels whose order can be folded")
    check_space(target.parent, sum(shard.nbytes for shard in found.shards))
    passes = passes or (_TRANSPOSABLE_PASSES if transposable else _PASSES)
    interrupts = interrupts or Interrupts()
    data = None
    if calibration is not None:
        data = CalibrationData(Path(calibration), samples, sequence_length, batch_size, seed, bos, dtype)
    learning = None if learn is None else Learning(learn, steps, block_size, groups, seed)

    from nmsolve.permute.checkpoint_search import CheckpointSearch

    search = CheckpointSearch(found, pattern, transposable, passes, window, progress, interrupts)
    calibrated = None
    if data is not None:
        from nmsolve.permute.calibrated import open_calibrated

        calibrated = open_calibrated(found, chosen, data, chosen_device(device))
        if learning is not None:
            calibrated.check(learning, pattern)
    with begun(), Staging(target) as staging:
        if calibrated is not None and scores == "wanda":
            search.scored = calibrated.scores()
        rows, orders = search.run(chosen)
        history = None
        if calibrated is not None and learning is not None:
            rows, orders, history = calibrated.learn(search, learning, chosen, rows, orders)
        _write(found, chosen, orders, target, staging.path, interrupts)
        report = PermuteReport(
            input=os.fspath(checkpoint),
            output=os.fspath(out),
            pattern=str(pattern),
            transposable=transposable,
            passes=passes,
            window=window,
            couplings=rows,
            scores=scores,
            calibration=None if data is None else data.to_json(),
            learn=None if learning is None else asdict(learning),
            learning=history,
        )
        if found.is_folder:
            write_text(staging.path / REPORT_NAME, json.dumps(report.to_json(), indent=2) + "\n")
        publish(found, staging, _names, overwrite, interrupts)
    return report


def _names(out: Path) -> list[str]:
    """What is written for a file, the weights last."""
    return [f"{out.name.removesuffix(SUFFIX)}{ORDERS_SUFFIX}", out.name]


def _choose(
    checkpoint: Checkpoint, include: Sequence[str], heads: int | None, key_value_heads: int | None
) -> tuple[list[Coupling], list[tuple[Coupling, str]]]:
    """The couplings to reorder, and the others with the reason."""
    from nmsolve.permute.stored import stored_couplings

    entries = {entry.name: entry for _, entry in checkpoint.entries()}
    couplings = stored_couplings(checkpoint, heads, key_value_heads)
    for glob in include:
        if not any(fnmatchcase(coupling.name, glob) for coupling in couplings):
            raise NMSolveError(f"include: {glob!r} matches none of the {counted(len(couplings), 'coupling')}")
    chosen, others = [], []
    for coupling in couplings:
        sites = (*coupling.consumers, *coupling.producers)
        unknown = [s.tensor for s in sites if entries[s.tensor].dtype not in DTYPES]
        if include and not any(fnmatchcase(coupling.name, glob) for glob in include):
            others.append((coupling, "not included"))
        elif not coupling.folds:
            others.append((coupling, coupling.reason))
        elif unknown:
            others.append((coupling, f"{unknown[0]} has dtype {entries[unknown[0]].dtype}"))
        else:
            chosen.append(coupling)
    return chosen, others


def _write(
    checkpoint: Checkpoint,
    chosen: list[Coupling],
    orders: dict[str, Tensor],
    out: Path,
    folder: Path,
    interrupts: Interrupts,
) -> None:
    """The checkpoint with its tensors reordered, and the orders, into ``folder``."""
    import torch

    from nmsolve.permute.apply import fold_site, save_permutations
    from nmsolve.permute.checkpoint_search import read_tensor

    moves: dict[str, list[tuple[Coupling, Any]]] = {}
    for coupling in chosen:
        for site in (*coupling.consumers, *coupling.producers):
            moves.setdefault(site.tensor, []).append((coupling, site))
    for shard in checkpoint.shards:
        path = folder / (shard.path.name if checkpoint.is_folder else out.name)
        size = sum(entry.nbytes for entry in shard.entries)
        with shard.path.open("rb") as source, StreamWriter(path, shard.header, size) as writer:
            for entry in shard.entries:
                interrupts.check()
                if entry.name not in moves:
                    for _ in writer.copy(source, entry):
                        interrupts.check()
                    continue
                tensor = read_tensor(shard, entry.name).clone()
                for coupling, site in moves[entry.name]:
                    fold_site(tensor, coupling, orders[coupling.name], site)
                writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if checkpoint.is_folder:
        checkpoint.copy_extras(folder, lambda name: interrupts.check())
        (folder / ORDERS_FOLDER).mkdir(exist_ok=True)
        save_permutations(folder / ORDERS_FOLDER / ORDERS_NAME, orders)
    else:
        save_permutations(folder / _names(out)[0], orders)
