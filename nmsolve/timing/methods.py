"""What ``nmsolve bench`` measures: the time of the mask methods, on this machine."""

from __future__ import annotations

import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nmsolve
from nmsolve.about import __version__, versions
from nmsolve.backends.dispatch import MASK_METHODS, select
from nmsolve.blocks import grid_of
from nmsolve.files import write_text
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.solution import kept_score
from nmsolve.timing import TIMED

__all__ = [
    "Timing",
    "call_of",
    "kept_by",
    "measure",
    "measured_on",
    "optimum_of",
    "seconds_of",
    "write_timings",
]


@dataclass(frozen=True)
class Timing:
    """Time of one method on one matrix; ``gap`` is None for ordinary N:M, which is its own optimum."""

    pattern: str
    method: str
    backend: str
    device: str
    dtype: str
    rows: int
    cols: int
    repeats: int
    milliseconds: float
    least: float
    most: float
    gigaweights_per_second: float
    microseconds_per_block: float
    gap: float | None


def seconds_of(
    work: Callable[[], object], device: torch.device, repeats: int, warm_up: int = 2
) -> list[float]:
    """Seconds of each repeat: by the GPU's own clock on a GPU, by the wall clock elsewhere."""
    for _ in range(warm_up):
        work()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            taken.append(time.perf_counter() - begin)
    return taken


def measure(
    patterns: Iterable[PatternLike],
    sizes: Iterable[tuple[int, int]],
    *,
    methods: Iterable[str] = TIMED,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str = "auto",
    repeats: int = 5,
    seed: int = 0,
) -> Iterator[Timing]:
    """Times on |normal| scores, pattern by pattern and size by size.

    The first calls, which compile, are not timed. Backends that cannot run raise before any work.

    Examples
    --------
    >>> (row,) = measure([NMPattern(2, 4)], [(64, 64)], methods=["greedy"], backend="torch", repeats=1)
    >>> row.method, row.rows, row.gap >= 0
    ('greedy', 64, True)
    """
    chosen = [NMPattern.of(pattern) for pattern in patterns]
    sizes, methods, where = list(sizes), list(methods), torch.device(device)
    for pattern in chosen:
        select(backend, where, pattern.m)
    for pattern in chosen:
        solver = select(backend, where, pattern.m).name
        for rows, cols in sizes:
            generator = torch.Generator(where).manual_seed(seed)
            scores = torch.randn(rows, cols, generator=generator, device=where).abs().to(dtype)
            grid = grid_of(scores, pattern)
            transposable = set(methods) & set(MASK_METHODS)
            bound = optimum_of(scores, pattern, backend) if transposable else 0.0
            for method in methods:
                call = call_of(scores, pattern, method, backend)
                taken = seconds_of(call, where, repeats)
                median = statistics.median(taken)
                gap = None
                if method != "ordinary":
                    gap = max(0.0, bound - kept_by(scores, call(), pattern)) / bound
                yield Timing(
                    pattern=str(pattern),
                    method=method,
                    backend=solver,
                    device=str(where),
                    dtype=str(dtype).removeprefix("torch."),
                    rows=rows,
                    cols=cols,
                    repeats=repeats,
                    milliseconds=median * 1e3,
                    least=min(taken) * 1e3,
                    most=max(taken) * 1e3,
                    gigaweights_per_second=rows * cols / median / 1e9,
                    microseconds_per_block=median * 1e6 / (grid.block_rows * grid.block_cols),
                    gap=gap,
                )


def call_of(
    scores: Tensor, pattern: NMPattern, method: str, backend: str, *, solution: bool = False
) -> Callable[[], Tensor]:
    if method == "ordinary":
        return lambda: nmsolve.nm_mask(scores, pattern.n, pattern.m, backend=backend)
    if solution:
        return lambda: (
            nmsolve.transposable_mask(
                scores, pattern.n, pattern.m, method=method, backend=backend, return_solution=True
            ).mask
        )
    return lambda: nmsolve.transposable_mask(scores, pattern.n, pattern.m, method=method, backend=backend)


def optimum_of(scores: Tensor, pattern: NMPattern, backend: str) -> float:
    solution = nmsolve.transposable_mask(scores, pattern.n, pattern.m, backend=backend, return_solution=True)
    return solution.total_bound


def kept_by(scores: Tensor, mask: Tensor, pattern: NMPattern) -> float:
    return float(kept_score(scores, mask, pattern)[0].sum())


def measured_on(device: str) -> dict[str, Any]:
    """Where a table was measured."""
    where = torch.device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else str(where)
    return {"gpu": name, "nmsolve": __version__, "torch": torch.__version__}


def write_timings(path: Path, timings: Sequence[Timing], device: str) -> None:
    """Writes timings with what they were measured on as .json, or as .csv; whole or not at all."""
    where = {**measured_on(device), **versions(), "nmsolve": __version__}
    rows = [{**asdict(timing), **where} for timing in timings]
    if path.suffix == ".json":
        write_text(path, json.dumps(rows, indent=2) + "\n")
        return
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())
