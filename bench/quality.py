"""Are the masks what they are said to be? Checked on random blocks against two independent exact solvers.

Writes bench/results/quality.csv and ends with exit code 1 if a claim does not hold. For every backend, block
size and kept count, on all score distributions: every row and column of every mask holds exactly n; the kept
score equals that of OR-tools' min-cost flow, and on a sample that of HiGHS; the bound follows from the duals
and is no less than the kept score; the gap is at rounding level. The approximate methods, ours and the
published ones, are measured against the optimum.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import torch
from common import DISTRIBUTIONS, PATTERNS, RESULTS, scores, table, write_csv
from peers.min_cost_flow import optimal_masks
from peers.tsenor import tsenor
from peers.two_approximation import two_approximation
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, kron
from torch import Tensor

import nmsolve

# Block size -> kept counts, blocks per (kept count, distribution, dtype).
CASES = {
    2: ((1,), 64),
    4: ((1, 2, 3), 64),
    5: ((2, 4), 32),
    8: ((1, 2, 4, 5, 7), 64),
    12: ((3, 6, 11), 32),
    16: ((1, 4, 8, 13, 15), 64),
    24: ((5, 12), 32),
    32: ((1, 8, 16, 25, 31), 32),
    64: ((1, 16, 32, 63), 12),
}
INTERPRETER_CASES = {
    4: ((1, 2), 12),
    8: ((4, 7), 8),
    12: ((6,), 4),
    16: ((5, 8), 4),
    32: ((16,), 2),
    64: ((32,), 1),
}
INTERPRETER_DISTRIBUTIONS = ("normal", "signed", "student_t", "wanda", "ties", "zero", "huge")

OBJECTIVE_ERROR = 1e-6
GAP = {torch.float32: 1e-6, torch.float64: 1e-9}
ROUNDING = 1e-12  # float64 sums of the same numbers in another order
TSENOR_ERROR = 0.002


def highs_score(block: np.ndarray, n: int) -> float:
    """The linear program's optimum of one ``(m, m)`` block."""
    m = len(block)
    peak = np.abs(block).max() or 1.0
    ones = np.ones((1, m))
    sums = csr_array(np.vstack([kron(eye_array(m), ones).toarray(), kron(ones, eye_array(m)).toarray()]))
    result = linprog(
        -(block / peak).ravel(), A_eq=sums, b_eq=np.full(2 * m, n), bounds=(0, 1), method="highs"
    )
    if result.status != 0:
        raise RuntimeError(result.message)
    return -result.fun * peak


def kept(blocks: Tensor, masks: Tensor) -> Tensor:
    return (blocks.double() * masks).sum((1, 2))


def full(masks: Tensor, n: int) -> Tensor:
    """Which blocks hold exactly n in every row and column."""
    return (masks.sum(1) == n).all(1) & (masks.sum(2) == n).all(1)


def relative(difference: Tensor, scale: Tensor) -> Tensor:
    return torch.where(difference == 0, 0.0, difference / scale)


def bound_from(blocks: Tensor, u: Tensor, v: Tensor, n: int) -> Tensor:
    """D(u, v) = n sum(u) + n sum(v) + sum max(0, A - u - v), in float64."""
    u, v = u.double(), v.double()
    surplus = (blocks.double() - u.unsqueeze(2) - v.unsqueeze(1)).clamp(min=0)
    return n * (u.sum(1) + v.sum(1)) + surplus.sum((1, 2))


def exact_rows(
    backends: tuple[str, ...], cases: dict, distributions: tuple[str, ...], dtypes: tuple[torch.dtype, ...]
) -> Iterator[dict]:
    """One summary row per dtype, block size and backend."""
    for dtype in dtypes:
        for m, (counts, batch) in cases.items():
            worst = {
                backend: {
                    "blocks": 0,
                    "full": 0,
                    "flow": 0.0,
                    "highs": 0.0,
                    "gap": 0.0,
                    "under": 0.0,
                    "bound": 0.0,
                }
                for backend in backends
            }
            highs_blocks = 0
            for seed, (n, name) in enumerate((n, name) for n in counts for name in distributions):
                blocks = scores(name, (batch, m, m), seed)
                if dtype == torch.float64:
                    blocks = blocks.double() * 1.1  # not representable in float32; ties stay ties
                values = blocks.double().numpy()
                best_mask = torch.from_numpy(optimal_masks(values, n))
                best, scale = kept(blocks, best_mask), kept(blocks.abs(), best_mask)
                by_highs = torch.tensor(highs_score(values[0], n), dtype=torch.float64)
                highs_blocks += 1
                for backend in backends:
                    solution = nmsolve.solve_blocks(blocks, n, backend=backend)
                    score = kept(blocks, solution.mask)
                    bound = bound_from(blocks, solution.row_duals, solution.col_duals, n)
                    w = worst[backend]
                    w["blocks"] += batch
                    w["full"] += int(full(solution.mask, n).sum())
                    for key, value in (
                        ("flow", relative(score - best, scale).abs()),
                        ("highs", relative(score[0] - by_highs, scale[0]).abs()),
                        ("gap", relative(solution.bound - solution.objective, scale)),
                        ("under", relative(solution.objective - solution.bound, scale)),
                        ("bound", relative(solution.bound - bound, scale).abs()),
                        ("bound", relative(solution.objective - score, scale).abs()),
                    ):
                        w[key] = max(w[key], float(value.max()))
            for backend, w in worst.items():
                holds = (
                    w["full"] == w["blocks"]
                    and max(w["flow"], w["highs"]) <= OBJECTIVE_ERROR
                    and w["gap"] <= GAP[dtype]
                    and max(w["under"], w["bound"]) <= ROUNDING
                )
                yield {
                    "method": "exact",
                    "backend": backend,
                    "dtype": str(dtype).removeprefix("torch."),
                    "m": m,
                    "n": " ".join(map(str, counts)),
                    "distributions": len(distributions),
                    "blocks": w["blocks"],
                    "full_share": w["full"] / w["blocks"],
                    "error_to_flow_max": w["flow"],
                    "error_to_highs_max": w["highs"],
                    "highs_blocks": highs_blocks,
                    "gap_max": w["gap"],
                    "bound_below_objective_max": w["under"],
                    "certificate_error_max": w["bound"],
                    "error_mean": "",
                    "holds": "yes" if holds else "NO",
                }


def approximate_rows(batch: int) -> Iterator[dict]:
    """The approximate methods on |N(0,1)|: loss against the optimum, and the share of blocks they fill."""
    for n, m in PATTERNS:
        blocks = scores("normal", (batch, m, m), seed=m)
        best = kept(blocks, torch.from_numpy(optimal_masks(blocks.double().numpy(), n)))
        contenders = {
            (method, backend): nmsolve.solve_blocks(blocks, n, method=method, backend=backend).mask
            for method in ("tsenor", "greedy")
            for backend in ("cpu", "torch")
        }
        contenders["tsenor", "published"] = tsenor(blocks, n)
        contenders["greedy", "published"] = two_approximation(blocks, n)
        for (method, backend), mask in contenders.items():
            loss = relative(best - kept(blocks, mask), best)
            share = float(full(mask, n).double().mean())
            ours = backend != "published"
            holds = share == 1.0 and (method != "tsenor" or float(loss.mean()) <= TSENOR_ERROR)
            yield {
                "method": method,
                "backend": backend,
                "dtype": "float32",
                "m": m,
                "n": str(n),
                "distributions": 1,
                "blocks": batch,
                "full_share": share,
                "error_to_flow_max": float(loss.max()),
                "error_to_highs_max": "",
                "highs_blocks": 0,
                "gap_max": "",
                "bound_below_objective_max": "",
                "certificate_error_max": "",
                "error_mean": float(loss.mean()),
                "holds": ("yes" if holds else "NO") if ours else "",
            }


def interpreted_rows() -> list[dict]:
    """The Triton kernels' rows, from a process in which Triton's interpreter runs them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--interpreter"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="an eighth of the blocks; write nothing")
    parser.add_argument("--interpreter", action="store_true", help="only Triton's rows, as JSON on stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small batches: threads would only wait for each other
    if arguments.interpreter:
        rows = exact_rows(("triton",), INTERPRETER_CASES, INTERPRETER_DISTRIBUTIONS, (torch.float32,))
        print(json.dumps(list(rows)))
        return 0

    fewer = 8 if arguments.small else 1
    cases = {m: (counts, max(1, batch // fewer)) for m, (counts, batch) in CASES.items()}
    rows = []
    dtypes = (torch.float32, torch.float64)
    for row in exact_rows(("cpu", "torch"), cases, tuple(DISTRIBUTIONS), dtypes):
        print("{method} {backend} {dtype} m={m}: {blocks} blocks, holds: {holds}".format(**row), flush=True)
        rows.append(row)
    rows += approximate_rows(2048 // fewer)
    rows += [{**row, "backend": "triton (interpreted)"} for row in interpreted_rows()]

    head = list(rows[0])
    print(table([head, *([_short(row[key]) for key in head] for row in rows)], "l" * len(head)))
    if not arguments.small:
        write_csv(RESULTS / "quality.csv", rows, "triton", "ortools", "scipy")
    failed = [row for row in rows if row["holds"] == "NO"]
    print(f"{sum(row['blocks'] for row in rows)} blocks; {len(failed)} claims do not hold")
    return 1 if failed else 0


def _short(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
