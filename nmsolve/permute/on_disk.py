"""Reorders a checkpoint on disk: what ``nmsolve permute`` does, with the same arguments.

torch is imported once it is certain that there is work for it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.about import __version__, versions
from nmsolve.checkpoint.format import (
    ORDERS_FOLDER,
    ORDERS_NAME,
    ORDERS_SUFFIX,
    REPORT_NAME,
    SUFFIX,
    Checkpoint,
    Shard,
    open_checkpoint,
)
from nmsolve.checkpoint.output import check_output, publish
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.checkpoint.streams import StreamWriter
from nmsolve.errors import NMSolveError, begun, counted
from nmsolve.files import Interrupts, Staging, check_space, write_text
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.windows import check_window

if TYPE_CHECKING:
    from torch import Tensor

    from nmsolve.permute.couplings import Coupling, Site

__all__ = ["ORDERS_FOLDER", "ORDERS_SUFFIX", "PermuteReport", "permute_checkpoint", "prepare"]

# Passes of a search where nothing else is said: more gain little (docs/permutation.md).
_PASSES = 10
_TRANSPOSABLE_PASSES = 3

# One of several files of a checkpoint.
_SHARD = re.compile(r"-\d+-of-\d+\.")


@dataclass(frozen=True)
class PermuteReport:
    """What was reordered. Scores are magnitudes, summed in float64.

    ``couplings`` has a row for each: name, heads, channels, the magnitude that masks keep ``before`` and
    ``after``, and the ``score``, what there is to keep.
    """

    input: str
    output: str
    pattern: str
    transposable: bool
    passes: int
    window: int | None
    couplings: list[dict[str, Any]]

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
            "couplings": self.couplings,
        }


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
    found = open_checkpoint(Path(checkpoint))
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
        overwrite=overwrite,
    )
    found, target, chosen = prepared.checkpoint, prepared.out, prepared.chosen
    assert target is not None
    if not chosen:
        raise NMSolveError(f"{found.root}: no channels whose order can be folded")
    check_space(target.parent, sum(shard.nbytes for shard in found.shards))
    passes = passes or (_TRANSPOSABLE_PASSES if transposable else _PASSES)
    interrupts = interrupts or Interrupts()
    with begun(), Staging(target) as staging:
        rows, orders = _search(found, chosen, pattern, transposable, passes, window, progress, interrupts)
        _write(found, chosen, orders, target, staging.path, interrupts)
        report = PermuteReport(
            os.fspath(checkpoint), os.fspath(out), str(pattern), transposable, passes, window, rows
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


def _search(
    checkpoint: Checkpoint,
    chosen: list[Coupling],
    pattern: NMPattern,
    transposable: bool,
    passes: int,
    window: int | None,
    progress: bool | None,
    interrupts: Interrupts,
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Magnitude that masks keep before and after, and the order of every coupling."""
    import torch
    from tqdm import tqdm

    from nmsolve.permute import retained_score, ria_permutation, transposable_permutation

    shards = {entry.name: shard for shard, entry in checkpoint.entries()}
    shapes = {entry.name: entry.shape for _, entry in checkpoint.entries()}
    rows: list[dict[str, Any]] = []
    orders: dict[str, Tensor] = {}
    for coupling in tqdm(chosen, unit="coupling", disable=None if progress is None else not progress):
        interrupts.check()
        sites = [*coupling.consumers]
        if transposable:  # the masks of the producers feel the order of their rows as well
            sites += [site for site in coupling.producers if _is_matrix(shapes[site.tensor], site)]
        weights = {site.tensor: _read(shards[site.tensor], site.tensor).float().abs() for site in sites}
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise NMSolveError(f"{name}: expected finite values, got NaN or infinite ones")
        scores = coupling.scores(weights, sites)
        if transposable:
            found = transposable_permutation(
                scores, pattern.n, pattern.m, rows=False, passes=passes, window=window
            )
            order, before, after = found.columns, found.before.sum(), found.after.sum()
        else:
            order = ria_permutation(scores, pattern.n, pattern.m, passes=passes, window=window)
            before = retained_score(scores, pattern.n, pattern.m).sum()
            after = retained_score(scores, pattern.n, pattern.m, order).sum()
            if after < before:
                order, after = torch.arange(coupling.size).expand(coupling.shape).contiguous(), before
        orders[coupling.name] = order
        kept = {"before": float(before), "after": float(after), "score": float(scores.double().sum())}
        rows.append({"name": coupling.name, "heads": coupling.heads, "channels": coupling.size, **kept})
    return rows, orders


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
                tensor = _read(shard, entry.name).clone()
                for coupling, site in moves[entry.name]:
                    fold_site(tensor, coupling, orders[coupling.name], site)
                writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if checkpoint.is_folder:
        checkpoint.copy_extras(folder, lambda name: interrupts.check())
        (folder / ORDERS_FOLDER).mkdir(exist_ok=True)
        save_permutations(folder / ORDERS_FOLDER / ORDERS_NAME, orders)
    else:
        save_permutations(folder / _names(out)[0], orders)


def _is_matrix(shape: tuple[int, ...], site: Site) -> bool:
    """Whether a tensor has several elements for each channel, which biases and norms have not."""
    heads = 1 if site.head_axis is None else shape[site.head_axis]
    return math.prod(shape) > heads * shape[site.axis]


def _read(shard: Shard, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(shard.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
