"""Sinkhorn's iteration as textbooks have it, in the log domain, left to autograd."""

from __future__ import annotations

from torch import Tensor


def sinkhorn_loop(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Plans of ``(B, M, M)`` logits after a number of iterations, rows first."""
    z = logits / temperature
    for _ in range(iterations):
        z = z - z.logsumexp(2, keepdim=True)
        z = z - z.logsumexp(1, keepdim=True)
    return z.exp()
