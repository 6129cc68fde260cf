"""Orders for V:N:M masks: never worse than the order as it is, and near the best of all on a few columns."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nmsolve import NMSolveError, VNMPattern, hierarchical_mask
from nmsolve.permute import hierarchical as module
from nmsolve.permute import hierarchical_permutation

PATTERNS = [(4, 2, 8, 4), (4, 4, 8, 4), (3, 1, 4, 2), (3, 1, 2, 1), (4, 2, 4, 4)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def kept(scores: torch.Tensor, pattern: VNMPattern) -> float:
    return hierarchical_mask(scores, pattern, return_solution=True).total_objective


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 30),
)
def test_orders_never_keep_less(numbers, strips, groups, rows, columns, seed):
    pattern = VNMPattern(*numbers)
    scores = rand(strips * pattern.v, groups * pattern.m, seed=seed)
    found = hierarchical_permutation(scores, pattern, rows=rows, columns=columns, passes=2)
    assert torch.equal(found.rows.sort().values, torch.arange(len(scores)))
    assert torch.equal(found.columns.sort().values, torch.arange(scores.shape[1]))
    assert rows or torch.equal(found.rows, torch.arange(len(scores)))
    assert columns or torch.equal(found.columns, torch.arange(scores.shape[1]))
    assert found.after >= found.before
    assert float(found.before) == pytest.approx(kept(scores, pattern), rel=1e-12)
    reordered = scores[found.rows][:, found.columns]
    assert float(found.after) == pytest.approx(kept(reordered, pattern), rel=1e-9)


def test_columns_come_near_the_best_of_all_orders():
    pattern = VNMPattern(3, 1, 4, 2)
    gained, possible = 0.0, 0.0
    for seed in (0, 3, 5, 6):
        scores = rand(6, 8, seed=seed).abs() ** 3
        natural = kept(scores, pattern)
        parts = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
        best = max(kept(scores[:, [*part, *sorted({*range(8)} - {*part})]], pattern) for part in parts)
        found = hierarchical_permutation(scores, pattern, rows=False, passes=8, tolerance=0.0)
        assert float(found.after) <= best + 1e-6
        gained += float(found.after) - natural
        possible += best - natural
    assert gained >= 0.8 * possible


def test_rows_of_one_kind_come_together():
    """Two kinds of rows with scores in other columns, mixed: apart, nothing of them is lost."""
    pattern = VNMPattern(4, 4, 8)
    scores = 0.01 * rand(16, 16).abs()
    for r in range(16):
        # Every strip has more rows of the first kind, and columns for those alone.
        for g in (0, 8):
            scores[r, g + (0 if r % 3 else 4) : g + (4 if r % 3 else 8)] += 1
    found = hierarchical_permutation(scores, pattern, columns=False)
    assert float(found.before) < 100
    assert float(found.after) > 112
    assert float(found.after) == pytest.approx(kept(scores[found.rows], pattern))


@pytest.mark.parametrize("numbers", PATTERNS)
def test_values_are_a_minorant_that_is_exact_where_nothing_moves(numbers):
    pattern = VNMPattern(*numbers)
    scores = rand(2 * pattern.v, 3 * pattern.m)
    solution = hierarchical_mask(scores, pattern, return_solution=True)
    for slot in (0, pattern.m - 1):
        values = module._slot_values(scores, solution.columns, pattern, slot)
        assert torch.allclose(values.diagonal(), solution.objective.sum(0), rtol=1e-9, atol=1e-9)
        for g, j in itertools.product(range(3), repeat=2):
            moved = scores.clone()
            moved[:, g * pattern.m + slot] = scores[:, j * pattern.m + slot]
            anew = hierarchical_mask(moved, pattern, return_solution=True).objective.sum(0)
            assert float(values[g, j]) <= float(anew[g]) + 1e-9
    values = module._row_values(scores, solution.columns, pattern)
    for b in range(2):
        own = values[b * pattern.v : (b + 1) * pattern.v, b].sum()
        assert float(own) == pytest.approx(float(solution.objective[b].sum()), rel=1e-9)


def test_rows_alone_take_any_columns_and_columns_alone_any_rows():
    scores = rand(12, 19)
    found = hierarchical_permutation(scores, "4:2:8", columns=False)
    assert found.after >= found.before
    found = hierarchical_permutation(scores[:10, :16], "4:2:8", rows=False)
    assert found.after > found.before


def test_batches_and_empty():
    scores = rand(2, 8, 16)
    found = hierarchical_permutation(scores, "4:2:8")
    assert found.rows.shape == (2, 8)
    alone = hierarchical_permutation(scores[1], "4:2:8")
    assert torch.equal(found.columns[1], alone.columns)
    assert found.after[1] == alone.after
    for shape in ((0, 8, 16), (2, 0, 16), (0, 16)):
        found = hierarchical_permutation(torch.empty(shape), "4:2:8")
        assert found.rows.shape == (*shape[:-2], shape[-2])
        assert found.columns.shape == (*shape[:-2], shape[-1])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((10, 16), {}, "scores: expected rows that v=4 divides"),
        ((8, 15), {}, "scores: expected columns that m=8 divides"),
        ((8, 16), {"passes": -1}, "passes: expected an integer of at least 0, got -1"),
        ((8, 16), {"passes": 1.0}, "passes: expected an integer of at least 0, got 1.0"),
        ((8, 16), {"backend": "tpu"}, "backend: expected 'auto' or one of"),
        ((16,), {}, "scores: expected"),
    ],
)
def test_what_is_refused(shape, options, message):
    with pytest.raises(NMSolveError, match=message):
        hierarchical_permutation(torch.zeros(shape), "4:2:8", **options)
