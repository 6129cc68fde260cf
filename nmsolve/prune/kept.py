"""The layers that an earlier run has finished, as all ranks see them: the first one holds the store."""

from __future__ import annotations

import torch
from torch import Tensor

from nmsolve.prune.layers import Layer
from nmsolve.prune.peers import Peers
from nmsolve.prune.report import LayerReport
from nmsolve.prune.store import LayerStore, file_name

__all__ = ["Kept", "Solved"]

Solved = tuple[Tensor, Tensor, LayerReport]
"""New weight and mask of a layer, and its report."""


class Kept:
    """Finished layers of earlier runs, and what becomes of those that this run finishes.

    Parameters
    ----------
    store : LayerStore, optional
        On rank 0, if there is one.
    peers : Peers
    """

    def __init__(self, store: LayerStore | None, peers: Peers) -> None:
        self._store, self._peers = store, peers
        self._names = frozenset(peers.tell(store.names() if store is not None else [], 0))
        self._any = peers.tell(store is not None, 0)

    def __contains__(self, layer: Layer) -> bool:
        return file_name(layer.name) in self._names

    def load(self, layer: Layer, device: torch.device) -> Solved:
        """What an earlier run has made of a layer."""
        found: Solved | None = None
        with self._peers.agreed():
            if self._store is not None:
                found = self._store.load(layer.name, layer.weight)
        return told(self._peers, layer, found, 0, device)

    def save(self, layer: Layer, solved: Solved) -> None:
        """Stores a layer; when this returns, all ranks can read it."""
        if not self._any:
            return
        with self._peers.agreed():
            if self._store is not None:
                self._store.save(layer.name, *solved)


def told(peers: Peers, layer: Layer, solved: Solved | None, source: int, device: torch.device) -> Solved:
    """What a rank has made of a layer, to all."""
    if peers.count == 1:
        assert solved is not None
        return solved
    weight, mask, report = solved or (None, None, None)
    shape = layer.weight.shape
    weight = peers.tell_tensor(weight, shape, layer.weight.dtype, device, source)
    mask = peers.tell_tensor(mask, shape, torch.bool, device, source)
    return weight, mask, peers.tell(report, source)
