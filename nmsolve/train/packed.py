"""Masks as bits that can be spread over processes: every row of a weight is packed by itself.

A mask ``(rows, ...)`` is flattened to ``(rows, cols)`` and packed to ``(rows, ceil(cols / 8))`` uint8, the
first entry in the lowest bit. Rows stay rows, so that a sharded weight's mask is a DTensor with the weight's
placements, and torch.distributed.checkpoint can cut it anew for another number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import from_shards, is_dtensor, shard_of, sharding_of

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(mask: Tensor, weight: Tensor) -> Tensor:
    """The packed mask of a weight, whose shard (or all of it) ``mask`` is, spread like the weight.

    Where a border between shards splits a byte, the mask stays bool.
    """
    if not is_dtensor(weight):
        return _packed(mask)
    sharding = sharding_of(weight, 1, [0])
    if _splits_bytes(weight):
        return from_shards(sharding, [mask.clone()], [weight.shape])[0]
    return from_shards(sharding, [_packed(mask)], [_packed_shape(weight.shape)])[0]


def unpack_rows(stored: object, name: str, weight: Tensor) -> Tensor:
    """The bool shard of this process (or all of it) of what :func:`pack_rows` made, on the weight's device.

    Raises
    ------
    NMSolveError
        If ``stored`` is no mask of the weight's shape.
    """
    packed_shape = _packed_shape(weight.shape)
    if not isinstance(stored, Tensor) or (stored.dtype, tuple(stored.shape)) not in (
        (torch.uint8, packed_shape),
        (torch.bool, tuple(weight.shape)),
    ):
        got = f"{tuple(stored.shape)} {stored.dtype}" if isinstance(stored, Tensor) else type(stored).__name__
        raise NMSolveError(
            f"state: {name}: expected a packed mask of shape {packed_shape} uint8 for a weight of shape "
            f"{tuple(weight.shape)}, got {got}"
        )
    if is_dtensor(weight):
        spread = is_dtensor(stored) and tuple(stored.placements) == tuple(weight.placements)
        if not spread or (stored.dtype == torch.uint8 and _splits_bytes(weight)):
            return _cut(stored, weight)
        own = shard_of(stored)
        shape = shard_of(weight).shape
    else:
        own = stored.full_tensor() if is_dtensor(stored) else stored
        shape = weight.shape
    return (own if own.dtype == torch.bool else _unpacked(own, shape)).to(shard_of(weight).device)


def _cut(stored: Tensor, weight: Tensor) -> Tensor:
    """This process's shard of a mask that is there as a whole, or lies otherwise than the weight."""
    from torch.distributed.tensor import DTensor, Replicate

    whole = stored.full_tensor() if is_dtensor(stored) else stored
    if whole.dtype != torch.bool:
        whole = _unpacked(whole, weight.shape)
    assert is_dtensor(weight)
    whole = whole.to(shard_of(weight).device)
    mesh = weight.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=weight.placements).to_local()


def _packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    return shape[0], -(-math.prod(shape[1:]) // 8)


def _packed(mask: Tensor) -> Tensor:
    bits = mask.cpu().flatten(1).numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little")).to(mask.device)


def _unpacked(packed: Tensor, shape: Sequence[int]) -> Tensor:
    bits = np.unpackbits(packed.cpu().numpy(), axis=1, count=math.prod(shape[1:]), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).reshape(tuple(shape))


def _splits_bytes(weight: Tensor) -> bool:
    """Whether a border between shards falls inside a byte of a packed row."""
    assert is_dtensor(weight)
    if weight.ndim > 2:
        return any(getattr(placement, "dim", 0) > 0 for placement in weight.placements)
    try:
        sharding_of(weight, 8, [1])
    except NMSolveError:
        return True
    return False
