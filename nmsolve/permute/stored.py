"""The couplings of a checkpoint on disk: by the names in its files, and by its architecture if that is known.

The modules that config.json names are built without weights (:mod:`nmsolve.checkpoint.architecture`). They
say which part of the model a tensor belongs to, with how many heads, what is shared and what stands between
convolutions. Where they cannot be built, names and config.json alone are read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.checkpoint.architecture import build, read_config, too_large
from nmsolve.checkpoint.format import Checkpoint
from nmsolve.checkpoint.roles import dense_by_name
from nmsolve.checkpoint.stored_names import Destination, destinations
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.model_couplings import Checks, ModuleConfigs, couplings_by_tracing, once
from nmsolve.permute.named import named_couplings
from nmsolve.permute.part_configs import OWN_HEADS, Config, PartConfigs

if TYPE_CHECKING:
    from torch import nn

__all__ = ["stored_couplings"]

_UNKNOWN = "what writes its inputs is unknown: no rule has its name, and no chain of layers leads to it"


def stored_couplings(
    checkpoint: Checkpoint, heads: int | None = None, key_value_heads: int | None = None
) -> list[Coupling]:
    """The couplings of a checkpoint, and at the end each further matrix with the reason why it has none.

    Parameters
    ----------
    checkpoint : Checkpoint
    heads, key_value_heads : int, optional
        Of every attention, whatever config.json says.
    """
    shapes = {entry.name: entry.shape for _, entry in checkpoint.entries()}
    folder = checkpoint.root if checkpoint.is_folder else checkpoint.root.parent
    config, why = read_config(folder)
    model = None if why else _built(folder, config, len(shapes))
    given: dict[str, object] = (
        {} if heads is None else {OWN_HEADS: heads, "num_key_value_heads": key_value_heads}
    )
    if model is None:
        found = named_couplings(shapes, _Given(PartConfigs(config), given))
    else:
        found = _of_model(model, shapes, given)
    consumed = {site.tensor for coupling in found for site in coupling.consumers}
    written = {site.tensor for coupling in found for site in coupling.producers}
    left = [
        name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1 and name not in consumed
        if dense_by_name(name.removesuffix(".weight")) is None and shape[1] > 1
    ]
    return found + [_left(name, shapes[name], name in written) for name in left]


def _left(name: str, shape: tuple[int, ...], writes: bool) -> Coupling:
    reason = _UNKNOWN if not writes else f"{_UNKNOWN} (its outputs move with those of another)"
    return Coupling(name.removesuffix(".weight"), 1, shape[1], (Site(name, 1),), (), reason)


class _Given(PartConfigs):
    """Configurations with heads that were given as arguments."""

    def __init__(self, configs: PartConfigs, given: Config) -> None:
        super().__init__(configs.whole)
        self._configs, self._given = configs, given

    def at(self, tensor: str, width: int) -> Config:
        return {**self._configs.at(tensor, width), **self._given}


class _Stored(PartConfigs):
    """Configurations of the modules that stored tensors go to."""

    def __init__(self, configs: ModuleConfigs, places: Mapping[str, Destination]) -> None:
        super().__init__(configs.whole)
        self._configs, self._places = configs, places

    def at(self, tensor: str, width: int) -> Config:
        place = self._places.get(tensor)
        return self._configs.at(tensor if place is None else place.parameter, width)


def _built(folder: Path, config: dict[str, Any], tensors: int) -> nn.Module | None:
    """The modules of the architecture, if they can be built."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing or too_large(config, tensors):
        return None
    try:
        return build(folder, config["architectures"][0])[0]
    except Exception:  # whatever a wrong configuration makes of the modules
        return None


def _of_model(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], given: Config) -> list[Coupling]:
    """The couplings of stored tensors, by their names and by the modules that they go to."""
    places = destinations(model, shapes)
    configs = _Given(_Stored(ModuleConfigs(model), places), given)
    named = named_couplings(shapes, configs)
    inside = {name: place.parameter for name, place in places.items()}
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    stored: dict[str, str] = {}
    for name, place in places.items():
        if place.converter is None and held[place.parameter] == tuple(shapes[name]):
            stored[place.parameter] = name
    found, refused = couplings_by_tracing(model)
    traced = [moved for coupling in found if (moved := _renamed(coupling, stored)) is not None]
    kept = [c for c in named if c.heads > 1 or all(inside.get(s.tensor) not in refused for s in c.consumers)]
    checks, verdicts = Checks(model), []
    for coupling in once([*kept, *traced]):
        within = _renamed(coupling, inside)
        verdict = coupling if within is None else checks.checked(within)
        if coupling.folds and not verdict.folds:
            coupling = replace(coupling, producers=(), reason=verdict.reason)
        verdicts.append(coupling)
    order = {name: k for k, name in enumerate(shapes)}
    return sorted(verdicts, key=lambda coupling: order[coupling.consumers[0].tensor])


def _renamed(coupling: Coupling, names: Mapping[str, str]) -> Coupling | None:
    """A coupling with other names of its tensors, None if one of them has none."""
    sites = (*coupling.consumers, *coupling.producers)
    if any(site.tensor not in names for site in sites):
        return None
    consumers, producers = (
        tuple(site._replace(tensor=names[site.tensor]) for site in part)
        for part in (coupling.consumers, coupling.producers)
    )
    name = consumers[0].tensor.removesuffix(".weight")
    return replace(coupling, name=name, consumers=consumers, producers=producers)
