"""Names of a model's weights in its checkpoint files, which need not be those of its parameters.

transformers renames weights when it loads and saves, and may join or split them (the three projections of an
attention are one tensor in some files, the experts of a mixture one parameter in some models). Its own tables
say how; this module reads them with the functions that transformers itself loads and saves with.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Place", "masks_in_files", "masks_in_model", "places"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file goes.

    Attributes
    ----------
    parameter : str
        Its name in the model; the first, where the tensor is split.
    pattern : str or None
        Which tensor it is of those that are joined or split; None where it is only renamed.
    converter : object
        transformers' WeightConverter that joins or splits.
    """

    parameter: str
    pattern: str | None = None
    converter: Any = None

    def transposes(self, shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is transposed on its way into a parameter of shape ``into``."""
        flips = 0
        for step in getattr(self.converter, "operations", ()):
            if type(step).__name__ == "Transpose":
                flips += not getattr(step, "check_dims", False) or shape != into
        return flips % 2 == 1


def places(model: nn.Module, names: Iterable[str]) -> dict[str, Place]:
    """Where the tensors of a checkpoint go in a model, as transformers would load them.

    Tensors that are no part of the model are left out. A model of another kind has its own names.
    """
    held = dict(model.state_dict(keep_vars=True))
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return {name: Place(name) for name in names if name in held}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return _places_by_patterns(model, prefix, held, names)
    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, held)
        if target not in held and name in held:
            target, pattern = rename_source_key(name, [], [], prefix, held)
        if target in held:
            found[name] = Place(target, pattern, None if pattern is None else by_pattern[pattern])
    return found


def _places_by_patterns(
    model: nn.Module, prefix: str, held: Mapping[str, object], names: Iterable[str]
) -> dict[str, Place]:
    """As transformers 4 loads: the patterns of the class, then the base's name put before or taken away."""
    patterns: Mapping[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    found = {}
    for name in names:
        target = name
        for pattern, replacement in patterns.items():
            target, count = re.subn(pattern, replacement, target)
            if count:
                break
        for candidate in (target, name, f"{prefix}.{target}", target.removeprefix(f"{prefix}.")):
            if candidate in held:
                found[name] = Place(candidate)
                break
    return found


def masks_in_model(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of a checkpoint's tensors by the names of the model's parameters, joined and split as those are.

    A mask that is no part of the model keeps its name.
    """
    found: dict[str, Tensor] = {}
    joined: dict[str, Any] = {}
    where = places(model, masks)
    for name, mask in masks.items():
        place = where.get(name, Place(name))
        if place.converter is None:
            found[place.parameter] = mask
            continue
        converter = joined.setdefault(place.parameter, copy.deepcopy(place.converter))
        converter.add_tensor(place.parameter, name, place.pattern, mask)
    for parameter, converter in joined.items():
        made = converter.convert(parameter, model=model, config=model.config)
        found |= {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
    return found


def masks_in_files(model: nn.Module, masks: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Masks of the model's parameters by the names of the tensors that a saved checkpoint has.

    The parts of a tensor that hold no mask are kept. A mask of what is not in the checkpoint is left out.
    """
    where = places(model, names)
    renamed = {place.parameter: name for name, place in where.items() if place.converter is None}
    tied = _other_names(model)
    found: dict[str, Tensor] = {}
    joined: list[str] = []
    for parameter in masks:
        name = next((renamed[x] for x in (parameter, *tied.get(parameter, ())) if x in renamed), None)
        if name is None:
            joined.append(parameter)
        else:
            found[name] = masks[parameter]
    return found | (_joined(model, masks, joined, where) if joined else {})


def _other_names(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter with several names, by each of them: all."""
    by_identity: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(name)
    return {name: names for names in by_identity.values() if len(names) > 1 for name in names}


def _joined(
    model: nn.Module, masks: Mapping[str, Tensor], wanted: Iterable[str], where: Mapping[str, Place]
) -> dict[str, Tensor]:
    """Masks of tensors that are made of several parameters, made as transformers makes the tensors."""
    import torch

    with suppress(ImportError):
        from transformers.core_model_loading import revert_weight_conversion

        beside = {name.rpartition(".")[0].rpartition(".")[0] for name in wanted}
        parts = {
            name: parameter.shape
            for name, parameter in model.state_dict(keep_vars=True).items()
            if name.rpartition(".")[0].rpartition(".")[0] in beside
        }
        kept = torch.ones((), dtype=torch.bool)
        whole = {name: masks[name] if name in masks else kept.expand(shape) for name, shape in parts.items()}
        marks = {name: (~kept if name in wanted else kept).expand(shape) for name, shape in parts.items()}
        made = revert_weight_conversion(model, whole)
        marked = revert_weight_conversion(model, marks)
        return {
            name: mask.contiguous()
            for name, mask in made.items()
            if name in where and not bool(marked[name].all())
        }
    return {}
