"""Which module runs soft and hard permutations: the companion of the backend that :mod:`dispatch` selects.

A companion of ``nmsolve.gpu``, ``nmsolve.cpu`` or ``nmsolve.reference`` is named after it
(``nmsolve.gpu_permute``) and has the functions of :class:`PermuteBackend`.
"""

from __future__ import annotations

import importlib
from typing import Protocol, cast

import torch
from torch import Tensor

from nmsolve.dispatch import select

__all__ = ["PermuteBackend", "companion", "finds_infinite", "load", "runs_triton"]


class PermuteBackend(Protocol):
    """What a companion module offers; its functions trust their callers."""

    def assignment(self, scores: Tensor, want_solution: bool) -> tuple[Tensor, ...]:
        """Columns ``(B, M)`` of the rows; if wanted also duals of both sides, objective, bound and scale."""

    def sinkhorn_forward(
        self,
        logits: Tensor,
        row_marginals: Tensor,
        col_marginals: Tensor,
        temperature: float,
        iterations: int,
        tolerance: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Plan, row and column log-scalings of every iteration (empty unless ``keep``), iterations made."""

    def sinkhorn_backward(
        self,
        gradient: Tensor,
        logits: Tensor,
        col_marginals: Tensor,
        row_scalings: Tensor,
        col_scalings: Tensor,
        made: Tensor,
        temperature: float,
    ) -> Tensor:
        """Gradient with respect to the logits, in their dtype."""

    def permute_columns(self, x: Tensor, permutation: Tensor) -> Tensor:
        """``x[:, permutation]`` of ``(rows, cols)``, contiguous."""

    def rms_norm_permute(self, x: Tensor, weight: Tensor, permutation: Tensor, eps: float) -> Tensor:
        """``(x / rms(x) * weight)[:, permutation]`` of ``(rows, cols)``, contiguous."""


def companion(backend: str, device: torch.device) -> PermuteBackend:
    """The module that runs ``backend`` on ``device``; raises as :func:`nmsolve.dispatch.select` does."""
    return load(getattr(select(backend, device, 1), "__name__"))  # noqa: B009


def load(module: str) -> PermuteBackend:
    """The companion of the backend module of that name."""
    return cast(PermuteBackend, importlib.import_module(f"{module}_permute"))


def finds_infinite(runner: PermuteBackend) -> bool:
    """Whether the assignment of ``runner`` marks matrices that are not finite by -1 in front."""
    return getattr(runner, "__name__") == "nmsolve.cpu_permute"  # noqa: B009


def runs_triton(runner: PermuteBackend) -> bool:
    """Whether ``runner`` is the Triton backend's."""
    return getattr(runner, "__name__") == "nmsolve.gpu_permute"  # noqa: B009
