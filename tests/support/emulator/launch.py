"""A launch: the CTAs of a grid one group after the other, and what is counted while they run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emulator.arithmetic import Array
from emulator.machine import Kernel
from emulator.memory import GlobalMemory


class KnownError(Exception):
    """What is about to run has been executed before."""


@dataclass
class Settings:
    """How launches are executed.

    Attributes
    ----------
    seed
        Warps take turns at random from this seed on; None: in lockstep.
    contracted
        Products and sums are rounded once where the assembler may make it so.
    threads
        About so many are executed together.
    most_steps
        Blocks that a group of CTAs may execute.
    only
        Number of CTAs -> the first ones of the groups that run; None: all.
    known
        Name of a kernel and digest of its PTX: before it runs, :class:`KnownError` is raised.
    """

    seed: int | None = None
    contracted: bool = False
    threads: int = 2048
    most_steps: int = 10**7
    only: Callable[[int], Iterable[int]] | None = None
    known: tuple[str, str] | None = None


class Launch:
    """One launch, run.

    Attributes
    ----------
    values
        Parameter's name -> its bits as an integer.
    entered
        Block -> warps that executed it.
    diverged
        Block -> times that a part of a warp executed it.
    same_shared_stores, divisions_by_zero
        By threads.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        values: Iterable[int],
        ranges: Iterable[tuple[int, int]],
        shared: int = 0,
        settings: Settings | None = None,
    ) -> None:
        """``ranges``: of bytes that may be touched; ``shared``: bytes of shared memory of a CTA."""
        program = kernel.program
        self.kernel, self.grid, self.shared = kernel, grid, shared
        self.settings = settings or Settings()
        if self.settings.known == (program.name, program.digest):
            raise KnownError
        names = [name for _, name in program.parameters]
        self.values: Mapping[str, int] = dict(zip(names, values, strict=True))
        self.memory = GlobalMemory(ranges)
        self.entered: Counter[int] = Counter()
        self.diverged: Counter[int] = Counter()
        self.same_shared_stores = self.divisions_by_zero = self.ctas = 0
        total = int(np.prod(grid))
        together = max(1, self.settings.threads // program.threads)
        start = time.perf_counter()
        with np.errstate(all="ignore"):
            for first in self.settings.only(total) if self.settings.only else range(0, total, together):
                ctas = min(together, total - first)
                kernel.machine(ctas).run(self, first)
                self.ctas += ctas
        self.seconds = time.perf_counter() - start
        self.memory.forget()

    def count(self, block: int, warps: int | Array) -> None:
        """A block is executed by so many warps, or by these lanes ``(warps, 32)``."""
        if isinstance(warps, int):
            self.entered[block] += warps
            return
        some, every = warps.any(1), warps.all(1)
        self.entered[block] += int(some.sum())
        self.diverged[block] += int((some & ~every).sum())

    @property
    def instructions(self) -> int:
        """Warp instructions of PTX."""
        return sum(warps * len(self.kernel.program.blocks[block]) for block, warps in self.entered.items())

    def summary(self) -> dict[str, Any]:
        """What is said about it in a table."""
        return {
            "kernel": self.kernel.program.name,
            "target": self.kernel.program.target,
            "ctas": self.ctas,
            "threads": self.kernel.program.threads,
            "warp_instructions": self.instructions,
            "diverged": sum(self.diverged.values()),
            "same_stores": self.memory.same_stores,
            "same_shared_stores": self.same_shared_stores,
            "divisions_by_zero": self.divisions_by_zero,
            "contractions": self.kernel.contractions,
            "seconds": self.seconds,
        }
