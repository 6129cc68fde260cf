"""Masks a checkpoint slab by slab: the work of :func:`nmsolve.checkpoint.mask_checkpoint`.

A tensor is read, solved, masked and written in slabs of whole block rows, so that memory depends on the slab
and not on the model: a slab's weights, its scores, its mask and the solver's working memory, and a few slabs
that are read ahead or wait to be written. A block's mask does not depend on what is solved with it, so the
slabs do not show in the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmsolve.backends.dispatch import Backend, select
from nmsolve.checkpoint.format import (
    MASKS_FOLDER,
    MASKS_SUFFIX,
    REPORT_NAME,
    SUFFIX,
    Checkpoint,
    Entry,
    Shard,
    StreamWriter,
    output_names,
    read_into,
)
from nmsolve.checkpoint.mask_files import BitStream, masks_writer, packed_size
from nmsolve.checkpoint.overlap import Behind, ahead
from nmsolve.checkpoint.report import MaskedTensor, Report
from nmsolve.checkpoint.selection import DTYPES, MatrixLayout, Selected, Selection
from nmsolve.errors import NMSolveError
from nmsolve.ops.masks import nm_mask, transposable_mask
from nmsolve.ops.validation import check_finite
from nmsolve.pattern import NMPattern

__all__ = ["MaskSettings", "bytes_needed", "write_masked"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 15

# What the run tells of itself: (bytes done, name of the tensor). It may raise to stop the run.
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class MaskSettings:
    """How masks are solved."""

    pattern: NMPattern
    transposable: bool
    method: str
    backend: str
    device: str
    certificate: bool = True
    """Whether transposable masks are proven to be within a bound; ordinary ones are the best in any case."""


def bytes_needed(checkpoint: Checkpoint, selection: Selection) -> int:
    """Disk space that the output takes, without the report."""
    weights = sum(shard.nbytes for shard in checkpoint.shards)
    extras = sum((checkpoint.root / name).stat().st_size for name in checkpoint.extras)
    return weights + extras + sum(packed_size(item.entry.size) for item in selection.masked)


def write_masked(
    checkpoint: Checkpoint,
    selection: Selection,
    settings: MaskSettings,
    report: Report,
    folder: Path,
    out: Path,
    progress: Progress,
) -> None:
    """Writes the masked checkpoint, its masks and its report into ``folder``; fills the report in.

    A folder checkpoint gets the structure of its input, the masks in ``masks/`` (loaders that read every
    safetensors file of a folder do not look there) and the report. A file gets the names of ``output_names``.
    """
    start = time.perf_counter()
    backend = select(settings.backend, settings.device, settings.pattern.m)
    if checkpoint.is_folder:
        masks_folder = folder / MASKS_FOLDER
        masks_folder.mkdir()
        for shard in checkpoint.shards:
            masks = masks_folder / f"{shard.path.name.removesuffix(SUFFIX)}{MASKS_SUFFIX}"
            _write_shard(
                shard, selection, settings, backend, report, folder / shard.path.name, masks, progress
            )
        checkpoint.copy_extras(folder, partial(progress, 0))
        report_path = folder / REPORT_NAME
    else:
        report_name, masks_name, weights_name = output_names(out)
        paths = folder / weights_name, folder / masks_name
        _write_shard(checkpoint.shards[0], selection, settings, backend, report, *paths, progress)
        report_path = folder / report_name
    report.seconds = time.perf_counter() - start
    report.write(report_path)


def _write_shard(
    shard: Shard,
    selection: Selection,
    settings: MaskSettings,
    backend: Backend,
    report: Report,
    weights_path: Path,
    masks_path: Path,
    progress: Progress,
) -> None:
    """One safetensors file: the header and the dense tensors as they are, masked ones slab by slab."""
    chosen = {item.entry.name: item for item in selection.masked if item.shard is shard}
    with ExitStack() as stack:
        source, copied = (stack.enter_context(shard.path.open("rb")) for _ in range(2))
        data_bytes = sum(entry.nbytes for entry in shard.entries)
        weights = stack.enter_context(StreamWriter(weights_path, shard.header, data_bytes))
        masks = None
        if chosen:
            shapes = {name: item.entry.shape for name, item in chosen.items()}
            masks = stack.enter_context(
                masks_writer(masks_path, shapes, settings.pattern, settings.transposable)
            )
        slabs = stack.enter_context(closing(ahead(_reads(shard, chosen, settings, backend, source))))
        behind = stack.enter_context(Behind())
        for entry in shard.entries:
            progress(0, entry.name)
            item = chosen.get(entry.name)
            if item is None or masks is None:
                behind.call(_copy, weights, copied, entry, behind.stopped)
                progress(entry.nbytes, entry.name)
            else:
                output = _Output(behind, weights, masks)
                report.tensors.append(_mask_tensor(item, settings, backend, slabs, output, progress))


class _Output(NamedTuple):
    """Where the slabs of a shard go, and the thread that writes them."""

    behind: Behind
    weights: StreamWriter
    masks: StreamWriter


def _copy(weights: StreamWriter, source: BinaryIO, entry: Entry, stopped: Event) -> None:
    """A dense tensor as it is, unless the run ends meanwhile."""
    for _ in weights.copy(source, entry):
        if stopped.is_set():
            return


def _reads(
    shard: Shard, chosen: Mapping[str, Selected], settings: MaskSettings, backend: Backend, source: BinaryIO
) -> Iterator[Callable[[], Tensor]]:
    """Calls that read the slabs of a shard's masked tensors, in their order."""
    for entry in shard.entries:
        if entry.name in chosen:
            position = entry.start
            dtype = getattr(torch, DTYPES[entry.dtype])
            for shape in _slabs(chosen[entry.name].layout, settings.pattern.m, backend.slab):
                yield partial(_read, source, position, shape, dtype)
                position += math.prod(shape) * dtype.itemsize


def _read(source: BinaryIO, position: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    slab = torch.empty(shape, dtype=dtype)
    read_into(source, position, _bytes_of(slab))
    return slab


def _bytes_of(slab: Tensor) -> memoryview:
    return slab.view(-1).view(torch.uint8).numpy().data


def _mask_tensor(
    item: Selected,
    settings: MaskSettings,
    backend: Backend,
    slabs: Iterator[Tensor],
    output: _Output,
    progress: Progress,
) -> MaskedTensor:
    entry = item.entry
    row = MaskedTensor(
        name=entry.name,
        file=item.shard.path.name,
        shape=entry.shape,
        dtype=entry.dtype,
        layout=item.layout.kind,
        pattern=str(settings.pattern),
        method=settings.method if settings.transposable else "ordinary",
        backend=backend.name,
        weights=entry.size,
    )
    bits = BitStream()
    first = 0
    seconds = 0.0
    for _ in _slabs(item.layout, settings.pattern.m, backend.slab):
        slab = next(slabs)
        started = time.perf_counter()
        try:
            keep = _solve(slab, item.layout, settings, row)
        except NMSolveError as error:
            raise NMSolveError(
                f"{entry.name}, weights {first} to {first + slab.numel() - 1}: "
                f"{_not_finite(slab, first, entry.shape) or error}"
            ) from None
        seconds += time.perf_counter() - started
        row.zeros_before += slab.numel() - int(torch.count_nonzero(slab))
        _drop(slab, keep)
        row.nonzero += int(torch.count_nonzero(slab))
        output.behind.call(_write, output, slab, bits, keep)
        first += slab.numel()
        progress(slab.nbytes, entry.name)
    output.behind.call(_finish, output, bits)
    row.finish(seconds)
    return row


def _write(output: _Output, slab: Tensor, bits: BitStream, keep: Tensor) -> None:
    output.weights.write(_bytes_of(slab))
    output.masks.write(bits.push(keep))


def _finish(output: _Output, bits: BitStream) -> None:
    output.masks.write(bits.finish())


def _slabs(layout: MatrixLayout, m: int, elements: int) -> Iterator[tuple[int, int, int, int]]:
    """Shapes ``(batch, rows, cols, positions)`` of consecutive slabs of about ``elements`` entries at most.

    A slab is several whole matrices, or whole block rows of one.
    """
    matrix = layout.rows * layout.cols * layout.positions
    if matrix <= elements:
        step = elements // matrix
        for b in range(0, layout.batch, step):
            yield min(step, layout.batch - b), layout.rows, layout.cols, layout.positions
        return
    step = max(1, elements // (layout.cols * layout.positions * m)) * m
    for _ in range(layout.batch):
        for r in range(0, layout.rows, step):
            yield 1, min(step, layout.rows - r), layout.cols, layout.positions


def _solve(slab: Tensor, layout: MatrixLayout, settings: MaskSettings, row: MaskedTensor) -> Tensor:
    """The mask of a slab, contiguous on the CPU in the slab's shape; adds its figures to ``row``."""
    n, m = settings.pattern.n, settings.pattern.m
    scores = slab.to(settings.device).abs()
    check_finite(scores)  # an infinite weight is no wish to keep it
    matrices = scores.permute(0, 3, 1, 2)
    if settings.transposable and settings.certificate:
        solution = transposable_mask(
            matrices, n, m, method=settings.method, backend=settings.backend, return_solution=True
        )
        mask = solution.mask
        row.objective += solution.total_objective
        row.prove(solution.total_bound, solution.max_gap)
    elif settings.transposable:
        mask = transposable_mask(matrices, n, m, method=settings.method, backend=settings.backend)
    else:
        mask = nm_mask(matrices, n, m, dim=layout.input_dim - 2, backend=settings.backend)
    row.score += _sum(scores)
    keep = mask.permute(0, 2, 3, 1).cpu().contiguous()
    if not (settings.transposable and settings.certificate):
        host = scores.cpu()
        _drop(host, keep)
        kept_score = _sum(host)
        row.objective += kept_score
        if not settings.transposable:
            row.prove(kept_score, 0.0)
    row.kept += int(np.count_nonzero(keep.numpy()))
    return keep


def _not_finite(slab: Tensor, first: int, shape: tuple[int, ...]) -> str:
    """What is wrong with the weights of a slab, at which indices of their tensor; empty if they are finite.

    ``first`` is the place of the slab's first weight in its tensor.
    """
    weights = slab.view(-1)
    wrong = (~torch.isfinite(weights)).nonzero().flatten()
    if len(wrong) == 0:
        return ""
    at = tuple(int(index) for index in np.unravel_index(first + int(wrong[0]), shape))
    return (
        f"expected finite values, got {len(wrong)} NaN or infinite of {len(weights)}, the first "
        f"{float(weights[wrong[0]])} at {at}"
    )


def _drop(slab: Tensor, keep: Tensor) -> None:
    """Sets what is not kept to +0.0, both contiguous on the CPU, as a product of integers: no temporary."""
    bits = slab.view(_INTEGERS[slab.element_size()]).numpy()
    np.multiply(bits, keep.numpy(), out=bits)


def _sum(scores: Tensor) -> float:
    """Sum of contiguous scores in float64.

    On the CPU torch widens the whole of what it sums, so it gets pieces that fit the cache and that one
    thread sums: waking the others costs more.
    """
    pieces = scores.view(-1).split(_PIECE if scores.device.type == "cpu" else scores.numel())
    return sum(float(piece.sum(dtype=torch.float64)) for piece in pieces)
