"""Checkpoints whose names look like a known family's and whose layers are something else.

Orders are folded where names and shapes tell what a layer is, and the model then computes the same; or they
are refused with the reason.
"""

from __future__ import annotations

import pytest
import species
import torch
import zoo

from nmsolve import NMSolveError
from nmsolve.permute import permute_checkpoint
from nmsolve.permute.named import named_couplings

H, INNER = 16, 24

# Linear layers under the names of Conv1D ones, queries that bring a gate, heads of several kinds.
FEW = ("gptneo", "gptbigcode", "starcoder2", "qwen3next")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in species.ZOO]
)
def test_the_model_computes_the_same(name, tmp_path):
    pytest.importorskip("transformers")
    model = zoo.build(name)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # norms and biases begin at constants, which no wrong order shows
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "in")
    try:
        report = permute_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", passes=1, progress=False)
    except NMSolveError as error:
        assert "no channels whose order can be folded" in str(error)  # noqa: PT017
        return
    assert all(row["after"] >= row["before"] for row in report.couplings)
    # One group keeps the same in any order.
    wide = [row for row in report.couplings if row["channels"] > 4]
    assert not wide or any(row["after"] > row["before"] for row in wide)
    batch, found = zoo.batches(name)[0], []
    for folder in ("in", "out"):
        loaded = type(model).from_pretrained(tmp_path / folder, dtype=torch.float32).eval()
        with torch.no_grad():
            found.append(loaded(**batch)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


def linear(name, out, inputs, bias=True):
    return {f"{name}.weight": (out, inputs)} | ({f"{name}.bias": (out,)} if bias else {})


def llama_attention(queries=H, **beside):
    sizes = {"q_proj": queries, "k_proj": H, "v_proj": H, "o_proj": H}
    shapes = {f"a.self_attn.{name}.weight": (out, H) for name, out in sizes.items()}
    return shapes | {f"a.self_attn.{name}": shape for name, shape in beside.items()}


def mlp(prefix, inner=INNER, **beside):
    shapes = linear(f"{prefix}fc1", inner, H) | linear(f"{prefix}fc2", H, inner)
    return shapes | {f"{prefix}{name}": shape for name, shape in beside.items()}


def gpt(c_fc, c_proj, bias):
    return {"h.mlp.c_fc.weight": c_fc, "h.mlp.c_proj.weight": c_proj} | (
        {"h.mlp.c_fc.bias": (bias,)} if bias else {}
    )


def typed(kind, **config):
    return {"model_type": kind, "num_attention_heads": 2, **config}


def experts(up, down, **biases):
    shapes = {"a.mlp.experts.gate_up_proj": up, "a.mlp.experts.down_proj": down}
    return shapes | {f"a.mlp.experts.{name}": shape for name, shape in biases.items()}


def latent(**beside):
    """Multi-head latent attention: 2 heads of 4 + 4 for keys and 6 for values, latents of 8 and 10."""
    shapes = {
        "q_a_proj": (10, H),
        "q_b_proj": (16, 10),
        "kv_a_proj_with_mqa": (12, H),
        "kv_b_proj": (20, 8),
        "o_proj": (H, 12),
    }
    norms = {"q_a_layernorm.weight": (10,), "kv_a_layernorm.weight": (8,)}
    return {f"a.self_attn.{name}.weight": shape for name, shape in shapes.items()} | {
        f"a.self_attn.{name}": shape for name, shape in {**norms, **beside}.items()
    }


# Rotary embeddings pair neighbours (Meta's files) or halves of a head (transformers'): queries and keys stay.
META = {
    f"layers.0.{name}.weight": shape
    for name, shape in {
        **dict.fromkeys(("attention.wq", "attention.wk", "attention.wv", "attention.wo"), (H, H)),
        "feed_forward.w1": (INNER, H),
        "feed_forward.w2": (H, INNER),
        "feed_forward.w3": (INNER, H),
    }.items()
}
PHI3 = {
    "l.self_attn.qkv_proj.weight": (3 * H, H),
    "l.self_attn.o_proj.weight": (H, H),
    "l.mlp.gate_up_proj.weight": (2 * INNER, H),
    "l.mlp.down_proj.weight": (H, INNER),
}
NEOX = linear("l.attention.query_key_value", 3 * H, H) | linear("l.attention.dense", H, H)


CONFIG = {"num_attention_heads": 2}
LATENT = typed("deepseek_v3", qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=6)
FOLDS = {
    "attention": (llama_attention(), CONFIG),
    "attention with norms of queries": (llama_attention(**{"q_norm.weight": (8,)}), CONFIG),
    "fc2 beside its layer's norms": (mlp("a.", **{"final_layer_norm.weight": (H,)}), {}),
    "norms as long as the channels": (mlp("a.", inner=H, **{"final_layer_norm.weight": (H,)}), {}),
    "GPT-2's file, with its causal mask": (
        {
            "h.attn.c_attn.weight": (H, 3 * H),
            "h.attn.c_proj.weight": (H, H),
            "h.attn.bias": (1, 1, 8, 8),
            "h.attn.masked_bias": (),
        },
        CONFIG,
    ),
    "grouped key/value heads by their sizes": (
        {**llama_attention(), "a.self_attn.v_proj.weight": (H // 2, H)},
        CONFIG,
    ),
    "a router beside an MLP": (
        mlp("a.mlp.", **{"gate.weight": (4, H)}),
        {},
    ),
    "an activation with one parameter": (mlp("a.mlp.", **{"act.alpha": (1,)}), {}),
    "experts in halves": (experts((4, 2 * INNER, H), (4, H, INNER)), typed("qwen3_vl_moe_text")),
    "experts in turn": (experts((4, H, 2 * INNER), (4, INNER, H)), typed("gpt_oss")),
    "torch's attention": (
        {"a.in_proj_weight": (3 * H, H), "a.in_proj_bias": (3 * H,), "a.out_proj.weight": (H, H)},
        CONFIG,
    ),
    "Conv1D": (gpt((H, INNER), (INNER, H), INNER), {}),
    "linear layers of GPT-2's names": (gpt((INNER, H), (H, INNER), INNER), {}),
    "the same without biases": (gpt((INNER, H), (H, INNER), 0), {"hidden_size": H}),
}
REFUSED = {
    "square, either axis": (gpt((H, H), (H, H), H), {}, "which axis is the input"),
    "nothing tells the axis": (gpt((H, INNER), (INNER, H), 0), {}, "which axis is the input"),
    "queries with a gate": (llama_attention(queries=2 * H), CONFIG, "a gate may be among them"),
    "heads of another size": (llama_attention(), {**CONFIG, "head_dim": 4}, "2 heads of 4"),
    "key/value heads that are not so many": (
        llama_attention(), {**CONFIG, "num_key_value_heads": 1}, "not 1, as the config says",
    ),
    "heads that differ between layers": (llama_attention(), {"num_heads": [1, 2]}, "config says [1, 2]"),
    "values with positions": (llama_attention(), {**CONFIG, "rotary_value": True}, "rotary_value = True"),
    "an unknown type": (PHI3, typed("other"), "unknown for a 'other' model"),
    "no type": (PHI3, CONFIG, "unknown for a model of unknown type"),
    "queries, keys and values of other sizes": (
        {**NEOX, "l.attention.query_key_value.weight": (4 * H - 8, H)},
        typed("gpt_neox", num_attention_heads=2), "are no values for 2 heads of 8",
    ),
    "gates that are no router": (mlp("a.mlp.", **{"gate.weight": (INNER, H)}), {}, "gate.weight stands"),
    "scales of blocks": (
        {
            "a.mlp.up_proj.weight": (INNER, H), "a.mlp.gate_proj.weight": (INNER, H),
            "a.mlp.down_proj.weight": (H, INNER), "a.mlp.down_proj.weight_scale_inv": (1, 1),
        }, {}, "weight_scale_inv stands",
    ),
    "square w1, w2 and w3": (
        {f"a.{name}.weight": (H, H) for name in ("w1", "w2", "w3")}, {}, "a.w2 is square",
    ),
    "experts in an unknown order": (
        experts((4, 2 * INNER, H), (4, H, INNER)), typed("other"), "in halves or in turn is unknown",
    ),
    "experts of other sizes": (
        experts((4, 2 * INNER, H), (4, H, INNER + 1)), typed("gpt_oss"), "not those of gated experts",
    ),
    "experts with something between": (
        experts((4, H, 2 * INNER), (4, INNER, H), norm=(4, INNER)), typed("gpt_oss"), "experts.norm stands",
    ),
    "an output gate": (llama_attention(**{"gate_proj.weight": (H, H)}), CONFIG, "gate_proj.weight stands"),
    "a norm of the values": (llama_attention(**{"v_norm.weight": (8,)}), CONFIG, "v_norm.weight stands"),
    "differential attention": (llama_attention(lambda_q1=(8,)), CONFIG, "lambda_q1 stands"),
    "values of other layers": (
        llama_attention(), {**CONFIG, "num_kv_shared_layers": 1}, "num_kv_shared_layers = 1",
    ),
    "a norm between fc1 and fc2": (mlp("a.ffn.", **{"ffn_layernorm.weight": (INNER,)}), {}, "ffn_layernorm"),
    "the same, as long": (mlp("a.ffn.", inner=H, **{"ffn_layernorm.weight": (H,)}), {}, "ffn_layernorm"),
    "a gate beside fc1": (mlp("a.", **{"fc3.weight": (INNER, H)}), {}, "fc3.weight stands"),
    "a scale of the channels": (mlp("a.", scale=(INNER,)), {}, "a.scale stands"),
    "queries, keys and values by head": (
        linear("h.attn.c_attn", 3 * H, H) | linear("h.attn.c_proj", H, H), CONFIG, "one after the other",
    ),
    "grouped queries in one": (
        linear("h.attn.c_attn", 2 * H, H) | linear("h.attn.c_proj", H, H), CONFIG, "one after the other",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDS)
def test_what_is_known_folds(case):
    (coupling,) = [c for c in named_couplings(*FOLDS[case]) if "residual" not in c.reason]
    assert coupling.folds, coupling.reason


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_something_else_is_refused(case):
    shapes, config, reason = REFUSED[case]
    couplings = named_couplings(shapes, config)
    assert not any(coupling.folds for coupling in couplings)
    assert any(reason in coupling.reason for coupling in couplings), [c.reason for c in couplings]


@pytest.mark.parametrize(
    ("shapes", "folded"),
    [
        (META, {"layers.0.feed_forward.w2"}),
        (PHI3, set()),
        (NEOX, set()),
        (llama_attention(), {"a.self_attn.o_proj"}),
    ],
    ids=["Meta", "Phi-3", "GPT-NeoX", "Llama"],
)
def test_queries_and_keys_stay_as_they_are(shapes, folded):
    couplings = [c for c in named_couplings(shapes, CONFIG) if c.folds]
    assert {c.name for c in couplings} == folded
    for coupling in couplings:
        for site in (*coupling.consumers, *coupling.producers):
            assert not any(part in site.tensor for part in ("q_proj", "k_proj", "wq", "wk", "qkv"))


def test_latents_fold_where_nothing_else_reads_them():
    found = {c.name.rpartition(".")[2]: c for c in named_couplings(latent(), LATENT)}
    assert {name for name, c in found.items() if c.folds} == {"o_proj", "q_b_proj", "kv_b_proj"}
    assert found["o_proj"].shape == (2, 6)
    indexed = named_couplings(latent(**{"indexer.wq_b.weight": (32, 10)}), LATENT)
    assert not any(c.folds for c in indexed)
    gated = {**latent(), "a.self_attn.q_b_proj.weight": (28, 10)}
    assert not any(c.folds for c in named_couplings(gated, LATENT) if c.name.endswith("o_proj"))


def two_parts(text, vision):
    """A language model and a vision tower of other widths, with names that lead to their configurations."""
    shapes = {}
    for part, width in (("model.language_model.layers.0", 24), ("model.visual.blocks.0", 16)):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{part}.self_attn.{name}.weight"] = (width, width)
    return shapes, {"text_config": text, "vision_config": vision}


TEXT, VISION = {"hidden_size": 24, "num_attention_heads": 6}, {"embed_dim": 16, "num_heads": 2}


def heads_by_part(shapes, config):
    return {c.size: c.heads for c in named_couplings(shapes, config) if c.folds}


def test_each_part_has_the_heads_of_its_own_configuration():
    shapes, config = two_parts(TEXT, VISION)
    assert heads_by_part(shapes, config) == {4: 6, 8: 2}
    # Names that say nothing: the widths tell the parts apart, as long as they differ.
    shapes = {name.replace("language_model.", "").replace("visual", "v"): s for name, s in shapes.items()}
    assert heads_by_part(shapes, config) == {4: 6, 8: 2}
    alike = {**config, "audio_config": {"d_model": 16, "num_heads": 4}}
    assert heads_by_part(shapes, alike) == {4: 6}


def test_encoders_and_decoders_have_their_own_heads():
    shapes = {}
    for part in ("model.encoder.layers.0.self_attn", "model.decoder.layers.0.encoder_attn"):
        shapes |= {f"{part}.{name}.weight": (H, H) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    config = {"encoder_attention_heads": 4, "decoder_attention_heads": 2}
    found = {c.name.split(".")[1]: c.heads for c in named_couplings(shapes, config) if c.folds}
    assert found == {"encoder": 4, "decoder": 2}
