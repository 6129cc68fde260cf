"""The exact kernel under the interpreter, against solvers that share nothing with it."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from torch import Tensor

from nmsolve.backends import ascent_schedule
from nmsolve.blocks import BlockGrid
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult

gpu = pytest.importorskip("nmsolve.backends.triton.masks")
kernel = pytest.importorskip("nmsolve.kernels.exact")


def solve(scores: Tensor, n: int, m: int, warm: tuple[Tensor, Tensor] | None = None) -> BlockResult:
    return gpu.exact(scores, NMPattern(n, m), warm=warm, want_solution=True)


def check(scores: Tensor, n: int, m: int, result: BlockResult, tolerance: float = 1e-6) -> None:
    """Counts, optimality and certificate of every block of ``(batch, rows, cols)`` scores."""
    batch, rows, cols = scores.shape
    grid = BlockGrid(rows, cols, m)
    assert result.mask.shape == scores.shape
    assert result.mask.view(torch.uint8).max() <= 1
    assert result.row_duals.shape == result.col_duals.shape == (batch, grid.block_rows, grid.block_cols, m)
    oracles.check_mask_counts(result.mask, n, m)
    for b in range(batch):
        for i, j, block in oracles.blocks_of(scores[b], m):
            at = f"block {b, i, j}"
            r, c = block.shape
            mask = result.mask[b, i * m : i * m + r, j * m : j * m + c]
            objective, bound = (x[b, i, j].item() for x in (result.objective, result.bound))
            kept = oracles.kept_score(block, mask)
            size = oracles.kept_score(block.abs(), mask)
            u, v = result.row_duals[b, i, j], result.col_duals[b, i, j]
            assert math.isclose(kept, objective, rel_tol=0, abs_tol=1e-12 * size), at
            dual = oracles.dual_value(block, u, v, n)
            assert math.isclose(dual, bound, rel_tol=1e-11, abs_tol=1e-11 * size), at
            assert (u[r:] == 0).all(), at
            assert (v[c:] == 0).all(), at
            assert -1e-12 * size <= bound - objective <= tolerance * size, at
            assert abs(oracles.min_cost_flow(block, n) - kept) <= tolerance * size, at


@pytest.mark.parametrize("name", sorted(oracles.distributions))
@pytest.mark.parametrize(("n", "m", "rows", "cols"), [(2, 4, 24, 28), (4, 8, 16, 24)])
def test_distributions(name: str, n: int, m: int, rows: int, cols: int) -> None:
    scores = oracles.sample(name, (1, rows, cols), seed=1)
    check(scores, n, m, solve(scores, n, m))


@pytest.mark.parametrize("name", ["normal", "student_t", "lognormal", "ties"])
@pytest.mark.parametrize(
    ("n", "m", "across"),
    [
        (1, 1, 9),
        (1, 2, 8),
        (2, 3, 5),
        (3, 12, 4),
        (8, 16, 5),
        (1, 16, 4),
        (13, 16, 4),
        (10, 24, 2),
        (16, 32, 2),
    ],
)
def test_sizes(name: str, n: int, m: int, across: int) -> None:
    scores = oracles.sample(name, (1, m, m * across), seed=2)
    check(scores, n, m, solve(scores, n, m))


@pytest.mark.parametrize(("name", "n"), [("normal", 32), ("student_t", 7)])
def test_the_largest_tile(name: str, n: int) -> None:
    scores = oracles.sample(name, (1, 64, 64), seed=3)
    check(scores, n, 64, solve(scores, n, 64))


@pytest.mark.parametrize("n", range(9))
def test_every_n(n: int) -> None:
    scores = oracles.sample("signed", (1, 16, 24), seed=4)
    check(scores, n, 8, solve(scores, n, 8))


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 9), (11, 3), (7, 7), (5, 4), (4, 5), (10, 14)])
def test_partial_blocks(shape: tuple[int, int], n: int) -> None:
    for name in ("signed", "ties"):
        scores = oracles.sample(name, (2, *shape), seed=5)
        check(scores, n, 4, solve(scores, n, 4))


@pytest.mark.parametrize(("n", "m", "shape"), [(6, 12, (30, 17)), (8, 16, (20, 41)), (9, 32, (40, 50))])
def test_partial_blocks_of_larger_tiles(n: int, m: int, shape: tuple[int, int]) -> None:
    scores = oracles.sample("normal", (1, *shape), seed=6)
    check(scores, n, m, solve(scores, n, m))


@pytest.mark.parametrize("m", [16, 32])
def test_constant_blocks_are_no_burden(m: int) -> None:
    """Ties are settled in bulk: without that, a search per kept entry would take minutes here."""
    scores = torch.full((1, m, m), 0.37)
    check(scores, m // 4, m, solve(scores, m // 4, m))
    scores[0, 3, 5] = -2.0
    scores[0, 2] = 0.5
    check(scores, m // 2, m, solve(scores, m // 2, m))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 12), (7, 10)])
def test_dtypes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    scores = oracles.sample("normal", (2, *shape), seed=7, dtype=dtype)
    result = solve(scores, 2, 4)
    assert result.row_duals.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(scores, 2, 4, result)


@pytest.mark.parametrize("scale", [1e-300, 1e300, 1e-40, 1e38])
def test_extreme_float64(scale: float) -> None:
    scores = torch.rand((1, 8, 8), generator=torch.Generator().manual_seed(8), dtype=torch.float64) * scale
    result = solve(scores, 2, 4)
    check(scores / scale, 2, 4, result._replace(
        row_duals=result.row_duals / scale, col_duals=result.col_duals / scale,
        objective=result.objective / scale, bound=result.bound / scale,
    ))  # fmt: skip


@pytest.mark.parametrize("scale", [3e38, 1e-38, 1e-43])
def test_extreme_float32(scale: float) -> None:
    scores = torch.rand((1, 8, 8), generator=torch.Generator().manual_seed(9)) * scale
    mask = gpu.exact(scores, NMPattern(2, 4)).mask
    oracles.check_mask_counts(mask, 2, 4)
    # Scores near the smallest float are coarse: compare what is kept of the scores as they are.
    for i, j, block in oracles.blocks_of(scores[0], 4):
        kept = oracles.kept_score(block, mask[0, i * 4 : i * 4 + 4, j * 4 : j * 4 + 4])
        assert kept >= oracles.min_cost_flow(block, 2) * (1 - 1e-6)


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, 3:20:2, 1:],
    "reversed batch": lambda x: x.transpose(0, 1),
    "one row repeated": lambda x: x[:, :1].expand(-1, 9, -1),
    "one number": lambda x: x[:1, :1, :1].expand(2, 8, 9),
}


@pytest.mark.parametrize("view", sorted(VIEWS))
def test_strides(view: str) -> None:
    scores = VIEWS[view](oracles.sample("normal", (3, 24, 14), seed=10))
    result, copy = solve(scores, 2, 4), solve(scores.contiguous(), 2, 4)
    check(scores, 2, 4, result)
    for mine, theirs in zip(result, copy, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("shape", [(1, 16, 18), (2, 10, 13), (1, 4, 4)])
def test_every_output_is_written(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN (and as 0xAA in the mask), and the padding of the duals ends as 0."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.bool:
            tensor.view(torch.uint8).fill_(0xAA)
        else:
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    scores = oracles.sample("normal", shape, seed=11)
    check(scores, 2, 4, solve(scores, 2, 4))
    assert gpu.greedy(scores, NMPattern(2, 4)).view(torch.uint8).max() <= 1
    assert gpu.ordinary(scores, NMPattern(2, 4)).view(torch.uint8).max() <= 1


def test_blocks_do_not_depend_on_their_program() -> None:
    """70 blocks in three programs, the last one partly empty, against each block alone."""
    scores = oracles.sample("ties", (7, 8, 20), seed=12)
    together = solve(scores, 2, 4)
    for b, i, j in ((0, 0, 0), (3, 0, 1), (3, 0, 2), (6, 1, 4)):
        block = scores[b : b + 1, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        alone = solve(block, 2, 4)
        assert torch.equal(alone.mask[0], together.mask[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4])
        assert torch.equal(alone.row_duals[0, 0, 0], together.row_duals[b, i, j])


@pytest.mark.parametrize(("shape", "m"), [((1, 16, 20), 4), ((1, 16, 32), 16)])
def test_asking_for_the_solution_does_not_change_the_mask(shape: tuple[int, int, int], m: int) -> None:
    scores = oracles.sample("bfloat16_ties", shape, seed=13)
    assert torch.equal(gpu.exact(scores, NMPattern(m // 2, m)).mask, solve(scores, m // 2, m).mask)


@pytest.mark.parametrize("shape", [(8, 16), (7, 9)])
def test_warm_start(shape: tuple[int, int]) -> None:
    scores = oracles.sample("normal", (1, *shape), seed=14)
    first = solve(scores, 2, 4)
    again = solve(scores, 2, 4, warm=(first.row_duals, first.col_duals))
    assert torch.equal(again.mask, first.mask)
    nudged = scores + 0.01 * oracles.sample("signed", (1, *shape), seed=15)
    check(nudged, 2, 4, solve(nudged, 2, 4, warm=(first.row_duals, first.col_duals)))
    for start in (0.0, -1e30, 1e30):  # any duals are a start
        u, v = torch.full_like(first.row_duals, start), torch.full_like(first.col_duals, -start)
        check(scores, 2, 4, solve(scores, 2, 4, warm=(u, v)))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    result = solve(torch.zeros(shape), 2, 4)
    assert result.mask.shape == shape
    assert result.objective.numel() == 0
    assert gpu.greedy(torch.zeros(shape), NMPattern(2, 4)).shape == shape
    assert gpu.ordinary(torch.zeros(shape), NMPattern(2, 4)).shape == shape


def test_warm_starts_are_clamped_as_in_the_other_backends() -> None:
    assert kernel.WARM_LIMIT.value == ascent_schedule.WARM_LIMIT


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(oracles.distributions))
def test_masks_alone_of_4x4_blocks(name: str, n: int) -> None:
    """Without duals, full 4 x 4 blocks are solved by looking at every mask."""
    scores = oracles.sample(name, (2, 12, 20), seed=4)
    mask = gpu.exact(scores, NMPattern(n, 4)).mask
    oracles.check_mask_counts(mask, n, 4)
    for b in range(2):
        for i, j, block in oracles.blocks_of(scores[b], 4):
            here = mask[b, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
            size = oracles.kept_score(block.abs(), here)
            assert abs(oracles.min_cost_flow(block, n) - oracles.kept_score(block, here)) <= 1e-6 * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_masks_alone_are_those_of_the_solution(dtype: torch.dtype, n: int) -> None:
    """Any strides, widths that 4 does not divide, more blocks than one program takes."""
    whole = oracles.sample("normal", (3, 46, 50), seed=5, dtype=torch.float64)
    scores = whole.to(dtype).mT[:, 2:, ::2]
    pattern = NMPattern(n, 4)
    alone, solved = gpu.exact(scores, pattern), gpu.exact(scores, pattern, want_solution=True)
    assert alone.row_duals is None
    oracles.check_mask_counts(alone.mask, n, 4)
    for b in range(3):
        one, other = (oracles.kept_score(scores[b].double(), x.mask[b]) for x in (alone, solved))
        assert math.isclose(one, other, rel_tol=1e-6)
