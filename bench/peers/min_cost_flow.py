"""Transposable masks by OR-tools' min-cost flow, the optimal baseline of Hubara et al. (NeurIPS 2021).

Every row is a source of n units and every column a sink of n; the arc from row i to column j holds one unit
and costs ``max(A) - A_ij`` on an integer scale. Arcs are handed over as arrays: adding them one by one from
Python takes longer than the solver.
"""

from __future__ import annotations

import numpy as np
from ortools.graph.python.min_cost_flow import SimpleMinCostFlow

BITS = 40


class MinCostFlow:
    """Solver of ``(k, m, m)`` blocks at a time, ``k`` blocks side by side in one graph."""

    def __init__(self, n: int, m: int, k: int = 1) -> None:
        row = 2 * m * np.arange(k)[:, None, None] + np.arange(m)[:, None]
        col = 2 * m * np.arange(k)[:, None, None] + m + np.arange(m)
        self.tails = np.broadcast_to(row, (k, m, m)).ravel().astype(np.int32)
        self.heads = np.broadcast_to(col, (k, m, m)).ravel().astype(np.int32)
        self.capacities = np.ones(k * m * m, np.int64)
        self.nodes = np.arange(2 * m * k, dtype=np.int32)
        self.supplies = np.tile(np.repeat([n, -n], m), k).astype(np.int64)

    def solve(self, costs: np.ndarray) -> np.ndarray:
        """The optimal bool mask of ``(k, m, m)`` integer costs."""
        flow = SimpleMinCostFlow()
        arcs = flow.add_arcs_with_capacity_and_unit_cost(
            self.tails, self.heads, self.capacities, costs.ravel()
        )
        flow.set_nodes_supplies(self.nodes, self.supplies)
        status = flow.solve()
        if status != flow.OPTIMAL:
            raise RuntimeError(f"min-cost flow ended with {status}")
        return np.asarray(flow.flows(arcs)).reshape(costs.shape) > 0


def integer_costs(blocks: np.ndarray) -> np.ndarray:
    """float64 ``(B, m, m)`` scores as costs from 0 to at most 2**41, with a scale for each block."""
    peak = np.abs(blocks).max((1, 2), keepdims=True)
    scaled = blocks / np.where(peak > 0, peak, 1.0)
    return np.rint((scaled.max((1, 2), keepdims=True) - scaled) * 2.0**BITS).astype(np.int64)


def optimal_masks(blocks: np.ndarray, n: int, together: int = 1) -> np.ndarray:
    """Optimal masks of float64 ``(B, m, m)`` scores, ``together`` blocks a graph."""
    costs, m = integer_costs(blocks), blocks.shape[1]
    solver = MinCostFlow(n, m, together)
    whole = len(blocks) // together * together
    masks = [solver.solve(costs[k : k + together]) for k in range(0, whole, together)]
    if whole < len(blocks):
        masks.append(MinCostFlow(n, m, len(blocks) - whole).solve(costs[whole:]))
    return np.concatenate(masks) if masks else np.zeros(blocks.shape, bool)
