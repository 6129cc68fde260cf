"""The certificate at the edges: finite, not negative and small, whatever the scores are."""

from __future__ import annotations

import pytest
import torch

import nmsolve
from nmsolve import NMPattern
from nmsolve.blocks import grid_of
from nmsolve.ops.certificates import tighten

LARGEST_GAP = {torch.float32: 1e-6, torch.float64: 1e-12}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores_of(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Blocks ``(B, R, C)`` of a kind on which rounding, range or ties are at their worst."""
    g = generator(seed)
    batch, rows, cols = shape
    finfo = torch.finfo(dtype)
    # The kept score of a block of float64 must itself be a float64.
    largest = finfo.max if dtype == torch.float32 else finfo.max / 8192

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
