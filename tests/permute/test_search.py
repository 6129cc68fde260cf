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
from nmsolve.permute import side as module
from nmsolve.permute.insertions import Insertions
from nmsolve.permute.side import Side, bounded_values

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
@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("columns", [48, 50])
def test_windows_keep_the_order_of_all_columns_and_gain(name, columns):
    scores = rand(40, columns).float() * rand(columns, seed=1).float()
    natural = float(retained_score(scores, 2, 4))
    order = SEARCHES[name](scores, 2, 4, window=16)
    assert torch.equal(order.sort().values, torch.arange(columns))
    assert torch.equal(order[48:], torch.arange(48, columns))
    assert float(retained_score(scores, 2, 4, order)) > natural
    assert torch.equal(order, SEARCHES[name](scores, 2, 4, window=16))
    whole = SEARCHES[name](scores, 2, 4)
    assert torch.equal(SEARCHES[name](scores, 2, 4, window=10**6), whole)


@pytest.mark.parametrize("name", [*SEARCHES, "transposable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_near_the_largest_number(name, dtype):
    scores = rand(16, 24).to(dtype) - 0.5
    large = scores * 2.0 ** (127 if dtype == torch.float32 else 1000)
    if name == "transposable":
        found, wanted = (transposable_permutation(x, 2, 4, passes=2).columns for x in (large, scores))
    else:
        found, wanted = (SEARCHES[name](x, 2, 4) for x in (large, scores))
    assert torch.equal(found, wanted)


def published(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """RIA's search as its paper has it: ascending columns are dealt, and slots refined from the first on."""
    from scipy.optimize import linear_sum_assignment

    size = scores.shape[1] // m
    dealt = scores.sum(0).argsort().view(m, size)
    groups = torch.stack([s.flip(0) if k % 2 else s for k, s in enumerate(dealt)], 1)
    for slot in range(m):
        values = torch.empty(size, size, dtype=torch.float64)
        for g, j in itertools.product(range(size), range(size)):
            columns = groups[g].clone()
            columns[slot] = groups[j, slot]
            values[g, j] = scores[:, columns].topk(n, dim=1).values.sum()
        groups[:, slot] = groups[torch.as_tensor(linear_sum_assignment(values.numpy(), True)[1]), slot]
    return groups.flatten()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_one_pass_keeps_no_less_than_the_published_search(n, m, seed):
    scores = rand(30, 8 * m, seed=seed) ** 2 * rand(8 * m, seed=9 + seed)
    ours = retained_score(scores, n, m, ria_permutation(scores, n, m, passes=1))
    assert float(ours) >= float(retained_score(scores, n, m, published(scores, n, m))) * (1 - 1e-12)


def test_stripes_end_where_no_two_groups_can_be_dealt_better():
    scores = rand(20, 24) ** 2
    order = stripe_search(scores, 2, 4)
    for g, h in itertools.combinations(order.view(6, 4).tolist(), 2):
        stay = kept(scores, 2, 4, g + h)
        for split in itertools.combinations(g + h, 4):
            rest = [column for column in g + h if column not in split]
            assert kept(scores, 2, 4, [*split, *rest]) <= stay + 1e-9


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


@pytest.mark.parametrize("search", [swap_search, stripe_search])
def test_escapes_keep_the_best_and_repeat(search):
    scores = rand(12, 24)
    plain = retained_score(scores, 2, 4, search(scores, 2, 4))
    found = search(scores, 2, 4, rounds=60, escapes=5, seed=3)
    assert torch.equal(found.sort().values, torch.arange(24))
    assert retained_score(scores, 2, 4, found) >= plain
    assert torch.equal(found, search(scores, 2, 4, rounds=60, escapes=5, seed=3))
    for rounds in range(8):  # cut off anywhere
        assert retained_score(scores, 2, 4, search(scores, 2, 4, rounds=rounds, escapes=5)) >= retained_score(
            scores, 2, 4
        )


def test_escapes_of_stripes_gain():
    scores = torch.stack([rand(40, 48, seed=seed) for seed in range(4)])
    gains = [
        float(retained_score(x, 2, 4, stripe_search(x, 2, 4, escapes=40)))
        - float(retained_score(x, 2, 4, stripe_search(x, 2, 4)))
        for x in scores
    ]
    assert min(gains) >= 0
    assert max(gains) > 0


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
    for name, search in SEARCHES.items():
        for window in (7, True, 8.0):
            with pytest.raises(NMSolveError, match="window: expected columns of at least two groups, 8"):
                search(scores, 2, 4, window=window)
        with pytest.raises(NMSolveError, match=r"(passes|rounds): expected an integer of at least 0, got -1"):
            search(scores, 2, 4, **{"passes" if name == "ria" else "rounds": -1})
    with pytest.raises(NMSolveError, match="window"):
        transposable_permutation(scores, 2, 4, window=4)
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
    monkeypatch.setattr(module, "MAX_SUBSETS", subsets)
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


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 6), (4, 8)])
def test_values_of_exchanges_are_bounds_and_exact_for_one(n, m, backend, monkeypatch):
    scores = rand(3 * m, 2 * m) - 0.5
    side, slot = side_of(scores.T, n, m, backend, monkeypatch), 1
    groups = side.order[torch.tensor([1, 0])]
    found = side._solver.exchange_values(side.blocks, side.held, groups, slot, side.subsets, side.steps)
    exact = 0
    for (g, k), b in itertools.product(itertools.product(range(2), range(len(side.subsets))), range(3)):
        block = scores[b * m : (b + 1) * m][:, groups[g]]
        held = nmsolve.transposable_mask(block, n, m)
        now = held[:, slot].nonzero()[:, 0].tolist()
        want = side.subsets[k].tolist()
        # What the other columns keep when the slot keeps these rows: its entries outweigh all others there.
        forced = block.clone()
        forced[:, slot] = -1e3
        forced[want, slot] = 1e3
        rest = oracles.min_cost_flow(forced, n) - n * 1e3
        before = float((block * held).sum() - block[now, slot].sum())
        value = float(found[g, k, b])
        assert value >= rest - before - 1e-6
        if len({*want} - {*now}) <= 1:
            assert value == pytest.approx(rest - before, abs=1e-6)
            exact += 1
    assert exact >= 6


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8)])
def test_best_choices_are_summed_over_blocks(n, m, backend, monkeypatch):
    scores = rand(5 * m, 3 * m) - 0.5
    side = side_of(scores.T, n, m, backend, monkeypatch)
    values = torch.randn(3, len(side.subsets), 16, dtype=torch.float64)
    index = torch.tensor([4, 0, 2, 3, 1])
    found = side._solver.sum_best(values, side.blocks, index, side.subsets)
    for g, j in itertools.product(range(3), range(5)):
        total = 0.0
        for b in range(16):
            column = scores[b * m : (b + 1) * m, index[j]] if b < 5 else torch.zeros(m)
            total += max(
                float(values[g, k, b] + column[rows].sum()) for k, rows in enumerate(side.subsets.tolist())
            )
        assert float(found[g, j]) == pytest.approx(total, abs=1e-9)


def side_of(lines, n, m, backend, monkeypatch) -> Side:
    row = BACKENDS[backend]
    if not row.is_installed():
        pytest.skip(f"{row.needs} is not installed")
    side = Side(lines, None, nmsolve.NMPattern(n, m), "auto", 1 << 20)
    monkeypatch.setattr(side, "_solver", row.permutations)
    return side


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8)])
def test_bounds_are_bounds_and_exact_for_what_is_there(n, m):
    scores = rand(2 * m, 4 * m)
    solution = nmsolve.transposable_mask(scores.T, n, m, return_solution=True)
    slot = torch.arange(3, 4 * m, m)
    found = bounded_values(scores.T[slot], solution.col_duals, nmsolve.NMPattern(n, m))
    for g, j in itertools.product(range(4), range(4)):
        kept = []
        for column in (slot[g], slot[j]):
            moved = scores[:, g * m : (g + 1) * m].clone()
            moved[:, 3] = scores[:, column]
            kept.append(sum(oracles.min_cost_flow(b, n) for _, _, b in oracles.blocks_of(moved, m)))
        assert float(found[g, j] - found[g, g]) >= kept[1] - kept[0] - 1e-6


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
