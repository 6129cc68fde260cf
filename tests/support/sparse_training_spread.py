"""What test_sparse_training_spread.py runs in every process of a gloo group."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gloo import run_cases
from sparse_training import STEPS, Net, batches, network, train
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nmsolve
from nmsolve import NMSolveError
from nmsolve.train import SparseTraining

CASES: dict[str, Callable[[], None]] = {}
GRADIENTS = ("straight-through", "masked", "sr-ste")


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def work(rank: int, processes: int, folder: str) -> None:
    run_cases(CASES, rank, processes, folder, patience=120)


def own_batches() -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of every batch."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    return ((x.chunk(count)[rank], y.chunk(count)[rank]) for x, y in batches())


def run(
    model: nn.Module, data: Iterator[tuple[Tensor, Tensor]], gradient: str
) -> tuple[list[float], list[float | None], SparseTraining]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = SparseTraining(model, refresh=2, gradient=gradient, decay=0.05, backend="torch")
    sparse.attach(optimizer)
    flips: list[float | None] = []
    losses = train(model, optimizer, data, after=lambda: flips.append(sparse.metrics().flip_rate))
    return losses, flips, sparse


def averaged(losses: list[float]) -> list[float]:
    total = torch.tensor(losses, dtype=torch.float64)
    distributed.all_reduce(total)
    return (total / distributed.get_world_size()).tolist()


def compare(model: nn.Module, gradient: str, data: Iterator[tuple[Tensor, Tensor]], hidden: int = 32) -> None:
    """The spread run has the losses, the flips, the masks and the weights of one process."""
    expected, expected_flips, reference = run(network(hidden=hidden), batches(), gradient)
    losses, flips, sparse = run(model, data, gradient)
    torch.testing.assert_close(torch.tensor(averaged(losses)), torch.tensor(expected), rtol=1e-6, atol=0)
    assert flips == expected_flips, (flips, expected_flips)
    assert len(flips) == STEPS
    for name, mask in sparse.finish().items():
        whole = mask.full_tensor() if hasattr(mask, "full_tensor") else mask
        assert torch.equal(whole, reference.masks[name])
        weight = model.get_parameter(name)
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        assert torch.equal(weight != 0, whole)


def sharded(hidden: int = 32, **options: object) -> Net:
    model = network(hidden=hidden)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


@case
def fsdp_equals_one_process() -> None:
    for gradient in GRADIENTS:
        compare(sharded(), gradient, own_batches())


@case
def fsdp_that_keeps_weights_after_the_forward_pass() -> None:
    compare(sharded(reshard_after_forward=False), "straight-through", own_batches())


@case
def fsdp_with_shards_of_columns() -> None:
    model = sharded(shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else Shard(0))
    compare(model, "masked", own_batches())


@case
def fsdp_with_uneven_shards() -> None:
    compare(sharded(hidden=31), "straight-through", own_batches(), hidden=31)


@case
def products_of_fsdp_see_masked_weights() -> None:
    model = sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparse = SparseTraining(model, refresh=1, backend="torch")
    sparse.attach(optimizer)
    seen: list[Tensor] = []
    for layer in (model.up, model.down):
        layer.register_forward_pre_hook(lambda layer, args: seen.append(layer.weight.detach().clone()))
    for x, y in own_batches():
        optimizer.zero_grad()
        (model(x.bfloat16()) - y).square().mean().backward()
        optimizer.step()
    assert len(seen) == 2 * STEPS
    for operand in seen:
        assert operand.dtype == torch.bfloat16
        nmsolve.check_mask(operand != 0, 2, 4)


@case
def weights_that_are_loaded_are_masked_as_well() -> None:
    model = sharded()
    sparse = SparseTraining(model, backend="torch")
    x = torch.ones(2, 16)
    model(x)
    other = network(seed=3).state_dict()
    mesh = model.up.weight.device_mesh
    spread = {name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in other.items()}
    model.load_state_dict(spread, assign=True)
    sparse.refresh()
    reference = network(seed=3)
    SparseTraining(reference, backend="torch")
    torch.testing.assert_close(model(x), reference(x))


@case
def tensor_parallel_equals_one_process() -> None:
    for gradient in GRADIENTS:
        model = network()
        model.norm = nn.Identity()
        plain = network()
        plain.norm = nn.Identity()
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        expected, expected_flips, _ = run(plain, batches(), gradient)
        losses, flips, _ = run(model, batches(), gradient)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-6, atol=0)
        assert flips == expected_flips


@case
def ddp_equals_one_process() -> None:
    model = network()
    compare_ddp = nn.parallel.DistributedDataParallel
    expected, expected_flips, _ = run(network(), batches(), "masked")
    losses, flips, _ = run(compare_ddp(model), own_batches(), "masked")
    torch.testing.assert_close(torch.tensor(averaged(losses)), torch.tensor(expected), rtol=1e-6, atol=0)
    assert flips == expected_flips


@case
def what_cannot_be_spread_is_refused() -> None:
    for options, message in (
        ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, "CPUOffloadPolicy gathers a copy"),
        ({"hidden": 20}, "not a multiple of m=4; fully_shard"),
    ):
        model = sharded(**options)
        with pytest.raises(NMSolveError, match=message):
            SparseTraining(model, backend="torch")
    model = network()
    sparse = SparseTraining(model, backend="torch")
    fully_shard(model)
    with pytest.raises(NMSolveError, match="distributed after SparseTraining was made"):
        sparse.attach(torch.optim.SGD(model.parameters()))
