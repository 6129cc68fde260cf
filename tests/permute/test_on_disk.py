"""permute_checkpoint: what ``nmsolve permute`` does, called from Python."""

from __future__ import annotations

import json

import pytest
import torch
from permutable import build, logits
from safetensors.torch import save_file

from nmsolve import NMSolveError
from nmsolve.permute import load_permutations, permute_checkpoint
from nmsolve.permute.on_disk import prepare


@pytest.fixture
def folder(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def test_a_folder(folder, tmp_path):
    model, path = folder
    report = permute_checkpoint(str(path), str(tmp_path / "out"), "2:4", include=["*.mlp.*"], progress=False)
    assert (
        {row["name"] for row in report.couplings}
        == {f"model.layers.{k}.mlp.down_proj" for k in range(2)}
        == set(load_permutations(tmp_path / "out" / "permutations" / "orders.safetensors"))
    )
    totals = report.totals()
    assert totals["before"] < totals["after"] < totals["score"]
    permuted = type(model).from_pretrained(tmp_path / "out", dtype="float64").eval()
    assert (logits(permuted) - logits(model)).abs().max() < 1e-9
    assert json.loads((tmp_path / "out" / "nmsolve_report.json").read_text()) == report.to_json()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "half"}, "pattern: expected 'N:M'"),
        ({"passes": 0}, "passes: expected at least 1, got 0"),
        ({"passes": True}, "passes: expected at least 1, got True"),
        ({"window": 7}, "window: expected columns of at least two groups, 8 for 2:4, got 7"),
        ({"include": ["nothing"]}, "include: 'nothing' matches none of the"),
        ({"out": "model"}, "out: .* is the input itself"),
        ({"heads": 0}, "heads: expected at least 1, got 0"),
        ({"heads": 4, "key_value_heads": 3}, "key_value_heads: expected a divisor of heads=4, got 3"),
        ({"key_value_heads": 2}, "key_value_heads: expected a divisor of heads=None, got 2"),
    ],
)
def test_mistakes(folder, tmp_path, options, message):
    arguments = {"out": "new", "pattern": "2:4", "progress": False, **options}
    with pytest.raises(NMSolveError, match=message):
        permute_checkpoint(folder[1], tmp_path / arguments.pop("out"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_single_shard_is_refused(folder, tmp_path):
    model, _ = folder
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[0]
    with pytest.raises(NMSolveError, match="give the folder"):
        permute_checkpoint(shard, tmp_path / "new.safetensors", "2:4", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "model"]
    whole = permute_checkpoint(tmp_path / "many", tmp_path / "out", "2:4", progress=False)
    assert len(whole.couplings) == 4


def test_what_no_rule_knows_is_left_out_and_said_so(tmp_path):
    names = ("blocks.0.mix.weight", "blocks.0.merge.weight", "blocks.0.fc1.weight", "blocks.0.fc2.weight")
    shapes = ((16, 16), (16, 16), (24, 16), (16, 24))
    tensors = {name: torch.randn(shape) for name, shape in zip(names, shapes, strict=True)}
    save_file(tensors, tmp_path / "own.safetensors")
    prepared = prepare(tmp_path / "own.safetensors", None, pattern="2:4")
    assert [coupling.name for coupling in prepared.chosen] == ["blocks.0.fc2"]
    reasons = {coupling.name: reason for coupling, reason in prepared.others}
    assert set(reasons) == {"blocks.0.mix", "blocks.0.merge", "blocks.0.fc1"}
    assert "is unknown: no rule has its name" in reasons["blocks.0.mix"]


def test_a_configuration_that_no_model_fits_is_read_alone(folder, tmp_path):
    _, path = folder
    config = json.loads((path / "config.json").read_text())
    config["architectures"] = ["NobodysForCausalLM"]
    (path / "config.json").write_text(json.dumps(config))
    chosen = {coupling.name for coupling in prepare(path, None, pattern="2:4").chosen}
    assert len(chosen) == 4
    config["num_attention_heads"] = 3
    (path / "config.json").write_text(json.dumps(config))
    prepared = prepare(path, None, pattern="2:4")
    assert {coupling.name for coupling in prepared.chosen} == {
        f"model.layers.{k}.mlp.down_proj" for k in range(2)
    }
    assert any("3 heads do not divide" in reason for _, reason in prepared.others)
