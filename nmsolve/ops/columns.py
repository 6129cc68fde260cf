"""Reordering of columns at run time, for permutations that cannot be folded into a model's weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nmsolve.backends.dispatch import check_backend, select
from nmsolve.errors import NMSolveError
from nmsolve.ops.registration import register, tangents_of_tangents
from nmsolve.ops.validation import describe

__all__ = ["permute_columns", "rms_norm_permute"]

# Permutations that have been checked -> (version of the tensor, inverse). A model uses the same few for long.
_CHECKED: Any = WeakIdKeyDictionary()


def permute_columns(x: Tensor, permutation: Tensor, *, backend: str = "auto") -> Tensor:
    """``x[..., permutation]``: column ``permutation[j]`` becomes column j.

    Parameters
    ----------
    x : Tensor
        ``(..., C)``, any dtype and strides.
    permutation : Tensor
        int64 ``(C,)``, each of 0 .. C - 1 once. Its values are checked once for each version of the tensor.
    backend : {"auto", "triton", "cpu", "torch"}
        "triton" is the gather kernel of a GPU; "cpu" and "torch" are PyTorch's own gather.

    Returns
    -------
    Tensor
        Contiguous, of the shape and dtype of x; differentiable (by the inverse permutation) as often as one
        likes, in reverse and in forward mode.

    Raises
    ------
    NMSolveError
        If the permutation is none, or does not fit x.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> permute_columns(torch.tensor([[10, 20, 30]]), torch.tensor([2, 0, 1]))
    tensor([[30, 10, 20]])
    """
    _check(x, permutation, backend)
    return _permuted(x, permutation, False, backend)


def rms_norm_permute(
    x: Tensor, weight: Tensor, permutation: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """RMS normalisation of the last dimension, with its columns in a new order, in one pass.

    ``y[..., j] = x[..., p_j] * weight[p_j] / sqrt(mean(x^2) + eps)`` with p the permutation: the same as
    ``permute_columns(rms_norm(x, (C,), weight, eps), permutation)``. Computed in float32 (float64 for
    float64) and rounded once.

    Parameters
    ----------
    x : Tensor
        ``(..., C)``, floating point, any strides.
    weight : Tensor
        ``(C,)``, floating point, in the order of x.
    permutation, backend
        As in :func:`permute_columns`.
    eps : float
        At least 0.

    Returns
    -------
    Tensor
        Contiguous, of the shape and dtype of x; differentiable with respect to x and weight as often as one
        likes, in reverse and in forward mode.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    BackendError
        If the backend asked for cannot run here.

    Examples
    --------
    >>> rms_norm_permute(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), torch.tensor([1, 0]), 0.0)
    tensor([[11.3137,  0.8485]])
    """
    _check(x, permutation, backend)
    if not x.is_floating_point():
        raise NMSolveError(f"x: expected a floating-point tensor, got {describe(x)}")
    if (
        not isinstance(weight, Tensor)
        or not weight.is_floating_point()
        or weight.shape != x.shape[-1:]
        or weight.device != x.device
    ):
        raise NMSolveError(
            f"weight: expected ({x.shape[-1]},) floating point on {x.device}, got {describe(weight)}"
        )
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise NMSolveError(f"eps: expected a number of at least 0, got {eps!r}")
    function = _NormPermute if torch.compiler.is_compiling() else _NormPermuteForwardMode
    result: Tensor = function.apply(x, weight, permutation, float(eps), backend)
    return result


def _check(x: object, permutation: object, backend: str) -> None:
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise NMSolveError(f"x: expected a tensor (..., C), got {describe(x)}")
    if (
        not isinstance(permutation, Tensor)
        or permutation.dtype != torch.int64
        or permutation.shape != x.shape[-1:]
        or permutation.device != x.device
    ):
        raise NMSolveError(
            f"permutation: expected ({x.shape[-1]},) int64 on {x.device}, got {describe(permutation)}"
        )
    check_backend(backend)


def _inverse(permutation: Tensor) -> Tensor:
    """The inverse; raises if the tensor is no permutation. Remembered while the tensor is unchanged."""
    version = None if permutation.is_inference() else permutation._version
    known = _CHECKED.get(permutation)
    if known is not None and version is not None and known[0] == version:
        inverse: Tensor = known[1]
        return inverse
    ordered, inverse = permutation.sort()
    wrong = ordered != torch.arange(len(permutation), device=permutation.device)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise NMSolveError(
            f"permutation: expected each of 0 .. {len(permutation) - 1} once; sorted, entry {first} is "
            f"{int(ordered[first])}"
        )
    if version is not None:
        _CHECKED[permutation] = (version, inverse)
    return inverse


def _permuted(x: Tensor, permutation: Tensor, inverse: bool, backend: str) -> Tensor:
    function = _Permute if torch.compiler.is_compiling() else _PermuteForwardMode
    result: Tensor = function.apply(x, permutation, inverse, backend)
    return result


def _one_by_one(
    function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]
) -> tuple[Tensor, int]:
    """The vmap rule where more than x has a batch dimension: a call for each index."""
    results = [
        function.apply(
            *(arg if dim is None else arg.select(dim, k) for arg, dim in zip(args, in_dims, strict=True))
        )
        for k in range(info.batch_size)
    ]
    return torch.stack(results), 0


class _Permute(torch.autograd.Function):
    """``x[..., p]``, or ``x[..., p^-1]``: linear in x."""

    @staticmethod
    def forward(x: Tensor, permutation: Tensor, inverse: bool, backend: str) -> Tensor:
        return _permute_op(x, permutation, inverse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, permutation, *ctx.settings = inputs
        ctx.save_for_backward(permutation)
        ctx.save_for_forward(permutation)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (permutation,) = ctx.saved_tensors
        inverse, backend = ctx.settings
        return _permuted(gradients[0], permutation, not inverse, backend), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if in_dims[1] is not None:
            return _one_by_one(_PermuteForwardMode, info, in_dims, args)
        return _PermuteForwardMode.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0


class _PermuteForwardMode(_Permute):
    """The same with a tangent, which the compiler does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        with tangents_of_tangents(*ctx.saved_tensors) as (permutation,):
            return _permuted(tangents[0], permutation, *ctx.settings)


class _NormPermute(torch.autograd.Function):
    """The fused forward pass; derivatives are in PyTorch, so that they have derivatives themselves."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, permutation: Tensor, eps: float, backend: str) -> Tensor:
        return _norm_op(x, weight, permutation, eps, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, permutation = ctx.saved_tensors
        eps, backend = ctx.settings
        work = torch.promote_types(x.dtype, torch.float32)
        gradient = _permuted(gradients[0], permutation, True, backend).to(work)
        wide = x.to(work)
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        normed = wide * scale
        dx = dw = None
        if ctx.needs_input_grad[0]:
            inner = gradient * weight.to(work)
            dx = (scale * (inner - normed * (inner * normed).mean(-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = (gradient * normed).sum(tuple(range(x.ndim - 1))) if x.ndim > 1 else gradient * normed
            dw = dw.to(weight.dtype)
        return dx, dw, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None or in_dims[2] is not None:
            return _one_by_one(_NormPermuteForwardMode, info, in_dims, args)
        return _NormPermuteForwardMode.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0


class _NormPermuteForwardMode(_NormPermute):
    """The same with a tangent, which the compiler does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        with tangents_of_tangents(*ctx.saved_tensors) as (x, weight, permutation):
            eps, backend = ctx.settings
            work = torch.promote_types(x.dtype, torch.float32)
            wide, dx = x.to(work), tangents[0].to(work)
            scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
            normed = wide * scale
            moved = scale * (dx - normed * (normed * dx).mean(-1, keepdim=True))
            result = moved * weight.to(work) + normed * tangents[1].to(work)
            return _permuted(result.to(x.dtype), permutation, False, backend)


def _rows(x: Tensor) -> Tensor:
    """``(rows, cols)``, without a copy where the strides allow it."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


def _permute(x: Tensor, permutation: Tensor, inverse: bool, backend: str) -> Tensor:
    """``x[..., p]``, or ``x[..., p^-1]``."""
    order = _inverse(permutation)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    solver = select(backend, x.device).permutations
    return solver.permute_columns(_rows(x), order if inverse else permutation).view(x.shape)


def _norm(x: Tensor, weight: Tensor, permutation: Tensor, eps: float, backend: str) -> Tensor:
    _inverse(permutation)
    if x.numel() == 0:
        return x.new_empty(x.shape)
    solver = select(backend, x.device).permutations
    return solver.rms_norm_permute(_rows(x), weight, permutation, eps).view(x.shape)


def _blank(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


_permute_op = register(
    "permute_columns",
    "(Tensor x, Tensor permutation, bool inverse, str backend) -> Tensor",
    _permute,
    _blank,
    in_function=True,
)
_norm_op = register(
    "rms_norm_permute",
    "(Tensor x, Tensor weight, Tensor permutation, float eps, str backend) -> Tensor",
    _norm,
    _blank,
    in_function=True,
)
