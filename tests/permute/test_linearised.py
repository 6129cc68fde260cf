"""Learning by moves: values of columns, the gradient against differences of the loss, and what is learned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import nmsolve
from nmsolve import NMPattern, NMSolveError
from nmsolve.backends import shared
from nmsolve.backends.cpu import permutations as numba
from nmsolve.permute import find_couplings, learn_permutation, retained_score
from nmsolve.permute.heuristics import search_pass
from nmsolve.permute.insertions import Insertions
from nmsolve.permute.masked_weights import MaskedModel
from nmsolve.permute.strategies import LEARNING_STRATEGIES
from nmsolve.permute.windows import groups_of

WIDTH = 16


class Attention(nn.Module):
    """Four heads of queries that share two of keys and values, with the names of a Llama's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(32, 32, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(32, 16, bias=False) for _ in range(2))

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
            for layer in (self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Config:
    """What a model of transformers says of itself."""

    def to_dict(self):
        return {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}


class Net(nn.Module):
    """A block with an attention and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.config = Config()
        self.embed = nn.Embedding(40, 32)
        self.self_attn = Attention()
        self.mlp = nn.Module()
        self.mlp.up_proj, self.mlp.gate_proj = (nn.Linear(32, 48, bias=False) for _ in range(2))
        self.mlp.down_proj = nn.Linear(48, 32, bias=False)
        self.head = nn.Linear(32, 40)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.self_attn(x)
        hidden = self.mlp.up_proj(x) * nn.functional.silu(self.mlp.gate_proj(x))
        return self.head(x + self.mlp.down_proj(hidden))


def trained() -> Net:
    """Fitted to a chain of tokens, so that pruning costs something."""
    model = Net()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        batch = batches(1, seed=step)[0]
        logits = model(batch)[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model


def batches(count: int, seed: int = 1000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        tokens = [torch.randint(0, 40, (8, 1), generator=generator)]
        for _ in range(15):
            tokens.append((3 * tokens[-1] + torch.randint(0, 3, (8, 1), generator=generator)) % 40)
        found.append(torch.cat(tokens, 1))
    return found


@pytest.fixture(scope="module")
def model() -> Net:
    return trained()


def linear(model: nn.Module):
    return [c for c in find_couplings(model) if c.size % 4 == 0]


def natural(model: nn.Module) -> dict[str, torch.Tensor]:
    return {c.name: torch.arange(c.size).expand(c.shape).contiguous() for c in linear(model)}


def magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        s.tensor: model.get_parameter(s.tensor).detach().abs() for c in linear(model) for s in c.consumers
    }


@pytest.mark.parametrize("module", [shared, numba], ids=["torch", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gains_are_those_of_a_loop_over_rows(module, dtype):
    torch.manual_seed(0)
    columns = torch.randint(0, 4, (11, 32)).to(dtype)  # many ties
    values = torch.randint(-9, 9, (11, 32)).to(dtype)
    groups, moved = torch.stack([torch.randperm(11) for _ in range(6)]).view(2, 3, 11)[..., :3], None
    moved = torch.randint(0, 11, (2, 5))
    least, held = module.nth_largest_of(columns, values, groups.flatten(0, 1).contiguous(), 2)
    gains = module.sum_gains(least.view(2, 3, 32), held.view(2, 3, 32), columns, values, moved.contiguous())
    for b, g, i in itertools.product(range(2), range(3), range(5)):
        expected = 0.0
        for r in range(32):
            ordered = sorted(groups[b, g].tolist(), key=lambda c: -float(columns[c, r]))  # stable
            second = ordered[1]
            assert float(least[3 * b + g, r]) == float(columns[second, r])
            assert float(held[3 * b + g, r]) == float(values[second, r])
            if columns[moved[b, i], r] > columns[second, r]:
                expected += float(values[moved[b, i], r] - values[second, r])
        assert float(gains[b, g, i]) == expected


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)])
def test_a_pass_gains_what_it_says_in_the_values_of_kept_entries(pattern):
    torch.manual_seed(0)
    scores, values = torch.rand(40, 48), torch.randn(40, 48, dtype=torch.float64).float()
    order = torch.randperm(48)

    def kept(order):
        mask = nmsolve.nm_mask(scores[:, order], pattern.n, pattern.m)
        return float((values[:, order] * mask).sum(dtype=torch.float64))

    weighed = Insertions(scores, pattern).weighed(values)
    groups = groups_of(order, pattern.m)
    found, gain = search_pass(weighed, groups, range(pattern.m), 100, torch.Generator().manual_seed(0))
    assert gain > 0
    assert kept(found.flatten()) - kept(order) == pytest.approx(gain, abs=1e-4)


def test_the_first_order_is_the_slope_of_the_loss_in_every_entry(model):
    """Float64 differences of the loss between a weight a little kept and a little less."""
    model = trained().double()
    couplings, batch = linear(model), batches(1)[0]
    scores = {name: score.float() for name, score in magnitudes(model).items()}
    orders = [natural(model)[c.name] for c in couplings]
    masked = MaskedModel(model, couplings, orders, scores, NMPattern(2, 4), [100] * len(couplings))

    def loss():
        return nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    model.requires_grad_(False)
    with masked.installed():
        with masked.watched(1.0):
            loss().backward()
        generator = torch.Generator().manual_seed(0)
        for weight in masked.weights():
            slope = weight.first_order()
            for _ in range(4):
                r, c = (int(torch.randint(0, size, (1,), generator=generator)) for size in slope.shape)
                found = []
                for change in (1e-5, -1e-5):
                    with torch.no_grad():
                        weight.pruned[r, c] += change * weight.dense[r, c]
                        found.append(float(loss()))
                        weight.pruned[r, c] -= change * weight.dense[r, c]
                assert (found[1] - found[0]) / 2e-5 == pytest.approx(float(slope[r, c]), rel=1e-4, abs=1e-9)


def test_small_moves_lower_the_loss_by_what_they_promise(model):
    couplings, batch = linear(model), torch.cat(batches(8))
    orders = [natural(model)[c.name] for c in couplings]
    masked = MaskedModel(model, couplings, orders, magnitudes(model), NMPattern(2, 4), [100] * len(couplings))

    def loss():
        return nn.functional.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    with masked.installed():
        with masked.watched(1.0):
            before = loss()
            before.backward()
        promised = kept = 0.0
        for part in masked.parts:
            one, least = part.order, float(before.detach())
            for damping in (100.0, 30.0, 10.0, 3.0, 1.0):
                order, fall = masked.better(part, damping, torch.Generator().manual_seed(0))
                if fall <= 0:
                    continue
                masked.reorder(part, order)
                promised, kept = promised + fall, kept + least - float(loss().detach())
                masked.reorder(part, one)
                break
    assert promised > 0
    assert 0.3 * promised < kept < 1.7 * promised


def test_moves_stay_inside_heads(model):
    coupling = next(c for c in linear(model) if c.heads == 2)
    masked = MaskedModel(
        model, [coupling], [natural(model)[coupling.name]], magnitudes(model), NMPattern(2, 4), [100]
    )
    part = masked.parts[0]
    with masked.installed():
        for weight in masked.weights():
            weight.pruned.grad.copy_(torch.randn_like(weight.pruned))
        order, fall = masked.better(part, 0.0, torch.Generator().manual_seed(0))
    assert fall > 0
    assert order.shape == (2, 8)
    assert torch.equal(order.sort(-1).values, torch.arange(8).expand(2, 8))
    assert not torch.equal(order, part.order)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_learning_lowers_the_loss_of_text_that_it_has_not_seen(model, pattern):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = learn_permutation(
        model.train(), batches(16), pattern, strategy="frank-wolfe", start=natural(model), steps=20,
        check_every=5, patience=9,
    )  # fmt: skip
    held = [row["held_out"] for row in found.history]
    assert [row["step"] for row in found.history] == [0, 5, 10, 15, 20]
    assert min(held) < held[0] - 0.05
    assert found.best_step == 5 * held.index(min(held))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])
        assert parameter is dict(model.named_parameters())[name]
    for coupling in linear(model):
        order = found.permutations[coupling.name]
        assert order.shape == coupling.shape
        assert torch.equal(order.sort(-1).values, torch.arange(coupling.size).expand(coupling.shape))
    # The kept share is that of the orders.
    of = NMPattern.parse(pattern)
    tensors = [s.tensor for c in linear(model) for s in c.consumers]
    scores = nmsolve.permute.calibration_scores(model, batches(16)[:12], tensors)
    kept = sum(
        float(retained_score(c.scores(scores), of.n, of.m, found.permutations[c.name]).sum())
        for c in linear(model)
    )
    share = kept / sum(float(score.double().sum()) for score in scores.values())
    assert found.history[found.best_step // 5]["kept"] == pytest.approx(share, rel=1e-4)


def test_a_second_run_and_one_that_was_stopped_learn_the_same(model, tmp_path):
    path = tmp_path / "state.safetensors"

    def learn(loss=None, **options):
        return learn_permutation(
            model, batches(8), 2, 4, strategy="frank-wolfe", start=natural(model), steps=8, check_every=2,
            patience=9, task_loss=loss, **options,
        )  # fmt: skip

    calls = 0

    def stopped(logits, batch):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    whole, again = learn(), learn()
    dense = dict(model.named_parameters())
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, resume=path)
    assert all(parameter is dense[name] for name, parameter in model.named_parameters())
    resumed = learn(resume=path)
    for other in (again, resumed):
        assert other.history == whole.history
        assert all(torch.equal(other.permutations[name], p) for name, p in whole.permutations.items())
    with pytest.raises(NMSolveError, match="another run"):
        learn(resume=path, block_size=16)


def test_the_distance_to_the_dense_model_can_be_part_of_the_loss(model):
    found = [
        learn_permutation(
            model,
            batches(8),
            2,
            4,
            strategy="frank-wolfe",
            start=natural(model),
            steps=4,
            check_every=2,
            distillation=distillation,
        )
        for distillation in (0.0, 100.0)
    ]
    assert found[0].history[0] == found[1].history[0]
    assert found[0].history[1]["loss"] < found[1].history[1]["loss"]


def test_a_loss_that_does_not_reach_a_layer_leaves_its_order(model):
    found = learn_permutation(
        model, batches(8), 2, 4, strategy="frank-wolfe", start=natural(model), steps=3, check_every=1,
        task_loss=lambda output, batch: output.sum() * 0,
    )  # fmt: skip
    assert found.best_step == 0
    assert all(torch.equal(found.permutations[name], order) for name, order in natural(model).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transposable": True}, "transposable"),
        ({"floor": {}}, "floor"),
        ({"block_size": 7}, "window"),
        ({"groups": 7}, "groups: expected a divisor"),
        ({"groups": 2, "block_size": 16}, "expected one of them"),
        ({"strategy": "permllm", "block_size": 5}, "block_size: expected a divisor"),
    ],
)
def test_mistaken_arguments(model, options, message):
    options = {"strategy": "frank-wolfe", "steps": 0, **options}
    with pytest.raises(NMSolveError, match=message):
        learn_permutation(model, batches(2), 2, 4, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strategy", LEARNING_STRATEGIES)
def test_models_of_any_dtype_learn(strategy, dtype):
    model = trained().to(dtype)
    start = natural(model)
    found = learn_permutation(
        model, batches(6), 2, 4, strategy=strategy, start=start, steps=4, check_every=2, patience=9
    )
    assert len(found.history) == 3
    assert all(math.isfinite(row["held_out"]) for row in found.history)
    assert all(parameter.dtype == dtype for parameter in model.parameters())


def test_layers_that_are_stored_the_other_way_round():
    """GPT-2's Conv1D, whose weights are (in, out)."""
    zoo = pytest.importorskip("zoo")
    model = zoo.build("gpt2")
    tokens = [torch.randint(0, model.config.vocab_size, (4, 16)) for _ in range(6)]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = learn_permutation(model, tokens, 2, 4, strategy="frank-wolfe", steps=4, check_every=1, patience=9)
    assert len({row["kept"] for row in found.history}) > 1  # something moved
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("options", [{"block_size": 16}, {"groups": 2}])
@pytest.mark.parametrize("strategy", ["permllm", "cost-matrix"])
def test_channels_stay_in_their_blocks(model, strategy, options):
    coupling = next(c for c in linear(model) if c.name == "mlp.down_proj")
    found = learn_permutation(
        model, batches(4), 2, 4, strategy=strategy, couplings=[coupling], start=natural(model), steps=3,
        check_every=1, learning_rate=3.0, patience=9, **options,
    )  # fmt: skip
    size = options.get("block_size", 24)
    order = found.permutations["mlp.down_proj"]
    assert torch.equal(order // size, torch.arange(48) // size)
