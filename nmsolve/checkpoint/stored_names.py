"""Names of a model's weights in its checkpoint files, which need not be those of its parameters.

transformers renames weights when it loads and saves, and may join or split them (the three projections of an
attention are one tensor in some files, the experts of a mixture one parameter in some models). Its own tables
say how; this module reads them with the functions that transformers itself loads with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Destination", "destinations"]


@dataclass(frozen=True)
class Destination:
    """Where a tensor of a file goes.

    Attributes
    ----------
    parameter : str
        Its name in the model; the first, where the tensor is split.
    converter : object
        transformers' WeightConverter that joins or splits; None where it is only renamed.
    pattern : str, optional
        Which of the converter's sources the tensor is.
    """

    parameter: str
    converter: Any = None
    pattern: str | None = None

    def transposes(self, shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is transposed on its way into a parameter of shape ``into``."""
        if self.converter is None:
            return False
        from transformers.core_model_loading import Transpose

        turns = [step for step in self.converter.operations if isinstance(step, Transpose)]
        return sum(not getattr(step, "check_dims", False) or shape != into for step in turns) % 2 == 1


def destinations(model: nn.Module, names: Iterable[str]) -> dict[str, Destination]:
    """Where the tensors of a checkpoint go in a model, as transformers would load them.

    Tensors that are no part of the model are left out. A model of another kind has its own names. Those that
    are joined come in the order in which they are.
    """
    held = dict(model.state_dict(keep_vars=True))
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return {name: Destination(name) for name in names if name in held}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:
        return _by_patterns(model, prefix, held, names)
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
            found[name] = Destination(target, None if pattern is None else by_pattern[pattern], pattern)
    return found


def _by_patterns(
    model: nn.Module, prefix: str, held: Mapping[str, object], names: Iterable[str]
) -> dict[str, Destination]:
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
                found[name] = Destination(candidate)
                break
    return found
