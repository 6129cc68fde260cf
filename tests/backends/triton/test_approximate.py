"""The greedy, tsenor and ordinary N:M kernels under the interpreter."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from nmsolve.pattern import NMPattern

gpu = pytest.importorskip("nmsolve.backends.triton.masks")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from nmsolve.kernels._tile import col_index, row_index  # noqa: E402
from nmsolve.kernels.dykstra import take_greedily, unpacked  # noqa: E402


@triton.jit
def _greedy_kernel(order_ptr, kept_ptr, n, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr):
    i, j = row_index(2, ROWS), col_index(2, COLS)
    block = tl.arange(0, BLOCKS)[None, None, :, None, None]
    at = (block * 2 * ROWS + i) * 2 * COLS + j
    bits, zero = take_greedily(tl.load(order_ptr + at) / 16, n, -1.0, 1.0, False)
    tl.store(kept_ptr + at, unpacked(bits, zero, 2).to(tl.int32))


@pytest.mark.parametrize("name", ["normal", "ties", "constant", "signed", "bfloat16_ties"])
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 8), (8, 16)])
def test_greedy_rounds_are_the_sequential_greedy(name: str, n: int, m: int) -> None:
    """Before completion, so that lines may hold fewer than n."""
    blocks = oracles.sample(name, (8, m, m), seed=1)
    kept = torch.full(blocks.shape, -1, dtype=torch.int32)
    _greedy_kernel[(1,)](blocks, kept, n, ROWS=m // 2, COLS=m // 2, BLOCKS=8)
    for block, mask in zip(blocks, kept, strict=True):
        assert np.array_equal(mask.numpy(), oracles.sequential_greedy(block, n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_of_tied_entries_is_taken_once_its_column_is_free(dtype: torch.dtype) -> None:
    """(0, 0) comes before (0, 1) and is taken, though an entry of its column comes before both."""
    block = torch.zeros(4, 4, dtype=dtype)
    block[0] = torch.tensor([2, 2, 9, 0])
    block[1] = torch.tensor([3, 1, 8, 0])
    mask = gpu.greedy(block[None], NMPattern(2, 4))
    assert np.array_equal(mask[0].numpy(), oracles.completed_greedy(block, 2))
    assert mask[0, 0].tolist() == [True, False, True, False]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 16)])
def test_greedy_tells_the_smallest_and_the_largest_numbers_apart(n: int, m: int) -> None:
    """Of one block: denormal scores, those next to 1 and -1, zeros of both signs, and the largest floats."""
    generator = torch.Generator().manual_seed(m)
    near_one = torch.randint(-4, 0, (m, m), generator=generator).int() + torch.tensor(1.0).view(torch.int32)
    sign = torch.randint(0, 2, (m, m), generator=generator) * 2.0 - 1
    for block in (
        torch.randint(-5, 6, (m, m), generator=generator) * 2.0**-149,
        near_one.view(torch.float32) * sign,
        sign * 0.0,
        torch.randn(m, m, generator=generator).clamp(-1, 1) * (0.3 * torch.finfo(torch.float32).max),
    ):
        mask = gpu.greedy(block[None], NMPattern(n, m))
        assert np.array_equal(mask[0].numpy(), oracles.completed_greedy(block.double(), n))


@pytest.mark.parametrize("name", ["normal", "ties", "zero", "signed"])
@pytest.mark.parametrize(
    ("n", "m", "shape"),
    [
        (2, 4, (16, 20)),
        (3, 4, (9, 7)),
        (1, 1, (3, 4)),
        (5, 12, (24, 30)),
        (8, 16, (32, 16)),
        (7, 32, (40, 20)),
    ],
)
def test_greedy_is_completed(name: str, n: int, m: int, shape: tuple[int, int]) -> None:
    scores = oracles.sample(name, (1, *shape), seed=2)
    mask = gpu.greedy(scores, NMPattern(n, m))
    oracles.check_mask_counts(mask, n, m)
    for i, j, block in oracles.blocks_of(scores[0], m):
        r, c = block.shape
        expected = oracles.completed_greedy(block, n)
        assert np.array_equal(mask[0, i * m : i * m + r, j * m : j * m + c].numpy(), expected)


@pytest.mark.parametrize(("n", "m", "count"), [(4, 8, 24), (8, 16, 4), (16, 32, 1)])
def test_tsenor_is_near_the_optimum(n: int, m: int, count: int) -> None:
    scores = oracles.sample("normal", (1, m, m * count), seed=3)
    mask = gpu.tsenor(scores, NMPattern(n, m), iterations=300, tau=150.0)
    oracles.check_mask_counts(mask, n, m)
    errors = []
    for _, j, block in oracles.blocks_of(scores[0], m):
        best = oracles.min_cost_flow(block, n)
        errors.append(1 - oracles.kept_score(block, mask[0, :, j * m : j * m + m]) / best)
    assert 0 <= np.mean(errors) <= 0.002


@pytest.mark.parametrize(
    "name", ["lognormal", "negative", "constant", "zero", "tiny", "huge", "outlier_lines"]
)
def test_tsenor_fills_every_line(name: str) -> None:
    for n, m, shape in ((2, 4, (12, 16)), (4, 4, (8, 8)), (3, 8, (13, 20))):
        scores = oracles.sample(name, (1, *shape), seed=4)
        for tau in (5.0, 1000.0):
            oracles.check_mask_counts(gpu.tsenor(scores, NMPattern(n, m), iterations=6, tau=tau), n, m)


@pytest.mark.parametrize("method", ["greedy", "tsenor"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(method: str, dtype: torch.dtype) -> None:
    options = {"iterations": 10, "tau": 150.0} if method == "tsenor" else {}
    scores = oracles.sample("bfloat16_ties", (2, 10, 14), seed=5).clamp(max=6).to(dtype)
    mask = getattr(gpu, method)(scores, NMPattern(2, 4), **options)
    assert torch.equal(mask, getattr(gpu, method)(scores.float(), NMPattern(2, 4), **options))
    oracles.check_mask_counts(mask, 2, 4)


def test_nothing_is_kept_of_nothing() -> None:
    scores = oracles.sample("normal", (1, 9, 8), seed=6)
    assert not gpu.greedy(scores, NMPattern(0, 4)).any()
    assert not gpu.tsenor(scores, NMPattern(0, 4), iterations=3, tau=10.0).any()
    assert not gpu.ordinary(scores, NMPattern(0, 4)).any()


# --- ordinary N:M -------------------------------------------------------------------------------------------


def stable_sort_mask(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for start in range(0, scores.shape[-1], m):
        group = scores[..., start : start + m]
        order = group.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        mask[..., start : start + m].scatter_(-1, order, True)
    return mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["signed", "ties", "constant"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 1), (3, 7), (16, 32), (64, 64), (5, 64)])
def test_ordinary_is_a_stable_sort(name: str, dtype: torch.dtype, n: int, m: int) -> None:
    scores = oracles.sample(name, (2, 5, 2 * m + m // 2 + 1), seed=7, dtype=dtype)
    assert torch.equal(gpu.ordinary(scores, NMPattern(n, m)), stable_sort_mask(scores, n, m))


def test_ordinary_compares_float64_exactly_and_both_zeros_as_equal() -> None:
    close = torch.tensor([[[1.0, 1.0 + 2.0**-50, 1.0 - 2.0**-50, 1.0]]], dtype=torch.float64)
    assert gpu.ordinary(close, NMPattern(1, 4)).tolist() == [[[False, True, False, False]]]
    assert gpu.ordinary(close, NMPattern(2, 4)).tolist() == [[[True, True, False, False]]]
    zeros = torch.tensor([[[-0.0, 0.0, -0.0, 0.0]]])
    assert gpu.ordinary(zeros, NMPattern(2, 4)).tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ordinary_keeps_the_first_of_equal_negative_scores(dtype: torch.dtype) -> None:
    scores = torch.tensor([-2.0, -1.0, -1.0, -1.0, 0.5, -1.0, -3.0, -1.0]).expand(1, 3, 8).to(dtype)
    for n in range(9):
        assert torch.equal(gpu.ordinary(scores, NMPattern(n, 8)), stable_sort_mask(scores, n, 8)), n


def test_ordinary_takes_any_strides() -> None:
    base = oracles.sample("signed", (3, 20, 9), seed=8)
    for scores in (
        base.transpose(1, 2),
        base[:, ::3, 1:],
        base[:, :1].expand(-1, 4, -1),
        base.transpose(0, 1),
    ):
        assert torch.equal(gpu.ordinary(scores, NMPattern(2, 4)), stable_sort_mask(scores, 2, 4))
