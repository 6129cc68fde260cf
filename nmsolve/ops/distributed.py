"""DTensors: matrices spread over several processes, solved shard by shard without communication.

A shard can be solved alone where it consists of whole blocks: where the borders between shards fall on
multiples of m along every dimension that is tiled. Which process holds which indices follows from the global
shape, the mesh and the placements, so every process decides alone and they all decide the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError

__all__ = [
    "Sharding",
    "agree_over_mesh",
    "from_shards",
    "is_dtensor",
    "on_shards",
    "shard_of",
    "sharding_of",
    "spread_like",
    "whole_of",
]

# Consecutive global indices [start, stop) of one dimension.
Span = tuple[int, int]


@dataclass(frozen=True)
class Sharding:
    """Where a DTensor's shards lie: its mesh, and one placement per mesh dimension."""

    mesh: Any
    placements: tuple[Any, ...]

    @property
    def place(self) -> str:
        """What an error says of this process's shard."""
        return f"in the shard {tuple(self.mesh.get_coordinate())} of the mesh"


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Whether ``value`` is a DTensor; does not import them, for who has one has imported them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def sharding_of(tensor: Tensor, m: int, tiled: Sequence[int], name: str = "scores") -> Sharding | None:
    """The sharding of a DTensor whose shards hold whole groups of m along the ``tiled`` dimensions.

    None for an ordinary tensor.

    Raises
    ------
    NMSolveError
        If a placement is partial, or a border between shards falls inside a group.
    """
    if not is_dtensor(tensor):
        return None
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    for mesh_dim, placement in enumerate(placements):
        if placement.is_partial() or not (
            placement.is_replicate() or getattr(placement, "dim", None) is not None
        ):
            raise NMSolveError(
                f"{name}: expected a sharded or replicated DTensor, got {placement!r} on "
                f"{_mesh_dim(mesh, mesh_dim)}; {name}.redistribute(placements=...) sums it up first"
            )
    dims = [dim % tensor.ndim for dim in tiled]
    sizes = [mesh.size(mesh_dim) for mesh_dim in range(len(placements))]
    fault = _fault(tensor.shape, sizes, placements, m, dims)
    if fault is not None:
        dim, mesh_dim, border = fault
        remedy = _remedy(tensor.shape, sizes, placements, m, dims, mesh_dim)
        raise NMSolveError(
            f"{name}: dimension {dim} of size {tensor.shape[dim]} is sharded over "
            f"{_mesh_dim(mesh, mesh_dim)} of size {sizes[mesh_dim]} with a border at {border}, "
            f"which is not a multiple of m={m}; {name}.redistribute(placements={remedy}) would do"
        )
    return Sharding(mesh, placements)


def _mesh_dim(mesh: Any, mesh_dim: int) -> str:
    names = mesh.mesh_dim_names
    return f"mesh dimension {mesh_dim}" + (f" ({names[mesh_dim]!r})" if names else "")


# --- which indices a process holds --------------------------------------------------------------------------


def _fault(
    shape: Sequence[int], sizes: Sequence[int], placements: Sequence[Any], m: int, dims: Sequence[int]
) -> tuple[int, int, int] | None:
    """The first tensor dimension, mesh dimension and index where a border between shards splits a group."""
    for dim in dims:
        shards: list[list[Span]] = [[(0, shape[dim])]]
        for mesh_dim, placement in enumerate(placements):
            if getattr(placement, "dim", None) != dim:
                continue
            factor = getattr(placement, "split_factor", 1)
            shards = [part for spans in shards for part in _split(spans, sizes[mesh_dim], factor)]
            for spans in shards:
                for border in (end for span in spans for end in span):
                    if border % m and border != shape[dim]:
                        return dim, mesh_dim, border
    return None


def _split(spans: list[Span], count: int, factor: int) -> list[list[Span]]:
    """The shards of a placement over ``count`` processes.

    ``Shard`` (factor 1) cuts like ``torch.chunk``. ``_StridedShard``, which FSDP2 makes over tensor parallel
    shards, cuts into ``factor`` chunks, each of them into ``count``, and gives process i the i-th of each.
    """
    chunks = [_chunk(part, count) for part in _chunk(spans, factor)]
    return [_joined([span for parts in chunks for span in parts[i]]) for i in range(count)]


def _chunk(spans: list[Span], count: int) -> list[list[Span]]:
    step = -(-sum(stop - start for start, stop in spans) // count)
    chunks = []
    for low in range(0, step * count, step) if step else [0] * count:
        part, before = [], 0
        for start, stop in spans:
            first, last = max(start, start + low - before), min(stop, start + low + step - before)
            if first < last:
                part.append((first, last))
            before += stop - start
        chunks.append(part)
    return chunks


def _joined(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined


def _remedy(
    shape: Sequence[int],
    sizes: Sequence[int],
    placements: Sequence[Any],
    m: int,
    dims: Sequence[int],
    mesh_dim: int,
) -> list[Any]:
    """Placements without a fault that keep as much of the sharding as a change of one of them can."""
    from torch.distributed.tensor import Replicate, Shard

    if not any(hasattr(placement, "split_factor") for placement in placements):
        for other in [*(Shard(dim) for dim in range(len(shape)) if shape[dim] > 1), Replicate()]:
            changed = [*placements[:mesh_dim], other, *placements[mesh_dim + 1 :]]
            if _fault(shape, sizes, changed, m, dims) is None:
                return changed
    return [Replicate()] * len(placements)


# --- to shards and back -------------------------------------------------------------------------------------


def shard_of(tensor: Tensor) -> Tensor:
    """The shard that this process holds, or the tensor itself; without its history.

    A process outside the mesh holds an empty one.
    """
    if not is_dtensor(tensor):
        return tensor.detach()
    shard = tensor.to_local().detach()
    return shard if shard.ndim == tensor.ndim else shard.new_empty((0,) * tensor.ndim)


def from_shards(
    sharding: Sharding | None, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]], inner: int = -1
) -> list[Tensor]:
    """DTensors of the given global shapes from the shards that this process computed.

    ``inner`` is the dimension in which the shards' elements lie side by side. Shards of a tensor that was
    not spread are returned as they are.
    """
    if sharding is None:
        return list(parts)
    from torch.distributed.tensor import DTensor

    return [
        DTensor.from_local(
            part,
            sharding.mesh,
            sharding.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=_strides(shape, inner),
        )
        for part, shape in zip(parts, shapes, strict=True)
    ]


def _strides(shape: Sequence[int], inner: int) -> tuple[int, ...]:
    strides, step = [0] * len(shape), 1
    outer = [dim for dim in range(len(shape)) if dim != inner % len(shape)]
    for dim in [inner % len(shape), *reversed(outer)]:
        strides[dim] = step
        step *= max(1, shape[dim])
    return tuple(strides)


def whole_of(tensor: Tensor) -> Tensor:
    """All of a DTensor, or the tensor itself. Communicates.

    Raises
    ------
    NMSolveError
        Where PyTorch gathers it wrongly: 2.9 does so with uneven shards of FSDP2 over tensor parallelism.
    """
    if not is_dtensor(tensor):
        return tensor
    _check_moves(tensor)
    whole: Tensor = tensor.full_tensor()
    return whole


def _check_moves(tensor: Any) -> None:
    strided = {place.dim for place in tensor.placements if hasattr(place, "split_factor")}
    if not strided or not torch.__version__.startswith("2.9."):
        return
    for dim in strided:
        sizes = [
            tensor.device_mesh.size(k)
            for k, place in enumerate(tensor.placements)
            if getattr(place, "dim", None) == dim
        ]
        if tensor.shape[dim] % (parts := math.prod(sizes)):
            raise NMSolveError(
                f"PyTorch {torch.__version__} mixes up the rows of uneven shards of FSDP2 over tensor "
                f"parallelism as it gathers them (dimension {dim} of size {tensor.shape[dim]} in {parts} "
                "parts); 2.10 does not"
            )


def spread_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that every process has whole, or that lies otherwise, spread as ``tensor`` of its shape is.

    Communicates where ``whole`` is a DTensor that lies otherwise; all have to call it then.
    """
    if not is_dtensor(tensor):
        return whole_of(whole).to(tensor.device)
    if is_dtensor(whole):
        if whole.device_mesh == tensor.device_mesh and tuple(whole.placements) == tuple(tensor.placements):
            return whole
        whole = whole_of(whole)
    _check_moves(tensor)
    from torch.distributed.tensor import DTensor, Replicate

    mesh, on_device = tensor.device_mesh, whole.to(shard_of(tensor).device)
    replicated = DTensor.from_local(on_device, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=tensor.placements)


def on_shards(operator: Callable[..., Any], shardings: Sequence[Sharding | None], *args: Any) -> Any:
    """The operator on shards; an error in their values says that it was found in this process's shard."""
    where = [sharding for sharding in shardings if sharding is not None]
    if not where:
        return operator(*args)
    try:
        return operator(*args)
    except NMSolveError as error:
        raise type(error)(f"{error}, {where[0].place}") from error


def agree_over_mesh(sharding: Sharding, message: str | None) -> str | None:
    """The first message that any process of the mesh has, on all of them. Communicates."""
    from torch import distributed

    if sharding.mesh.get_coordinate() is None:
        return message
    for mesh_dim in range(sharding.mesh.ndim):
        messages: list[Any] = [None] * sharding.mesh.size(mesh_dim)
        distributed.all_gather_object(messages, message, group=sharding.mesh.get_group(mesh_dim))
        message = next((found for found in messages if found is not None), None)
    return message
