"""prune_checkpoint and evaluate_checkpoint: what the commands do, called from Python."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve import NMSolveError
from nmsolve.errors import WorkFailed
from nmsolve.prune import evaluate_checkpoint, perplexity, prune_checkpoint, prune_model

pytest.importorskip("transformers")
QUICK = {"backend": "torch", "progress": False, "picture": False}


@pytest.fixture
def folder(tmp_path):
    tiny_models.make("llama").save_pretrained(tmp_path / "model")
    save_file({"tokens": tiny_models.tokens(8)}, tmp_path / "tokens.safetensors")
    return tmp_path / "model"


def test_it_does_what_prune_model_does(folder, tmp_path):
    calibration = tmp_path / "tokens.safetensors"
    options = {"method": "sparsegpt", "transposable": True, "damping": 0.02, "samples": 4}
    result = prune_checkpoint(
        str(folder), str(tmp_path / "out"), {"*": "4:8", "layers.0.*": None}, calibration=str(calibration),
        **options, **QUICK,
    )  # fmt: skip
    model = tiny_models.make("llama")
    expected = prune_model(
        model, calibration, {"*": "4:8", "layers.0.*": None}, backend="torch", progress=False, **options
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(result.masks) == set(expected.masks)
    for name in expected.masks:
        assert torch.equal(written[name], model.state_dict()[name])
        assert torch.equal(result.masks[name], nmsolve.load_masks(tmp_path / "out")[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "tokens.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "best"}, "method: expected one of alps, sparsegpt, frank-wolfe, wanda, ria, magnitude"),
        ({"method": "wanda"}, "calibration: needed for method 'wanda'"),
        ({"method": "magnitude", "damping": 0.1}, "damping: method 'magnitude' has none"),
        ({"method": "magnitude", "mask_method": "greedy"}, "mask_method: 'greedy' needs transposable=True"),
        ({"method": "magnitude", "calibration": "absent.txt"}, "calibration: absent.txt is not a file"),
        ({"method": "magnitude", "device": "tpu"}, "device: expected cpu"),
        ({"method": "magnitude", "sequential": "all"}, "sequential: expected one of layer, block, off"),
        ({"method": "magnitude", "dense": ["nothing"]}, "dense: 'nothing' matches none"),
        ({"method": "magnitude", "dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16"),
    ],
)
def test_mistakes(folder, tmp_path, options, message):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(NMSolveError, match=message) as error:
        prune_checkpoint(folder, tmp_path / "out", "4:8", **QUICK, **options)
    assert not isinstance(error.value, WorkFailed)
    assert sorted(tmp_path.iterdir()) == before


def test_an_interruption_says_how_to_go_on(folder, tmp_path, monkeypatch):
    from nmsolve.prune import run

    calls = []

    def interrupted(self, *arguments, whole=run.Run._layer):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    arguments = (folder, tmp_path / "out", "4:8")
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_layer", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"finished layers are in .*the same command goes on"):
            prune_checkpoint(*arguments, method="magnitude", **QUICK)
    result = prune_checkpoint(*arguments, method="magnitude", **QUICK)
    assert result.report.resumed == 3


def test_perplexity(folder, tmp_path):
    save_file({"tokens": tiny_models.tokens(8).flatten()}, tmp_path / "text.safetensors")
    found = evaluate_checkpoint(folder, tmp_path / "text.safetensors", window=16, windows=3, progress=False)
    expected = perplexity(tiny_models.make("llama"), tiny_models.tokens(8).flatten(), window=16, windows=3)
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-6)
    with pytest.raises(NMSolveError, match="text: absent is not a file"):
        evaluate_checkpoint(folder, "absent")
    with pytest.raises(NMSolveError, match="dtype: expected one of"):
        evaluate_checkpoint(folder, tmp_path / "text.safetensors", dtype="int8")
