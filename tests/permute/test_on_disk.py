"""permute_checkpoint: what ``nmsolve permute`` does, called from Python."""

from __future__ import annotations

import json

import pytest
from permutable import build, logits

from nmsolve import NMSolveError
from nmsolve.permute import load_permutations, permute_checkpoint


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
        ({"include": ["nothing"]}, "include: 'nothing' matches none of the"),
        ({"out": "model"}, "out: .* is the input itself"),
    ],
)
def test_mistakes(folder, tmp_path, options, message):
    arguments = {"out": "new", "pattern": "2:4", "progress": False, **options}
    with pytest.raises(NMSolveError, match=message):
        permute_checkpoint(folder[1], tmp_path / arguments.pop("out"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
