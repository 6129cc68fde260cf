"""The PyTorch oracle against independent solvers, and its parts against their definitions."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from nmsolve import NMPattern
from nmsolve.backends.torch import masks as reference
from nmsolve.blocks import BlockGrid, demand
from nmsolve.solution import kept_score


@pytest.mark.parametrize("m", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_equals_min_cost_flow_and_linear_program(m: int, dtype: torch.dtype) -> None:
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    for seed, name in enumerate(oracles.distributions):
        n = int(torch.randint(1, m, (), generator=torch.Generator().manual_seed(seed)))
        blocks = oracles.sample(name, (4, m, m), seed=seed, dtype=dtype)
        result = reference.exact(blocks, NMPattern(n, m), want_solution=True)
        assert result.objective is not None
        assert result.bound is not None
        assert result.row_duals is not None
        assert result.col_duals is not None
        assert (result.mask.sum(1) == n).all()
        assert (result.mask.sum(2) == n).all()
        for k, block in enumerate(blocks):
            scale = float((block.double() * result.mask[k]).abs().sum())
            objective = float(result.objective[k])
            assert objective == pytest.approx(oracles.min_cost_flow(block, n), abs=1e-6 * scale)
            bound = oracles.dual_value(block, result.row_duals[k, 0, 0], result.col_duals[k, 0, 0], n)
            assert -1e-12 * scale <= bound - objective <= tolerance * scale
        if m <= 16:
            best = oracles.highs(blocks[0], n)
            assert float(result.objective[0]) == pytest.approx(best, rel=1e-6, abs=1e-30)


def test_blocks_larger_than_any_tile() -> None:
    scores = oracles.sample("student_t", (130, 100))
    mask = reference.exact(scores[None], NMPattern(7, 100)).mask[0]
    best = sum(oracles.min_cost_flow(block, 7) for _, _, block in oracles.blocks_of(scores, 100))
    assert oracles.kept_score(scores, mask) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["normal", "student_t", "lognormal", "wanda", "huge"])
def test_the_ascent_leaves_few_augmentations_whatever_the_tails(name: str) -> None:
    blocks, _ = reference.normalise(oracles.sample(name, (400, 16, 16)))
    u, v = reference.dual_ascent(blocks, 8)
    mask = blocks - u.unsqueeze(2) - v.unsqueeze(1) > 0
    units = (8 - mask.sum(2)).clamp(min=0).sum(1) + (mask.sum(1) - 8).clamp(min=0).sum(1)
    assert units.double().mean() < 2.5


@pytest.mark.parametrize("shape", [(8, 8), (6, 8)])
def test_dykstra_equals_the_textbook_iteration(shape: tuple[int, int]) -> None:
    n, iterations, tau = 3, 40, 12.0
    a, _ = reference.normalise(oracles.sample("normal", (5, *shape), dtype=torch.float64))
    plan = torch.exp2(reference.dykstra(a, n, iterations, tau)).clamp(max=1).numpy()
    for block, got in zip(a.numpy(), plan, strict=True):
        s, q = np.exp(tau * block / np.abs(block).max()), np.ones(shape)
        s /= np.exp(tau * block.max(1, keepdims=True) / np.abs(block).max())  # row scaling absorbs any start
        for _ in range(iterations):
            s = s * (n / s.sum(1, keepdims=True))
            scale = n / s.sum(0, keepdims=True)
            s = s * (scale if shape[0] == shape[1] else np.minimum(scale, 1))
            clipped = np.minimum(s * q, 1)
            q, s = q * s / clipped, clipped
        assert got == pytest.approx(s, rel=1e-9, abs=1e-12)


def test_dykstra_survives_any_temperature_in_single_precision() -> None:
    a, _ = reference.normalise(oracles.sample("lognormal", (20, 16, 16)))
    exponent = reference.dykstra(a, 8, 300, 5000.0)
    assert torch.isfinite(exponent).all()
    kept = reference.take_greedily(exponent, 8)
    assert (kept.sum((1, 2)) > 0.85 * 8 * 16).all()


@pytest.mark.parametrize("shape", [(8, 8), (5, 8), (8, 3)])
@pytest.mark.parametrize("name", ["normal", "ties", "constant"])
def test_parallel_rounds_equal_the_sequential_greedy(shape: tuple[int, int], name: str) -> None:
    blocks = oracles.sample(name, (30, *shape))
    for n in range(1, 8):
        taken = reference.take_greedily(blocks, n).numpy()
        for block, mask in zip(blocks, taken, strict=True):
            assert np.array_equal(mask, oracles.sequential_greedy(block, n))


@pytest.mark.parametrize(("shape", "n"), [((6, 6), 3), ((5, 6), 4)])
def test_completion_makes_the_best_move_each_time(shape: tuple[int, int], n: int) -> None:
    blocks = oracles.sample("signed", (200, *shape), dtype=torch.float64)
    before = reference.take_greedily(blocks, n)
    after = before.clone()
    reference.complete(blocks, after, n)
    incomplete = before.sum((1, 2)) < after.sum((1, 2))
    assert incomplete.any()
    for block, mask in zip(blocks, after.numpy(), strict=True):
        assert np.array_equal(mask, oracles.completed_greedy(block, n, np.float64))


@pytest.mark.parametrize("scale", [2.0**-140, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_normalise_is_exact(scale: float) -> None:
    blocks = torch.rand(4, 5, 5, dtype=torch.float32) * scale
    scaled, exponent = reference.normalise(blocks)
    assert ((scaled.amax((1, 2)) >= 0.5) & (scaled.amax((1, 2)) < 1)).all()
    assert torch.equal(reference.ldexp(scaled, exponent), blocks)


def test_fold_is_a_sum() -> None:
    for size in range(1, 20):
        x = torch.randn(3, size, 2, dtype=torch.float64)
        torch.testing.assert_close(reference.fold(x, 1), x.sum(1))


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (3, 4), (4, 3), (2, 2), (1, 4)])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_demand_is_the_largest_cardinality(rows: int, cols: int, n: int) -> None:
    need = demand(rows, cols, n)
    short, total = (need.row, need.row * rows) if rows <= cols else (need.col, need.col * cols)
    assert short == min(n, max(rows, cols))
    assert total == oracles.min_cost_flow(np.ones((rows, cols)), n)
    assert need.slack == abs(need.row * rows - need.col * cols)


@pytest.mark.parametrize("shape", [(8, 12), (9, 14), (3, 2), (1, 9), (0, 5)])
@pytest.mark.parametrize("limit", [1, 40, 10_000])
def test_tiles_cover_every_entry_once(shape: tuple[int, int], limit: int) -> None:
    grid = BlockGrid(*shape, 4)
    seen = torch.zeros(3, *shape, dtype=torch.int64)
    for b, i, j, r, c in grid.tiles(3, limit):
        part = seen[b, i, j]
        part += 1
        assert part.shape[1] % r == 0
        assert part.shape[2] % c == 0
        assert part.numel() <= max(limit, r * c)
    assert (seen == 1).all()


def test_kept_score_by_block() -> None:
    scores = torch.arange(-6.0, 6.0).reshape(3, 4)
    mask = torch.ones(3, 4, dtype=torch.bool)
    objective, scale = kept_score(scores, mask, NMPattern(1, 2))
    assert objective.tolist() == [[-6 - 5 - 2 - 1, -4 - 3 + 0 + 1], [2 + 3, 4 + 5]]
    assert scale.tolist() == [[14, 8], [5, 9]]
