"""torch.nn.utils.prune and torch.ao.pruning with N:M masks."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from clients import best_score, best_score_within, check_counts, kept, linears
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import is_parametrized

import nmsolve
from nmsolve.integrations.torch_ao import NMSparsifier
from nmsolve.integrations.torch_prune import NMPruning, nm_structured

pytest.importorskip("transformers")


def positions(mask: torch.Tensor, groups: int = 1):
    """The ``(out, in)`` matrices of a convolution's mask."""
    for part in mask.chunk(groups):
        for i in range(mask.shape[2]):
            for j in range(mask.shape[3]):
                yield part[:, :, i, j]


def test_prune_keeps_n_of_m_both_ways_and_the_most_magnitude():
    model, dense = tiny_models.make("llama"), tiny_models.make("llama")
    for name, layer in linears(model):
        assert nm_structured(layer, "weight", "1:4") is layer
        mask = layer.weight_mask
        weight = dense.get_submodule(name).weight
        assert mask.dtype == weight.dtype
        assert mask.unique().tolist() == [0, 1]
        check_counts(mask.bool(), 1, 4)
        assert torch.equal(layer.weight, weight * mask)
        optimum = nmsolve.transposable_mask(weight.detach().abs(), 1, 4, return_solution=True)
        assert kept(weight.abs(), mask.bool()) == pytest.approx(optimum.total_objective, rel=1e-6)
        assert kept(weight.abs(), mask.bool()) == pytest.approx(best_score(weight.abs(), 1, 4), rel=1e-6)
        with torch.no_grad():
            weight.mul_(mask)
    tokens = tiny_models.tokens()
    assert torch.equal(model(tokens).logits, dense(tokens).logits)


def test_prune_remove_leaves_an_ordinary_sparse_model():
    model = tiny_models.make("llama")
    names = set(model.state_dict())
    for _, layer in linears(model):
        nm_structured(layer, "weight", "4:8")
    model(tiny_models.tokens(), labels=tiny_models.tokens()).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1).step()
    for _, layer in linears(model):
        prune.remove(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)
        check_counts(layer.weight != 0, 4, 8)
    assert set(model.state_dict()) == names


def test_prune_extends_an_existing_mask():
    torch.manual_seed(0)
    layer = nn.Linear(32, 24)
    prune.random_unstructured(layer, "weight", amount=0.4)
    old = layer.weight_mask.bool()
    scores = layer.weight_orig.detach().abs() * old
    nm_structured(layer, "weight", "4:8")
    mask = layer.weight_mask.bool()
    assert not (mask & ~old).any()
    blocks = mask.view(3, 8, 4, 8)
    assert blocks.sum(1).max() <= 4
    assert blocks.sum(3).max() <= 4
    assert kept(scores, mask) == pytest.approx(best_score_within(scores, 4, 8), rel=1e-6)
    nm_structured(layer, "weight", "1:8", importance_scores=-layer.weight_orig.detach())
    assert not (layer.weight_mask.bool() & ~mask).any()
    assert 0 < layer.weight_mask.sum() <= 32 * 24 / 8
    prune.remove(layer, "weight")
    assert layer.weight.count_nonzero() <= 32 * 24 / 8


def test_prune_of_a_convolution_masks_every_kernel_position_of_every_group():
    torch.manual_seed(0)
    layer = nm_structured(nn.Conv2d(24, 16, 3, groups=2), "weight", "2:4")
    for matrix in positions(layer.weight_mask.bool(), groups=2):
        assert matrix.shape == (8, 12)
        check_counts(matrix, 2, 4)
    # Blocks must not reach from one group into the next: 6 rows are a full block and a half.
    layer = nm_structured(nn.Conv2d(24, 12, 1, groups=2), "weight", "2:4")
    for matrix in positions(layer.weight_mask.bool(), groups=2):
        nmsolve.check_mask(matrix, 2, 4)
    line = nm_structured(nn.Conv1d(8, 8, 5), "weight", "1:4").weight_mask
    assert torch.equal(line.sum((0, 1)), torch.full((5,), 16.0))


def test_prune_along_the_inputs():
    model = tiny_models.make("gpt2")
    layer = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert layer.weight.shape == (tiny_models.HIDDEN, 4 * tiny_models.HIDDEN)  # (in, out)
    nm_structured(layer, "weight", "1:4", transposable=False)
    assert torch.equal(layer.weight_mask.view(-1, 4, 4 * tiny_models.HIDDEN).sum(1).unique(), torch.ones(1))
    linear = nm_structured(nn.Linear(32, 16), "weight", "1:4", transposable=False)
    assert torch.equal(linear.weight_mask.view(16, -1, 4).sum(2).unique(), torch.ones(1))
    assert linear.weight_mask.view(-1, 4, 32).sum(1).unique().numel() > 1


def test_prune_by_importance_scores_of_any_sign():
    importance = torch.tensor([[-4.0, 3.0], [3.0, 1.0]])
    layer = nm_structured(nn.Linear(2, 2), "weight", "1:2", importance_scores=importance)
    assert layer.weight_mask.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_prune_keeps_dtype_and_remainders(dtype):
    layer = nm_structured(nn.Linear(27, 19, dtype=dtype), "weight", "2:4")
    assert layer.weight_mask.dtype == layer.weight.dtype == dtype
    nmsolve.check_mask(layer.weight_mask.bool(), 2, 4)
    assert layer(torch.ones(1, 27, dtype=dtype)).dtype == dtype


def test_prune_tells_what_it_kept():
    method = NMPruning.apply(nn.Linear(32, 32), "weight", "8:16", method="greedy")
    assert 0 < method.rule.tally.gap < 0.2
    assert 0.5 < method.rule.tally.retained < 1


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("weight", "3-4", "pattern: expected 'N:M'"),
        ("weight", "2:4", "scores: .*2 NaN or infinite"),
        ("bias", "2:4", r"at least two dimensions \(out, in\), got shape \(8,\)"),
    ],
)
def test_prune_refuses_and_leaves_the_module_alone(name, pattern, message):
    layer = nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight[3, 2] = torch.nan
        layer.weight[5, 1] = torch.inf
    before = layer.weight, layer.bias
    with pytest.raises(nmsolve.NMSolveError, match=message):
        nm_structured(layer, name, pattern)
    assert layer.weight is before[0]
    assert layer.bias is before[1]
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert not layer._forward_pre_hooks


def test_sparsifier_on_a_model():
    model = tiny_models.make("llama")
    dense = {name: layer.weight.detach().clone() for name, layer in linears(model, head=True)}
    sparsifier = NMSparsifier("1:4")
    sparsifier.prepare(model, config=None)
    assert {group["module_fqn"] for group in sparsifier.groups} == {name for name, _ in linears(model)}
    sparsifier.step()
    for group in sparsifier.groups:
        mask = group["module"].parametrizations.weight[0].mask
        assert mask is sparsifier.state[group["tensor_fqn"]]["mask"]
        assert mask.dtype == torch.float32
        check_counts(mask.bool(), 1, 4)
        weight = dense[group["module_fqn"]]
        assert torch.equal(group["module"].weight, weight * mask)
        assert kept(weight.abs(), mask.bool()) == pytest.approx(best_score(weight.abs(), 1, 4), rel=1e-6)
    sparsifier.squash_mask(params_to_keep=("pattern",))
    for name, layer in linears(model):
        assert not is_parametrized(layer)
        assert layer.sparse_params == {"pattern": "1:4"}
        check_counts(layer.weight != 0, 1, 4)
        assert torch.equal(layer.weight, torch.where(layer.weight != 0, dense[name], 0))
    assert torch.equal(model.lm_head.weight, dense["lm_head"])


def test_sparsifier_with_a_pattern_for_each_layer():
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32, 64), nn.Linear(64, 20))
    config = [
        {"tensor_fqn": "0.weight", "pattern": "8:16"},
        {"tensor_fqn": "2.weight", "transposable": False},
    ]
    sparsifier = NMSparsifier("1:4", method="exact")
    sparsifier.prepare(model, config)
    sparsifier.step()
    model(torch.randn(2, 16, 3, 3)).sum().backward()
    sparsifier.squash_mask()
    for matrix in positions(model[0].weight != 0):
        check_counts(matrix, 8, 16)
    assert torch.equal(
        (model[2].weight != 0).view(64, -1, 4).sum(2).unique(), torch.ones(1, dtype=torch.int64)
    )
    assert (model[3].weight != 0).all()


def test_sparsifier_masks_change_only_when_told():
    def masks(regrow: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16))
        sparsifier = NMSparsifier("2:4", regrow=regrow)
        sparsifier.prepare(model, config=None)
        found = []
        for _ in range(2):
            sparsifier.step()
            found.append(model[0].parametrizations.weight[0].mask.clone())
            with torch.no_grad():  # what is kept becomes small
                model[0].parametrizations.weight.original[found[0].bool()] *= 0.01
        sparsifier.enable_mask_update = False
        sparsifier.step()
        assert torch.equal(found[-1], model[0].parametrizations.weight[0].mask)
        return found

    first, second = masks(regrow=False)
    assert torch.equal(first, second)
    first, second = masks(regrow=True)
    assert not torch.equal(first, second)
    check_counts(second.bool(), 2, 4)


def test_sparsifier_keeps_within_a_mask_of_the_config():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    old = torch.rand(16, 16) < 0.6
    sparsifier = NMSparsifier("2:4")
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight", "mask": old.float()}])
    sparsifier.step()
    mask = model[0].parametrizations.weight[0].mask.bool()
    assert not (mask & ~old).any()
    scores = model[0].parametrizations.weight.original.detach().abs() * old
    assert kept(scores, mask) == pytest.approx(best_score(scores, 2, 4), rel=1e-6)


def test_sparsifier_state_goes_into_another_model():
    model, other = tiny_models.make("llama"), tiny_models.make("llama")
    sparsifier = NMSparsifier("4:8")
    sparsifier.prepare(model, config=None)
    sparsifier.step()
    state = copy.deepcopy(sparsifier.state_dict())
    again = NMSparsifier()
    again.prepare(other, config=None)
    again.load_state_dict(state)
    for name, layer in linears(model):
        assert torch.equal(other.get_submodule(name).weight, layer.weight)
    assert {group["pattern"] for group in again.groups} == {"4:8"}
    again.squash_mask()
    for _, layer in linears(other):
        check_counts(layer.weight != 0, 4, 8)


def test_sparsifier_refuses():
    for options, message in (
        ({"pattern": "5:4"}, "n: expected 0 <= n <= m=4"),
        ({"method": "best"}, "mask_method: expected one of"),
        ({"method": "greedy", "transposable": False}, "needs transposable=True"),
    ):
        with pytest.raises(nmsolve.NMSolveError, match=message):
            NMSparsifier(**options)
    model = nn.Sequential(nn.Linear(16, 16))
    sparsifier = NMSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": "0.bias"}])
    with pytest.raises(nmsolve.NMSolveError, match="at least two dimensions"):
        sparsifier.step()


@pytest.mark.parametrize("seed", range(8))
def test_the_first_mask_of_either_is_that_of_the_whole_weight(seed):
    """Every line of it keeps N; within an earlier mask some would keep fewer and the sum be larger."""
    torch.manual_seed(seed)
    layers = [nn.Linear(32, 16) for _ in range(2)]
    expected = [nmsolve.transposable_mask(layer.weight.detach().abs(), 4, 8) for layer in layers]
    sparsifier = NMSparsifier("4:8")
    sparsifier.prepare(nn.Sequential(layers[0]), [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    NMPruning.apply(layers[1], "weight", "4:8")
    masks = layers[0].parametrizations.weight[0].mask, layers[1].weight_mask
    for mask, other in zip(masks, expected, strict=True):
        assert torch.equal(mask.bool(), other)
