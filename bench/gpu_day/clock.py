"""Times of calls: medians with quartiles, by the GPU's own clock.

Between two events on a stream lies all that the GPU did, and the waiting for a host that was not fast enough.
So the GPU is kept busy first, while the host puts calls and events in the queue. The calls take turns on
different inputs, which together do not fit the L2 cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from gpu_day.setting import Setting

AHEAD = 16
"""Calls that are queued at once, fewer than a stream's queue holds of launches and events."""
BUSY = 4_000_000
"""Clocks for which the GPU is kept busy: 2 ms, the host's time for that many calls."""


class Times(NamedTuple):
    """Milliseconds; ``host`` is what the host takes to put one call in the queue."""

    median: float
    first_quartile: float
    third_quartile: float
    host: float
    repeats: int

    def columns(self) -> dict[str, object]:
        """As a row of results has them."""
        quartiles = {"ms_first_quartile": self.first_quartile, "ms_third_quartile": self.third_quartile}
        return {"ms": self.median, **quartiles, "host_ms": self.host, "repeats": self.repeats}


COLUMNS = ("ms", "ms_first_quartile", "ms_third_quartile", "host_ms", "repeats")


def summary(taken: Sequence[float], host: float) -> Times:
    """Of milliseconds."""
    first, median, third = statistics.quantiles(taken, n=4, method="inclusive")
    return Times(median, first, third, host, len(taken))


def inputs_to_rotate(setting: Setting, size: int) -> int:
    """How many inputs of ``size`` bytes are three times the L2 cache; at least two, at most 32."""
    if setting.device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(setting.device).L2_cache_size
    return max(2, min(32, -(-3 * cache // max(1, size))))


def timed(setting: Setting, calls: Sequence[Callable[[], object]], seconds: float) -> Times:
    """``calls`` do the same on different inputs; about ``seconds`` are spent, after one call of each."""
    repeats = _repeats(setting, calls, seconds)
    if setting.device.type != "cuda":
        return _by_wall_clock(setting, calls, repeats)
    taken: list[float] = []
    host = 0.0
    while len(taken) < repeats:
        count = min(AHEAD, repeats - len(taken))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda._sleep(BUSY)
        begin = time.perf_counter()
        for k, (first, last) in enumerate(events):
            first.record()
            calls[(len(taken) + k) % len(calls)]()
            last.record()
        host += time.perf_counter() - begin
        torch.cuda.synchronize(setting.device)
        taken += [first.elapsed_time(last) for first, last in events]
    return summary(taken, 1e3 * host / repeats)


def whole(setting: Setting, calls: Sequence[Callable[[], object]], seconds: float) -> Times:
    """The same by the host's clock, from the call until the GPU is done: where the host's share matters."""
    return _by_wall_clock(setting, calls, _repeats(setting, calls, seconds))


def _repeats(setting: Setting, calls: Sequence[Callable[[], object]], seconds: float) -> int:
    """How often a call fits into the seconds, after one of each."""
    for call in calls:
        call()
    setting.synchronize()
    start = time.perf_counter()
    calls[0]()
    setting.synchronize()
    once = time.perf_counter() - start
    least, most = setting.repeats
    return max(least, min(most, int(seconds / max(once, 1e-6))))


def _by_wall_clock(setting: Setting, calls: Sequence[Callable[[], object]], repeats: int) -> Times:
    taken, host = [], 0.0
    for k in range(repeats):
        begin = time.perf_counter()
        calls[k % len(calls)]()
        host += time.perf_counter() - begin
        setting.synchronize()
        taken.append(1e3 * (time.perf_counter() - begin))
    return summary(taken, 1e3 * host / repeats)
