"""A lower bound on a kernel's time from its machine code: what every unit of the GPU must at least do.

    time = max(bytes / bandwidth,
               max over units of (instructions of a program / rate) * programs / SMs / clock)

A multiprocessor issues four warp instructions a clock; each kind also has a unit with a rate of its own.
Latency, diverging warps, uneven ends and bank conflicts are not in it;
docs/internals/kernel-costs.md has the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LANES = 32
SCHEDULERS = 4


class Gpu(NamedTuple):
    """A GPU as its maker describes it; rates are lanes per clock and multiprocessor."""

    name: str
    multiprocessors: int
    clock: float
    """Hz, the highest."""
    bandwidth: float
    """Bytes per second."""
    fma: int
    """float32 additions and multiply-adds; integer multiply-adds run on 64 of these."""
    minmax: int
    """float32 minima and maxima."""
    shares: bool
    """Whether a pair of float16 takes both of the units that float32 alternates between, unless it is one of
    the tensor unit's (``.MMA``)."""
    double: int
    shared: int
    """Bytes of shared memory per multiprocessor."""


GPUS = {
    "sm_80": Gpu("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, 64, 64, False, 32, 164 << 10),
    "sm_90": Gpu("H100 SXM", 132, 1.98e9, 3.35e12, 128, 64, True, 64, 228 << 10),
    "sm_100": Gpu("B200", 148, 1.965e9, 8.0e12, 128, 128, True, 64, 228 << 10),
}
INTEGER, SPECIAL, EXCHANGE, HALF = 64, 16, 32, 128
"""Lanes per clock of integer and logic instructions (and of float32 comparisons and selections), of special
functions and conversions, of shuffles, loads and stores, and of arithmetic with pairs of float16."""

WARPS, PROGRAMS, REGISTERS = 64, 32, 65536
"""What a multiprocessor holds at most."""


def occupancy(gpu: Gpu, registers: int, warps: int, shared: int) -> float:
    """Warps that a multiprocessor holds at once, over the 64 that it could."""
    per_warp = -(-registers * LANES // 256) * 256
    programs = min(PROGRAMS, WARPS // warps, REGISTERS // (per_warp * warps))
    if shared:
        programs = min(programs, gpu.shared // (shared + 1024))
    return programs * warps / WARPS


def clocks(gpu: Gpu, pipes: Mapping[str, float]) -> dict[str, float]:
    """Clocks for which warp instructions, counted by :func:`sass.pipe`, occupy each unit of an SM."""

    def of(*names: str) -> float:
        return sum(pipes.get(name, 0.0) for name in names) * LANES

    return {
        "issue": sum(pipes.values()) / SCHEDULERS,
        "float": (of("fma", "fma_heavy") + 2 * of("fma_packed") + 2 * gpu.shares * of("half")) / gpu.fma,
        "half": of("half", "half_mma") / HALF,
        "integer": (of("alu") + of("minmax") * INTEGER / gpu.minmax) / INTEGER,
        "special": of("special") / SPECIAL,
        "exchange": of("shuffle", "memory") / EXCHANGE,
        "double": of("double") / gpu.double,
    }


class Prediction(NamedTuple):
    """Seconds, seconds that the memory traffic alone takes, and what limits."""

    seconds: float
    floor: float
    bound: str


def predict(gpu: Gpu, pipes: Mapping[str, float], programs: float, bytes_moved: float) -> Prediction:
    """Lower bound for ``programs`` that execute ``pipes`` warp instructions each."""
    floor = bytes_moved / gpu.bandwidth
    units = {
        name: value * programs / gpu.multiprocessors / gpu.clock for name, value in clocks(gpu, pipes).items()
    }
    bound = max(units, key=units.__getitem__)
    if floor >= units[bound]:
        return Prediction(floor, floor, "memory")
    return Prediction(units[bound], floor, bound)
