r"""Blocks with entries that are kept always or never, and blocks whose scores span more than float64 does.

A score of +inf is always kept, one of -inf never. Scores ``a``, scaled to absolute values below 1, and signs
``s`` in {-1, 0, 1} make ``a + K s``, where ``K`` is more than any two masks differ by: its optimum keeps all
that must and none that must not be kept, or no mask does. It is solved in float64. That is enough unless the
scores themselves lie far apart, such as -1e30 and 1; prices that leave no more than rounding to be gained
say so. Where they do not, the block is solved digit by digit (:func:`_by_digits`).

Prices u, v change the score of all masks with N per row and column alike, so that ``k = A - u - v`` is the
same problem. A mask for which it is positive where kept and not where free, but for what these leave, the
*loss*

.. math::  L = \sum_{kept} \max(0, -k) + \sum_{free} \max(0, k),

is short of the optimum by L at most, and entries beyond +-L are as in the mask in every optimum: they may be
cut off there. So whole multiples k of a unit are solved exactly, as float64 holds the sums of integers below
2^53; what they leave of every score, and the entries within what that adds up to, are the next problem, whose
unit is some 2^30 times finer. The first unit, of the signs s, is larger than any number. This is the scaling
of costs of Edmonds and Karp (J. ACM 19, 1972) with many bits at a time, or the iterative refinement of linear
programs (Gleixner, Steffy and Wolter, INFORMS J. Comput. 28, 2016).

A mask that may be *short* keeps at most N per line. It is a part of one of a larger square with N per line,
whose further rows and columns hold what the lines lack; they have room for whatever a block keeps. Signs of 3
for +inf, -3 for -inf and -1 for a unit that a line lacks put as many +inf as there can be before as many
entries as there can be, and no -inf among them: an entry saves its two lines a unit each, and one +inf more
costs one entry at most, since its way into a mask puts one out at either end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.backends.dispatch import MaskSolver
from nmsolve.ops.certificates import certificate, enough, exponents, times_power_of_two
from nmsolve.pattern import NMPattern

__all__ = ["Found", "Solver", "block_solvers", "solve_levels"]

# Optimal masks of square blocks (B, P, P) in float64, exact where the scores are integers, and row and column
# duals (B, P).
Solver = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

# Bits of integers whose sums along paths and in prices float64 holds, for blocks of one line; a block of P
# lines has as many fewer as P has.
_BITS = 44

# Problems of digits at most: float64 has 2098 bits, of which each takes 20 or more.
_PROBLEMS = 100

# A loss this many times below what is enough has nothing to do with the mask.
_SMALL = 2.0**-4

# Multiplied by the size of the kept scores: a loss that the rounding of their sum hides.
_NOTHING = 2.0**-52

# The finest unit, which float64 still holds, and digits that no block needs.
_FINEST = -1070
_BEYOND = 2.0**1000


class Found(NamedTuple):
    """Masks of ``(B, R, C)`` blocks, and what proves them.

    ``full`` says whether a block's mask keeps all that must, none that must not be kept, and as much as its
    pattern wants. ``loss`` is how much more than its score the duals leave possible, in the scores' unit:
    beside the masks of the pattern, or beside the short masks with as many entries.
    """

    mask: Tensor
    full: Tensor
    row_duals: Tensor
    col_duals: Tensor
    loss: Tensor


def block_solvers(masks: MaskSolver, n: int) -> tuple[Solver, Solver]:
    """A backend's solver of masks as it is, and exact where scores are integers; see :func:`solve_levels`."""

    def first(blocks: Tensor, start: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        rows, cols = blocks.shape[1:]
        pattern = NMPattern(n, max(rows, cols))
        found = masks.exact(blocks, pattern, warm=start, want_solution=True)
        assert found.row_duals is not None
        assert found.col_duals is not None
        return found.mask, found.row_duals[:, 0, 0, :rows], found.col_duals[:, 0, 0, :cols]

    def exact(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # From integer prices on, all sums are integers.
        u, v = (prices.round() for prices in first(blocks)[1:])
        zero = torch.zeros_like(u)[:, None, None]
        mask, more_u, more_v = first(blocks - u.unsqueeze(2) - v.unsqueeze(1), (zero, zero))
        return mask, u + more_u, v + more_v

    return first, exact


def solve_levels(
    blocks: Tensor,
    n: int,
    dtype: torch.dtype,
    first: Solver,
    exact: Solver,
    *,
    allow_short: bool,
    want_duals: bool,
) -> Found:
    """Optimal masks of ``(B, R, C)`` float64 blocks, whatever numbers they hold but NaN.

    ``first`` solves blocks of that shape as they are, and ``exact`` square ones. ``dtype`` is that of the
    duals, which are zeros unless they are wanted. Where there is no mask of the pattern, the mask is a short
    one if that is allowed, and no matter what otherwise.
    """
    sign = blocks.isinf() * blocks.sign()
    finite = blocks.masked_fill(sign != 0, 0)
    batch, rows, cols = blocks.shape
    u, v = (blocks.new_zeros(batch, size, dtype=dtype) for size in (rows, cols))
    loss = blocks.new_zeros(batch)
    exponent = exponents(finite)
    a = times_power_of_two(finite, -exponent)
    single = n == 0 or n >= max(rows, cols)  # a single mask
    if single:
        mask = (sign >= 0) if n else torch.zeros_like(sign, dtype=torch.bool)
    else:
        mask = _optimum(a, sign, n, dtype, first, exact)
    full = _holds(mask, sign, n)
    if want_duals and full.any():
        u[full], v[full], loss[full] = _proof(a[full], sign[full], mask[full], n, dtype)
    lacking = ~full
    if allow_short and not single and lacking.any():
        square, signs = _short_square(a[lacking], sign[lacking], n)
        found = _optimum(square, signs, n, dtype, first, exact)
        mask[lacking] = found[:, :rows, :cols]
        if want_duals:
            prices = _proof(square, signs, found, n, dtype)
            u[lacking], v[lacking], loss[lacking] = prices[0][:, :rows], prices[1][:, :cols], prices[2]
    largest = torch.finfo(dtype).max
    u, v = (
        times_power_of_two(prices.double(), exponent).clamp(-largest, largest).to(dtype) for prices in (u, v)
    )
    return Found(mask, full, u, v, times_power_of_two(loss, exponent))


def _holds(mask: Tensor, sign: Tensor, n: int) -> Tensor:
    """Whether the masks keep every +inf and no -inf; one that keeps everything keeps as much as it should."""
    wrong = torch.where(mask, sign < 0, sign > 0)
    if n >= max(mask.shape[1:]):
        wrong |= ~mask
    return ~wrong.any(2).any(1)


def _sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x + y`` and what rounding took off it."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _size(a: Tensor, mask: Tensor) -> Tensor:
    """What a loss is small beside: a negative score that is kept since it must be does not count."""
    return (a * mask).clamp(min=0).sum((1, 2))


def _loss(a: Tensor, mask: Tensor, u: Tensor, v: Tensor, n: int) -> Tensor:
    """What duals leave beside a mask, with the part of lines that may hold fewer than N."""
    # What prices much larger than the scores round off is added again (Knuth's sums without an error).
    price, less = _sum(u.double().unsqueeze(2), v.double().unsqueeze(1))
    beyond, more = _sum(a, -price)
    beyond = beyond + (more - less)
    loss = torch.where(mask, -beyond, beyond).clamp(min=0).sum((1, 2))
    for prices, dim, longer in ((v, 1, a.shape[1] < a.shape[2]), (u, 2, a.shape[1] > a.shape[2])):
        if longer:
            loss += (prices * (n - mask.sum(dim))).sum(1)
    return loss


def _optimum(a: Tensor, sign: Tensor, n: int, dtype: torch.dtype, first: Solver, exact: Solver) -> Tensor:
    """Optimal masks by ``sign`` and then by ``a``, as far as there are masks without a sign that loses."""
    rows, cols = a.shape[1:]
    weighted = a + 2.0 ** (2 * n * min(rows, cols)).bit_length() * sign
    mask, u, v = first(weighted)
    size = _size(a, mask)
    again = _loss(weighted, mask, u, v, n) > _SMALL * enough(dtype) * size
    if again.any():
        square, signs = _full_square(a[again], sign[again], n)
        mask[again] = _by_digits(square, signs, exact)[:, :rows, :cols]
    return mask


def _full_square(a: Tensor, sign: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Scores and signs ``(B, P, P)`` of squares with N per line, whose corners are the masks of the blocks.

    An entry beside or below a block is a unit that its line lacks; those of the shorter side lack none.
    Whatever a block keeps can be completed: ``P - R`` and ``P - C`` are N, C and R at least, so that the
    entries beside and below can be dealt out evenly, and then those in the other corner.
    """
    batch, rows, cols = a.shape
    if rows == cols:
        return a, sign
    size = max(rows, cols) + max(n, min(rows, cols))
    square, signs = a.new_zeros(batch, size, size), a.new_zeros(batch, size, size)
    square[:, :rows, :cols], signs[:, :rows, :cols] = a, sign
    if rows < cols:
        signs[:, :rows, cols:] = -1
    else:
        signs[:, rows:, :cols] = -1
    return square, signs


def _short_square(a: Tensor, sign: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As :func:`_full_square`, for masks that may be short."""
    batch, rows, cols = a.shape
    size = max(rows, cols) + max(n, min(rows, cols))
    square, signs = a.new_zeros(batch, size, size), a.new_zeros(batch, size, size)
    square[:, :rows, :cols], signs[:, :rows, :cols] = a, 3 * sign
    signs[:, :rows, cols:] = -1
    signs[:, rows:, :cols] = -1
    return square, signs


def _by_digits(a: Tensor, sign: Tensor, solve: Solver) -> Tensor:
    """Optimal masks of square blocks, first by ``sign`` and then by scores ``a`` below 1 in size."""
    mask, rest = _balanced(sign, solve)
    unit = torch.full_like(a[:, 0, 0], torch.inf)
    low = a.clone()
    bits = _BITS - len(a[0]).bit_length()
    left = torch.arange(len(a), device=a.device)
    for _ in range(_PROBLEMS):
        # An entry that the digits decide loses nothing: its rest is less than a unit.
        loss = (low[left].abs() * (rest == 0)).sum((1, 2))
        on = loss > _NOTHING * _size(a[left], mask[left])
        if not on.any():
            break
        left, rest, loss = left[on], rest[on], loss[on].view(-1, 1, 1)
        finer = torch.exp2((torch.frexp(loss).exponent.double() - bits).clamp(min=_FINEST))
        more = (low[left] / finer).round().clamp(-_BEYOND, _BEYOND)
        digits = torch.where(rest == 0, more, rest * (unit[left].view(-1, 1, 1) / finer) + more)
        limit = (loss / finer).ceil() + 1
        low[left] = torch.where(digits.abs() <= limit, low[left] - more * finer, 0)
        unit[left] = finer.flatten()
        mask[left], rest = _balanced(digits.clamp(-limit, limit), solve)
    return mask


def _balanced(digits: Tensor, solve: Solver) -> tuple[Tensor, Tensor]:
    """Optimal masks of integers, and the integers less the prices that prove them."""
    if not digits.any():
        return torch.zeros_like(digits, dtype=torch.bool), digits
    mask, u, v = solve(digits)
    return mask, digits - u.double().unsqueeze(2) - v.double().unsqueeze(1)


def _proof(
    a: Tensor, sign: Tensor, mask: Tensor, n: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Duals of optimal masks and their loss, in the unit of ``a``.

    Free entries far below all that is kept, -inf among them, are lifted to where no mask wants them yet. What
    is a bound with them is one without.
    """
    kept = (a * mask).abs()
    reach = torch.maximum(kept.amax((1, 2)), a.amax((1, 2))).clamp(min=0).view(-1, 1, 1)
    weight = 4 * n * a.shape[2] * reach
    lifted = torch.where(mask, a, torch.maximum(a, -weight)) + sign * weight
    u, v, loss = certificate(lifted, mask, n, dtype, kept.sum((1, 2)))
    return u, v, times_power_of_two(loss, exponents(lifted))
