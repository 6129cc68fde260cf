"""Batched assignment against SciPy and torch-linear-assignment: writes bench/results/assignment.csv.

Every round times all on the same matrices in turn. The totals are compared first: they must agree. On a CPU
torch-linear-assignment is a loop over SciPy with copies around it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import common
import torch
from peers.linear_assignment import scipy_assignment, torch_assignment
from torch import Tensor

import nmsolve

SIZES = ((16, 4096), (64, 512), (256, 16), (512, 4), (1024, 2))


def families(m: int, batch: int) -> Iterator[tuple[str, Tensor]]:
    """float32 matrices: what permutation learning meets, and what is hard."""
    g = torch.Generator().manual_seed(m)
    yield "uniform", torch.rand(batch, m, m, generator=g)
    yield "plan", nmsolve.sinkhorn(torch.rand(batch, m, m, generator=g), 0.05, 20)
    order = torch.stack([torch.randperm(m, generator=g) for _ in range(batch)])
    yield "permuted identity + noise", torch.eye(m)[order] + 0.3 * torch.randn(batch, m, m, generator=g)
    yield "ties (8 levels)", torch.randint(0, 8, (batch, m, m), generator=g).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "assignment.csv")
    arguments = parser.parse_args()
    rows = []
    for m, batch in SIZES:
        for name, scores in families(m, batch):
            arrays = scores.numpy()
            ours = nmsolve.assignment(scores, backend="cpu", return_solution=True)
            for columns in (torch.from_numpy(scipy_assignment(arrays)), torch_assignment(scores)):
                totals = scores.double().gather(2, columns.unsqueeze(2)).sum((1, 2))
                assert torch.allclose(ours.objective, totals, rtol=1e-12), (m, name)
            taken = common.interleaved(
                {
                    "nmsolve": lambda s=scores: nmsolve.assignment(s, backend="cpu"),
                    "scipy": lambda a=arrays: scipy_assignment(a),
                    "package": lambda s=scores: torch_assignment(s),
                },
                arguments.repeats,
            )
            fast, slow, package = taken["nmsolve"], taken["scipy"], taken["package"]
            rows.append(
                {
                    "m": m,
                    "scores": name,
                    "batch": batch,
                    "threads": torch.get_num_threads(),
                    "us_per_matrix": 1e6 * fast.median / batch,
                    "us_least": 1e6 * fast.least / batch,
                    "us_most": 1e6 * fast.most / batch,
                    "scipy_us_per_matrix": 1e6 * slow.median / batch,
                    "scipy_us_least": 1e6 * slow.least / batch,
                    "torch_linear_assignment_us_per_matrix": 1e6 * package.median / batch,
                    "times_faster": slow.median / fast.median,
                    "largest_gap": ours.max_gap,
                    "repeats": arguments.repeats,
                }
            )
            print(m, name, f"{rows[-1]['us_per_matrix']:.4g} us, {rows[-1]['times_faster']:.3g} times faster")
    common.write_csv(arguments.out, rows, "scipy", "torch-linear-assignment")


if __name__ == "__main__":
    main()
