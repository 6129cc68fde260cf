"""What test_distributed.py runs in every process of a gloo group: each case with the processes it needs."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from gloo import run_cases
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import nmsolve
from nmsolve import NMSolveError
from nmsolve.ops.distributed import whole_of

FIELDS = ("mask", "row_duals", "col_duals", "objective", "bound", "scale")
TORCH = {"backend": "torch"}

# Processes -> name -> case.
CASES: dict[int, dict[str, Callable[[], None]]] = {2: {}, 4: {}}


def case(processes: int, name: str = "") -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        CASES[processes][name or function.__name__] = function
        return function

    return add


def work(rank: int, processes: int, folder: str) -> None:
    run_cases(CASES[processes], rank, processes, folder)


def line() -> DeviceMesh:
    return init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("dp",))


def square() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def message_of(call: Callable[[], object]) -> str:
    try:
        call()
    except NMSolveError as error:
        return str(error)
    raise AssertionError("expected an NMSolveError")


def everywhere(message: str) -> list[str]:
    messages: list[str] = [""] * distributed.get_world_size()
    distributed.all_gather_object(messages, message)
    return messages


# --- the sharded result is the unsharded one ----------------------------------------------------------------


def compare(scores: Tensor, mesh: DeviceMesh, placements: list[Placement], m: int, n: int = 2) -> None:
    spread = distribute_tensor(scores, mesh, placements)
    with CommDebugMode() as communication:
        solution = nmsolve.transposable_mask(spread, n, m, return_solution=True, **TORCH)
        mask = nmsolve.transposable_mask(spread, n, m, method="greedy", **TORCH)
        lines = {dim: nmsolve.nm_mask(spread, n, m, dim=dim, **TORCH) for dim in (-1, -2)}
    assert communication.get_total_counts() == 0
    expected = nmsolve.transposable_mask(scores, n, m, return_solution=True, **TORCH)
    pairs = [(getattr(solution, name), getattr(expected, name)) for name in FIELDS]
    pairs.append((mask, nmsolve.transposable_mask(scores, n, m, method="greedy", **TORCH)))
    pairs += [(lines[dim], nmsolve.nm_mask(scores, n, m, dim=dim, **TORCH)) for dim in lines]
    for found, wanted in pairs:
        assert isinstance(found, DTensor)
        assert found.placements == spread.placements
        assert (found.shape, found.stride(), found.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)
        assert torch.equal(found.full_tensor(), wanted)
    for number in ("max_gap", "total_objective", "total_bound", "relative_gap"):
        assert getattr(solution, number) == getattr(expected, number), number
    nmsolve.check_mask(solution.mask, n, m)
    for dim in lines:
        nmsolve.check_mask(lines[dim], n, m, transposable=False, dim=dim)


S0, S1, S2, R = Shard(0), Shard(1), Shard(2), Replicate()
LAYOUTS = {
    "rows": ((32, 12), line, [S0], 4),
    "columns": ((12, 32), line, [S1], 4),
    "negative_dimension": ((12, 32), line, [Shard(-1)], 4),
    "batch": ((8, 5, 6), line, [S0], 4),
    "batch_uneven": ((6, 8, 8), line, [S0], 4),
    "replicated": ((9, 10), line, [R], 4),
    "last_shard_partial": ((31, 9), line, [S0], 4),
    "last_shard_empty": ((9, 9), line, [S0], 3),
    "one_row": ((1, 9), line, [S0], 4),
    "rows_and_columns": ((16, 15), square, [S0, S1], 4),
    "rows_twice": ((15, 8), square, [S0, S0], 4),
    "replicated_and_rows": ((16, 8), square, [R, S0], 4),
    "columns_and_replicated": ((5, 16), square, [S1, R], 4),
    "last_and_middle": ((2, 8, 8), square, [S2, S1], 4),
    "rows_right_to_left": ((16, 8), square, [_StridedShard(0, split_factor=2), S0], 4),
    "columns_right_to_left": ((8, 16), square, [_StridedShard(1, split_factor=2), S1], 4),
}
for _name, (_shape, _mesh, _placements, _m) in LAYOUTS.items():
    case(4, f"same_{_name}")(
        lambda shape=_shape, mesh=_mesh, placements=_placements, m=_m: compare(
            torch.randn(shape), mesh(), placements, m
        )
    )


@case(4)
def rows_right_to_left_uneven() -> None:
    scores = torch.randn(31, 8)
    dp, tp = divmod(distributed.get_rank(), 2)
    part = scores.chunk(2)[tp].chunk(2)[dp]
    spread = DTensor.from_local(
        part, square(), [_StridedShard(0, split_factor=2), S0], shape=scores.shape, stride=scores.stride()
    )
    mask = nmsolve.transposable_mask(spread, 2, 8, **TORCH)
    assert mask.shape == scores.shape
    expected = nmsolve.transposable_mask(scores, 2, 8, **TORCH)
    assert torch.equal(mask.to_local(), expected.chunk(2)[tp].chunk(2)[dp])
    assert "with a border at 8" in message_of(lambda: nmsolve.transposable_mask(spread, 2, 16, **TORCH))


@case(4)
def a_group_of_ordinary_and_spread_tensors() -> None:
    mesh = square()
    scores = [torch.randn(16, 8), torch.randn(5, 7), torch.randn(2, 8, 8).bfloat16()]
    first = distribute_tensor(scores[0], mesh, [S0, S1])
    spread = [first, scores[1], distribute_tensor(scores[2], mesh, [S0, R])]
    expected = nmsolve.transposable_masks(scores, 2, 4, **TORCH)
    masks = nmsolve.transposable_masks(spread, 2, 4, **TORCH)
    solutions = nmsolve.transposable_masks(spread, 2, 4, return_solution=True, **TORCH)
    for mask, solution, wanted in zip(masks, solutions, expected, strict=True):
        for found in (mask, solution.mask):
            assert torch.equal(found.full_tensor() if isinstance(found, DTensor) else found, wanted)
    message = message_of(lambda: nmsolve.transposable_masks([*scores, first], 2, 16, **TORCH))
    assert message.startswith("scores[3]: dimension 0 of size 16 is sharded over mesh dimension 0 ('dp')")


@case(4)
def blocks_and_their_duals() -> None:
    blocks = torch.randn(6, 4, 4)
    spread = distribute_tensor(blocks, line(), [S0])
    solution = nmsolve.solve_blocks(spread, 2, **TORCH)
    expected = nmsolve.solve_blocks(blocks, 2, **TORCH)
    for name in FIELDS:
        assert torch.equal(getattr(solution, name).full_tensor(), getattr(expected, name)), name


@case(4)
def duals_to_start_from_lie_like_the_scores() -> None:
    scores = torch.randn(16, 16)
    spread = distribute_tensor(scores, line(), [S0])
    solution = nmsolve.transposable_mask(spread, 2, 4, return_solution=True, **TORCH)
    again = nmsolve.transposable_mask(spread, 2, 4, warm_start=solution, **TORCH)
    assert torch.equal(again.full_tensor(), solution.mask.full_tensor())
    u, v = solution.row_duals, solution.col_duals
    elsewhere = v.redistribute(placements=[R])
    for message in (
        message_of(lambda: nmsolve.transposable_mask(spread, 2, 4, warm_start=(u.full_tensor(), v), **TORCH)),
        message_of(lambda: nmsolve.transposable_mask(spread, 2, 4, warm_start=(u, elsewhere), **TORCH)),
    ):
        assert message.startswith("warm_start: expected ")
        assert "to be spread like the scores" in message
    message = message_of(lambda: nmsolve.transposable_mask(scores, 2, 4, warm_start=(u, v), **TORCH))
    assert "row_duals to be spread like the scores (not a DTensor)" in message


@case(4)
def processes_outside_the_mesh() -> None:
    mesh = DeviceMesh("cpu", [0, 1])
    scores = torch.randn(16, 8)
    spread = distribute_tensor(scores, mesh, [S0])
    solution = nmsolve.transposable_mask(spread, 2, 4, return_solution=True, **TORCH)
    mask = nmsolve.nm_mask(spread, 2, 4, **TORCH)
    assert solution.mask.shape == mask.shape == scores.shape
    if distributed.get_rank() < 2:
        assert torch.equal(solution.mask.full_tensor(), nmsolve.transposable_mask(scores, 2, 4, **TORCH))
        nmsolve.check_mask(solution.mask, 2, 4)
    else:
        assert solution.mask.to_local().numel() == 0


@case(2)
def compiled() -> None:
    scores = torch.randn(16, 16)
    spread = distribute_tensor(scores, line(), [S0])

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return nmsolve.transposable_mask(x, 2, 4, **TORCH), nmsolve.nm_mask(x, 2, 4, dim=0, **TORCH)

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(spread)
    for mask, wanted in zip(found, both(scores), strict=True):
        assert mask.placements == spread.placements
        assert torch.equal(mask.full_tensor(), wanted)


# --- errors -------------------------------------------------------------------------------------------------

REFUSED = {
    "rows": (
        ((24, 16), line, [S0], 4),
        "scores: dimension 0 of size 24 is sharded over mesh dimension 0 ('dp') of size 4 with a border "
        "at 6, which is not a multiple of m=4; scores.redistribute(placements=[Shard(dim=1)]) would do",
    ),
    "nothing_but_replicas": (((6, 6), line, [S1], 4), "placements=[Replicate()]"),
    "batch_instead": (((2, 24, 24), line, [S1], 8), "placements=[Shard(dim=0)]"),
    "one_of_two": (
        ((16, 24), square, [S0, S1], 8),
        "mesh dimension 1 ('tp') of size 2 with a border at 12, which is not a multiple of m=8; "
        "scores.redistribute(placements=[Shard(dim=0), Replicate()])",
    ),
    "rows_twice": (
        ((8, 8), square, [S0, S0], 4),
        "mesh dimension 1 ('tp') of size 2 with a border at 2, which is not a multiple of m=4; "
        "scores.redistribute(placements=[Shard(dim=0), Shard(dim=1)])",
    ),
    "right_to_left": (
        ((8, 8), square, [_StridedShard(0, split_factor=2), S0], 4),
        "with a border at 2, which is not a multiple of m=4; "
        "scores.redistribute(placements=[Replicate(), Replicate()])",
    ),
}


def refuse(scores: Tensor, mesh: DeviceMesh, placements: list[Placement], m: int, expected: str) -> None:
    spread = distribute_tensor(scores, mesh, placements)
    message = message_of(lambda: nmsolve.transposable_mask(spread, 2, m, **TORCH))
    assert expected in message, message
    assert set(everywhere(message)) == {message}
    remedy = re.search(r"placements=(\[.*\])\) would do", message)
    assert remedy is not None
    moved = spread.redistribute(placements=eval(remedy[1], {"Shard": Shard, "Replicate": Replicate}))
    found = nmsolve.transposable_mask(moved, 2, m, **TORCH).full_tensor()
    assert torch.equal(found, nmsolve.transposable_mask(scores, 2, m, **TORCH))


for _name, ((_shape, _mesh, _placements, _m), _expected) in REFUSED.items():
    case(4, f"refused_{_name}")(
        lambda shape=_shape, mesh=_mesh, placements=_placements, m=_m, expected=_expected: refuse(
            torch.randn(shape), mesh(), placements, m, expected
        )
    )


@case(4)
def groups_along_one_dimension_mind_only_that_one() -> None:
    scores = torch.randn(6, 16)
    spread = distribute_tensor(scores, line(), [S0])
    found = nmsolve.nm_mask(spread, 2, 4, **TORCH)
    assert torch.equal(found.full_tensor(), nmsolve.nm_mask(scores, 2, 4, **TORCH))
    message = message_of(lambda: nmsolve.nm_mask(spread, 2, 4, dim=0, **TORCH))
    assert message.startswith("scores: dimension 0 of size 6 is sharded")


@case(4)
def partial_sums_are_refused() -> None:
    spread = DTensor.from_local(torch.ones(8, 8), line(), [Partial()])
    message = message_of(lambda: nmsolve.transposable_mask(spread, 2, 4, **TORCH))
    assert message.startswith("scores: expected a sharded or replicated DTensor, got Partial(sum)")


@case(4)
def a_bad_score_is_reported_by_the_process_that_holds_it() -> None:
    scores = torch.zeros(16, 8)
    scores[5, 3] = float("nan")
    spread = distribute_tensor(scores, line(), [S0])
    if distributed.get_rank() == 1:
        message = message_of(lambda: nmsolve.transposable_mask(spread, 2, 4, **TORCH))
        assert "got 1 NaN of 32, the first nan at (1, 3), in the shard (1,)" in message, message
    else:
        nmsolve.transposable_mask(spread, 2, 4, **TORCH)


@case(4)
def every_process_hears_of_a_bad_mask() -> None:
    mesh = square()
    mask = torch.eye(4, dtype=torch.bool).repeat(2, 2)
    nmsolve.check_mask(distribute_tensor(mask, mesh, [S0, S1]), 1, 4)
    mask[6, 1] = True
    spread = distribute_tensor(mask, mesh, [S0, S1])
    message = message_of(lambda: nmsolve.check_mask(spread, 1, 4))
    assert message.startswith("mask: block (0, 0), row 2 keeps 2 of 4 entries, expected 1")
    assert message.endswith("in the shard (1, 0) of the mesh")
    message = message_of(lambda: nmsolve.check_mask(spread, 1, 8))
    assert message.startswith("mask: dimension 0 of size 8 is sharded")


# --- FSDP2 --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(16, hidden, bias=False)
        self.down = nn.Linear(hidden, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def prune_and_step(model: nn.Module, x: Tensor, m: int) -> list[Tensor]:
    """Mask every weight in place by its magnitude, take a step, mask again; the final weights."""
    weights = list(model.parameters())
    masks = nmsolve.transposable_masks([weight.abs() for weight in weights], m // 2, m, **TORCH)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            for weight, mask in zip(weights, masks, strict=True):
                assert not isinstance(weight, DTensor) or mask.placements == weight.placements
                weight.mul_(mask)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(nmsolve.transposable_mask(weight.abs(), m // 2, m, **TORCH))
    return [weight.full_tensor() if isinstance(weight, DTensor) else weight.detach() for weight in weights]


def compare_models(shard: Callable[[Net], object], m: int = 8, hidden: int = 32) -> None:
    """Training a sharded model under masks ends with the weights that the unsharded one ends with."""
    x = torch.randn(8, 16)
    plain, model = Net(hidden), Net(hidden)
    model.load_state_dict(plain.state_dict())
    shard(model)
    expected = prune_and_step(plain, x, m)
    for found, wanted in zip(prune_and_step(model, x, m), expected, strict=True):
        torch.testing.assert_close(found, wanted)
        nmsolve.check_mask(found != 0, m // 2, m)


@case(2)
def fully_sharded_model() -> None:
    def shard(model: Net) -> None:
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=line())
        fully_shard(model, mesh=line())

    compare_models(shard)


@case(2)
def fully_sharded_unevenly() -> None:
    compare_models(lambda model: fully_shard(model, mesh=line()), hidden=31)


@case(2)
def fully_sharded_by_columns() -> None:
    def shard(model: Net) -> None:
        fully_shard(model, mesh=line(), shard_placement_fn=lambda parameter: Shard(1))
        assert all(parameter.placements == (S1,) for parameter in model.parameters())

    compare_models(shard)


@case(4)
def fully_sharded_over_tensor_parallel() -> None:
    def shard(model: Net) -> None:
        mesh = square()
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        assert any(isinstance(p, _StridedShard) for p in model.up.weight.placements)

    compare_models(shard)


@case(4)
def uneven_shards_over_tensor_parallel_are_gathered_or_refused() -> None:
    up = nn.Linear(8, 30, bias=False)
    rows = torch.arange(30.0)[:, None].expand(30, 8)
    with torch.no_grad():
        up.weight.copy_(rows)
    mesh = square()
    model = nn.Sequential(up)
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    if torch.__version__.startswith("2.9."):
        assert "mixes up the rows" in message_of(lambda: whole_of(up.weight))
    else:
        assert torch.equal(whole_of(up.weight), rows)


@case(4)
def fully_sharded_between_replicas() -> None:
    compare_models(lambda model: fully_shard(model, mesh=square()))
