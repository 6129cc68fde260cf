r"""The solvers in plain PyTorch: the specification of every kernel, and the fallback on any device.

Everything here works on batches of blocks ``A`` of shape ``(B, R, C)`` with ``R <= C`` (a taller block is
solved transposed), in float32 or float64. A block keeps as many entries as N per line at most allows, and
among those masks one with the largest kept score; :func:`nmsolve.blocks.demand` gives the counts.

:func:`exact` solves the linear program

.. math::  \max \langle S, A\rangle,\quad S 1 = a,\; S^T 1 = b \text{ (or } \le b),\; 0 \le S \le 1

by an ascent on its dual (:func:`dual_ascent`) and shortest augmenting paths (:func:`augment`), see
docs/internals/solver.md. :func:`tsenor` is the entropic method of arXiv 2505.23949; :func:`greedy` is the
2-approximation by descending score. Sums of floats are taken by halving (:func:`fold`), so that the result
of a block does not depend on how many are solved with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nmsolve.backends import ascent_schedule
from nmsolve.blocks import BlockGrid, demand, grid_of, split_blocks
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult, dual_bound, kept_score

__all__ = ["exact", "greedy", "ordinary", "tsenor"]

# Elements solved together: a compromise between call overhead and working memory.
_CHUNK = 1 << 20


def why_not(device: torch.device) -> str | None:
    """Why this backend cannot run tensors on ``device``: it always can."""
    return None


def exact(
    scores: Tensor,
    pattern: NMPattern,
    *,
    warm: tuple[Tensor, Tensor] | None = None,
    want_solution: bool = False,
) -> BlockResult:
    """Optimal masks of ``(batch, rows, cols)`` scores, with duals that prove it when asked.

    ``warm`` are row and column duals ``(batch, GR, GC, M)`` to start from instead of the ascent's.
    """
    grid = grid_of(scores, pattern)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    work = working_dtype(scores)
    duals = (len(scores), grid.block_rows, grid.block_cols, pattern.m)
    u_all, v_all = (torch.zeros(duals, dtype=work, device=scores.device) for _ in range(2))
    for at, blocks, r, c in _chunks(scores, grid):
        lines = (at[0], *grid.block_slices(at[1], at[2]))
        a, shift = normalise(blocks.to(work))
        start = None
        if warm is not None:
            u0, v0 = warm[0][lines][..., :r], warm[1][lines][..., :c]
            limit = ascent_schedule.WARM_LIMIT
            start = (
                ldexp(u0.to(work).flatten(0, 2), -shift).clamp(-limit, limit),
                ldexp(v0.to(work).flatten(0, 2), -shift).clamp(-limit, limit),
            )
        if r <= c:
            kept, u, v = solve(a, pattern.n, start)
        else:
            kept, v, u = solve(a.mT, pattern.n, start and start[::-1])
            kept = kept.mT
        _store(mask, at, kept, r, c)
        if want_solution:
            v = ldexp(v, shift)
            u = settle(blocks, kept, ldexp(u, shift), v, demand(r, c, pattern.n).row)
            u_all[lines][..., :r] = u.view(*u_all[lines].shape[:3], r)
            v_all[lines][..., :c] = v.view(*v_all[lines].shape[:3], c)
    if not want_solution:
        return BlockResult(mask)
    objective, _ = kept_score(scores, mask, pattern)
    return BlockResult(mask, u_all, v_all, objective, dual_bound(scores, u_all, v_all, pattern))


def greedy(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Masks by descending score, completed to the full count; see :func:`take_greedily`."""
    grid = grid_of(scores, pattern)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for at, blocks, r, c in _chunks(scores, grid):
        a, _ = normalise(blocks.to(working_dtype(scores)))
        kept = take_greedily(a, pattern.n)
        if r <= c:
            complete(a, kept, pattern.n)
        else:
            complete(a.mT, kept.mT, pattern.n)
        _store(mask, at, kept, r, c)
    return mask


def tsenor(scores: Tensor, pattern: NMPattern, *, iterations: int, tau: float) -> Tensor:
    """Masks by entropic transport, greedy rounding and swaps (arXiv 2505.23949); every line is filled."""
    grid = grid_of(scores, pattern)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for at, blocks, r, c in _chunks(scores, grid):
        a, _ = normalise(blocks.to(working_dtype(scores)))
        if r <= c:
            kept = take_greedily(dykstra(a, pattern.n, iterations, tau), pattern.n)
            complete(a, kept, pattern.n)
        else:
            kept = take_greedily(dykstra(a.mT, pattern.n, iterations, tau).mT, pattern.n)
            complete(a.mT, kept.mT, pattern.n)
        _store(mask, at, kept, r, c)
    return mask


def ordinary(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Plain N:M along the last dimension: the N largest of each group of M, ties to the lowest index."""
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    grid = BlockGrid(1, scores.shape[2], pattern.m)
    step = max(1, _CHUNK // max(1, scores.shape[2]))
    for _, cols, _, c in grid.regions():
        for b in range(len(scores)):
            for i in range(0, scores.shape[1], step):
                groups = scores[b, i : i + step, cols].unflatten(1, (-1, c))
                best = groups.sort(dim=-1, descending=True, stable=True).indices[..., : pattern.n]
                mask[b, i : i + step, cols].unflatten(1, (-1, c)).scatter_(-1, best, True)
    return mask


# --- blocks -------------------------------------------------------------------------------------------------


def working_dtype(scores: Tensor) -> torch.dtype:
    """float64 for float64 scores, float32 for all others."""
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _chunks(scores: Tensor, grid: BlockGrid) -> Iterator[tuple[tuple[slice, slice, slice], Tensor, int, int]]:
    """Chunks of blocks of one shape: where they are, the blocks ``(B, R, C)``, R and C."""
    for b, i, j, r, c in grid.tiles(len(scores), _CHUNK):
        yield (b, i, j), split_blocks(scores[b, i, j], r, c).reshape(-1, r, c), r, c


def _store(mask: Tensor, at: tuple[slice, slice, slice], kept: Tensor, r: int, c: int) -> None:
    out = split_blocks(mask[at], r, c)
    out.copy_(kept.view(out.shape) if kept.is_contiguous() else kept.reshape(out.shape))


def ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent`` for one exponent per block; in two factors, so that neither overflows."""
    half = exponent // 2
    e = exponent.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    h = half.view_as(e).to(x.dtype)
    return x * torch.exp2(h) * torch.exp2(e - h)


def normalise(a: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks scaled by a power of two so that max|A| lies in [1/2, 1), and the exponent that undoes it.

    The scaling is exact but for entries more than 2^100 times smaller than the largest.
    """
    _, exponent = torch.frexp(a.abs().amax((1, 2)))
    return ldexp(a, -exponent), exponent


def fold(x: Tensor, dim: int) -> Tensor:
    """Sum over ``dim`` by halving: elementwise additions only, the same bits for any batch size."""
    x = x.movedim(dim, -1)
    while (size := x.shape[-1]) > 1:
        half = size // 2
        pairs = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat((pairs, x[..., 2 * half :]), -1) if size % 2 else pairs
    return x.squeeze(-1)


# --- exact --------------------------------------------------------------------------------------------------


def solve(a: Tensor, n: int, start: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Optimal masks ``(B, R, C)`` and duals ``(B, R)``, ``(B, C)`` of normalised blocks with R <= C."""
    u, v = dual_ascent(a, n) if start is None else start
    if a.shape[1] < a.shape[2]:
        v = v.clamp(min=0)
    else:  # shifting all prices prices every entry alike; the smaller they are, the finer in floats
        lowest = v.amin(1, keepdim=True)
        u, v = u + lowest, v - lowest
    return augment(a, n, u, v)


def settle(a: Tensor, kept: Tensor, u: Tensor, v: Tensor, row_need: int) -> Tensor:
    """Row duals without the surplus that rounding leaves free entries, where that makes the bound tighter.

    With N far below M a row's free entries, each a rounding error above its price, cost the bound more than
    raising the row's price by the largest of those errors.
    """
    score, price = a.double() - v.double().unsqueeze(1), u.double()
    surplus = (score - price.unsqueeze(2)).clamp(min=0)
    exact_price = price + surplus.masked_fill(kept, 0).amax(2)
    raised = exact_price.to(u.dtype)
    raised = torch.where(
        raised.double() < exact_price, raised.nextafter(raised.new_tensor(torch.inf)), raised
    )
    dearer = row_need * (raised.double() - price)
    less = surplus.sum(2) - (score - raised.double().unsqueeze(2)).clamp(min=0).sum(2)
    return torch.where(dearer < less, raised, u)


def dual_ascent(a: Tensor, n: int) -> tuple[Tensor, Tensor]:
    r"""Approximate duals by alternating Newton steps on the box-regularised problem.

    With ``S = clip(tau (A - u - v) + 1/2, 0, 1)`` a sweep moves every row dual by
    ``(sum_j S_ij - N) / (tau (c_i + damping))``, and then every column dual likewise. In the last sweep c_i
    counts the entries strictly between 0 and 1, before it is ``CURVATURE sum_j S_ij (1 - S_ij)``. tau follows
    :mod:`nmsolve.backends.ascent_schedule`.
    """
    rows, cols = a.shape[1:]
    need = demand(rows, cols, n)
    mean = fold(fold(a, 2), 1).div(rows * cols).view(-1, 1, 1)
    deviation = fold(fold((a - mean).abs(), 2), 1).div(rows * cols).clamp(min=ascent_schedule.DEVIATION_FLOOR)
    reach = ascent_schedule.WINSOR * deviation.view(-1, 1, 1)
    clipped = torch.minimum(torch.maximum(a, mean - reach), mean + reach)
    u = fold(clipped, 2) / cols
    v = fold(clipped, 1) / rows - (fold(u, 1) / rows).unsqueeze(1)
    tau = (ascent_schedule.TAU_START / deviation).unsqueeze(1)

    first = ascent_schedule.FRACTION_START * cols
    for sweep in range(1, ascent_schedule.SWEEPS + 1):
        last = sweep == ascent_schedule.SWEEPS
        step, _ = _newton_step(a, u, v, tau, 2, need.row, last)
        u = u + step
        step, fractional = _newton_step(a, u, v, tau, 1, need.col, last)
        v = v + step
        if rows < cols:
            v = v.clamp(min=0)
        if not last:
            target = first * (ascent_schedule.FRACTION_END / first) ** (sweep / (ascent_schedule.SWEEPS - 1))
            growth = (fold(fractional, 1) / cols) / target
            tau = tau * growth.clamp(ascent_schedule.GROWTH_MIN, ascent_schedule.GROWTH_MAX).unsqueeze(1)
    return u, v


def _newton_step(
    a: Tensor, u: Tensor, v: Tensor, tau: Tensor, dim: int, need: int, last: bool
) -> tuple[Tensor, Tensor]:
    """The step of the duals whose lines run along ``dim``, and their numbers of fractional entries."""
    s = tau.unsqueeze(2) * (a - u.unsqueeze(2) - v.unsqueeze(1)) + 0.5
    held = s.clamp(0, 1)
    if last:
        fractional = ((s > 0) & (s < 1)).sum(dim).to(a.dtype)
        slope = fractional + ascent_schedule.LAST_DAMPING
    else:
        spread = fold(held * (1 - held), dim)
        fractional = 6 * spread
        slope = ascent_schedule.CURVATURE * spread + ascent_schedule.DAMPING
    step = (fold(held, dim) - need) / slope
    return step.clamp(-ascent_schedule.STEP_LIMIT, ascent_schedule.STEP_LIMIT) / tau, fractional


def augment(a: Tensor, n: int, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn any duals into an optimal mask and optimal duals by shortest augmenting paths.

    ``X = [A - u - v > 0]`` is complementary to u and v; only some lines hold too many or too few entries.
    Each round first flips tight entries between two lines that are off by the same sign
    (:func:`_flip_tight`), then moves one unit of imbalance along a shortest path, in every block that has
    any. The nodes are the rows and columns; a free entry leads from its row to its column at cost
    ``max(0, u + v - A)``, a kept one from its column to its row at cost ``max(0, A - u - v)``.

    A partial block with R < C gets a slack row of score 0 whose entries count how far a column stays below
    N: they are free without limit, and kept while positive. Then all lines have exact counts.
    """
    batch, rows, cols = a.shape
    need = demand(rows, cols, n)
    x = (a - u.unsqueeze(2) - v.unsqueeze(1) > 0).to(torch.int32)
    row_need = torch.full((rows,), need.row, dtype=torch.int32, device=a.device)
    if slack := rows < cols:
        spare = torch.where(v == 0, (need.col - x.sum(1)).clamp(min=0), 0).to(torch.int32)
        a = torch.cat((a, a.new_zeros(batch, 1, cols)), 1)
        u = torch.cat((u, u.new_zeros(batch, 1)), 1)
        x = torch.cat((x, spare.unsqueeze(1)), 1)
        row_need = torch.cat((row_need, row_need.new_tensor([need.slack])))
    else:
        u, v = u.clone(), v.clone()

    # What all short rows lack and all columns hold too much: every round takes at least one unit of it.
    units = (row_need - x.sum(2)).clamp(min=0).sum(1) + (x.sum(1) - need.col).clamp(min=0).sum(1)
    unfinished = ((x.sum(2) != row_need).any(1) | (x.sum(1) != need.col).any(1)).nonzero().squeeze(1)
    for _ in range(int(units.max()) if batch else 0):
        if not unfinished.numel():
            break
        scores, kept, u_part, v_part = a[unfinished], x[unfinished], u[unfinished], v[unfinished]
        _flip_tight((scores - u_part.unsqueeze(2) - v_part.unsqueeze(1))[:, :rows], kept, row_need, need.col)
        rows_short, cols_long = row_need - kept.sum(2), kept.sum(1) - need.col
        _augment_once(scores, kept, u_part, v_part, rows_short, cols_long, slack)
        x[unfinished], u[unfinished], v[unfinished] = kept, u_part, v_part
        unfinished = unfinished[(kept.sum(2) != row_need).any(1) | (kept.sum(1) != need.col).any(1)]
    if slack:
        shift = u[:, -1:]
        u, v, x = (u - shift)[:, :-1], (v + shift).clamp(min=0), x[:, :-1]
    return x.bool(), u, v


def _flip_tight(reduced: Tensor, x: Tensor, row_need: Tensor, col_need: int) -> None:
    """Flip, in place, tight entries (reduced score 0) of two short lines or of two long ones.

    Such an entry is an augmenting path of length 0. Every row proposes its first one, counted cyclically from
    its own number, and every column accepts its first proposal, so that blocks full of ties take a round for
    many units. ``reduced`` leaves out the slack row, whose entries have no limit.
    """
    rows, cols = reduced.shape[1:]
    row_off, col_off = x.sum(2) - row_need, x.sum(1) - col_need
    wanted = torch.where(x[:, :rows] > 0, 1, -1)
    tight = (reduced == 0) & (row_off[:, :rows].sign().unsqueeze(2) == wanted)
    tight &= col_off.sign().unsqueeze(1) == wanted
    row, col = (torch.arange(size, device=x.device) for size in (rows, cols))
    turn = torch.where(tight, (col - row.unsqueeze(1)) % cols, cols)
    proposed = (turn == turn.amin(2, keepdim=True)) & tight
    rival = torch.where(proposed, row.unsqueeze(1), rows)
    accepted = (rival == rival.amin(1, keepdim=True)) & proposed
    x[:, :rows] -= torch.where(accepted, wanted, 0).to(x.dtype)


def _augment_once(
    a: Tensor, x: Tensor, u: Tensor, v: Tensor, rows_short: Tensor, cols_long: Tensor, slack: bool
) -> int:
    """One augmentation in each block, in place: shortest paths (Bellman-Ford), duals, flip.

    Returns the number of sweeps, which docs/internals/solver.md bounds by the columns and one.
    """
    batch, rows, cols = x.shape
    inf = float("inf")
    free = x == 0
    if slack:
        free[:, -1] = True
    reduced = a - u.unsqueeze(2) - v.unsqueeze(1)
    to_col = torch.where(free, (-reduced).clamp(min=0), inf)
    to_row = torch.where(x > 0, reduced.clamp(min=0), inf)

    dist_row = torch.where(rows_short > 0, 0.0, inf).to(a.dtype)
    dist_col = torch.where(cols_long > 0, 0.0, inf).to(a.dtype)
    from_col = torch.full((batch, rows), -1, device=a.device)  # the column a row was reached from
    from_row = torch.full((batch, cols), -1, device=a.device)
    for sweeps in range(1, cols + 2):  # noqa: B007 (returned below)
        reach, via = (dist_row.unsqueeze(2) + to_col).min(1)
        better_col = reach < dist_col
        dist_col, from_row = torch.where(better_col, reach, dist_col), torch.where(better_col, via, from_row)
        reach, via = (dist_col.unsqueeze(1) + to_row).min(2)
        better_row = reach < dist_row
        dist_row, from_col = torch.where(better_row, reach, dist_row), torch.where(better_row, via, from_col)
        if not (better_col.any() or better_row.any()):
            break

    ends = torch.cat(
        (torch.where(rows_short < 0, dist_row, inf), torch.where(cols_long < 0, dist_col, inf)), dim=1
    )
    nearest, node = ends.min(1)
    nearest = torch.where(nearest < inf, nearest, 0.0)  # a block that the tight entries already balanced
    # The update of docs/internals/solver.md with all prices shifted by the distance: lines near a source move
    # little, so that one far line, such as a row of outliers, does not push all prices to where floats are
    # coarse.
    u += torch.minimum(dist_row, nearest.unsqueeze(1))
    v -= torch.minimum(dist_col, nearest.unsqueeze(1))

    block = torch.arange(batch, device=a.device)
    at_col = node >= rows
    node = torch.where(at_col, node - rows, node)
    while block.numel():
        # A column was reached through a free entry, which is now kept; a row through a kept one, now freed.
        col_steps = from_row[block, node.clamp(max=cols - 1)]
        row_steps = from_col[block, node.clamp(max=rows - 1)]
        previous = torch.where(at_col, col_steps, row_steps)
        on = previous >= 0
        block, node, previous, at_col = block[on], node[on], previous[on], at_col[on]
        i, j = torch.where(at_col, previous, node), torch.where(at_col, node, previous)
        x[block, i, j] += torch.where(at_col, 1, -1).to(x.dtype)
        node, at_col = previous, ~at_col
    return sweeps


# --- tsenor and greedy --------------------------------------------------------------------------------------


def dykstra(a: Tensor, n: int, iterations: int, tau: float) -> Tensor:
    r"""log2 of the plan that Dykstra's projections reach for ``max <S, A> + H(S) / t``, with R <= C.

    ``t = tau / max|A|``. The published iteration scales rows, then columns, of S to sum N, clips
    ``min(S Q, 1)`` and stores what was clipped in Q. Since ``P = S Q`` is only ever scaled, it stays
    ``2**(L + x_i + y_j)`` with ``L = t A / ln 2``, and ``S = min(P, 1)``: the vectors x and y are the whole
    state, and nothing overflows. Returned is the unclipped exponent, which orders entries as S does and also
    those that S holds at 1.
    """
    rows, cols = a.shape[1:]
    need = demand(rows, cols, n)
    peak = a.abs().amax((1, 2), keepdim=True)
    level = a * (tau / 0.6931471805599453 / torch.where(peak > 0, peak, 1.0))
    x = -level.amax(2)
    y = torch.zeros_like(level[:, 0])
    tiny = 2.0**-120  # a line's sum that underflows catches up in the next iterations
    for iteration in range(iterations):
        exponent = level + x.unsqueeze(2) + y.unsqueeze(1)
        plan = torch.exp2(exponent.clamp(max=0) if iteration else exponent)
        row_scale = need.row / fold(plan, 2).clamp(min=tiny)
        col_scale = need.col / fold(plan * row_scale.unsqueeze(2), 1).clamp(min=tiny)
        if rows < cols:
            col_scale = col_scale.clamp(max=1)
        x, y = x + torch.log2(row_scale), y + torch.log2(col_scale)
    return level + x.unsqueeze(2) + y.unsqueeze(1)


def take_greedily(order: Tensor, n: int) -> Tensor:
    """The mask of taking entries by descending ``order`` while their row and column hold fewer than n.

    Ties go to the lowest row-major index. Every round takes at once all entries that are among the first
    ``n - held`` available ones of their row and of their column: nothing that comes before them can fill
    their lines, so the sequential order takes them too (locally dominant entries; Khan et al., SISC 2016).
    """
    batch, rows, cols = order.shape
    rank = order.reshape(batch, -1).sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    rank = rank.view(batch, rows, cols)
    by_row, by_col = rank.argsort(dim=2), rank.argsort(dim=1)
    back_row, back_col = by_row.argsort(dim=2), by_col.argsort(dim=1)
    kept = torch.zeros_like(order, dtype=torch.bool)
    while True:
        row_left, col_left = n - kept.sum(2), n - kept.sum(1)
        available = ~kept & (row_left > 0).unsqueeze(2) & (col_left > 0).unsqueeze(1)
        if not available.any():
            return kept
        place_row = available.gather(2, by_row).cumsum(2).gather(2, back_row)
        place_col = available.gather(1, by_col).cumsum(1).gather(1, back_col)
        kept |= available & (place_row <= row_left.unsqueeze(2)) & (place_col <= col_left.unsqueeze(1))


def complete(a: Tensor, kept: Tensor, n: int) -> None:
    """Fill every short row of blocks with R <= C, in place, by the best single move each time.

    For the first row i that is short, a move either keeps a free entry (i, j') of a column with room, or
    shifts a kept entry: (i', j') leaves, (i, j') and (i', j) come, for a column j with room. Its gain is the
    change of the kept score; the best move is made even where it loses, and there always is one.
    """
    rows, cols = a.shape[1:]
    need = demand(rows, cols, n)
    inf = float("inf")
    short = (kept.sum(2) < need.row).any(1).nonzero().squeeze(1)
    while short.numel():
        score, mask = a[short], kept[short]
        block = torch.arange(len(short), device=a.device)
        room = (mask.sum(1) < n).unsqueeze(1)
        i = (mask.sum(2) < need.row).int().argmax(1)
        free_here = ~mask[block, i].unsqueeze(1)
        score_here = score[block, i].unsqueeze(1)
        direct, direct_col = torch.where(free_here & room, score_here, -inf).squeeze(1).max(1)
        other, other_col = torch.where(~mask & room, score, -inf).max(2)
        moves = torch.where(mask & free_here, score_here - score + other.unsqueeze(2), -inf).flatten(1)
        swap, entry = moves.max(1)
        row, col = entry // cols, entry % cols
        swapped = swap > direct
        mask[block, i, torch.where(swapped, col, direct_col)] = True
        where = swapped.nonzero().squeeze(1)
        mask[where, row[where], col[where]] = False
        mask[where, row[where], other_col[where, row[where]]] = True
        kept[short] = mask
        short = short[(mask.sum(2) < need.row).any(1)]
