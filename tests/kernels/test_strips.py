"""The kernel of hierarchical masks, against all choices of columns and the reference, in the interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nmsolve import BackendError, VNMPattern, check_hierarchical_mask, hierarchical_mask
from nmsolve.backends.dispatch import BACKENDS
from nmsolve.backends.torch import strips as reference

strips = pytest.importorskip("nmsolve.backends.triton.strips")

KINDS = {
    "normal": lambda g, *shape: torch.randn(shape, generator=g, dtype=torch.float64),
    "ties": lambda g, *shape: torch.randint(0, 3, shape, generator=g).double(),
    "zero": lambda g, *shape: torch.zeros(shape, dtype=torch.float64),
    "tiny": lambda g, *shape: torch.randn(shape, generator=g, dtype=torch.float64) * 1e-300,
    "huge": lambda g, *shape: torch.rand(shape, generator=g, dtype=torch.float64) * 1e280,
    "columns": lambda g, b, m, v: (
        torch.randn(b, m, v, generator=g, dtype=torch.float64).abs() * torch.logspace(-6, 6, m).view(m, 1)
    ),
}
# (V, N, M, columns): powers of two and none, more columns kept than four, and fewer.
SHAPES = [(4, 2, 8, 4), (5, 3, 7, 4), (3, 1, 6, 4), (1, 2, 9, 4), (3, 4, 8, 5)]


def blocks_of(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """float64 (B, M, V)."""
    return KINDS[kind](torch.Generator().manual_seed(seed), *shape)


def kept(block: Tensor, chosen: Tensor, n: int) -> float:
    """What the rows of an (M, V) block keep of these columns."""
    return float(block[chosen].topk(n, dim=0).values.sum())


def most(block: Tensor, n: int, k: int) -> float:
    """The best of all choices, one by one."""
    every = itertools.combinations(range(len(block)), k)
    return max(kept(block, torch.tensor(chosen), n) for chosen in every)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("v", "n", "m", "k"), SHAPES)
def test_no_choice_of_columns_keeps_more(v: int, n: int, m: int, k: int, kind: str) -> None:
    blocks = blocks_of(kind, 1, m, v)
    chosen, bounds = strips.best_columns(blocks, n, k, 1 << 18)
    assert chosen.dtype == torch.int64
    for block, few, bound in zip(blocks, chosen, bounds, strict=True):
        assert few.tolist() == sorted(set(few.tolist()))
        best = most(block, n, k)
        assert kept(block, few, n) == pytest.approx(best, rel=1e-12, abs=0)
        assert bound == -torch.inf or kind in ("normal", "tiny")  # sums that cancel prove up to rounding


@pytest.mark.parametrize("limit", [0, 1, 60, 2**62])
def test_bounds_hold_however_early_the_search_ends(limit: int) -> None:
    for kind in ("normal", "ties"):
        blocks = blocks_of(kind, 1, 8, 6, seed=limit % 97)
        chosen, bounds = strips.best_columns(blocks, 2, 4, limit)
        for block, few, bound in zip(blocks, chosen, bounds, strict=True):
            best = most(block, 2, 4)
            assert kept(block, few, 2) <= best
            if bound == -torch.inf:
                assert kept(block, few, 2) == pytest.approx(best, rel=1e-12)
            else:
                assert bound >= best * (1 - 1e-12)


def test_scores_that_float32_cannot_tell_apart() -> None:
    """Columns that differ by 1e-12: gains are sums of float32, and only leave out what is surely worse."""
    generator = torch.Generator().manual_seed(3)
    base = torch.rand(1, 1, 8, generator=generator, dtype=torch.float64) + 1
    blocks = base + 1e-12 * torch.randint(0, 1000, (1, 8, 8), generator=generator)
    chosen, _ = strips.best_columns(blocks, 2, 4, 1 << 18)
    for block, few in zip(blocks, chosen, strict=True):
        assert kept(block, few, 2) == pytest.approx(most(block, 2, 4), rel=3e-13, abs=0)


def test_as_the_reference_on_blocks_of_several_warps() -> None:
    blocks = blocks_of("columns", 1, 40, 130)
    chosen, bounds = strips.best_columns(blocks, 2, 4, 1 << 18)
    theirs, _ = reference.best_columns(blocks, 2, 4, 1 << 18)
    assert torch.equal(chosen, theirs)
    assert bounds.item() == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks(dtype: torch.dtype) -> None:
    """Partial strips and groups, batches, strides."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(11, 2, 5, generator=generator).abs().to(dtype).permute(1, 2, 0)
    found = hierarchical_mask(scores, "4:2:8", backend="triton", return_solution=True)
    check_hierarchical_mask(found.mask, "4:2:8")
    expected = hierarchical_mask(scores, "4:2:8", backend="torch", return_solution=True)
    assert torch.allclose(found.objective, expected.objective, rtol=1e-12, atol=0)
    assert found.max_gap == 0


def test_blocks_that_do_not_fit() -> None:
    """Auto takes the reference; a backend asked for by name says so."""
    row = BACKENDS["triton"]
    assert row.holds_strip(256, 64, 8)
    assert row.holds_strip(1024, 5, 2)
    for size in ((257, 64, 4), (1025, 5, 4), (513, 5, 5), (16, 65, 4), (16, 64, 9)):
        assert not row.holds_strip(*size)
    for pattern, shape in (
        (VNMPattern(8, 2, 128), "8 x 128 that keep 4"),
        (VNMPattern(16, 2, 32, 20), "16 x 32 that keep 20"),
    ):
        with pytest.raises(BackendError, match=f"'triton' holds no blocks of {shape} columns; use 'auto'"):
            hierarchical_mask(torch.rand(16, 128), pattern, backend="triton")
    # What matters is the matrix, where it is smaller than a block.
    scores = torch.rand(3, 8)
    mask = hierarchical_mask(scores, VNMPattern(1 << 20, 2, 8), backend="triton")
    check_hierarchical_mask(mask, VNMPattern(1 << 20, 2, 8))
    assert not hierarchical_mask(torch.empty(0, 200), VNMPattern(8, 2, 128), backend="triton").numel()
