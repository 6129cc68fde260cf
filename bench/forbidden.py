"""Are masks optimal where entries are forbidden, by -inf or by large negative scores? Against integer flow.

Blocks of integers 1 to 100, of which a third of the entries must not be kept, whatever number says so. The
optimum is that of OR-tools' min-cost flow on integers; a block without a mask of allowed entries alone must
be refused where -inf forbids, and else keep as few forbidden entries as can be, and then as much as can be.
Writes bench/results/forbidden.csv. The triton backend is interpreted, and its PTX executed
(docs/internals/emulator.md), each in a child.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch
from common import RESULTS, ROOT, replace_rows
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow
from torch import Tensor

FILE = "forbidden.csv"
KEY = ("backend", "pattern", "dtype", "forbidden_by")
PATTERNS = ((2, 4), (3, 8), (8, 16), (16, 32))
DTYPES = ("float32", "float64", "bfloat16", "float16")
BACKENDS = {
    "cpu": ("cpu", "cpu"),
    "torch": ("torch", "torch"),
    "interpreted": ("triton", "triton, interpreted"),
    "emulated": ("triton", "triton, PTX of sm_90"),
}
"""What can be asked for: the backend, and its name in the file."""
CAPABILITY = 90
FORBIDDEN_BY = ("-inf", "-1e9", "-1e14", "-1e30")


def optimum(block: Tensor, allowed: Tensor, n: int) -> tuple[int, int]:
    """(forbidden entries kept, score of the others) of the best mask of a square block of integers."""
    m = len(block)
    most = m * n * 101
    worth = torch.where(allowed, block, torch.full_like(block, -most)).long()
    flow = SimpleMinCostFlow()
    row, col = (index.flatten().numpy() for index in torch.meshgrid(*[torch.arange(m)] * 2, indexing="ij"))
    ones = torch.ones(m * m, dtype=torch.int64).numpy()
    arcs = flow.add_arcs_with_capacity_and_unit_cost(row, col + m, ones, -worth.flatten().numpy())
    flow.set_nodes_supplies(torch.arange(2 * m).numpy(), torch.tensor([n] * m + [-n] * m).numpy())
    if flow.solve() != flow.OPTIMAL:
        raise RuntimeError("OR-tools found no flow")
    kept = torch.from_numpy(flow.flows(arcs)).view(m, m) > 0
    return score_of(block, allowed, kept)


def score_of(block: Tensor, allowed: Tensor, mask: Tensor) -> tuple[int, int]:
    return int((mask & ~allowed).sum()), int(block[mask & allowed].sum())


def row_of(backend: str, n: int, m: int, dtype: str, forbidden_by: str, blocks: int) -> dict[str, Any]:
    """Solve and compare."""
    import nmsolve

    g = torch.Generator().manual_seed(m)
    values = torch.randint(1, 101, (blocks, m, m), generator=g).double()
    allowed = torch.rand(blocks, m, m, generator=g) >= 1 / 3
    kept_as = getattr(torch, dtype)
    large = max(float(forbidden_by), -math.inf if forbidden_by == "-inf" else -torch.finfo(kept_as).max)
    scores = values.masked_fill(~allowed, large).to(kept_as)
    below = refused = wrongly = 0
    gap = 0.0
    for block, may, x in zip(values, allowed, scores, strict=True):
        best = optimum(block, may, n)
        try:
            found = nmsolve.transposable_mask(x, n, m, backend=backend, return_solution=True)
        except nmsolve.NMSolveError:
            refused += 1
            wrongly += best[0] == 0
            continue
        if best[0] and large == -math.inf:
            wrongly += 1  # kept what must not be
        nmsolve.check_mask(found.mask, n, m)
        out, score = score_of(block, may, found.mask)
        below += (-out, score) < (-best[0], best[1])
        gap = max(gap, found.max_gap)
    return {
        "blocks": blocks,
        "below": below,
        "refused": refused,
        "wrongly_refused": wrongly,
        "largest_gap": gap,
    }


def rows(backend: str, named: str, blocks: int) -> Iterator[dict[str, Any]]:
    for n, m in PATTERNS:
        for dtype in DTYPES:
            for forbidden_by in FORBIDDEN_BY:
                key = dict(zip(KEY, (named, f"{n}:{m}", dtype, forbidden_by), strict=True))
                yield key | row_of(backend, n, m, dtype, forbidden_by, blocks)


def in_a_child(way: str, blocks: int) -> int:
    """The triton backend in a process of its own, where its kernels are interpreted or executed from PTX."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "bench"), "forbidden"]
    if way == "emulated":
        del environment["TRITON_INTERPRET"]
        script = ROOT.joinpath("tests", "support", "on_emulator.py")
        command = [sys.executable, str(script), str(CAPABILITY), "forbidden"]
    return subprocess.run([*command, "--here", way, "--few", str(blocks)], env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--blocks", type=int, default=40, help="of each row of cpu and torch (40)")
    parser.add_argument("--few", type=int, default=2, help="blocks of each row of triton (2)")
    parser.add_argument("--here", choices=BACKENDS, help="one, with kernels as this process has them")
    arguments = parser.parse_args()
    wrong = 0
    for name in [arguments.here] if arguments.here else arguments.backends:
        backend, named = BACKENDS[name]
        if backend == "triton" and not arguments.here:
            wrong += in_a_child(name, arguments.few)
            continue
        for row in rows(backend, named, arguments.few if backend == "triton" else arguments.blocks):
            wrong += row["below"] + row["wrongly_refused"]
            replace_rows(RESULTS / FILE, [row], lambda old, row=row: all(old[k] == row[k] for k in KEY))
            print(*row.values(), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
