"""nvidia-modelopt's weight sparsity with N:M masks."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from clients import best_score, check_counts, inputs_of, kept, linears
from torch import nn

import nmsolve
from nmsolve.prune import MaskRule, sparsegpt

pytest.importorskip("modelopt")
pytest.importorskip("transformers")

import modelopt.torch.opt as mto
import modelopt.torch.sparsity as mts

from nmsolve.integrations.apex_asp import create_mask
from nmsolve.integrations.modelopt import sparsify

FIRST = "model.layers.0.self_attn.q_proj"


def calibration(**options):
    batches = [row[None] for row in tiny_models.tokens()]
    return {"data_loader": batches, "collect_func": lambda batch: batch, **options}


def test_magnitude_masks_and_export():
    model, dense = tiny_models.make("llama"), tiny_models.make("llama")
    assert sparsify(model, mode=[("sparse_magnitude", {})], config={"pattern": "4:16"}) is model
    tokens = tiny_models.tokens()
    sparse = model(tokens).logits
    exported = mts.export(model)
    for name, layer in linears(exported):
        assert type(layer) is nn.Linear
        weight = dense.get_submodule(name).weight.detach()
        mask = layer.weight != 0
        check_counts(mask, 4, 16)
        assert torch.equal(layer.weight, weight * mask)
        assert kept(weight.abs(), mask) == pytest.approx(best_score(weight.abs(), 4, 16), rel=1e-6)
    assert torch.equal(exported.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(exported(tokens).logits, sparse)


def test_training_does_not_move_the_mask():
    model = sparsify(tiny_models.make("llama"), "sparse_magnitude", {"pattern": "2:4 sparsity"})
    masks = {name: layer.weight != 0 for name, layer in linears(model)}
    before = model.get_submodule(FIRST).weight.detach().clone()
    tokens = tiny_models.tokens()
    model(tokens, labels=tokens).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    assert not torch.equal(model.get_submodule(FIRST).weight, before)
    for name, layer in linears(mts.export(model)):
        assert torch.equal(layer.weight != 0, masks[name])
        check_counts(layer.weight != 0, 2, 4)


def test_sparsegpt_masks():
    dense = tiny_models.make("llama")
    model = sparsify(tiny_models.make("llama"), "sparsegpt", calibration(pattern="8:16", hessian_damp=0.05))
    inputs = inputs_of(dense, FIRST, tiny_models.tokens())
    weight = dense.get_submodule(FIRST).weight.detach()
    expected = sparsegpt(weight, inputs.T @ inputs, MaskRule("8:16"), damping=0.05).mask
    magnitude = nmsolve.transposable_mask(weight.abs(), 8, 16)
    for name, layer in linears(mts.export(model)):
        check_counts(layer.weight != 0, 8, 16)
        assert torch.equal(layer.weight, dense.get_submodule(name).weight * (layer.weight != 0))
    found = model.get_submodule(FIRST).weight != 0
    assert (found == expected).float().mean() > 0.99
    assert (found == magnitude).float().mean() < 0.99


def test_a_saved_model_is_restored_without_nmsolve(tmp_path):
    model = sparsify(tiny_models.make("llama"), "sparse_magnitude", {"pattern": "8:16"})
    assert [mode for mode, _ in mto.modelopt_state(model)["modelopt_state_dict"]] == ["sparse_magnitude"]
    mto.save(model, tmp_path / "model.pth")
    again = mto.restore(tiny_models.make("llama"), tmp_path / "model.pth")
    for name, layer in linears(model):
        other = again.get_submodule(name)
        assert torch.equal(other._weight_mask, layer._weight_mask)
        assert torch.equal(other.weight, layer.weight)


@pytest.mark.parametrize("mode", ["sparse_magnitude", "sparsegpt"])
def test_convolutions_by_kernel_position_and_sizes_that_do_not_fit(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 32), nn.Linear(32, 24))
    images = torch.randn(40, 16, 3, 3)
    with pytest.warns(UserWarning, match=r"left dense: 3, whose size \(24, 32\) blocks of 16 do not divide"):
        sparsify(model, mode, {"pattern": "4:16", "forward_loop": lambda model: model(images)})
    mask = model[0].weight != 0
    for i in range(3):
        for j in range(3):
            check_counts(mask[:, :, i, j], 4, 16)
    check_counts(model[2].weight != 0, 4, 16)
    assert (model[3].weight != 0).all()


def test_rows_alone_and_half_precision():
    model = tiny_models.make("llama").to(torch.bfloat16)
    sparsify(model, "sparse_magnitude", {"pattern": "1:4", "transposable": False, "backend": "torch"})
    for _, layer in linears(model):
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.weight != 0).view(-1, 4).sum(1).unique().tolist() == [1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pattern": "half"}, "pattern: expected 'N:M'"),
        ({"pattern": "2:4", "mask_method": "best"}, "mask_method: expected one of"),
        ({"transposable": False, "mask_method": "greedy"}, "needs transposable=True"),
    ],
)
def test_options_that_are_refused_before_the_model_is_touched(config, message):
    model = nn.Sequential(nn.Linear(16, 16))
    with pytest.raises(nmsolve.NMSolveError, match=message):
        sparsify(model, "sparse_magnitude", config)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("shape", [(16, 32), (16, 32, 3), (16, 32, 3, 2)])
def test_apex_masks_are_those_of_modelopts_copy_of_apex(shape):
    from modelopt.torch.sparsity.weight_sparsity.magnitude import create_asp_mask

    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(create_mask(tensor, "m4n2_1d", 0.5).bool(), create_asp_mask(tensor, "2:4 sparsity"))
