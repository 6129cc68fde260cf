"""Checkpoints whose names look like a known family's and whose layers are something else.

Orders are folded where names and shapes tell what a layer is, and the model then computes the same; or they
are refused with the reason.
"""

from __future__ import annotations

import pytest
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
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in zoo.ZOO]
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
    assert any(row["after"] > row["before"] for row in report.couplings)
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


CONFIG = {"num_attention_heads": 2}
FOLDS = {
    "attention": (llama_attention(), CONFIG),
    "attention with norms of queries": (llama_attention(**{"q_norm.weight": (8,)}), CONFIG),
    "fc2 beside its layer's norms": (mlp("a.", **{"final_layer_norm.weight": (H,)}), {}),
    "norms as long as the channels": (mlp("a.", inner=H, **{"final_layer_norm.weight": (H,)}), {}),
    "Conv1D": (gpt((H, INNER), (INNER, H), INNER), {}),
    "linear layers of GPT-2's names": (gpt((INNER, H), (H, INNER), INNER), {}),
    "the same without biases": (gpt((INNER, H), (H, INNER), 0), {"hidden_size": H}),
}
REFUSED = {
    "square, either axis": (gpt((H, H), (H, H), H), {}, "which axis is the input"),
    "nothing tells the axis": (gpt((H, INNER), (INNER, H), 0), {}, "which axis is the input"),
    "queries with a gate": (llama_attention(queries=2 * H), CONFIG, "a gate may be among them"),
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
    (coupling,) = [c for c in named_couplings(*FOLDS[case]) if c.producers or c.reason.count("stands")]
    assert coupling.folds, coupling.reason


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_something_else_is_refused(case):
    shapes, config, reason = REFUSED[case]
    couplings = named_couplings(shapes, config)
    assert not any(coupling.folds for coupling in couplings)
    assert any(reason in coupling.reason for coupling in couplings), [c.reason for c in couplings]


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
