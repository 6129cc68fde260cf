"""The certificate at the edges: finite, not negative and small, whatever the scores are."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmsolve
from nmsolve import NMPattern
from nmsolve.backends.dispatch import BACKENDS
from nmsolve.backends.torch import masks as reference
from nmsolve.blocks import grid_of
from nmsolve.ops.certificates import tighten
from nmsolve.ops.wider import coarse_blocks, solve_wider
from nmsolve.solution import BlockResult

LARGEST_GAP = {torch.float32: 1e-6, torch.float64: 1e-12}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores_of(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Blocks ``(B, R, C)`` of a kind on which rounding, range or ties are at their worst."""
    g = generator(seed)
    batch, rows, cols = shape
    finfo = torch.finfo(dtype)
    largest = finfo.max / 8192 if dtype == torch.float64 else finfo.max / 2

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=g, dtype=torch.float64)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64)

    def integers(low: int, high: int, *size: int) -> torch.Tensor:
        return torch.randint(low, high, size, generator=g).double()

    made = {
        "zeros": lambda: torch.zeros(shape, dtype=torch.float64),
        "constant": lambda: normal(batch, 1, 1),
        "ternary": lambda: integers(-1, 2, *shape),
        "ternary, scaled": lambda: integers(-1, 2, *shape) * rand(batch, rows, 1) * rand(batch, 1, cols),
        "nonpositive": lambda: -normal(*shape).clamp(min=0),
        "few values": lambda: integers(-3, 4, *shape) / 10,
        "huge": lambda: (2 * rand(*shape) - 1) * largest,
        "huge, positive": lambda: rand(*shape) * largest,
        "huge, constant": lambda: torch.full(shape, largest, dtype=torch.float64),
        "denormal": lambda: normal(*shape) * finfo.smallest_normal / 8,
        "equal rows": lambda: normal(batch, 1, cols).abs(),
        "equal columns": lambda: normal(batch, rows, 1).abs(),
        "some equal rows": lambda: normal(*shape).abs()[:, integers(0, 1 + rows // 4, rows).long()],
        "rank 1": lambda: (normal(batch, rows, 1) * normal(batch, 1, cols)).abs(),
        "heavy tails": lambda: normal(*shape) * torch.exp(4 * normal(*shape)),
        "ordinary": lambda: normal(*shape).abs(),
    }[kind]()
    return made.clamp(-finfo.max, finfo.max).to(dtype).expand(shape)


KINDS = (
    "zeros",
    "constant",
    "ternary",
    "ternary, scaled",
    "nonpositive",
    "few values",
    "huge",
    "huge, positive",
    "huge, constant",
    "denormal",
    "equal rows",
    "equal columns",
    "some equal rows",
    "rank 1",
    "heavy tails",
    "ordinary",
)


def check(scores: torch.Tensor, n: int, m: int, solution: nmsolve.BlockSolution) -> None:
    nmsolve.check_mask(solution.mask, n, m)
    assert torch.isfinite(solution.row_duals).all()
    assert torch.isfinite(solution.col_duals).all()
    assert torch.isfinite(solution.bound).all()
    assert (solution.bound >= solution.objective).all()
    assert float(solution.gap.min()) >= 0
    assert solution.max_gap <= LARGEST_GAP[scores.dtype]
    again = nmsolve.dual_bound(scores, solution.row_duals, solution.col_duals, NMPattern(n, m))
    lines = solution.row_duals.double().abs().sum(-1) + solution.col_duals.double().abs().sum(-1)
    assert ((again - solution.bound).abs() <= 1e-14 * m * (lines + solution.scale)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_gaps_of_blocks_of_every_kind(kind: str, dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    g = generator(11)
    for seed in range(8):
        m = int(torch.randint(1, 65, (), generator=g))
        n = int(torch.randint(0, m + 1, (), generator=g))
        size = (m, m) if seed % 3 else tuple(torch.randint(1, m + 1, (2,), generator=g).tolist())
        scores = scores_of(kind, (3, *size), dtype, seed)
        solution = nmsolve.transposable_mask(scores, n, m, backend="cpu", return_solution=True)
        check(scores, n, m, solution)
        again = nmsolve.transposable_mask(
            scores, n, m, backend="cpu", return_solution=True, warm_start=solution
        )
        check(scores, n, m, again)
        bad = torch.randn(2, *solution.row_duals.shape, generator=g, dtype=dtype) * 100
        far = nmsolve.transposable_mask(
            scores, n, m, backend="cpu", return_solution=True, warm_start=(bad[0], bad[1])
        )
        check(scores, n, m, far)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("zeros", (7, 7)),
        ("zeros", (2, 5)),
        ("ternary", (1, 3)),
        ("huge", (2, 9)),
        ("huge", (13, 14)),
        ("huge, constant", (0, 6)),
        ("huge, constant", (2, 2)),
        ("equal rows", (1, 43)),
        ("equal columns", (2, 12)),
    ],
)
def test_gaps_of_the_reference(kind: str, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    n, m = pattern
    scores = scores_of(kind, (4, m, m), dtype, 3)
    check(scores, n, m, nmsolve.transposable_mask(scores, n, m, backend="torch", return_solution=True))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_assignments_at_the_edges(backend: str) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    for kind in ("zeros", "ternary", "nonpositive", "huge", "equal rows", "heavy tails"):
        scores = scores_of(kind, (4, 5, 5), torch.float32, 2)
        solution = nmsolve.assignment(scores, backend=backend, return_solution=True)
        assert float(solution.gap.min()) >= 0, kind
        assert solution.max_gap <= 1e-6, kind


def test_a_checkpoint_of_zeros_has_a_gap_of_0() -> None:
    scores = torch.zeros(14, 21, dtype=torch.float64)
    solution = nmsolve.transposable_mask(scores, 7, 7, backend="torch", return_solution=True)
    assert (solution.relative_gap, solution.max_gap) == (0.0, 0.0)


@pytest.mark.parametrize("shape", [(2, 9, 9), (2, 5, 9), (2, 9, 4)])
def test_any_duals_of_an_optimal_mask_are_replaced_by_optimal_ones(shape: tuple[int, int, int]) -> None:
    """From worthless and from infinite ones; what was good enough stays as it is."""
    scores = torch.randn(shape, generator=generator(4))
    pattern = NMPattern(3, 9)
    solution = nmsolve.transposable_mask(scores, 3, 9, backend="torch", return_solution=True)
    grid = grid_of(scores, pattern)
    assert (grid.block_rows, grid.block_cols) == (1, 1)
    for value in (0.0, torch.inf, -torch.inf):
        u, v = (torch.full_like(duals, value) for duals in (solution.row_duals, solution.col_duals))
        bound = nmsolve.dual_bound(scores, u, v, pattern)
        tighten(scores, solution.mask, (u, v), solution.objective, bound, solution.scale, pattern)
        assert (bound - solution.objective <= 1e-6 * solution.scale).all()
        assert (nmsolve.dual_bound(scores, u, v, pattern) - bound).abs().max() < 1e-12
    before = solution.row_duals.clone()
    arguments = (solution.row_duals, solution.col_duals), solution.objective, solution.bound, solution.scale
    tighten(scores, solution.mask, *arguments, pattern)
    assert torch.equal(solution.row_duals, before)


def test_the_duals_of_a_worse_mask_prove_no_more_than_they_did() -> None:
    """Potentials of a mask that is not optimal do not exist; the bound stays a bound."""
    scores = torch.rand(6, 8, 8, generator=generator(5))
    best = nmsolve.solve_blocks(scores, 4, backend="torch")
    worse = nmsolve.solve_blocks(-scores, 4, backend="torch").mask
    objective, scale = ((scores.double() * worse).sum((1, 2)).view(6, 1, 1) for _ in range(2))
    u, v = (torch.zeros(6, 1, 1, 8) for _ in range(2))
    bound = scores.double().sum((1, 2)).view(6, 1, 1)
    tighten(scores, worse, (u, v), objective, bound, scale, NMPattern(4, 8))
    assert (bound.flatten() >= best.objective).all()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("method", ["exact", "greedy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_numbers_up_to_the_largest(dtype: torch.dtype, method: str, backend: str) -> None:
    """Whatever is finite has a finite certificate, and that of float64 is compared with one of less."""
    if backend == "cpu":
        pytest.importorskip("numba")
    g, largest = generator(7), torch.finfo(dtype).max
    for n, m, rows, cols in ((1, 2, 2, 2), (1, 3, 2, 3), (3, 5, 5, 5), (2, 7, 7, 4), (6, 9, 9, 9)):
        signs = torch.rand(8, rows, cols, generator=g, dtype=torch.float64) * 2 - 1
        ends = torch.where(signs < -0.3, -1.0, torch.where(signs > 0.3, 1.0, 0.0)).double()
        for part in (signs, signs.abs(), -signs.abs(), ends):
            scores = (part * largest).clamp(-largest, largest).to(dtype)
            solution = nmsolve.transposable_mask(
                scores, n, m, method=method, backend=backend, return_solution=True
            )
            nmsolve.check_mask(solution.mask, n, m)
            for field in ("row_duals", "col_duals", "objective", "bound", "scale"):
                assert torch.isfinite(getattr(solution, field)).all(), field
            less = scores.double() * 2.0**-20
            same = nmsolve.transposable_mask(less, n, m, method=method, backend=backend, return_solution=True)
            torch.testing.assert_close(solution.gap, same.gap, rtol=1e-4, atol=1e-6)
            assert math.isfinite(solution.relative_gap)
            if method == "exact":
                assert 0 <= solution.max_gap <= (1e-12 if dtype == torch.float64 else 1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=9, max_size=9),
    n=st.integers(0, 3),
)
def test_any_finite_numbers(dtype: torch.dtype, values: list[float], n: int) -> None:
    """Every mask of 3 x 3 blocks is looked at, in integers."""
    pytest.importorskip("numba")
    largest = torch.finfo(dtype).max
    scores = torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype).view(1, 3, 3)
    solution = nmsolve.transposable_mask(scores, n, 3, backend="cpu", return_solution=True)
    numbers = [Fraction(x) for x in scores.double().flatten().tolist()]
    masks = [
        keep
        for keep in itertools.product((0, 1), repeat=9)
        if all(sum(keep[i::3]) == n and sum(keep[3 * i : 3 * i + 3]) == n for i in range(3))
    ]
    best = max(sum(x for x, k in zip(numbers, keep, strict=True) if k) for keep in masks)
    kept = [x for x, k in zip(numbers, solution.mask.flatten().tolist(), strict=True) if k]
    short, size = best - sum(kept), sum(map(abs, kept))
    gap = float(solution.gap)
    assert gap >= 0
    assert short <= Fraction(min(gap, 1e300)) * size * (1 + Fraction(1, 10**6)) + Fraction(1, 10**14) * size
    assert torch.isfinite(solution.bound).all()
    assert short <= max(map(abs, numbers)) * Fraction(1, 2**16)


@pytest.mark.parametrize(
    ("backend", "large", "dtype"),
    [
        *itertools.product(["torch", "cpu"], [1.7e9, 1e14], [torch.float32, torch.bfloat16]),
        ("triton", 1e14, torch.float32),
    ],
)
def test_large_negative_scores_leave_the_optimum_of_the_others(
    backend: str, large: float, dtype: torch.dtype
) -> None:
    """Against integers: as few of them as can be, and then the most of the rest."""
    pytest.importorskip({"cpu": "numba"}.get(backend, backend))
    pytest.importorskip("ortools")
    g = generator(3)
    for n, m in ((2, 4), (3, 8), (8, 16))[: 1 if backend == "triton" else 3]:
        small = torch.randint(1, 101, (4, m, m), generator=g).double()
        out = torch.rand(4, m, m, generator=g) < 1 / 3
        scores = small.masked_fill(out, -large).to(dtype)
        small.masked_fill_(out, -10_000.0 * m)
        mask = nmsolve.transposable_mask(scores, n, m, backend=backend)
        solution = nmsolve.transposable_mask(scores, n, m, backend=backend, return_solution=True)
        assert solution.max_gap <= 1e-6
        for block, *masks in zip(small, mask, solution.mask, strict=True):
            best = oracles.min_cost_flow(block, n)
            assert [oracles.kept_score(block, found) for found in masks] == [pytest.approx(best, abs=0.5)] * 2


def test_only_blocks_that_need_it_are_solved_again() -> None:
    """And a solver's own better masks stay."""
    solved = []

    def exact(blocks: torch.Tensor, pattern: NMPattern, **options: Any) -> BlockResult:
        assert blocks.dtype == torch.float64
        solved.append(len(blocks))
        return reference.exact(blocks, pattern, **options)

    solver: Any = SimpleNamespace(masks=SimpleNamespace(exact=exact), masks_float64=True)
    ordinary = torch.randn(16, 16, generator=generator(9))
    scores = ordinary.clone()
    scores[4:8, 8:12] = torch.where(torch.rand(4, 4, generator=generator(2)) < 0.4, -1e14, scores[4:8, 8:12])
    pattern = NMPattern(2, 4)
    assert not coarse_blocks(ordinary, pattern, torch.float32).any()
    assert not coarse_blocks(-ordinary.abs(), pattern, torch.float32).any()
    wanted = coarse_blocks(scores, pattern, torch.float32)
    assert wanted.nonzero().tolist() == [[1, 2]]
    best = nmsolve.transposable_mask(scores.double(), 2, 4, backend="torch")
    worse = nmsolve.transposable_mask(-scores.double(), 2, 4, backend="torch")
    mask = worse.clone()
    assert torch.equal(solve_wider(solver, scores, mask, wanted, pattern), wanted)
    assert set(solved) == {1}
    assert torch.equal(mask[4:8, 8:12], best[4:8, 8:12])
    mask[4:8, 8:12] = worse[4:8, 8:12]
    assert torch.equal(mask, worse)


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_float64_is_told_apart_where_the_table_says_so(backend: str) -> None:
    pytest.importorskip({"cpu": "numba"}.get(backend, backend))
    pytest.importorskip("ortools")
    beyond = torch.rand(4, 4, generator=generator(6), dtype=torch.float64)
    scores = 1 + 2.0**-40 * beyond
    mask = BACKENDS[backend].masks.exact(scores[None], NMPattern(2, 4), warm=None, want_solution=True).mask[0]
    best = oracles.min_cost_flow(beyond, 2)
    optimal = oracles.kept_score(beyond, mask) == pytest.approx(best, rel=1e-3)
    assert optimal == BACKENDS[backend].masks_float64
