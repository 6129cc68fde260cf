"""Which channels of a model can be reordered, and what has to move with them.

A *coupling* is a set of channels that one permutation reorders. Its consumers are weights whose input columns
are these channels: they are what an N:M mask sees in the new order. Its producers are weights, biases and
norm parameters whose outputs are the channels. With producers known, an order *folds*: both sides are
reordered once and the model computes the same function at no cost. Without them (channels of the residual
stream, which every layer reads and writes) the consumers need a run-time gather of their input.

Couplings are read from tensor names and shapes, so that they are the same for a model in memory and for a
checkpoint on disk; what only the modules of a model tell is in :mod:`nmsolve.permute.model_couplings`.

==============  =========================================  =================================
family          folds                                      needs a gather
==============  =========================================  =================================
Llama, Qwen,    down_proj from up_proj and gate_proj;      q/k/v_proj; up/gate_proj
Mistral, ...    o_proj from v_proj, inside a head
OPT             fc2 from fc1; out_proj from v_proj         q/k/v_proj; fc1
BERT            output.dense from intermediate.dense;      query/key/value; intermediate.dense
                attention.output.dense from value
GPT-2           c_proj from c_fc; c_proj from c_attn's     c_attn; c_fc
                value third (weights stored (in, out))
Starcoder2, ... c_proj from c_fc (weights (out, in))       c_fc
==============  =========================================  =================================

Inside a head means: the same head dimension for all query heads that share a key/value head, because
attention mixes the value channels of one position with those of others, channel by channel, and copies
key/value heads. Queries and keys are not reordered: rotary embeddings pair their channels, neighbours in some
formats and halves of a head in others.

A fold is refused where names and shapes leave room for another model: an axis that could be either, values
that lie between queries and keys in a form that is not GPT-2's, queries that bring a gate for the values
along, values of other layers, and parameters beside the layers that could act on the channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Coupling", "Site", "named_couplings"]


class Site(NamedTuple):
    """Where a tensor has the channels: ``length`` consecutive indices from ``start`` on along ``axis``.

    The channels lie there as ``(heads, repeats, size)``, heads and size as in the coupling.
    """

    tensor: str
    axis: int
    start: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class Coupling:
    """Channels that are reordered together.

    Attributes
    ----------
    name : str
        Of the first consumer: ``"model.layers.0.mlp.down_proj"``.
    heads, size : int
        A permutation is int64 ``(heads, size)``, or ``(size,)`` where heads is 1: channels move within a
        head.
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
        """The order of the site's indices, ``(heads * repeats * size,)``, counted from ``site.start``."""
        order = permutation.reshape(self.heads, 1, self.size)
        blocks = torch.arange(self.heads * site.repeats, device=order.device).view(
            self.heads, site.repeats, 1
        )
        return (blocks * self.size + order).flatten()

    def scores(self, weights: Mapping[str, Tensor], sites: Sequence[Site] | None = None) -> Tensor:
        """The consumers' scores as one tensor ``(*shape[:-1], rows, size)`` that a search takes.

        ``weights`` maps the consumers' tensor names to ``(out, in)`` or ``(in, out)`` scores, as the tensors
        are. Rows of all consumers, and the heads that share one permutation, are stacked.
        """
        parts = []
        for site in self.consumers if sites is None else sites:
            matrix = weights[site.tensor].movedim(site.axis, -1).flatten(0, -2)
            split = matrix[:, site.start : site.start + self.heads * site.repeats * self.size]
            split = split.unflatten(1, (self.heads, site.repeats, self.size))
            parts.append(split.permute(1, 0, 2, 3).flatten(1, 2))
        stacked = torch.cat(parts, dim=1)
        return stacked[0] if self.heads == 1 else stacked


class _Rule(NamedTuple):
    """A family's pair of layers: tensors are ``<prefix>.<suffix>.weight`` and ``.bias``."""

    consumer: str
    producers: tuple[str, ...]
    # Consumers that share the input of the first one; they then read the residual stream.
    readers: tuple[tuple[str, ...], ...]
    attention: bool = False
    # Names that transformers' Conv1D, stored (in, out), shares with linear layers, stored (out, in).
    conv1d: bool = False
    # Index of the value part of a producer that holds queries, keys and values.
    third: int = 0


_RULES = (
    _Rule("down_proj", ("up_proj", "gate_proj"), (("up_proj", "gate_proj"),)),
    _Rule("w2", ("w3", "w1"), (("w3", "w1"),)),
    _Rule("fc2", ("fc1",), (("fc1",),)),
    _Rule("output.dense", ("intermediate.dense",), (("intermediate.dense",),)),
    _Rule("mlp.c_proj", ("mlp.c_fc",), (("mlp.c_fc",),), conv1d=True),
    _Rule("o_proj", ("v_proj",), (("q_proj", "k_proj", "v_proj"),), attention=True),
    _Rule("out_proj", ("v_proj",), (("q_proj", "k_proj", "v_proj"),), attention=True),
    _Rule(
        "attention.output.dense",
        ("attention.self.value",),
        (("attention.self.query", "attention.self.key", "attention.self.value"),),
        attention=True,
    ),
    _Rule("attn.c_proj", ("attn.c_attn",), (("attn.c_attn",),), attention=True, conv1d=True, third=2),
)

# What may stand in the same module as a pair of layers without touching the channels between them: in an MLP
# and in an attention, whose queries are checked apart.
_BESIDE_MLP = ("router", "gate", "rotary_emb")
_BESIDE_ATTENTION = (
    *("q_proj", "k_proj", "q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_norm", "rotary_emb", "sinks"),
    *("query", "key", "distance_embedding", "relative_position_bias", "logit_scale"),
    *("continuous_position_bias_mlp", "relative_attention_bias"),
)
# Sublayers and norms that stand beside an MLP where it has no module of its own.
_SUBLAYERS = ("self_attn", "encoder_attn", "cross_attn", "attn", "attention", "crossattention", "output")
# Configurations in which a layer may read the values of another one.
_SHARED_VALUES = ("num_kv_shared_layers", "use_cla")


def named_couplings(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object] | None = None
) -> list[Coupling]:
    """The couplings that tensor names and shapes show, as a checkpoint on disk has them.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
    config : mapping, optional
        A Hugging Face configuration; ``num_attention_heads`` (``n_head``) and ``num_key_value_heads`` are
        read.

    Returns
    -------
    list of Coupling
    """
    found: list[Coupling] = []
    for name in shapes:
        for rule in _RULES:
            prefix = _prefix(name, f"{rule.consumer}.weight")
            if prefix is None or any(f"{prefix}{p}.weight" not in shapes for p in rule.producers):
                continue
            if rule.consumer == "output.dense" and prefix.endswith("attention."):
                continue
            input_axis, reason = _input_axis(rule, prefix, shapes, config or {})
            found.append(_pair(rule, prefix, shapes, config or {}, input_axis, reason))
            for group in rule.readers if not reason else ():
                readers = [r for r in group if f"{prefix}{r}.weight" in shapes]
                reader = _readers(readers, prefix, shapes, input_axis)
                if reader is not None and all(reader.name != c.name for c in found):
                    found.append(reader)
    return found


def _prefix(name: str, suffix: str) -> str | None:
    """What stands before ``suffix``, if the name ends in it at a dot."""
    if name == suffix:
        return ""
    return name[: -len(suffix)] if name.endswith(f".{suffix}") else None


def _input_axis(
    rule: _Rule, prefix: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> tuple[int, str]:
    """The axis of the inputs in weights of a rule, and why it is unknown."""
    if not rule.conv1d:
        return 1, ""
    name = f"{prefix}{rule.producers[0]}"
    shape, last = shapes[f"{name}.weight"], shapes[f"{prefix}{rule.consumer}.weight"]
    if rule.third:
        if len(shape) == 2 and shape[1] == 3 * shape[0] and last == (shape[0], shape[0]):
            return 0, ""
        return 1, f"{name} does not hold queries, keys and values of one size one after the other, as GPT-2's"
    (outputs,) = shapes.get(f"{name}.bias", (0,))
    hidden = config.get("n_embd", config.get("hidden_size"))
    axes = [axis for axis in (0, 1) if outputs == shape[1 - axis] or (not outputs and hidden == shape[axis])]
    if len(axes) != 1 or shape[0] == shape[1]:
        return 1, f"the shape of {name}.weight does not tell which axis is the input"
    return axes[0], ""


def _pair(
    rule: _Rule,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, object],
    in_axis: int,
    reason: str,
) -> Coupling:
    out_axis = 1 - in_axis
    consumer = f"{prefix}{rule.consumer}"
    inputs = shapes[f"{consumer}.weight"][in_axis]
    weights = [f"{prefix}{p}.weight" for p in rule.producers]
    outputs = shapes[weights[0]][out_axis] // (3 if rule.third else 1)
    heads, repeats, size = 1, 1, inputs
    if rule.attention and not reason:
        heads, repeats, reason = _heads(inputs, outputs, config)
        size = outputs // heads
        reason = reason or _other_values(rule, prefix, shapes, config, inputs)
    elif any(shapes[w][out_axis] != inputs for w in weights):
        reason = reason or f"{consumer} has {inputs} inputs, but its producers have other numbers of outputs"
    reason = reason or _strangers(rule, prefix, shapes, inputs, shapes[f"{consumer}.weight"][out_axis])
    start = rule.third * outputs
    producers = [Site(w, out_axis, start) for w in weights]
    biases = [f"{prefix}{p}.bias" for p in rule.producers]
    producers += [Site(b, 0, start) for b in biases if b in shapes]
    if reason:
        heads, repeats, size, producers = 1, 1, inputs, []
    site = Site(f"{consumer}.weight", in_axis, 0, repeats)
    return Coupling(consumer, heads, size, (site,), tuple(producers), reason)


def _heads(inputs: int, outputs: int, config: Mapping[str, object]) -> tuple[int, int, str]:
    """(key/value heads, query heads of each, why they are unknown)."""
    heads = config.get("num_attention_heads", config.get("n_head"))
    if not isinstance(heads, int) or heads < 1:
        return 1, 1, "the number of attention heads is unknown: the model has no config that says it"
    shared = config.get("num_key_value_heads") or heads
    if not isinstance(shared, int) or heads % shared or inputs % heads or outputs % shared:
        return 1, 1, f"{heads} heads and {shared} key/value heads do not divide the layers' sizes"
    if inputs // heads != outputs // shared:
        return 1, 1, "query and value heads have different sizes"
    return shared, heads // shared, ""


def _other_values(
    rule: _Rule,
    prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, object],
    inputs: int,
) -> str:
    """Why the values that a layer reads may not be what its producer writes."""
    for key in _SHARED_VALUES:
        if config.get(key):
            return f"layers of this model may read values of other layers ({key} = {config[key]})"
    if not rule.third:
        query = f"{prefix}{rule.readers[0][0]}.weight"
        if query not in shapes:
            return f"there is no {query}, so that what becomes of the values is unknown"
        if shapes[query][0] != inputs:
            return f"{query} has {shapes[query][0]} outputs for {inputs} channels: a gate may be among them"
    return ""


def _strangers(
    rule: _Rule, prefix: str, shapes: Mapping[str, tuple[int, ...]], channels: int, outputs: int
) -> str:
    """Why unknown parameters beside the pair forbid a fold.

    In a module that is an attention or an MLP nothing unknown may stand. Elsewhere nothing may that is as
    long as the channels; where the outputs are as many, sublayers and norms with usual names may.
    """
    home, known = prefix, (rule.consumer, *rule.producers)
    if rule.consumer.startswith("attention."):
        home, known = f"{prefix}attention.", tuple(name.removeprefix("attention.") for name in known)
        known = (*known, "output")  # what follows the consumer there
    elif rule.third:
        home, known = f"{prefix}attn.", tuple(name.removeprefix("attn.") for name in known)
    elif rule.consumer.startswith("mlp."):
        home, known = f"{prefix}mlp.", tuple(name.removeprefix("mlp.") for name in known)
    closed = rule.attention or home.endswith("mlp.")
    beside = _BESIDE_ATTENTION if rule.attention else _BESIDE_MLP
    for name, shape in shapes.items():
        if not name.startswith(home):
            continue
        inner = name[len(home) :]
        module, _, _ = inner.rpartition(".")
        if _starts(inner, known):
            continue
        if closed:
            parts = inner.removeprefix("self.").removeprefix("attention.")
            strange = not _starts(parts, beside) and len(shape) > 0
        else:
            strange = inner.count(".") <= 2 and channels in shape and not _starts(inner, _SUBLAYERS)
            if channels == outputs and "norm" in module.lower() and "ffn" not in module:
                strange = False
        if strange:
            return f"{name} stands beside these layers, and what it does to the channels is unknown"
    return ""


def _starts(name: str, firsts: Sequence[str]) -> bool:
    """Whether a name is one of ``firsts`` or continues it at a dot."""
    return any(name == first or name.startswith(f"{first}.") for first in firsts)


def _readers(
    names: Sequence[str], prefix: str, shapes: Mapping[str, tuple[int, ...]], axis: int
) -> Coupling | None:
    sites = tuple(Site(f"{prefix}{name}.weight", axis) for name in names)
    sizes = {shapes[site.tensor][axis] for site in sites}
    if len(sizes) != 1:
        return None
    reason = "its inputs are the residual stream, which other layers read and write"
    return Coupling(f"{prefix}{names[0]}", 1, sizes.pop(), sites, (), reason)
