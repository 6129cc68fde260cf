"""Masks as bits that can be spread over processes, the same whatever their number.

Of a mask ``(rows, cols)`` a byte holds ``unit`` entries of a row, the first in the lowest bit: uint8
``(rows, ceil(cols / unit))``. Borders between shards fall on multiples of M, so that with a unit that divides
M none splits a byte, and the packed mask is a DTensor with the weight's placements, which
torch.distributed.checkpoint can cut anew for another number of processes. The mask ``(rows, cols, ...)`` of a
convolution is packed along its kernel positions, 8 in a byte: ``(rows, cols, ceil(positions / 8))``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import from_shards, is_dtensor, shard_of, sharding_of, spread_like, whole_of

__all__ = ["pack_mask", "unpack_mask"]


def pack_mask(mask: Tensor, weight: Tensor, unit: int) -> Tensor:
    """The packed mask of a weight, whose shard (or all of it) ``mask`` is, spread like the weight."""
    packed = _packed(mask, unit)
    if not is_dtensor(weight):
        return packed
    return from_shards(sharding_of(weight, 1, [0]), [packed], [_packed_shape(weight.shape, unit)])[0]


def unpack_mask(stored: object, name: str, weight: Tensor, unit: int) -> Tensor:
    """The bool shard of this process (or all of it) of what :func:`pack_mask` made, on the weight's device.

    Raises
    ------
    NMSolveError
        If ``stored`` is no mask of the weight's shape.
    """
    shape = _packed_shape(weight.shape, unit)
    if not isinstance(stored, Tensor) or (stored.dtype, tuple(stored.shape)) != (torch.uint8, shape):
        got = f"{tuple(stored.shape)} {stored.dtype}" if isinstance(stored, Tensor) else type(stored).__name__
        raise NMSolveError(
            f"state: {name}: expected a packed mask of shape {shape} uint8 for a weight of shape "
            f"{tuple(weight.shape)}, got {got}"
        )
    local = shard_of(weight)
    if is_dtensor(weight) and is_dtensor(stored) and tuple(stored.placements) == tuple(weight.placements):
        return _unpacked(shard_of(stored), local.shape, unit).to(local.device)
    whole = whole_of(stored)
    return shard_of(spread_like(_unpacked(whole, weight.shape, unit), weight))


def _packed_shape(shape: Sequence[int], unit: int) -> tuple[int, ...]:
    if len(shape) == 2:
        return shape[0], -(-shape[1] // unit)
    return shape[0], shape[1], -(-math.prod(shape[2:]) // 8)


def _packed(mask: Tensor, unit: int) -> Tensor:
    if mask.ndim > 2:
        mask, unit = mask.flatten(2), 8
    bits = torch.nn.functional.pad(mask.cpu(), (0, -mask.shape[-1] % unit)).unflatten(-1, (-1, unit)).numpy()
    return torch.from_numpy(np.packbits(bits, axis=-1, bitorder="little")).squeeze(-1).to(mask.device)


def _unpacked(packed: Tensor, shape: Sequence[int], unit: int) -> Tensor:
    if len(shape) > 2:
        unit = 8
    last = math.prod(shape[2:]) if len(shape) > 2 else shape[1]
    bits = np.unpackbits(packed.cpu().numpy()[..., None], axis=-1, count=unit, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).flatten(-2)[..., :last].reshape(tuple(shape))
