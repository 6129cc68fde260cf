"""Sums of maxima and N-th largest columns under the interpreter, against PyTorch's maxima of all pairs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nmsolve.kernels import _launch
from torch import Tensor

from nmsolve.backends.torch import permutations as reference

gpu = pytest.importorskip("nmsolve.backends.triton.permutations")

DTYPES = (torch.float32, torch.float64)


def problem(
    batch: int, groups: int, width: int, rows: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    """Thresholds, columns and their numbers: integers, whose sums are exact, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, groups, rows), (width + 2, rows)
    thresholds, columns = (torch.randint(-9, 10, shape, generator=generator).to(dtype) for shape in shapes)
    return [thresholds, columns, torch.randint(width + 2, (batch, width), generator=generator)]


def pairs(thresholds: Tensor, columns: Tensor, index: Tensor) -> Tensor:
    """The sums, pair by pair in float64."""
    return torch.maximum(thresholds[:, :, None], columns[index][:, None]).sum(-1, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.integers(0, 1 << 30),
)
def test_sums_of_any_shape(batch, groups, width, sixteens, dtype, seed) -> None:
    inputs = problem(batch, groups, width, 16 * sixteens, dtype, seed)
    found = gpu.sum_maxima(*inputs)
    assert found.dtype == torch.float64
    assert torch.equal(found, pairs(*inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1024, 1536, 1552, 2576])
def test_rows_in_parts(rows: int, dtype: torch.dtype) -> None:
    parts, part = _launch.parts_of(rows)
    assert (parts > 1) == (rows >= 1536)
    assert part % 16 == 0
    assert (parts - 1) * part < rows <= parts * part
    inputs = problem(1, 5, 3, rows, dtype)
    assert torch.equal(gpu.sum_maxima(*inputs), pairs(*inputs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    """Rows are adjacent; groups, problems and columns lie anywhere, also on each other."""
    thresholds, columns, index = problem(6, 10, 9, 48, dtype)
    views = [
        thresholds[::2],
        thresholds[:3, 1::3],
        thresholds.transpose(0, 1)[:3],
        thresholds[:1].expand(3, -1, -1),
    ]
    for view in views:
        for matrix in (columns, columns.repeat_interleave(2, 0)[::2], columns[:1].expand(11, -1)):
            assert torch.equal(gpu.sum_maxima(view, matrix, index[:3]), pairs(view, matrix, index[:3]))


def test_what_is_not_aligned() -> None:
    """As a view that begins anywhere: words of 16 bytes are no promise."""
    thresholds, columns, index = problem(2, 3, 4, 32, torch.float32)
    flat = torch.cat([torch.zeros(1), columns.flatten()])[1:]
    assert torch.equal(
        gpu.sum_maxima(thresholds, flat.view_as(columns), index), pairs(thresholds, columns, index)
    )


@pytest.mark.parametrize("rows", [1040, 4112])
def test_rounding(rows: int) -> None:
    """As that of the CPU's: gains below 2e-7 of a sum are none (nmsolve/permute/insertions.py)."""
    generator = torch.Generator().manual_seed(1)
    columns = torch.randn(40, rows, generator=generator).abs()
    thresholds, index = columns[None, :16], torch.arange(8, 40)[None]
    exact = pairs(thresholds.double(), columns.double(), index)
    off = (gpu.sum_maxima(thresholds, columns, index) - exact) / exact
    assert off.abs().max() < 2e-7
    assert off.std() < 6e-8


def test_a_sum_does_not_depend_on_its_place() -> None:
    generator = torch.Generator().manual_seed(2)
    columns = torch.randn(90, 1552, generator=generator)
    thresholds, index = columns[torch.arange(140).view(2, 70) % 90], torch.arange(140).view(2, 70) % 80
    together = gpu.sum_maxima(thresholds, columns, index)
    for b, g, j in ((0, 0, 0), (1, 69, 69), (1, 3, 33)):
        alone = gpu.sum_maxima(
            thresholds[b : b + 1, g : g + 1], columns, index[b : b + 1, j : j + 1].contiguous()
        )
        assert torch.equal(alone[0, 0, 0], together[b, g, j])


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores(dtype: torch.dtype) -> None:
    """A maximum, where a difference of the two would be no number."""
    thresholds, columns, index = problem(1, 4, 4, 16, dtype)
    thresholds[0, 0, 3] = thresholds[0, 1] = columns[index[0, 0], 3] = -torch.inf
    columns[index[0, 1], 5] = torch.inf
    found = gpu.sum_maxima(thresholds, columns, index)
    assert torch.equal(found, pairs(thresholds, columns, index))
    assert found.isinf().any()


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_sum(shape: tuple[int, int, int]) -> None:
    for rows in (32, 4096):
        found = gpu.sum_maxima(*problem(*shape, rows, torch.float32))
        assert found.shape == shape
        assert found.dtype == torch.float64
    assert gpu.nth_largest(torch.zeros(3, 16), torch.zeros(0, 2, dtype=torch.int64), 1).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7, 8, 15, 20, 31, 32, 33])
def test_nth_largest(k: int, dtype: torch.dtype) -> None:
    """In one lane up to 32 columns, and more by PyTorch."""
    generator = torch.Generator().manual_seed(k)
    columns = torch.randint(-3, 4, (40, 48 if k > 8 else 528), generator=generator).to(dtype)
    columns[::5] = torch.randn(columns[::5].shape, generator=generator, dtype=dtype)
    columns[3, 7], columns[4, 9] = -torch.inf, torch.inf
    groups = torch.stack([torch.randperm(40, generator=generator)[:k] for _ in range(3)])
    for n in {1, k // 2 + 1, k}:
        assert torch.equal(gpu.nth_largest(columns, groups, n), reference.nth_largest(columns, groups, n))
        strided = columns.repeat_interleave(2, 0)[::2]
        assert torch.equal(gpu.nth_largest(strided, groups, n), reference.nth_largest(columns, groups, n))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("members", "k"), [(4, 2), (6, 3), (8, 4), (5, 5), (1, 1), (34, 33)])
def test_sums_of_the_largest(members: int, k: int, dtype: torch.dtype) -> None:
    """Of integers, whose sums are exact; of rows that fill the last of a lane's words, and that do not."""
    generator = torch.Generator().manual_seed(k)
    subsets = torch.stack([torch.arange(members).roll(i)[:k] for i in range(members)])
    for rows in (48, 528):
        columns = torch.randint(-9, 10, (40, rows), generator=generator).to(dtype)
        picked = torch.stack([torch.randperm(40, generator=generator)[:members] for _ in range(3)])
        for n in {1, k // 2 + 1, k}:
            found = gpu.sum_largest(columns.repeat_interleave(2, 0)[::2], picked, subsets, n)
            assert found.dtype == torch.float64
            assert torch.equal(found, reference.sum_largest(columns, picked, subsets, n))
    assert gpu.sum_largest(columns, picked[:0], subsets, 1).shape == (0, len(subsets))
