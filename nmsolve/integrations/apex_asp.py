"""Masks for apex ASP: a ``mask_calculator``, and ``create_mask`` with apex's signature.

apex itself is not imported: ``ASP.init_model_for_pruning`` takes any function from a parameter to its mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.integrations.weights import weight_mask
from nmsolve.pattern import NMPattern
from nmsolve.prune.rule import MaskRule

__all__ = ["create_mask", "mask_calculator"]


def mask_calculator(pattern: str = "m4n2_2d", *, backend: str = "auto") -> Callable[[Tensor], Tensor]:
    """A function that ``ASP.init_model_for_pruning(model, mask_calculator=...)`` takes.

    Parameters
    ----------
    pattern : str
        In apex's notation, for any N and M: ``m32n16_2d`` keeps 16 of 32 along rows and columns
        (transposable), ``m4n2_1d`` 2 of 4 along the inputs. ``_2d`` and ``_2d_best`` are optimal,
        ``_2d_greedy`` is the greedy method.
    backend : str
        As in :func:`nmsolve.transposable_mask`.

    Returns
    -------
    callable
        From a parameter ``(out, in)`` or ``(out, in, *kernel)`` to its bool mask, True = keep. With ``_1d`` a
        parameter ``(in,)`` is one row.

    Raises
    ------
    NMSolveError
        If the pattern is not one.

    Examples
    --------
    >>> weight = torch.nn.Linear(64, 32).weight
    >>> nmsolve.check_mask(mask_calculator("m32n16_2d")(weight), 16, 32)
    """
    rule = _rule(pattern, backend)

    def calculate(parameter: Tensor) -> Tensor:
        return _mask(parameter, rule)

    return calculate


def create_mask(tensor: Tensor, pattern: str = "m4n2_1d", density: float | None = None) -> Tensor:
    """The mask of a tensor in its dtype, 1 = keep, as ``apex.contrib.sparsity.create_mask`` returns it.

    Parameters
    ----------
    tensor : Tensor
        ``(in,)``, ``(out, in)`` or ``(out, in, *kernel)``.
    pattern : str
        As in :func:`mask_calculator`.
    density : float, optional
        Kept share; the pattern has it already, so it is only compared.

    Raises
    ------
    NMSolveError
        If the pattern is not one, or its density is another.

    Examples
    --------
    >>> create_mask(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    tensor([[0., 1., 1., 0.]])
    """
    rule = _rule(pattern, "auto")
    if density is not None and density != rule.pattern.density:
        raise NMSolveError(f"density: expected {rule.pattern.density} for {pattern}, got {density!r}")
    return _mask(tensor, rule).to(tensor.dtype)


def _rule(pattern: str, backend: str) -> MaskRule:
    found = re.fullmatch(r"m(\d+)n(\d+)_(1d|2d|2d_best|2d_greedy)", str(pattern))
    if found is None:
        raise NMSolveError(
            f"pattern: expected 'm4n2_' or the like and 1d, 2d, 2d_best or 2d_greedy, got {pattern!r}"
        )
    method = "greedy" if found[3] == "2d_greedy" else "exact"
    return MaskRule(NMPattern(int(found[2]), int(found[1])), found[3] != "1d", method, backend)


def _mask(tensor: Tensor, rule: MaskRule) -> Tensor:
    scores = tensor.detach().abs()
    if scores.ndim == 1 and not rule.transposable:
        return weight_mask(scores.unsqueeze(0), rule).squeeze(0)
    return weight_mask(scores, rule)
