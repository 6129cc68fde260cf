"""The threads of some CTAs, executed together block by block."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emulator import arithmetic
from emulator.arithmetic import TYPES, UNSIGNED, Array, s32, s64, u32
from emulator.contract import contract
from emulator.flow import execution_order
from emulator.memory import Fault, LocalMemory, SharedMemory
from emulator.parse import Program, PtxError
from emulator.translate import LOCAL, Translation

if TYPE_CHECKING:
    from emulator.launch import Launch

Mask = Any
"""The threads that execute a block: True for all, or one bool each."""

Place = tuple[int, int]
"""Block, and instruction in it."""

_WAITING = 1 << 20  # added to a position: the thread waits at the barrier before it
_ENDED = 1 << 24  # the position of a thread that has ended
_ALL_LANES = u32(0xFFFFFFFF)


class Kernel:
    """A program, translated; ``contracted`` multiplications are part of a multiply-add of their own."""

    def __init__(self, text: str, *, contracted: bool = False) -> None:
        self.program = Program(text)
        self.contractions = contract(self.program) if contracted else 0
        self.translation = Translation(self.program)
        self.order = execution_order(self.program.successors)
        self.position = {block: k for k, block in enumerate(self.order)}

    def machine(self, ctas: int) -> Machine:
        """A machine of so many CTAs; the last few are kept, as they are large."""
        key = self, ctas
        if key not in _MACHINES:
            while len(_MACHINES) >= 8:
                _MACHINES.popitem(last=False)
            _MACHINES[key] = Machine(self, ctas)
        _MACHINES.move_to_end(key)
        return _MACHINES[key]


_MACHINES: OrderedDict[tuple[Kernel, int], Machine] = OrderedDict()


class Machine:
    """Registers of all threads of ``ctas`` CTAs, and the functions that a kernel's blocks call.

    Threads are numbered through; functions that check something get the place that they are called from.
    """

    def __init__(self, kernel: Kernel, ctas: int) -> None:
        program = kernel.program
        self.kernel, self.program, self.ctas = kernel, program, ctas
        self.warps_per_cta = program.threads // 32
        self.threads = ctas * program.threads
        self.warps = self.threads // 32
        number = np.arange(self.threads)
        self._everyone = number
        self._cta, self._warp, self._lane = number // program.threads, number // 32, number % 32
        self._tid = (number % program.threads).astype(u32)
        self._here = (0, 0)
        self._butterflies: dict[int, Array] = {}
        self._names = self._bind()
        exec(kernel.translation.code, self._names)
        self._blocks = [self._names[f"block{b}"] for b in range(len(program.blocks))]

    def _bind(self) -> dict[str, Any]:
        """What a block's function can name."""
        names: dict[str, Any] = {"np": np, "copyto": np.copyto, "both": _both, "applied": _applied}
        names |= {name: getattr(arithmetic, name) for name in dir(arithmetic) if not name.startswith("_")}
        names |= {kind.__name__: kind for kind in TYPES.values()}
        for function in (
            self.ld_global, self.st_global, self.ld_shared, self.st_shared, self.ld_local, self.st_local,
            self.ld_generic, self.st_generic, self.ldmatrix, self.stmatrix, self.shuffle_bfly,
            self.shuffle_idx, self.shuffle_up, self.shuffle_down, self.reduce, self.warp_barrier, self.arrive,
            self.divide, self.parameter, self.copy_async, self.commit_copies, self.wait_for_copies,
        ):  # fmt: skip
            names[function.__name__] = function
        translation = self.kernel.translation
        rng = np.random.default_rng(1)
        registers: dict[str, Array] = {}
        for view, (register, kind) in sorted(translation.views.items()):
            if register not in registers:
                registers[register] = self._unwritten(register, rng)
            names[view] = registers[register] if kind is np.bool_ else registers[register].view(kind)
        for name, value in translation.constants.items():
            names[name] = np.full(self.threads, value)
        zero = np.zeros(self.threads, u32)
        names |= {"tid_x": self._tid, "tid_y": zero, "tid_z": zero, "laneid": self._lane.astype(u32)}
        names["ntid_x"] = np.full(self.threads, self.program.threads, u32)
        return names

    def _unwritten(self, register: str, rng: np.random.Generator) -> Array:
        """What a register holds that nobody has written."""
        prefix = re.match(r"%([A-Za-z]+)", register)
        assert prefix is not None
        width = self.program.registers[prefix[1]]
        if width == 0:
            return rng.integers(0, 2, self.threads).astype(bool)
        return rng.integers(0, 1 << (8 * width), self.threads, dtype=UNSIGNED[width])

    # --- a run ----------------------------------------------------------------------------------------------

    def run(self, launch: Launch, first: int) -> None:
        """Execute the CTAs of the grid from number ``first`` on.

        In lockstep, all threads at the block that comes first in the kernel's order go on together. With a
        seed, a random half of the warps that stand where a random warp stands.
        """
        self._start(launch, first)
        at = np.full(self.threads, self.kernel.position[0], s32)  # in the kernel's order
        rng = None if launch.settings.seed is None else np.random.default_rng(launch.settings.seed + first)
        steps = 0
        while (chosen := self._next(at, rng)) is not None:
            position, mask = chosen
            steps += 1
            if steps > launch.settings.most_steps:
                raise PtxError(f"{self.program.name}: {steps} blocks executed: an endless loop?")
            block = self.kernel.order[position]
            launch.count(block, self.warps if mask is True else mask.reshape(-1, 32))
            try:
                self._step(block, mask, at)
            except Fault as fault:
                raise PtxError(self._described(fault, first)) from fault

    def _start(self, launch: Launch, first: int) -> None:
        self._launch, self._global = launch, launch.memory
        self._global.first_thread = first * self.program.threads
        seed = first + 5
        self.shared = SharedMemory(self.ctas, launch.shared, self._cta, self._warp, seed)
        self.local = LocalMemory(self.threads, self.program.local_bytes, seed)
        self._copies: list[_Copy] = []
        self._groups = np.zeros(self.threads, s64)
        across, down, _ = launch.grid
        number = first + self._cta
        places = number % across, number // across % down, number // (across * down)
        self._names |= {f"ctaid_{axis}": place.astype(u32) for axis, place in zip("xyz", places, strict=True)}
        self._names |= {
            f"nctaid_{axis}": np.full(self.threads, n, u32)
            for axis, n in zip("xyz", launch.grid, strict=True)
        }

    def _next(self, at: Array, rng: np.random.Generator | None) -> tuple[int, Mask] | None:
        """The position that is executed next, and by whom; None at the end."""
        position = int(at.min())
        if position >= _ENDED:
            return None
        if position >= _WAITING:
            raise PtxError(f"{self.program.name}: threads have ended that others wait for at a barrier")
        if rng is None:
            mask = at == position
            return position, True if mask.all() else mask
        warp = int(rng.choice(np.flatnonzero((at < _WAITING).reshape(-1, 32).any(1))))
        position = int(at[warp * 32 : warp * 32 + 32].min())
        chosen = rng.random(self.warps) < 0.5
        chosen[warp] = True
        mask = (at == position) & np.repeat(chosen, 32)
        return position, True if mask.all() else mask

    def _step(self, block: int, mask: Mask, at: Array) -> None:
        """Execute a block and move on those who did."""
        position, after = self.kernel.position, self.program.successors[block]
        result = self._blocks[block](mask)
        if result is None:
            np.copyto(at, s32(position[after[0]]), where=mask)
        elif isinstance(result, np.ndarray):
            np.copyto(at, np.where(result, s32(position[after[0]]), s32(position[after[1]])), where=mask)
        elif result == "exit":
            np.copyto(at, s32(_ENDED), where=mask)
        else:
            np.copyto(at, s32(position[after[0]] + _WAITING), where=mask)
            self._release(at.reshape(self.ctas, -1))

    def _release(self, at: Array) -> None:
        """Let the CTAs go on whose threads are all at the barrier."""
        arrived = ((at >= _WAITING) & (at < _ENDED)).all(1)
        if not arrived.any():
            return
        apart = arrived & (at != at[:, :1]).any(1)
        if apart.any():
            threads = np.flatnonzero(np.repeat(apart, self.program.threads))
            raise Fault("threads of a CTA wait at different barriers", threads)
        at[arrived] -= s32(_WAITING)
        self.shared.cta_epoch[arrived] += 1
        self.shared.warp_epoch[np.repeat(arrived, self.warps_per_cta)] += 1

    def _described(self, fault: Fault, first: int) -> str:
        block, k = self._here
        instruction = self.program.blocks[block][k]
        who = ""
        if fault.threads is not None and len(fault.threads):
            thread = int(fault.threads[0])
            cta = first + thread // self.program.threads
            who = f", CTA {cta} thread {self._tid[thread]} ({len(fault.threads)} threads)"
        return f"{self.program.name}: {fault}{who}\n  {instruction.text}\n  {instruction.source}"

    # --- threads together -----------------------------------------------------------------------------------

    def _active(self, mask: Mask) -> Array:
        return self._everyone if mask is True else np.flatnonzero(mask)

    def _whole_warps(self, mask: Mask, members: Array | None = None) -> None:
        """Every warp has all its lanes here, and asks for them all."""
        if mask is not True:
            lanes = mask.reshape(-1, 32)
            partial = lanes.any(1) & ~lanes.all(1)
            if partial.any():
                raise Fault("a warp is not all there", np.flatnonzero(partial) * 32)
        if members is not None:
            threads = self._active(mask)
            fewer = members[threads] != _ALL_LANES
            if fewer.any():
                raise Fault("the member mask is not all lanes", threads[fewer])

    def _shuffle(self, clamp: Array, wanted: int, members: Array, mask: Mask, place: Place) -> None:
        self._here = place
        self._whole_warps(mask, members)
        if (clamp != wanted).any():
            raise Fault("a shuffle within parts of a warp is not known")

    def shuffle_bfly(
        self, x: Array, lane: Array, clamp: Array, members: Array, mask: Mask, place: Place
    ) -> Array:
        self._shuffle(clamp, 31, members, mask, place)
        distance = int(lane[0])
        if (lane != distance).any():
            raise Fault("a butterfly with distances that differ is not known")
        if distance not in self._butterflies:
            self._butterflies[distance] = self._everyone ^ (distance & 31)
        return x.take(self._butterflies[distance])

    def shuffle_idx(
        self, x: Array, lane: Array, clamp: Array, members: Array, mask: Mask, place: Place
    ) -> Array:
        self._shuffle(clamp, 31, members, mask, place)
        return x.take(self._warp * 32 + (lane.astype(s64) & 31))

    def shuffle_up(
        self, x: Array, lane: Array, clamp: Array, members: Array, mask: Mask, place: Place
    ) -> Array:
        self._shuffle(clamp, 0, members, mask, place)
        source = self._lane - (lane.astype(s64) & 31)
        return x.take(self._warp * 32 + np.where(source >= 0, source, self._lane))

    def shuffle_down(
        self, x: Array, lane: Array, clamp: Array, members: Array, mask: Mask, place: Place
    ) -> Array:
        self._shuffle(clamp, 31, members, mask, place)
        source = self._lane + (lane.astype(s64) & 31)
        return x.take(self._warp * 32 + np.where(source <= 31, source, self._lane))

    def reduce(
        self, function: Callable[[Array, Array], Array], x: Array, members: Array, mask: Mask, place: Place
    ) -> Array:
        self._here = place
        self._whole_warps(mask, members)
        lanes = x.reshape(-1, 32)
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = function(np.ascontiguousarray(lanes[:, :half]), np.ascontiguousarray(lanes[:, half:]))
        return np.repeat(lanes[:, 0], 32)

    def warp_barrier(self, members: Array, mask: Mask, place: Place) -> None:
        self._here = place
        self._whole_warps(mask, members)
        self.shared.warp_epoch[self._warp[self._active(mask)[::32]]] += 1

    def arrive(self, mask: Mask, place: Place) -> None:
        """At a barrier of the CTA, which warps reach as a whole."""
        self._here = place
        self._whole_warps(mask)

    def divide(self, x: Array, y: Array, mask: Mask, place: Place) -> Array:
        """Of integers; by zero the result is whatever it is, and counted."""
        zero = y == 0
        if zero.any():
            self._launch.divisions_by_zero += int(zero[self._active(mask)].sum())
            y = np.where(zero, y.dtype.type(1), y)
        return arithmetic.div_trunc(x, y)

    # --- memory ---------------------------------------------------------------------------------------------

    def parameter(self, name: str, kind: type) -> Array:
        bits = np.dtype(kind).itemsize * 8
        value = self._launch.values[name] & ((1 << bits) - 1)
        return np.full(self.threads, np.array([value], UNSIGNED[bits // 8]).view(kind)[0])

    def ld_global(
        self, at: Array, size: int, registers: list[Array | None], mask: Mask, place: Place
    ) -> None:
        threads, self._here = self._active(mask), place
        if len(threads):
            numbers = self._global.load(at[threads], size, len(registers), threads)
            _fill(registers, numbers, threads)

    def st_global(self, at: Array, size: int, registers: list[Array], mask: Mask, place: Place) -> None:
        threads, self._here = self._active(mask), place
        if len(threads):
            self._global.store(at[threads], size, _numbers(registers, size, threads), threads)

    def ld_shared(
        self, at: Array, size: int, registers: list[Array | None], mask: Mask, place: Place
    ) -> None:
        threads, self._here = self._active(mask), place
        if len(threads):
            numbers = self.shared.load(at[threads], size, len(registers), threads)
            _fill(registers, numbers.T, threads)

    def st_shared(self, at: Array, size: int, registers: list[Array], mask: Mask, place: Place) -> None:
        threads, self._here = self._active(mask), place
        if len(threads):
            same = self.shared.store(at[threads], size, _numbers(registers, size, threads), threads)
            self._launch.same_shared_stores += same

    def ld_local(self, at: Array, size: int, registers: list[Array | None], mask: Mask, place: Place) -> None:
        threads, self._here = self._active(mask), place
        if len(threads):
            at = self._local(at, size * len(registers), threads)
            _fill(registers, self.local.load(at, size, len(registers), threads).T, threads)

    def st_local(self, at: Array, size: int, registers: list[Array], mask: Mask, place: Place) -> None:
        threads, self._here = self._active(mask), place
        if len(threads):
            at = self._local(at, size * len(registers), threads)
            self.local.store(at, size, _numbers(registers, size, threads), threads)

    def _local(self, at: Array, total: int, threads: Array) -> Array:
        """Places in local memory of addresses in it, or of generic ones."""
        at = at[threads]
        at = np.where(at >= LOCAL, at - LOCAL, at)
        if not self.local.holds(at, total):
            raise Fault(f"local memory out of bounds ({self.local.size} bytes)", threads)
        return at

    def ld_generic(
        self, at: Array, size: int, registers: list[Array | None], mask: Mask, place: Place
    ) -> None:
        (self.ld_local if self._is_local(at, mask) else self.ld_global)(at, size, registers, mask, place)

    def st_generic(self, at: Array, size: int, registers: list[Array], mask: Mask, place: Place) -> None:
        (self.st_local if self._is_local(at, mask) else self.st_global)(at, size, registers, mask, place)

    def _is_local(self, at: Array, mask: Mask) -> bool:
        return bool((at[self._active(mask)] >= LOCAL).all())

    def copy_async(self, to: Array, source: Array, size: int, read: Array, mask: Mask, place: Place) -> None:
        """The copy is made when it is waited for: who reads too early reads what was there before."""
        threads, self._here = self._active(mask), place
        words = np.zeros((len(threads), size // 4), u32)
        partial = (read[threads] != 0) & (read[threads] != size)
        if partial.any():
            raise Fault("a copy of a part is not known", threads[partial])
        reading = read[threads] == size
        if reading.any():
            who = threads[reading]
            words[reading] = np.stack(self._global.load(source[who], 4, size // 4, who), 1)
        self._copies.append(_Copy(threads, to[threads], words, self._groups[threads]))

    def commit_copies(self, mask: Mask) -> None:
        """What was copied so far is a group, of each thread."""
        self._groups[self._active(mask)] += 1

    def wait_for_copies(self, but: int, mask: Mask, place: Place) -> None:
        """All groups but the last so many are there."""
        self._here = place
        here = np.zeros(self.threads, bool)
        here[self._active(mask)] = True
        rest = []
        for copy in self._copies:
            done = here[copy.threads] & (copy.group < self._groups[copy.threads] - but)
            if done.any():
                words = copy.words[done]
                columns = [np.ascontiguousarray(words[:, k]) for k in range(words.shape[1])]
                same = self.shared.store(copy.to[done], 4, columns, copy.threads[done])
                self._launch.same_shared_stores += same
            if not done.all():
                rest.append(_Copy(*(part[~done] for part in copy)))
        self._copies = rest

    def ldmatrix(self, at: Array, registers: list[Array], turned: bool, mask: Mask, place: Place) -> None:
        """Matrices of 8 rows of 16 bytes, row r of matrix q where lane 8 q + r says; a lane gets 4 bytes."""
        self._here = place
        warps, lanes = self._row_lanes(len(registers), mask)
        data = self.shared.load(at[lanes], 4, 4, lanes).reshape(len(warps), len(registers), 32)
        if turned:
            data = _turned(data)
        for q, register in enumerate(registers):
            register.reshape(-1, 32)[warps] = data[:, q]

    def stmatrix(self, at: Array, registers: list[Array], turned: bool, mask: Mask, place: Place) -> None:
        self._here = place
        warps, lanes = self._row_lanes(len(registers), mask)
        data = np.stack([register.reshape(-1, 32)[warps] for register in registers], 1)
        data = (_turned(data) if turned else data).reshape(len(lanes), 4)
        columns = [np.ascontiguousarray(data[:, c]) for c in range(4)]
        self._launch.same_shared_stores += self.shared.store(at[lanes], 4, columns, lanes)

    def _row_lanes(self, matrices: int, mask: Mask) -> tuple[Array, Array]:
        """Numbers of the warps, and of the threads that give the addresses of the rows."""
        self._whole_warps(mask)
        warps = self._warp[self._active(mask)[::32]]
        return warps, (warps[:, None] * 32 + np.arange(8 * matrices)).ravel()


class _Copy(NamedTuple):
    """A copy from global to shared memory under way, by these threads, each in a group of its own."""

    threads: Array
    to: Array
    words: Array
    group: Array


def _turned(words: Array) -> Array:
    """Matrices of 8 x 8 halves, 32 words each, with rows as columns."""
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape[:-1], 8, 8)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).view(words.dtype).reshape(words.shape)


def _applied(function: Callable[..., Array], *operands: Array) -> Array:
    return function(*operands)


def _both(mask: Mask, condition: Array) -> Array:
    return condition if mask is True else mask & condition


def _fill(registers: list[Array | None], numbers: Any, threads: Array) -> None:
    for register, number in zip(registers, numbers, strict=True):
        if register is not None:
            register[threads] = number.astype(register.dtype)


def _numbers(registers: list[Array], size: int, threads: Array) -> list[Array]:
    return [register[threads].astype(UNSIGNED[size]) for register in registers]
