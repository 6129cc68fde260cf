"""Inputs that hold no weights to mask: told in a line, by every command, with what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import llama, save_sharded
from mask_command import exit_code, one_error
from safetensors.torch import load_file, save_file

from nmsolve import load_masks
from nmsolve.checkpoint.format import open_checkpoint

UP = "model.layers.0.mlp.up_proj"


def config(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **fields}))


def single(folder: Path, state: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(state, folder / name, metadata={"format": "pt"})


def gguf(folder):
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")


def pickles(folder):
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def quantised(folder, method="gptq"):
    config(folder, quantization_config={"quant_method": method})
    single(folder, llama())


def quantised_part(folder):
    config(folder, text_config={"quantization_config": {"quant_method": "bitsandbytes"}})
    single(folder, llama())


def awq(folder):
    single(folder, {f"{UP}.qweight": torch.ones(8, 8, dtype=torch.int32), f"{UP}.scales": torch.ones(8, 8)})


def fp8(folder):
    single(folder, {f"{UP}.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)})


def adapter(folder):
    single(folder, {f"base_model.{UP}.lora_A.weight": torch.ones(8, 16)}, "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def two_models(folder):
    save_sharded(folder / "m", llama())
    for path in list((folder / "m").iterdir()):
        path.rename(folder / path.name)
    (folder / "m").rmdir()
    single(folder, llama())


def pipeline(folder):
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for part in ("transformer", "vae"):
        (folder / part).mkdir()
        single(folder / part, llama(), "diffusion_pytorch_model.safetensors")


def file_in_the_way(folder):
    single(folder, llama())
    (folder / "masks").write_text("")


INPUTS = {
    gguf: r"got only model\.Q4_K_M\.gguf; start from the safetensors weights that it was made from",
    pickles: "got only pickles .* save the model as safetensors first",
    quantised: r"the weights are quantised \(gptq\); start from the checkpoint before quantisation",
    quantised_part: r"quantised \(bitsandbytes\)",
    awq: r"quantised \(.*up_proj\.qweight\)",
    fp8: r"quantised \(.*up_proj\.weight\)",
    adapter: r"an adapter.*merge it first: in peft, model\.merge_and_unload\(\)\.save_pretrained",
    two_models: "expected one model, got model.safetensors and another in the files of",
    pipeline: "a pipeline of several; give the folder of one of them: transformer, vae",
    file_in_the_way: "the file masks is in the way",
}


@pytest.mark.parametrize("command", ["mask", "permute", "prune"])
@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_folders(command, make, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    if command == "prune":
        pytest.importorskip("transformers")
        config(folder)
    make(folder)
    options = ["--method", "magnitude"] if command == "prune" else []
    given = [command, str(folder), "--pattern", "2:4", "--out", str(tmp_path / "out"), *options]
    assert exit_code(given) == 2
    error = one_error(capsys)
    assert str(folder) in error
    assert re.search(INPUTS[make], error), error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["mask", "permute", "prune", "eval-ppl"])
@pytest.mark.parametrize("name", ["meta-llama/Llama-3.2-1B", "absent"])
def test_names_of_the_hub(command, name, tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    options = {
        "prune": ["--method", "magnitude", "--pattern", "2:4", "--out", "out"],
        "eval-ppl": ["--text", "text.txt"],
    }
    (tmp_path / "text.txt").write_text("words")
    given = [command, name, *options.get(command, ["--pattern", "2:4", "--out", "out"])]
    assert exit_code(given) == 2
    assert f"{name}: no such file or folder; models are read from this machine only" in one_error(capsys)


@pytest.mark.parametrize("suffix", [".gguf", ".onnx", ".h5"])
def test_files_of_other_formats(suffix, tmp_path, capsys):
    (tmp_path / f"model{suffix}").write_bytes(b"weights")
    given = ["mask", str(tmp_path / f"model{suffix}"), "--pattern", "2:4", "--out", "x.safetensors"]
    assert exit_code(given) == 2
    assert f"expected a .safetensors file, got {suffix}" in one_error(capsys)


def diffusers_model(folder: Path) -> dict[str, str]:
    """A part of a pipeline: its index has another name, its configuration other keys."""
    weight_map = save_sharded(folder, llama())
    index = folder / "model.safetensors.index.json"
    index.rename(folder / DIFFUSERS_INDEX)
    named = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.35.0"}
    (folder / "config.json").write_text(json.dumps(named))
    return weight_map


DIFFUSERS_INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_a_model_of_diffusers_is_masked(tmp_path):
    weight_map = diffusers_model(tmp_path / "unet")
    found = open_checkpoint(tmp_path / "unet")
    assert {entry.name: shard.path.name for shard, entry in found.entries()} == weight_map
    given = ["mask", str(tmp_path / "unet"), "--pattern", "2:4", "--out", str(tmp_path / "out")]
    assert exit_code([*given, "--backend", "torch"]) == 0
    for name in (DIFFUSERS_INDEX, "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unet" / name).read_bytes()
    masks = load_masks(tmp_path / "out")
    assert f"{UP}.weight" in masks
    weights = load_file(tmp_path / "out" / weight_map[f"{UP}.weight"])
    assert torch.equal(weights[f"{UP}.weight"] != 0, masks[f"{UP}.weight"])


@pytest.mark.parametrize("command", ["prune", "eval-ppl"])
def test_models_of_diffusers_are_no_language_models(command, tmp_path, capsys):
    pytest.importorskip("transformers")
    diffusers_model(tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (tmp_path / "text.txt").write_text("words")
    options = ["--text", str(tmp_path / "text.txt")]
    if command == "prune":
        options = ["--method", "magnitude", "--pattern", "2:4", "--out", str(tmp_path / "out")]
    assert exit_code([command, str(tmp_path / "pipeline"), *options]) == 2
    assert "a pipeline of several; give the folder of one of them: unet" in one_error(capsys)
    assert exit_code([command, str(tmp_path / "pipeline" / "unet"), *options]) == 2
    assert "got one of diffusers; nmsolve mask masks it" in one_error(capsys)
