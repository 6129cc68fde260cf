"""Every kernel ends, whatever bits it is given, and leaves whole masks.

The public functions refuse scores that are not finite; the launchers, and whoever writes to a tensor while a
kernel reads it, do not. Not collected by itself: tests/kernels/test_any_bits.py runs it in children, in the
interpreter and (with NMSOLVE_PTX_SM) on the emulator, for a kernel that does not end would hang the suite.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from nmsolve.backends.triton import masks as gpu
from nmsolve.backends.triton import permutations as gpu_permute
from nmsolve.backends.triton import strips as gpu_strips
from nmsolve.pattern import NMPattern

EMULATED = bool(os.environ.get("NMSOLVE_PTX_SM"))
SIZES = tuple(int(m) for m in os.environ.get("NMSOLVE_TEST_SIZES", "4").split())
"""Which block sizes are tried."""

FEW = max(SIZES) > (32 if EMULATED else 8)
"""Whether blocks are so large that a search takes seconds where there is no optimum."""

SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, 1.0])

if EMULATED:
    import emulator

    # A block makes M^2 / 2 rounds at most, of 2 M sweeps and as many steps back.
    emulator.SETTINGS.most_steps = 200_000 + 20 * max(SIZES) ** 3


def kinds(shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 tensors that hold anything but ordinary scores, beside each other: (kinds, *shape).

    Two of them where searches are long, other ones for other seeds.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    found = [torch.full(shape, float(value)) for value in SPECIAL[:4]]
    sign = torch.rand(shape, generator=generator) < 0.5
    found.append(torch.where(sign, SPECIAL[1], SPECIAL[2]))
    found.append(SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)])
    some = torch.rand(shape, generator=generator) < 0.2
    found.append(torch.where(some, SPECIAL[torch.randint(5, shape, generator=generator)], normal))
    found += [torch.where(torch.ones(shape).triu(1) > 0, value, normal) for value in SPECIAL[:3]]
    found.append(torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32))
    found.append(normal)
    return torch.stack(found[seed % 6 :: 6] if FEW else found)


def check(mask: Tensor) -> None:
    assert mask.view(torch.uint8).max() <= 1


def kept(m: int) -> list[int]:
    """How many entries a line keeps; of large blocks one of the numbers."""
    numbers = sorted({0, 1, m // 2, m} & set(range(m + 1)))
    return [numbers[1 + m % 3]] if FEW else numbers


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("m", SIZES)
def test_masks(m: int, partial: bool) -> None:
    """A full block of each kind, or blocks of partial shapes beside each other."""
    scores = kinds((max(1, m - 1), m + max(1, m // 2)) if partial else (m, m), seed=m)
    for n in kept(m):
        pattern = NMPattern(n, m)
        check(gpu.exact(scores, pattern).mask)
        check(gpu.greedy(scores, pattern))
        check(gpu.tsenor(scores, pattern, iterations=3, tau=50.0))
        check(gpu.ordinary(scores, pattern))


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("m", SIZES)
def test_duals_to_start_from(m: int, partial: bool) -> None:
    """Any duals with ordinary scores, and with any scores."""
    pattern = NMPattern(max(1, m // 2), m)
    scores = kinds((max(1, m - 1) if partial else m, m), seed=m)
    u, v = (kinds((1, 1, m), seed=seed) for seed in (1, 2))
    for x in (scores[-1:].expand_as(scores), scores):
        check(gpu.exact(x, pattern, warm=(u, v), want_solution=True).mask)
    check(gpu.exact(scores.double(), pattern, warm=(u.double(), v.double())).mask)


@pytest.mark.parametrize("m", SIZES)
def test_many_matrices(m: int) -> None:
    group = [*kinds((1, m, m + 1), seed=m)[::3], *kinds((1, m, m), seed=m)[1:3]]
    for want_solution in (False, True):
        for result in gpu.exact_group(group, NMPattern(max(1, m // 2), m), want_solution=want_solution):
            check(result.mask)


@pytest.mark.parametrize("m", [m for m in SIZES if m > 2])
def test_strips(m: int) -> None:
    """Choices of columns, whatever they keep; sums of scores may overflow as well."""
    blocks = kinds((m, 5), seed=m).double()
    for limit in (0, 500):
        for scale in (1.0, 1e290):
            chosen, _ = gpu_strips.best_columns(blocks * scale, 1, m // 2, limit)
            assert chosen.min() >= 0
            assert chosen.max() < m
            assert (chosen.diff(dim=1) > 0).all()


@pytest.mark.parametrize("m", SIZES)
def test_sums_of_maxima(m: int) -> None:
    """Whatever they are, they are there; that of numbers stays theirs."""
    normal = torch.randn(m, 16, generator=torch.Generator().manual_seed(m))
    columns = torch.cat([*kinds((m, 16), seed=m), normal])
    groups = torch.arange(len(columns)).view(-1, m)
    least = gpu_permute.nth_largest(columns, groups, max(1, m // 2))
    assert least.shape == (len(groups), 16)
    assert gpu_permute.sum_largest(columns, groups, groups[:1], max(1, m // 2)).shape == (len(groups), 1)
    sums = gpu_permute.sum_maxima(columns[None], columns, groups[-1:])
    expected = torch.maximum(normal[:, None], normal).sum(2, dtype=torch.float64)
    assert torch.allclose(sums[0, -m:], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", SIZES)
def test_plans(m: int) -> None:
    """What comes out is not asked for; forward and backward end, with a tolerance as without."""
    logits = kinds((m, m), seed=m)
    ones = torch.ones(len(logits), m)
    for tolerance in (-1.0, 1e-3, float("nan")):
        for rows, cols in ((kinds((1, m), seed=1)[:, 0], kinds((1, m), seed=2)[:, 0]), (ones, ones)):
            plan, *found = gpu_permute.sinkhorn_forward(logits, rows, cols, 0.1, 3, tolerance, True)
            made = found[-1][:, 0]
            assert 1 <= made.min() <= made.max() <= 3
            gradient = gpu_permute.sinkhorn_backward(logits.flip(1), logits, rows, cols, *found, 0.1)
            assert gradient.shape == plan.shape
    x = kinds((1, m), seed=m)[:, 0]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(m))
    permuted = gpu_permute.permute_columns(x, order)
    assert torch.equal(permuted.view(torch.int32), x[:, order].view(torch.int32))
    assert gpu_permute.rms_norm_permute(x, x[0], order, 1e-6).shape == x.shape
