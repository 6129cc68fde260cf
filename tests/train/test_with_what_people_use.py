"""SparseTraining with what else is in training loops: each against the same run without it."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from sparse_training import STEPS, batches, by_hand, network, sgd, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import nmsolve.prune
from nmsolve.train import SparseTraining, finish_model


def started(model: nn.Module, optimizer: torch.optim.Optimizer, **options: object) -> SparseTraining:
    sparse = SparseTraining(model, **{"refresh": 2, "decay": 0.05, "backend": "torch", **options})
    sparse.attach(optimizer)
    return sparse


def expected() -> list[float]:
    model = network()
    return by_hand(model, torch.optim.AdamW(model.parameters(), lr=0.02), "straight-through", 0.05, 2)[0]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"lr": torch.tensor(0.02)}])
def test_implementations_of_an_optimizer(options):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 0.02, **options})
    started(model, optimizer)
    assert train(model, optimizer) == pytest.approx(expected(), rel=1e-5)


def test_a_closure():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    started(model, optimizer)
    losses = []
    for x, y in batches():

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses == pytest.approx(expected(), rel=1e-6)


def test_gradient_accumulation_counts_optimizer_steps():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = started(model, optimizer)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        parts = [(model(a) - b).square().mean() / 4 for a, b in zip(x.chunk(4), y.chunk(4), strict=True)]
        for part in parts:
            part.backward()
        optimizer.step()
        losses.append(sum(part.item() for part in parts))
    assert sparse.step == STEPS
    assert losses == pytest.approx(expected(), rel=1e-5)


@pytest.mark.parametrize("gradient", ["straight-through", "masked", "sr-ste"])
def test_clipped_gradients(gradient):
    """The norm is that of the loss's gradient, which decay is added to afterwards."""
    runs = []
    for clip in (0.05, math.inf):
        model = network()
        optimizer = sgd(model)
        started(model, optimizer, gradient=gradient)
        runs.append(train(model, optimizer, clip=clip))
        other = network()
        by_itself = by_hand(other, sgd(other), gradient, 0.05, 2, clip=clip)[0]
        assert runs[-1] == pytest.approx(by_itself, rel=1e-6)
    assert runs[0][-1] != pytest.approx(runs[1][-1], rel=1e-5)


def test_a_scaler_of_gradients():
    for fused in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, fused=fused)
        sparse = started(model, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        losses = []
        for x, y in batches():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert losses == pytest.approx(expected(), rel=1e-5)
        steps, mask = sparse.step, sparse.masks["up.weight"]
        optimizer.zero_grad()
        scaler.scale(model(x).sum() * torch.inf).backward()
        scaler.step(optimizer)  # skipped
        assert sparse.step == steps
        assert torch.equal(sparse.masks["up.weight"], mask)


def test_autocast_takes_masks_from_the_float32_weights():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = started(model, optimizer, refresh=1)
    seen = []
    for x, y in batches():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
        wanted = nmsolve.transposable_mask(model.up.weight.detach().abs(), 2, 4, backend="torch")
        assert torch.equal(sparse.masks["up.weight"], wanted)
    assert model.up.weight.dtype == torch.float32
    assert seen[-1] < seen[0] * 1.5


def test_two_optimizers_make_one_step():
    model = network()
    up = torch.optim.AdamW([*model.up.parameters(), *model.norm.parameters()], lr=0.02)
    down = torch.optim.AdamW(model.down.parameters(), lr=0.02)
    sparse = SparseTraining(model, refresh=2, decay=0.05, backend="torch")
    sparse.attach(up, down)
    losses = []
    for x, y in batches():
        model.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        up.step()
        down.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected(), rel=1e-6)
    assert (sparse.step, sparse.metrics().refreshes) == (STEPS, STEPS // 2)


def test_activation_checkpointing():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    started(model, optimizer)
    losses = []
    for x, y in batches():
        optimizer.zero_grad()
        loss = (checkpoint(model, x, use_reentrant=False) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(expected(), rel=1e-6)


@pytest.mark.parametrize("order", ["compiled first", "masked first"])
@pytest.mark.parametrize("gradient", ["straight-through", "masked"])
def test_a_compiled_model_has_one_graph_over_refreshes(order, gradient):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, eager = network(), network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    options = {"refresh": 1, "stop": STEPS - 1, "gradient": gradient}
    if order == "compiled first":
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        sparse = started(compiled, optimizer, **options)
    else:
        sparse = started(model, optimizer, **options)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
    other = torch.optim.AdamW(eager.parameters(), lr=0.02)
    started(eager, other, **options)
    assert train(compiled, optimizer) == pytest.approx(train(eager, other), rel=1e-5)
    assert counter.frame_count == 1
    assert sparse.phase == "dense"  # the dense end is the same graph, too


def test_an_average_of_the_model_has_the_pattern():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = started(model, optimizer, refresh=1)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, optimizer, after=lambda: average.update_parameters(model))
    exported = copy.deepcopy(average.module)
    assert finish_model(exported) == ["up.weight", "down.weight"]
    assert torch.equal(exported.up.weight != 0, sparse.masks["up.weight"])
    x = torch.randn(4, 16)
    torch.testing.assert_close(average(x), exported(x))


def test_a_copy_has_masks_of_its_own():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    started(model, optimizer, refresh=1)
    x = torch.randn(4, 16)
    before, twin = model(x), copy.deepcopy(model)
    train(model, optimizer)
    assert torch.equal(twin(x), before)
    assert not torch.equal(model(x), before)


def test_functional_calls():
    model = network()
    SparseTraining(model, backend="torch")
    x = torch.randn(4, 16)

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    found = torch.func.grad(loss)({name: p.detach() for name, p in model.named_parameters()})
    model(x).square().mean().backward()
    torch.testing.assert_close(found["up.weight"], model.up.weight.grad)
    assert (model.up.weight.grad != 0).all()
    batched = torch.func.vmap(model)(x[:, None])
    torch.testing.assert_close(batched[:, 0], model(x))


def test_tied_layers_share_their_mask():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = started(model, optimizer, refresh=1)
    assert (list(sparse.patterns), sparse.skipped) == (["a.weight"], {})
    train(model, optimizer)
    x = torch.randn(4, 16)
    masked = model.a.weight * sparse.masks["a.weight"]
    wanted = torch.tanh(x @ masked.T + model.a.bias) @ masked.T + model.b.bias
    torch.testing.assert_close(model(x), wanted)
    sparse.finish()
    assert model.a.weight is model.b.weight
    torch.testing.assert_close(model(x), wanted)


def test_transformer_encoder_layers_do_not_bypass_their_masks():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    sparse = SparseTraining(layer, backend="torch")
    assert list(sparse.patterns) == ["linear1.weight", "linear2.weight"]
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        found = layer(x)
        sparse.finish()
        torch.testing.assert_close(layer(x), found)


@pytest.mark.parametrize("finished", [False, True])
def test_merging_an_adapter_keeps_the_mask(finished):
    peft = pytest.importorskip("peft")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = started(model, optimizer)
    train(model, optimizer, itertools.islice(batches(), 4))
    sparse.freeze()
    masks = sparse.masks
    fixed = nmsolve.prune.FixedMasks(model, sparse.finish()) if finished else None
    base, x = model.up.weight.detach().clone(), torch.randn(4, 16)
    before = model(x)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up", "down"]))
    torch.testing.assert_close(adapted(x), before)  # the adapted layers see masked weights, and B is 0
    adapters = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    losses = train(adapted, adapters, itertools.repeat(next(batches()), 8))
    assert losses[-1] < losses[0]
    layer = adapted.base_model.model.up
    delta = layer.get_delta_weight("default").detach()
    merged = adapted.merge_and_unload()
    if finished:
        assert fixed.operands("2:4")[0].stray > 0  # what peft does to plain layers
        fixed.apply()
    else:
        sparse.finish()
    for name, mask in masks.items():
        assert torch.equal(merged.get_parameter(name) != 0, mask)
        nmsolve.check_mask(mask, 2, 4)
    torch.testing.assert_close(merged.up.weight, (base + delta) * masks["up.weight"])
