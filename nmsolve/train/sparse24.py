r"""Products of 2:4 operands on NVIDIA's sparse tensor cores, by torch's own semi-structured formats.

One transposable mask S makes both products of the operand A = W * S sparse, and the third is dense::

    Y = X A^T        A is 2:4 along the input: packed
    dX = dY A        A^T is 2:4 along the output: packed
    dA = dY^T X      dense

A is packed anew in every pass, since the weights change in every step. What is not 2:4 cannot be packed, and
torch does not look: only operands of exact masks come here.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import is_dtensor
from nmsolve.ops.masks import transposable_mask
from nmsolve.pattern import NMPattern

__all__ = ["HALVES", "TOKENS", "sparse24_linear", "times", "why_dense"]

HALVES = (torch.float16, torch.bfloat16)

TOKENS = 4096
"""Rows of X in what "auto" times."""


@torch.library.custom_op("nmsolve::sparse24_product", mutates_args=(), device_types="cuda")
def sparse24_product(dense: Tensor, operand: Tensor) -> Tensor:
    """``dense (R, K) @ operand (N, K)^T``, with an operand that is 2:4 along K."""
    if not dense.shape[0]:
        return dense.new_empty(0, operand.shape[0])
    packed = torch.sparse.to_sparse_semi_structured(operand.contiguous())
    return functional.linear(dense.contiguous(), packed)


@sparse24_product.register_fake
def _(dense: Tensor, operand: Tensor) -> Tensor:
    return dense.new_empty(dense.shape[0], operand.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    dense, operand = ctx.saved_tensors
    needs_dense, needs_operand = ctx.needs_input_grad
    return (
        sparse24_product(gradient, operand.T) if needs_dense else None,
        gradient.T @ dense if needs_operand else None,
    )


sparse24_product.register_autograd(_backward, setup_context=_setup_context)


def sparse24_linear(x: Tensor, operand: Tensor, bias: Tensor | None, required: bool) -> Tensor:
    """``X A^T + b`` for x ``(..., in)`` and a transposable 2:4 operand ``(out, in)``, with a dense dA.

    Dense where the product is neither in float16 nor in bfloat16 (the types of autocast count), unless
    sparse operands are ``required``.

    Raises
    ------
    NMSolveError
        If they are required there.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, operand = x.to(dtype), operand.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if operand.dtype not in HALVES:
        if required:
            raise NMSolveError(
                "operands: 'sparse24' multiplies in float16 or bfloat16, by autocast or the model's own "
                f"type, got a product in {operand.dtype}"
            )
        return functional.linear(x, operand, bias)
    y = sparse24_product(x.reshape(-1, x.shape[-1]), operand).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def why_dense(module: nn.Module, weight: Tensor, pattern: NMPattern, transposable: bool) -> str:
    """Why a layer cannot have sparse operands; empty if it can."""
    if not isinstance(module, nn.Linear):
        return f"a {type(module).__name__} has no sparse product"
    if is_dtensor(weight):
        return "its weight is sharded"
    if pattern.m != 4 or pattern.n > 2:
        return f"{pattern} is not 2:4"
    if not transposable:
        return "ordinary masks are 2:4 along the input alone"
    if not _has_sparse_cores(weight.device):
        return "no sparse tensor cores"
    if weight.dtype not in (*HALVES, torch.float32):
        return f"no sparse products in {weight.dtype}"
    found = times(weight)
    return found if isinstance(found, str) else ""


def _has_sparse_cores(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def times(weight: Tensor) -> tuple[float, float] | str:
    """Milliseconds of forward and backward with dense and with sparse operands, packing included, for TOKENS
    rows; or why torch has no sparse product for the weight's shape here. Measured once for a shape.
    """
    # float32 weights are multiplied in the type of autocast.
    dtype = weight.dtype if weight.dtype in HALVES else torch.get_autocast_dtype(weight.device.type)
    return _times(tuple(weight.shape), dtype, weight.device)


@functools.cache
def _times(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[float, float] | str:
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
    operand = (weight * transposable_mask(weight.abs(), 2, 4)).to(dtype).requires_grad_()
    x = torch.randn(TOKENS, shape[1], generator=generator, device=device).to(dtype).requires_grad_()
    gradient = torch.randn(TOKENS, shape[0], generator=generator, device=device).to(dtype)
    with torch.autocast(device.type, enabled=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its sparse tensors a prototype
        try:
            found = [
                torch.autograd.grad(product(x, operand), (x, operand), gradient)
                for product in (functional.linear, sparse24_product)
            ]
            torch.testing.assert_close(sparse24_product(x, operand), x @ operand.T, rtol=0.05, atol=0.5)
            torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.5)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            return f"torch has no sparse product for {shape[0]} x {shape[1]} here ({said})"

        def both(product: Any) -> Any:
            return torch.autograd.grad(product(x, operand), (x, operand), gradient)

        return _milliseconds(both, functional.linear, device), _milliseconds(both, sparse24_product, device)


def _milliseconds(step: Any, product: Any, device: torch.device, repeats: int = 10) -> float:
    """The median of ``repeats`` runs after a few that warm up."""
    stream = torch.cuda.current_stream(device)
    spans = []
    for turn in range(3 + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        step(product)
        end.record(stream)
        if turn >= 3:
            spans.append((start, end))
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in spans)
