"""SparseTraining in one process: masks, gradients, decay, phases, metrics."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from sparse_training import (
    GRADIENTS,
    NAMES,
    STEPS,
    Watched,
    adamw,
    batches,
    by_hand,
    layers,
    network,
    sgd,
    train,
)
from torch import nn

import nmsolve
from nmsolve.train import SparseTraining

# --- the update is the one that is written out --------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_run_is_the_one_by_hand(gradient, optimizer):
    model, other = network(), network()
    expected, flips = by_hand(other, optimizer(other), gradient, 0.05, refresh=2)
    own = optimizer(model)
    sparse = SparseTraining(model, refresh=2, gradient=gradient, decay=0.05, backend="torch")
    sparse.attach(own)
    found = []

    def count() -> None:
        if sparse.step % 2 == 0:
            found.append(round(sparse.metrics().flip_rate * 2 * 16 * 32))

    assert train(model, own, after=count) == pytest.approx(expected, rel=1e-6)
    assert found == flips
    assert gradient == "masked" or sum(flips) > 0
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "1:4"])
@pytest.mark.parametrize("transposable", [True, False])
def test_every_operand_of_every_step_has_the_pattern(pattern, transposable, monkeypatch):
    model = network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, pattern, transposable=transposable, refresh=1, backend="torch")
    sparse.attach(optimizer)
    watched = Watched(monkeypatch)
    train(model, optimizer)
    assert len(watched.operands) == 2 * STEPS
    n, m = sparse.patterns["up.weight"].n, sparse.patterns["up.weight"].m
    for operand in watched.operands:
        nmsolve.check_mask(operand != 0, n, m, transposable=transposable)
    for name, mask in sparse.masks.items():
        scores = model.get_parameter(name).detach().abs()
        solve = nmsolve.transposable_mask if transposable else nmsolve.nm_mask
        assert torch.equal(mask, solve(scores, n, m, backend="torch"))


def test_all_layers_are_solved_in_one_call(monkeypatch):
    from nmsolve.train import solving

    calls = []
    solve = solving.transposable_masks

    def counted(scores, *args, **options):
        calls.append(len(scores))
        return solve(scores, *args, **options)

    monkeypatch.setattr(solving, "transposable_masks", counted)
    SparseTraining(nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))), {"*": "2:4", "3": "4:8"})
    assert calls == [4, 1]


# --- layers -------------------------------------------------------------------------------------------------


def matrices(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """``(..., out, in)``, written out for each kind."""
    if kind == "gpt2":
        return weight.T
    if kind == "grouped":
        return torch.stack(
            [weight[4 * g : 4 * g + 4, :, i, j] for g in (0, 1) for i in (0,) for j in range(3)]
        )
    if kind == "conv1d":
        return torch.stack([weight[:, :, i] for i in range(3)])
    if kind == "conv2d":
        return torch.stack([weight[:, :, i, j] for i in range(3) for j in range(3)])
    return weight


@pytest.mark.parametrize("kind", layers())
def test_layers_compute_with_masked_weights(kind):
    layer, x = layers()[kind]
    dense = copy.deepcopy(layer)
    sparse = SparseTraining(nn.Sequential(layer), {"0": "2:4"}, backend="torch")
    (mask,) = sparse.masks.values()
    for matrix in matrices(mask, kind).reshape(-1, *matrices(mask, kind).shape[-2:]):
        nmsolve.check_mask(matrix, 2, 4)
    expected = nmsolve.transposable_mask(matrices(dense.weight.detach(), kind).abs(), 2, 4, backend="torch")
    assert torch.equal(matrices(mask, kind), expected)
    reference = copy.deepcopy(dense)
    reference.weight.data *= mask
    g = torch.randn_like(reference(x))
    x_own, x_ref = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(x_own).backward(g)
    reference(x_ref).backward(g)
    torch.testing.assert_close(layer(x), reference(x))
    torch.testing.assert_close(x_own.grad, x_ref.grad)
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad)  # dense: straight through
    assert torch.equal(layer.weight, dense.weight)
    sparse.finish()
    assert type(layer) is type(dense)
    assert torch.equal(layer.weight, reference.weight)
    assert vars(layer).keys() == vars(dense).keys()


def test_gpt2_by_star_leaves_embeddings_and_head_dense():
    import tiny_models

    model = tiny_models.make("gpt2")
    sparse = SparseTraining(model, "8:16")
    assert len(sparse.patterns) == 8
    assert all(".h." in name for name in sparse.patterns)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparse.attach(optimizer)
    tokens = torch.arange(32).view(2, 16)
    first = None
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        first = first or loss.item()
        loss.backward()
        optimizer.step()
    assert loss.item() < first
    sparse.finish()
    nmsolve.check_mask(model.transformer.h[0].mlp.c_fc.weight.T != 0, 8, 16)


def test_patterns_by_glob():
    model = network()
    sparse = SparseTraining(model, {"*": "2:4", "down": "4:8"})
    assert [str(p) for p in sparse.patterns.values()] == ["2:4", "4:8"]
    nmsolve.check_mask(sparse.masks["down.weight"], 4, 8)
    sparse = SparseTraining(network(), "2:4", include=["u*"])
    assert (list(sparse.patterns), sparse.skipped) == (["up.weight"], {"down": "no pattern for it"})
    sparse = SparseTraining(network(), "2:4", dense="up")
    assert (list(sparse.patterns), sparse.skipped) == (["down.weight"], {"up": "named in dense"})


def test_a_start_from_a_pruned_model_keeps_its_support():
    model = network()
    masks = {name: nmsolve.transposable_mask(model.get_parameter(name).abs(), 4, 8) for name in NAMES}
    for name, mask in masks.items():
        model.get_parameter(name).data.mul_(mask)
    sparse = SparseTraining(model, "4:8")
    for name, mask in sparse.masks.items():
        assert torch.equal(mask, masks[name])


class Reading(nn.Module):
    """Computes with one layer's parameter, through a method, and calls the other two."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called, self.asked = (nn.Linear(8, 8) for _ in range(3))
        nn.init.ones_(self.called.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.asked.weight, nn.Parameter) and x.dtype != self.asked.weight.dtype:
            x = x.to(self.asked.weight.dtype)
        return self.fused(self.called(self.asked(x)))

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.read.weight.float())


def test_layers_whose_weight_is_read_by_others_stay_dense():
    model = nn.ModuleDict({"mixer": Reading()})
    sparse = SparseTraining(model)
    assert list(sparse.patterns) == ["mixer.called.weight", "mixer.asked.weight"]
    assert sparse.skipped == {"mixer.read": "Reading reads its weight without calling it"}
    with pytest.raises(nmsolve.NMSolveError, match=r"mixer\.read cannot be masked: Reading reads its weight"):
        SparseTraining(nn.ModuleDict({"mixer": Reading()}), include="*read")


@pytest.mark.parametrize("kind", ["mamba", "wavlm", "t5", "bloom"])
def test_what_is_masked_in_training_is_what_is_pruned(kind):
    """Logits under masks, in training, are those of the finished model."""
    import transformers as t

    torch.manual_seed(0)
    common = {"vocab_size": 96, "hidden_size": 32}
    x: dict = {"input_ids": torch.arange(3, 35).view(2, 16)}
    if kind == "mamba":
        model = t.MambaForCausalLM(t.MambaConfig(state_size=8, num_hidden_layers=1, **common))
    elif kind == "bloom":
        model = t.BloomForCausalLM(
            t.BloomConfig(n_layer=1, n_head=2, hidden_dropout=0, attention_dropout=0, **common)
        )
    elif kind == "t5":
        config = t.T5Config(
            vocab_size=96, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0
        )
        model = t.T5ForConditionalGeneration(config)
        x["decoder_input_ids"] = x["input_ids"]
    else:
        off = ("hidden", "attention", "activation", "feat_proj", "final")
        config = t.WavLMConfig(
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            conv_dim=(16,),
            conv_stride=(4,),
            conv_kernel=(4,),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            layerdrop=0,
            apply_spec_augment=False,
            **{f"{name}_dropout": 0.0 for name in off},
            **common,
        )
        model, x = t.WavLMModel(config), {"input_values": torch.randn(1, 128)}
    model.train()
    sparse = SparseTraining(model, "2:4")
    assert {"mamba": 1, "wavlm": 4, "t5": 16, "bloom": 4}[kind] == len(sparse.patterns), sparse.skipped
    with torch.no_grad():
        masked = model(**x)[0]
        sparse.finish()
        torch.testing.assert_close(model(**x)[0], masked, rtol=1e-4, atol=1e-5)


# --- phases -------------------------------------------------------------------------------------------------


def phases_of(sparse: SparseTraining, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple]:
    seen = []
    train(model, optimizer, after=lambda: seen.append((sparse.phase, sparse.metrics().refreshes)))
    return seen


def test_dense_warm_up_and_dense_end():
    model, plain = network(), network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, refresh=2, start=3, stop=7, decay=0.1)
    sparse.attach(optimizer)
    assert (sparse.phase, sparse.masks) == ("warm-up", {})
    assert phases_of(sparse, model, optimizer) == [
        *[("warm-up", 0)] * 2,
        *[("sparse", 0)] * 2,
        *[("sparse", 1)] * 2,
        *[("dense", 1)] * 2,
    ]
    dense = adamw(plain)
    losses = train(plain, dense, itertools.islice(batches(), 3))
    model = network()
    optimizer = adamw(model)
    SparseTraining(model, start=3, decay=0.1).attach(optimizer)
    assert train(model, optimizer, itertools.islice(batches(), 3)) == losses  # to the bit
    before = model.up.weight.detach().clone()
    sparse = SparseTraining(network(), start=3)
    assert sparse.finish() == {}
    assert torch.equal(model.up.weight, before)


def test_a_dense_end_sees_the_whole_weight():
    model, x = network(), torch.randn(4, 16)
    expected = model(x)
    sparse = SparseTraining(model)
    assert not torch.equal(model(x), expected)
    sparse.dense()
    assert torch.equal(model(x), expected)
    assert (sparse.masks, sparse.metrics().kept_share) == ({}, 1.0)
    assert sparse.finish() == {}
    assert torch.equal(model(x), expected)


def test_frozen_masks_stay():
    model = network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, refresh=1)
    sparse.attach(optimizer)
    train(model, optimizer, itertools.islice(batches(), 2))
    sparse.freeze()
    masks = sparse.masks
    train(model, optimizer)
    assert (sparse.step, sparse.phase, sparse.metrics().refreshes) == (STEPS + 2, "frozen", 2)
    for name, mask in sparse.finish().items():
        assert torch.equal(mask, masks[name])
        assert torch.equal(model.get_parameter(name) != 0, mask)


def test_a_refresh_schedule():
    model = network()
    optimizer = adamw(model)
    asked = []

    def refresh(step: int) -> int:
        asked.append(step)
        return 1 if step <= 3 else 2

    sparse = SparseTraining(model, refresh=refresh)
    sparse.attach(optimizer)
    seen = phases_of(sparse, model, optimizer)
    assert [count for _, count in seen] == [1, 2, 3, 3, 4, 4, 5, 5]
    assert asked == [0, *range(1, STEPS + 1)]


def test_a_decay_schedule():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    sparse = SparseTraining(
        model, gradient="sr-ste", decay=lambda step: 0.0 if step < 2 else 1.0, refresh=100
    )
    sparse.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    mask, start = sparse.masks["up.weight"], model.up.weight.detach().clone()
    for left in (1, 1, 0.5, 0.25):
        optimizer.step()
        torch.testing.assert_close(model.up.weight.detach(), torch.where(mask, start, start * left))


def test_refresh_by_hand_and_the_end_of_it():
    model = network()
    sparse = SparseTraining(model, start=100)
    sparse.refresh()
    assert sparse.phase == "sparse"
    model.up.weight.data = model.up.weight.data.flip(0)
    sparse.refresh()
    assert sparse.metrics().flip_rate > 0.1
    sparse.freeze()
    with pytest.raises(nmsolve.NMSolveError, match=r"refresh: expected masks that follow .* 'frozen'"):
        sparse.refresh()
    sparse.finish()
    for call in (
        sparse.finish,
        sparse.metrics,
        sparse.freeze,
        sparse.dense,
        sparse.state_dict,
        sparse.refresh,
    ):
        with pytest.raises(nmsolve.NMSolveError, match="got one that is finished"):
            call()


def test_freezing_the_warm_up_is_refused():
    with pytest.raises(nmsolve.NMSolveError, match="freeze: expected masks, got phase 'warm-up'"):
        SparseTraining(network(), start=1).freeze()


def test_finishing_leaves_nothing_behind():
    model, optimizer = network(), None
    names, modules = vars(model).keys(), [vars(module).keys() for module in model.modules()]
    optimizer = adamw(model)
    sparse = SparseTraining(model, refresh=1, gradient="masked", decay=0.1)
    sparse.attach(optimizer)
    sparse.finish()
    assert vars(model).keys() == names
    assert [vars(module).keys() for module in model.modules()] == modules
    assert not list(model.buffers())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    train(model, optimizer)
    assert (model.up.weight != 0).all()
    assert sparse.step == 0


# --- metrics ------------------------------------------------------------------------------------------------


def test_metrics_are_their_definitions():
    model = network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, refresh=4)
    sparse.attach(optimizer)
    assert sparse.metrics().flip_rate is None
    assert set(sparse.metrics().numbers()) == {"sparse/refreshes", "sparse/kept_share"}
    before = sparse.masks
    train(model, optimizer)
    middle = sparse.masks
    train(model, optimizer, itertools.islice(batches(), 4))
    found, masks = sparse.metrics(), sparse.masks
    flips = {name: (masks[name] ^ middle[name]).float().mean().item() for name in NAMES}
    kept = {}
    for layer in found.layers:
        weight = model.get_parameter(layer.name).detach().double().abs()
        kept[layer.name] = (weight * masks[layer.name]).sum(), weight.sum()
        assert layer.pattern == "2:4"
        assert layer.flip_rate == pytest.approx(flips[layer.name])
        assert layer.flip_rate_per_step == pytest.approx(flips[layer.name] / 4)
        assert layer.kept_share == pytest.approx(float(kept[layer.name][0] / kept[layer.name][1]))
    assert (found.step, found.phase, found.refreshes) == (12, "sparse", 3)
    assert found.flip_rate == pytest.approx(sum(flips.values()) / 2)  # both weights have the same size
    assert found.kept_share == pytest.approx(
        float(sum(k for k, _ in kept.values()) / sum(t for _, t in kept.values()))
    )
    assert found.numbers("x/")["x/flip_rate_per_step"] == pytest.approx(found.flip_rate / 4)
    assert 0 < found.flip_rate < 1
    assert any(not torch.equal(before[name], masks[name]) for name in NAMES)
