"""The table of layers that write channels and layers that read them, by their names in Hugging Face models.

A row pairs a *consumer* with its *producers* in one module: ``down_proj`` reads what ``up_proj`` and
``gate_proj`` write. ``layout`` says where the producers have the channels among their outputs; other layouts
than "all" cannot be told from names and shapes, so that such a row holds for the ``model_type`` that it names
and for no other.

The table is data: :mod:`nmsolve.permute.named` applies it. A family of its own layout is a row here, and a
line of ``tests/permute/test_families.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["BESIDE_ATTENTION", "BESIDE_MLP", "CLOSED", "RULES", "SUBLAYERS", "Layout", "Rule"]

Layout = Literal["all", "halves", "alternate", "experts", "stacked", "grouped", "third", "keyed", "first"]
"""Where producers have a consumer's channels among their outputs.

==========  ==================================================================================
all         the outputs are the channels
halves      two sets of them, one after the other: gate and up
alternate   gate, up, gate, up, ...
experts     stacked experts: halves or alternate, as their module or the type of the model says
stacked     all queries, then all keys, then all values
third       the same with as many keys and values as queries, known by its shape
grouped     for each key/value head its queries, its key and its value
keyed       for each head a part of its key, then its value
first       the first of the outputs; what follows is no part of the channels
==========  ==================================================================================
"""


@dataclass(frozen=True)
class Rule:
    """A consumer and its producers, named from their common module on.

    Attributes
    ----------
    consumer : str
    producers : tuple of str
    layout : Layout
    between : tuple of str
        Norms between the two whose parameters follow the channels.
    queries : str
        The layer that writes the queries, where it is one of its own; makes it a rule of an attention.
    readers : tuple of str
        Consumers that share an input from the residual stream.
    home : str
        The module in which both stand, where that is not the one that ``consumer`` names.
    closed : bool
        Whether nothing unknown may stand in that module, whatever it is called.
    beside : tuple of str
        What else may stand in it without touching the channels.
    types : frozenset of str
        Values of ``model_type`` that the rule holds for; all where it is empty.
    conv1d : bool
        The names are those of transformers' Conv1D, stored (in, out), and of linear layers.
    turned : bool
        The experts of a layer stand one below the other in matrices, the consumer's stored (in, out) and the
        producers' (out, in).
    oblong : bool
        Only shapes tell which of the layers is which, so that square ones tell nothing.
    """

    consumer: str
    producers: tuple[str, ...]
    layout: Layout = "all"
    between: tuple[str, ...] = ()
    queries: str = ""
    readers: tuple[str, ...] = ()
    home: str = ""
    closed: bool = False
    beside: tuple[str, ...] = ()
    types: frozenset[str] = frozenset()
    conv1d: bool = False
    turned: bool = False
    oblong: bool = False

    @property
    def attention(self) -> bool:
        """Whether the channels are those of values, which move inside their heads."""
        return bool(self.queries) or self.layout in ("stacked", "third", "grouped", "keyed")


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Vision towers whose blocks are called `attn.qkv` and `attn.proj`; the same type names their older files.
_QKV_VISION = _types(
    "qwen2_vl qwen2_vl_vision qwen2_5_vl qwen2_5_vl_vision qwen3_vl qwen3_vl_vision qwen3_vl_moe "
    "qwen3_vl_moe_vision glm4v glm4v_vision glm4v_moe glm4v_moe_vision"
)
_GATE_UP = _types("phi3 phi4_multimodal phi4_multimodal_audio glm glm4 glm4v glm4v_text")
_T5 = _types("t5 mt5 umt5 longt5 switch_transformers mpnet")
_DINO = _types("dinov2 dinov2_with_registers")
_GRANITE = _types("granitemoe granitemoeshared granitemoehybrid granitemoe_swa")
_MLA = (
    *("q_proj", "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"),
    *("kv_b_proj", "o_proj", "rotary_emb"),
)
_QKV = ("q_proj", "k_proj", "v_proj")

RULES = (
    # MLPs.
    Rule("down_proj", ("up_proj", "gate_proj"), readers=("up_proj", "gate_proj")),
    Rule("down_proj", ("up_proj",), readers=("up_proj",), closed=True),
    Rule("down_proj", ("gate_up_proj",), "halves", readers=("gate_up_proj",), closed=True, types=_GATE_UP),
    Rule("w2", ("w3", "w1"), readers=("w3", "w1"), oblong=True),
    Rule("fc2", ("fc1",), readers=("fc1",)),
    Rule("output.dense", ("intermediate.dense",), readers=("intermediate.dense",)),
    Rule("mlp.c_proj", ("mlp.c_fc",), readers=("mlp.c_fc",), conv1d=True),
    Rule("dense_4h_to_h", ("dense_h_to_4h",), readers=("dense_h_to_4h",), closed=True),
    Rule("fc_out", ("fc_in",), readers=("fc_in",), closed=True),
    Rule("lin2", ("lin1",), readers=("lin1",), closed=True),
    Rule("output_dense", ("intermediate_dense",), readers=("intermediate_dense",), closed=True),
    Rule("linear_fc2", ("linear_fc1",), readers=("linear_fc1",), closed=True),
    Rule("linear_2", ("linear_1",), closed=True),
    Rule("linear2", ("linear1",), readers=("linear1",)),
    Rule("wo", ("wi_0", "wi_1"), readers=("wi_0", "wi_1"), closed=True),
    Rule("wo", ("wi",), readers=("wi",), closed=True),
    Rule("Wo", ("Wi",), "halves", readers=("Wi",), closed=True, types=_types("modernbert")),
    Rule("weights_out", ("weights_in",), "halves", readers=("weights_in",), closed=True, types=_DINO),
    Rule("pwconv2", ("pwconv1",), between=("grn",), readers=("pwconv1",)),
    Rule("ffn_output", ("ffn",), readers=("ffn",), types=_types("albert")),
    # Experts, and layers of experts in one.
    Rule("experts.down_proj", ("experts.gate_up_proj",), "experts", home="experts", closed=True),
    Rule("experts.down_proj", ("experts.up_proj",), home="experts", closed=True, types=_types("nemotron_h")),
    Rule("experts.mlp.w2", ("experts.mlp.v1", "experts.mlp.w1"), types=_types("dbrx"), turned=True),
    Rule("output_linear", ("input_linear",), "halves", types=_GRANITE, closed=True),
    # Values of attentions.
    Rule("o_proj", ("v_proj",), queries="q_proj", readers=_QKV),
    Rule("out_proj", ("v_proj",), queries="q_proj", readers=_QKV),
    Rule("dense", ("v_proj",), queries="q_proj", readers=_QKV),
    Rule("out_lin", ("v_lin",), queries="q_lin", readers=("q_lin", "k_lin", "v_lin")),
    Rule("o", ("v",), queries="q", readers=("q", "k", "v"), types=_T5),
    Rule(
        "attention.output.dense",
        ("attention.self.value",),
        queries="attention.self.query",
        readers=("attention.self.query", "attention.self.key", "attention.self.value"),
        home="attention",
    ),
    Rule(
        "attention.output.dense",
        ("attention.attention.value",),
        queries="attention.attention.query",
        readers=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
        home="attention",
    ),
    Rule(
        "attention.output.dense",
        ("attention.self.value_proj",),
        queries="attention.self.query_proj",
        home="attention",
        beside=("pos_proj", "pos_key_proj", "pos_query_proj", "query_proj", "key_proj"),
        types=_types("deberta-v2"),
    ),
    Rule(
        "attention.dense",
        ("attention.value",),
        queries="attention.query",
        readers=("attention.query", "attention.key", "attention.value"),
        beside=("LayerNorm",),
        types=_types("albert"),
    ),
    Rule("attn.c_proj", ("attn.c_attn",), "grouped", readers=("attn.c_attn",), types=_types("gpt_bigcode")),
    Rule("attn.c_proj", ("attn.c_attn",), "third", readers=("attn.c_attn",), conv1d=True),
    Rule(
        "self_attn.o_proj",
        ("self_attn.qkv_proj",),
        "stacked",
        readers=("self_attn.qkv_proj",),
        types=_types("phi3 phi4_multimodal"),
    ),
    Rule("attn.out_proj", ("attn.Wqkv",), "stacked", readers=("attn.Wqkv",), types=_types("mpt dbrx")),
    Rule("attn.Wo", ("attn.Wqkv",), "stacked", readers=("attn.Wqkv",), types=_types("modernbert")),
    Rule("attn.proj", ("attn.qkv",), "stacked", readers=("attn.qkv",), types=_QKV_VISION),
    Rule(
        "attention.dense",
        ("attention.query_key_value",),
        "grouped",
        readers=("attention.query_key_value",),
        types=_types("gpt_neox"),
    ),
    Rule(
        "self_attention.dense",
        ("self_attention.query_key_value",),
        "grouped",
        readers=("self_attention.query_key_value",),
        types=_types("bloom falcon"),
    ),
    # torch.nn.MultiheadAttention keeps the three projections in one tensor.
    Rule("out_proj", ("in_proj_weight",), "stacked"),
    # Multi-head latent attention: values, and both latents.
    Rule("self_attn.o_proj", ("self_attn.kv_b_proj",), "keyed", beside=_MLA),
    Rule(
        "self_attn.q_b_proj",
        ("self_attn.q_a_proj",),
        between=("self_attn.q_a_layernorm",),
        closed=True,
        beside=_MLA,
    ),
    Rule(
        "self_attn.kv_b_proj",
        ("self_attn.kv_a_proj_with_mqa",),
        "first",
        between=("self_attn.kv_a_layernorm",),
        closed=True,
        beside=_MLA,
    ),
)

# Modules that are an MLP, or one expert of several: whatever else stands in one of them acts on its channels.
CLOSED = (
    *("mlp", "ffn", "ffns", "ff", "feed_forward", "DenseReluDense", "experts", "shared_expert"),
    *("shared_experts", "shared_mlp"),
)

# What may stand in the same module as a pair of layers without touching the channels between them: in an MLP
# and in an attention, whose queries are checked apart.
BESIDE_MLP = ("router", "gate", "rotary_emb")
BESIDE_ATTENTION = (
    *("q_proj", "k_proj", "q_norm", "k_norm", "q_layernorm", "k_layernorm", "qk_norm", "rotary_emb", "sinks"),
    *("query_layernorm", "key_layernorm", "q_lin", "k_lin", "q", "k"),
    *("query", "key", "distance_embedding", "relative_position_bias", "logit_scale", "masked_bias"),
    *("continuous_position_bias_mlp", "relative_attention_bias", "relative_position_bias_table"),
    "relative_position_index",
)

# Sublayers and norms that stand beside an MLP where it has no module of its own.
SUBLAYERS = (
    *("self_attn", "encoder_attn", "cross_attn", "attn", "attention", "crossattention", "output"),
    "multihead_attn",
)
