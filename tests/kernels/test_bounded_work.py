"""No block makes a backend search more paths, or a search take more sweeps, than is proved.

The bounds and their proofs: docs/internals/solver.md.
"""

from __future__ import annotations

import augmentations
import oracles
import pytest
import torch

import nmsolve

BACKENDS = {"cpu": "numba", "torch": "torch", "triton": "triton"}


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(BACKENDS[request.param])
    return request.param


def check(backend: str, blocks: torch.Tensor, n: int) -> int:
    """Every block's work is within its bounds; the most paths."""
    rows, cols = blocks.shape[1:]
    most = 0
    for work in augmentations.COUNTERS[backend](blocks, n):
        most = max(most, work.paths)
        assert work.paths <= augmentations.paths_bound(rows, cols, n)
        if work.sweeps is not None:
            assert work.sweeps <= work.paths * augmentations.sweeps_bound(rows, cols)
    return most


@pytest.mark.parametrize("kind", sorted(augmentations.ADVERSARIAL))
def test_adversarial_blocks(backend: str, kind: str) -> None:
    interpreted = backend == "triton"
    for n, m in ((1, 4), (2, 4)) if interpreted else ((2, 4), (1, 8), (4, 8), (7, 8), (8, 16)):
        blocks = augmentations.adversarial(kind, 1 if interpreted else 8, m, seed=n)
        check(backend, blocks, n)
        assert nmsolve.solve_blocks(blocks, n, backend=backend).max_gap <= 1e-6


@pytest.mark.parametrize(("rows", "cols"), [(3, 4), (4, 3), (1, 4), (7, 8), (8, 5)])
def test_partial_blocks(backend: str, rows: int, cols: int) -> None:
    if backend == "triton" and max(rows, cols) > 4:
        pytest.skip("takes long in the interpreter")
    for kind in ("two_values", "near_ties"):
        blocks = augmentations.adversarial(kind, 1, max(rows, cols))[:, :rows, :cols]
        for n in range(1, max(rows, cols)):
            check(backend, blocks, n)


def test_the_counters_count(backend: str) -> None:
    """A block of ties needs a path for each unit on a CPU; elsewhere they are settled in bulk."""
    most = check(backend, torch.full((1, 8, 8), 0.37), 4)
    assert most == 32 if backend == "cpu" else 0 < most < 16
    assert check(backend, torch.eye(8)[None] + 1, 1) <= 8


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_no_start_is_too_far_away(backend: str, scale: float) -> None:
    """Duals that overflow in the scores' scale, or swallow all their digits: optimal all the same."""
    generator = torch.Generator().manual_seed(1)
    blocks = oracles.sample("normal", (2, 8, 8), seed=2) * scale
    for reach in (1e3, 1e38):
        u, v = (reach * (2 * torch.rand(2, 8, generator=generator) - 1) for _ in range(2))
        solution = nmsolve.solve_blocks(blocks, 4, backend=backend, warm_start=(u, v))
        nmsolve.check_mask(solution.mask, 4, 8)
        assert solution.max_gap <= 1e-6
        for block, objective in zip(blocks, solution.objective.tolist(), strict=True):
            assert objective >= oracles.min_cost_flow(block, 4) * (1 - 1e-6)
