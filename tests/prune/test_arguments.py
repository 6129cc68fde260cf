"""Patterns by glob, earlier masks, calibration data, and what is refused before any work."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_models
import torch
import torch.nn.utils.prune
from pruning import QUICK, mlp, prune, weights
from torch import nn

import nmsolve
from nmsolve.backends.dispatch import BACKENDS
from nmsolve.checkpoint.mask_files import load_masks
from nmsolve.errors import BackendError, WorkFailed
from nmsolve.integrations.torch_ao import NMSparsifier
from nmsolve.integrations.torch_prune import nm_structured
from nmsolve.permute import apply_permutations, learn_permutation
from nmsolve.prune import FixedMasks, prune_model
from nmsolve.prune.calibration import make_batches
from nmsolve.prune.methods import PRUNING_METHODS
from nmsolve.train import SparseTraining

pytest.importorskip("transformers")


def test_patterns_by_glob():
    model = tiny_models.make("llama")
    patterns = {"*": "2:4", "mlp.*": "4:8", "model.layers.1.mlp.down_proj": None, "q_proj": "1:4"}
    result = prune(model, tiny_models.tokens(), patterns, transposable=False, dense=["layers.0.*.v_proj"])
    found = {row.name: row.pattern for row in result.report.layers}
    assert found["model.layers.0.self_attn.k_proj"] == "2:4"
    assert found["model.layers.0.self_attn.q_proj"] == "1:4"
    assert found["model.layers.1.mlp.up_proj"] == "4:8"
    assert "model.layers.1.mlp.down_proj" not in found
    assert "model.layers.0.self_attn.v_proj" not in found
    for name, mask in result.masks.items():
        pattern = nmsolve.NMPattern.parse(found[name.removesuffix(".weight")])
        nmsolve.check_mask(mask, pattern.n, pattern.m, transposable=False)


def test_a_head_is_pruned_when_it_is_named():
    model = tiny_models.make("llama")
    result = prune(model, tiny_models.tokens(), {"lm_head": "4:8"})
    assert list(result.masks) == ["lm_head.weight"]


def test_masks_of_several_patterns_are_saved_and_read(tmp_path):
    model = tiny_models.make("llama")
    result = prune(model, tiny_models.tokens(), {"*": "2:4", "mlp.*": "4:8"})
    result.save(model, tmp_path, picture=False)
    assert {file.name for file in (tmp_path / "masks").iterdir()} == {
        "2of4.masks.safetensors",
        "4of8.masks.safetensors",
    }
    assert load_masks(tmp_path).keys() == result.masks.keys()


@pytest.mark.parametrize("method", PRUNING_METHODS)
def test_an_earlier_mask_is_kept(method, tmp_path):
    model = tiny_models.make("gpt2")
    first = prune(model, tiny_models.tokens(), "6:8", method="magnitude", transposable=False)
    first.save(model, tmp_path, picture=False)
    options = {"iterations": 10} if method == "alps" else {}
    result = prune(model, tiny_models.tokens(), "4:8", method=method, initial_masks=tmp_path, **options)
    for name, mask in result.masks.items():
        assert not (mask & ~first.masks[name]).any()
        assert (model.state_dict()[name][~mask] == 0).all()
        for lines in (mask.unflatten(0, (-1, 8)).sum(1), mask.unflatten(1, (-1, 8)).sum(2)):
            assert (lines <= 4).all()


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: expected a torch.nn.Module, got int"),
        (
            {"method": "best"},
            "method: expected one of alps, sparsegpt, frank-wolfe, wanda, ria, magnitude, got 'best'",
        ),
        ({"sequential": "no"}, "sequential: expected one of"),
        ({"mask_method": "no"}, "mask_method: expected one of"),
        ({"transposable": False, "mask_method": "greedy"}, "needs transposable=True"),
        ({"pattern": "2/4"}, "pattern: expected 'N:M'"),
        ({"pattern": {}}, "pattern: expected at least one"),
        ({"pattern": {"*": 3}}, "pattern: expected 'N:M' with N kept of M"),
        ({"pattern": {"nothing.*": "2:4"}}, "pattern: 'nothing.*' matches none of the model's 3 layers"),
        ({"dense": ["nothing"]}, "dense: 'nothing' matches none"),
        ({"dense": "nothing"}, "dense: 'nothing' matches none"),
        ({"transposable": "no"}, "transposable: expected True or False, got 'no'"),
        ({"seed": 0.5}, r"seed: expected an integer, got 0\.5"),
        ({"pattern": "32:64"}, "no layer to prune among 3 .*smaller than one block of 64"),
        ({"calibration": None}, "calibration: needed for method 'wanda'"),
        ({"calibration": []}, "calibration: expected at least one batch"),
        ({"calibration": 5}, "calibration: expected a path, a tensor or an iterable of batches, got int"),
        ({"calibration": [5]}, "calibration: expected batches that are tensors"),
        ({"calibration": [[5, 6]]}, "calibration: expected batches .*got a list of numbers"),
        (
            {
                "calibration": [torch.ones(2, 3)],
                "initial_masks": {"0.weight": torch.zeros(16, 16, dtype=torch.bool)},
            },
            r"cannot be called on the first batch, float32 \(2, 3\): Runtime",
        ),
        (
            {"calibration": [torch.ones(2, 3)]},
            r"cannot be called on the first batch, float32 \(2, 3\): Runtime",
        ),
        ({"model": nn.LSTM(16, 16)}, "model: expected linear layers or convolutions, found none"),
        ({"calibration": torch.empty(0, 16)}, "empty tensor"),
        ({"calibration": "missing.txt"}, "missing.txt: expected a text file"),
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"damping": 0.0}, "damping: expected a positive number"),
        ({"iterations": 0}, "iterations: expected an integer"),
        ({"backend": "no"}, "backend: expected"),
        ({"initial_masks": {"x": torch.ones(1, dtype=torch.bool)}}, "initial_masks: 'x' is no weight"),
        ({"initial_masks": {"0.weight": torch.ones(2, 2)}}, "expected a bool tensor of shape"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(changes, message):
    model = mlp()
    before = weights(model)
    given = {"model": model, "calibration": torch.randn(8, 16), "pattern": "2:4", "method": "wanda", **QUICK}
    with pytest.raises(nmsolve.NMSolveError, match=message) as raised:
        prune_model(**{**given, **changes})
    assert not isinstance(raised.value, WorkFailed)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tokens_that_the_model_does_not_know():
    with pytest.raises(nmsolve.NMSolveError, match="expected tokens from 0 to 95, got 96"):
        prune(tiny_models.make("llama"), torch.full((2, 8), 96))


@pytest.mark.parametrize("method", ["magnitude", "alps"])
def test_weights_that_are_not_finite(method):
    model = mlp()
    model[2].weight.data[3, 5] = torch.inf
    before = weights(model)
    message = r"model: 2\.weight: expected finite values, got 1 NaN or infinite of 256"
    with pytest.raises(WorkFailed, match=message):
        prune(model, torch.randn(8, 16), "2:4", method=method)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_inputs_that_are_not_finite():
    data = torch.randn(8, 16)
    data[3, 5] = torch.nan
    with pytest.raises(WorkFailed, match="the inputs of 0 hold NaN"):
        prune(mlp(), data, "2:4")


def test_a_hessian_that_cannot_be_factored():
    data = torch.full((8, 16), 1e-20)
    with pytest.raises(WorkFailed, match="0: damping: the Hessian is not positive definite"):
        prune(mlp(), data, "2:4", method="sparsegpt")


def test_calibration_text_and_tokens(tmp_path):
    def tokenizer(text):
        return {"input_ids": [ord(c) % 96 for c in text]}

    file = tmp_path / "text.txt"
    file.write_text("abcdefghij" * 10)
    batches = make_batches(file, tokenizer=tokenizer, samples=3, sequence_length=8, batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 8), (1, 8)]
    again = make_batches(file, tokenizer=tokenizer, samples=3, sequence_length=8, batch_size=2)
    other = make_batches(file, tokenizer=tokenizer, samples=3, sequence_length=8, batch_size=2, seed=1)
    assert torch.equal(batches[0], again[0])
    assert not torch.equal(torch.cat(batches), torch.cat(other))
    with pytest.raises(nmsolve.NMSolveError, match="tokenizer: needed"):
        make_batches(file)
    with pytest.raises(nmsolve.NMSolveError, match="10 tokens do not fill one sequence of 99"):
        make_batches(torch.arange(10), sequence_length=99)
    assert isinstance(make_batches([[torch.ones(1), 2]])[0], tuple)


def test_weights_of_quantisation_libraries_are_refused():
    """torchao and others keep a weight in a tensor of their own class, which a mask does not reach."""

    class Packed(torch.Tensor):
        pass

    model = mlp()
    model[2].weight = torch.nn.Parameter(model[2].weight.detach().as_subclass(Packed))
    with pytest.raises(nmsolve.NMSolveError, match=r"2\.weight is a .*Packed, not a plain tensor"):
        apply_permutations(model, {"2": torch.arange(model[2].in_features).flip(0)})
    with pytest.raises(nmsolve.NMSolveError, match=r"2\.weight is a .*Packed, not a plain tensor"):
        prune(model, torch.randn(8, 16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_one_byte_are_refused_by_everything_that_changes_a_model(dtype):
    """Left to themselves they end in an error of PyTorch, or are left out without a word."""
    model = mlp().requires_grad_(False)
    quantised = model[2].weight.detach().to(dtype)
    model[2].weight = torch.nn.Parameter(quantised, requires_grad=False)
    refused = rf"model: 2\.weight is {str(dtype)[6:]}, quantised: prune first"
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        prune(model, torch.randn(8, 16))
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        prune_model(model, None, "2:4", method="magnitude")
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        FixedMasks(model, {"2.weight": torch.ones(quantised.shape, dtype=torch.bool)})
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        apply_permutations(model, {"2": torch.arange(model[2].in_features).flip(0)})
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        learn_permutation(model, [torch.randn(4, 16)] * 3, 2, 4)
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        SparseTraining(model, "2:4")
    with pytest.raises(nmsolve.NMSolveError, match=r"weight: expected dtype float64.*got float8"):
        nm_structured(model[2], "weight", "2:4")
    with pytest.raises(nmsolve.NMSolveError, match=refused):
        NMSparsifier("2:4").prepare(model, None)
    assert torch.equal(model[2].weight.view(torch.uint8), quantised.view(torch.uint8))


def test_models_that_are_partly_elsewhere_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(mlp())
    with pytest.raises(nmsolve.NMSolveError, match=r"model: 6 of its parameters are offloaded \(0\.bias"):
        prune(model, torch.randn(64, 16))
    places = {str(k): "disk" if k == 2 else "cpu" for k in range(6)}
    model = accelerate.dispatch_model(mlp(), places, "cpu", offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(nmsolve.NMSolveError, match=r"model: 2 of its parameters are offloaded \(2\.bias"):
        prune(model, torch.randn(64, 16))
    masks = {"0.weight": torch.ones(model[0].weight.shape, dtype=torch.bool)}
    with pytest.raises(nmsolve.NMSolveError, match="model: 2 of its parameters are offloaded"):
        FixedMasks(model, masks)
    with pytest.raises(nmsolve.NMSolveError, match="model: 2 of its parameters are offloaded"):
        apply_permutations(model, {"2": torch.arange(model[2].in_features).flip(0)})
    with pytest.raises(nmsolve.NMSolveError, match="model: 2 of its parameters are offloaded"):
        learn_permutation(model, [torch.randn(4, 16)] * 3, 2, 4)


def test_initial_masks_need_a_backend_that_holds_larger_blocks(monkeypatch):
    """Masks within earlier ones are corners of blocks of twice the size: refused before any work."""
    small = dataclasses.replace(BACKENDS["cpu"], name="small", needs=None, max_m=4)
    monkeypatch.setattr("nmsolve.backends.dispatch.BACKENDS", {**BACKENDS, "small": small})
    masks = {"0.weight": torch.ones(16, 16, dtype=torch.bool)}
    options = {"method": "magnitude", "transposable": True, "backend": "small", "progress": False}
    model = nn.Sequential(nn.Linear(16, 16))
    before = model[0].weight.clone()
    with pytest.raises(BackendError, match="blocks of m=8 do not fit"):
        prune_model(model, None, "2:4", initial_masks=masks, **options)
    assert torch.equal(model[0].weight, before)
    prune_model(model, None, "2:4", **options)
