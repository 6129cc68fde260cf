"""Every kernel and variant, executed from its PTX and compared with the float64 oracle.

Run with NMSOLVE_PTX_SM: tests/emulator/test_variants.py does so in children, as the kernels of its own
process are interpreted. bench/emulated.py writes what :func:`measured` finds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulator
import oracles
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

import nmsolve
from nmsolve.backends.torch import masks as reference
from nmsolve.backends.torch import permutations as reference_permutations
from nmsolve.backends.triton import masks as gpu
from nmsolve.backends.triton import permutations as gpu_permute
from nmsolve.pattern import NMPattern

if not os.environ.get("NMSOLVE_PTX_SM"):
    raise RuntimeError("these tests are for compiled kernels: set NMSOLVE_PTX_SM=90 (or 80, 100)")

SIZES = (4, 8, 16, 32, 64)
BETWEEN = (1, 2, 3, 6, 12, 20, 40)  # in the tiles of the next power of two, with padding
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EXACT = 1e-12  # sums of the same float64 numbers in another order
SAME = 0.0  # bit for bit


class Variant(NamedTuple):
    """A way to launch a kernel.

    ``differ(m, dtype)`` gives the number of blocks and the worst difference from the oracle, ``allowed`` at
    most; ``noisy`` is allowed where the approximate instructions err. A result that is rounded to the dtype
    may lie ``ulps`` of its epsilons further away.
    """

    kernel: str
    differ: Callable[[int, torch.dtype], tuple[int, float]]
    allowed: float
    sizes: tuple[int, ...] = SIZES
    noisy: float | None = None
    ulps: float = 0.0
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def within(self, dtype: torch.dtype) -> float:
        """What is allowed for scores of a dtype."""
        rounded = self.ulps * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0
        return self.allowed + rounded


def half(m: int) -> NMPattern:
    return NMPattern(max(1, m // 2), m)


def blocks_of_a_program(kernel: str, m: int) -> int:
    return gpu.shipped_tile(kernel, m)[3]


def scores_of(m: int, dtype: torch.dtype, blocks: int, rows: int | None = None) -> Tensor:
    return oracles.sample("student_t", (1, rows or m, m * blocks), seed=m, dtype=dtype)


def objective_difference(scores: Tensor, mask: Tensor, pattern: NMPattern) -> float:
    """Relative to the sum of a block's scores; the counts of the mask are checked."""
    oracles.check_mask_counts(mask, pattern.n, pattern.m)
    host = scores.double()
    best = reference.exact(host, pattern, want_solution=True).objective
    kept, size = reference.kept_score(host, mask, pattern)
    return relative(best - kept, size)


def relative(difference: Tensor, size: Tensor) -> float:
    return float((difference.abs() / size.clamp(min=torch.finfo(torch.float64).tiny)).max())


def exact_mask(m: int, dtype: torch.dtype) -> tuple[int, float]:
    pattern, blocks = half(m), 128 if m == 4 else blocks_of_a_program("exact", m)
    scores = scores_of(m, dtype, blocks)
    return blocks, objective_difference(scores, gpu.exact(scores, pattern).mask, pattern)


def certified(scores: Tensor, result: Any, pattern: NMPattern) -> float:
    """The worst of the objective, its report, and the bound's report; the bound has to be tight."""
    host = scores.double()
    kept, size = reference.kept_score(host, result.mask, pattern)
    bound = reference.dual_bound(host, result.row_duals, result.col_duals, pattern)
    assert relative(bound - kept, size) < 4e-6
    reports = relative(result.objective - kept, size), relative(result.bound - bound, size)
    return max(objective_difference(scores, result.mask, pattern), *reports)


def exact_solution(m: int, dtype: torch.dtype) -> tuple[int, float]:
    pattern, blocks = half(m), blocks_of_a_program("exact", m)
    scores = scores_of(m, dtype, blocks)
    return blocks, certified(scores, gpu.exact(scores, pattern, want_solution=True), pattern)


def exact_warm(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """From the oracle's duals, and from some that say nothing."""
    pattern, blocks = half(m), blocks_of_a_program("exact", m)
    scores = scores_of(m, dtype, blocks)
    best = reference.exact(scores, pattern, want_solution=True)
    worst = 0.0
    for duals in ((best.row_duals, best.col_duals), (best.row_duals * 0, best.col_duals + 1e30)):
        result = gpu.exact(scores, pattern, warm=duals, want_solution=True)
        worst = max(worst, certified(scores, result, pattern))
    return 2 * blocks, worst


def exact_edge(m: int, dtype: torch.dtype) -> tuple[int, float]:
    pattern, blocks = half(m), blocks_of_a_program("exact_edge", m)
    scores = scores_of(m, dtype, blocks, rows=m - 1)
    return blocks, objective_difference(scores, gpu.exact(scores, pattern).mask, pattern)


def exact_edge_solution(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """Of blocks that are taller than wide, which the kernel turns."""
    pattern, blocks = half(m), blocks_of_a_program("exact_edge", m)
    scores = scores_of(m, dtype, blocks, rows=m - 1).mT
    return blocks, certified(scores, gpu.exact(scores, pattern, want_solution=True), pattern)


def grouped(m: int, dtype: torch.dtype, *, want_solution: bool) -> tuple[int, float]:
    """Against the oracle; that a group equals each matrix alone is in tests/kernels/test_gpu.py."""
    pattern = half(m)
    blocks = 128 if m == 4 and not want_solution else blocks_of_a_program("exact", m)
    scores = scores_of(m, dtype, blocks)
    matrices = (
        [scores[..., : m * (blocks // 2)], scores[..., m * (blocks // 2) :]] if blocks > 1 else [scores]
    )
    results = gpu.exact_group([*matrices, scores], pattern, want_solution=want_solution)
    worst = 0.0
    for matrix, result in zip([*matrices, scores], results, strict=True):
        worst = max(worst, objective_difference(matrix, result.mask, pattern))
        if want_solution:
            worst = max(worst, certified(matrix, result, pattern))
    return 2 * blocks, worst


def without_ties(m: int, dtype: torch.dtype, blocks: int, rows: int | None = None) -> Tensor:
    """Scores whose greedy mask is unique: of the short floats, others than a sample has."""
    scores = scores_of(m, dtype, blocks, rows)
    if dtype.itemsize > 2:
        return scores
    generator = torch.Generator().manual_seed(m)
    bits = [torch.randperm(8192, generator=generator)[: (rows or m) * m] for _ in range(blocks)]
    return torch.cat([0x3800 + b.view(-1, m) for b in bits], 1).to(torch.int16).view(dtype).unsqueeze(0)


def greedy(m: int, dtype: torch.dtype) -> tuple[int, float]:
    pattern, blocks = half(m), blocks_of_a_program("dykstra", m)
    scores = without_ties(m, dtype, blocks)
    return blocks, float((gpu.greedy(scores, pattern) != reference.greedy(scores, pattern)).sum())


def greedy_edge(m: int, dtype: torch.dtype) -> tuple[int, float]:
    pattern, blocks = half(m), blocks_of_a_program("dykstra", m)
    scores = without_ties(m, dtype, blocks, rows=m - 1)
    return blocks, float((gpu.greedy(scores, pattern) != reference.greedy(scores, pattern)).sum())


def tsenor(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """The kept score beside the reference's, relative; a plan's rounding may change a block's mask."""
    pattern, blocks = half(m), blocks_of_a_program("tsenor", m)
    scores = scores_of(m, dtype, blocks)
    settings = {"iterations": 45, "tau": 50.0}
    mask = gpu.tsenor(scores, pattern, **settings)
    oracles.check_mask_counts(mask, pattern.n, m)
    theirs = reference.tsenor(scores, pattern, **settings)
    return blocks, abs(float(scores[mask].double().sum() / scores[theirs].double().sum()) - 1)


def ordinary(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """Groups down the columns."""
    return groups_of(oracles.sample("ties", (1, 8 * m, 8), seed=m, dtype=dtype).mT, m)


def whole_groups(m: int, dtype: torch.dtype) -> tuple[int, float]:
    return groups_of(oracles.sample("ties", (1, 9, 8 * m), seed=m, dtype=dtype), m)


def groups_of(scores: Tensor, m: int) -> tuple[int, float]:
    differ = gpu.ordinary(scores, half(m)) != reference.ordinary(scores, half(m))
    return scores.numel() // m, float(differ.sum())


def assignment(m: int, dtype: torch.dtype) -> tuple[int, float]:
    scores = oracles.sample("signed", (2, m, m), seed=m, dtype=dtype)
    found = nmsolve.assignment(scores, return_solution=True, backend="triton").permutation
    assert torch.equal(found.sort(-1).values, torch.arange(m).expand_as(found))
    best = nmsolve.assignment(scores.double(), return_solution=True, backend="torch").objective
    kept = scores.double().gather(2, found.unsqueeze(2)).sum((1, 2))
    return 2, relative(best - kept, scores.double().abs().sum((1, 2)))


def logits_of(m: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(3, m, m, generator=torch.Generator().manual_seed(m)).to(dtype)


def sinkhorn(m: int, dtype: torch.dtype, **options: Any) -> tuple[int, float]:
    plan = nmsolve.sinkhorn(logits_of(m, dtype), 0.4, 6, backend="triton", **options)
    theirs = nmsolve.sinkhorn(logits_of(m, dtype).double(), 0.4, 6, backend="torch", **options)
    return 3, float((plan - theirs).abs().max())


def sinkhorn_training(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """The plan, with what the backward pass needs kept."""
    plan = nmsolve.sinkhorn(logits_of(m, dtype).requires_grad_(True), 0.4, 6, backend="triton")
    return 3, float(
        (plan - nmsolve.sinkhorn(logits_of(m, dtype).double(), 0.4, 6, backend="torch")).abs().max()
    )


def sinkhorn_backward(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """The gradient, relative to its largest entry."""
    ours = logits_of(m, dtype).requires_grad_(True)
    wide = logits_of(m, dtype).double().requires_grad_(True)
    nmsolve.sinkhorn(ours, 0.4, 6, backend="triton").square().sum().backward()
    nmsolve.sinkhorn(wide, 0.4, 6, backend="torch").square().sum().backward()
    return 3, float((ours.grad - wide.grad).abs().max() / wide.grad.abs().max())


def columns_of(m: int, rows: int, dtype: torch.dtype) -> Tensor:
    return oracles.sample("signed", (m, rows), seed=m, dtype=dtype)


def sum_maxima(m: int, dtype: torch.dtype, *, batch: int = 2, rows: int | None = None) -> tuple[int, float]:
    """16 m rows, more groups than columns, relative to the sum of the larger sizes."""
    columns = columns_of(3 * m, rows or 16 * m, dtype)
    index = torch.arange(batch * (m + 1)).view(batch, -1) % (3 * m)
    thresholds = columns[torch.arange(batch * (m + 6)).view(batch, -1) % (2 * m)]
    found = gpu_permute.sum_maxima(thresholds, columns, index)
    pairs = torch.stack(torch.broadcast_tensors(thresholds[:, :, None], columns[index][:, None])).double()
    return batch, relative(found - pairs.amax(0).sum(-1), pairs.abs().amax(0).sum(-1))


def nth_largest(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """Of m - 1 columns, as in groups of m."""
    columns = columns_of(m + 3, 528, dtype)
    generator = torch.Generator().manual_seed(m)
    groups = torch.stack([torch.randperm(m + 3, generator=generator)[: m - 1] for _ in range(3)])
    n = m // 2
    differ = gpu_permute.nth_largest(columns, groups, n) != reference_permutations.nth_largest(
        columns, groups, n
    )
    return 3, float(differ.sum())


def sum_largest(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """All ways of dealing two groups' columns; relative to the sum of their sizes."""
    columns = columns_of(2 * m + 3, 272, dtype)
    members = torch.stack(
        [torch.randperm(2 * m + 3, generator=torch.Generator().manual_seed(m))[: 2 * m]] * 2
    )
    subsets, n = torch.combinations(torch.arange(2 * m), m), max(1, m // 2)
    found = gpu_permute.sum_largest(columns, members, subsets, n)
    expected = reference_permutations.sum_largest(columns, members, subsets, n)
    return 2, relative(found - expected, columns[members].abs().double().sum((1, 2))[:, None])


def permute_columns(m: int, dtype: torch.dtype) -> tuple[int, float]:
    x = torch.randn(3, 9 * m, generator=torch.Generator().manual_seed(m)).to(dtype)
    order = torch.randperm(9 * m, generator=torch.Generator().manual_seed(m))
    found = nmsolve.permute_columns(x, order, backend="triton")
    return 1, float((found != x[:, order]).sum())


def norm_permute(m: int, dtype: torch.dtype) -> tuple[int, float]:
    x = torch.randn(3, 9 * m, generator=torch.Generator().manual_seed(m)).to(dtype)
    order = torch.randperm(9 * m, generator=torch.Generator().manual_seed(m))
    found = nmsolve.rms_norm_permute(x, torch.ones(9 * m, dtype=dtype), order, backend="triton")
    wide = rms_norm(x.double(), (9 * m,), eps=1e-6)[:, order]
    return 1, float((found - wide).abs().max())


def hierarchical(m: int, dtype: torch.dtype) -> tuple[int, float]:
    """What strips of 16 rows keep of a group, beside the reference."""
    scores = oracles.sample("student_t", (16, 2 * m), seed=m, dtype=dtype)
    found, best = (
        nmsolve.hierarchical_mask(scores, (16, 2, m), backend=name, return_solution=True)
        for name in ("triton", "torch")
    )
    nmsolve.check_hierarchical_mask(found.mask, (16, 2, m))
    assert found.max_gap == 0
    return 2, relative(best.objective - found.objective, best.scale)


SOLVED = (*SIZES, *BETWEEN)
PARTIAL = tuple(m for m in SOLVED if m > 1)  # a block of one entry has no part
LARGER = tuple(m for m in SOLVED if m != 4)  # blocks of 4 are solved exhaustively
PLANS = (*SIZES, 3, 20, 128)
GROUPS = (8, 16, 32, 64, 6, 20)
NOT_WIDE = FLOATS[:3]
WIDE = (torch.float32, torch.float64)
VARIANTS = {
    "exhaustive": Variant("exhaustive_kernel", exact_mask, EXACT, (4,)),
    "exact": Variant("exact_kernel", exact_mask, EXACT, LARGER),
    "exact, solution": Variant("exact_kernel", exact_solution, EXACT, SOLVED),
    "exact, warm": Variant("exact_kernel", exact_warm, EXACT, SOLVED),
    "exact, edge": Variant("exact_kernel", exact_edge, EXACT, PARTIAL),
    "exact, edge, solution": Variant("exact_kernel", exact_edge_solution, EXACT, PARTIAL),
    "exhaustive, many matrices": Variant(
        "grouped_exhaustive_kernel", lambda m, dtype: grouped(m, dtype, want_solution=False), EXACT, (4,)
    ),
    "exact, many matrices": Variant(
        "grouped_kernel", lambda m, dtype: grouped(m, dtype, want_solution=False), EXACT, LARGER
    ),
    "exact, many matrices, solution": Variant(
        "grouped_kernel", lambda m, dtype: grouped(m, dtype, want_solution=True), EXACT, SOLVED
    ),
    "assignment": Variant("exact_kernel", assignment, EXACT, LARGER),
    "greedy": Variant("dykstra_kernel", greedy, SAME, SOLVED),
    "greedy, edge": Variant("dykstra_kernel", greedy_edge, SAME, PARTIAL),
    "tsenor": Variant("dykstra_kernel", tsenor, 2e-3, SOLVED, noisy=2e-3),
    "nm": Variant("nm_kernel", ordinary, SAME, SOLVED),
    "nm, whole groups": Variant("nm_groups_kernel", whole_groups, SAME, (4, 8, 16, 32)),
    "hierarchical": Variant("strips_kernel", hierarchical, EXACT, GROUPS),
    "sinkhorn, forward": Variant(
        "sinkhorn_forward_kernel", sinkhorn, 5e-6, PLANS, noisy=2e-5, dtypes=NOT_WIDE
    ),
    "sinkhorn, tolerance": Variant(
        "sinkhorn_forward_kernel", lambda m, dtype: sinkhorn(m, dtype, tolerance=1e-3), 5e-6, PLANS,
        noisy=2e-5, dtypes=NOT_WIDE,
    ),
    "sinkhorn, training": Variant(
        "sinkhorn_forward_kernel", sinkhorn_training, 5e-6, PLANS, noisy=2e-5, dtypes=NOT_WIDE
    ),
    "sinkhorn, backward": Variant(
        "sinkhorn_backward_kernel", sinkhorn_backward, 2e-5, PLANS, noisy=1e-4, ulps=2, dtypes=NOT_WIDE
    ),
    "sum_maxima": Variant("sum_maxima_kernel", sum_maxima, 2e-7, (7, 64), dtypes=WIDE),
    "add_parts": Variant(
        "add_parts_kernel", lambda m, dtype: sum_maxima(m, dtype, batch=1, rows=2064), 2e-7, (7,), dtypes=WIDE
    ),
    "nth_largest": Variant("nth_largest_kernel", nth_largest, SAME, (4, 2, 8, 13, 32), dtypes=WIDE),
    "sum_largest": Variant("sum_largest_kernel", sum_largest, 2e-7, (4, 2, 3), dtypes=WIDE),
    "permute_columns": Variant("permute_columns_kernel", permute_columns, SAME, (64, 7)),
    "rms_norm_permute": Variant(
        "permute_columns_kernel", norm_permute, 2e-6, (64, 7), noisy=2e-5, ulps=8, dtypes=NOT_WIDE
    ),
}  # fmt: skip


def cases() -> Iterator[Any]:
    """A variant's first size in float32; all others are slow."""
    for name, variant in VARIANTS.items():
        for m in variant.sizes:
            marks = () if m == variant.sizes[0] else (pytest.mark.slow,)
            yield pytest.param(name, m, torch.float32, id=f"{name}-{m}-float32", marks=marks)
    for name in ("exact", "exact, solution"):
        for m in (32, 64):
            for dtype in FLOATS[1:]:
                kind = str(dtype).removeprefix("torch.")
                yield pytest.param(name, m, dtype, id=f"{name}-{m}-{kind}", marks=pytest.mark.slow)


def measured(name: str, m: int, dtype: torch.dtype) -> dict[str, Any]:
    """What is executed, and how much its result differs: a row of bench/results/emulator.csv."""
    variant = VARIANTS[name]
    emulator.LAUNCHES.clear()
    blocks, worst = variant.differ(m, dtype)
    launches = [run for run in emulator.LAUNCHES if run.kernel.program.name == variant.kernel]
    (digest,) = {run.kernel.program.digest for run in launches}
    instructions = sum(run.instructions for run in launches)
    return {
        "variant": name, "kernel": variant.kernel, "m": m, "dtype": str(dtype).removeprefix("torch."),
        "target": f"sm_{os.environ['NMSOLVE_PTX_SM']}", "blocks": blocks,
        "ctas": sum(run.ctas for run in launches), "warps": launches[0].kernel.program.threads // 32,
        "warp_instructions_per_block": instructions / blocks,
        "worst_difference": worst, "allowed_difference": variant.within(dtype), "races": 0,
        "same_value_stores": sum(run.memory.same_stores + run.same_shared_stores for run in launches),
        "diverged": sum(sum(run.diverged.values()) for run in launches),
        "divisions_by_zero": sum(run.divisions_by_zero for run in launches), "ptx": digest,
    }  # fmt: skip


def check(name: str, m: int, dtype: torch.dtype, allowed: float) -> None:
    """What differs is not more than ``allowed``."""
    found = measured(name, m, dtype)
    assert found["warp_instructions_per_block"] > 0
    assert found["worst_difference"] <= allowed


@pytest.mark.parametrize(("name", "m", "dtype"), list(cases()))
def test_variant(name: str, m: int, dtype: torch.dtype) -> None:
    check(name, m, dtype, VARIANTS[name].within(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", VARIANTS)
def test_warps_in_random_order(name: str, seed: int, monkeypatch) -> None:
    """Also where a block lies in several warps: tiles of 64."""
    monkeypatch.setattr(emulator.SETTINGS, "seed", seed)
    sizes = VARIANTS[name].sizes
    for m in {sizes[0], 64 if 64 in sizes else sizes[0]} if seed == 1 else (sizes[0],):
        check(name, m, torch.float32, VARIANTS[name].allowed)


@pytest.mark.slow
@pytest.mark.parametrize("m", [4, 8, 16])
@pytest.mark.parametrize("name", VARIANTS)
def test_approximate_instructions_that_err(name: str, m: int, monkeypatch) -> None:
    """By what NVIDIA allows them to, and products and sums rounded once: exact stays exact."""
    variant = VARIANTS[name]
    if m not in variant.sizes:
        pytest.skip("not a size of this variant")
    monkeypatch.setattr(emulator.Noise, "on", True)
    monkeypatch.setattr(emulator.SETTINGS, "contracted", True)
    check(name, m, torch.float32, variant.noisy or variant.allowed)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [4, 8])
def test_scores_that_the_public_functions_refuse(m: int, value: float, monkeypatch) -> None:
    """Every launcher ends on them; tests/kernels/any_bits.py has more of the kind."""
    monkeypatch.setattr(emulator.SETTINGS, "most_steps", 20_000)
    pattern = NMPattern(m // 2, m)
    scores = scores_of(m, torch.float32, 2)
    scores[0, 1, 2] = value
    gpu.exact(scores, pattern)
    gpu.exact(scores, pattern, want_solution=True)
    gpu.tsenor(scores, pattern, iterations=25, tau=50.0)
    gpu.ordinary(scores, pattern)
    gpu.greedy(scores, pattern)
