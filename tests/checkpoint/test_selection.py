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
    "lm_head.weight": ((1000, 64), "BF16", "head"),
    "output.weight": ((1000, 64), "BF16", "head"),
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
    assert chosen(TENSORS, include=["lm_head.*", "fc.*"]) == {"lm_head.weight", "fc.bias"}
    assert chosen(TENSORS, include=["stem.*"]) == {"stem.weight"}
    everything = chosen(TENSORS, include=["*"], transposable=True)
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
    with pytest.raises(NMSolveError, match=r"nothing to mask: 1 tensor, none of which is to be \(1-D"):
        chosen({"norm.weight": ((64,), "F32")})
    with pytest.raises(NMSolveError, match="nothing to mask: 0 tensors, none of which is to be"):
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


def input_first(tensors, root: Path, **options) -> set[str]:
    selection = select_tensors(checkpoint(tensors, root), NMPattern(2, 4), **options)
    return {item.entry.name for item in selection.masked if item.layout.input_dim == 0}


def test_weights_stored_input_first(tmp_path):
    tensors = dict.fromkeys(("h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "fc.weight"), ((64, 64), "F32"))
    assert input_first(tensors, tmp_path) == set()
    assert input_first(tensors, tmp_path, input_first=["fc.*"]) == {"fc.weight"}
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    conv1d = {"h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"}
    assert input_first(tensors, tmp_path) == conv1d
    assert input_first(tensors, tmp_path, input_last=["*.c_fc.*"]) == {"h.0.attn.c_attn.weight"}
    (tmp_path / "config.json").write_text("[")
    assert input_first(tensors, tmp_path) == set()


def test_gpt2_is_known_inside_of_another_model_beside_a_file_and_by_its_shapes(tmp_path):
    """Models that transformers is not asked about: config.json names no architecture."""
    names = ("decoder.h.0.attn.c_attn.weight", "decoder.h.0.attn.c_proj.weight", "encoder.0.key.weight")
    square = dict.fromkeys(names, ((64, 64), "F32"))
    (tmp_path / "config.json").write_text('{"decoder": {"model_type": "gpt2"}, "encoder": {}}')
    assert input_first(square, tmp_path) == set(names[:2])
    assert input_first(square, tmp_path / "model.safetensors") == set(names[:2])
    (tmp_path / "config.json").unlink()
    assert input_first(square | {names[0]: ((64, 192), "F32")}, tmp_path) == set(names[:2])
    assert input_first(square | {names[0]: ((192, 64), "F32")}, tmp_path) == set()


@pytest.mark.parametrize(
    ("shapes", "axis"), [(((8, 160, 64), (8, 64, 80)), 1), (((8, 64, 160), (8, 80, 64)), 0)]
)
def test_the_input_of_stacked_experts_is_known_by_both_shapes(shapes, axis):
    up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    tensors = {up: (shapes[0], "BF16"), down: (shapes[1], "BF16")}
    masked = select_tensors(checkpoint(tensors), NMPattern(2, 4), include=["*experts*"]).masked
    assert [(item.layout.kind, item.layout.input_dim) for item in masked] == [("stack", axis)] * 2


def test_a_tensor_whose_input_is_not_known_is_refused():
    tensors = {"experts.up_proj": ((8, 64, 64), "BF16"), "fc.weight": ((64, 64), "BF16")}
    selection = select_tensors(checkpoint(tensors), NMPattern(2, 4), include=["*"])
    ((_, entry, reason),) = selection.skipped
    assert (entry.name, "input is not known" in reason) == ("experts.up_proj", True)
    for options, axis in [
        ({"input_first": ["experts.*"]}, 0),
        ({"input_last": ["experts.*"]}, 1),
        ({"transposable": True}, 1),
    ]:
        masked = select_tensors(checkpoint(tensors), NMPattern(2, 4), include=["*"], **options).masked
        assert masked[0].layout.input_dim == axis
    with pytest.raises(NMSolveError, match=r"input_first: fc\.weight is named by input_last, too"):
        chosen(tensors, input_first=["*"], input_last=["fc.*"])


@pytest.mark.parametrize(
    ("name", "what"),
    {
        "model.shared.weight": "embedding",
        "transformer.w.weight": "embedding",
        "vision.patch_embed.proj.weight": "patch embedding",
        "head.weight": "head",
        "cls.predictions.decoder.weight": "head",
        "decoder.output_projection.weight": "head",
        "transformer.output_layer.weight": "head",
        "model.layers.0.mlp.gate.wg.weight": "router",
        "model.layers.0.block_sparse_moe.gate.weight": "router",
        "transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight": None,
        "model.embed_tokens_extend.image_embed.layers.0.fc1.weight": None,
        "rwkv.blocks.0.attention.gate.weight": None,
        "encoder.layer.0.attention.output.dense.weight": None,
        "h.0.attention.output.weight": None,
        "decoder.layers.0.decoder.weight": None,
    }.items(),
)
def test_names_are_held_to_their_ends(name, what):
    selection = select_tensors(
        checkpoint({name: ((64, 64), "F32"), "fc.weight": ((64, 64), "F32")}), NMPattern(2, 4)
    )
    reasons = [reason for _, _, reason in selection.skipped]
    assert [reason.partition(" (name")[0] for reason in reasons] == ([] if what is None else [what])
    assert selection.chosen_by == "names: there is no config.json"
