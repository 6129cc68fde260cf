"""One layer's problem: new weights for N of every M inputs that change ``X W^T`` the least.

What the layer has seen is all in ``X.T @ X``, its *Hessian*.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.validation import describe

__all__ = ["DAMPING", "Pruned", "check_hessian", "check_problem"]

DAMPING = 0.01


class Pruned(NamedTuple):
    """``weight`` ``(out, in)`` with zeros where ``mask`` (bool, True = keep) is False."""

    weight: Tensor
    mask: Tensor


def check_hessian(hessian: Tensor) -> None:
    """Raises NMSolveError unless it is a finite square matrix in a precision that can be worked in."""
    if not isinstance(hessian, Tensor) or hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise NMSolveError(f"hessian: expected a tensor (in, in), got {describe(hessian)}")
    if hessian.dtype not in (torch.float32, torch.float64):
        raise NMSolveError(f"hessian: expected float32 or float64, got {describe(hessian)}")
    if not bool(torch.isfinite(hessian).all()):
        raise NMSolveError("hessian: expected finite values, got NaN or infinite ones")


def check_problem(weight: Tensor, size: int, positions: int, allowed: Tensor | None) -> None:
    """Raises NMSolveError unless the arguments of a pruner fit a Hessian of ``size`` inputs."""
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise NMSolveError(f"weight: expected a floating-point tensor (out, in), got {describe(weight)}")
    if weight.shape[1] != size:
        raise NMSolveError(f"hessian: expected (in, in) with in={weight.shape[1]}, got {(size, size)}")
    if positions < 1 or size % positions:
        raise NMSolveError(f"positions: expected a divisor of in={size}, got {positions!r}")
    if allowed is not None and (allowed.dtype != torch.bool or allowed.shape != weight.shape):
        raise NMSolveError(
            f"allowed: expected a bool tensor of shape {tuple(weight.shape)}, got {describe(allowed)}"
        )
