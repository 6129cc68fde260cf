"""What is timed: the rows of the cost table, each as a call of the Triton backend on tensors of this machine.

``CASES`` has the names of bench/results/kernel_costs.csv, so that a time stands beside its prediction. Every
case also says whether what it computed is right; a wrong one is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nmsolve
from gpu_day.setting import Setting
from nmsolve.backends.torch import masks as reference
from nmsolve.backends.torch import permutations as reference_permutations
from nmsolve.backends.torch import strips as reference_strips
from nmsolve.backends.triton import masks as gpu
from nmsolve.backends.triton import permutations as gpu_permute
from nmsolve.backends.triton import strips as gpu_strips
from nmsolve.pattern import NMPattern

TEMPERATURE, ITERATIONS, EPS = 0.1, 20, 1e-6
MATRICES = 64
"""That a group has."""
SAMPLE = 64
"""Blocks that are compared with the reference."""
WINDOW = 512
"""Groups whose columns change places with each other."""
STRIPES = 256
"""Groups of which every pair is dealt anew."""
STRIPS = 4
"""Of hierarchical masks, whose reference is slow."""


class Prepared(NamedTuple):
    """One input, ready to be solved."""

    call: Callable[[], Any]
    moved: int
    """Bytes of what is read and written once."""
    wrong: Callable[[Any], str]
    """What is wrong with a result; empty if nothing."""


class Case(NamedTuple):
    """One kernel in one size; ``prepare(setting, m, dtype, side, seed)`` makes an input."""

    kernel: str
    sizes: Callable[[Setting], Iterable[int]]
    prepare: Callable[[Setting, int, torch.dtype, int, int], Prepared]


def size_of(*groups: Any) -> int:
    """Bytes of all tensors."""
    total = 0
    for group in groups:
        if isinstance(group, Tensor):
            total += group.numel() * group.element_size()
        elif isinstance(group, tuple | list):
            total += size_of(*group)
    return total


def normal(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """|N(0, 1)|, made on the device."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=setting.device).abs().to(dtype)


# --- masks --------------------------------------------------------------------------------------------------


def wrong_counts(mask: Tensor, pattern: NMPattern) -> str:
    """Whether each line of a ``(1, rows, cols)`` mask's full blocks holds n."""
    m = pattern.m
    rows, cols = (extent // m * m for extent in mask.shape[1:])
    blocks = mask[:, :rows, :cols].unflatten(2, (-1, m)).unflatten(1, (-1, m))
    for dim, lines in ((2, "columns"), (4, "rows")):
        off = int((blocks.sum(dim) != pattern.n).sum()) if blocks.numel() else 0
        if off:
            return f"{off} {lines} do not hold {pattern.n}"
    return ""


def sampled(scores: Tensor, m: int) -> tuple[slice, slice]:
    """The first blocks of the first rows of blocks: what is compared."""
    across = max(1, min(SAMPLE, scores.shape[2] // m))
    return slice(0, min(m, scores.shape[1])), slice(0, across * m)


def wrong_objective(scores: Tensor, mask: Tensor, pattern: NMPattern, below: float | None) -> str:
    """Whether the first blocks keep the reference's optimum in float64: each, or in all but for ``below``."""
    rows, cols = sampled(scores, pattern.m)
    part = scores[:1, rows, cols].cpu().double()
    best = reference.exact(part, pattern, want_solution=True).objective
    kept, size = reference.kept_score(part, mask[:1, rows, cols].cpu(), pattern)
    if below is None:
        worst = float(((best - kept) / size.clamp(min=1e-300)).max())
        return f"keeps {worst:.2g} of a block less than the optimum" if not worst <= 1e-6 else ""
    lost = float((best - kept).sum() / size.sum())
    return f"keeps {lost:.2g} less than the optimum" if not lost <= below else ""


def mask_case(
    solve: Callable[..., Any], *, below: float | None = None, edge: bool = False
) -> Callable[[Setting, int, torch.dtype, int, int], Prepared]:
    """``solve(scores, pattern, setting)`` on a square matrix, or on as many partial blocks."""

    def prepare(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
        pattern = NMPattern(m // 2, m)
        shape = (1, m - 1, side * side // m) if edge else (1, side, side)
        scores = normal(setting, shape, dtype, seed)

        def wrong(result: Any) -> str:
            mask = result if isinstance(result, Tensor) else result.mask
            return wrong_counts(mask, pattern) or wrong_objective(scores, mask, pattern, below)

        call = lambda: solve(scores, pattern, setting)  # noqa: E731
        return Prepared(call, size_of(scores, tuple_of(call())), wrong)

    return prepare


def tuple_of(result: Any) -> Any:
    return tuple(result) if isinstance(result, tuple | list) else result


def many_matrices(*, want_solution: bool) -> Callable[[Setting, int, torch.dtype, int, int], Prepared]:
    """The matrix cut into a group of matrices."""

    def prepare(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
        pattern = NMPattern(m // 2, m)
        scores = normal(setting, (1, side, side), dtype, seed)
        height = max(m, side // MATRICES)
        matrices = [matrix.contiguous() for matrix in scores.split(height, 1)]

        def wrong(results: Any) -> str:
            for result in results:
                fault = wrong_counts(result.mask, pattern)
                if fault:
                    return fault
            return wrong_objective(matrices[0], results[0].mask, pattern, None)

        call = lambda: gpu.exact_group(matrices, pattern, want_solution=want_solution)  # noqa: E731
        moved = size_of(matrices, *(tuple(result) for result in call()))
        return Prepared(call, moved, wrong)

    return prepare


def ordinary(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    """Groups down the columns of the matrix, which no lane can read in one word."""
    return groups(normal(setting, (1, side, side), dtype, seed).mT, m)


def whole_groups(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    return groups(normal(setting, (1, side, side // m * m), dtype, seed), m)


def groups(scores: Tensor, m: int) -> Prepared:
    pattern = NMPattern(m // 2, m)

    def wrong(mask: Tensor) -> str:
        part = slice(0, 16)
        theirs = reference.ordinary(scores[:, part].cpu(), pattern)
        off = int((mask[:, part].cpu() != theirs).sum())
        return f"{off} entries differ from the reference's" if off else ""

    return Prepared(lambda: gpu.ordinary(scores, pattern), size_of(scores) + scores.numel(), wrong)


def hierarchical(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    """Strips of 64 rows that keep 2 of 4 columns of each m, to the end of the search."""
    v = min(64, side)
    blocks = normal(setting, (max(1, side * side // (v * m)), m, v), dtype, seed).double()

    def kept(part: Tensor, chosen: Tensor) -> Tensor:
        held = part.gather(1, chosen.unsqueeze(2).expand(-1, -1, v))
        return held.topk(2, dim=1).values.sum((1, 2))

    def wrong(result: tuple[Tensor, Tensor]) -> str:
        part = blocks[:STRIPS].cpu()
        best = kept(part, reference_strips.best_columns(part, 2, 4, 1 << 18)[0])
        worst = float(((best - kept(part, result[0][:STRIPS].cpu())).abs() / best).max())
        return f"keeps {worst:.2g} less or more than the reference's columns" if worst > 1e-12 else ""

    call = lambda: gpu_strips.best_columns(blocks, 2, 4, 1 << 18)  # noqa: E731
    return Prepared(call, size_of(blocks, call()), wrong)


# --- permutations -------------------------------------------------------------------------------------------


def assignment(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    scores = normal(setting, (side * side // m**2, m, m), dtype, seed)

    def wrong(result: tuple[Tensor, ...]) -> str:
        columns = result[0][:SAMPLE].cpu()
        if not torch.equal(columns.sort(1).values, torch.arange(m).expand_as(columns).to(columns)):
            return "columns are no permutation"
        part = scores[:SAMPLE].cpu().double()
        best = nmsolve.assignment(part, return_solution=True, backend="torch").objective
        kept = part.gather(2, columns.long().unsqueeze(2)).sum((1, 2))
        worst = float(((best - kept) / part.sum((1, 2))).max())
        return f"keeps {worst:.2g} of a matrix less than the optimum" if worst > 1e-6 else ""

    call = lambda: gpu_permute.assignment(scores, False)  # noqa: E731
    return Prepared(call, size_of(scores, tuple_of(call())), wrong)


class Plans(NamedTuple):
    """What the kernels of Sinkhorn's iteration take."""

    logits: Tensor
    ones: Tensor

    @staticmethod
    def of(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Plans:
        logits = normal(setting, (side * side // m**2, m, m), dtype, seed)
        return Plans(logits, torch.ones(len(logits), m, device=setting.device))

    def forward(self, keep: bool) -> tuple[Tensor, ...]:
        return gpu_permute.sinkhorn_forward(
            self.logits, self.ones, self.ones, TEMPERATURE, ITERATIONS, -1.0, keep
        )

    def theirs(self) -> tuple[Tensor, ...]:
        """The reference's forward of the first blocks, in float64."""
        part, ones = self.logits[:SAMPLE].cpu().double(), self.ones[:SAMPLE].cpu().double()
        return reference_permutations.sinkhorn_forward(part, ones, ones, TEMPERATURE, ITERATIONS, -1.0, True)


def sinkhorn(*, keep: bool) -> Callable[[Setting, int, torch.dtype, int, int], Prepared]:
    def prepare(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
        plans = Plans.of(setting, m, dtype, side, seed)

        def wrong(result: tuple[Tensor, ...]) -> str:
            off = float((result[0][:SAMPLE].cpu() - plans.theirs()[0]).abs().max())
            return f"plans differ by {off:.2g} from the reference's" if not off < 2e-5 else ""

        call = lambda: plans.forward(keep)  # noqa: E731
        return Prepared(call, size_of(tuple(plans), call()), wrong)

    return prepare


def sinkhorn_backward(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    plans = Plans.of(setting, m, dtype, side, seed)
    _, *kept = plans.forward(True)
    gradient = normal(setting, tuple(plans.logits.shape), torch.float32, seed + 1)

    def wrong(result: Tensor) -> str:
        _, *theirs = plans.theirs()
        ones = plans.ones[:SAMPLE].cpu().double()
        logits, pull = plans.logits[:SAMPLE].cpu().double(), gradient[:SAMPLE].cpu().double()
        expected = reference_permutations.sinkhorn_backward(pull, logits, ones, ones, *theirs, TEMPERATURE)
        off = float((result[:SAMPLE].cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        allowed = 2e-4 + 2 * torch.finfo(dtype).eps
        return f"gradients differ by {off:.2g} from the reference's" if not off < allowed else ""

    def call() -> Tensor:
        return gpu_permute.sinkhorn_backward(
            gradient, plans.logits, plans.ones, plans.ones, *kept, TEMPERATURE
        )

    return Prepared(call, size_of(gradient, tuple(plans), kept, call()), wrong)


def gather(*, norm: bool) -> Callable[[Setting, int, torch.dtype, int, int], Prepared]:
    def prepare(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
        x = normal(setting, (side, side), dtype, seed)
        order = torch.randperm(side, generator=torch.Generator().manual_seed(seed)).to(setting.device)
        weight = torch.ones(side, dtype=dtype, device=setting.device)

        def wrong(result: Tensor) -> str:
            theirs = x[:64].double()
            if norm:
                theirs = theirs * (theirs.square().mean(1, keepdim=True) + EPS).rsqrt()
            off = float((result[:64].double() - theirs[:, order]).abs().max())
            allowed = 8 * torch.finfo(dtype).eps if norm else 0.0
            return f"differs by {off:.2g} from PyTorch's" if off > allowed else ""

        def call() -> Tensor:
            if norm:
                return gpu_permute.rms_norm_permute(x, weight, order, EPS)
            return gpu_permute.permute_columns(x, order)

        return Prepared(call, 2 * size_of(x), wrong)

    return prepare


def columns_of(setting: Setting, dtype: torch.dtype, side: int, seed: int) -> Tensor:
    """As a search for orders holds a matrix: a column behind the other, widened."""
    return normal(setting, (side, side), dtype, seed).float()


def nth_largest(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    """Of all columns of every group but one."""
    columns = columns_of(setting, dtype, side, seed)
    groups = torch.arange(side // m * m, device=setting.device).view(-1, m)[:, 1:].contiguous()

    def wrong(result: Tensor) -> str:
        theirs = columns[groups[:SAMPLE]].sort(1, descending=True).values[:, m // 2 - 1]
        off = int((result[:SAMPLE] != theirs).sum())
        return f"{off} differ from PyTorch's" if off else ""

    call = lambda: gpu_permute.nth_largest(columns, groups, m // 2)  # noqa: E731
    return Prepared(call, size_of(columns, groups), wrong)


def sum_largest(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    """All ways of dealing the columns of every pair of groups, in windows of at most 256 groups."""
    columns = columns_of(setting, dtype, side, seed)
    groups = torch.arange(side // m * m, device=setting.device).view(-1, m).split(STRIPES)
    pairs = [torch.combinations(torch.arange(len(some), device=setting.device)) for some in groups]
    members = torch.cat([some[pair].flatten(1) for some, pair in zip(groups, pairs, strict=True)])
    subsets = torch.combinations(torch.arange(2 * m, device=setting.device), m)

    def wrong(result: Tensor) -> str:
        largest = columns[members[:STRIPS]][:, subsets].topk(m // 2, dim=2).values
        theirs = largest.sum((2, 3), dtype=torch.float64)
        off = float(((result[:STRIPS] - theirs) / theirs).abs().max())
        return f"differ by {off:.2g} from PyTorch's" if not off < 1e-6 else ""

    call = lambda: gpu_permute.sum_largest(columns, members, subsets, m // 2)  # noqa: E731
    return Prepared(call, size_of(columns, members, call()), wrong)


def sum_maxima(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    """One slot of 2:4, in windows of at most 512 groups; the parts of the rows are added up, too."""
    columns = columns_of(setting, dtype, side, seed)
    groups = min(WINDOW, side // 4)
    index = torch.arange(side // 4, device=setting.device).view(-1, groups)
    thresholds = columns[index + side // 2]

    def wrong(result: Tensor) -> str:
        theirs = torch.maximum(thresholds[-1, :SAMPLE, None], columns[index[-1, -SAMPLE:]]).double().sum(2)
        off = float(((result[-1, :SAMPLE, -SAMPLE:] - theirs) / theirs).abs().max())
        return f"differ by {off:.2g} from PyTorch's" if not off < 1e-6 else ""

    call = lambda: gpu_permute.sum_maxima(thresholds, columns, index)  # noqa: E731
    return Prepared(call, size_of(thresholds, index, call()) + size_of(thresholds), wrong)


def add_parts(setting: Setting, m: int, dtype: torch.dtype, side: int, seed: int) -> Prepared:
    """What as many sums of maxima are made of."""
    parts = max(2, side // 1024)
    sums = normal(setting, (parts, side * side // 64), dtype, seed).float()

    def wrong(result: Tensor) -> str:
        off = float((result - sums.double().sum(0)).abs().max())
        return f"differ by {off:.2g} from PyTorch's" if not off < 1e-12 else ""

    call = lambda: gpu_permute.add_parts(sums)  # noqa: E731
    return Prepared(call, size_of(sums, call()), wrong)


# --- the table ----------------------------------------------------------------------------------------------


def four(setting: Setting) -> tuple[int, ...]:
    return (4,)


def every(setting: Setting) -> tuple[int, ...]:
    return setting.sizes


def up_to_32(setting: Setting) -> tuple[int, ...]:
    return tuple(m for m in setting.sizes if m <= 32)


def larger(setting: Setting) -> tuple[int, ...]:
    return setting.sizes[1:]


def plan_sizes(setting: Setting) -> tuple[int, ...]:
    return setting.sinkhorn_sizes


def no_blocks(setting: Setting) -> tuple[int, ...]:
    return (0,)


def exact(scores: Tensor, pattern: NMPattern, setting: Setting) -> Any:
    return gpu.exact(scores, pattern).mask


def solution(scores: Tensor, pattern: NMPattern, setting: Setting) -> Any:
    return gpu.exact(scores, pattern, want_solution=True)


def greedy(scores: Tensor, pattern: NMPattern, setting: Setting) -> Any:
    return gpu.greedy(scores, pattern)


def tsenor(scores: Tensor, pattern: NMPattern, setting: Setting) -> Any:
    return gpu.tsenor(scores, pattern, **setting.tsenor)


CASES = (
    Case("exact, exhaustive", four, mask_case(exact)),
    Case("exact", larger, mask_case(exact)),
    Case("tsenor", every, mask_case(tsenor, below=0.05)),
    Case("greedy", every, mask_case(greedy, below=0.05)),
    Case("nm", every, ordinary),
    Case("nm, whole groups", up_to_32, whole_groups),
    Case("hierarchical", larger, hierarchical),
    Case("exact, solution", every, mask_case(solution)),
    Case("sinkhorn, forward", plan_sizes, sinkhorn(keep=False)),
    Case("sinkhorn, training", plan_sizes, sinkhorn(keep=True)),
    Case("sinkhorn, backward", plan_sizes, sinkhorn_backward),
    Case("nth_largest", up_to_32, nth_largest),
    Case("sum_largest", four, sum_largest),
    Case("sum_maxima", no_blocks, sum_maxima),
    Case("add_parts", no_blocks, add_parts),
    Case("permute_columns", no_blocks, gather(norm=False)),
    Case("rms_norm_permute", no_blocks, gather(norm=True)),
    Case("assignment", larger, assignment),
    Case("exact, exhaustive, many matrices", four, many_matrices(want_solution=False)),
    Case("exact, many matrices", larger, many_matrices(want_solution=False)),
    Case("exact, edge", every, mask_case(exact, edge=True)),
    Case("exact, edge, solution", every, mask_case(solution, edge=True)),
)


class Job(NamedTuple):
    """A case in one size and dtype."""

    case: Case
    m: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.case.kernel}, M = {self.m or '-'}, {self.dtype}"

    def prepare(self, setting: Setting, side: int, seed: int) -> Prepared:
        return self.case.prepare(setting, self.m, getattr(torch, self.dtype), side, seed)


def jobs(setting: Setting) -> Iterator[Job]:
    """float32 first: what an early end leaves out is the rest."""
    for dtype in ("float32", "bfloat16"):
        for case in CASES:
            for m in case.sizes(setting):
                yield Job(case, m, dtype)
