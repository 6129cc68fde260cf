"""Masks a checkpoint slab by slab: the work of :func:`nmsolve.checkpoint.mask_checkpoint`.

A tensor is read, solved, masked and written in slabs of whole block rows, so that memory depends on the slab
and not on the model: a slab's weights, its scores, its mask and the solver's working memory, and a few slabs
that are read ahead or wait to be written. A block's mask does not depend on what is solved with it, so the
slabs do not show in the result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Event
from typing import NamedTuple

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
    output_names,
)
from nmsolve.checkpoint.mask_files import BitStream, masks_header, packed_size
from nmsolve.checkpoint.overlap import Behind, ahead
from nmsolve.checkpoint.report import MaskedTensor
from nmsolve.checkpoint.selection import DTYPES, MatrixLayout, Selected, Selection
from nmsolve.checkpoint.streams import PlacedWriter, pieces, read_into
from nmsolve.checkpoint.units import Unit
from nmsolve.errors import NMSolveError, WorkFailed
from nmsolve.ops.masks import nm_mask, transposable_mask
from nmsolve.ops.validation import check_finite
from nmsolve.pattern import NMPattern

__all__ = ["MaskSettings", "Output", "bytes_needed", "write_units"]

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


class _File(NamedTuple):
    """A file of the output: its first bytes, its size, and where each tensor begins."""

    path: Path
    header: bytes
    nbytes: int
    starts: Mapping[str, int]


@dataclass(frozen=True)
class Output:
    """The masked checkpoint that is made in ``folder``, for ``out``.

    A folder checkpoint gets the structure of its input, the masks in ``masks/`` (loaders that read every
    safetensors file of a folder do not look there) and the report. A file gets the names of ``output_names``.
    """

    checkpoint: Checkpoint
    selection: Selection
    settings: MaskSettings
    folder: Path
    out: Path

    @property
    def report(self) -> Path:
        """Where the report lies."""
        return self.folder / (REPORT_NAME if self.checkpoint.is_folder else output_names(self.out)[0])

    def chosen(self, shard: Shard) -> dict[str, Selected]:
        """What is masked of a shard."""
        return {item.entry.name: item for item in self.selection.masked if item.shard is shard}

    def files(self, shard: Shard) -> list[_File]:
        """The weights of a shard, and its masks if it has any."""
        if self.checkpoint.is_folder:
            masks_name = f"{shard.path.name.removesuffix(SUFFIX)}{MASKS_SUFFIX}"
            paths = self.folder / shard.path.name, self.folder / MASKS_FOLDER / masks_name
        else:
            _, masks_name, weights_name = output_names(self.out)
            paths = self.folder / weights_name, self.folder / masks_name
        files = [
            _File(paths[0], shard.header, shard.nbytes, {entry.name: entry.start for entry in shard.entries})
        ]
        shapes = {name: item.entry.shape for name, item in self.chosen(shard).items()}
        if shapes:
            header, sizes = masks_header(shapes, self.settings.pattern, self.settings.transposable)
            starts = accumulate(sizes.values(), initial=len(header))
            files.append(
                _File(
                    paths[1],
                    header,
                    len(header) + sum(sizes.values()),
                    dict(zip(sizes, starts, strict=False)),
                )
            )
        return files

    def is_there(self, shard: Shard) -> bool:
        """Whether the files of a shard were begun."""
        return all(
            file.path.is_file() and file.path.stat().st_size == file.nbytes for file in self.files(shard)
        )


def write_units(
    output: Output,
    units: Iterable[Unit],
    finished: Callable[[Unit, list[MaskedTensor]], None],
    progress: Progress,
) -> None:
    """Writes what the units have of the output; ``finished`` gets each that is complete and on disk."""
    settings = output.settings
    backend = select(settings.backend, settings.device, settings.pattern.m)
    if output.checkpoint.is_folder:
        (output.folder / MASKS_FOLDER).mkdir(exist_ok=True)
    units = list(units)
    with ExitStack() as stack:
        reads = (read for unit in units for read in _reads(unit, output, backend))
        slabs = stack.enter_context(closing(ahead(reads)))
        open_files = stack.enter_context(ExitStack())
        behind = stack.enter_context(Behind())
        for unit in units:
            files = output.files(unit.shard)
            first = unit.entries[0].name if unit.entries else unit.name
            writers = []
            for file in files:
                with _telling(first, file.path):
                    writers.append(PlacedWriter(file.path, file.header, file.nbytes))
                open_files.callback(writers[-1].close)
            chosen, rows = output.chosen(unit.shard), []
            for entry in unit.entries:
                progress(0, entry.name)
                places = [
                    _Place(writer, file.starts.get(entry.name, 0))
                    for writer, file in zip(writers, files, strict=True)
                ]
                item = chosen.get(entry.name)
                if item is None:
                    behind.call(_copy, places[0], unit.shard.path, entry, behind.stopped)
                    progress(entry.nbytes, entry.name)
                else:
                    rows.append(_mask_tensor(item, settings, backend, slabs, behind, places, progress))
            behind.call(_finish_unit, first, writers, partial(finished, unit, rows))


@contextmanager
def _telling(name: str, path: Path) -> Iterator[None]:
    """What the operating system refuses, with the tensor that it was about."""
    try:
        yield
    except OSError as error:
        raise WorkFailed(f"{name}: {error.strerror or error}: {path}") from error


class _Place:
    """Where the next bytes of a tensor go."""

    def __init__(self, writer: PlacedWriter, position: int) -> None:
        self._writer = writer
        self._position = position

    def write(self, name: str, data: bytes | memoryview) -> None:
        with _telling(name, self._writer.path):
            self._position = self._writer.write(self._position, data)


def _finish_unit(first: str, writers: Iterable[PlacedWriter], finished: Callable[[], None]) -> None:
    for writer in writers:
        with _telling(first, writer.path):
            writer.sync()
            writer.close()
    finished()


def _copy(place: _Place, path: Path, entry: Entry, stopped: Event) -> None:
    """A dense tensor as it is, unless the run ends meanwhile."""
    with _telling(entry.name, path), path.open("rb") as source:
        for piece in pieces(source, entry):
            if stopped.is_set():
                return
            place.write(entry.name, piece)


def _reads(unit: Unit, output: Output, backend: Backend) -> Iterator[Callable[[], Tensor]]:
    """Calls that read the slabs of a unit's masked tensors, in their order."""
    chosen = output.chosen(unit.shard)
    for entry in unit.entries:
        if entry.name in chosen:
            position = entry.start
            dtype = getattr(torch, DTYPES[entry.dtype])
            for shape in _slabs(chosen[entry.name].layout, output.settings.pattern.m, backend.slab):
                yield partial(_read, entry.name, unit.shard.path, position, shape, dtype)
                position += math.prod(shape) * dtype.itemsize


def _read(name: str, path: Path, position: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    slab = torch.empty(shape, dtype=dtype)
    with _telling(name, path), path.open("rb") as source:
        read_into(source, position, _bytes_of(slab))
    return slab


def _bytes_of(slab: Tensor) -> memoryview:
    return slab.view(-1).view(torch.uint8).numpy().data


def _mask_tensor(
    item: Selected,
    settings: MaskSettings,
    backend: Backend,
    slabs: Iterator[Tensor],
    behind: Behind,
    places: Sequence[_Place],
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
        _drop(slab, keep)
        if row.zeros_before == 0:
            row.nonzero = row.kept
        else:
            row.nonzero += int(torch.count_nonzero(slab))
        behind.call(_write, entry.name, places, slab, bits, keep)
        first += slab.numel()
        progress(slab.nbytes, entry.name)
    behind.call(_finish, entry.name, places, bits)
    row.finish(seconds)
    return row


def _write(name: str, places: Sequence[_Place], slab: Tensor, bits: BitStream, keep: Tensor) -> None:
    weights, masks = places
    weights.write(name, _bytes_of(slab))
    masks.write(name, bits.push(keep))


def _finish(name: str, places: Sequence[_Place], bits: BitStream) -> None:
    places[1].write(name, bits.finish())


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
    scores = _magnitudes(slab, settings.device)
    score = _sum(scores)
    if not math.isfinite(score):
        check_finite(scores)  # an infinite weight is no wish to keep it
    row.score += score
    row.zeros_before += _zeros(scores)
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


def _magnitudes(slab: Tensor, device: str) -> Tensor:
    """The absolute weights of a contiguous slab, on the device.

    On the CPU their bits without the sign. NumPy takes them with this thread alone: those of torch wait for
    the next work at full speed, on the cores that the solver's threads are about to take.
    """
    if device != "cpu":
        return slab.to(device).abs()
    bits = slab.view(_INTEGERS[slab.element_size()]).numpy()
    return torch.from_numpy(bits & np.iinfo(bits.dtype).max).view(slab.dtype)


def _zeros(magnitudes: Tensor) -> int:
    """How many of contiguous magnitudes are 0; on the CPU by their bits, which NumPy is fastest with."""
    if magnitudes.device.type == "cpu":
        bits = magnitudes.view(_INTEGERS[magnitudes.element_size()])
        return magnitudes.numel() - int(np.count_nonzero(bits.numpy()))
    return magnitudes.numel() - int(torch.count_nonzero(magnitudes))


def _sum(scores: Tensor) -> float:
    """Sum of contiguous scores in float64.

    On the CPU torch widens the whole of what it sums, so it gets pieces that fit the cache and that one
    thread sums: waking the others costs more.
    """
    pieces = scores.view(-1).split(_PIECE if scores.device.type == "cpu" else scores.numel())
    return sum(float(piece.sum(dtype=torch.float64)) for piece in pieces)
