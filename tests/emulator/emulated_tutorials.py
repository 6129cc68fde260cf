"""Kernels that are not ours, after Triton's tutorials, executed from their PTX.

Run with NMSOLVE_PTX_SM, as emulated_variants.py is.
"""

from __future__ import annotations

import emulator
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + offsets, mask=mask)
    y = tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + y, mask=mask)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, stride, rows, cols, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=STAGES):
        offsets = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + offsets, mask=offsets < cols, other=-float("inf"))
        numerator = tl.exp(x - tl.max(x, axis=0))
        softmax = numerator / tl.sum(numerator, axis=0)
        tl.store(out_ptr + row * stride + offsets, softmax, mask=offsets < cols)


@triton.jit
def layer_norm_kernel(x_ptr, out_ptr, weight_ptr, bias_ptr, stride, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    mean = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mean += tl.load(x_ptr + row * stride + offsets, mask=offsets < cols, other=0.0).to(tl.float32)
    mean = tl.sum(mean, axis=0) / cols
    var = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + offsets, mask=offsets < cols, other=0.0).to(tl.float32)
        x = tl.where(offsets < cols, x - mean, 0.0)
        var += x * x
    rstd = 1 / tl.sqrt(tl.sum(var, axis=0) / cols + eps)
    for start in range(0, cols, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < cols
        weight = tl.load(weight_ptr + offsets, mask=mask)
        bias = tl.load(bias_ptr + offsets, mask=mask)
        x = tl.load(x_ptr + row * stride + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * stride + offsets, (x - mean) * rstd * weight + bias, mask=mask)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, INNER: tl.constexpr):
    i, j, k = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, INNER)
    a = tl.load(a_ptr + i * INNER + k[None, :])
    b = tl.load(b_ptr + k[:, None] * SIZE + j)
    tl.store(out_ptr + i * SIZE + j, tl.dot(a, b))


@triton.jit
def locked_sum_kernel(x_ptr, lock_ptr, out_ptr, BLOCK: tl.constexpr):
    """As the tutorial's backward pass of layer norm adds up: one program after the other."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.sum(tl.load(x_ptr + offsets), axis=0)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(out_ptr, tl.load(out_ptr) + x)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_vector_addition(dtype: torch.dtype) -> None:
    size = 98_432 // 16 + 5
    x, y = ((100 * random(size, seed=seed)).to(dtype) for seed in (1, 2))
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(size, 1024),)](x, y, out, size, BLOCK=1024)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize(("stages", "warps"), [(1, 4), (2, 8), (4, 8)])
def test_softmax(stages: int, warps: int) -> None:
    x = random(37, 781)
    out = torch.empty_like(x)
    softmax_kernel[(8,)](x, out, x.stride(0), *x.shape, BLOCK=1024, STAGES=stages, num_warps=warps)
    assert torch.allclose(out, x.softmax(1), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layer_norm(dtype: torch.dtype) -> None:
    x = (random(6, 1151) * 0.5 - 2.3).to(dtype)
    weight, bias = random(1151, seed=2).to(dtype), random(1151, seed=3).to(dtype)
    out = torch.empty_like(x)
    layer_norm_kernel[(6,)](x, out, weight, bias, x.stride(0), 1151, 1e-5, BLOCK=256, num_warps=8)
    wide = torch.nn.functional.layer_norm(x.double(), (1151,), weight.double(), bias.double())
    assert torch.allclose(out.double(), wide, atol=1e-5 if dtype == torch.float32 else 4e-3)


def test_what_it_does_not_know_is_named() -> None:
    """Tensor cores and atomics, in one line."""
    a, b = random(32, 32).half(), random(32, 32, seed=2).half()
    with pytest.raises(emulator.PtxError, match=r"^matmul_kernel: unknown instruction mma\.sync\S+$"):
        matmul_kernel[(1,)](a, b, torch.empty(32, 32), SIZE=32, INNER=32)
    with pytest.raises(emulator.PtxError, match=r"^locked_sum_kernel: unknown instruction atom\.\S+cas.b32$"):
        locked_sum_kernel[(4,)](random(512), torch.zeros(1, dtype=torch.int32), torch.zeros(1), BLOCK=128)
