"""Couplings from tensor names and shapes, the same for a model in memory and for a checkpoint on disk.

Inside a head means: the same head dimension for all query heads that share a key/value head, because
attention mixes the value channels of one position with those of others, channel by channel, and copies
key/value heads. Queries and keys are not reordered: rotary embeddings pair their channels, neighbours in some
formats and halves of a head in others.

A fold is refused where names and shapes leave room for another model: an axis that could be either, tensors
that hold several things in a form that the type of the model does not tell, queries that bring a gate for the
values along, values of other layers, and parameters beside the layers that could act on the channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nmsolve.permute.channels import Channels, Place, UnknownLayout, channels_of, input_axis
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.part_configs import Config, PartConfigs, heads_of
from nmsolve.permute.rules import BESIDE_ATTENTION, BESIDE_MLP, CLOSED, RULES, SUBLAYERS, Rule

__all__ = ["named_couplings"]

Shapes = Mapping[str, tuple[int, ...]]

# Configurations in which values are more than a projection of the layer's input, and how.
_OTHER_VALUES = {
    "num_kv_shared_layers": "layers of this model may read values of other layers",
    "use_cla": "layers of this model may read values of other layers",
    "rotary_value": "rotary embeddings pair the channels of this model's values",
}


def named_couplings(shapes: Shapes, config: Config | PartConfigs | None = None) -> list[Coupling]:
    """The couplings that tensor names and shapes show, as a checkpoint on disk has them.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
    config : mapping or PartConfigs, optional
        A Hugging Face configuration: the type of the model and its numbers of heads are read.

    Returns
    -------
    list of Coupling
    """
    configs = config if isinstance(config, PartConfigs) else PartConfigs(config or {})
    names = _Names(shapes)
    found: dict[str, Coupling] = {}
    readers: list[Coupling] = []
    for name in shapes:
        pair = _pair_at(name, names, configs)
        if pair is not None:
            coupling = pair.coupling()
            found[coupling.name] = coupling
            readers += pair.readers()
    consumed = {site.tensor for coupling in found.values() for site in coupling.consumers}
    for reader in readers:
        if not any(site.tensor in consumed for site in reader.consumers):
            consumed |= {site.tensor for site in reader.consumers}
            found[reader.name] = reader
    return list(found.values())


def _by_end() -> dict[str, list[Rule]]:
    ends: dict[str, list[Rule]] = {}
    for rule in RULES:
        ends.setdefault(rule.consumer.rpartition(".")[2], []).append(rule)
    return ends


_BY_END = _by_end()


def _pair_at(name: str, names: _Names, configs: PartConfigs) -> _Pair | None:
    """The pair of layers whose consumer has the weight ``name``, by the rule for its type if there is one."""
    layer = _layer(name)
    refused = None
    for rule in _BY_END.get(layer.rpartition(".")[2], ()):
        prefix = _prefix(layer, rule.consumer)
        pair = None if prefix is None else _Pair.of(rule, prefix, names, configs)
        if pair is not None and pair.known_type:
            return pair
        refused = refused or pair
    return refused


def _layer(tensor: str) -> str:
    """A weight's layer: its name without the end; that of a parameter of its own is the parameter's."""
    return tensor.removesuffix(".weight")


def _prefix(name: str, suffix: str) -> str | None:
    """What stands before ``suffix``, if the name ends in it at a dot."""
    if name == suffix:
        return ""
    return name[: -len(suffix)] if name.endswith(f".{suffix}") else None


@dataclass(frozen=True)
class _Names:
    """Tensors by their names, and by the modules that they are in."""

    shapes: Shapes
    inside: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.shapes:
            end = 0
            while end >= 0:
                self.inside.setdefault(name[:end], []).append(name)
                found = name.find(".", end)
                end = found + 1 if found >= 0 else -1

    def weight(self, layer: str) -> str | None:
        """The name of a layer's weight."""
        return next((n for n in (f"{layer}.weight", layer) if n in self.shapes), None)

    def bias(self, layer: str, weight: str) -> str | None:
        """The name of its bias, if it has one."""
        name = f"{layer}.bias" if weight != layer else f"{layer.removesuffix('_weight')}_bias"
        return name if name in self.shapes else None


@dataclass(frozen=True)
class _Pair:
    """A rule where it applies, with the names of its layers' weights."""

    rule: Rule
    names: _Names
    place: Place
    consumer: str
    producers: tuple[str, ...]

    @classmethod
    def of(cls, rule: Rule, prefix: str, names: _Names, configs: PartConfigs) -> _Pair | None:
        """None where the rule's layers are not there, or are of another kind."""
        if rule.consumer == "output.dense" and prefix.endswith("attention."):
            return None
        layers = [f"{prefix}{layer}" for layer in (rule.consumer, *rule.producers)]
        weights = [name for name in map(names.weight, layers) if name is not None]
        shapes = [names.shapes[name] for name in weights]
        if len(weights) < len(layers) or any(len(shape) < 2 for shape in shapes):
            return None
        if weights[0] == layers[0] and not rule.consumer.startswith("experts."):
            return None
        bias = names.bias(layers[1], weights[1])
        config = configs.at(weights[0], shapes[0][0])
        biases = None if bias is None else names.shapes[bias][-1]
        place = Place(rule, prefix, shapes[0], tuple(shapes[1:]), biases, config)
        return cls(rule, names, place, weights[0], tuple(weights[1:]))

    @property
    def known_type(self) -> bool:
        """Whether the rule holds for the type of the model."""
        return not self.rule.types or self.place.config.get("model_type") in self.rule.types

    def coupling(self) -> Coupling:
        """With the reason where it does not fold."""
        axis, stacked = 1, self.place.stacked
        try:
            axis = input_axis(self.place)
            channels = channels_of(self.place, axis)
            self._check_queries(axis)
            producers = tuple(self._producers(channels))
            self._check_strangers(channels.heads * channels.repeats * channels.size, 1 - axis)
        except UnknownLayout as unknown:
            site = Site(self.consumer, axis + stacked)
            size = self.place.consumer[site.axis]
            return Coupling(self.place.reader, 1, size, (site,), (), str(unknown))
        consumer = channels.of_consumer(self.consumer)
        return Coupling(self.place.reader, channels.heads, channels.size, (consumer,), producers)

    def _producers(self, channels: Channels) -> Iterator[Site]:
        """The sites of weights, then of biases, then of the norms between."""
        for weight in self.producers:
            yield from channels.of_producer(weight, bias=False)
        for name in self._biases():
            yield from channels.of_producer(name, bias=True)
        for norm in self.rule.between:
            for name in self.names.inside.get(f"{self.place.prefix}{norm}.", ()):
                shape = self.names.shapes[name]
                if shape != (*(1,) * (len(shape) - 1), channels.size):
                    raise UnknownLayout(f"{name} has {list(shape)} elements for {channels.size} channels")
                yield Site(name, len(shape) - 1)

    def _biases(self) -> list[str]:
        layers = [f"{self.place.prefix}{layer}" for layer in self.rule.producers]
        pairs = zip(layers, self.producers, strict=True)
        return [name for layer, weight in pairs if (name := self.names.bias(layer, weight)) is not None]

    def _check_queries(self, axis: int) -> None:
        """Refuses values of other layers, and queries that bring a gate for the values along."""
        config, prefix, inputs = self.place.config, self.place.prefix, self.place.consumer[axis]
        if not self.rule.attention:
            return
        for name, why in _OTHER_VALUES.items():
            if config.get(name):
                raise UnknownLayout(f"{why} ({name} = {config[name]})")
        queries = [f"{prefix}{self.rule.queries}.weight"] if self.rule.queries else []
        if self.rule.layout == "keyed":
            heads, _ = heads_of(config, self.place.reader)
            key, rope = (config.get(f"qk_{part}_head_dim") for part in ("nope", "rope"))
            inputs = heads * (key + rope) if isinstance(key, int) and isinstance(rope, int) else -1
            direct, ranked = (f"{prefix}self_attn.{layer}.weight" for layer in ("q_proj", "q_b_proj"))
            queries = [ranked if ranked in self.names.shapes else direct]
        for query in queries:
            shape = self.names.shapes.get(query)
            if shape is None:
                raise UnknownLayout(f"there is no {query}, so that what becomes of the values is unknown")
            if shape[0] != inputs:
                raise UnknownLayout(
                    f"{query} has {shape[0]} outputs for {inputs} channels: a gate may be among them"
                )

    def readers(self) -> list[Coupling]:
        """Layers that share the input of the first one, which they read from the residual stream."""
        layers = [f"{self.place.prefix}{layer}" for layer in self.rule.readers]
        weights = [f"{layer}.weight" for layer in layers if f"{layer}.weight" in self.names.shapes]
        try:
            axis = input_axis(self.place)
        except UnknownLayout:
            return []
        sizes = {self.names.shapes[weight][axis] for weight in weights}
        if len(sizes) != 1 or self.place.stacked:
            return []
        sites = tuple(Site(weight, axis) for weight in weights)
        reason = "its inputs are the residual stream, which other layers read and write"
        return [Coupling(_layer(weights[0]), 1, sizes.pop(), sites, (), reason)]

    def _check_strangers(self, channels: int, out_axis: int) -> None:
        """Refuses the fold where unknown parameters stand beside the pair.

        In a module that is an attention or an MLP nothing unknown may stand. Elsewhere nothing may that is
        as long as the channels; where the outputs are as many, sublayers and norms with usual names may.
        """
        home = f"{self.place.prefix}{_home(self.rule)}"
        layers = [f"{self.place.prefix}{layer}." for layer in (self.rule.consumer, *self.rule.producers)]
        bias = self.names.bias(self.place.reader, self.consumer)
        own = {self.consumer, *self.producers, *self._biases(), bias}
        between = tuple(f"{self.place.prefix}{norm}." for norm in self.rule.between)
        within = next((part for part in reversed(home.split(".")) if part and not part.isdigit()), "")
        closed = self.rule.closed or self.rule.attention or within in CLOSED
        outputs = self.place.consumer[out_axis + self.place.stacked]
        for name in self.names.inside.get(home, ()):
            shape, inner = self.names.shapes[name], name[len(home) :]
            if name in own or name.startswith(between) or not shape:
                continue
            if any(name.startswith(layer) for layer in layers):
                strange = True
            elif closed:
                strange = not self._may_stand(inner, shape, channels)
            else:
                strange = inner.count(".") <= 2 and channels in shape and not _starts(inner, SUBLAYERS)
                module = inner.rpartition(".")[0]
                if channels == outputs and "norm" in module.lower() and "ffn" not in module:
                    strange = False
            if strange:
                raise UnknownLayout(
                    f"{name} stands beside these layers, and what it does to the channels is unknown"
                )

    def _may_stand(self, inner: str, shape: tuple[int, ...], channels: int) -> bool:
        """Whether a tensor of a closed module, named from there on, leaves the channels alone."""
        if not self.rule.attention:
            if self.rule.beside:
                return _starts(inner, self.rule.beside)
            scalar = inner.startswith("act") and math.prod(shape) == 1
            return scalar or (channels not in shape and _starts(inner, BESIDE_MLP))
        if inner == "bias" and len(shape) == 4 and shape[:2] == (1, 1):  # the causal mask of older files
            return True
        if self.rule.home and _starts(inner, ("output",)):  # what follows the consumer
            return True
        inner = inner.removeprefix("self.").removeprefix("attention.")
        return _starts(inner, (*BESIDE_ATTENTION, *self.rule.beside))


def _home(rule: Rule) -> str:
    """The module in which a rule's layers stand, with its dot, from the common prefix of their names on."""
    modules = {layer.rpartition(".")[0] for layer in (rule.consumer, *rule.producers)}
    home = rule.home or (modules.pop() if len(modules) == 1 else "")
    return f"{home}." if home else ""


def _starts(name: str, firsts: tuple[str, ...]) -> bool:
    """Whether a name is one of ``firsts`` or continues it at a dot."""
    return any(name == first or name.startswith(f"{first}.") for first in firsts)
