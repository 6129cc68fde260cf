"""What is kept of a layer's inputs: their Hessian, or its diagonal, and a sample for the report.

With the inputs ``X`` ``(tokens, in)`` of a layer, methods need ``X.T @ X``, its diagonal, or nothing. What
the report says of the error needs ``X.T @ X``, or a sample of the rows of ``X``, drawn evenly from all.
Whatever a layer has several of (groups of a convolution, experts) has statistics of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.prune.layers import Layer
from nmsolve.prune.methods import PruningMethod
from nmsolve.prune.peers import Peers

__all__ = ["Statistics", "work_dtype"]

SAMPLE = 512
"""Tokens of a layer that are kept for the error, where no Hessian is."""
EXPERT_SAMPLE = 64
"""Tokens of each expert, if that is more than its share of ``SAMPLE``."""


def work_dtype(weight: Tensor) -> torch.dtype:
    """float64 for weights that are, float32 for all others."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class Statistics:
    """Of the inputs of a layer, and of all layers that see the same ones.

    Parameters
    ----------
    layer : Layer
        Has ``groups`` sets of inputs.
    method : PruningMethod
        Says what is needed.
    exact_error : bool
        Whether the error is that over all tokens: then there is a Hessian in any case.
    peers : Peers, optional
        The processes that measure together: each draws a sample of its own.
    device : torch.device, optional
        Where they are; by default where the layer's weight is.

    Attributes
    ----------
    hessian : Tensor or None
        ``(groups, in, in)``.
    diagonal : Tensor or None
        ``(groups, in)``, where there is no Hessian and the method needs its diagonal.
    sample : Tensor or None
        ``(groups, rows, in)``, where there is no Hessian: the first rows are taken, the others zeros.
    tokens : list of int
        How many each group has seen.
    real : Tensor or None
        Which of the positions ``(B, T)`` of the batch at hand are no padding.
    muted : bool
        Whether the batch at hand is only run because others run theirs.
    """

    def __init__(
        self,
        layer: Layer,
        method: PruningMethod,
        exact_error: bool,
        peers: Peers | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.layer = layer
        groups, size = layer.groups, layer.input_size
        device, dtype = device or layer.weight.device, work_dtype(layer.weight)
        self.hessian = self.diagonal = self.sample = None
        if exact_error or (method.needs_calibration and not method.diagonal):
            self.hessian = torch.zeros((groups, size, size), dtype=dtype, device=device)
        else:
            rows = max(SAMPLE // groups, EXPERT_SAMPLE) if layer.is_stack else SAMPLE
            self.sample = torch.zeros((groups, rows, size), dtype=dtype, device=device)
            if method.needs_calibration:
                self.diagonal = torch.zeros((groups, size), dtype=dtype, device=device)
        self.method = method
        self.tokens = [0] * groups
        self.real: Tensor | None = None
        self.muted = False
        # A row is kept if its key, a random number, is among the smallest that there were.
        self._keys = [torch.zeros(0)] * groups
        self._draw = torch.Generator().manual_seed(0 if peers is None else peers.rank)

    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [x for x in (self.hessian, self.diagonal, self.sample) if x is not None]

    def add(self, x: Tensor) -> None:
        """Takes in what the layer was called with."""
        if self.muted:
            return
        if self.real is not None and not self.layer.is_convolution:
            real = self.real.flatten().to(x.device)
            if x.shape[:-1] in (self.real.shape, real.shape):
                x = x.reshape(-1, x.shape[-1])[real]
        x = self.layer.inputs(x)
        self._add(range(len(x)), x, x.shape[1])

    def add_expert(self, expert: int, x: Tensor) -> None:
        """Takes in the inputs ``(tokens, in)`` of an expert; rows of zeros are tokens of other experts."""
        if self.muted:
            return
        x = x.reshape(1, -1, x.shape[-1])
        x = x[:, x[0].any(dim=1)]
        self._add([expert], x, x.shape[1])

    def _add(self, groups: Sequence[int], x: Tensor, tokens: int) -> None:
        x = x.to(work_dtype(self.layer.weight))
        which = slice(groups[0], groups[-1] + 1)
        if self.hessian is not None:
            self.hessian[which].baddbmm_(x.transpose(1, 2), x)
        if self.diagonal is not None:
            self.diagonal[which] += x.square().sum(1)
        if self.sample is not None:
            keys = torch.rand(tokens, generator=self._draw)
            for group, rows in zip(groups, x, strict=True):
                self._keep(group, rows, keys)
        for group in groups:
            self.tokens[group] += tokens

    def _keep(self, group: int, rows: Tensor, keys: Tensor) -> None:
        """The rows with the smallest keys, of those that there are and of new ones."""
        assert self.sample is not None
        held, limit = self._keys[group], self.sample.shape[1]
        both = torch.cat([held, keys])
        if len(both) <= limit:
            self.sample[group, len(held) : len(both)] = rows
            self._keys[group] = both
            return
        chosen = both.topk(limit, largest=False).indices
        stay = torch.zeros(len(both), dtype=torch.bool).index_fill_(0, chosen, True)
        # New rows go where there is room, and to the places of those that leave.
        places = torch.cat([torch.arange(len(held), limit), (~stay[: len(held)]).nonzero()[:, 0]])
        new = stay[len(held) :].nonzero()[:, 0]
        self.sample[group, places.to(rows.device)] = rows[new.to(rows.device)]
        kept = torch.cat([held, held.new_empty(limit - len(held))])
        kept[places] = keys[new]
        self._keys[group] = kept

    def reduce(self, peers: Peers) -> None:
        """Sums with what the others have measured; of all samples the rows with the smallest keys stay."""
        if peers.count == 1:
            return
        for x in (self.hessian, self.diagonal):
            if x is not None:
                peers.sum_(x)
        self.tokens = [sum(group) for group in zip(*peers.gather(self.tokens), strict=True)]
        if self.sample is None:
            return
        told = peers.gather((self._keys, self.sample.cpu()))
        for group, held in enumerate(self.sample):
            keys = torch.cat([of_rank[group] for of_rank, _ in told])
            rows = torch.cat([sample[group, : len(of_rank[group])] for of_rank, sample in told])
            first = keys.argsort()[: len(held)]
            held[: len(first)] = rows[first].to(held.device)
            self._keys[group] = keys[first]

    def check(self, name: str) -> None:
        """Raises NMSolveError unless all of it is finite."""
        if not all(bool(torch.isfinite(x).all()) for x in self._tensors()):
            raise NMSolveError(
                f"calibration: the inputs of {name} hold NaN or infinite values, or overflow when squared"
            )

    def settle(self) -> None:
        """Gives experts that saw no token inputs that are all alike, by which weights alone decide."""
        for group, tokens in enumerate(self.tokens):
            if tokens == 0 and self.hessian is not None:
                self.hessian[group].fill_diagonal_(1.0)
            if tokens == 0 and self.diagonal is not None:
                self.diagonal[group] = 1.0

    def needed(self, group: int | None = None) -> Tensor | None:
        """What the method takes: of all groups, or of one."""
        which = slice(None) if group is None else slice(group, group + 1)
        if not self.method.needs_calibration:
            return None
        if not self.method.diagonal:
            return None if self.hessian is None else self.hessian[which]
        if self.diagonal is not None:
            return self.diagonal[which]
        return None if self.hessian is None else self.hessian[which].diagonal(dim1=-2, dim2=-1)

    def loss(self, weight: Tensor, group: int | None = None) -> float:
        """``||W X||^2`` of weights ``(groups, out, in)``: over all tokens, or as the sample says."""
        which = slice(None) if group is None else slice(group, group + 1)
        if not any(self.tokens[which]):
            return 0.0
        if self.hessian is not None:
            return float(((weight @ self.hessian[which]) * weight).sum(dtype=torch.float64))
        assert self.sample is not None
        of_groups = zip(weight, self.sample[which], self.tokens[which], self._keys[which], strict=True)
        return sum(
            tokens / len(keys) * float((sample[: len(keys)] @ matrix.T).square().sum(dtype=torch.float64))
            for matrix, sample, tokens, keys in of_groups
            if tokens
        )

    def error_tokens(self) -> int:
        """How many tokens the error comes from."""
        if self.hessian is not None:
            return sum(self.tokens) if self.layer.is_stack else self.tokens[0]
        held = [len(keys) for keys in self._keys]
        return sum(held) if self.layer.is_stack else held[0]
