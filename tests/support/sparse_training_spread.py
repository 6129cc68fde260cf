"""What test_sparse_training_spread.py runs in every process of a gloo group."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch
from gloo import run_cases
from sparse_training import STEPS, Net, batches, network, train
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import nmsolve
from nmsolve import NMSolveError
from nmsolve.ops.distributed import shard_of, spread_like
from nmsolve.prune import FixedMasks
from nmsolve.train import SparseTraining

CASES: dict[str, Callable[[], None]] = {}
GRADIENTS = ("straight-through", "masked", "sr-ste")


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def work(rank: int, processes: int, folder: str) -> None:
    run_cases(CASES, rank, processes, folder)


def own_batches(steps: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of every batch."""
    rank, count = distributed.get_rank(), distributed.get_world_size()
    return ((x.chunk(count)[rank], y.chunk(count)[rank]) for x, y in batches(steps))


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


def compare(model: nn.Module, gradient: str, hidden: int = 32, steps: int = STEPS) -> None:
    """The spread run has the losses, the flips, the masks and the weights of one process."""
    expected, expected_flips, reference = run(network(hidden=hidden), batches(steps), gradient)
    losses, flips, sparse = run(model, own_batches(steps), gradient)
    torch.testing.assert_close(torch.tensor(averaged(losses)), torch.tensor(expected), rtol=1e-6, atol=0)
    assert flips == expected_flips, (flips, expected_flips)
    assert len(flips) == steps
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
        compare(sharded(), gradient, steps=50)


@case
def fsdp_that_keeps_weights_after_the_forward_pass() -> None:
    compare(sharded(reshard_after_forward=False), "straight-through")


@case
def fsdp_with_shards_of_columns() -> None:
    model = sharded(shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else Shard(0))
    compare(model, "masked")


@case
def fsdp_with_uneven_shards() -> None:
    compare(sharded(hidden=31), "straight-through", hidden=31)


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
def fixed_masks_of_fsdp_equal_one_process() -> None:
    """Plain masks and DTensors, decay and momentum of an optimizer that knows no masks."""
    plain = network()
    masks = {
        name: nmsolve.transposable_mask(plain.get_parameter(name).detach().abs(), 2, 4, backend="torch")
        for name in ("up.weight", "down.weight")
    }
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1)
    FixedMasks(plain, masks, optimizer)
    expected = train(plain, optimizer)
    for options in (
        {},
        {"reshard_after_forward": False},
        {"shard_placement_fn": lambda p: Shard(1) if p.ndim == 2 else Shard(0)},
    ):
        model = sharded(**options)
        own = masks if options else {n: spread_like(m, model.get_parameter(n)) for n, m in masks.items()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
        fixed = FixedMasks(model, own, optimizer)
        losses = train(model, optimizer, own_batches())
        torch.testing.assert_close(torch.tensor(averaged(losses)), torch.tensor(expected), rtol=1e-6, atol=0)
        assert [tuple(o) for o in fixed.operands("2:4")] == [(name, "2:4", True, True, 0) for name in masks]
        for name, mask in masks.items():
            assert torch.equal(model.get_parameter(name).full_tensor() != 0, mask)
        shard_of(model.up.weight).fill_(1)
        assert fixed.operands("2:4")[0][2:] == (False, False, 16 * 32 // 2)
    model = network()
    fixed = FixedMasks(model, masks)
    fully_shard(model)  # after the masks
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    fixed.attach(optimizer)
    losses = train(model, optimizer, own_batches())
    torch.testing.assert_close(torch.tensor(averaged(losses)), torch.tensor(expected), rtol=1e-6, atol=0)
    assert torch.equal(model.up.weight.full_tensor() != 0, masks["up.weight"])


def resumed_on_others(first: int, second: int, placements: object, pattern: object, hidden: int) -> None:
    """Half of a run on ``first`` processes, the rest on ``second``, by a checkpoint of DCP."""
    folder = [tempfile.mkdtemp()]
    distributed.broadcast_object_list(folder)

    def begun(count: int) -> tuple[nn.Module, torch.optim.Optimizer, SparseTraining, object]:
        model, group = network(hidden=hidden), None
        if count > 1:
            mesh = DeviceMesh("cpu", list(range(count)))
            group = mesh.get_group()
            for layer in (model.up, model.down, model):
                fully_shard(layer, mesh=mesh, shard_placement_fn=placements)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        sparse = SparseTraining(model, pattern, refresh=3, decay=0.05, backend="torch")
        return model, optimizer, sparse, group

    def parts(count: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        rank = distributed.get_rank()
        return (
            (x.chunk(count)[rank], y.chunk(count)[rank]) for x, y in itertools.islice(batches(), start, None)
        )

    def total(losses: list[float], count: int, group: object) -> Tensor:
        summed = torch.tensor(losses, dtype=torch.float64)
        if group is not None:
            distributed.all_reduce(summed, group=group)
        return summed / count

    def state(
        model: nn.Module, optimizer: torch.optim.Optimizer, sparse: SparseTraining
    ) -> dict[str, object]:
        weights, moments = get_state_dict(model, optimizer)
        return {"model": weights, "optimizer": moments, "sparse": sparse.state_dict()}

    # Groups are made by all processes, in the same order.
    one = distributed.new_group([0])
    runs = []
    for count in (first, second):
        if count == 1:
            runs.append((*begun(1)[:3], one) if distributed.get_rank() == 0 else None)
        else:
            runs.append(
                begun(count) if distributed.get_rank() < count else DeviceMesh("cpu", list(range(count)))
            )
    expected = masks = None
    if distributed.get_rank() < first:
        model, optimizer, sparse, group = runs[0]
        sparse.attach(optimizer)
        train(model, optimizer, itertools.islice(parts(first, 0), 4))  # between two refreshes
        dcp.save(state(model, optimizer, sparse), checkpoint_id=folder[0], process_group=group)
        expected = total(train(model, optimizer, parts(first, 4)), first, group if first > 1 else None)
        masks = {name: mask.full_tensor() if first > 1 else mask for name, mask in sparse.masks.items()}
    found = [expected, masks]
    distributed.broadcast_object_list(found)
    if distributed.get_rank() < second:
        model, optimizer, sparse, group = runs[1]
        loaded = state(model, optimizer, sparse)
        dcp.load(loaded, checkpoint_id=folder[0], process_group=group)
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
        )
        sparse.load_state_dict(loaded["sparse"])
        sparse.attach(optimizer)
        losses = total(train(model, optimizer, parts(second, 4)), second, group if second > 1 else None)
        torch.testing.assert_close(losses, found[0], rtol=1e-6, atol=0)
        assert (sparse.step, sparse.metrics().refreshes) == (STEPS, 2)
        for name, mask in sparse.masks.items():
            assert torch.equal(mask.full_tensor() if second > 1 else mask, found[1][name])
    distributed.barrier()
    if distributed.get_rank() == 0:
        shutil.rmtree(folder[0])


def columns(parameter: Tensor) -> Shard:
    return Shard(1) if parameter.ndim == 2 else Shard(0)


@case
def a_checkpoint_is_resumed_by_other_numbers_of_processes() -> None:
    most = distributed.get_world_size()
    for first, second in ((most, 1), (1, most), (most, most // 2), (most // 2, most)):
        resumed_on_others(first, second, None, "2:4", 32)
    for first, second in ((most, 1), (1, most)):
        resumed_on_others(first, second, columns, "2:4", 32)  # 16 columns: borders at 4 would split bytes
        resumed_on_others(first, second, columns, {"down": "1:3"}, 36)


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
