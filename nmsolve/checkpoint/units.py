"""How the work on a checkpoint is cut and dealt: from its headers alone, so that every process knows it.

A unit is a run of neighbouring tensors of one file. Where it begins does not depend on who works, so that
what some processes have finished can be gone on with by others, of another number.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nmsolve.checkpoint.format import Checkpoint, Entry, Shard
from nmsolve.errors import NMSolveError

__all__ = ["Unit", "check_part", "deal", "input_identity", "units_of"]

# A unit ends with the tensor that brings it to so many bytes: what a kill costs at most, beside a tensor.
UNIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Unit:
    """Neighbouring tensors of one file, ``number`` in the order of the checkpoint."""

    number: int
    shard: Shard
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(entry.nbytes for entry in self.entries)

    @property
    def name(self) -> str:
        """For messages: the file, and its first tensor."""
        first = f", from {self.entries[0].name} on" if self.entries else ""
        return f"{self.shard.path.name}{first}"


def units_of(checkpoint: Checkpoint) -> list[Unit]:
    """Every tensor in one unit, in the order of the checkpoint; a file without tensors is a unit, too."""
    runs = ((shard, run) for shard in checkpoint.shards for run in _runs(shard.entries))
    return [Unit(number, shard, run) for number, (shard, run) in enumerate(runs)]


def _runs(entries: Sequence[Entry]) -> Iterator[tuple[Entry, ...]]:
    run: list[Entry] = []
    size = 0
    for entry in entries:
        run.append(entry)
        size += entry.nbytes
        if size >= UNIT_BYTES:
            yield tuple(run)
            run, size = [], 0
    if run or not entries:
        yield tuple(run)


def deal(units: Sequence[Unit], parts: int) -> list[list[Unit]]:
    """The units of each part: the largest first, each to the part that has the fewest bytes so far.

    No part then has more than the mean and one unit (Graham, 1969). Each part is in the checkpoint's order.
    """
    dealt: list[list[Unit]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for unit in sorted(units, key=lambda unit: (-unit.nbytes, unit.number)):
        size, part = heapq.heappop(heap)
        dealt[part].append(unit)
        heapq.heappush(heap, (size + unit.nbytes, part))
    return [sorted(part, key=lambda unit: unit.number) for part in dealt]


def check_part(part: object) -> tuple[int, int] | None:
    """``(K, OF)`` with 1 <= K <= OF.

    Raises
    ------
    NMSolveError
        If ``part`` is anything else but None.
    """
    if part is None:
        return None
    if isinstance(part, tuple) and len(part) == 2 and all(type(number) is int for number in part):
        k, of = part
        if 1 <= k <= of:
            return k, of
    raise NMSolveError(f"part: expected (K, OF) with 1 <= K <= OF, got {part!r}")


def input_identity(checkpoint: Checkpoint) -> str:
    """A hash of what tells one input from another without reading it: headers, sizes, times of change."""
    seen = [
        (
            shard.path.name,
            hashlib.sha256(shard.header).hexdigest(),
            shard.path.stat().st_size,
            shard.path.stat().st_mtime_ns,
        )
        for shard in checkpoint.shards
    ]
    return hashlib.sha256(json.dumps([seen, UNIT_BYTES]).encode()).hexdigest()
