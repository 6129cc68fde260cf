"""Inputs that hold no weights to mask: told in a line, by every command, with what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import llama, save_sharded
from mask_command import exit_code, one_error
from safetensors.torch import save_file

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


def test_an_index_by_another_name(tmp_path):
    """diffusers calls it diffusion_pytorch_model.safetensors.index.json."""
    weight_map = save_sharded(tmp_path / "unet", llama())
    index = tmp_path / "unet" / "model.safetensors.index.json"
    index.rename(index.with_name("diffusion_pytorch_model.safetensors.index.json"))
    found = open_checkpoint(tmp_path / "unet")
    assert {entry.name: shard.path.name for shard, entry in found.entries()} == weight_map
