"""The couplings of a model in memory: those that its names show, and what only its modules tell.

Chains of layers and blocks of convolutions are read from the modules, and a fold is refused where an
activation mixes channels or a tensor is shared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nmsolve.permute.channelwise import CONVOLUTIONS, elementwise
from nmsolve.permute.couplings import Coupling
from nmsolve.permute.named import named_couplings
from nmsolve.permute.part_configs import OWN_HEADS, Config, PartConfigs, narrowed
from nmsolve.permute.traced import traced_couplings

__all__ = ["Checks", "ModuleConfigs", "couplings_by_tracing", "find_couplings", "once"]


def find_couplings(model: nn.Module) -> list[Coupling]:
    """The couplings of a model: transformer blocks by the names of their layers, and chains of layers.

    What no rule knows is in none of them: docs/permutation.md has the families. Layers that read the residual
    stream of a known one, and those whose fold was refused, are there with the reason.

    Parameters
    ----------
    model : nn.Module
        Its ``config`` and those of its parts, if it has one, give the type and the numbers of heads.

    Returns
    -------
    list of Coupling
        In the order of the model's parameters. A coupling that does not fold says why in ``reason``.

    Examples
    --------
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(c.name, c.size, c.folds) for c in find_couplings(mlp)]
    [('0', 4, False), ('2', 8, True)]
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    named = named_couplings(shapes, ModuleConfigs(model))
    traced, refused = couplings_by_tracing(model)
    kept = [c for c in named if c.heads > 1 or all(site.tensor not in refused for site in c.consumers)]
    known = {site.tensor for coupling in named for site in coupling.consumers}
    told = [c for c in traced if c.folds or _is_told(model, c, known)]
    checks = Checks(model)
    found = [checks.checked(coupling) for coupling in once([*kept, *told])]
    order = {name: k for k, name in enumerate(parameters)}
    return sorted(found, key=lambda coupling: order[coupling.consumers[0].tensor])


def _is_told(model: nn.Module, coupling: Coupling, known: set[str]) -> bool:
    """Whether a layer that does not fold is listed: one of a chain or a known name, or a convolution.

    Others that a forward pass calls, such as heads, would be offered for a gather that nobody asked for.
    """
    path = coupling.name.rpartition(".")[0]
    chained = isinstance(model.get_submodule(path), nn.Sequential)
    layer = model.get_submodule(coupling.name)
    return chained or coupling.name + ".weight" in known or isinstance(layer, CONVOLUTIONS)


def couplings_by_tracing(model: nn.Module) -> tuple[list[Coupling], set[str]]:
    """The couplings of traced modules, and the weights for whose inputs no other rule counts."""
    traced = traced_couplings(model)
    refused = {site.tensor for found in traced if found.refuses for site in found.coupling.consumers}
    return [found.coupling for found in traced], refused


def once(couplings: Sequence[Coupling]) -> Iterator[Coupling]:
    """Of couplings with a common consumer, the first that folds, or else the first."""
    seen: set[str] = set()
    for coupling in sorted(couplings, key=lambda coupling: not coupling.folds):
        tensors = {site.tensor for site in coupling.consumers}
        if not tensors & seen:
            seen |= tensors
            yield coupling


class Checks:
    """What the modules of a model say against a fold."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shared = _shared_tensors(model)
        self._alike: dict[int, bool] = {}

    def checked(self, coupling: Coupling) -> Coupling:
        """The coupling, with the reason instead of its producers where the model forbids the fold."""
        reason = self._why_not(coupling) if coupling.folds else ""
        return replace(coupling, producers=(), reason=reason) if reason else coupling

    def _why_not(self, coupling: Coupling) -> str:
        """A tensor that another place shares, or an activation beside the layers that mixes channels."""
        sites = (*coupling.consumers, *coupling.producers)
        tensors = {site.tensor for site in sites}
        for names in self.shared:
            mine = next((name for name in names if name in tensors), None)
            other = next((name for name in names if name not in tensors), None)
            if mine is not None and other is not None:
                return f"{mine} is shared with {other}"
        layers = [site.tensor.rpartition(".")[0] for site in sites]
        for path in dict.fromkeys(layer.rpartition(".")[0] for layer in layers):
            for name, child in self.model.get_submodule(path).named_children():
                if name.startswith(("act", "intermediate_act", "gelu")) and not self._is_alike(child):
                    return f"{path}.{name} ({type(child).__name__}) does not act on every channel alike"
        return ""

    def _is_alike(self, module: nn.Module) -> bool:
        if id(module) not in self._alike:
            self._alike[id(module)] = elementwise(module)
        return self._alike[id(module)]


class ModuleConfigs(PartConfigs):
    """Configurations as modules carry them, with what attentions and experts themselves say."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._read: dict[int, Config] = {}
        super().__init__(self._config(model) or {})

    def at(self, tensor: str, width: int) -> Config:
        path = tensor.split(".")[:-1]
        for end in range(len(path), -1, -1):
            config = self._config(self.modules.get(".".join(path[:end])))
            if config is not None:
                break
        else:
            end, config = 0, {}
        return {**narrowed(config, path[end:], width), **self._own(path)}

    def _config(self, module: nn.Module | None) -> Config | None:
        config: Any = getattr(module, "config", None)
        if not hasattr(config, "to_dict"):
            return None
        if id(config) not in self._read:
            self._read[id(config)] = config.to_dict()
        return self._read[id(config)]

    def _own(self, path: list[str]) -> dict[str, object]:
        """The heads, and the layout of experts, that the modules around a layer have as attributes."""
        above, beside = ".".join(path[:-1]), ".".join(path[:-2])
        around = [above, f"{beside}.self", f"{beside}.attention", ".".join(path)]
        own: dict[str, object] = {}
        for module in (self.modules[name] for name in around if name in self.modules):
            heads = next((n for key in _HEADS if isinstance(n := getattr(module, key, None), int)), None)
            if heads is not None:
                own.setdefault(OWN_HEADS, heads)
            for key in _ATTRIBUTES:
                value = getattr(module, key, None)
                if isinstance(value, bool | int):
                    own.setdefault(key, value)
        return own


_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_ATTRIBUTES = ("is_concatenated", "moe_num_experts")


def _shared_tensors(model: nn.Module) -> list[list[str]]:
    """The names of every parameter and buffer that has several."""
    names: dict[int, list[str]] = {}
    tensors: list[tuple[str, Tensor]] = [*model.named_parameters(remove_duplicate=False)]
    for name, tensor in [*tensors, *model.named_buffers(remove_duplicate=False)]:
        names.setdefault(id(tensor), []).append(name)
    return [of_one for of_one in names.values() if len(of_one) > 1]
