"""The report of a pruning run: what it says, and its picture."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from pruning import mlp, prune

from nmsolve.prune.methods import PRUNING_METHODS
from nmsolve.prune.report import layer_kinds

CALIBRATED = {"sequential", "samples", "seed"}


@pytest.mark.parametrize("transposable", [True, False])
@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_settings_are_those_that_were_used(method, transposable):
    row = PRUNING_METHODS[method]
    data = torch.randn(64, 16) if row.needs_calibration else None
    settings = prune(mlp(), data, method=method, transposable=transposable, seed=5).report.settings
    assert {"damping", "iterations"} & set(settings) == set(row.options)
    assert ("mask_method" in settings) == transposable
    assert CALIBRATED & set(settings) == (CALIBRATED if row.needs_calibration else set())
    if row.needs_calibration:
        assert (settings["seed"], settings["samples"]) == (5, 64)


def test_kinds_of_layers_of_any_architecture():
    assert layer_kinds(["model.layers.0.mlp.up_proj", "model.layers.11.mlp.up_proj"]) == ["up_proj"] * 2
    names = [f"bert.encoder.layer.{k}.{end}.dense" for k in (0, 1) for end in ("attention.output", "output")]
    kinds = layer_kinds([*names, "bert.pooler.dense"])
    assert kinds[:2] == kinds[2:4] == ["attention.output.dense", "layer.output.dense"]
    assert kinds[4] == "pooler.dense"
    assert layer_kinds(["0", "2", "4"]) == ["layer"] * 3
    assert layer_kinds(["layer1.0.conv1", "layer4.2.conv1", "layer4.2.conv2"]) == ["conv1", "conv1", "conv2"]
    experts = [f"layers.0.experts.{k}.{w}" for k in range(4) for w in ("w1", "w2")]
    assert layer_kinds(experts) == ["w1", "w2"] * 4
    towers = layer_kinds(["encoder.block.0.q", "decoder.block.0.q", "decoder.block.1.q"])
    assert towers == ["encoder.block.q", "decoder.block.q", "decoder.block.q"]


@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "vit", "t5"])
def test_the_picture_has_a_line_for_each_kind_and_a_legend_beside_them(kind, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    report = prune(tiny_models.make(kind), tiny_models.calibration(kind), transposable=False).report
    report.draw(tmp_path / "report.png")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    (picture,) = drawn
    kinds = layer_kinds([layer.name for layer in report.layers])
    for axis in picture.axes:
        assert [line.get_label() for line in axis.lines] == list(dict.fromkeys(kinds))
        assert sum(len(line.get_xdata()) for line in axis.lines) == len(report.layers)
        for legend in picture.legends:
            assert not legend.get_window_extent().overlaps(axis.get_window_extent())
    assert picture.axes[0].get_title(loc="left") == "wanda, 4:8 ordinary"


def test_a_picture_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    report = prune(mlp(), None, method="magnitude").report
    (tmp_path / "report.png").write_text("old")

    def full(self, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(OSError, match="No space left"):
        report.draw(tmp_path / "report.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_titles_name_pattern_and_kind_of_mask():
    report = prune(mlp(), None, {"*": "2:4", "4": "4:8", "2": None}, method="magnitude").report
    assert report.title() == "magnitude, *=2:4, 4=4:8, 2=dense transposable by exact"
    assert json.loads(json.dumps(report.to_json()))["settings"]["pattern"] == {
        "*": "2:4",
        "4": "4:8",
        "2": None,
    }
