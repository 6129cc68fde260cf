r"""ALPS (arXiv 2406.07831): ADMM on the layer's reconstruction error, then least squares on the support.

The inputs are scaled to unit energy: with :math:`H = X^\top X + \lambda I` and
:math:`E = \mathrm{diag}(H)^{1/2}` the work is done on :math:`\hat W = W E` and
:math:`\hat H = E^{-1} H E^{-1}`. Then with :math:`G = \hat W \hat H`

.. math::
    B &= (G - V + \rho D)\,(\hat H + \rho I)^{-1} \\
    D &= \text{the mask that keeps the most of } (B + V/\rho)^2, \text{ applied to } B + V/\rho \\
    V &\leftarrow V + \rho\,(B - D)

Every third iteration rho grows by 1.3, 1.2 or 1.1 as more than 10 %, more than 0.5 % or any of the kept
entries have changed; before the support has moved for the first time rho is too large and is divided by 5.
The iteration ends when the support is at rest (from the 31st iteration on: changes below 0.03 %), and at 300.
:math:`\hat H = Q \Lambda Q^\top` is decomposed once, so that each new rho costs one matrix product. Conjugate
gradients (at most 10 steps) then solve :math:`B \hat H = G` on the support that was found.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.prune.layerwise.problem import DAMPING, Pruned, check_hessian, check_problem
from nmsolve.prune.rule import MaskRule

__all__ = ["AlpsSystem", "alps", "alps_system"]

RHO = 0.1
ITERATIONS = 300

_UPDATE_EVERY = 3
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
_SHRINK = 5.0
_RHO_MAX = 1e6
_REST_FROM, _REST = 30, 0.0003
_CG_STEPS, _CG_TOLERANCE = 10, 1e-4


class AlpsSystem(NamedTuple):
    """Scale ``(in,)`` of the inputs, scaled Hessian ``(in, in)`` and its eigenvalues and eigenvectors."""

    scale: Tensor
    hessian: Tensor
    values: Tensor
    vectors: Tensor


def alps_system(hessian: Tensor, damping: float = DAMPING) -> AlpsSystem:
    """What ALPS needs of ``hessian``; layers that see the same inputs share it.

    Raises
    ------
    NMSolveError
        If it is no finite square matrix in float32 or float64.
    """
    check_hessian(hessian)
    diagonal = hessian.diagonal()
    # Without any input all weights count alike.
    damp = damping * diagonal.mean() if bool(diagonal.any()) else torch.ones_like(diagonal[0])
    scale = (diagonal + damp).sqrt()
    scaled = hessian / scale / scale.unsqueeze(1)
    scaled.diagonal().fill_(1)
    values, vectors = torch.linalg.eigh(scaled)
    return AlpsSystem(scale, scaled, values.clamp_min_(0), vectors)


@torch.no_grad()
def alps(
    weight: Tensor,
    hessian: Tensor | AlpsSystem,
    rule: MaskRule,
    *,
    damping: float = DAMPING,
    iterations: int = ITERATIONS,
    positions: int = 1,
    allowed: Tensor | None = None,
) -> Pruned:
    """Prunes one layer by ALPS.

    Parameters
    ----------
    weight : Tensor
        ``(out, in)``.
    hessian : Tensor or AlpsSystem
        ``(in, in)``: ``X.T @ X`` over the inputs, undamped, in float32 or float64, which the work is done in.
    rule : MaskRule
        Pattern and mask solver; its tally has the certificate of the final mask.
    damping : float
        Share of the mean diagonal that is added to the diagonal.
    iterations : int
        At most this many ADMM iterations.
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
        If an argument is not as described.

    Examples
    --------
    >>> inputs = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> weight = torch.ones(8, 8)
    >>> pruned = alps(weight, inputs.T @ inputs, MaskRule("2:4"))
    >>> nmsolve.check_mask(pruned.mask, 2, 4)
    >>> bool((pruned.weight[~pruned.mask] == 0).all())
    True
    """
    system = hessian if isinstance(hessian, AlpsSystem) else alps_system(hessian, damping)
    check_problem(weight, len(system.scale), positions, allowed)
    if iterations < 1:
        raise NMSolveError(f"iterations: expected at least 1, got {iterations!r}")
    with torch.autocast(weight.device.type, enabled=False):
        dense = weight.to(system.hessian.dtype) * system.scale
        target = dense @ system.hessian
        b, mask = _admm(dense, target, system, rule, iterations, positions, allowed)
        b = _least_squares(b.mul_(mask), target, system.hessian, mask)
    return Pruned(b.div_(system.scale), mask)


def _admm(
    dense: Tensor,
    target: Tensor,
    system: AlpsSystem,
    rule: MaskRule,
    iterations: int,
    positions: int,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The last B, and the support of the last D."""

    def split(entries: Tensor) -> Tensor:
        return entries if positions == 1 else entries.unflatten(1, (positions, -1)).movedim(1, 0)

    def support(choose: Callable[[Tensor, Tensor | None], Tensor], z: Tensor) -> Tensor:
        chosen = choose(split(z.square()), None if allowed is None else split(allowed))
        return chosen if positions == 1 else chosen.movedim(0, 1).flatten(1)

    rho, moved = RHO, False
    inverse = _inverse(system, rho)
    z = dense
    mask = start = last = support(rule.step, z)
    kept = max(1, int(mask.sum()))
    d, v = dense * mask, torch.zeros_like(dense)
    for k in range(1, iterations + 1):
        b = (target - v).add_(d, alpha=rho) @ inverse
        z = torch.add(b, v, alpha=1 / rho)
        mask = support(rule.step, z)
        d = z * mask
        v = (z - d).mul_(rho)
        if k % _UPDATE_EVERY:
            continue
        changed = int((mask != last).sum())
        last = mask
        growth = next((factor for share, factor in _GROWTH if changed > share * kept), None)
        if growth is None:
            if moved:
                break
            rho /= _SHRINK
        elif growth > _GROWTH[-1][1] or moved:
            moved = True
            rho = min(rho * growth, _RHO_MAX)
        else:
            rho /= _SHRINK
            d, v = dense * start, torch.zeros_like(dense)
        if k > _REST_FROM and changed < _REST * kept:
            break
        inverse = _inverse(system, rho)
    return b, support(rule.choose, z)


def _inverse(system: AlpsSystem, rho: float) -> Tensor:
    """``(H + rho I)^-1`` from the eigendecomposition."""
    return (system.vectors / (system.values + rho)) @ system.vectors.T


def _least_squares(b: Tensor, target: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """Conjugate gradients for ``b @ hessian = target`` in the entries of ``mask``, each row by itself."""
    residual = (target - b @ hessian).mul_(mask)
    direction = residual.clone()
    energy = residual.square().sum(1, keepdim=True)
    enough = (_CG_TOLERANCE * target.norm(dim=1, keepdim=True)).square()
    tiny = torch.finfo(b.dtype).tiny
    for _ in range(_CG_STEPS):
        if bool((energy <= enough).all()):
            break
        image = direction @ hessian
        step = energy / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        b.addcmul_(step, direction)
        residual.sub_(image.mul_(step).mul_(mask))
        old, energy = energy, residual.square().sum(1, keepdim=True)
        direction.mul_(energy / old.clamp_min(tiny)).add_(residual)
    return b
