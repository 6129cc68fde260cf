"""Sinkhorn's plans and their gradient as operators, and every further derivative.

:mod:`nmsolve.ops.sinkhorn` is the door in front of them, where arguments are checked.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nmsolve.backends.dispatch import AUTO, REFERENCE, Backend, select
from nmsolve.errors import BackendError, NMSolveError
from nmsolve.ops.registration import (
    batch_first,
    has_tangent,
    may_be_differentiated,
    register,
    shortcut,
    signature_kept,
    tangents_of_tangents,
)
from nmsolve.ops.validation import describe

__all__ = ["plans"]

# How far apart, relative to their size, the totals of the two marginals of a block may be.
_TOTALS = 1e-4

Made = tuple[Tensor, Tensor, Tensor, Tensor]


def plans(
    blocks: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    temperature: float,
    iterations: int,
    tolerance: float,
    backend: str,
) -> Tensor:
    """Plans ``(B, R, C)`` of blocks of logits, differentiable with respect to those.

    Marginals are ``(B, lines)`` or None; a tolerance below 0 is none.
    """
    arguments = (blocks, row_marginals, col_marginals, temperature, iterations, tolerance, backend)
    function: type[torch.autograd.Function] | None
    if torch.compiler.is_compiling():
        function = _Sinkhorn if torch.is_grad_enabled() and blocks.requires_grad else None
    elif torch._C._are_functorch_transforms_active() or has_tangent(blocks):
        function = _SinkhornForwardMode
    else:
        function = _SinkhornEager if torch.is_grad_enabled() and blocks.requires_grad else None
    if function is None:
        return _plan(*arguments)
    plan: Tensor = function.apply(*arguments)[0]
    return plan


# A backend that runs on a device goes on doing so; to look for its packages takes as long as a small plan.
_selected = cache(select)


def _solver(backend: str, logits: Tensor) -> Backend:
    row = _selected(backend, logits.device)
    reason = None
    if row.max_sinkhorn is not None and max(logits.shape[-2:]) > row.max_sinkhorn:
        reason = f"its kernels hold up to {row.max_sinkhorn} rows and columns, got {describe(logits)}"
    elif logits.dtype == torch.float64 and not row.sinkhorn_float64:
        reason = "its kernels work in float32, got float64 logits"
    if reason is None:
        return row
    if backend != AUTO:
        raise BackendError(f"backend: {row.name!r} cannot run this: {reason}; use 'auto' or 'torch'")
    return REFERENCE


def _work(blocks: Tensor) -> torch.dtype:
    """What plans are computed in: float64 of float64 logits, else float32."""
    return torch.promote_types(blocks.dtype, torch.float32)


def _check_marginal_values(rows: Tensor | None, cols: Tensor | None) -> None:
    """Raise unless the marginals ``(B, lines)`` are positive and of one total in each block."""
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


def _marginals(blocks: Tensor, rows: Tensor | None, cols: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both marginals in the work dtype, ``(B, lines)``."""
    batch, r, c = blocks.shape
    work = _work(blocks)
    if rows is None and cols is None:
        rows = blocks.new_ones(batch, r, dtype=work)
        return rows, rows if r == c else blocks.new_full((batch, c), r / c, dtype=work)
    if rows is None:
        assert cols is not None
        rows = cols.to(work).mean(-1, keepdim=True) * (c / r)
    elif cols is None:
        cols = rows.to(work).mean(-1, keepdim=True) * (r / c)
    assert rows is not None
    assert cols is not None
    return rows.to(work).expand(batch, r), cols.to(work).expand(batch, c)


# --- derivatives --------------------------------------------------------------------------------------------
#
# Two Functions: the plan P(x) of the logits x, and its gradient V(G, x) = P'(x)^T G by the backend's sweep
# through the stored scalings. All further derivatives come from the tangent P'(x) h, written out in PyTorch:
# V is linear in G, and its derivative in x is the second one of <G, P(x)>, a symmetric matrix. Applied to h,
# that is the gradient in x of <G, P'(x) h>. The stored scalings and the numbers of iterations are constants;
# whoever differentiates through them makes them again from x.


def _tangent(
    direction: Tensor,
    blocks: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    made: Tensor,
    temperature: float,
    iterations: int,
) -> Tensor:
    """``P'(x) h`` for the direction h, differentiable in both as often as one likes.

    With the softmaxes R and S of an iteration (see the reference's ``sinkhorn_backward``),
    ``df = -sum_j R (h + dg)`` and ``dg = -sum_i S (h + df)``; at the end ``dP = P (h + df + dg)``. A line
    of -inf counts as one of zeros where its own scaling is made: to the other lines it is what it is, and the
    plan leaves it out.
    """
    a, b = _marginals(blocks, row_marginals, col_marginals)
    z, h = blocks.to(a.dtype) / temperature, direction.to(a.dtype) / temperature
    never = z.isneginf()
    by_row, by_col = (z.masked_fill(never.all(dim, keepdim=True), 0) for dim in (2, 1))
    log_a, log_b = a.log(), b.log()
    f, df = torch.zeros_like(z[:, :, 0]), torch.zeros_like(z[:, :, 0])
    g, dg = torch.zeros_like(z[:, 0]), torch.zeros_like(z[:, 0])
    for t in range(iterations):
        going = made[:, :1] > t
        level = by_row + g.unsqueeze(1)
        moved = level.softmax(2) * (h + dg.unsqueeze(1))
        f = torch.where(going, log_a - level.logsumexp(2), f)
        df = torch.where(going, -moved.sum(2), df)
        level = by_col + f.unsqueeze(2)
        moved = level.softmax(1) * (h + df.unsqueeze(2))
        g = torch.where(going, log_b - level.logsumexp(1), g)
        dg = torch.where(going, -moved.sum(1), dg)
    plan = ((by_col + f.unsqueeze(2)).softmax(1) * b.unsqueeze(1)).masked_fill(never, 0)
    return plan * (h + df.unsqueeze(2) + dg.unsqueeze(1))


def _second(gradient: Tensor, direction: Tensor, blocks: Tensor, *settings: Any) -> Tensor:
    """The second derivative in x of ``<G, P(x)>``, applied to a direction."""
    back: Any = torch.func.vjp(lambda x: _tangent(direction, x, *settings), blocks)[1]
    result: Tensor = back(gradient)[0]
    return result


def _over_batches(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """The vmap rule: blocks are independent, so that a batch of batches of them is one batch."""
    folded = [
        batch_first(arg, dim, info.batch_size).flatten(0, 1) if isinstance(arg, Tensor) else arg
        for arg, dim in zip(args, in_dims, strict=True)
    ]
    outputs = function.apply(*folded)
    if isinstance(outputs, Tensor):
        return outputs.unflatten(0, (info.batch_size, -1)), 0
    return tuple(out.unflatten(0, (info.batch_size, -1)) for out in outputs), (0,) * len(outputs)


class _Sinkhorn(torch.autograd.Function):
    """Plans, with the scalings and numbers of iterations that the gradient needs."""

    @staticmethod
    @signature_kept
    def forward(
        blocks: Tensor,
        row_marginals: Tensor | None,
        col_marginals: Tensor | None,
        temperature: float,
        iterations: int,
        tolerance: float,
        backend: str,
    ) -> Made:
        made: Made = _forward(
            blocks, row_marginals, col_marginals, temperature, iterations, tolerance, backend, True
        )
        return made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Made) -> None:
        blocks, row_marginals, col_marginals, temperature, iterations, _, backend = inputs
        _, f, g, made = output
        ctx.mark_non_differentiable(f, g, made)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(blocks, row_marginals, col_marginals, f, g, made)
        ctx.save_for_forward(blocks, row_marginals, col_marginals, f, g, made)
        ctx.settings = temperature, iterations, backend

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = gradients[0]
        if gradient is None:
            return (None,) * 7
        saved = ctx.saved_tensors
        if not torch.compiler.is_compiling() and (
            may_be_differentiated(gradient) or may_be_differentiated(saved[0])
        ):
            result: Tensor = _SinkhornGradient.apply(gradient, *saved, *ctx.settings)
        else:
            temperature, _, backend = ctx.settings
            result = _backward(gradient, *saved, temperature, backend)
        return result, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _over_batches(_SinkhornForwardMode, info, in_dims, args)


class _SinkhornForwardMode(_Sinkhorn):
    """The same with a tangent, which the compiler does not trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if tangents[0] is None:
            return None, None, None, None
        with tangents_of_tangents(*ctx.saved_tensors) as (blocks, row_marginals, col_marginals, _, _, made):
            settings = (row_marginals, col_marginals, made, *ctx.settings[:2])
            return _tangent(tangents[0], blocks, *settings), None, None, None


class _SinkhornEager(torch.autograd.Function):
    """The same for reverse mode alone, where neither compiler nor transform looks on.

    With a context from the start ``apply`` has no signature to bind, and what only the gradient needs is no
    output: together a third of what a small plan takes.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor]:
        plan, *kept = _forward(*arguments, True)
        blocks, row_marginals, col_marginals, temperature, iterations, _, backend = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(blocks, row_marginals, col_marginals, *kept)
        ctx.settings = temperature, iterations, backend
        return (plan,)

    backward = staticmethod(_Sinkhorn.backward)


class _SinkhornGradient(torch.autograd.Function):
    """``V(G, x)``, by the backend."""

    @staticmethod
    @signature_kept
    def forward(
        gradient: Tensor,
        blocks: Tensor,
        row_marginals: Tensor | None,
        col_marginals: Tensor | None,
        row_scalings: Tensor,
        col_scalings: Tensor,
        made: Tensor,
        temperature: float,
        iterations: int,
        backend: str,
    ) -> Tensor:
        scalings = row_scalings, col_scalings
        result: Tensor = _backward(
            gradient, blocks, row_marginals, col_marginals, *scalings, made, temperature, backend
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.settings = inputs[7:]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient, blocks, row_marginals, col_marginals, _, _, made = ctx.saved_tensors
        settings = (row_marginals, col_marginals, made, *ctx.settings[:2])
        direction, by_gradient, by_blocks = gradients[0], None, None
        if direction is not None:
            if ctx.needs_input_grad[0]:
                by_gradient = _tangent(direction, blocks, *settings).to(gradient.dtype)
            if ctx.needs_input_grad[1]:
                by_blocks = _second(gradient.to(_work(blocks)), direction, blocks, *settings)
        return by_gradient, by_blocks, *[None] * 8

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        parts = []
        with tangents_of_tangents(*ctx.saved_tensors) as (gradient, blocks, *rest):
            if tangents[0] is not None:
                parts.append(_SinkhornGradient.apply(tangents[0], blocks, *rest, *ctx.settings))
            if tangents[1] is not None:
                settings = (*rest[:2], rest[4], *ctx.settings[:2])
                parts.append(_second(gradient.to(_work(blocks)), tangents[1], blocks, *settings))
        result: Tensor | None = sum(parts[1:], parts[0]) if parts else None
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _over_batches(_SinkhornGradient, info, in_dims, args)


# --- operators ----------------------------------------------------------------------------------------------


def _made(
    blocks: Tensor,
    row_marginals: Tensor | None,
    col_marginals: Tensor | None,
    temperature: float,
    iterations: int,
    tolerance: float,
    backend: str,
    keep: bool,
) -> tuple[Tensor, ...]:
    """See :class:`PermutationSolver`; blocks are ``(B, R, C)``."""
    solver = _solver(backend, blocks)
    a, b = row_marginals, col_marginals
    if a is not None or b is not None or not solver.sinkhorn_uniform:
        _check_marginal_values(a, b)
        a, b = _marginals(blocks, a, b)
    return solver.permutations.sinkhorn_forward(blocks, a, b, temperature, iterations, tolerance, keep)


def _plans(blocks: Tensor, *arguments: Any) -> Made:
    """All four, of which those that are not kept are empty or 0."""
    plan, *kept = _made(blocks, *arguments)
    if not arguments[-1]:
        batch, rows, cols = blocks.shape
        kept = [plan.new_empty(batch, 0, rows), plan.new_empty(batch, 0, cols)]
        kept.append(plan.new_zeros((batch, 1), dtype=torch.int32))
    u, v, made = kept
    return plan, u, v, made


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
    work = _work(blocks)
    kept = iterations if keep else 0
    return (
        blocks.new_empty((batch, rows, cols), dtype=work),
        blocks.new_empty((batch, kept, rows), dtype=work),
        blocks.new_empty((batch, kept, cols), dtype=work),
        blocks.new_empty((batch, 1 + kept), dtype=torch.int32),
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
    solver = _solver(backend, blocks)
    a, b = row_marginals, col_marginals
    if a is not None or b is not None or not solver.sinkhorn_uniform:
        a, b = _marginals(blocks, a, b)
    kept = row_scalings, col_scalings, made
    return solver.permutations.sinkhorn_backward(gradient, blocks, a, b, *kept, temperature)


_operator = register(
    "sinkhorn",
    "(Tensor blocks, Tensor? row_marginals, Tensor? col_marginals, float temperature, SymInt iterations, "
    "float tolerance, str backend, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _plans,
    _blank_plans,
    in_function=True,
)
_forward = shortcut(_operator, _made)


def _plan_alone(operator: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    return lambda *arguments: operator(*arguments, False)[0]


_plan = shortcut(_plan_alone(_operator), _plan_alone(_made))
_backward = shortcut(
    register(
        "sinkhorn_backward",
        "(Tensor gradient, Tensor blocks, Tensor? row_marginals, Tensor? col_marginals, Tensor row_scalings, "
        "Tensor col_scalings, Tensor made, float temperature, str backend) -> Tensor",
        _gradient,
        lambda gradient, blocks, *_: blocks.new_empty(blocks.shape),
        in_function=True,
    ),
    _gradient,
)
