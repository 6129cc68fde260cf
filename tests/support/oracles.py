"""Independent solvers, checks and score distributions that the tests compare the backends with.

Nothing here imports a solver of nmsolve. A block is ``(R, C)`` scores and ``n``, the most that a line may
keep. Every block is the same problem: keep as many entries as the lines allow, and among those choices the
largest score. With ``R <= C`` every row then holds exactly ``a = min(n, C)`` and every column at most ``n``;
with ``R > C`` the two change places; a square block has both exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "blocks_of",
    "check_block",
    "check_mask_counts",
    "completed_greedy",
    "distributions",
    "dual_value",
    "highs",
    "kept_score",
    "line_limits",
    "min_cost_flow",
    "sample",
    "sequential_greedy",
]


def _array(scores: object) -> np.ndarray:
    """``scores`` as a float64 NumPy array (exact for every dtype that nmsolve takes)."""
    if isinstance(scores, Tensor):
        return scores.detach().to(torch.float64).numpy()
    return np.asarray(scores, dtype=np.float64)


def line_limits(rows: int, cols: int, n: int) -> tuple[int, int, int]:
    """(most kept in a row, most kept in a column, kept in all) at the largest cardinality."""
    exact = min(n, max(rows, cols))
    if rows == cols:
        return exact, exact, exact * rows
    return (exact, n, exact * rows) if rows < cols else (n, exact, exact * cols)


def min_cost_flow(scores: object, n: int) -> float:
    """The largest kept score of an ``(R, C)`` block, by OR-tools' min-cost flow on 40-bit integers."""
    from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

    a = _array(scores)
    if a.size == 0 or n == 0:
        return 0.0
    if a.shape[0] > a.shape[1]:
        a = a.T
    rows, cols = a.shape
    _, _, total = line_limits(rows, cols, n)
    largest = np.abs(a).max()
    cost = np.rint((a.max() - a) / (largest if largest > 0 else 1.0) * 2.0**40).astype(np.int64)
    flow = SimpleMinCostFlow()
    tails, heads = np.indices(a.shape).reshape(2, -1)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(tails, heads + rows, np.ones(a.size), cost.ravel())
    sink = rows + cols
    flow.add_arcs_with_capacity_and_unit_cost(
        np.arange(rows, sink), np.full(cols, sink), np.full(cols, n), np.zeros(cols, np.int64)
    )
    flow.set_nodes_supplies(np.arange(rows), np.full(rows, total // rows))
    flow.set_nodes_supplies(np.array([sink]), np.array([-total]))
    status = flow.solve()
    assert status == flow.OPTIMAL, status
    return float(a.ravel()[np.asarray(flow.flows(arcs)) > 0].sum())


def highs(scores: object, n: int) -> float:
    """The optimum of the linear program of an ``(R, C)`` block, by HiGHS through SciPy."""
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron

    a = _array(scores)
    if a.size == 0 or n == 0:
        return 0.0
    if a.shape[0] > a.shape[1]:
        a = a.T
    rows, cols = a.shape
    exact, _, _ = line_limits(rows, cols, n)
    scale = np.abs(a).max() or 1.0
    row_sums = csr_array(kron(eye_array(rows), np.ones((1, cols))))
    col_sums = csr_array(kron(np.ones((1, rows)), eye_array(cols)))
    result = linprog(
        -(a / scale).ravel(),
        A_ub=col_sums,
        b_ub=np.full(cols, n),
        A_eq=row_sums,
        b_eq=np.full(rows, exact),
        bounds=(0, 1),
        method="highs",
    )
    assert result.status == 0, result.message
    return float(-result.fun * scale)


def sequential_greedy(scores: object, n: int) -> np.ndarray:
    """The mask of the greedy as it is published: entries by falling score, ties by row-major index."""
    a = _array(scores)
    rows, cols = a.shape
    mask = np.zeros(a.shape, dtype=bool)
    in_row, in_col = [0] * rows, [0] * cols
    for index in np.argsort(-a.ravel(), kind="stable"):
        i, j = divmod(int(index), cols)
        if in_row[i] < n and in_col[j] < n:
            mask[i, j] = True
            in_row[i] += 1
            in_col[j] += 1
    return mask


def completed_greedy(scores: object, n: int, dtype: type[np.floating] = np.float32) -> np.ndarray:
    """:func:`sequential_greedy`, then one best move per missing entry, gains evaluated in ``dtype``."""
    mask = sequential_greedy(scores, n)
    a = _array(scores).astype(dtype)
    if a.shape[0] > a.shape[1]:
        return _complete(mask.T.copy(), a.T, n).T
    return _complete(mask, a, n)


def _complete(mask: np.ndarray, a: np.ndarray, n: int) -> np.ndarray:
    rows, cols = a.shape
    exact, _, _ = line_limits(rows, cols, n)
    while (short := np.flatnonzero(mask.sum(1) < exact)).size:
        i = int(short[0])
        open_cols = [int(j) for j in np.flatnonzero(mask.sum(0) < n)]
        moves = [(-a[i, j], 0, 0, j, 0) for j in open_cols if not mask[i, j]]
        for row in range(rows):
            places = [j for j in open_cols if not mask[row, j]]
            if row == i or not places:
                continue
            j = max(places, key=lambda place, row=row: (a[row, place], -place))
            for j_kept in np.flatnonzero(mask[row] & ~mask[i]):
                gain = (a[i, j_kept] - a[row, j_kept]) + a[row, j]
                moves.append((-gain, 1, row, int(j_kept), j))
        _, swap, row, j_kept, j = min(moves)
        mask[i, j_kept] = True
        if swap:
            mask[row, j_kept] = False
            mask[row, j] = True
    return mask


def kept_score(scores: object, mask: object) -> float:
    """The float64 sum of the scores that ``mask`` keeps."""
    return float(_array(scores)[np.asarray(mask, dtype=bool)].sum())


def dual_value(scores: object, row_duals: object, col_duals: object, n: int) -> float:
    """The upper bound that any duals give on the kept score of an ``(R, C)`` block, in float64.

    Checks that the duals of lines which may hold fewer than ``n`` are not negative: without that the value
    would bound nothing.
    """
    a, u, v = _array(scores), _array(row_duals), _array(col_duals)
    rows, cols = a.shape
    in_row, in_col, _ = line_limits(rows, cols, n)
    u, v = u[:rows], v[:cols]
    if rows < cols:
        assert (v >= 0).all(), v
    if rows > cols:
        assert (u >= 0).all(), u
    surplus = np.maximum(0.0, a - u[:, None] - v[None, :]).sum()
    return float(in_row * u.sum() + in_col * v.sum() + surplus)


def blocks_of(matrix: Tensor, m: int) -> Iterator[tuple[int, int, Tensor]]:
    """(block row, block column, the block) of a 2-D ``matrix`` tiled from its top-left corner."""
    for i in range(0, matrix.shape[0], m):
        for j in range(0, matrix.shape[1], m):
            yield i // m, j // m, matrix[i : i + m, j : j + m]


def check_block(mask: object, n: int) -> None:
    """Assert that the mask of one block has the largest cardinality and at most ``n`` on any line."""
    kept = np.asarray(mask, dtype=bool)
    in_row, in_col, total = line_limits(*kept.shape, n)
    assert kept.sum() == total, (kept.sum(), total)
    assert (kept.sum(1) <= in_row).all(), kept.sum(1)
    assert (kept.sum(0) <= in_col).all(), kept.sum(0)


def check_mask_counts(mask: Tensor, n: int, m: int) -> None:
    """:func:`check_block` on every block of a ``(batch, rows, cols)`` mask; the full blocks at once."""
    batch, rows, cols = mask.shape
    full_rows, full_cols = rows // m * m, cols // m * m
    if full_rows and full_cols:
        body = mask[:, :full_rows, :full_cols].reshape(batch, full_rows // m, m, full_cols // m, m)
        assert (body.sum(2) == n).all()
        assert (body.sum(4) == n).all()
    for matrix in mask:
        for i, j, block in blocks_of(matrix, m):
            if block.shape != (m, m):
                try:
                    check_block(block, n)
                except AssertionError as error:
                    raise AssertionError(f"block ({i}, {j})") from error


def _student_t(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """|t| with 1.5 degrees of freedom, by its defining quotient: torch's sampler takes no generator."""
    chi2 = 2 * torch.from_numpy(np.random.default_rng(g.initial_seed()).gamma(0.75, size=shape)).float()
    return (torch.randn(shape, generator=g) / (chi2 / 1.5).sqrt().clamp_min(1e-12)).abs()


def _outliers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    scores = torch.randn(shape, generator=g).abs()
    scores[..., :1] *= 50
    scores[..., 1:2, :] *= 0.01
    scores[..., 2:3, :] *= 300
    return scores


distributions: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g).abs(),
    "uniform": lambda shape, g: torch.rand(shape, generator=g),
    "signed": lambda shape, g: torch.randn(shape, generator=g),
    "student_t": _student_t,
    "lognormal": lambda shape, g: torch.randn(shape, generator=g).mul(3).exp(),
    "ties": lambda shape, g: torch.randint(0, 8, shape, generator=g).float(),
    "bfloat16_ties": lambda shape, g: torch.randn(shape, generator=g).abs().bfloat16().float(),
    "constant": lambda shape, g: torch.full(shape, 0.37),
    "zero": lambda shape, g: torch.zeros(shape),
    "negative": lambda shape, g: -torch.randn(shape, generator=g).abs() - 1,
    "outlier_lines": _outliers,
    "wanda": lambda shape, g: (
        torch.randn(shape, generator=g).abs() * torch.randn((*shape[:-2], 1, shape[-1]), generator=g).exp()
    ),
    "tiny": lambda shape, g: torch.randn(shape, generator=g) * 1e-30,
    "huge": lambda shape, g: torch.randn(shape, generator=g) * 1e30,
}
"""Name -> sampler of float32 scores of a shape ``(..., rows, cols)``."""


def sample(name: str, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Scores of the distribution ``name``, the same for the same arguments, rounded to ``dtype``."""
    scores = distributions[name](tuple(shape), torch.Generator().manual_seed(seed))
    if dtype == torch.float16:
        scores = scores.clamp(-65504, 65504)
    return scores.to(dtype)
