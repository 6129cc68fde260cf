r"""SparseGPT (arXiv 2301.00774): columns are pruned from left to right, later ones make up for the error.

With :math:`H = X^\top X + \lambda I` over the calibration inputs X (tokens, in), :math:`\lambda` = damping
times the mean diagonal, and the upper Cholesky factor :math:`U^\top U = H^{-1}`, every M columns the mask of
a slab is chosen by the scores

.. math:: W_{ij}^2 \,/\, U_{jj}^2

(U_jj² is the j-th diagonal entry of the inverse of H restricted to the columns not yet done), and then for
each column j of the slab

.. math:: e = (W_{:j} - \mathrm{mask}_{:j} W_{:j}) / U_{jj}, \qquad W_{:k} \leftarrow W_{:k} - e\,U_{jk}
          \quad (k > j).

A slab of all rows and M columns is one column of M x M blocks, so transposable masks fit as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.prune.layerwise.problem import DAMPING, Pruned, check_hessian, check_problem
from nmsolve.prune.rule import MaskRule

__all__ = ["SparseGPTFactor", "sparsegpt", "sparsegpt_factor"]

# Columns whose updates of the columns to their right are gathered into one matrix product.
_LAZY = 128


class SparseGPTFactor(NamedTuple):
    """Upper Cholesky factor of the inverse Hessian ``(in, in)``, and which inputs are all zero ``(in,)``."""

    upper: Tensor
    dead: Tensor


def sparsegpt_factor(hessian: Tensor, damping: float = DAMPING) -> SparseGPTFactor:
    """What SparseGPT needs of ``hessian``; layers that see the same inputs share it.

    Raises
    ------
    NMSolveError
        If it is no finite square matrix in float32 or float64, or the damped Hessian is not positive definite
        in its precision.
    """
    check_hessian(hessian)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    damped = hessian + torch.diag(damping * diagonal.mean() + dead)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise NMSolveError(
            f"damping: the Hessian is not positive definite in {hessian.dtype} with damping={damping}; "
            "raise it, or calibrate on more tokens"
        )
    return SparseGPTFactor(upper, dead)


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor | SparseGPTFactor,
    rule: MaskRule,
    *,
    damping: float = DAMPING,
    positions: int = 1,
    allowed: Tensor | None = None,
) -> Pruned:
    """Prunes one layer by SparseGPT.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``.
    hessian : Tensor or SparseGPTFactor
        ``(in, in)``: ``X.T @ X`` over the inputs, undamped, in float32 or float64, which the work is done in.
    rule : MaskRule
        Pattern and mask solver; its tally counts the slabs.
    damping : float
        Share of the mean diagonal that is added to the diagonal.
    positions : int
        The columns are this many runs of equal length (kernel positions of a convolution, each with all its
        input channels); groups of M do not reach from one run into the next.
    allowed : Tensor, optional
        bool ``(out, in)``: an earlier mask; what is False there is pruned as well.

    Returns
    -------
    Pruned
        Weight in the Hessian's dtype, and mask.

    Raises
    ------
    NMSolveError
        If an argument is not as described, or the damped Hessian is not positive definite.

    Examples
    --------
    >>> inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> weight = torch.ones(8, 8)
    >>> pruned = sparsegpt(weight, inputs.T @ inputs, MaskRule("2:4"))
    >>> nmsolve.check_mask(pruned.mask, 2, 4)
    >>> bool((pruned.weight[~pruned.mask] == 0).all())
    True
    """
    upper, dead = hessian if isinstance(hessian, SparseGPTFactor) else sparsegpt_factor(hessian, damping)
    size = len(upper)
    check_problem(weight, size, positions, allowed)
    columns = weight.to(upper.dtype).T.clone(memory_format=torch.contiguous_format)  # row j is column j of W
    columns[dead] = 0
    keep = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    errors = torch.empty_like(columns[:_LAZY])
    scale = upper.diagonal().square().unsqueeze(1)
    for start, stop, slabs in _blocks(size, rule.pattern.m, size // positions):
        if len(errors) < stop - start:
            errors = torch.empty_like(columns[start:stop])
        for a, b in slabs:
            scores = columns[a:b].square() / scale[a:b]
            keep[a:b] = rule.choose(scores.T, None if allowed is None else allowed[:, a:b]).T
            for j in range(a, b):
                error = torch.where(keep[j], 0, columns[j]).div_(upper[j, j])
                columns[j].mul_(keep[j])
                columns[j + 1 : b].addr_(upper[j, j + 1 : b], error, alpha=-1)
                errors[j - start] = error
            columns[b:stop].addmm_(upper[a:b, b:stop].T, errors[a - start : b - start], alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors[: stop - start], alpha=-1)
    return Pruned(columns.T, keep.T)


def _blocks(size: int, m: int, run: int) -> list[tuple[int, int, list[tuple[int, int]]]]:
    """``(start, stop, slabs)``: slabs of up to ``m`` columns within each run, gathered into blocks."""
    slabs = [(base + a, base + min(a + m, run)) for base in range(0, size, run) for a in range(0, run, m)]
    blocks: list[tuple[int, int, list[tuple[int, int]]]] = []
    for a, b in slabs:
        if blocks and b - blocks[-1][0] <= _LAZY:
            blocks[-1] = (blocks[-1][0], b, [*blocks[-1][2], (a, b)])
        else:
            blocks.append((a, b, [(a, b)]))
    return blocks
