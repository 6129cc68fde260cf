"""The Numba backend of hierarchical masks: blocks shared out over threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from nmsolve.backends.cpu._numba.strips import search_columns
from nmsolve.backends.cpu._numba.threads import share_out

__all__ = ["best_columns"]


def best_columns(columns: Tensor, n: int, k: int, limit: int) -> tuple[Tensor, Tensor]:
    """As the reference's ``best_columns``."""
    batch, m, v = columns.shape
    chosen = torch.empty(batch, k, dtype=torch.int64)
    bounds = torch.empty(batch, dtype=torch.float64)
    blocks = columns.detach().contiguous().numpy()
    search = partial(search_columns, blocks, n, limit, chosen.numpy(), bounds.numpy())
    # A search looks at a block dozens of times.
    share_out(search, batch, 16 * m * v, torch.get_num_threads())
    return chosen, bounds
