"""How near to a copy of the matrix is an ordinary mask on a CPU? Writes bench/results/ordinary_cpu.csv.

In turn, round by round, in processor seconds of one thread: a copy into memory that is there ("copy") and
into new memory ("clone"), ``nm_mask`` with all its checks, its kernel alone on memory that is there
("kernel"), and the usual few lines of PyTorch, which take the n largest of each group and scatter them
("topk and scatter"). ``bytes_per_second`` counts the matrix once and what is written once.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest import mock

import common
import torch
from torch import Tensor

import nmsolve
from nmsolve.backends.cpu import masks as cpu

SIDE = 8192
PATTERNS = ("2:4", "4:8", "8:16", "16:32")
DTYPES = ("float32", "bfloat16")
FILE = "ordinary_cpu.csv"


def topk_and_scatter(scores: Tensor, n: int, m: int) -> Tensor:
    groups = scores.view(-1, m)
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(n, dim=1, sorted=False).indices, True).view(scores.shape)


def measure(scores: Tensor, pattern: nmsolve.NMPattern, repeats: int) -> list[dict[str, object]]:
    """A row for each contender."""
    n, m = pattern.n, pattern.m
    there, flags = torch.empty_like(scores), torch.empty(scores.shape, dtype=torch.bool)
    some = scores[: max(1, len(scores) // 16)]  # what takes long

    def kernel() -> None:
        with mock.patch.object(cpu, "_empty_mask", return_value=flags[None]):
            cpu.ordinary(scores[None], pattern)

    contenders = {
        "copy": (scores, lambda: there.copy_(scores)),
        "clone": (scores, scores.clone),
        "nm_mask": (scores, lambda: nmsolve.nm_mask(scores, n, m, backend="cpu")),
        "kernel": (scores, kernel),
        "topk and scatter": (some, lambda: topk_and_scatter(some, n, m)),
    }
    times = common.interleaved(
        {name: run for name, (_, run) in contenders.items()}, repeats, clock=time.process_time
    )
    rows = []
    for name, took in times.items():
        entries, size = contenders[name][0].numel(), scores.element_size()
        written = size if name in ("copy", "clone") else 1
        rows.append(
            {
                "pattern": str(pattern),
                "dtype": str(scores.dtype).removeprefix("torch."),
                "side": scores.shape[1],
                "contender": name,
                "ns_per_entry": took.median / entries * 1e9,
                "ns_least": took.least / entries * 1e9,
                "ns_most": took.most / entries * 1e9,
                "bytes_per_second": (size + written) * entries / took.median,
                "repeats": took.repeats,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=SIDE, help=f"rows and columns of the matrix ({SIDE})")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds (7)")
    parser.add_argument("--out", type=Path, default=common.RESULTS / FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        scores = torch.randn(args.side, args.side, generator=torch.Generator().manual_seed(0))
        for pattern in map(nmsolve.NMPattern.of, PATTERNS):
            for row in measure(scores.to(getattr(torch, dtype)), pattern, args.repeats):
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
                rows.append(row)
    common.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
