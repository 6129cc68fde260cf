"""``nmsolve permute`` on checkpoints of tiny transformers models."""

from __future__ import annotations

import json

import pytest
import torch
from permutable import build, logits

from nmsolve.cli import main
from nmsolve.permute import find_couplings, load_permutations, retained_score


@pytest.fixture
def folder(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("options", [[], ["--transposable"]])
def test_the_permuted_checkpoint_computes_the_same_and_keeps_more(folder, tmp_path, options, capsys):
    model, path = folder
    out = tmp_path / "out"
    assert main(["permute", str(path), "--pattern", "2:4", "--out", str(out), *options]) == 0
    assert "4 couplings reordered" in capsys.readouterr().out
    permuted = type(model).from_pretrained(out, dtype=torch.float64).eval()
    assert (logits(permuted) - logits(model)).abs().max() < 1e-9
    report = json.loads((out / "nmsolve_report.json").read_text())
    assert all(row["after"] >= row["before"] for row in report["couplings"])
    assert sum(r["after"] for r in report["couplings"]) > sum(r["before"] for r in report["couplings"])
    orders = load_permutations(out / "permutations" / "orders.safetensors")
    couplings = {c.name: c for c in find_couplings(model) if c.folds}
    assert set(orders) == set(couplings)
    if not options:
        for row in report["couplings"]:
            coupling = couplings[row["name"]]
            weights = {s.tensor: model.get_parameter(s.tensor).detach().abs() for s in coupling.consumers}
            kept = retained_score(coupling.scores(weights), 2, 4, orders[row["name"]]).sum()
            assert row["after"] == pytest.approx(float(kept), rel=1e-5)
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_single_file(folder, tmp_path):
    model, path = folder
    out = tmp_path / "ordered.safetensors"
    arguments = ["permute", str(path / "model.safetensors"), "--pattern", "2:4", "--out", str(out)]
    assert main([*arguments, "--heads", "4", "--key-value-heads", "2", "--quiet"]) == 0
    from safetensors.torch import load_file

    fresh = build("llama")
    fresh.load_state_dict(load_file(out), strict=False)
    assert (logits(fresh) - logits(model)).abs().max() < 1e-9
    assert set(load_permutations(tmp_path / "ordered.permutations.safetensors")) == {
        c.name for c in find_couplings(model) if c.folds
    }
    assert main(arguments) == 2
    assert main([*arguments, "--overwrite", "--include", "*.mlp.*", "--quiet"]) == 0


def test_dry_run_says_what_and_why(folder, capsys):
    _, path = folder
    assert main(["permute", str(path), "--pattern", "2:4", "--dry-run", "--include", "*.mlp.*"]) == 0
    printed = capsys.readouterr().out
    assert "reorder  model.layers.0.mlp.down_proj  1 x 48 channels" in printed
    assert "residual stream" in printed
    assert "not included" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "2:4"], "--out"),
        (["--pattern", "2:4", "--out", "{path}/inside"], "outside"),
        (["--pattern", "2-4", "--out", "x"], "pattern"),
        (["--pattern", "2:4", "--out", "{path}/../o", "--passes", "0"], "--passes"),
        (
            ["--pattern", "4:8", "--out", "{path}/../o", "--window", "15"],
            "--window: expected columns of at least",
        ),
        (["--pattern", "4:8", "--dry-run", "--window", "15"], "--window"),
        (["--pattern", "2:4", "--out", "{path}/../o", "--include", "nothing"], "--include"),
        (["--pattern", "2:4", "--out", "{path}/../none/o"], "does not exist"),
    ],
)
def test_mistakes(folder, arguments, message, capsys):
    _, path = folder
    assert main(["permute", str(path), *(a.format(path=path) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
