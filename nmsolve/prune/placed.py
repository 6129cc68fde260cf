"""The weights to prune and their earlier masks, by where they lie in a checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.format import Checkpoint
from nmsolve.checkpoint.mask_files import load_masks
from nmsolve.errors import NMSolveWarning, counted
from nmsolve.prune.arguments import Patterns, parse_patterns
from nmsolve.prune.layers import select_layers
from nmsolve.prune.stored import Place, find_places, names_of, unplaced
from nmsolve.prune.unloaded import StoredWeights

__all__ = ["Placed", "earlier_masks", "placed"]


@dataclass(frozen=True)
class Placed:
    """Of the weights to prune, by name: their layers, and their places in the checkpoint."""

    layers: Mapping[str, str]
    places: Mapping[str, list[Place]]


class _Read(Mapping[str, Tensor]):
    """Weights that are read when they are looked at."""

    def __init__(self, names: Sequence[str], read: Callable[[str], Tensor]) -> None:
        self._names, self._one = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        return self._one(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def placed(
    checkpoint: Checkpoint,
    model: nn.Module,
    pattern: Patterns,
    dense: Sequence[str],
    held: StoredWeights | None = None,
) -> Placed:
    """Where the weights to prune lie; ``held`` has those of a model that was built without.

    Raises
    ------
    NMSolveError
        If one lies nowhere, or nothing is to be pruned.
    """
    globs = [dense] if isinstance(dense, str) else dense
    selected = select_layers(model, parse_patterns(pattern), globs, stacks=True, away=held is not None)
    weights: Mapping[str, Tensor] = {layer.weight_name: layer.weight for layer in selected.layers}
    names = names_of(model, weights)
    if held is not None:
        weights = _Read(list(weights), lambda name: held.read([name])[name])
    places = find_places(checkpoint, weights, names)
    for name, found in places.items():
        if not found:
            raise unplaced(name)
    return Placed({layer.weight_name: layer.name for layer in selected.layers}, places)


def earlier_masks(
    masks: str | os.PathLike[str], places: Mapping[str, list[Place]], checkpoint: Checkpoint
) -> dict[str, Tensor]:
    """Earlier masks, which have the names of the checkpoint's tensors, by the weights of the model.

    Those of tensors that are not pruned are left out, with a warning.
    """
    found = load_masks(masks)
    by_weight = {}
    for name, (place, *others) in places.items():
        if place.expert is not None:
            mask = _of_stack([place, *others], found)
            if mask is not None:
                by_weight[name] = mask
        elif place.entry in found and found[place.entry].shape[:1] == (place.rows,):
            by_weight[name] = found[place.entry][place.first : place.last]
    used = {place.entry for name in by_weight for place in places[name]}
    pruned = {place.entry for of_weight in places.values() for place in of_weight}
    dense = [x.name for _, x in checkpoint.entries() if x.name in found and x.name not in pruned]
    if dense:
        warnings.warn(
            f"{counted(len(dense), 'initial mask')} not used, of what stays dense: {dense[0]}"
            + (", ..." if len(dense) > 1 else ""),
            NMSolveWarning,
            stacklevel=3,
        )
    rest = found.keys() - used - set(dense)
    return by_weight | {name: found[name] for name in sorted(rest)}


def _of_stack(places: Sequence[Place], masks: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of stacked experts from those of the tensors that hold them; True where there is none."""
    last = places[-1]
    given = [place for place in places if place.entry in masks]
    if not given or any(len(masks[place.entry]) != place.rows for place in given):
        return None
    shape = (last.expert or 0) + 1, last.end, *masks[given[0].entry].shape[1:]
    whole = torch.ones(shape, dtype=torch.bool)
    for place in given:
        place.of(whole).copy_(masks[place.entry])
    return whole
