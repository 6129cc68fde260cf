"""Memory as a kernel sees it, and who touched what.

Every check raises :class:`Fault`. Global memory is that of this process, of which a launch may touch the
bytes of its tensors. Two threads of a launch may not touch a byte of which one of them changes the value:
neither barriers nor the end of a CTA order them here. In shared memory they may if a barrier stands between,
of the CTA or, for threads of one warp, of the warp.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import numpy as np

from emulator.arithmetic import UNSIGNED, Array, s32, s64, u8

_FIRST = 1 << 20
_PROCESS = {
    size: np.ctypeslib.as_array((kind * (((1 << 47) - _FIRST) // size)).from_address(_FIRST))
    for size, kind in (
        (1, ctypes.c_uint8), (2, ctypes.c_uint16), (4, ctypes.c_uint32), (8, ctypes.c_uint64),
    )
}  # fmt: skip
"""Bytes of a number -> this process's memory as an array of such numbers, from address ``_FIRST`` on."""

_TRACKED_AT_MOST = 1 << 30
"""Bytes of a launch's tensors; in larger ones nobody's accesses are remembered."""


def _differ(a: Array, b: Array) -> Array:
    """Where numbers differ; NaN is one number, as it is to the hardware's arithmetic and not to NumPy's."""
    differ = a != b
    if a.itemsize == 4 and differ.any():
        differ &= ((a & 0x7FFFFFFF) <= 0x7F800000) | ((b & 0x7FFFFFFF) <= 0x7F800000)
    return differ


class Fault(Exception):
    """What is wrong, and the threads: their numbers within the machine."""

    def __init__(self, what: str, threads: Array | None = None) -> None:
        super().__init__(what)
        self.threads = threads


class GlobalMemory:
    """The byte ranges that a launch may touch.

    Attributes
    ----------
    first_thread
        The number in the launch of the machine's first thread.
    same_stores
        Bytes that several threads stored one value to, which is no race.
    """

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for start, end in sorted(set(ranges)):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self._starts = np.array([start for start, _ in merged] or [0], s64)
        self._ends = np.array([end for _, end in merged] or [0], s64)
        self._places = np.concatenate([[0], np.cumsum(self._ends - self._starts)])
        size = int(self._places[-1])
        self._tracks = size < _TRACKED_AT_MOST
        # 0: nobody, k + 1: thread k, -1: several
        self._written = np.zeros(size if self._tracks else 0, s32)
        self._read = np.zeros(size if self._tracks else 0, s32)
        self.first_thread = 0
        self.same_stores = 0

    def forget(self) -> None:
        """Free what was remembered, after the launch."""
        self._written = self._read = np.zeros(0, s32)

    def load(self, at: Array, size: int, count: int, threads: Array) -> list[Array]:
        """``count`` numbers of ``size`` bytes for each thread."""
        place = self._checked(at, size * count, "load", threads)
        if self._tracks:
            self._note_read(place[:, None] + np.arange(size * count), threads)
        return [_PROCESS[size][(at + (k * size - _FIRST)) // size] for k in range(count)]

    def store(self, at: Array, size: int, values: list[Array], threads: Array) -> None:
        place = self._checked(at, size * len(values), "store", threads)
        for k, value in enumerate(values):
            words = (at + (k * size - _FIRST)) // size
            if self._tracks:
                bytes_ = place[:, None] + np.arange(k * size, (k + 1) * size)
                self._note_write(bytes_, words, size, value, threads)
            _PROCESS[size][words] = value

    def _checked(self, at: Array, total: int, what: str, threads: Array) -> Array:
        """Where the accesses lie among the tracked bytes."""
        which = np.searchsorted(self._starts, at, side="right") - 1
        bad = (which < 0) | (at + total > self._ends[which])
        if bad.any():
            raise Fault(f"{what} out of bounds (address {at[bad][0]:#x})", threads[bad])
        bad = at % total != 0
        if bad.any():
            raise Fault(f"{what} misaligned ({total} bytes at {at[bad][0]:#x})", threads[bad])
        return self._places[which] + (at - self._starts[which])

    def _note_read(self, place: Array, threads: Array) -> None:
        mine = self.first_thread + threads[:, None] + 1
        written = self._written[place]
        bad = ((written != 0) & (written != mine)).any(1)
        if bad.any():
            raise Fault("race in global memory: reads what another thread writes", threads[bad])
        read = self._read[place]
        self._read[place] = np.where((read == 0) | (read == mine), mine, -1)
        shared = self._read[place] != mine  # by threads of this very access
        self._read[place[shared]] = -1

    def _note_write(self, place: Array, words: Array, size: int, value: Array, threads: Array) -> None:
        mine = self.first_thread + threads[:, None] + 1
        written, read = self._written[place], self._read[place]
        bad = ((read != 0) & (read != mine)).any(1)
        if bad.any():
            raise Fault("race in global memory: writes what another thread reads", threads[bad])
        again = ((written != 0) & (written != mine)).any(1)
        bad = again & _differ(_PROCESS[size][words], value)
        if bad.any():
            raise Fault("race in global memory: two threads store different values", threads[bad])
        order = np.argsort(words, kind="stable")
        twice = words[order][1:] == words[order][:-1]
        bad = twice & _differ(value[order][1:], value[order][:-1])
        if bad.any():
            what = "race in global memory: two threads store different values at once"
            raise Fault(what, threads[order][1:][bad])
        self.same_stores += size * (int(again.sum()) + int(twice.sum()))
        self._written[place] = mine


class SharedMemory:
    """That of several CTAs, one behind the other; addresses are those within a CTA.

    Barriers divide the time of a CTA, and of a warp, in epochs; of every byte the last writer and the last
    reader are known, the epochs they were in, and whether others read it in these.
    """

    def __init__(self, ctas: int, size: int, cta: Array, warp: Array, seed: int) -> None:
        """``cta``, ``warp``: of each thread."""
        self.size, self._cta, self._warp = size, cta, warp
        n = max(1, ctas * size)
        self._bytes = np.random.default_rng(seed).integers(0, 256, n, dtype=u8)
        self._writer, self._reader = _Last(n), _Last(n)
        self._other_warps, self._other_lanes = np.zeros(n, bool), np.zeros(n, bool)
        self.cta_epoch = np.zeros(ctas, s64)
        self.warp_epoch = np.zeros(int(warp[-1]) + 1, s64)

    def load(self, at: Array, size: int, count: int, threads: Array) -> Array:
        """Numbers ``(threads, count)``."""
        place = self._places(at, size * count, threads)
        self._note_read(place, threads)
        return self._bytes[place].view(UNSIGNED[size]).reshape(len(threads), count)

    def store(self, at: Array, size: int, values: list[Array], threads: Array) -> int:
        """The number of threads whose stores others repeated with the same value."""
        place = self._places(at, size * len(values), threads)
        data = np.stack(values, 1).view(u8).reshape(place.shape)
        return self._note_write(place, data, threads, UNSIGNED[size])

    def _places(self, at: Array, total: int, threads: Array) -> Array:
        bad = (at < 0) | (at + total > self.size)
        if bad.any():
            raise Fault(f"shared memory out of bounds (at {at[bad][0]} of {self.size} bytes)", threads[bad])
        bad = at % total != 0
        if bad.any():
            raise Fault(f"shared memory misaligned ({total} bytes at {at[bad][0]})", threads[bad])
        return (at + self._cta[threads] * self.size)[:, None] + np.arange(total)

    def _epochs(self, threads: Array) -> tuple[Array, Array]:
        """Of the CTA and of the warp of each thread, as columns."""
        return self.cta_epoch[self._cta[threads], None], self.warp_epoch[self._warp[threads], None]

    def _note_read(self, place: Array, threads: Array) -> None:
        unwritten = (self._writer.thread[place] < 0).any(1)
        if unwritten.any():
            raise Fault("shared memory read before it is written", threads[unwritten])
        epochs = self._epochs(threads)
        self._check(place, threads, epochs, self._writer, "read after write")
        last, thread = self._reader, threads[:, None]
        since_cta = last.cta_epoch[place] == epochs[0]
        if since_cta.any():
            before = last.thread[place]
            far = self._warp[before] != self._warp[thread]
            same_warp = since_cta & (last.warp_epoch[place] == epochs[1]) & ~far
            self._other_warps[place] = since_cta & (self._other_warps[place] | far)
            self._other_lanes[place] = same_warp & (self._other_lanes[place] | (before != thread))
        else:
            self._other_warps[place] = self._other_lanes[place] = False
        last.put(place, thread, epochs)
        # Several threads of this very access.
        beside = last.thread[place] != thread
        if beside.any():
            self._other_lanes[place[beside]] = True
            far = beside & (self._warp[last.thread[place]] != self._warp[thread])
            self._other_warps[place[far]] = True

    def _note_write(self, place: Array, data: Array, threads: Array, number: type) -> int:
        epochs = self._epochs(threads)
        # Copies of one value that threads store are harmless.
        changes = _differ(self._bytes[place].view(number), data.view(number)).any(1)
        if changes.any():
            which = place[changes], threads[changes], tuple(epoch[changes] for epoch in epochs)
            self._check(*which, self._writer, "write after write")
        self._check(place, threads, epochs, self._reader, "write after read")
        self._bytes[place] = data
        differ = _differ(self._bytes[place].view(number), data.view(number)).any(1)
        if differ.any():
            raise Fault("race in shared memory: threads store different values at once", threads[differ])
        self._writer.put(place, threads[:, None], epochs)
        return int((self._writer.thread[place] != threads[:, None]).any(1).sum())

    def _check(self, place: Array, threads: Array, epochs: tuple[Array, ...], last: _Last, what: str) -> None:
        """No other thread's access since the barrier: of the CTA, or of the warp for those of one warp."""
        since_cta = last.cta_epoch[place] == epochs[0]
        if not since_cta.any():  # as between barriers: what follows is for the rest
            return
        thread = threads[:, None]
        before = last.thread[place]
        far = self._warp[before] != self._warp[thread]
        several = last is self._reader  # of whom the last does not tell all
        between = since_cta & ((self._other_warps[place] | far) if several else far)
        if between.any():
            raise Fault(f"race in shared memory between warps: {what}", threads[between.any(1)])
        since_warp = since_cta & ~far & (last.warp_epoch[place] == epochs[1])
        other = before != thread
        within = since_warp & ((self._other_lanes[place] | other) if several else other)
        if within.any():
            raise Fault(f"race in shared memory within a warp: {what}", threads[within.any(1)])


class _Last:
    """The last thread that did something to each byte, and its epochs; -1: nobody."""

    def __init__(self, n: int) -> None:
        self.thread, self.cta_epoch, self.warp_epoch = (np.full(n, -1, s64) for _ in range(3))

    def put(self, place: Array, thread: Array, epochs: tuple[Array, Array]) -> None:
        self.thread[place], (self.cta_epoch[place], self.warp_epoch[place]) = thread, epochs


class LocalMemory:
    """Each thread's own, for spilled registers and the like."""

    def __init__(self, threads: int, size: int, seed: int) -> None:
        self.size = size
        self._bytes = np.random.default_rng(seed).integers(0, 256, (threads, size), dtype=u8)
        self._written = np.zeros((threads, size), bool)

    def holds(self, at: Array, total: int) -> bool:
        return bool(((at >= 0) & (at + total <= self.size)).all())

    def load(self, at: Array, size: int, count: int, threads: Array) -> Array:
        """Numbers ``(threads, count)``."""
        place = at[:, None] + np.arange(size * count)
        lines = threads[:, None]
        unwritten = ~self._written[lines, place].all(1)
        if unwritten.any():
            raise Fault("local memory read before it is written", threads[unwritten])
        return self._bytes[lines, place].view(UNSIGNED[size]).reshape(len(threads), count)

    def store(self, at: Array, size: int, values: list[Array], threads: Array) -> None:
        data = np.stack(values, 1).view(u8).reshape(len(threads), -1)
        place = at[:, None] + np.arange(data.shape[1])
        self._bytes[threads[:, None], place] = data
        self._written[threads[:, None], place] = True
