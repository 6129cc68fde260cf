"""Which axis and which indices of a rule's tensors are the channels, from shapes and a configuration."""

from __future__ import annotations

from dataclasses import dataclass

from nmsolve.permute.couplings import Site
from nmsolve.permute.part_configs import Config, head_size, heads_of
from nmsolve.permute.rules import Rule

__all__ = ["Channels", "Place", "UnknownLayout", "channels_of", "input_axis"]

# How stacked experts hold gate and up, by the type of the model, where their module does not say it.
_EXPERTS = {
    "gpt_oss": "alternate",
    **dict.fromkeys(("llama4", "llama4_text", "qwen3_vl_moe", "qwen3_vl_moe_text"), "halves"),
}


class UnknownLayout(Exception):
    """Why a consumer and its producers do not fold."""


@dataclass(frozen=True)
class Place:
    """Where a rule is applied.

    Attributes
    ----------
    rule : Rule
    prefix : str
        Of the names of its layers.
    consumer : tuple of int
        The shape of the consumer's weight.
    producers : tuple of tuple of int
        Those of the producers'.
    biases : int or None
        Of the first producer.
    config : Config
        Of the part of the model.
    """

    rule: Rule
    prefix: str
    consumer: tuple[int, ...]
    producers: tuple[tuple[int, ...], ...]
    biases: int | None
    config: Config

    @property
    def reader(self) -> str:
        return f"{self.prefix}{self.rule.consumer}"

    @property
    def writer(self) -> str:
        return f"{self.prefix}{self.rule.producers[0]}"

    @property
    def stacked(self) -> bool:
        """Whether the tensors hold one matrix for each expert."""
        experts = self.rule.consumer.startswith("experts.") or self.rule.layout == "halves"
        return experts and len(self.consumer) == 3 and all(len(shape) == 3 for shape in self.producers)


@dataclass(frozen=True)
class Channels:
    """The channels of a coupling, and where its tensors have them: see :class:`Site`.

    ``axis`` is that of the inputs in the consumer's matrix, ``out_axis`` that of the outputs in a producer's;
    there are ``starts``, one for each set of channels among these outputs.
    """

    axis: int
    out_axis: int
    heads: int
    size: int
    repeats: int = 1
    starts: tuple[int, ...] = (0,)
    step: int = 1
    head_step: int = 0
    stacked: bool = False

    def of_consumer(self, tensor: str) -> Site:
        """Where the consumer's weight has them."""
        return Site(tensor, self.axis + self.stacked, 0, self.repeats, 1, 0, 0 if self.stacked else None)

    def of_producer(self, tensor: str, bias: bool) -> tuple[Site, ...]:
        """Where a producer's weight or bias has them."""
        axis = self.stacked + (0 if bias else self.out_axis)
        head_axis = 0 if self.stacked else None
        return tuple(
            Site(tensor, axis, start, 1, self.step, self.head_step, head_axis) for start in self.starts
        )


def input_axis(place: Place) -> int:
    """The axis of the inputs, 0 or 1, in the matrices of a rule's layers.

    Raises
    ------
    UnknownLayout
        If they could lie along either.
    """
    if place.stacked:
        return _stacked_axis(place)
    if place.rule.turned:
        return 0
    if not place.rule.conv1d:
        return 1
    last, first = place.consumer, place.producers[0]
    if place.rule.layout == "third":
        if len(first) == 2 and first[1] == 3 * first[0] and last == (first[0], first[0]):
            return 0
        raise UnknownLayout(
            f"{place.writer} does not hold queries, keys and values of one size one after the other, "
            "as GPT-2's"
        )
    hidden = place.config.get("n_embd", place.config.get("hidden_size"))
    known = place.biases
    axes = [a for a in (0, 1) if known == first[1 - a] or (known is None and hidden == first[a])]
    if len(axes) != 1 or first[0] == first[1]:
        raise UnknownLayout(f"the shape of {place.writer}.weight does not tell which axis is the input")
    return axes[0]


def channels_of(place: Place, axis: int) -> Channels:
    """The channels of a rule's layers.

    Raises
    ------
    UnknownLayout
        If shapes and configuration do not tell them, or contradict the rule.
    """
    if place.rule.types and place.config.get("model_type") not in place.rule.types:
        of = place.config.get("model_type")
        whose = "a model of unknown type" if of is None else f"a {of!r} model"
        raise UnknownLayout(f"where {place.writer} has these channels is unknown for {whose}")
    if place.rule.oblong and place.consumer[0] == place.consumer[1]:
        raise UnknownLayout(f"{place.reader} is square, so that it may be a layer of another place")
    if place.rule.attention:
        return _of_values(place, axis)
    out_axis = 0 if place.rule.turned else 1 - axis
    inputs = place.consumer[axis + place.stacked]
    outputs = [shape[out_axis + place.stacked] for shape in place.producers]
    heads = place.consumer[0] if place.stacked else 1
    if place.rule.turned:
        heads = _expert_count(place)
    layout: str = place.rule.layout
    if layout == "experts":
        layout = _experts_layout(place)
    wanted = {"all": inputs, "halves": 2 * inputs, "alternate": 2 * inputs}.get(layout)
    if layout == "first":
        wanted = inputs + _size(place.config, "qk_rope_head_dim")
    if any(count != wanted for count in outputs):
        raise UnknownLayout(
            f"{place.reader} has {inputs} inputs, but its producers have other numbers of outputs"
        )
    if inputs % heads and not place.stacked:
        raise UnknownLayout(f"{place.reader} has {inputs} inputs, which {heads} experts do not divide")
    size = inputs if place.stacked else inputs // heads
    starts = {"halves": (0, inputs), "alternate": (0, 1)}.get(layout, (0,))
    step = 2 if layout == "alternate" else 1
    return Channels(axis, out_axis, heads, size, starts=starts, step=step, stacked=place.stacked)


def _of_values(place: Place, axis: int) -> Channels:
    """The channels of an attention's values, which its output projection reads."""
    inputs, outputs = place.consumer[axis], place.producers[0][1 - axis]
    heads, why = heads_of(place.config, place.reader)
    if why:
        raise UnknownLayout(why)
    if inputs % heads:
        raise UnknownLayout(f"{heads} heads do not divide the {inputs} inputs of {place.reader}")
    size = inputs // heads
    said = head_size(place.config)
    if said is not None and said != size:
        raise UnknownLayout(
            f"{place.reader} has {inputs} inputs, not {heads} heads of {said}, as the config says"
        )
    if place.rule.layout == "keyed":
        return _of_latent_values(place, axis, heads, size, outputs)
    fused = place.rule.layout != "all"
    shared = (outputs // size - heads) // 2 if fused else outputs // size
    if shared < 1 or heads % shared or outputs != (heads + 2 * shared if fused else shared) * size:
        raise UnknownLayout(f"{outputs} outputs of {place.writer} are no values for {heads} heads of {size}")
    stated = place.config.get("num_key_value_heads")
    if not fused and isinstance(stated, int) and stated != shared:
        raise UnknownLayout(
            f"{place.writer} has {shared} key/value heads of {size}, not {stated}, as the config says"
        )
    repeats = heads // shared
    if place.rule.layout == "grouped":
        start, head_step = (repeats + 1) * size, (repeats + 2) * size
    else:
        start, head_step = ((heads + shared) * size if fused else 0), 0
    return Channels(axis, 1 - axis, shared, size, repeats, (start,), head_step=head_step)


def _of_latent_values(place: Place, axis: int, heads: int, size: int, outputs: int) -> Channels:
    """Those of multi-head latent attention: what stands before each head's value is a part of its key."""
    key = _size(place.config, "qk_nope_head_dim")
    if outputs != heads * (key + size):
        raise UnknownLayout(f"{place.writer} has {outputs} outputs, not {heads} heads of {key} + {size}")
    return Channels(axis, 1 - axis, heads, size, starts=(key,), head_step=key + size)


def _stacked_axis(place: Place) -> int:
    up, down = place.producers[0], place.consumer
    parts = 1 if place.rule.layout == "all" else 2
    if up[0] == down[0] and (up[1], up[2]) == (parts * down[2], down[1]):
        return 1
    if parts == 2 and up[0] == down[0] and (up[1], up[2]) == (down[2], parts * down[1]):
        return 0
    raise UnknownLayout(f"the shapes of {place.reader} and {place.writer} are not those of gated experts")


def _experts_layout(place: Place) -> str:
    """Whether stacked experts have gate and up one after the other, or each beside the other."""
    told = place.config.get("is_concatenated")
    if isinstance(told, bool):
        return "halves" if told else "alternate"
    of = place.config.get("model_type")
    if of not in _EXPERTS:
        raise UnknownLayout(f"whether {place.writer} has gates and inputs in halves or in turn is unknown")
    return _EXPERTS[str(of)]


def _expert_count(place: Place) -> int:
    inner = place.config.get("ffn_config")
    config = inner if isinstance(inner, dict) else place.config
    return _size(config, "moe_num_experts")


def _size(config: Config, key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise UnknownLayout(f"the config does not say {key}")
    return value
