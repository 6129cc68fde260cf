"""Masks a checkpoint slab by slab: the work of :func:`nmsolve.checkpoint.mask_checkpoint`.

Memory depends on the slab and not on the model: it holds the weights, scores and masks of those that are
solved, and of a few that wait for it or are to be written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Event
from typing import NamedTuple

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
from nmsolve.checkpoint.selection import Selected, Selection
from nmsolve.checkpoint.slabs import MaskedSlab, MaskSettings, Slab, SlabSolver, bytes_of, slabs_of
from nmsolve.checkpoint.streams import PlacedWriter, pieces, telling
from nmsolve.checkpoint.units import Unit

__all__ = ["Output", "bytes_needed", "write_units"]

# What the run tells of itself: (bytes done, name of the tensor). It may raise to stop the run.
Progress = Callable[[int, str], None]


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
    solver = SlabSolver(settings, backend)
    with ExitStack() as stack:
        wanted = (partial(solver, slab) for unit in units for slab in _slabs(unit, output, backend))
        slabs = stack.enter_context(closing(ahead(wanted, solver.threads)))
        stack.callback(solver.stop)
        open_files = stack.enter_context(ExitStack())
        behind = stack.enter_context(Behind())
        for unit in units:
            files = output.files(unit.shard)
            first = unit.entries[0].name if unit.entries else unit.name
            writers = []
            for file in files:
                with telling(first, file.path):
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


def _slabs(unit: Unit, output: Output, backend: Backend) -> Iterator[Slab]:
    """The slabs of a unit's masked tensors, in their order."""
    chosen = output.chosen(unit.shard)
    for entry in unit.entries:
        if entry.name in chosen:
            yield from slabs_of(chosen[entry.name], output.settings.pattern.m, backend.slab)


class _Place:
    """Where the next bytes of a tensor go."""

    def __init__(self, writer: PlacedWriter, position: int) -> None:
        self._writer = writer
        self._position = position

    def write(self, name: str, data: bytes | memoryview) -> None:
        with telling(name, self._writer.path):
            self._position = self._writer.write(self._position, data)


def _finish_unit(first: str, writers: Iterable[PlacedWriter], finished: Callable[[], None]) -> None:
    for writer in writers:
        with telling(first, writer.path):
            writer.sync()
            writer.close()
    finished()


def _copy(place: _Place, path: Path, entry: Entry, stopped: Event) -> None:
    """A dense tensor as it is, unless the run ends meanwhile."""
    with telling(entry.name, path), path.open("rb") as source:
        for piece in pieces(source, entry):
            if stopped.is_set():
                return
            place.write(entry.name, piece)


def _mask_tensor(
    item: Selected,
    settings: MaskSettings,
    backend: Backend,
    slabs: Iterator[MaskedSlab],
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
    seconds = 0.0
    for _ in slabs_of(item, settings.pattern.m, backend.slab):
        slab = next(slabs)
        seconds += slab.seconds
        row.add(slab.figures)
        behind.call(_write, entry.name, places, slab, bits)
        progress(slab.weights.nbytes, entry.name)
    behind.call(_finish, entry.name, places, bits)
    row.finish(seconds)
    return row


def _write(name: str, places: Sequence[_Place], slab: MaskedSlab, bits: BitStream) -> None:
    weights, masks = places
    weights.write(name, bytes_of(slab.weights))
    masks.write(name, bits.push(slab.keep))


def _finish(name: str, places: Sequence[_Place], bits: BitStream) -> None:
    places[1].write(name, bits.finish())
