"""The Triton backend of hierarchical masks: order and prices by PyTorch, the search in one launch."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from nmsolve.backends.strip_bounds import bounds_of, priced
from nmsolve.backends.triton import masks as gpu
from nmsolve.kernels import _launch
from nmsolve.kernels.strips import strips_kernel

__all__ = ["best_columns", "strip_tile"]

# Entries of a block that a lane holds: fewer in the largest blocks, whose lanes would spill.
_ENTRIES = 64
_ENTRIES_OF_LARGE = 32

# A search that makes more passes takes hours.
_MOST_PASSES = 2**31 - 1


def strip_tile(v: int, m: int, k: int, *, amd: bool = torch.version.hip is not None) -> dict[str, int]:
    """The kernel's constexpr arguments: a block in registers, of as many warps as hold it.

    ``maxnreg`` as in ``masks.tile_arguments``.

    Examples
    --------
    >>> strip_tile(64, 20, 4)["COLUMNS"], strip_tile(64, 20, 4)["num_warps"]
    (32, 1)
    """
    rows, columns = triton.next_power_of_2(v), triton.next_power_of_2(m)
    listed = triton.next_power_of_2(k)
    entries = rows * max(columns, 4 * listed)
    warps = max(1, entries // (32 * (_ENTRIES if entries <= 4096 or amd else _ENTRIES_OF_LARGE)))
    return ({} if amd else {"maxnreg": 255}) | {
        "ROWS": rows,
        "COLUMNS": columns,
        "LISTED": listed,
        **_launch.options(warps),
    }


def best_columns(columns: Tensor, n: int, k: int, limit: int) -> tuple[Tensor, Tensor]:
    """As the reference's ``best_columns``, of blocks of at most 64 columns."""
    batch, m, v = columns.shape
    prices, worth = priced(columns, n, k)
    worth, order = worth.sort(dim=1, descending=True, stable=True)
    exponent = torch.frexp(columns.abs().amax((1, 2))).exponent
    ranked = _scaled(columns.gather(1, order.unsqueeze(2).expand_as(columns)), exponent)
    # Up to k sums of v differences, each below twice the largest number of its row.
    margin = 2 * k * (v + 4) * 2.0**-24 * ranked.abs().amax(1).sum(1)
    ranks = torch.empty(batch, k, dtype=torch.int64, device=columns.device)
    done = torch.empty(batch, dtype=torch.int8, device=columns.device)
    with gpu.device_of(columns):
        strips_kernel[(batch,)](
            columns_ptr=ranked,
            sums_ptr=torch.nn.functional.pad(_scaled(worth, exponent).cumsum(1), (1, 0)),
            base_ptr=_scaled(n * prices.sum(1), exponent),
            margin_ptr=margin,
            chosen_ptr=ranks,
            done_ptr=done,
            n=n,
            m=m,
            v=v,
            k=k,
            limit=min(limit, _MOST_PASSES) if math.comb(m, n) <= limit else -1,
            **strip_tile(v, m, k),
        )
    chosen = order.gather(1, ranks).sort(dim=1).values
    return chosen, bounds_of(columns, n, chosen, prices, done.bool())


def _scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """Divided by the powers of two ``(B,)``, in two steps as neither need be a number alone."""
    exponent = exponent.view(-1, *[1] * (x.ndim - 1))
    half = exponent // 2
    return torch.ldexp(torch.ldexp(x, -half), half - exponent)
