"""What prune_checkpoint leaves as it was: everything but the pruned weights."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_models
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve import NMSolveError
from nmsolve.checkpoint.format import open_checkpoint, read_shard
from nmsolve.errors import NMSolveWarning
from nmsolve.prune import prune_checkpoint, prune_model
from nmsolve.prune.stored import Place, StoredMasks, find_places

transformers = pytest.importorskip("transformers")
QUICK = {"method": "magnitude", "backend": "torch", "progress": False, "picture": False}
WEIGHTS = "model.safetensors"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_only_masked_weights_differ(before, after, masks):
    assert set(masks) <= set(after)
    assert set(before) == set(after)
    for name, dense in before.items():
        expected = dense * masks[name].to(dense.dtype) if name in masks else dense
        assert torch.equal(after[name], expected), name
        assert after[name].dtype == dense.dtype


@pytest.fixture
def old(tmp_path):
    """A checkpoint as transformers 4 wrote them, in shards, with what transformers 5 spells another way."""
    folder = tmp_path / "old"
    model = tiny_models.make("llama").bfloat16()
    model.save_pretrained(folder, max_shard_size="20KB")
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "rope_parameters"):
        config.pop(key, None)
    config |= {"torch_dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    (folder / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": true, "mine": 3}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    return folder


def test_files_are_copied_byte_for_byte(old, tmp_path):
    out = tmp_path / "out"
    result = prune_checkpoint(old, out, "4:8", **QUICK)
    assert files(out) == files(old) | {"nmsolve_report.json", "masks/4of8.masks.safetensors"}
    shards = sorted(path.name for path in old.glob("*.safetensors"))
    assert len(shards) > 2
    for name in files(old) - set(shards):
        assert (out / name).read_bytes() == (old / name).read_bytes(), name
    masks = nmsolve.load_masks(out)
    assert set(masks) == set(result.masks)
    assert len(masks) == 14
    for name in shards:
        assert read_shard(out / name).header == read_shard(old / name).header
        before, after = load_file(old / name), load_file(out / name)
        check_only_masked_weights_differ(before, after, {n: m for n, m in masks.items() if n in before})


def test_a_checkpoint_without_a_tokenizer_gets_none(tmp_path):
    tiny_models.make("llama").save_pretrained(tmp_path / "model")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", "4:8", **QUICK)
    assert not [name for name in files(tmp_path / "out") if "token" in name or "vocab" in name]


def test_modes_follow_the_umask(old, tmp_path):
    (old / "run.sh").write_text("true")
    (old / "run.sh").chmod(0o700)
    (old / "generation_config.json").chmod(0o600)
    before = os.umask(0o027)
    try:
        result = prune_checkpoint(old, tmp_path / "out", "4:8", **QUICK)
        result.save(tiny_models.make("llama"), tmp_path / "saved", picture=False)
    finally:
        os.umask(before)
    modes = {name: (tmp_path / "out" / name).stat().st_mode & 0o777 for name in files(tmp_path / "out")}
    assert modes.pop("run.sh") == 0o740
    assert set(modes.values()) == {0o640}
    assert (tmp_path / "saved" / WEIGHTS).stat().st_mode & 0o777 == 0o640


def test_another_dtype_changes_what_names_it(old, tmp_path):
    out = tmp_path / "out"
    prune_checkpoint(old, out, "4:8", dtype="float32", **QUICK)
    text = (old / "config.json").read_bytes()
    assert (out / "config.json").read_bytes() == text.replace(b'"bfloat16"', b'"float32"') != text
    index = [json.loads((f / "model.safetensors.index.json").read_bytes()) for f in (old, out)]
    assert index[1]["weight_map"] == index[0]["weight_map"]
    assert index[1]["metadata"]["total_size"] == 2 * index[0]["metadata"]["total_size"]
    masks, model = nmsolve.load_masks(out), transformers.AutoModelForCausalLM.from_pretrained(out)
    for name, tensor in tiny_models.make("llama").bfloat16().float().state_dict().items():
        expected = tensor * masks[name] if name in masks else tensor
        assert torch.equal(model.state_dict()[name], expected)


def test_parts_of_a_sentence_transformer(old, tmp_path):
    (old / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]')
    parts = "1_Pooling/config.json 2_Dense/model.safetensors 2_Dense/config.json speaker.npz voices/a.pt"
    for name in f"{parts} onnx/model.onnx fp16/model.safetensors pytorch_model.bin".split():
        (old / name).parent.mkdir(exist_ok=True)
        (old / name).write_text(name)
    dense = {"onnx/model.onnx", "fp16/model.safetensors", "pytorch_model.bin"}
    with pytest.warns(NMSolveWarning, match="3 files with the dense weights in another form will not be"):
        prune_checkpoint(old, tmp_path / "out", "4:8", **QUICK)
    assert files(old) - files(tmp_path / "out") == dense
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    assert set(report["files"]["left_out"]) == dense


def test_names_that_transformers_changes(tmp_path):
    """Files of an older transformers: a mask has the name of its tensor."""
    tiny_models.make("vit").save_pretrained(tmp_path / "vit")
    prune_checkpoint(tmp_path / "vit", tmp_path / "out", "4:8", **QUICK)
    masks = nmsolve.load_masks(tmp_path / "out")
    assert len(masks) == 12
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("vit", "out"))
    check_only_masked_weights_differ(before, after, masks)
    transformers.ViTForImageClassification.from_pretrained(tmp_path / "out")
    model = tiny_models.make("vit")
    prune_model(model, None, "4:8", method="magnitude", backend="torch", progress=False).save(
        model, tmp_path / "saved", picture=False
    )
    assert set(nmsolve.load_masks(tmp_path / "saved")) == set(masks)
    # The masks of the files are those of the model again.
    options = QUICK | {"initial_masks": tmp_path / "out"}
    again = prune_checkpoint(tmp_path / "vit", tmp_path / "again", "2:8", **options)
    assert all(not (again.masks[name] & ~masks[name]).any() for name in masks)


def test_weights_that_lie_in_one_tensor(tmp_path):
    """Query, key and value in one tensor of the file, as three weights in the model; one of them dense."""
    if not hasattr(transformers, "NomicBertModel"):
        pytest.skip("this transformers has no model whose weights are cut")
    config = transformers.NomicBertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    transformers.NomicBertModel(config).save_pretrained(tmp_path / "model")
    prune_checkpoint(tmp_path / "model", tmp_path / "out", {"*": "4:8", "k_proj": None}, **QUICK)
    masks = nmsolve.load_masks(tmp_path / "out")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("model", "out"))
    check_only_masked_weights_differ(before, after, masks)
    (name,) = (name for name in masks if "qkv" in name and ".0." in name)
    assert [int(part.sum()) for part in masks[name].chunk(3)] == [512, 1024, 512]


def test_a_weight_that_the_file_holds_twice(tmp_path):
    """A head tied to the embedding, under both names: both change, or a loader would take the dense one."""
    model = tiny_models.make("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    # Copies: what older safetensors load is the file itself, which is written over.
    state = {name: x.clone() for name, x in load_file(tmp_path / "model" / WEIGHTS).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
    prune_checkpoint(tmp_path / "model", tmp_path / "out", {"lm_head": "4:8"}, **QUICK)
    masks, after = nmsolve.load_masks(tmp_path / "out"), load_file(tmp_path / "out" / WEIGHTS)
    assert set(masks) == {"lm_head.weight", "model.embed_tokens.weight"}
    check_only_masked_weights_differ(state, after, masks)
    nmsolve.check_mask(masks["lm_head.weight"], 4, 8, transposable=False)


def test_weights_are_found_by_what_they_hold(tmp_path):
    torch.manual_seed(0)
    a, b, c = torch.randn(3, 4, 6)
    fused = torch.cat([c, a, b])
    save_file(
        {"x.0.one": a, "x.1.one": b, "twin.left": c, "twin.right": c.clone(), "x.2.all": fused},
        tmp_path / "m.safetensors",
    )
    weights = {
        "y.1.weight": b,
        "y.0.weight": a,
        "y.2.part": a + 1,
        "left": c,
        "right": c.clone(),
        "x.2.q": fused[4:8].clone(),
    }
    places = find_places(
        open_checkpoint(tmp_path / "m.safetensors"), weights, {name: [name] for name in weights}
    )
    assert {name: [place.entry for place in found] for name, found in places.items()} == {
        "y.1.weight": ["x.1.one"],
        "y.0.weight": ["x.0.one"],
        "y.2.part": [],
        "left": ["twin.left"],
        "right": ["twin.right"],
        "x.2.q": ["x.2.all"],
    }
    assert places["x.2.q"] == [Place("x.2.all", 4, 8, 12)]
    masks = StoredMasks({"x.2.q": torch.zeros(4, 6, dtype=torch.bool)}, places)
    assert torch.equal(masks["x.2.all"], torch.arange(12).sub(5.5).abs().gt(2)[:, None].expand(12, 6))


def test_a_weight_that_lies_nowhere(tmp_path, monkeypatch):
    tiny_models.make("llama").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("nmsolve.prune.stored._same", lambda a, b: False)
    with pytest.raises(NMSolveError, match=r"q_proj.weight is put together .* leave it dense: dense='model"):
        prune_checkpoint(tmp_path / "model", tmp_path / "out", "4:8", **QUICK)
    assert not (tmp_path / "out").exists()


def test_what_is_read_and_done_is_in_the_report(old, tmp_path):
    import hashlib

    save_file({"tokens": tiny_models.tokens(8)}, tmp_path / "tokens.safetensors")
    options = QUICK | {"method": "wanda", "calibration": tmp_path / "tokens.safetensors", "samples": 4}
    prune_checkpoint(old, tmp_path / "out", "4:8", seed=7, **options)
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    data = (tmp_path / "tokens.safetensors").read_bytes()
    assert report["files"]["model"] == str(old)
    assert report["files"]["calibration_sha256"] == hashlib.sha256(data).hexdigest()
    said = {"samples": 4, "sequence_length": 24, "tokens": 96, "seed": 7, "bos": False}
    assert said.items() <= report["settings"].items()
    assert not {"damping", "iterations", "mask_method"} & set(report["settings"])
    assert report["versions"]["transformers"] == transformers.__version__
    shutil.rmtree(tmp_path / "out")
    prune_checkpoint(old, tmp_path / "out", "4:8", **QUICK)
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    assert not {"seed", "sequential", "samples", "bos"} & set(report["settings"])
    assert "calibration" not in report["files"]


def test_zeros_that_were_there_are_counted(old, tmp_path):
    first = prune_checkpoint(old, tmp_path / "first", "2:8", **QUICK).report.totals()
    assert first["zeros_before"] == 0
    again = prune_checkpoint(tmp_path / "first", tmp_path / "second", "4:8", **QUICK).report.totals()
    assert again["zeros_before"] == pytest.approx(0.75 * again["weights"])
    with safe_open(next((tmp_path / "second").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
