"""The processes that prune a model together, each with its share of the calibration: those that FSDP2
(``fully_shard``) has spread it over, or that have one each.

Every process runs its own batches and sums what was measured with the others. A layer to prune is gathered
and solved whole by one of them, in turn, which tells the others the result, and each writes the rows that it
holds. A layer is gathered for its forward pass anyhow, so that this takes no more memory; it lets shards end
at any row, and what methods decide over a whole layer is what one process would decide.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError, WorkFailed, one_line
from nmsolve.ops.distributed import is_dtensor, whole_of
from nmsolve.ranks import Ranks

__all__ = ["Peers", "peers_of", "together"]

_REPLICAS = {
    "DistributedDataParallel": "prune model.module, in one process, before it is wrapped",
    "FullyShardedDataParallel": "FSDP1 keeps weights flat; shard with fully_shard (FSDP2)",
}


class Peers:
    """Those that prune a model together; one process alone where nothing else is said.

    Parameters
    ----------
    sharded : sequence of module
        What ``fully_shard`` has spread over all of them.
    replicated : bool
        Whether all processes of torch.distributed have the model.

    Attributes
    ----------
    rank, count : int
    sharded : bool
        Whether modules are sharded, be it over one process.
    """

    def __init__(self, sharded: Sequence[Any] = (), replicated: bool = False) -> None:
        self._modules = list(sharded)
        self.sharded = bool(self._modules)
        self.rank, self.count = 0, 1
        if self.sharded or replicated:
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
        with _reached():
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
            text = str(problem) if ours else _said(problem)
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
            with _reached():
                torch.distributed.all_reduce(tensor)

    def tell(self, value: Any, source: int) -> Any:
        """What ``source`` gives, to all."""
        if self.count == 1:
            return value
        box = [value]
        with _reached():
            torch.distributed.broadcast_object_list(box, src=source)
        return box[0]

    def tell_tensor(
        self,
        tensor: Tensor | None,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        source: int,
    ) -> Tensor:
        """The tensor of ``source``, of this shape and dtype, to all."""
        if tensor is None:
            tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
        sent = tensor.to(device).contiguous()
        with _reached():
            torch.distributed.broadcast(sent.view(-1).view(torch.uint8), src=source)
        return sent

    @staticmethod
    def whole(weight: Tensor) -> Tensor:
        """A weight as one tensor; all ask for it at once."""
        return whole_of(weight.detach())

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


def _said(problem: Exception) -> str:
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.strerror}: {problem.filename}" if problem.filename else problem.strerror
    return f"{type(problem).__name__}: {one_line(problem)}"


@contextmanager
def _reached() -> Iterator[None]:
    """A collective, which fails where a process has ended."""
    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        raise WorkFailed(f"the other ranks cannot be reached any more: {one_line(error)}") from error


@contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Collectives among the processes that torchrun started; what ends the block on one ends it on all."""
    if ranks.count == 1:
        yield
        return
    with ranks.collectives(timeout=_PATIENCE), ranks.agreed():
        yield


_PATIENCE = datetime.timedelta(days=30)
"""A layer may take long, and a process that ends is noticed at once."""


def peers_of(model: nn.Module, replicated: bool = False) -> Peers:
    """Who prunes a model: who holds it, or all processes if each has it.

    Raises
    ------
    NMSolveError
        If it is wrapped or sharded by something other than ``fully_shard``, or not over all processes; if it
        is sharded and said to be replicated, or torch.distributed is not there.
    """
    if replicated and not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise NMSolveError("replicated: torch.distributed is not initialised")
    for module in model.modules():
        of_torch = {kind.__name__ for kind in type(module).__mro__ if kind.__module__.startswith("torch.")}
        for kind, advice in _REPLICAS.items():
            if kind in of_torch:
                raise NMSolveError(f"model: {kind}: {advice}")
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = [] if fsdp is None else [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    if sharded and replicated:
        raise NMSolveError("replicated: the model is sharded by fully_shard; leave it out")
    peers = Peers(sharded, replicated)
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
