"""Sparse operands: their packing by torch's conversions on the CPU, the products and times on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from sparse_training import STEPS, batches
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

import nmsolve
from nmsolve.train import SparseTraining, finish_model, sparse24

CALLS: list[torch.Size] = []
ENDS = ["inlet", "outlet"]


@sparse24.sparse24_product.register_kernel("cpu")
def packed_and_unpacked(dense: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    """The product as torch's compression to the hardware's format has it, in dense arithmetic."""
    back = through_the_format(operand)
    assert torch.equal(back, operand)  # nothing is lost: it was 2:4
    CALLS.append(operand.shape)
    return dense @ back.T


def through_the_format(operand: torch.Tensor) -> torch.Tensor:
    kept, meta = conversions.sparse_semi_structured_from_dense_cutlass(operand.contiguous())
    assert kept.shape == (operand.shape[0], operand.shape[1] // 2)
    return conversions.sparse_semi_structured_to_dense_cutlass(kept, meta)


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that passes for a device with sparse tensor cores, on which sparse products are faster."""
    monkeypatch.setattr(sparse24, "_has_sparse_cores", lambda device: True)
    monkeypatch.setattr(sparse24, "TOKENS", 32)
    times = {sparse24.sparse24_product: 1.0, nn.functional.linear: 2.0}
    monkeypatch.setattr(sparse24, "_milliseconds", lambda step, product, device: times[product])
    sparse24._times.cache_clear()
    yield
    sparse24._times.cache_clear()
    CALLS.clear()


class Wide(nn.Module):
    """``(B, 16) -> (B, 16)`` through two masked layers of sizes that the format takes, and two ends."""

    def __init__(self) -> None:
        super().__init__()
        self.inlet, self.outlet = nn.Linear(16, 64), nn.Linear(64, 16)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.inlet(x)[:, None])  # (B, 1, 64): more than two dimensions
        return self.outlet(self.down(torch.tanh(hidden)))[:, 0]


def wide(dtype: torch.dtype = torch.float32) -> Wide:
    torch.manual_seed(0)
    return Wide().to(dtype)


def masked(model: nn.Module, **options: object) -> SparseTraining:
    sparse = SparseTraining(model, "2:4", **{"dense": ENDS, "backend": "torch", **options})
    CALLS.clear()  # those of the trial
    return sparse


def run(
    model: nn.Module, called: nn.Module | None = None, autocast: bool = False, **options: object
) -> tuple[list[float], SparseTraining, list[int]]:
    """Losses, what trained, and how many sparse products each step had."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = masked(model, **{"refresh": 1, **options})
    sparse.attach(optimizer)
    losses, counts, dtype = [], [], model.up.weight.dtype
    for x, y in batches():
        before = len(CALLS)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = (model if called is None else called)(x.to(dtype))
        loss = (out - y).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        counts.append(len(CALLS) - before)
    return losses, sparse, counts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_transposable_mask_makes_both_packings(dtype):
    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    operand = weight * nmsolve.transposable_mask(weight.float().abs(), 2, 4, backend="torch")
    assert torch.equal(through_the_format(operand), operand)
    assert torch.equal(through_the_format(operand.T), operand.T)
    ordinary = weight * nmsolve.nm_mask(weight.float().abs(), 2, 4, backend="torch")
    assert torch.equal(through_the_format(ordinary), ordinary)
    assert not torch.equal(through_the_format(ordinary.T), ordinary.T)  # what the exact mask is for


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("operands", ["sparse24", "auto"])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_a_run_is_that_of_dense_operands(operands, dtype, autocast):
    expected, _, none = run(wide(dtype), autocast=autocast)
    model = wide(dtype)
    losses, sparse, counts = run(model, autocast=autocast, operands=operands)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert len(set(losses)) == STEPS
    assert (set(none), set(counts)) == ({0}, {4})  # two products of each of two layers
    assert {(layer.operands, layer.reason) for layer in sparse.metrics().layers} == {("sparse24", "")}
    assert (model.up.weight.grad != 0).float().mean() > 0.9  # straight through: dense
    keys = set(vars(model.up))
    masks = sparse.finish()
    assert keys - set(vars(model.up)) == {"nmsolve_straight_through", "nmsolve_sparse"}
    assert torch.equal(model.up.weight != 0, masks["up.weight"])


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("gradient", ["straight-through", "masked"])
def test_gradients_are_those_of_dense_operands(gradient):
    grads = {}
    for operands in ("dense", "sparse24"):
        model = wide(torch.bfloat16)
        sparse = masked(model, operands=operands, gradient=gradient)
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        model(x).float().square().sum().backward()
        grads[operands] = [x.grad, *(p.grad for p in model.parameters())]
        outside = model.down.weight.grad[~sparse.masks["down.weight"]]
        assert bool(outside.any()) == (gradient == "straight-through")
    for found, expected in zip(grads["sparse24"], grads["dense"], strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.usefixtures("cores")
def test_whole_weights_have_dense_operands():
    _, sparse, counts = run(wide(torch.bfloat16), operands="sparse24", start=2, stop=5)
    assert counts == [0, 0, 4, 4, 4, 0, 0, 0]
    assert sparse.metrics().layers[0].operands == "sparse24"
    model, x = wide(torch.bfloat16), torch.ones(2, 16).bfloat16()
    sparse = masked(model, operands="sparse24")
    state = sparse.state_dict()
    sparse.dense()
    model(x)
    assert not CALLS
    sparse.load_state_dict(state)
    model(x)
    assert len(CALLS) == 2


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_compiled_model_has_one_graph_over_refreshes(autocast):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    dtype = torch.float32 if autocast else torch.bfloat16
    model = wide(dtype)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    losses, _, counts = run(model, compiled, autocast=autocast, operands="sparse24")
    assert losses == pytest.approx(run(wide(dtype), autocast=autocast)[0], rel=1e-2)
    assert counts == [4] * STEPS
    assert counter.frame_count == 1


@pytest.mark.usefixtures("cores")
def test_products_in_float32():
    model = wide()
    sparse = masked(model, operands="sparse24")
    with pytest.raises(nmsolve.NMSolveError, match=r"float16 or bfloat16, .* a product in torch\.float32"):
        model(torch.ones(2, 16))
    sparse.finish()
    assert run(wide(), operands="auto")[2] == [0] * STEPS  # no autocast: dense


@pytest.mark.usefixtures("cores")
def test_copies_have_dense_operands():
    model, x = wide(torch.bfloat16), torch.ones(2, 16).bfloat16()
    sparse = masked(model, operands="sparse24")
    expected, twin = model(x), copy.deepcopy(model)
    assert len(CALLS) == 2
    torch.testing.assert_close(twin(x), expected, rtol=0.05, atol=0.05)
    assert len(CALLS) == 2
    finish_model(twin)
    assert torch.equal(twin.up.weight != 0, sparse.masks["up.weight"])


@pytest.mark.usefixtures("cores")
def test_no_rows():
    model = wide(torch.bfloat16)
    masked(model, operands="sparse24")
    x = torch.ones(0, 16).bfloat16().requires_grad_()
    model(x).sum().backward()
    assert x.grad.shape == (0, 16)
    assert not model.up.weight.grad.any()


@pytest.mark.usefixtures("cores")
def test_auto_keeps_what_is_faster_and_what_torch_refuses(monkeypatch):
    asked = []

    def measured(step, product, device):
        step(product)
        asked.append(product)
        return 3.0 if product is sparse24.sparse24_product else 2.0

    monkeypatch.setattr(sparse24, "_milliseconds", measured)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(20, 64)).bfloat16()
    sparse = SparseTraining(model, operands="auto")
    first, second, odd = sparse.metrics().layers
    assert (first.operands, first.reason) == ("dense", "128 x 64 on 4096 tokens took 2 ms dense, 3 ms sparse")
    assert second.reason == first.reason
    assert len(asked) == 2  # both products, once for a shape
    assert odd.operands == "dense"
    assert odd.reason.startswith("torch has no sparse product for 64 x 20 here (")


def test_a_cpu_keeps_dense_operands_and_says_so():
    for options, reason in ({"operands": "auto"}, "no sparse tensor cores"), ({}, "asked for"):
        layers = SparseTraining(wide(torch.bfloat16), **options).metrics().layers
        assert {(layer.operands, layer.reason) for layer in layers} == {("dense", reason)}


def gpt2() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(64, 64))


@pytest.mark.usefixtures("cores")
@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        (wide, {"pattern": "4:8"}, "inlet.weight: 4:8 is not 2:4"),
        (wide, {"transposable": False}, "inlet.weight: ordinary masks are 2:4 along the input alone"),
        (lambda: wide(torch.float64), {}, "inlet.weight: no sparse products in torch.float64"),
        (lambda: nn.Sequential(nn.Conv2d(64, 64, 1)), {}, "0.weight: a Conv2d has no sparse product"),
        (gpt2, {}, "0.weight: a Conv1D has no sparse product"),
        (lambda: nn.Sequential(nn.Linear(20, 64)), {}, "0.weight: torch has no sparse product for 64 x 20"),
    ],
)
def test_what_cannot_be_sparse_is_refused_or_stays_dense(model, options, reason):
    made = model()
    with pytest.raises(nmsolve.NMSolveError, match=f"'sparse24' is not possible for {reason}.*'auto' keeps"):
        SparseTraining(made, operands="sparse24", **options)
    assert not any(hasattr(module, "nmsolve_mask") for module in made.modules())
    sparse = SparseTraining(made, operands="auto", **options)
    assert sparse.metrics().layers[0].reason.startswith(reason.partition(": ")[2])


def test_operands_that_cannot_be_are_refused():
    with pytest.raises(nmsolve.NMSolveError, match=r"not possible for inlet\.weight: no sparse tensor"):
        SparseTraining(wide(torch.bfloat16), operands="sparse24")
    with pytest.raises(nmsolve.NMSolveError, match="expected one of dense, auto, sparse24, got 'fast'"):
        SparseTraining(wide(), operands="fast")


# --- on a GPU -----------------------------------------------------------------------------------------------


def big(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256, bias=False)).to("cuda", dtype)


def steps(
    model: nn.Module, operands: str, rows: int = 256, autocast: bool = False, compiled: bool = False
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = SparseTraining(model, "2:4", refresh=2, operands=operands)
    sparse.attach(optimizer)
    called = torch.compile(model, fullgraph=True) if compiled else model
    generator, losses = torch.Generator("cuda").manual_seed(1), []
    for _ in range(6):
        x = torch.randn(rows, 256, device="cuda", generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = called(x.to(next(model.parameters()).dtype))
        loss = (out.float() - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for layer in sparse.metrics().layers:
        assert operands == "auto" or layer.operands == operands
        assert (layer.operands == "dense") == bool(layer.reason)
    return losses


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [256, 100, 1])  # torch pads what its kernels do not take
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float16, False), (torch.float32, True)]
)
def test_sparse_operands_on_a_gpu_train_as_dense_ones(dtype, autocast, rows):
    expected = steps(big(dtype), "dense", rows, autocast)
    for operands in ("sparse24", "auto"):
        assert steps(big(dtype), operands, rows, autocast) == pytest.approx(expected, rel=2e-2)


@pytest.mark.gpu
def test_sparse_operands_on_a_gpu_compiled():
    expected = steps(big(torch.bfloat16), "dense")
    assert steps(big(torch.bfloat16), "sparse24", compiled=True) == pytest.approx(expected, rel=2e-2)


@pytest.mark.gpu
def test_times_on_a_gpu_are_taken_once():
    weight = torch.zeros(512, 256, device="cuda", dtype=torch.bfloat16)
    found = sparse24.times(weight)
    assert not isinstance(found, str), found
    assert min(found) > 0
    assert sparse24.times(weight) is found
