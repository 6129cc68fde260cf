"""What config.json tells of tensors: the model is asked where it can be, and nothing else is believed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import species
import torch
import zoo
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve import NMPattern
from nmsolve.checkpoint import architecture, mask_checkpoint
from nmsolve.checkpoint.architecture import architecture_of
from nmsolve.checkpoint.format import open_checkpoint
from nmsolve.checkpoint.roles import roles_of
from nmsolve.checkpoint.selection import MatrixLayout, select_tensors

pytest.importorskip("transformers")

OPTIONS = {"backend": "torch", "device": "cpu", "progress": False}


@pytest.fixture
def saved(tmp_path):
    def save(name: str) -> Path:
        zoo.build(name).save_pretrained(tmp_path / "in")
        return tmp_path / "in"

    return save


def chosen(root: Path, **options):
    return select_tensors(open_checkpoint(root), NMPattern(4, 8), **options)


@pytest.mark.parametrize(
    ("name", "axis", "glob"),
    [
        ("gptoss", 1, "*.experts.*_proj"),
        ("llama4", 1, "*.experts.*_proj"),
        ("qwen3moe", 2, "*.experts.*"),
        ("granitemoe", 2, "*put_linear*"),
    ],
)
def test_masks_of_stacked_experts_lie_along_their_input(name, axis, glob, saved, tmp_path):
    """The axis that holds the hidden size where states are made, the inner size where they are used."""
    modules = [m for m in zoo.build(name).modules() if type(m).__name__.endswith("Experts")]
    experts = next((m for m in modules if hasattr(m, "gate_up_proj")), None)
    if experts is None:
        pytest.skip("this transformers keeps the experts in layers of their own")
    assert experts.gate_up_proj.shape[axis] == species.HIDDEN
    assert experts.down_proj.shape[axis] != species.HIDDEN
    source = saved(name)
    mask_checkpoint(source, tmp_path / "out", "4:8", include=[glob], **OPTIONS)
    masks = nmsolve.load_masks(tmp_path / "out")
    assert len(masks) >= 2
    for mask in masks.values():
        matrices = mask if mask.ndim == 3 else mask[None]
        along = matrices.transpose(1, 2) if axis == 1 else matrices
        for matrix in along:
            nmsolve.check_mask(matrix, 4, 8, transposable=False)
            assert set(matrix.sum(1).tolist()) == {matrix.shape[1] // 2}


def test_experts_that_are_stored_transposed_are_seen_so(saved):
    """transformers keeps Qwen3-VL's experts (out, in), and takes files that hold them (in, out)."""
    root = saved("qwen3vlmoe")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    assert roles_of(zoo.build("qwen3vlmoe"))[name].input_dim == 1
    tensors = {name: x.clone() for name, x in load_file(root / "model.safetensors").items()}
    for turned in (False, True):
        shape = tensors[name].shape
        axis = architecture_of(open_checkpoint(root)).roles[name].input_dim
        assert (shape[1 + axis], axis) == (48, 0 if turned else 1)
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
        save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})


def test_parameters_whose_input_nobody_knows_are_refused(saved):
    selection = chosen(saved("dbrx"), include=["*.experts.*", "*.Wqkv.*"])
    assert all(item.entry.name.endswith("Wqkv.weight") for item in selection.masked)
    reasons = {reason for _, entry, reason in selection.skipped if ".experts." in entry.name}
    assert len(reasons) == 1
    assert reasons.pop().startswith("which axis of DbrxExpertGLU is the input is not known")


def test_a_file_of_gpt2_with_its_configuration_beside_it(saved, tmp_path):
    root = saved("gpt2")
    mask_checkpoint(root / "model.safetensors", tmp_path / "out.safetensors", "2:4", **OPTIONS)
    masks = nmsolve.load_masks(tmp_path / "out.masks.safetensors")
    assert len(masks) == 8
    for mask in masks.values():
        nmsolve.check_mask(mask.T, 2, 4, transposable=False)


def test_a_grouped_convolution_is_a_matrix_for_each_group(saved):
    masked = chosen(saved("regnet")).masked
    layouts = {item.layout for item in masked if item.layout.batch > 1}
    assert layouts == {MatrixLayout("convolution", 2, 8, 8, 9, 1), MatrixLayout("convolution", 4, 8, 8, 9, 1)}


def test_each_tensor_is_told_what_it_is_and_how_that_is_known(saved):
    root = saved("gpt2")
    extra = load_file(root / "model.safetensors") | {"adapter.down.weight": torch.randn(16, 32)}
    save_file(extra, root / "model.safetensors", metadata={"format": "pt"})
    selection = chosen(root)
    assert selection.chosen_by.startswith("modules of GPT2LMHeadModel of transformers")
    why = {item.entry.name: item.why for item in selection.masked}
    assert why["transformer.h.0.attn.c_attn.weight"] == "linear, stored (in, out), Conv1D"
    assert why["adapter.down.weight"] == "linear, by name: no part of the model"


def without_transformers(monkeypatch):
    find = architecture.importlib.util.find_spec
    monkeypatch.setattr(
        architecture.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name)
    )


WRONG = {
    "no config.json": (None, "there is no config.json"),
    "no JSON": ("{", "config.json cannot be read"),
    "a list": ("[]", "config.json is no JSON object"),
    "no architecture": ({"model_type": "llama"}, "config.json names no architecture"),
    "unknown": ({"architectures": ["NoSuchModel"]}, "NoSuchModel cannot be built: transformers "),
    "no model": ({"architectures": ["AutoConfig"]}, "AutoConfig cannot be built: transformers "),
    "another model": (
        {"architectures": ["BertModel"], "model_type": "bert", "num_hidden_layers": 1},
        "BertModel has no lm_head.weight",
    ),
    "nonsense": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": "many"},
        "LlamaForCausalLM cannot be built: ",
    ),
    "giant": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 10**8},
        "config.json says num_hidden_layers 100000000 for 21 tensors",
    ),
    "code": (
        {
            "architectures": ["EvilModel"],
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
        },
        "EvilModel cannot be built: ",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_names_decide_where_no_model_can_be_asked(kind, saved):
    root = saved("llama")
    by_model = {item.entry.name for item in chosen(root).masked}
    config, why = WRONG[kind]
    (root / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    (root / "config.json").unlink()
    if config is not None:
        (root / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    selection = chosen(root)
    assert selection.chosen_by.startswith(f"names: {why}")
    assert {item.entry.name for item in selection.masked} == by_model
    assert {item.why for item in selection.masked} == {"linear"}


def test_names_decide_without_transformers(saved, monkeypatch):
    root = saved("llama")
    by_model = {item.entry.name for item in chosen(root).masked}
    without_transformers(monkeypatch)
    selection = chosen(root)
    assert selection.chosen_by == "names: transformers is not installed"
    assert {item.entry.name for item in selection.masked} == by_model


def test_transformers_is_imported_only_to_ask_a_model(saved, tmp_path):
    root = saved("llama")
    shutil.copytree(root, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    code = (
        "import sys; from nmsolve.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    for arguments, imported in {
        ("--help",): [],
        (str(root), "--pattern", "4:x", "--dry-run"): [],
        (str(tmp_path / "bare"), "--pattern", "4:8", "--dry-run"): [],
        (str(root), "--pattern", "4:8", "--dry-run"): ["torch", "transformers"],
    }.items():
        ran = subprocess.run([sys.executable, "-c", code, "mask", *arguments], capture_output=True, text=True)
        assert ran.stdout.splitlines()[-1] == str(imported), (arguments, ran.stderr)
