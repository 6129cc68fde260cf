"""Which tensors of a checkpoint are masked, and as which matrices."""

from __future__ import annotations

from pathlib import Path

import pytest

from nmsolve import NMPattern, NMSolveError
from nmsolve.checkpoint.format import Checkpoint, Entry, Shard
from nmsolve.checkpoint.selection import MatrixLayout, select_tensors

# name: (shape, dtype); why it is skipped by default at M = 16, None if it is masked
TENSORS = {
    "model.layers.0.mlp.up_proj.weight": ((160, 64), "BF16", None),
    "encoder.layer.0.attention.output.dense.weight": ((64, 64), "F32", None),
    "features.0.weight": ((64, 32, 3, 3), "F16", None),
    "conv1.weight": ((64, 32, 5), "F64", None),
    "block_sparse_moe.experts.input_linear.weight": ((8, 64, 32), "BF16", None),
    "model.layers.0.mlp.gate_proj.weight": ((160, 64), "BF16", None),
    "model.embed_tokens.weight": ((1000, 64), "BF16", "embedding"),
    "transformer.wte.weight": ((1000, 64), "BF16", "embedding"),
    "shared.weight": ((1000, 64), "BF16", "embedding"),
    "lm_head.weight": ((1000, 64), "BF16", "language-model head"),
    "output.weight": ((1000, 64), "BF16", "language-model head"),
    "model.layers.0.mlp.gate.weight": ((16, 64), "BF16", "router"),
    "model.norm.weight": ((64,), "BF16", "1-D"),
    "group_norm.weight": ((64, 64), "BF16", "norm"),
    "scalar.weight": ((), "F32", "0-D"),
    "fc.bias": ((64, 64), "F32", "name does not match"),
    "experts.gate_up_proj": ((8, 64, 160), "BF16", "name does not match"),
    "quantised.weight": ((64, 64), "F8_E4M3", "dtype F8_E4M3"),
    "packed.weight": ((64, 64), "I8", "dtype I8"),
    "depthwise.weight": ((64, 1, 3, 3), "F32", "64 x 1 matrices are smaller than one block of 16"),
    "stem.weight": ((64, 3, 7, 7), "F32", "64 x 3 matrices"),
    "empty.weight": ((0, 64), "F32", "empty"),
}


def checkpoint(tensors, root: Path = Path("model.safetensors")) -> Checkpoint:
    entries = tuple(Entry(name, dtype, shape, 0, 0) for name, (shape, dtype, *_) in tensors.items())
    return Checkpoint(root, (Shard(root, b"", entries, {}),))


def chosen(tensors, **options) -> set[str]:
    return {
        item.entry.name for item in select_tensors(checkpoint(tensors), NMPattern(8, 16), **options).masked
    }


def test_the_default_choice_and_its_reasons():
    selection = select_tensors(checkpoint(TENSORS), NMPattern(8, 16))
    assert {item.entry.name for item in selection.masked} == {n for n, t in TENSORS.items() if t[2] is None}
    reasons = {entry.name: reason for _, entry, reason in selection.skipped}
    assert reasons.keys() == {name for name, tensor in TENSORS.items() if tensor[2] is not None}
    for name, reason in reasons.items():
        assert reason.startswith(TENSORS[name][2]), (name, reason)


def test_include_replaces_the_default_choice():
    assert chosen(TENSORS, include=["lm_head.*", "experts.*"]) == {"lm_head.weight", "experts.gate_up_proj"}
    assert chosen(TENSORS, include=["stem.*"]) == {"stem.weight"}
    everything = chosen(TENSORS, include=["*"])
    assert everything == {
        name
        for name, (shape, dtype, _) in TENSORS.items()
        if len(shape) > 1 and 0 not in shape and dtype[1:3] in "F16 32 64"
    }


def test_exclude_takes_away_from_either():
    default = chosen(TENSORS)
    assert chosen(TENSORS, exclude=["*.mlp.*"]) == {name for name in default if ".mlp." not in name}
    assert chosen(TENSORS, include=["conv*", "fc*"], exclude=["*.bias"]) == {"conv1.weight"}
    selection = select_tensors(checkpoint(TENSORS), NMPattern(8, 16), exclude=["conv1.*"])
    assert "excluded by 'conv1.*'" in {reason for _, _, reason in selection.skipped}


@pytest.mark.parametrize("option", ["include", "exclude", "input_first"])
def test_a_glob_that_matches_nothing_is_an_error(option):
    with pytest.raises(NMSolveError, match=f"{option}: 'fc2.*' matches none of the 22 tensors"):
        chosen(TENSORS, **{option: ["*.weight", "fc2.*"]})


def test_nothing_to_mask_is_an_error():
    with pytest.raises(NMSolveError, match=r"nothing to mask: each of its 1 tensors is left out \(1-D"):
        chosen({"norm.weight": ((64,), "F32")})
    with pytest.raises(NMSolveError, match="nothing to mask: each of its 0 tensors"):
        chosen({})


@pytest.mark.parametrize(
    ("shape", "kind", "axes"),
    [
        ((48, 32), "linear", (1, 48, 32, 1)),
        ((64, 32, 3), "convolution", (1, 64, 32, 3)),
        ((8, 64, 32), "stack", (8, 64, 32, 1)),
        ((32, 32, 32), "stack", (32, 32, 32, 1)),
        ((64, 32, 3, 5), "convolution", (1, 64, 32, 15)),
        ((64, 32, 2, 3, 5), "convolution", (1, 64, 32, 30)),
    ],
)
def test_layouts(shape, kind, axes):
    layout = MatrixLayout.of(shape)
    assert (layout.kind, layout.batch, layout.rows, layout.cols, layout.positions) == (kind, *axes)
    assert layout.input_dim == 1
    assert MatrixLayout.of(shape, input_first=True).input_dim == 0


def test_weights_stored_input_first(tmp_path):
    tensors = dict.fromkeys(("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "fc.weight"), ((64, 64), "F32"))

    def first(**options) -> set[str]:
        selection = select_tensors(checkpoint(tensors, tmp_path), NMPattern(2, 4), **options)
        return {item.entry.name for item in selection.masked if item.layout.input_dim == 0}

    assert first() == set()
    assert first(input_first=["fc.*"]) == {"fc.weight"}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert first() == {"h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"}
    (tmp_path / "config.json").write_text("[")
    assert first() == set()
