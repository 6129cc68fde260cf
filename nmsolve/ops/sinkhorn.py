"""Soft permutations: doubly stochastic plans by Sinkhorn's iteration, with a hand-written gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nmsolve.backends.dispatch import AUTO, REFERENCE, PermutationSolver, check_backend, select
from nmsolve.errors import BackendError, NMSolveError
from nmsolve.ops.registration import register
from nmsolve.ops.validation import check_scores, describe

__all__ = ["sinkhorn"]

# How far apart, relative to their size, the totals of the two marginals of a block may be.
_TOTALS = 1e-4

Made = tuple[Tensor, Tensor, Tensor, Tensor]


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
        ``(..., R, C)``, float64, float32, float16 or bfloat16, any strides. A block with a NaN or infinite
        logit gives a plan of NaN; others are not affected.
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
        numba is installed, else "torch".

    Returns
    -------
    Tensor
        ``(..., R, C)``; float64 for float64 logits, else float32, whose marginals a half type would not hold.
        Differentiable once with respect to the logits: the backward pass sweeps through the stored scalings,
        ``iterations * (R + C)`` numbers a block.

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
    for name, marginals, lines in (
        ("row_marginals", row_marginals, rows),
        ("col_marginals", col_marginals, cols),
    ):
        if marginals is not None:
            _check_marginals(name, marginals, lines, logits)
    scaled, degree = _at_temperature(logits, temperature)
    if logits.numel() == 0:
        return scaled.to(torch.promote_types(scaled.dtype, torch.float32)) * 1.0
    blocks = scaled.reshape(-1, rows, cols)
    both = [
        m if m is None else m.detach().expand(*lead, m.shape[-1]).reshape(-1, m.shape[-1])
        for m in (row_marginals, col_marginals)
    ]
    settings = (degree, iterations, -1.0 if tolerance is None else float(tolerance), backend)
    if torch.is_grad_enabled() and blocks.requires_grad:
        plan = _Sinkhorn.apply(blocks, *both, *settings)
    else:
        plan = _forward(blocks, *both, *settings, False)[0]
    result: Tensor = plan.view(logits.shape)
    return result


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
    return logits.to(dtype) / temperature.reshape(()).to(logits.device, dtype), 1.0


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
    if marginals.requires_grad:
        raise NMSolveError(
            f"{name}: constants for the gradient, so detach() them; got a tensor that requires it"
        )


def _solver(backend: str, logits: Tensor) -> PermutationSolver:
    row = select(backend, logits.device)
    reason = None
    if row.max_sinkhorn is not None and max(logits.shape[-2:]) > row.max_sinkhorn:
        reason = f"its kernels hold up to {row.max_sinkhorn} rows and columns, got {describe(logits)}"
    elif logits.dtype == torch.float64 and not row.sinkhorn_float64:
        reason = "its kernels work in float32, got float64 logits"
    if reason is None:
        return row.permutations
    if backend != AUTO:
        raise BackendError(f"backend: {row.name!r} cannot run this: {reason}; use 'auto' or 'torch'")
    return REFERENCE.permutations


def _marginals(blocks: Tensor, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both marginals in the work dtype, ``(B, lines)``; raises unless positive and of one total."""
    batch, r, c = blocks.shape
    work = torch.promote_types(blocks.dtype, torch.float32)
    for name, given in (("row_marginals", rows), ("col_marginals", cols)):
        if given is not None and not bool(((given > 0) & torch.isfinite(given)).all()):
            raise NMSolveError(f"{name}: expected positive finite numbers")
    if rows is not None and cols is not None:
        have, want = cols.double().sum(-1), rows.double().sum(-1)
        if bool(((have - want).abs() > _TOTALS * want).any()):
            worst = int(((have - want).abs() / want).argmax())
            raise NMSolveError(
                "col_marginals: expected the total of row_marginals, "
                f"{float(want[worst]):.6g} in block {worst}, got {float(have[worst]):.6g}"
            )
    if rows is None and cols is None:
        rows, cols = blocks.new_ones(1, r, dtype=work), blocks.new_full((1, c), r / c, dtype=work)
    elif rows is None:
        assert cols is not None
        rows = cols.to(work).mean(-1, keepdim=True) * (c / r)
    elif cols is None:
        cols = rows.to(work).mean(-1, keepdim=True) * (r / c)
    assert rows is not None
    assert cols is not None
    return rows.to(work).expand(batch, r), cols.to(work).expand(batch, c)


class _Sinkhorn(torch.autograd.Function):
    """The one gradient of all backends."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: Tensor,
        row_marginals: Tensor | None,
        col_marginals: Tensor | None,
        temperature: float,
        iterations: int,
        tolerance: float,
        backend: str,
    ) -> Tensor:
        plan, f, g, made = _forward(
            blocks, row_marginals, col_marginals, temperature, iterations, tolerance, backend, True
        )
        ctx.save_for_backward(blocks, row_marginals, col_marginals, f, g, made)
        ctx.settings = temperature, backend
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(gradients[0], *ctx.saved_tensors, *ctx.settings), None, None, None, None, None, None


def _plans(
    blocks: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    temperature: float,
    iterations: int,
    tolerance: float,
    backend: str,
    keep: bool,
) -> Made:
    """Plan, row and column log-scalings of every iteration, iterations made; blocks are ``(B, R, C)``."""
    a, b = _marginals(blocks, row_marginals, col_marginals)
    solver = _solver(backend, blocks)
    return solver.sinkhorn_forward(blocks, a, b, temperature, iterations, tolerance, keep)


def _blank_plans(
    blocks: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    temperature: float,
    iterations: int,
    tolerance: float,
    backend: str,
    keep: bool,
) -> Made:
    batch, rows, cols = blocks.shape
    work = torch.promote_types(blocks.dtype, torch.float32)
    kept = iterations if keep else 0
    return (
        blocks.new_empty((batch, rows, cols), dtype=work),
        blocks.new_empty((batch, kept, rows), dtype=work),
        blocks.new_empty((batch, kept, cols), dtype=work),
        blocks.new_empty((batch,), dtype=torch.int32),
    )


def _gradient(
    gradient: Tensor,
    blocks: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    row_scalings: Tensor,
    col_scalings: Tensor,
    made: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    """The gradient of the blocks of :func:`_plans`, in their dtype, contiguous."""
    _, b = _marginals(blocks, row_marginals, col_marginals)
    solver = _solver(backend, blocks)
    return solver.sinkhorn_backward(gradient, blocks, b, row_scalings, col_scalings, made, temperature)


_forward = register(
    "sinkhorn",
    "(Tensor blocks, Tensor? row_marginals, Tensor? col_marginals, float temperature, SymInt iterations, "
    "float tolerance, str backend, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _plans,
    _blank_plans,
    in_function=True,
)
_backward = register(
    "sinkhorn_backward",
    "(Tensor gradient, Tensor blocks, Tensor? row_marginals, Tensor? col_marginals, Tensor row_scalings, "
    "Tensor col_scalings, Tensor made, float temperature, str backend) -> Tensor",
    _gradient,
    lambda gradient, blocks, *_: blocks.new_empty(blocks.shape),
    in_function=True,
)
