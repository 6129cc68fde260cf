"""Learned permutations: the module, the training loop, and what they are worth on a tiny model."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

import nmsolve
from nmsolve import NMPattern, NMSolveError
from nmsolve.permute import (
    LearnableChannelPermutation,
    calibration_scores,
    find_couplings,
    learn_permutation,
    retained_score,
    ria_permutation,
)
from nmsolve.permute.module import STRATEGIES, Strategy

WIDTH = 32


class Blocks(nn.Module):
    """Two residual MLPs, with the names that a Llama's layers have, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 50)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.up_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.mlp.gate_proj = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.mlp.down_proj = nn.Linear(2 * WIDTH, WIDTH, bias=False)
        with torch.no_grad():  # neighbours of one size, as real channels have: order matters
            self.mlp.down_proj.weight *= (torch.arange(2 * WIDTH) // 8 % 2 * 3.0 + 0.3).repeat(1)

    def forward(self, x):
        return x + self.mlp.down_proj(self.mlp.up_proj(x) * nn.functional.silu(self.mlp.gate_proj(x)))


def batches(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 50, (2, 16), generator=generator) for _ in range(count)]


def test_the_type_names_every_strategy():
    assert get_args(Strategy) == tuple(STRATEGIES)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_module_starts_at_the_identity_and_its_plans_are_doubly_stochastic(strategy):
    module = LearnableChannelPermutation(48, strategy=strategy, heads=2, seed=3)
    assert torch.equal(module.permutation(), torch.arange(48).expand(2, 48))
    for temperature in module.constants.temperature:
        module.temperature = temperature
        plan = module.plan().detach()
        assert (plan.sum(-2) - 1).abs().max() < 1e-4
        assert (plan.sum(-1) - 1).abs().max() < 0.1
        assert torch.equal(module.hard().argmax(-1), torch.arange(module.block).expand(len(plan), -1))


def test_module_takes_the_order_that_its_logits_say():
    module = LearnableChannelPermutation(16, block=8, heads=2)
    orders = torch.stack([torch.randperm(8) for _ in range(4)])
    with torch.no_grad():
        module.logits.copy_(nn.functional.one_hot(orders, 8))
    expected = (orders.view(2, 2, 8) + torch.tensor([0, 8]).view(1, 2, 1)).flatten(1)
    assert torch.equal(module.permutation(), expected)
    matrix = torch.randn(5, 2 * 3 * 16)  # heads, repeats, channels
    moved = module.reorder(matrix, module.hard())
    split = matrix.view(5, 2, 3, 16)
    for head in range(2):
        assert torch.equal(moved.view(5, 2, 3, 16)[:, head], split[:, head][..., expected[head]])
    assert torch.equal(module.reorder(moved, module.hard(), back=True), matrix)


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_pruned_weight_of_a_hard_plan_is_the_masked_weight_in_its_own_order(strategy, transposable):
    torch.manual_seed(0)
    module = LearnableChannelPermutation(16, block=8, strategy=strategy)
    with torch.no_grad():
        module.logits.copy_(nn.functional.one_hot(torch.stack([torch.randperm(8) for _ in range(2)]), 8))
    order = module.permutation()
    weight, scores = torch.randn(8, 16), torch.rand(8, 16)
    pruned = module.masked(weight, scores, module.hard(), NMPattern(2, 4), transposable)
    solve = nmsolve.transposable_mask if transposable else nmsolve.nm_mask
    expected = (weight[:, order] * solve(scores[:, order], 2, 4))[:, order.argsort()]
    assert torch.allclose(pruned, expected, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_reach_the_logits(strategy):
    module = LearnableChannelPermutation(16, block=8, strategy=strategy)
    weight, scores = torch.randn(8, 16), torch.rand(8, 16)
    module.masked(weight, scores, module(), NMPattern(2, 4), False).square().sum().backward()
    assert module.logits.grad is not None
    assert module.logits.grad.abs().max() > 0


@pytest.mark.parametrize("columns", [16, 18])
def test_the_straight_through_gradient_is_that_of_the_plan_in_the_hard_ones_place(columns):
    torch.manual_seed(0)
    module = LearnableChannelPermutation(columns, block=columns // 2, heads=2).double()
    weight, scores = (torch.rand(8, 4 * columns, dtype=torch.float64) for _ in range(2))
    pull = torch.randn(8, 4 * columns, dtype=torch.float64)
    plans = [module().detach().requires_grad_(True) for _ in range(2)]
    weights = [weight.clone().requires_grad_(True) for _ in range(2)]
    (module.masked(weights[0], scores, plans[0], NMPattern(2, 4), False) * pull).sum().backward()
    ordered = module.reorder(scores, plans[1])
    mask = nmsolve.nm_mask(ordered.detach(), 2, 4).double()
    groups = ordered[:, : 4 * columns // 4 * 4].unflatten(1, (-1, 4))
    spread = groups.detach().var(-1, correction=0).mean().sqrt()
    soft = nn.functional.pad(2 * (groups / spread).softmax(-1).flatten(1), (0, 4 * columns % 4))
    pruned = weights[1] * module.reorder(mask + soft - soft.detach(), plans[1], back=True)
    (pruned * pull).sum().backward()
    assert torch.allclose(plans[0].grad, plans[1].grad, atol=1e-9)
    assert torch.allclose(weights[0].grad, weights[1].grad, atol=1e-9)


def natural(model: nn.Module) -> dict[str, torch.Tensor]:
    return {c.name: torch.arange(c.size) for c in find_couplings(model)}


def distance(reference: nn.Module):
    """A task: the dense model's outputs."""
    return lambda output, batch: (output - reference(batch).detach()).square().mean()


@pytest.mark.parametrize(("strategy", "rate"), [("permllm", 0.1), ("cost-matrix", 0.3)])
def test_learning_lowers_the_held_out_loss_and_leaves_the_model_alone(strategy, rate):
    model = Blocks().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = learn_permutation(
        model,
        batches(8),
        2,
        4,
        strategy=strategy,
        start=natural(model),
        steps=20,
        check_every=5,
        patience=9,
        learning_rate=rate,
        task_loss=distance(Blocks()) if strategy == "cost-matrix" else None,
    )
    assert [row["step"] for row in found.history] == [0, 5, 10, 15, 20]
    first = found.history[0]["held_out"]
    best = min(row["held_out"] for row in found.history)
    assert best < first
    assert found.history[[0, 5, 10, 15, 20].index(found.best_step)]["held_out"] == best
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert {name for name, _ in model.named_parameters()} == set(before)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    for coupling in find_couplings(model):
        order = found.permutations[coupling.name]
        assert torch.equal(order.sort(-1).values, torch.arange(coupling.size).expand(coupling.shape))


def test_same_seed_same_permutations_and_resuming_changes_nothing(tmp_path):
    loss = distance(Blocks())
    calls = 0

    def interrupted(output, batch):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt
        return loss(output, batch)

    def learn(task, **options):
        return learn_permutation(
            Blocks(),
            batches(),
            2,
            4,
            strategy="cost-matrix",
            steps=8,
            check_every=2,
            patience=9,
            learning_rate=0.1,
            task_loss=task,
            **options,
        )

    whole, again = learn(loss), learn(loss)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(interrupted, resume=path)
    assert path.exists()
    resumed = learn(loss, resume=path)
    for other in (again, resumed):
        assert other.history == whole.history
        for name, order in whole.permutations.items():
            assert torch.equal(other.permutations[name], order)
    with pytest.raises(NMSolveError, match="another run"):
        learn_permutation(Blocks(), batches(), 1, 4, resume=path)


def test_a_floor_is_kept():
    model = Blocks()
    names = [site.tensor for c in find_couplings(model) for site in c.consumers]
    scores = calibration_scores(model, batches(8), names)

    def learn(rate, **options):
        return learn_permutation(
            model, batches(8), 2, 4, scores=scores, steps=6, check_every=2, learning_rate=rate, **options
        )

    free = learn(1.0)
    best = {c.name: ria_permutation(c.scores(scores), 2, 4) for c in find_couplings(model)}
    bound = learn(1.0, floor=best)
    lowest = free.history[0]["kept"]
    assert free.history[-1]["kept"] < lowest
    assert all(row["kept"] >= lowest for row in bound.history)
    total = sum(float(scores[name].double().sum()) for name in names)
    for found in (free, bound):
        kept = sum(
            float(retained_score(c.scores(scores), 2, 4, found.permutations[c.name]))
            for c in find_couplings(model)
        )
        (row,) = (row for row in found.history if row["step"] == found.best_step)
        assert row["kept"] == pytest.approx(kept / total, rel=1e-6)
    with pytest.raises(NMSolveError, match="start keeps"):
        learn(1.0, start=natural(model), floor=best)
    with pytest.raises(NMSolveError, match="has none"):
        learn(1.0, floor={})


def test_early_stopping():
    found = learn_permutation(
        Blocks(), batches(), 2, 4, steps=100, check_every=1, patience=2, learning_rate=1e-9
    )
    assert found.best_step == 0
    assert [row["step"] for row in found.history] == [0, 1, 2]


def test_calibration_scores():
    model = Blocks()
    names = ["layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"]
    scores = calibration_scores(model, batches(), names)
    with torch.no_grad():
        x = torch.cat([model.embed(b) for b in batches()]).flatten(0, 1)
    up = model.layers[0].mlp.up_proj.weight
    assert torch.allclose(scores[names[0]], up.abs() * x.square().sum(0).sqrt(), rtol=1e-5)
    assert scores[names[1]].shape == model.layers[0].mlp.down_proj.weight.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "other"}, "strategy"),
        ({"held_out": 0.0}, "held_out"),
        ({"steps": -1}, "steps"),
        ({"couplings": []}, "couplings"),
        ({"calibration": batches(1)}, "two batches"),
        ({"start": {"layers.0.mlp.down_proj": torch.arange(3)}}, "start"),
    ],
)
def test_mistaken_arguments(options, message):
    options = {"calibration": batches(), "steps": 0, **options}
    with pytest.raises(NMSolveError, match=message):
        learn_permutation(Blocks(), options.pop("calibration"), 2, 4, **options)
