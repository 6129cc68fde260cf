"""Entries that are kept always (+inf) and never (-inf), and scores that lie far apart."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import oracles
import pytest
import torch

import nmsolve
from nmsolve.errors import NMSolveError

INF = math.inf
BACKENDS = ["torch", "cpu", "triton"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def needs(backend: str) -> None:
    pytest.importorskip({"cpu": "numba"}.get(backend, backend))


def masks_of(rows: int, cols: int, n: int) -> list[tuple[tuple[int, ...], ...]]:
    """Every mask with at most n in each line: the columns that each row keeps."""
    lines = [kept for k in range(min(n, cols) + 1) for kept in itertools.combinations(range(cols), k)]
    return [
        rows_kept
        for rows_kept in itertools.product(lines, repeat=rows)
        if all(sum(j in kept for kept in rows_kept) <= n for j in range(cols))
    ]


def worth(block: list[list[float]], entries: list[tuple[int, int]]) -> tuple[int, int, Fraction] | None:
    """+inf kept, entries kept and their score, exactly; None where a -inf is among them."""
    kept = [block[i][j] for i, j in entries]
    if -INF in kept:
        return None
    score = sum((Fraction(x) for x in kept if x < INF), Fraction(0))
    return kept.count(INF), len(kept), score


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_mask_of_small_blocks(backend: str, dtype: torch.dtype) -> None:
    """Full and partial ones, with and without a mask of the pattern."""
    needs(backend)
    g = generator(5)
    seen = set()
    for n, m, rows, cols in (
        (1, 2, 2, 2),
        (1, 3, 3, 3),
        (2, 3, 3, 3),
        (2, 3, 2, 3),
        (1, 3, 3, 2),
        (3, 3, 2, 3),
    ):
        every = masks_of(rows, cols, n)
        for trial in range(2 if backend == "triton" else 5):
            chance = torch.rand(rows, cols, generator=g)
            scores = torch.randint(-5, 101, (rows, cols), generator=g).to(dtype)
            scores.masked_fill_(chance < (0.4, 0.2, 0.6, 0.3, 0.1)[trial], -INF).masked_fill_(
                chance > 0.85, INF
            )
            block = scores.double().tolist()
            values = [worth(block, [(i, j) for i, kept in enumerate(mask) for j in kept]) for mask in every]
            best = max(value for value in values if value is not None)
            most = max(len(list(itertools.chain(*mask))) for mask in every)
            feasible = best[:2] == (int((scores == INF).sum()), most)
            seen.add(feasible)
            if not feasible:
                with pytest.raises(NMSolveError, match=rf"block \(0, 0\) has no {n}:{m} mask"):
                    nmsolve.transposable_mask(scores, n, m, backend=backend)
            solution = nmsolve.transposable_mask(
                scores, n, m, backend=backend, return_solution=True, allow_short=not feasible
            )
            mask = nmsolve.transposable_mask(scores, n, m, backend=backend, allow_short=not feasible)
            for found in (solution.mask, mask):
                assert int(found.sum(0).max()) <= n
                assert int(found.sum(1).max()) <= n
                assert worth(block, found.nonzero().tolist()) == best
            assert float(solution.objective) == float(best[2])
            assert 0 <= solution.max_gap <= 1e-6
            assert solution.resolved_blocks == int(scores.isinf().any())
            if feasible:
                bound = nmsolve.dual_bound(scores, solution.row_duals, solution.col_duals, f"{n}:{m}")
                assert float(bound) == pytest.approx(float(solution.bound), abs=0.05)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("backend", "n", "m"),
    [
        ("cpu", 2, 4),
        ("cpu", 8, 16),
        ("torch", 3, 8),
        pytest.param("triton", 2, 4),
        *(pytest.param("cpu", *size, marks=pytest.mark.slow) for size in ((3, 8), (16, 32))),
        *(pytest.param("torch", *size, marks=pytest.mark.slow) for size in ((2, 4), (8, 16), (16, 32))),
        *(pytest.param("triton", *size, marks=pytest.mark.slow) for size in ((3, 8), (8, 16), (16, 32))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_integers_with_a_third_forbidden(backend: str, n: int, m: int, dtype: torch.dtype) -> None:
    """Against integer min-cost flow, whatever number forbids them."""
    needs(backend)
    pytest.importorskip("ortools")
    g = generator(7)
    small = torch.randint(1, 101, (4, m, m), generator=g).double()
    out = torch.rand(4, m, m, generator=g) < 1 / 3
    every = small.masked_fill(out, -1000.0 * m)
    best = [oracles.min_cost_flow(block, n) for block in every]
    short = [value < 0 for value in best]
    largest = -torch.finfo(dtype).max
    for large in (-INF, -1e9, -1e14, -1e30, largest):
        scores = small.masked_fill(out, max(large, largest) if large > -INF else large).to(dtype)
        keep = [i for i in range(4) if not (short[i] and large == -INF)]
        mask = nmsolve.transposable_mask(scores[keep], n, m, backend=backend)
        solution = nmsolve.transposable_mask(scores[keep], n, m, backend=backend, return_solution=True)
        for i, *found in zip(keep, mask, solution.mask, strict=True):
            assert [oracles.kept_score(every[i], one) for one in found] == [best[i]] * 2, large
        assert solution.max_gap <= 1e-6


@pytest.mark.parametrize("exponent", [0, 7, 30, 53, 70, 100])
def test_levels_far_apart(exponent: int) -> None:
    """Two kinds of integers, 2^exponent apart: every mask of 3 x 3 blocks is looked at, in integers."""
    needs("cpu")
    g = generator(exponent)
    every = masks_of(3, 3, 1)
    for dtype in (torch.float32, torch.float64):
        for _ in range(8):
            small = torch.randint(1, 101, (3, 3), generator=g).double()
            large = -(2.0**exponent) * torch.randint(1, 4, (3, 3), generator=g)
            scores = torch.where(torch.rand(3, 3, generator=g) < 0.5, large, small).to(dtype)
            block = scores.double().tolist()
            full = [[(i, kept[0]) for i, kept in enumerate(mask)] for mask in every if all(mask)]
            best = max(value for value in (worth(block, entries) for entries in full) if value)
            mask = nmsolve.transposable_mask(scores, 1, 3, backend="cpu", return_solution=True).mask
            found = worth(block, mask.nonzero().tolist())
            assert found is not None
            assert best[2] - found[2] <= Fraction(1, 10**6) * sum(
                abs(Fraction(block[i][j])) for i, j in mask.nonzero()
            )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ordinary_masks(backend: str) -> None:
    needs(backend)
    scores = torch.tensor([[INF, 1.0, -INF, 2.0, 3.0, -INF], [0.0, -5.0, -INF, -6.0, 1.0, 1.0]])
    mask = nmsolve.nm_mask(scores, 2, 4, backend=backend, allow_short=True)
    assert mask.int().tolist() == [[1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 1]]
    with pytest.raises(
        NMSolveError, match=r"line \(0,\), group 1 along dim -1 holds 1 other than -inf, and keeps 2"
    ):
        nmsolve.nm_mask(scores, 2, 4, backend=backend)
    scores[0, :3] = INF
    with pytest.raises(NMSolveError, match=r"line \(0,\), group 0 along dim -1 holds 3 inf, and keeps 2"):
        nmsolve.nm_mask(scores, 2, 4, backend=backend)
    assert nmsolve.nm_mask(scores, 2, 4, backend=backend, allow_short=True)[0, :4].sum() == 2


@pytest.mark.parametrize("method", ["greedy", "tsenor"])
def test_approximate_methods_keep_what_must_be_kept(method: str) -> None:
    g = generator(3)
    scores = torch.rand(32, 32, generator=g)
    chance = torch.rand(32, 32, generator=g)
    scores.masked_fill_(chance < 0.05, -INF).masked_fill_(chance > 0.97, INF)
    for solution in (
        nmsolve.transposable_mask(scores, 4, 8, method=method, backend="torch", return_solution=True),
        nmsolve.transposable_mask(scores, 4, 8, method=method, backend="torch"),
    ):
        mask = solution if isinstance(solution, torch.Tensor) else solution.mask
        nmsolve.check_mask(mask, 4, 8)
        assert not mask[scores == -INF].any()
        assert mask[scores == INF].all()


def test_what_the_error_says() -> None:
    scores = torch.rand(2, 8, 8)
    scores[1, 5, :7] = -INF
    reason = "row 1 holds 0 other than -inf, and keeps 2; allow_short=True"
    with pytest.raises(NMSolveError, match=rf"scores: block \(1, 1, 0\) has no 2:4 mask .*: {reason}"):
        nmsolve.transposable_mask(scores, 2, 4, backend="torch")
    column = torch.rand(4, 4)
    column[:3, 0] = INF
    reason = "column 0 holds 3 inf, and keeps 2"
    with pytest.raises(NMSolveError, match=rf"scores\[1\]: block \(0, 0\) .*: {reason}"):
        nmsolve.transposable_masks([scores[0], column], 2, 4, backend="torch")
    with pytest.raises(NMSolveError, match="allow_short: expected True or False, got 1"):
        nmsolve.transposable_mask(scores, 2, 4, allow_short=1)  # type: ignore[call-overload]


# --- assignment ---------------------------------------------------------------------------------------------


def best_permutation(block: list[list[float]]) -> tuple[int, int, Fraction] | None:
    """Of all permutations, exactly; None where every one takes a -inf."""
    values = [worth(block, list(enumerate(p))) for p in itertools.permutations(range(len(block)))]
    return max((value for value in values if value is not None), default=None)


def backends_and(dtypes: list[torch.dtype]) -> list[Any]:
    """Every backend with every dtype; in the interpreter all but float32 are slow."""
    return [
        pytest.param(
            backend,
            dtype,
            marks=pytest.mark.slow if backend == "triton" and dtype != torch.float32 else (),
        )
        for backend in BACKENDS
        for dtype in dtypes
    ]


@pytest.mark.parametrize(
    ("backend", "dtype"), backends_and([torch.float64, torch.float32, torch.bfloat16, torch.float16])
)
@pytest.mark.parametrize("m", [1, 2, 5])
def test_every_permutation_of_small_matrices(backend: str, dtype: torch.dtype, m: int) -> None:
    needs(backend)
    g = generator(m)
    seen = set()
    for trial in range(6 if backend == "triton" else 20):
        chance = torch.rand(m, m, generator=g)
        scores = torch.randint(-5, 101, (m, m), generator=g).to(dtype)
        scores.masked_fill_(chance < 0.1 * (trial % 6), -INF).masked_fill_(chance > 0.97, INF)
        best = best_permutation(scores.double().tolist())
        feasible = best is not None and best[0] == int((scores == INF).sum())
        seen.add(feasible)
        if not feasible:
            with pytest.raises(NMSolveError, match="scores: the matrix has no permutation that takes"):
                nmsolve.assignment(scores, backend=backend)
            continue
        solution = nmsolve.assignment(scores, backend=backend, return_solution=True)
        for found in (solution.permutation, nmsolve.assignment(scores, backend=backend)):
            assert worth(scores.double().tolist(), list(enumerate(found.tolist()))) == best
        assert float(solution.objective) == float(best[2])
        assert 0 <= solution.max_gap <= 1e-6
    assert True in seen


@pytest.mark.parametrize(("backend", "dtype"), backends_and([torch.float64, torch.float32, torch.bfloat16]))
@pytest.mark.parametrize("apart", [10, 30, 60, 100])
def test_assignments_of_scores_that_lie_far_apart(backend: str, apart: int, dtype: torch.dtype) -> None:
    """Costs of -2^apart beside small integers, and both among what is taken."""
    needs(backend)
    g = generator(apart)
    for _ in range(2 if backend == "triton" else 6):
        small = torch.randint(1, 8, (5, 5), generator=g).double()
        large = -torch.randint(1, 4, (5, 5), generator=g).double() * 2.0**apart
        scores = torch.where(torch.rand(5, 5, generator=g) < 0.6, large, small).to(dtype)
        solution = nmsolve.assignment(scores, backend=backend, return_solution=True)
        best = best_permutation(scores.double().tolist())
        assert worth(scores.double().tolist(), list(enumerate(solution.permutation.tolist()))) == best
        assert 0 <= solution.max_gap <= 1e-6


def test_against_scipy_with_forbidden_entries() -> None:
    """Whole batches, of which only some matrices have infinite scores; large matrices."""
    optimize = pytest.importorskip("scipy.optimize")
    needs("cpu")
    g = generator(3)
    for m in (7, 64, 300):
        scores = torch.randn(4, m, m, generator=g, dtype=torch.float64)
        scores[1:3].masked_fill_(torch.rand(2, m, m, generator=g) < 0.5, -INF)
        solution = nmsolve.assignment(scores, return_solution=True)
        for matrix, found, bound in zip(scores, solution.permutation, solution.bound, strict=True):
            rows, cols = optimize.linear_sum_assignment(-matrix.numpy())
            best = float(matrix[rows, cols].sum())
            assert float(matrix.gather(1, found.unsqueeze(1)).sum()) == pytest.approx(best, rel=1e-12)
            assert float(bound) == pytest.approx(best, rel=1e-9)
