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
==============  =========================================  =================================

Inside a head means: the same head dimension for all query heads that share a key/value head, because
attention mixes the value channels of one position with those of others, channel by channel, and copies
key/value heads. Queries and keys are not reordered (rotary embeddings pair their channels).
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
    input_first: bool = False
    # Index of the value part of a producer that holds queries, keys and values.
    third: int = 0


_RULES = (
    _Rule("down_proj", ("up_proj", "gate_proj"), (("up_proj", "gate_proj"),)),
    _Rule("w2", ("w3", "w1"), (("w3", "w1"),)),
    _Rule("fc2", ("fc1",), (("fc1",),)),
    _Rule("output.dense", ("intermediate.dense",), (("intermediate.dense",),)),
    _Rule("mlp.c_proj", ("mlp.c_fc",), (("mlp.c_fc",),), input_first=True),
    _Rule("o_proj", ("v_proj",), (("q_proj", "k_proj", "v_proj"),), attention=True),
    _Rule("out_proj", ("v_proj",), (("q_proj", "k_proj", "v_proj"),), attention=True),
    _Rule(
        "attention.output.dense",
        ("attention.self.value",),
        (("attention.self.query", "attention.self.key", "attention.self.value"),),
        attention=True,
    ),
    _Rule("attn.c_proj", ("attn.c_attn",), (("attn.c_attn",),), attention=True, input_first=True, third=2),
)

# Parameters that may stand beside a pair of layers without touching the channels between them.
_HARMLESS = ("q_norm", "k_norm", "rotary_emb", "q_proj", "k_proj", "router", "gate")


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
            found.append(_pair(rule, prefix, shapes, config or {}))
            for group in rule.readers:
                readers = [r for r in group if f"{prefix}{r}.weight" in shapes]
                reader = _readers(readers, prefix, shapes, rule.input_first)
                if reader is not None and all(reader.name != c.name for c in found):
                    found.append(reader)
    return found


def _prefix(name: str, suffix: str) -> str | None:
    """What stands before ``suffix``, if the name ends in it at a dot."""
    if name == suffix:
        return ""
    return name[: -len(suffix)] if name.endswith(f".{suffix}") else None


def _pair(
    rule: _Rule, prefix: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, object]
) -> Coupling:
    in_axis, out_axis = (0, 1) if rule.input_first else (1, 0)
    consumer = f"{prefix}{rule.consumer}"
    inputs = shapes[f"{consumer}.weight"][in_axis]
    weights = [f"{prefix}{p}.weight" for p in rule.producers]
    outputs = shapes[weights[0]][out_axis] // (3 if rule.third else 1)
    heads, repeats, size, reason = 1, 1, inputs, ""
    if rule.attention:
        heads, repeats, reason = _heads(inputs, outputs, config)
        size = outputs // heads
    elif any(shapes[w][out_axis] != inputs for w in weights):
        reason = f"{consumer} has {inputs} inputs, but its producers have other numbers of outputs"
    reason = reason or _strangers(rule, prefix, shapes)
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


def _strangers(rule: _Rule, prefix: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Why unknown parameters beside the pair forbid a fold; only modules of their own are looked at."""
    if not prefix.endswith((".mlp.", ".self_attn.")):
        return ""
    known = (rule.consumer, *rule.producers, *_HARMLESS)
    for name in shapes:
        if name.startswith(prefix):
            inner = name[len(prefix) :]
            if "." in inner and inner.rpartition(".")[0] not in known and not inner.startswith(_HARMLESS):
                return f"{name} stands beside these layers, and what it does to the channels is unknown"
    return ""


def _readers(
    names: Sequence[str], prefix: str, shapes: Mapping[str, tuple[int, ...]], input_first: bool
) -> Coupling | None:
    axis = 0 if input_first else 1
    sites = tuple(Site(f"{prefix}{name}.weight", axis) for name in names)
    sizes = {shapes[site.tensor][axis] for site in sites}
    if len(sizes) != 1:
        return None
    reason = "its inputs are the residual stream, which other layers read and write"
    return Coupling(f"{prefix}{names[0]}", 1, sizes.pop(), sites, (), reason)
