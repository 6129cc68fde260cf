"""Orders for the couplings of a checkpoint on disk, whose tensors are read as they are needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from nmsolve.checkpoint.format import Checkpoint, Shard
from nmsolve.errors import NMSolveError
from nmsolve.files import Interrupts
from nmsolve.ops.masks import transposable_mask
from nmsolve.pattern import NMPattern
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.heuristics import ria_permutation
from nmsolve.permute.orders import retained_score
from nmsolve.permute.transposable import transposable_permutation

__all__ = ["CheckpointSearch", "read_tensor"]


@dataclass
class CheckpointSearch:
    """Searches orders for a checkpoint's couplings.

    ``scored`` has the scores of tensors that do not go by magnitude.
    """

    checkpoint: Checkpoint
    pattern: NMPattern
    transposable: bool
    passes: int
    window: int | None
    progress: bool | None
    interrupts: Interrupts
    scored: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._shards = {entry.name: shard for shard, entry in self.checkpoint.entries()}
        self._shapes = {entry.name: entry.shape for _, entry in self.checkpoint.entries()}

    def shown(self) -> bool:
        """Whether there is a progress bar."""
        return sys.stderr.isatty() if self.progress is None else self.progress

    def run(self, chosen: list[Coupling]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """What masks keep before and after, and the order of every coupling."""
        n, m = self.pattern.n, self.pattern.m
        rows: list[dict[str, Any]] = []
        orders: dict[str, Tensor] = {}
        for coupling in tqdm(chosen, unit="coupling", disable=not self.shown()):
            self.interrupts.check()
            scores = coupling.scores(self._of(coupling), self._sites(coupling))
            if self.transposable:
                found = transposable_permutation(
                    scores, n, m, rows=False, passes=self.passes, window=self.window
                )
                order, before, after = found.columns, found.before.sum(), found.after.sum()
            else:
                order = ria_permutation(scores, n, m, passes=self.passes, window=self.window)
                before = retained_score(scores, n, m).sum()
                after = retained_score(scores, n, m, order).sum()
                if after < before:
                    order, after = torch.arange(coupling.size).expand(coupling.shape).contiguous(), before
            orders[coupling.name] = order
            kind = "wanda" if coupling.consumers[0].tensor in self.scored else "magnitude"
            row = {"name": coupling.name, "heads": coupling.heads, "channels": coupling.size}
            kept = {"before": float(before), "after": float(after), "score": float(scores.double().sum())}
            rows.append({**row, "scores": kind, "learned": False, **kept})
        return rows, orders

    def scores(self, couplings: list[Coupling]) -> dict[str, Tensor]:
        """Those of the couplings' consumers, by the tensors' names."""
        return {
            site.tensor: self._score(site.tensor) for coupling in couplings for site in coupling.consumers
        }

    def learned(self, row: dict[str, Any], coupling: Coupling, orders: dict[str, Tensor]) -> dict[str, Any]:
        """The row of a coupling whose order was learned."""
        n, m = self.pattern.n, self.pattern.m
        scores = coupling.scores(self._of(coupling), self._sites(coupling))
        order = orders[coupling.name]
        if self.transposable:
            ordered = scores.gather(-1, order.unsqueeze(-2).expand_as(scores))
            after = float((ordered * transposable_mask(ordered, n, m)).sum(dtype=ordered.double().dtype))
        else:
            after = float(retained_score(scores, n, m, order).sum())
        return {**row, "learned": True, "after": after}

    def _sites(self, coupling: Coupling) -> list[Site]:
        sites = [*coupling.consumers]
        if self.transposable:  # the masks of the producers feel the order of their rows as well
            sites += [site for site in coupling.producers if _is_matrix(self._shapes[site.tensor], site)]
        return sites

    def _of(self, coupling: Coupling) -> dict[str, Tensor]:
        return {site.tensor: self._score(site.tensor) for site in self._sites(coupling)}

    def _score(self, name: str) -> Tensor:
        if name in self.scored:
            return self.scored[name]
        weight = read_tensor(self._shards[name], name).float().abs()
        if not torch.isfinite(weight).all():
            raise NMSolveError(f"{name}: expected finite values, got NaN or infinite ones")
        return weight


def _is_matrix(shape: tuple[int, ...], site: Site) -> bool:
    """Whether a tensor has several elements for each channel, which biases and norms have not."""
    heads = 1 if site.head_axis is None else shape[site.head_axis]
    return math.prod(shape) > heads * shape[site.axis]


def read_tensor(shard: Shard, name: str) -> Tensor:
    """A tensor of a file."""
    with safe_open(shard.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
