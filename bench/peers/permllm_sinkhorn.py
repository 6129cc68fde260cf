"""Sinkhorn plans as PermLLM computes them, left to autograd.

Zou et al.: PermLLM: Learnable Channel Permutation for N:M Sparse Large Language Models (arXiv 2510.10136),
section on soft permutations: ``S_0 = exp(logits / temperature)``, ``S_i = T_c(T_r(S_{i-1}))``, where T_r
divides every entry by the sum of its row and T_c by that of its column. One exponential in all, where the
textbook's log-domain loop takes two for every entry and iteration; in exchange ``exp`` overflows in float32
where a logit exceeds 88 temperatures, and a line whose entries have all underflowed divides 0 by 0.
"""

from __future__ import annotations

from torch import Tensor


def permllm_sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Plans of ``(B, M, M)`` logits after a number of iterations, rows first."""
    plan = (logits / temperature).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(2, keepdim=True)
        plan = plan / plan.sum(1, keepdim=True)
    return plan
