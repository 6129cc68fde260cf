"""What a coupling is: channels that one order permutes, and where each tensor has them.

A *coupling* is a set of channels that one permutation reorders. Its consumers are weights whose input columns
are these channels: they are what an N:M mask sees in the new order. Its producers are weights, biases and
norm parameters whose outputs are the channels. With producers known, an order *folds*: both sides are
reordered once and the model computes the same function at no cost. Without them (channels of the residual
stream, which every layer reads and writes) the consumers need a run-time gather of their input.

:mod:`nmsolve.permute.rules` has the table of families, :mod:`nmsolve.permute.named` reads couplings from
names and shapes by it, and :mod:`nmsolve.permute.model_couplings` those of a model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coupling", "Site"]


class Site(NamedTuple):
    """Where a tensor has the channels.

    Channel c of repeat r of head h is index ``start + h * head_step + (r * size + c) * step`` along ``axis``,
    heads and size as in the coupling; ``head_step`` 0 stands for ``repeats * size * step``, one head right
    after the other. With ``head_axis`` the heads (experts) are the indices of that axis instead.

    ========================================  =========  =====  =========================  =========
    layout                                    start      step   head_step                  head_axis
    ========================================  =========  =====  =========================  =========
    outputs or inputs of a layer              0          1      0
    second half (up after gate)               size       1      0
    every second one (gpt-oss' up)            1          2      0
    values after queries and keys (Phi-3)     (Q+K) d    1      0
    each head's query, key, value (GPT-NeoX)  2 d        1      3 d
    each head's key and value (MLA)           k          1      k + d
    one matrix for each expert                0          1                                 0
    ========================================  =========  =====  =========================  =========
    """

    tensor: str
    axis: int
    start: int = 0
    repeats: int = 1
    step: int = 1
    head_step: int = 0
    head_axis: int | None = None


@dataclass(frozen=True)
class Coupling:
    """Channels that are reordered together.

    Attributes
    ----------
    name : str
        Of the first consumer: ``"model.layers.0.mlp.down_proj"``.
    heads, size : int
        A permutation is int64 ``(heads, size)``, or ``(size,)`` where heads is 1: channels move within a
        head, or within an expert.
    consumers : tuple of Site
        Weights whose inputs the channels are.
    producers : tuple of Site
        What writes them, biases and norm parameters too; empty if the order needs a run-time gather.
    reason : str
        Why it does not fold, if it does not.
    """

    name: str
    heads: int
    size: int
    consumers: tuple[Site, ...]
    producers: tuple[Site, ...] = ()
    reason: str = ""

    @property
    def folds(self) -> bool:
        """Whether the order can be folded into the producers."""
        return bool(self.producers)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a permutation."""
        return (self.size,) if self.heads == 1 else (self.heads, self.size)

    def index(self, permutation: Tensor, site: Site) -> Tensor:
        """The indices along the site's axis whose channels come to its places, in the new order.

        int64 ``(heads * repeats * size,)``, or ``(heads, repeats * size)`` where the heads have an axis.
        """
        order = permutation.reshape(self.heads, 1, self.size)
        repeat = torch.arange(site.repeats, device=order.device).view(1, -1, 1) * self.size
        inside = site.start + (repeat + order) * site.step
        if site.head_axis is not None:
            return inside.flatten(1)
        head = torch.arange(self.heads, device=order.device).view(-1, 1, 1)
        return (head * (site.head_step or site.repeats * self.size * site.step) + inside).flatten()

    def places(self, site: Site, device: torch.device | None = None) -> Tensor:
        """The same in the natural order: where the channels lie."""
        return self.index(torch.arange(self.size, device=device).expand(self.heads, -1), site)

    def scores(self, weights: Mapping[str, Tensor], sites: Sequence[Site] | None = None) -> Tensor:
        """The consumers' scores as one tensor ``(*shape[:-1], rows, size)`` that a search takes.

        ``weights`` maps the consumers' tensor names to scores of the tensors' own shapes: ``(out, in)`` or
        ``(in, out)``, with an axis of experts before or kernel positions behind. Rows of all consumers, and
        the heads that share one permutation, are stacked.
        """
        parts = []
        for site in self.consumers if sites is None else sites:
            weight = weights[site.tensor]
            places = self.places(site, weight.device)
            if site.head_axis is None:
                split = weight.movedim(site.axis, -1).flatten(0, -2)[:, places]
                split = split.unflatten(1, (self.heads, site.repeats, self.size)).permute(1, 0, 2, 3)
            else:
                split = weight.movedim((site.head_axis, site.axis), (0, -1)).flatten(1, -2)[..., places[0]]
                split = split.unflatten(2, (site.repeats, self.size))
            parts.append(split.flatten(1, 2))
        stacked = torch.cat(parts, dim=1)
        return stacked[0] if self.heads == 1 else stacked
