"""Are masks optimal where entries are forbidden, by -inf or by large negative scores? Against integer flow.

Blocks of integers 1 to 100, of which a third of the entries must not be kept, whatever number says so. The
optimum is that of OR-tools' min-cost flow on integers; a block without a mask of allowed entries alone must
be refused where -inf forbids, and else keep as few forbidden entries as can be, and then as much as can be.
Writes bench/results/forbidden.csv. The triton backend is interpreted, or with NMSOLVE_PTX_SM=90 (80, 100) its
PTX is executed (docs/internals/emulator.md).
"""

from __future__ import annotations

import argparse
import math
import os
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
FORBIDDEN_BY = ("-inf", "-1e9", "-1e14", "-1e30")


def install() -> str:
    """Have the triton backend interpreted or emulated, before it is imported; its name in the file."""
    sm = os.environ.get("NMSOLVE_PTX_SM")
    if not sm:
        os.environ["TRITON_INTERPRET"] = "1"
        from kernel_costs import interpreter

        interpreter.install()
        return "triton, interpreted"
    sys.path.append(str(ROOT / "tests" / "support"))
    import emulator

    emulator.install(int(sm))
    return f"triton, PTX of sm_{sm}"


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


def rows(backends: list[str], named: str, blocks: int, interpreted: int) -> Iterator[dict[str, Any]]:
    for backend in backends:
        for n, m in PATTERNS:
            for dtype in DTYPES:
                for forbidden_by in FORBIDDEN_BY:
                    count = interpreted if backend == "triton" else blocks
                    name = named if backend == "triton" else backend
                    key = dict(zip(KEY, (name, f"{n}:{m}", dtype, forbidden_by), strict=True))
                    yield key | row_of(backend, n, m, dtype, forbidden_by, count)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backends", nargs="+", choices=("cpu", "torch", "triton"), default=["cpu", "torch"])
    parser.add_argument("--blocks", type=int, default=40, help="of each row (40)")
    parser.add_argument("--interpreted", type=int, default=2, help="blocks of each row of triton (2)")
    arguments = parser.parse_args()
    named = install() if "triton" in arguments.backends else ""
    wrong = 0
    for row in rows(arguments.backends, named, arguments.blocks, arguments.interpreted):
        wrong += row["below"] + row["wrongly_refused"]
        replace_rows(RESULTS / FILE, [row], lambda old, row=row: all(old[k] == row[k] for k in KEY))
        print(*row.values(), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
