"""SparseTraining in one process: masks, gradients, decay, phases, metrics, resuming, arguments."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from sparse_training import STEPS, Watched, batches, by_hand, network, train
from torch import nn

import nmsolve
from nmsolve.train import SparseTraining, finish_model

GRADIENTS = ("straight-through", "masked", "sr-ste")
NAMES = ["up.weight", "down.weight"]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def adamw(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, **options)


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


def layers() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(12, 8), torch.randn(3, 5, 12)),
        "odd linear": (nn.Linear(10, 7, bias=False), torch.randn(3, 10)),
        "conv1d": (nn.Conv1d(8, 12, 3, padding=1), torch.randn(2, 8, 9)),
        "conv2d": (nn.Conv2d(8, 16, 3, stride=2, padding="valid"), torch.randn(2, 8, 9, 9)),
        "grouped": (nn.Conv2d(16, 8, (1, 3), groups=2, padding_mode="circular"), torch.randn(2, 16, 5, 5)),
        "gpt2": (Conv1D(12, 8), torch.randn(3, 5, 8)),
    }


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


# --- saving and resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_resumed_run_goes_on_to_the_bit(gradient):
    options = {"refresh": 3, "gradient": gradient, "decay": 0.01}
    model = network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, **options)
    sparse.attach(optimizer)
    train(model, optimizer, itertools.islice(batches(), 5))  # in the middle between two refreshes
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": sparse.state_dict()}, file)
    rest = train(model, optimizer, itertools.islice(batches(), 5, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    packed = saved["s"]["masks"]["up.weight"]
    assert (packed.dtype, packed.shape) == (torch.uint8, (32, 4))  # 4 of 2:4 in a byte

    again = network(seed=5)
    resumed = adamw(again)
    other = SparseTraining(again, **options)
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    other.load_state_dict(saved["s"])
    other.attach(resumed)
    assert other.metrics().flip_rate is None
    assert train(again, resumed, itertools.islice(batches(), 5, 8)) == rest
    assert (other.step, other.metrics().refreshes) == (sparse.step, sparse.metrics().refreshes)
    for name, mask in sparse.masks.items():
        assert torch.equal(other.masks[name], mask)


def test_checkpoints_of_the_model_load_both_ways():
    model, plain = network(1), network(2)
    SparseTraining(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.up.weight, model.up.weight)
    assert (plain.up.weight != 0).all()
    model.load_state_dict(network(3).state_dict())
    assert torch.equal(model.up.weight, network(3).up.weight)


def test_masks_made_before_the_weights_are_loaded_follow_them():
    model = network(1)
    optimizer = adamw(model)
    sparse = SparseTraining(model)
    model.load_state_dict(network(2).state_dict(), assign=True)
    optimizer = adamw(model)
    sparse.attach(optimizer)
    expected = nmsolve.transposable_mask(network(2).up.weight.detach().abs(), 2, 4)
    assert torch.equal(sparse.masks["up.weight"], expected)


def test_a_state_that_does_not_fit_changes_nothing():
    state = SparseTraining(network()).state_dict()
    sparse = SparseTraining(network(1))
    masks = sparse.masks
    other = SparseTraining(network(hidden=16)).state_dict()
    bits = copy.deepcopy(state)
    bits["masks"]["down.weight"][3] = 255
    more = copy.deepcopy(state)
    more["masks"]["else.weight"] = more["masks"]["up.weight"]
    for wrong, message in [
        ({}, r"state: expected what state_dict\(\) returned, got \[\]"),
        (3, "got int"),
        ({**state, "version": 2}, "expected version 1, got 2"),
        ({**state, "masks": other["masks"]}, r"up.weight: expected a packed mask of shape \(32, 4\) uint8"),
        (
            {**state, "settings": {**state["settings"], "gradient": "masked"}},
            "expected gradient='straight-thr",
        ),
        (SparseTraining(network(), "4:8").state_dict(), "state: expected patterns=.*'2:4'.*got .*'4:8'"),
        (bits, "state: down.weight: mask: block .* row 3 keeps 4 of 4"),
        (more, "masks of 2 weights, got others .else.weight"),
    ]:
        with pytest.raises(nmsolve.NMSolveError, match=message):
            sparse.load_state_dict(wrong)
        assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks.items())
        assert sparse.step == 0


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("options", [{}, {"transposable": False}])
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "4:8", "3:6"])
def test_masks_in_bytes_come_back(kind, options, pattern):
    layer, _ = layers()[kind]
    sparse = SparseTraining(nn.Sequential(layer), {"0": pattern}, backend="torch", **options)
    (mask,), state = sparse.masks.values(), sparse.state_dict()
    (packed,) = state["masks"].values()
    unit = math.gcd(sparse.patterns["0.weight"].m, 8) if mask.ndim == 2 else 8
    if kind == "gpt2" and options:
        unit = 1
    length = math.prod(mask.shape[2:]) if mask.ndim > 2 else mask.shape[1]
    lead = mask.shape[:2] if mask.ndim > 2 else mask.shape[:1]
    assert (packed.dtype, packed.shape) == (torch.uint8, (*lead, -(-length // unit)))
    line = mask[0, 0].flatten() if mask.ndim > 2 else mask[0]
    first = packed[0, 0, 0] if mask.ndim > 2 else packed[0, 0]
    assert int(first) == sum(int(bit) << k for k, bit in enumerate(line[:unit]))
    other, _ = layers()[kind]
    other.weight.data.mul_(-1).add_(torch.randn_like(other.weight))
    resumed = SparseTraining(nn.Sequential(other), {"0": pattern}, backend="torch", **options)
    assert not torch.equal(resumed.masks["0.weight"], mask)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.masks["0.weight"], mask)


# --- arguments ----------------------------------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def tied_to_embedding() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(16, 16), "lm_head": nn.Linear(16, 16, bias=False)})
    model["lm_head"].weight = model["embed"].weight
    return model


def not_finite() -> nn.Module:
    model = network()
    model.down.weight.data[1, 2] = math.inf
    return model


def partitioned() -> nn.Module:
    """As DeepSpeed's ZeRO-3 leaves a model: parameters without entries."""
    model = network()
    for parameter in model.parameters():
        parameter.ds_id, parameter.data = 0, torch.empty(0)
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (partitioned, {}, "model: up.weight is partitioned by DeepSpeed's ZeRO-3"),
        (network, {"pattern": "5:4"}, "n: expected 0 <= n <= m=4"),
        (network, {"pattern": "2-4"}, "pattern: expected 'N:M'"),
        (network, {"pattern": {"left": "2:4"}}, "pattern: 'left' matches none of the model's 2 layers"),
        (network, {"include": "left"}, "'left' matches none"),
        (network, {"include": ()}, "include: expected at least one glob"),
        (network, {"include": 3}, "include: expected globs of layers, got 3"),
        (network, {"include": "up", "pattern": {"*": "2:4"}}, "include: expected with one pattern"),
        (network, {"dense": ["up", "down"]}, "no layer to prune"),
        (network, {"transposable": 1}, "transposable: expected True or False, got 1"),
        (network, {"refresh": 0}, "refresh: expected a number of steps of at least 1, got 0"),
        (network, {"refresh": 2.0}, "refresh: expected a number of steps of at least 1, got 2.0"),
        (network, {"refresh": lambda step: -step}, r"refresh\(0\): expected .* got 0"),
        (
            network,
            {"gradient": "ste"},
            "gradient: expected one of straight-through, masked, sr-ste, got 'ste'",
        ),
        (network, {"decay": -1}, "decay: expected a number of at least 0, got -1"),
        (network, {"decay": lambda step: math.nan}, r"decay\(0\): expected a number of at least 0, got nan"),
        (
            network,
            {"gradient": "sr-ste"},
            "decay: 'sr-ste' decays pruned weights, got 0.0; its paper takes 2e-4",
        ),
        (network, {"start": -1}, "start: expected a number of steps of at least 0, got -1"),
        (network, {"start": 4, "stop": 4}, "stop: expected None or a step after start=4, got 4"),
        (network, {"backend": "gpu"}, "backend: expected"),
        (lambda: network().requires_grad_(False), {}, "none of the 2 chosen weights requires a gradient"),
        (lambda: nn.Sequential(nn.ReLU()), {}, "model: expected linear layers or convolutions, found none"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), {}, "smaller than one block of 4"),
        (lambda: nn.Sequential(nn.Linear(8, 8, device="meta")), {}, "no weights in memory"),
        (lambda: nn.Sequential(Own(8, 8)), {}, "no layer to mask .Own has a forward of its own"),
        (
            lambda: nn.Sequential(Own(8, 8)),
            {"include": "0"},
            "0 cannot be masked: Own has a forward of its own",
        ),
        (
            lambda: nn.MultiheadAttention(16, 2),
            {"include": "out_proj"},
            "out_proj cannot be masked: nn.MultiheadAttention reads its weight without calling it",
        ),
        (
            tied_to_embedding,
            {"include": "lm_head"},
            "shares its weight with embed, a Embedding, which would read it unmasked",
        ),
        (not_finite, {}, "model: down.weight: expected finite values, got 1 NaN or infinite of 512"),
        (lambda: "folder", {}, "model: expected a torch.nn.Module, got str"),
    ],
)
def test_bad_arguments_change_nothing(model, options, message):
    model = model()
    before = (
        [(module, type(module), list(vars(module))) for module in model.modules()]
        if hasattr(model, "modules")
        else []
    )
    with pytest.raises(nmsolve.NMSolveError, match=message) as raised:
        SparseTraining(model, **options)
    assert "\n" not in str(raised.value)
    for module, kind, names in before:
        assert type(module) is kind
        assert list(vars(module)) == names


def test_masks_that_cannot_be_solved_leave_plain_layers(monkeypatch):
    def fails(*args: object, **options: object) -> None:
        raise nmsolve.BackendError("backend: there is none")

    model = network()
    monkeypatch.setattr("nmsolve.train.solving.transposable_masks", fails)
    with pytest.raises(nmsolve.BackendError, match="there is none"):
        SparseTraining(model)
    assert type(model.up) is nn.Linear
    assert not list(model.buffers())


def test_a_second_sparse_training_is_refused():
    model = network()
    sparse = SparseTraining(model)
    with pytest.raises(nmsolve.NMSolveError, match="it has masks of another SparseTraining"):
        SparseTraining(model)
    sparse.finish()
    SparseTraining(model).finish()


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lambda model: [], "expected one that holds the masked weights, got none with up.weight and 1 more"),
        (lambda model: [torch.optim.SGD([model.up.weight])], "got none with down.weight$"),
        (lambda model: [adamw(network())], "got none with up.weight and 1 more"),
        (lambda model: ["adam"], "optimizer: expected a torch.optim.Optimizer, got str"),
    ],
)
def test_optimizers_that_do_not_fit(optimizers, message):
    model = network()
    sparse = SparseTraining(model)
    with pytest.raises(nmsolve.NMSolveError, match=message):
        sparse.attach(*optimizers(model))
    sparse.attach(adamw(model))
    with pytest.raises(nmsolve.NMSolveError, match="takes all optimizers at once"):
        sparse.attach(adamw(model))


def test_weights_that_run_away_are_named():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse = SparseTraining(model, refresh=1)
    sparse.attach(optimizer)
    masks = sparse.masks
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    with pytest.raises(nmsolve.NMSolveError, match=r"model: up\.weight: expected finite values, got 512 NaN"):
        optimizer.step()
    assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks.items())


def test_a_bad_value_of_a_schedule_names_the_step():
    model = network()
    optimizer = adamw(model)
    SparseTraining(model, refresh=lambda step: 5 - step).attach(optimizer)
    with pytest.raises(
        nmsolve.NMSolveError, match=r"refresh\(5\): expected a number of steps of at least 1, got 0"
    ):
        train(model, optimizer)


@pytest.mark.parametrize("model", [nn.Linear(4, 4), "folder"])
def test_a_model_without_masks_cannot_be_finished(model):
    with pytest.raises(nmsolve.NMSolveError, match="model: expected"):
        finish_model(model)
