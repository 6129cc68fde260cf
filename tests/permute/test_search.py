"""Searches for orders, against brute force and SciPy."""

from __future__ import annotations

import itertools

import oracles
import pytest
import torch

import nmsolve
from nmsolve import NMSolveError
from nmsolve.backends.dispatch import BACKENDS
from nmsolve.ops.assignment import assignment
from nmsolve.permute import (
    deal_columns,
    retained_score,
    ria_permutation,
    stripe_search,
    swap_search,
    transposable_permutation,
)
from nmsolve.permute import transposable as module
from nmsolve.permute.insertions import Insertions

SEARCHES = {"ria": ria_permutation, "swap": swap_search, "stripe": stripe_search}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept(scores: torch.Tensor, n: int, m: int, order) -> float:
    """The N largest of every group, group by group."""
    moved = scores[:, list(order)]
    return float(
        sum(
            moved[:, g : g + m].sort(dim=1, descending=True).values[:, :n].sum()
            for g in range(0, moved.shape[1], m)
        )
    )


def brute_force(scores: torch.Tensor, n: int, m: int) -> float:
    return max(kept(scores, n, m, order) for order in itertools.permutations(range(scores.shape[1])))


@pytest.mark.parametrize("shape", [(5, 8), (3, 10), (4, 3), (0, 8), (6, 0)])
def test_retained_score(shape):
    scores = rand(*shape)
    order = torch.randperm(shape[1])
    assert float(retained_score(scores, 2, 4, order)) == pytest.approx(kept(scores, 2, 4, order), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("n", "m", "columns"), [(1, 2, 6), (2, 3, 6), (1, 4, 8), (2, 4, 8)])
def test_searches_come_near_the_best_of_all_orders(n, m, columns, seed):
    scores = rand(3, columns, seed=seed) ** 4
    natural = kept(scores, n, m, range(columns))
    # 8! orders are many, and only the partition into groups counts: try one order of each.
    parts = {
        tuple(sorted(tuple(sorted(order[g : g + m])) for g in range(0, columns, m)))
        for order in itertools.permutations(range(columns))
    }
    best = max(kept(scores, n, m, itertools.chain(*part)) for part in parts)
    reached = []
    for name, search in SEARCHES.items():
        order = search(scores, n, m, passes=20) if name == "ria" else search(scores, n, m)
        assert torch.equal(order.sort().values, torch.arange(columns))
        found = kept(scores, n, m, order)
        assert found <= best + 1e-12
        if name != "ria":
            assert found >= natural - 1e-12
        if name == "stripe" and columns == 2 * m:
            assert found == pytest.approx(best, abs=1e-12)
        reached.append((found - natural) / (best - natural) if best > natural else 1.0)
    assert sum(reached) / len(reached) > 0.5


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 6), (1, 8)])
def test_more_passes_never_keep_less(n, m):
    scores = rand(24, 6 * m) * rand(6 * m, seed=1)
    values = [float(retained_score(scores, n, m, ria_permutation(scores, n, m, passes=p))) for p in range(5)]
    assert values == sorted(values)
    assert values[1] > float(retained_score(scores, n, m))


@pytest.mark.parametrize("name", ["swap", "stripe"])
def test_searches_never_end_below_their_start(name):
    scores = rand(16, 32)
    for seed in range(4):
        start = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
        found = SEARCHES[name](scores, 2, 4, start=start, rounds=3)
        assert retained_score(scores, 2, 4, found) >= retained_score(scores, 2, 4, start)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (3, 4), (4, 8)])
def test_one_slot_is_an_optimal_assignment(n, m, backend, dtype, monkeypatch):
    from scipy.optimize import linear_sum_assignment

    scores = (rand(10, 6 * m) - 0.3).to(dtype)
    values = insertions(scores, n, m, backend, monkeypatch)
    groups = torch.arange(6 * m).view(1, 6, m)
    found = values.of_slot(groups, 1)[0]
    slots = values.of_all(groups[0])
    close = 1e-9 if dtype == torch.float64 else 1e-4
    for g, j in itertools.product(range(6), range(6)):
        columns = groups[0, g].clone()
        stays = kept(scores[:, columns].double(), n, m, range(m))
        columns[1] = groups[0, j, 1]
        gain = kept(scores[:, columns].double(), n, m, range(m)) - stays
        assert float(found[g, j] - found[g, g]) == pytest.approx(gain, abs=close)
        every = slots[g, 1]
        assert float(every[columns[1]] - every[groups[0, g, 1]]) == pytest.approx(gain, abs=close)
    rows, columns = linear_sum_assignment(found.numpy(), maximize=True)
    order = assignment(found)
    chosen = float(found[torch.arange(6), order].sum())
    assert chosen == pytest.approx(found.numpy()[rows, columns].sum())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (2, 3), (3, 4)])
def test_ways_of_dealing_two_groups(n, m, backend, monkeypatch):
    scores = rand(700, 4 * m) - 0.3
    values = insertions(scores, n, m, backend, monkeypatch)
    members = torch.randperm(4 * m)[: 2 * m].view(1, -1)
    ways = torch.stack([torch.randperm(2 * m) for _ in range(5)])
    found = values.of_ways(members, ways)
    for k, way in enumerate(ways):
        assert float(found[0, k]) == pytest.approx(kept(scores, n, m, members[0, way]), rel=1e-12)


def insertions(scores, n, m, backend, monkeypatch) -> Insertions:
    row = BACKENDS[backend]
    if not row.is_installed():
        pytest.skip(f"{row.needs} is not installed")
    values = Insertions(scores, nmsolve.NMPattern(n, m))
    monkeypatch.setattr(values, "_solver", row.permutations)
    return values


def test_dealing_and_batches():
    scores = rand(3, 5, 14)
    order = deal_columns(scores, 4)
    sums = scores.sum(1).gather(1, order)
    first = sums[:, :12].view(3, 3, 4)
    assert (first[..., :-1].amin(1) >= first[..., 1:].amax(1)).all()
    assert torch.equal(order[:, 12:], torch.tensor([12, 13]).expand(3, 2))
    together = ria_permutation(scores, 2, 4)
    for matrix, found in zip(scores, together, strict=True):
        assert torch.equal(found, ria_permutation(matrix, 2, 4))


def test_escapes_keep_the_best_and_repeat():
    scores = rand(12, 24)
    plain = retained_score(scores, 2, 4, swap_search(scores, 2, 4))
    found = swap_search(scores, 2, 4, rounds=60, escapes=5, seed=3)
    assert retained_score(scores, 2, 4, found) >= plain
    assert torch.equal(found, swap_search(scores, 2, 4, rounds=60, escapes=5, seed=3))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (2, 16)])
def test_nothing_to_gain(n, m):
    scores = rand(4, 16)
    assert torch.equal(ria_permutation(scores, n, m), torch.arange(16))
    assert torch.equal(swap_search(scores, n, m), torch.arange(16))
    square = transposable_permutation(scores.repeat(4, 1), n, m)
    assert square.before == square.after


def test_mistaken_arguments():
    scores = rand(4, 16)
    with pytest.raises(NMSolveError, match="6,435"):
        stripe_search(scores, 4, 8)
    with pytest.raises(NMSolveError, match="exactly once"):
        swap_search(scores, 2, 4, start=torch.zeros(16, dtype=torch.int64))
    with pytest.raises(NMSolveError, match="NaN"):
        ria_permutation(scores * float("nan"), 2, 4)
    with pytest.raises(NMSolveError, match="passes"):
        ria_permutation(scores, 2, 4, passes=-1)
    with pytest.raises(NMSolveError, match="divides"):
        transposable_permutation(scores, 2, 3)


# --- rows and columns for transposable masks ----------------------------------------------------------------


def transposable_kept(scores: torch.Tensor, n: int, m: int, rows, columns) -> float:
    moved = scores[torch.as_tensor(rows)][:, torch.as_tensor(columns)]
    return sum(oracles.min_cost_flow(block, n) for _, _, block in oracles.blocks_of(moved, m))


@pytest.mark.parametrize("seed", range(6))
def test_small_transposable_orders_against_brute_force(seed):
    scores = rand(4, 4, seed=seed) ** 3
    splits = [(0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2)]
    best = max(transposable_kept(scores, 1, 2, r, c) for r in splits for c in splits)
    found = transposable_permutation(scores, 1, 2, restarts=40)
    assert float(found.after) == pytest.approx(best, abs=1e-6)
    again = transposable_kept(scores, 1, 2, found.rows, found.columns)
    assert float(found.after) == pytest.approx(again, abs=1e-6)


@pytest.mark.parametrize("subsets", [70, 0], ids=["enumerated", "bounded"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 6)])
def test_transposable_orders_rise_pass_by_pass(n, m, subsets, monkeypatch):
    monkeypatch.setattr(module, "_MAX_SUBSETS", subsets)
    scores = rand(3 * m, 5 * m).float()
    values = []
    for passes in range(4):
        found = transposable_permutation(scores, n, m, passes=passes, tolerance=0.0)
        values.append(float(found.after))
        assert float(found.before) == values[0]
        moved = scores[found.rows][:, found.columns]
        sol = nmsolve.transposable_mask(moved, n, m, return_solution=True)
        assert sol.total_objective == pytest.approx(values[-1], rel=1e-9)
        assert torch.equal(found.rows.sort().values, torch.arange(3 * m))
        assert torch.equal(found.columns.sort().values, torch.arange(5 * m))
    assert values == sorted(values)
    assert values[1] > values[0]


@pytest.mark.parametrize("signed", [False, True])
def test_insertion_values_are_exact(signed):
    n, m = 2, 4
    scores = rand(8, 12) - (0.5 if signed else 0)
    values = module._insertion_values(scores, nmsolve.NMPattern(n, m), 2, "auto")
    for g, j in itertools.product(range(3), range(3)):
        columns = [4 * g, 4 * g + 1, 4 * j + 2, 4 * g + 3]
        best = sum(oracles.min_cost_flow(b, n) for _, _, b in oracles.blocks_of(scores[:, columns], m))
        assert float(values[g, j]) == pytest.approx(best, abs=1e-9)


def test_bounds_are_bounds_and_exact_for_what_is_there():
    n, m = 4, 8
    scores = rand(16, 32)
    solution = nmsolve.transposable_mask(scores, n, m, return_solution=True)
    pattern = nmsolve.NMPattern(n, m)
    bound = module._bounded_values(scores, pattern, 3, solution.row_duals)
    exact = module._insertion_values(scores, pattern, 3, "auto")
    rise = bound - bound.diagonal()[:, None]
    assert (rise >= exact - exact.diagonal()[:, None] - 1e-9).all()


def test_one_side_only_and_batches():
    scores = rand(2, 16, 24)
    both = transposable_permutation(scores, 2, 4, passes=2)
    columns = transposable_permutation(scores, 2, 4, rows=False, passes=2)
    assert torch.equal(columns.rows, torch.arange(16).expand(2, 16))
    assert both.after.shape == (2,)
    assert (columns.after > columns.before).all()
    single = transposable_permutation(scores[1], 2, 4, passes=2)
    assert torch.equal(single.columns, both.columns[1])
    assert transposable_permutation(rand(0, 8, 8), 2, 4).rows.shape == (0, 8)


def test_restarts_never_keep_less_and_repeat():
    scores = rand(16, 16)
    plain = transposable_permutation(scores, 2, 4, passes=3)
    more = transposable_permutation(scores, 2, 4, passes=3, restarts=3, seed=5)
    assert more.after >= plain.after
    again = transposable_permutation(scores, 2, 4, passes=3, restarts=3, seed=5)
    assert torch.equal(more.rows, again.rows)
    assert torch.equal(more.columns, again.columns)
