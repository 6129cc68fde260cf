"""Orders of a checkpoint by Wanda's scores and learned ones, from a model that transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
import zoo
from permutable import build, logits
from safetensors.torch import save_file

from nmsolve import NMSolveError
from nmsolve.cli import main
from nmsolve.permute import load_permutations, permute_checkpoint, retained_score

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    return model, tmp_path


def orders_in(path):
    return load_permutations(path / "permutations" / "orders.safetensors")


def norms_of_inputs(model, tokens):
    """Those of down_proj's inputs, in float64."""
    seen = {}
    for name, layer in model.named_modules():
        if name.endswith("down_proj"):
            layer.register_forward_pre_hook(
                lambda layer, inputs, name=name: seen.update({name: inputs[0].double().flatten(0, 1)})
            )
    with torch.no_grad():
        model(tokens)
    return {name: x.norm(dim=0) for name, x in seen.items()}


def test_wandas_scores_are_what_the_order_keeps_more_of(folder):
    model, path = folder
    tokens = torch.randint(0, model.config.vocab_size, (8, 24), generator=torch.Generator().manual_seed(0))
    report = permute_checkpoint(
        path / "model", path / "out", "2:4", scores="wanda", calibration=path / "tokens.safetensors",
        include=["*down_proj"], progress=False,
    )  # fmt: skip
    orders = orders_in(path / "out")
    model = type(model).from_pretrained(path / "model").double()
    for name, norms in norms_of_inputs(model, tokens).items():
        score = model.get_parameter(f"{name}.weight").detach().abs() * norms
        (row,) = (row for row in report.couplings if row["name"] == name)
        assert (row["scores"], row["learned"]) == ("wanda", False)
        assert row["before"] == pytest.approx(float(retained_score(score, 2, 4)), rel=1e-5)
        assert row["after"] == pytest.approx(float(retained_score(score, 2, 4, orders[name])), rel=1e-5)
        assert row["after"] > row["before"]
    assert report.calibration["samples"] == 128
    assert json.loads((path / "out" / "nmsolve_report.json").read_text()) == report.to_json()


@pytest.mark.parametrize("scores", ["magnitude", "wanda"])
@pytest.mark.parametrize("strategy", ["permllm", "cost-matrix", "frank-wolfe"])
def test_learned_orders_fold(folder, strategy, scores, capsys):
    model, path = folder
    command = [
        "permute", str(path / "model"), "--pattern", "2:4", "--out", str(path / "out"), "--scores", scores,
        "--learn", strategy, "--steps", "6", "--calibration", str(path / "tokens.safetensors"),
    ]  # fmt: skip
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "learning: the loss of held-out text fell from" in told
    permuted = type(model).from_pretrained(path / "out", dtype=torch.float64).eval()
    assert (logits(permuted) - logits(model)).abs().max() < 1e-9
    report = json.loads((path / "out" / "nmsolve_report.json").read_text())
    assert report["learn"]["strategy"] == strategy
    assert [row["step"] for row in report["learning"]] == [0, 6]
    assert {row["name"] for row in report["couplings"]} == set(orders_in(path / "out"))
    assert all(row["learned"] for row in report["couplings"])
    assert all(row["scores"] == scores for row in report["couplings"])


def test_transposable_masks_learn_and_take_the_producers_scores(folder):
    model, path = folder
    report = permute_checkpoint(
        path / "model", path / "out", "2:4", transposable=True, scores="wanda", learn="permllm", steps=3,
        calibration=path / "tokens.safetensors", include=["*down_proj"], progress=False,
    )  # fmt: skip
    assert all(0 < row["before"] < row["score"] for row in report.couplings)
    assert all(row["learned"] for row in report.couplings)
    permuted = type(model).from_pretrained(path / "out", dtype=torch.float64).eval()
    assert (logits(permuted) - logits(model)).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("name", "strategy"), [("gpt2", "permllm"), ("mixtral", "permllm"), ("gptneox", "frank-wolfe")]
)
def test_files_whose_names_are_not_the_models(name, strategy, tmp_path):
    """Files without the prefix of the model, Conv1D, experts of a tensor each."""
    model = zoo.build(name)
    if name == "gpt2":
        model = model.base_model
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, model.config.vocab_size, (6, 16), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    report = permute_checkpoint(
        tmp_path / "model", tmp_path / "out", "2:4", scores="wanda", learn=strategy, steps=2,
        calibration=tmp_path / "tokens.safetensors", progress=False,
    )  # fmt: skip
    kinds = {row["name"].rpartition(".")[2]: (row["scores"], row["learned"]) for row in report.couplings}
    if name == "mixtral" and not any(layer.endswith("w2") for layer, _ in model.named_modules()):
        assert kinds.pop("w2") == ("magnitude", False)  # a parameter of all experts in the model
    assert kinds
    assert set(kinds.values()) == {("wanda", True)}
    loaded = [type(model).from_pretrained(tmp_path / f, dtype=torch.float32).eval() for f in ("model", "out")]
    with torch.no_grad():
        ours, theirs = (m(tokens)[0] for m in loaded)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "ria"}, "scores: expected one of magnitude, wanda, got 'ria'"),
        ({"scores": "wanda"}, "calibration: needed for scores='wanda'"),
        ({"learn": "permllm"}, "calibration: needed for learn='permllm'"),
        ({"learn": "adam", "calibration": "tokens.safetensors"}, "learn: expected one of permllm"),
        ({"calibration": "tokens.safetensors"}, "calibration: nothing uses it"),
        ({"scores": "wanda", "calibration": "nothing.txt"}, "is not a file"),
        (
            {"learn": "frank-wolfe", "transposable": True, "calibration": "tokens.safetensors"},
            "transposable:",
        ),
        ({"learn": "permllm", "steps": 0, "calibration": "tokens.safetensors"}, "steps: expected at least 1"),
        ({"learn": "permllm", "samples": 1, "calibration": "tokens.safetensors"}, "samples: learning needs"),
        (
            {"learn": "permllm", "groups": 7, "calibration": "tokens.safetensors"},
            "groups: expected a divisor",
        ),
        ({"scores": "wanda", "dtype": "int8", "calibration": "tokens.safetensors"}, "dtype: expected one of"),
        ({"scores": "wanda", "device": "tpu", "calibration": "tokens.safetensors"}, "device:"),
    ],
)
def test_mistakes(folder, options, message):
    _, path = folder
    if "calibration" in options:
        options = {**options, "calibration": path / options["calibration"]}
    with pytest.raises(NMSolveError, match=message):
        permute_checkpoint(path / "model", path / "new", "2:4", progress=False, **options)
    assert sorted(p.name for p in path.iterdir()) == ["model", "tokens.safetensors"]


def test_a_file_has_no_model(folder):
    _, path = folder
    with pytest.raises(NMSolveError, match="calibration needs the folder of a model"):
        permute_checkpoint(
            path / "model" / "model.safetensors", path / "new.safetensors", "2:4", scores="wanda",
            calibration=path / "tokens.safetensors", progress=False,
        )  # fmt: skip


def test_what_is_no_language_model_learns_by_hidden_states_alone(tmp_path):
    model = zoo.build("bert-mlm")
    model.save_pretrained(tmp_path / "model")
    tokens = torch.randint(0, model.config.vocab_size, (6, 16), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    options = {"calibration": tmp_path / "tokens.safetensors", "steps": 2, "progress": False}
    with pytest.raises(NMSolveError, match="is no causal language model"):
        permute_checkpoint(tmp_path / "model", tmp_path / "out", "2:4", learn="frank-wolfe", **options)
    report = permute_checkpoint(tmp_path / "model", tmp_path / "out", "2:4", learn="permllm", **options)
    assert any(row["learned"] for row in report.couplings)
