"""Soft permutations: doubly stochastic plans by Sinkhorn's iteration, with a hand-written gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nmsolve.backends.dispatch import check_backend
from nmsolve.errors import NMSolveError
from nmsolve.ops.plan_operators import plans
from nmsolve.ops.validation import check_scores, describe

__all__ = ["sinkhorn"]


def sinkhorn(
    logits: Tensor,
    temperature: float | Tensor = 0.1,
    iterations: int = 20,
    *,
    tolerance: float | None = None,
    row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Plans with given row and column sums, nearest to ``exp(logits / temperature)``.

    Each iteration scales the rows and then the columns of ``exp(logits / temperature)``, in the log domain.
    It ends on the columns: **column sums are exact**, up to rounding, after any number of iterations, and row
    sums converge. As the temperature falls, a square plan sharpens to the permutation that
    :func:`~nmsolve.assignment` finds.

    Parameters
    ----------
    logits : Tensor
        ``(..., R, C)``, float64, float32, float16 or bfloat16, any strides. A logit of -inf says never: its
        entry of the plan and its gradient are 0, and so is all of a line that has no other logits (then the
        marginals cannot be met: what they ask of that line is missing from the lines across). A block with
        a NaN or +inf gives a plan of NaN; others are not affected.
    temperature : float or Tensor
        Positive; a tensor of one element is differentiated with respect to.
    iterations : int
        At least 1.
    tolerance : float, optional
        A block stops early, between two iterations, once no row sum is further than this from its marginal.
        What a block does depends on nothing else in the batch.
    row_marginals, col_marginals : Tensor, optional
        Positive, ``(..., R)`` and ``(..., C)``, broadcast to the logits' leading dimensions, of equal totals
        in each block; constants for the gradient. Without either, rows sum to 1 and columns to ``R / C`` (1
        if square); without one of them, its lines share the other's total equally.
    backend : {"auto", "triton", "cpu", "torch"}
        "triton" makes all iterations in one launch, in float32, for up to 128 rows and columns; "auto" takes
        it on a GPU, except for larger blocks and float64 (then "torch"). On a CPU "auto" takes "cpu" where
        numba works, else "torch".

    Returns
    -------
    Tensor
        ``(..., R, C)``; float64 for float64 logits, else float32, whose marginals a half type would not hold.
        Differentiable with respect to the logits as often as one likes, in reverse and in forward mode. The
        backward pass sweeps through the stored scalings, ``iterations * (R + C + 1)`` numbers a block;
        tangents and second derivatives make every iteration again in PyTorch, of ``R * C`` numbers each.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    BackendError
        If the backend asked for cannot run here.

    Notes
    -----
    Sinkhorn and Knopp, Pacific J. Math. 21 (1967); stabilised scaling: Schmitzer, SIAM J. Sci. Comput. 41
    (2019). Few iterations at a low temperature leave row sums far off; that is the iteration, not rounding.

    Examples
    --------
    >>> plan = sinkhorn(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), temperature=1.0)
    >>> plan
    tensor([[0.7311, 0.2689],
            [0.2689, 0.7311]])
    """
    check_scores(logits, name="logits")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise NMSolveError(f"iterations: expected an integer of at least 1, got {iterations!r}")
    if tolerance is not None and (
        isinstance(tolerance, bool)
        or not isinstance(tolerance, (int, float))
        or not 0 <= tolerance < math.inf
    ):
        raise NMSolveError(f"tolerance: expected a number of at least 0 or None, got {tolerance!r}")
    check_backend(backend)
    *lead, rows, cols = logits.shape
    if row_marginals is not None:
        _check_marginals("row_marginals", row_marginals, rows, logits)
    if col_marginals is not None:
        _check_marginals("col_marginals", col_marginals, cols, logits)
    scaled, degree = _at_temperature(logits, temperature)
    if logits.numel() == 0:
        return scaled.to(torch.promote_types(scaled.dtype, torch.float32)) * 1.0
    blocks = scaled if logits.ndim == 3 else scaled.reshape(-1, rows, cols)
    a, b = row_marginals, col_marginals
    if a is not None:
        a = a.detach().expand(*lead, rows).reshape(-1, rows)
    if b is not None:
        b = b.detach().expand(*lead, cols).reshape(-1, cols)
    least = -1.0 if tolerance is None else float(tolerance)
    plan = plans(blocks, a, b, degree, iterations, least, backend)
    return plan if logits.ndim == 3 else plan.view(logits.shape)


def _at_temperature(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, float]:
    """Logits and the number that divides them; a tensor of a temperature divides them here."""
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
            raise NMSolveError(f"temperature: expected a number or a tensor, got {describe(temperature)}")
        if not 0 < temperature < math.inf:
            raise NMSolveError(f"temperature: expected a positive number, got {temperature!r}")
        return logits, float(temperature)
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise NMSolveError(f"temperature: expected a real tensor of one element, got {describe(temperature)}")
    if not torch.compiler.is_compiling() and not 0 < float(temperature.detach()) < math.inf:
        raise NMSolveError(f"temperature: expected a positive number, got {float(temperature.detach())}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    degree = temperature.reshape(()).to(logits.device, dtype)
    never = logits.isneginf()  # whose derivative by the temperature would be NaN
    return (logits.to(dtype).masked_fill(never, 0) / degree).masked_fill(never, -math.inf), 1.0


def _check_marginals(name: str, marginals: object, lines: int, logits: Tensor) -> None:
    if not isinstance(marginals, Tensor) or not marginals.is_floating_point():
        raise NMSolveError(f"{name}: expected a real tensor, got {describe(marginals)}")
    lead = logits.shape[:-2]
    given = marginals.shape[:-1]
    fits = len(given) <= len(lead) and all(
        have in (1, want) for have, want in zip(reversed(given), reversed(lead), strict=False)
    )
    if marginals.ndim == 0 or marginals.shape[-1] != lines or not fits or marginals.device != logits.device:
        raise NMSolveError(
            f"{name}: expected {tuple(lead)} (or what broadcasts to it) and then {lines} lines on "
            f"{logits.device}, got {describe(marginals)} on {marginals.device}"
        )
    tracked = not torch.compiler.is_compiling() and forward_ad.unpack_dual(marginals).tangent is not None
    if marginals.requires_grad or tracked:
        raise NMSolveError(
            f"{name}: constants for the gradient, so detach() them; got a tensor that requires it"
        )
