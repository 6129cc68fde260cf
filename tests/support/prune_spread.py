"""What test_ranks.py runs in every process of a gloo group: a model sharded by FSDP2 against one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import tiny_models
import torch
from gloo import run_cases
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from nmsolve import NMSolveError, check_mask, load_masks
from nmsolve.errors import WorkFailed
from nmsolve.prune import PruneResult, prune_model

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps", "frank-wolfe")


def rank() -> int:
    return distributed.get_rank()


def world() -> int:
    return distributed.get_world_size()


def sharded(model: nn.Module, **options: object) -> nn.Module:
    mesh = init_device_mesh("cpu", (world(),))
    for block in model.model.layers:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def llama() -> nn.Module:
    """Of 40 inner rows: shards of 20 and 10, where no block of 8 ends."""
    with mock.patch.object(tiny_models, "INNER", 40):
        return tiny_models.make("llama")


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }


def compare(
    model: nn.Module, found: PruneResult, reference: nn.Module, expected: PruneResult, tolerance: float = 1e-6
) -> None:
    assert all(isinstance(p, DTensor) for p in model.parameters())
    given, wanted = whole(model), whole(reference)
    for name, weight in wanted.items():
        apart = ((given[name] - weight).norm() / weight.norm()).item()
        assert apart <= tolerance, f"{name}: {apart}"
    assert list(found.masks) == list(expected.masks)
    assert found.patterns == expected.patterns
    for name in expected.masks:
        assert torch.equal(found.masks[name], expected.masks[name]), name
        assert not given[name][~found.masks[name]].any(), name
    rows = zip(found.report.layers, expected.report.layers, strict=True)
    for row, other in rows:
        assert (row.name, row.shape, row.kept, row.tokens) == (
            other.name,
            other.shape,
            other.kept,
            other.tokens,
        )
        assert (row.error_tokens, row.expert_tokens) == (other.error_tokens, other.expert_tokens)
        assert abs(row.retained - other.retained) < 1e-5
        assert abs(row.score - other.score) < 1e-4 * other.score
        if row.relative_error is not None and other.relative_error is not None:
            # The others' error comes from a sample of tokens, which is another one.
            few = row.error_tokens < row.tokens
            assert (
                abs(row.relative_error - other.relative_error) < (0.3 if few else 1e-4) * other.relative_error
            )
    for setting in ("calibration_batches", "samples", "tokens", "sequence_length"):
        assert found.report.settings.get(setting) == expected.report.settings.get(setting), setting
    assert found.report.parameters == expected.report.parameters
    assert found.report.zeros == expected.report.zeros
    assert found.report.skipped == expected.report.skipped
    told: list[object] = [None] * world()
    distributed.all_gather_object(
        told, [(r.name, r.kept, r.objective, r.seconds) for r in found.report.layers]
    )
    assert all(other == told[0] for other in told), "every rank has the same report"


def matches(
    method: str,
    transposable: bool,
    own: bool = True,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-6,
    **options: object,
) -> None:
    """The ranks' own batches, or the same that are dealt: 5, so that ranks have different numbers of them.

    In float64, since the sums of ranks are rounded in another order, which Hessians of few tokens amplify.
    """
    batches = list(tiny_models.tokens(10).split(2))
    reference = llama().to(dtype)
    settings = {"method": method, "transposable": transposable, "iterations": 12, **options}
    expected = prune_model(reference, batches, "4:8", **settings)  # type: ignore[arg-type]
    model = sharded(llama().to(dtype))
    mine = batches[rank() :: world()] if own else batches
    found = prune_model(model, mine, "4:8", **settings)  # type: ignore[arg-type]
    compare(model, found, reference, expected, tolerance)
    for name in found.masks:
        check_mask(found.masks[name], 4, 8, transposable=transposable)
    logits = model(batches[0]).logits
    assert torch.allclose(logits, reference(batches[0]).logits, atol=1e-5)


def uneven() -> None:
    """Layers of 5 and 3 rows: shards that end anywhere, and ranks without a row."""

    def make() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))

    data = torch.randn(40, 16, generator=torch.Generator().manual_seed(1)).split(5)
    for sequential in ("layer", "off"):
        reference, model = make(), make()
        mesh = init_device_mesh("cpu", (world(),))
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        patterns = {"0": "2:4", "2": "1:2"}
        settings = {"method": "sparsegpt", "transposable": False, "sequential": sequential}
        keep = {"0.weight": torch.rand(5, 16, generator=torch.Generator().manual_seed(2)) > 0.2}
        settings["initial_masks"] = keep
        expected = prune_model(reference, list(data), patterns, **settings)  # type: ignore[arg-type]
        found = prune_model(model, list(data), patterns, **settings)  # type: ignore[arg-type]
        compare(model, found, reference, expected)
        if world() == 4:
            empty: list[object] = [None] * world()
            distributed.all_gather_object(empty, model[2].weight.to_local().numel())
            assert 0 in empty


def calls_of_everyone(call: Callable[[], object], kind: type[NMSolveError] = NMSolveError) -> str:
    """The message of the same error on all ranks."""
    with pytest.raises(NMSolveError) as raised:
        call()
    assert type(raised.value) is kind, raised.value
    told: list[str] = [""] * world()
    distributed.all_gather_object(told, str(raised.value))
    assert len(set(told)) == 1, told
    return told[0]


def refusals() -> None:
    tokens = tiny_models.tokens()
    before = whole(tiny_models.make("llama"))
    model = sharded(tiny_models.make("llama"))

    # One rank's mistake is told by all: nobody waits for it.
    pattern = "8:16" if rank() else "17:16"
    message = calls_of_everyone(lambda: prune_model(model, tokens, pattern))
    assert message.startswith(f"rank 0 of {world()}: n: expected"), message
    mine = tokens if rank() == 0 else None
    message = calls_of_everyone(lambda: prune_model(model, mine, "4:8", method="magnitude"))
    assert message == f"calibration: rank 1 of {world()} has none, others have"
    other = "wanda" if rank() else "ria"
    message = calls_of_everyone(lambda: prune_model(model, tokens, "4:8", method=other))
    assert message.startswith("settings: the ranks were called with different ones"), message
    message = calls_of_everyone(lambda: prune_model(model, tokens, "4:8", resume="folder"))
    assert message.startswith("resume: ")

    after = whole(model)
    assert all(torch.equal(after[name], before[name]) for name in before), "nothing was touched"

    wrapped = DistributedDataParallel(tiny_models.make("llama"))
    assert "model: DistributedDataParallel: " in calls_of_everyone(
        lambda: prune_model(wrapped, tokens, "4:8")
    )
    mesh = init_device_mesh("cpu", (world(),))
    spread = nn.Sequential(nn.Linear(16, 16))
    for placement in (Shard(1), Replicate()):
        weight = distribute_tensor(torch.ones(16, 16), mesh, [placement])
        spread[0].weight = nn.Parameter(weight)
        message = calls_of_everyone(lambda: prune_model(spread, torch.ones(4, 16), "4:8"))
        assert message.startswith("model: 0.weight is a DTensor with placements ("), message


def not_finite() -> None:
    model = sharded(tiny_models.make("llama"))
    weight = model.model.layers[1].mlp.down_proj.weight.to_local()
    with torch.no_grad():
        kept = weight[0, 0].item()
        if rank() == 1:
            weight[0, 0] = torch.nan
    name = "model.layers.1.mlp.down_proj"
    run = partial(prune_model, model, tiny_models.tokens(), "4:8", method="wanda")
    message = calls_of_everyone(run, WorkFailed)
    assert message.startswith(f"rank 1 of {world()}: model: {name}.weight: expected finite values, got 1 NaN")
    with torch.no_grad():
        weight[0, 0] = kept
    layer = model.model.layers[1].mlp.up_proj

    def spoil(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * (torch.nan if rank() == 1 else 1.0),)

    handle = layer.register_forward_pre_hook(spoil)
    message = calls_of_everyone(run, WorkFailed)
    assert message.startswith(f"rank 1 of {world()}: calibration: the inputs of model.layers.1.mlp.")
    handle.remove()
    prune_model(model, tiny_models.tokens(), "4:8", method="wanda")  # and it can go on


def few_batches() -> None:
    """Fewer than ranks: the others run along, and what they run does not count."""
    reference = tiny_models.make("llama")
    expected = prune_model(reference, [tiny_models.tokens(2)], "8:16", method="sparsegpt", sequential="block")
    model = sharded(tiny_models.make("llama"), reshard_after_forward=False)
    found = prune_model(model, [tiny_models.tokens(2)], "8:16", method="sparsegpt", sequential="block")
    compare(model, found, reference, expected)


def experts() -> None:
    """Stacked experts, which each rank sends other numbers of tokens."""

    batches = list(tiny_models.tokens(10).split(2))
    reference = tiny_models.mixtral().double()
    expected = prune_model(reference, batches, "4:8", method="sparsegpt")
    model = sharded(tiny_models.mixtral().double())
    compare(model, prune_model(model, batches, "4:8", method="sparsegpt"), reference, expected)


def saved() -> None:
    """As docs/pruning.md says: gathered on rank 0, in Hugging Face's format."""
    model = sharded(tiny_models.make("llama"))
    result = prune_model(model, tiny_models.tokens(), "4:8", method="wanda")
    message = calls_of_everyone(lambda: result.save(model, "nowhere"))
    assert message.startswith("model: sharded; gather it with get_model_state_dict(")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    expected = whole(model)
    if rank() == 0:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
            result.write_masks(folder, picture=False)
            again = type(tiny_models.make("llama")).from_pretrained(folder)
            for name, weight in again.named_parameters():
                assert torch.equal(weight, expected[name]), name
            masks = load_masks(folder)
        assert masks.keys() == result.masks.keys()
        assert all(torch.equal(masks[name], result.masks[name]) for name in masks)


def one_rank() -> None:
    matches("sparsegpt", True)


_ONE: dict[str, Callable[[], None]] = {"one_rank": one_rank}
_QUICK: dict[str, Callable[[], None]] = {
    f"{method}-transposable": partial(matches, method, True) for method in METHODS
} | {
    "wanda-ordinary-dealt": partial(matches, "wanda", False, own=False, exact_error=True),
    "sparsegpt-off": partial(matches, "sparsegpt", True, sequential="off"),
    "sparsegpt-float32": partial(matches, "sparsegpt", True, dtype=torch.float32, tolerance=1e-4),
    "few_batches": few_batches,
    "saved": saved,
    "uneven": uneven,
    "refusals": refusals,
    "not_finite": not_finite,
}
_SLOW: dict[str, Callable[[], None]] = {
    "uneven": uneven,
    "refusals": refusals,
    "not_finite": not_finite,
    "few_batches": few_batches,
    "experts": experts,
    **{f"{method}-ordinary": partial(matches, method, False, sequential="block") for method in METHODS},
    **{f"{method}-dealt": partial(matches, method, True, own=False) for method in ("alps", "frank-wolfe")},
    "wanda-off": partial(matches, "wanda", True, sequential="off"),
}
CASES = {"one": _ONE, "two": _QUICK, "four": _SLOW}


def work(rank: int, processes: int, folder: str, cases: str) -> None:
    run_cases(CASES[cases], rank, processes, folder)
