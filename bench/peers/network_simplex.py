"""Transposable masks by networkx' network simplex, one graph a block.

The formulation of Hubara, Chmiel, Island, Banner, Naor, Soudry: Accelerated Sparse Neural Training (NeurIPS
2021, arXiv 2102.08124): every row sends n units, every column takes n, an arc carries one. The
method loses its way with costs that are floats, as its documentation says, and may never end; scores become
integers here. In that this program of ours is better than the published one, which hands it floats.
"""

from __future__ import annotations

import networkx
import numpy as np
from peers.min_cost_flow import integer_costs


def network_simplex(blocks: np.ndarray, n: int) -> np.ndarray:
    """Optimal bool masks of float64 ``(B, m, m)`` scores."""
    m = blocks.shape[1]
    masks = np.zeros(blocks.shape, bool)
    for mask, costs in zip(masks, integer_costs(blocks).tolist(), strict=True):
        graph = networkx.DiGraph()
        graph.add_nodes_from((i, {"demand": -n}) for i in range(m))
        graph.add_nodes_from((m + j, {"demand": n}) for j in range(m))
        graph.add_edges_from(
            (i, m + j, {"capacity": 1, "weight": costs[i][j]}) for i in range(m) for j in range(m)
        )
        _, flow = networkx.network_simplex(graph)
        mask[:] = [[flow[i][m + j] > 0 for j in range(m)] for i in range(m)]
    return masks
