"""SparseTraining given what it cannot work with: one clear error, and nothing changed."""

from __future__ import annotations

import math

import pytest
import torch
from sparse_training import adamw, network, train
from torch import nn

import nmsolve
from nmsolve.train import SparseTraining, finish_model


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


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("transposable", [True, False])
def test_weights_that_run_away_are_named(value, transposable):
    """A single one as well: an infinite magnitude is no wish to keep it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sparse = SparseTraining(model, refresh=1, transposable=transposable)
    sparse.attach(optimizer)
    masks = sparse.masks
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.up.weight.grad[3, 5] = value
    with pytest.raises(nmsolve.NMSolveError, match=r"model: up\.weight: expected finite values, got 1 NaN"):
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
