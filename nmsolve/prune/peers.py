"""The processes that hold a model together: FSDP2 (``fully_shard``), each with its share of the calibration.

Every process runs its own batches and sums what was measured with the others. A layer to prune is gathered
and solved whole by one of them, in turn, which tells the others the result, and each writes the rows that it
holds. A layer is gathered for its forward pass anyhow, so that this takes no more memory; it lets shards end
at any row, and what methods decide over a whole layer is what one process would decide.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError, WorkFailed, one_line
from nmsolve.ops.distributed import is_dtensor

__all__ = ["Peers", "peers_of"]

_REPLICAS = {
    "DistributedDataParallel": "prune model.module, in one process, before it is wrapped",
    "FullyShardedDataParallel": "FSDP1 keeps weights flat; shard with fully_shard (FSDP2)",
}


class Peers:
    """Those that hold ``model``; one process alone where nothing is sharded.

    Attributes
    ----------
    rank, count : int
    sharded : bool
        Whether modules are sharded, be it over one process.
    """

    def __init__(self, sharded: Sequence[Any] = ()) -> None:
        self._modules = list(sharded)
        self.sharded = bool(self._modules)
        self.rank, self.count = 0, 1
        if self.sharded:
            self.rank, self.count = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def reshard(self) -> None:
        """Lets go of gathered weights: the parameters are shards again, and what is written there counts."""
        for module in self._modules:
            module.reshard()

    def gather(self, value: Any) -> list[Any]:
        """What each process gives, by rank."""
        if self.count == 1:
            return [value]
        found = [None] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What one process raises in the block, all raise at its end, with its rank.

        The block waits for no other process.
        """
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            problem = error
        told = None
        if problem is not None:
            ours = isinstance(problem, NMSolveError)
            text = str(problem) if ours else f"{type(problem).__name__}: {one_line(problem)}"
            told = (ours and not isinstance(problem, WorkFailed), text)
        everyone = self.gather(told)
        wrong = {rank: said for rank, said in enumerate(everyone) if said is not None}
        if not wrong:
            return
        texts = {text for _, text in wrong.values()}
        rank, (argument, text) = next(iter(wrong.items()))
        if len(wrong) < self.count or len(texts) > 1:  # else it is the same everywhere
            text = f"rank {rank} of {self.count}: {text}"
        raise (NMSolveError if argument else WorkFailed)(text) from problem

    def same(self, value: Any, message: str) -> None:
        """Raises NMSolveError with the message unless all give the same."""
        given = self.gather(value)
        other = next((rank for rank, found in enumerate(given) if found != given[0]), None)
        if other is not None:
            raise NMSolveError(f"{message} (ranks 0 and {other} differ)")

    def sum_(self, tensor: Tensor) -> None:
        """The sum over all, in place."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)

    def tell(self, value: Any, source: int) -> Any:
        """What ``source`` gives, to all."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=source)
        return box[0]

    def tell_tensor(self, tensor: Tensor | None, like: Tensor, dtype: torch.dtype, source: int) -> Tensor:
        """The tensor of ``source``, of the shape of ``like``, to all."""
        if tensor is None:
            tensor = torch.empty(like.shape, dtype=dtype, device=like.device)
        sent = tensor.contiguous()
        torch.distributed.broadcast(sent.view(torch.uint8) if dtype == torch.bool else sent, src=source)
        return sent

    @staticmethod
    def whole(weight: Tensor) -> Tensor:
        """A weight as one tensor; all ask for it at once."""
        weight = weight.detach()
        return weight.full_tensor() if is_dtensor(weight) else weight

    @staticmethod
    def held(weight: Tensor) -> Tensor:
        """What of a weight is here, to be written to."""
        weight = weight.data
        return weight.to_local() if is_dtensor(weight) else weight

    @staticmethod
    def part(whole: Tensor, weight: Tensor) -> Tensor:
        """What of a tensor in the shape of ``weight`` lies where :meth:`held` of that does."""
        if not is_dtensor(weight):
            return whole
        from torch.distributed.tensor import distribute_tensor

        place = weight.device_mesh, weight.placements
        return distribute_tensor(whole.to(weight.device), *place, src_data_rank=None).to_local()


def peers_of(model: nn.Module) -> Peers:
    """Who holds a model.

    Raises
    ------
    NMSolveError
        If it is wrapped or sharded by something other than ``fully_shard``, or not over all processes.
    """
    for module in model.modules():
        of_torch = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        for kind, advice in _REPLICAS.items():
            if kind in of_torch:
                raise NMSolveError(f"model: {kind}: {advice}")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    peers = Peers(sharded)
    peers.reshard()
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            _check_spread(name, parameter, peers)
        elif sharded and parameter.is_meta:
            raise NMSolveError(f"model: {name} is on no device yet; load its weights first")
    return peers


def _check_spread(name: str, parameter: Any, peers: Peers) -> None:
    placements, mesh = parameter.placements, parameter.device_mesh
    kinds = [type(placement).__name__ for placement in placements]
    if not peers.sharded or set(kinds) - {"Shard", "Replicate"} or kinds.count("Shard") > 1:
        raise NMSolveError(
            f"model: {name} is a DTensor with placements {tuple(placements)}; expected those of fully_shard "
            "alone, along one dimension of the mesh"
        )
    if mesh.size() != peers.count:
        raise NMSolveError(
            f"model: {name} is spread over {mesh.size()} of {peers.count} processes; expected all of them"
        )
    if parameter.is_meta:
        raise NMSolveError(f"model: {name} is on no device yet; load its weights first")
    if parameter.device.type != mesh.device_type:
        raise NMSolveError(
            f"model: {name} is offloaded to the {parameter.device.type} (CPUOffloadPolicy); shard without it"
        )
