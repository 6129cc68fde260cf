"""A normalisation that hands its channels on in another order: the run-time gather at no extra pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError
from nmsolve.ops.columns import rms_norm_permute
from nmsolve.permute.orders import check_permutation

__all__ = ["PermutedRMSNorm"]


class PermutedRMSNorm(nn.Module):
    """RMS normalisation whose output column k is channel ``permutation[k]``.

    One :func:`nmsolve.rms_norm_permute` does both, for all layers behind it, whose weights then have their
    columns in that order. ``permutation`` is a buffer: it is saved and loaded with the weight.

    Parameters
    ----------
    weight : Tensor
        ``(C,)``, in the order of the input.
    permutation : Tensor
        int64 ``(C,)``.
    eps : float
        Added to the mean square.

    Examples
    --------
    >>> norm = torch.nn.RMSNorm(3, eps=1e-6)
    >>> x = torch.randn(5, 3)
    >>> permuted = PermutedRMSNorm.from_norm(norm, torch.tensor([2, 0, 1]))
    >>> torch.allclose(permuted(x), norm(x)[:, [2, 0, 1]], atol=1e-6)
    True
    """

    permutation: Tensor

    def __init__(self, weight: Tensor, permutation: Tensor, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.eps = eps
        self.register_buffer("permutation", check_permutation(permutation, len(weight)))

    @classmethod
    def from_norm(cls, norm: nn.Module, permutation: Tensor) -> PermutedRMSNorm:
        """The RMS normalisation ``norm``, of PyTorch or of a transformers model, with its output reordered.

        Raises
        ------
        NMSolveError
            If the module computes something else, which is tried, or the permutation does not fit it.
        """
        weight = getattr(norm, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 1:
            raise NMSolveError(f"norm: expected an RMS normalisation, got {type(norm).__name__}")
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        eps = torch.finfo(weight.dtype).eps if eps is None else float(eps)
        found = cls(weight.detach().clone(), permutation.to(weight.device), eps).train(norm.training)
        found.weight.requires_grad_(weight.requires_grad)
        probe = torch.linspace(-2, 3, 2 * len(weight), device=weight.device, dtype=weight.dtype).view(2, -1)
        with torch.no_grad():
            expected, got = norm(probe)[:, found.permutation].double(), found(probe).double()
        # transformers' norms work in float32 whatever the model's dtype.
        close = 8 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)
        if not torch.allclose(got, expected, rtol=close, atol=close):
            raise NMSolveError(f"norm: {type(norm).__name__} is no plain RMS normalisation")
        return found

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` to ``(..., C)``, the latter in the order of ``permutation``."""
        return rms_norm_permute(x, self.weight, self.permutation, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
