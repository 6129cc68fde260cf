"""Every kernel against the float64 oracle on a real GPU: ``make test-gpu``.

The oracle (the backend "torch") runs on the CPU. Masks of tied optima may differ, so objectives are
compared; greedy and ordinary masks are unique and have to be equal, and a group's results are those of each
matrix alone bit for bit.

Without a GPU, ``NMSOLVE_GPU_TESTS_ON_INTERPRETER=1 pytest -m gpu tests/kernels/test_gpu.py`` runs all that
does not ask CUDA for something, on smaller CPU tensors in the interpreter, so that few lines of this file
are run for the first time on a machine that has a GPU. The default suite runs a few of these tests in this
way. ``NMSOLVE_PTX_SM=90`` (or 80, 100) in its place runs the same on what is compiled for that target, in an
emulator of PTX (docs/internals/emulator.md).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import oracles
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

import nmsolve
from nmsolve.backends.torch import masks as reference
from nmsolve.pattern import NMPattern

gpu = pytest.importorskip("nmsolve.backends.triton.masks")
gpu_permute = pytest.importorskip("nmsolve.backends.triton.permutations")

EMULATED = bool(os.environ.get("NMSOLVE_PTX_SM"))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_CPU = INTERPRETED or EMULATED
DEFAULT = INTERPRETED and os.environ.get("NMSOLVE_GPU_TESTS_ON_INTERPRETER") != "1"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")

pytestmark = (
    []
    if DEFAULT
    else [
        pytest.mark.gpu,
        pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason="there is no GPU"),
    ]
)


def cuda_only(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(ON_CPU, reason="asks CUDA, not a kernel")(test))


def cases(every: Sequence[Any], default: Sequence[Any] = (), *, names: int = 1) -> list[Any]:
    """Parameters of a test; in the default suite all but the ``default`` ones are left out as GPU tests."""
    if not DEFAULT:
        return list(every)
    return [
        case if case in default else pytest.param(*(case if names > 1 else (case,)), marks=pytest.mark.gpu)
        for case in every
    ]


def sized(on_gpu: int, interpreted: int) -> int:
    return interpreted if ON_CPU else on_gpu


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATTERNS = ((2, 4), (1, 4), (4, 8), (5, 12), (8, 16), (3, 16), (10, 24), (16, 32), (32, 64), (60, 64), (1, 2))


def check_exact(scores: Tensor, n: int, m: int, warm: tuple[Tensor, Tensor] | None = None) -> Any:
    """Counts, certificate, and the oracle's objective, for ``(batch, rows, cols)`` scores on the GPU."""
    pattern = NMPattern(n, m)
    result = gpu.exact(scores, pattern, warm=warm, want_solution=True)
    for output in result:
        assert output.device == scores.device
    host = scores.cpu().double()
    mask = result.mask.cpu()
    oracles.check_mask_counts(mask, n, m)
    expected = reference.exact(host, pattern, want_solution=True).objective
    objective, size = reference.kept_score(host, mask, pattern)
    bound = reference.dual_bound(host, result.row_duals.cpu(), result.col_duals.cpu(), pattern)
    size = size.clamp(min=torch.finfo(torch.float64).tiny)
    assert ((expected - objective).abs() <= 1e-6 * size).all()
    assert ((result.objective.cpu() - objective).abs() <= 1e-12 * size).all()
    assert ((result.bound.cpu() - bound).abs() <= 1e-11 * size).all()
    assert ((bound - objective) >= -1e-12 * size).all()
    assert ((bound - objective) <= 1e-6 * size).all()
    if warm is None:  # the mask alone
        mask = gpu.exact(scores, pattern).mask.cpu()
        oracles.check_mask_counts(mask, n, m)
        objective, _ = reference.kept_score(host, mask, pattern)
        assert ((expected - objective).abs() <= 1e-6 * size).all()
    return result


def assert_same(results: Sequence[Any], others: Sequence[Any]) -> None:
    """The same tensors, bit for bit."""
    for mine, theirs in zip(results, others, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


# --- the exact kernel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(sorted(oracles.distributions), ("normal", "ties")))
@pytest.mark.parametrize(("n", "m"), cases(PATTERNS, ((2, 4),), names=2))
def test_exact(name: str, n: int, m: int) -> None:
    shape = (1, sized(4, 1) * m, sized(8, 2) * m)
    check_exact(oracles.sample(name, shape, seed=1).to(DEVICE), n, m)


@pytest.mark.parametrize("dtype", cases(DTYPES, (torch.bfloat16,)))
@pytest.mark.parametrize(("n", "m"), cases(PATTERNS, ((4, 8),), names=2))
@pytest.mark.parametrize("partial", [False, True])
def test_exact_dtypes(dtype: torch.dtype, n: int, m: int, partial: bool) -> None:
    down, across = sized(3, 1) * m, sized(5, 1) * m
    shape = (2, down + m // 2, across + 1) if partial else (2, down, across)
    check_exact(oracles.sample("student_t", shape, seed=2, dtype=dtype).to(DEVICE), n, m)


@pytest.mark.parametrize(
    ("rows", "cols"), cases([(1, 1), (3, 70), (70, 3), (63, 65), (17, 16), (16, 17)], ((1, 1),), names=2)
)
@pytest.mark.parametrize(("n", "m"), cases(PATTERNS, ((2, 4),), names=2))
def test_exact_edges(rows: int, cols: int, n: int, m: int) -> None:
    check_exact(oracles.sample("signed", (sized(2, 1), rows, cols), seed=3).to(DEVICE), n, m)


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, 3:90:2, 1:],
    "batch inside": lambda x: x.transpose(0, 1),
    "one row repeated": lambda x: x[:, :1].expand(-1, 40, -1),
}


@pytest.mark.parametrize("view", cases(sorted(VIEWS)))
@pytest.mark.parametrize(("n", "m"), cases([(2, 4), (8, 16), (32, 64)], names=2))
def test_strides(view: str, n: int, m: int) -> None:
    base = oracles.sample("normal", (sized(64, 3), sized(96, 24), sized(80, 20)), seed=4)
    scores = VIEWS[view](base.to(DEVICE))
    check_exact(scores, n, m)
    pattern = NMPattern(n, m)
    copy = scores.contiguous()
    assert torch.equal(gpu.exact(scores, pattern).mask, gpu.exact(copy, pattern).mask)
    assert torch.equal(gpu.greedy(scores, pattern), gpu.greedy(copy, pattern))
    assert torch.equal(gpu.ordinary(scores, pattern), gpu.ordinary(copy, pattern))


@pytest.mark.parametrize(("n", "m"), cases(PATTERNS, names=2))
def test_warm_start(n: int, m: int) -> None:
    scores = oracles.sample("normal", (1, m + 1, sized(4, 1) * m), seed=5).to(DEVICE)
    first = check_exact(scores, n, m)
    for row_duals, col_duals in (
        (first.row_duals, first.col_duals),
        (torch.zeros_like(first.row_duals), torch.full_like(first.col_duals, 1e30)),
        (first.row_duals.mT.contiguous().mT, first.col_duals.bfloat16()),
    ):
        check_exact(scores, n, m, warm=(row_duals, col_duals))


def test_results_do_not_depend_on_the_batch_and_repeat() -> None:
    scores = oracles.sample("bfloat16_ties", (sized(37, 5), 16, sized(48, 16)), seed=9).to(DEVICE)
    pattern = NMPattern(8, 16)
    together = gpu.exact(scores, pattern, want_solution=True)
    for _ in range(sized(5, 1)):
        assert_same(gpu.exact(scores, pattern, want_solution=True), together)
    assert torch.equal(gpu.exact(scores, pattern).mask, together.mask)
    for b in (0, len(scores) // 2, len(scores) - 1):
        alone = gpu.exact(scores[b : b + 1], pattern, want_solution=True)
        assert torch.equal(alone.mask[0], together.mask[b])
        assert torch.equal(alone.row_duals[0], together.row_duals[b])


# --- many matrices ------------------------------------------------------------------------------------------


def experts(count: int, m: int, dtype: torch.dtype) -> list[Tensor]:
    """Matrices of different sizes, with edges and strides."""
    shapes = [(1, m, 2 * m), (1, 2 * m + 1, m), (2, m, m - 1), (1, m, m), (1, 3, 2 * m + 2)]
    scores = [
        oracles.sample("student_t", shapes[k % len(shapes)], seed=k, dtype=dtype).to(DEVICE)
        for k in range(count)
    ]
    return [matrix.transpose(1, 2) if k % 3 == 2 else matrix for k, matrix in enumerate(scores)]


@pytest.mark.parametrize("dtype", cases(DTYPES, (torch.float32,)))
@pytest.mark.parametrize(("n", "m"), cases(PATTERNS, ((2, 4),), names=2))
def test_a_group_is_each_matrix_alone(dtype: torch.dtype, n: int, m: int) -> None:
    pattern = NMPattern(n, m)
    scores = experts(sized(40, 5 if m < 32 else 2), m, dtype)
    for want_solution in (False, True):
        results = gpu.exact_group(scores, pattern, want_solution=want_solution)
        for matrix, result in zip(scores, results, strict=True):
            assert_same(result, gpu.exact(matrix, pattern, want_solution=want_solution))


def test_a_list_of_tensors_on_several_devices() -> None:
    scores = [matrix.cpu() if k % 3 == 0 else matrix for k, matrix in enumerate(experts(7, 4, torch.float32))]
    scores += experts(2, 4, torch.float16)
    backend = "triton" if ON_CPU else "auto"
    for matrix, mask in zip(scores, nmsolve.transposable_masks(scores, 2, 4, backend=backend), strict=True):
        assert mask.device == matrix.device
        assert torch.equal(mask, nmsolve.transposable_mask(matrix, 2, 4, backend=backend))


# --- approximate and ordinary masks -------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases(["normal", "ties", "zero", "signed", "huge"], ("ties",)))
@pytest.mark.parametrize(("n", "m"), cases(PATTERNS, ((2, 4),), names=2))
def test_greedy(name: str, n: int, m: int) -> None:
    scores = oracles.sample(name, (sized(2, 1), sized(3, 1) * m + 1, sized(2, 1) * m + m // 2), seed=6)
    pattern = NMPattern(n, m)
    assert torch.equal(gpu.greedy(scores.to(DEVICE), pattern).cpu(), reference.greedy(scores, pattern))


@pytest.mark.parametrize(
    ("n", "m"), cases([(2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (5, 12)], ((2, 4),), names=2)
)
def test_tsenor(n: int, m: int) -> None:
    scores = oracles.sample("normal", (1, sized(8, 1) * m, sized(8, 1) * m + m // 2), seed=7)
    pattern = NMPattern(n, m)
    mask = gpu.tsenor(scores.to(DEVICE), pattern, iterations=300, tau=150.0).cpu()
    oracles.check_mask_counts(mask, n, m)
    theirs = reference.tsenor(scores, pattern, iterations=300, tau=150.0)
    # A plan's entries that rounding brings to the other side of a tie change a block's greedy rounding.
    assert abs(scores[mask].sum() / scores[theirs].sum() - 1) < sized(1, 20) * 1e-4


@pytest.mark.parametrize("dtype", cases(DTYPES, (torch.float16,)))
@pytest.mark.parametrize(("n", "m"), cases([*PATTERNS, (1, 1), (0, 4), (64, 64)], ((5, 12),), names=2))
def test_ordinary(dtype: torch.dtype, n: int, m: int) -> None:
    for name in ("signed", "ties"):
        scores = oracles.sample(name, (2, sized(33, 5), 5 * m + m // 2 + 1), seed=8, dtype=dtype)
        pattern = NMPattern(n, m)
        assert torch.equal(
            gpu.ordinary(scores.to(DEVICE), pattern).cpu(), reference.ordinary(scores, pattern)
        )


@pytest.mark.parametrize("dtype", cases(DTYPES, (torch.float16,)))
@pytest.mark.parametrize("m", cases([4, 8, 16, 32], (8,)))
def test_ordinary_of_whole_groups(dtype: torch.dtype, m: int) -> None:
    """Also where the last program has few groups, and scores that do not begin at a multiple of a word."""
    for n in (1, m // 2, m):
        pattern = NMPattern(n, m)
        for name, rows in (("signed", sized(33, 3)), ("ties", 1)):
            flat = oracles.sample(name, (1 + rows * 9 * m,), seed=n, dtype=dtype)
            scores = flat[1:].view(1, rows, 9 * m)
            expected = reference.ordinary(scores, pattern)
            for tensor in (scores, flat.to(DEVICE)[1:].view_as(scores)):
                assert gpu.whole_groups(tensor, pattern)
                assert torch.equal(gpu.ordinary(tensor.to(DEVICE), pattern).cpu(), expected)


# --- permutations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases(DTYPES[:3], (torch.float32,)))
@pytest.mark.parametrize(
    ("rows", "cols"),
    cases(
        [(1, 1), (4, 4), (5, 3), (16, 16), (33, 20), (32, 32), (64, 64), (8, 128), (128, 128)],
        ((5, 3),),
        names=2,
    ),
)
def test_sinkhorn_and_its_gradient(dtype: torch.dtype, rows: int, cols: int) -> None:
    batch = sized(37, 3)
    logits = torch.randn(batch, cols, rows, generator=torch.Generator().manual_seed(1)).to(dtype).mT
    ours = logits.clone().to(DEVICE).requires_grad_(True)
    wide = logits.double().requires_grad_(True)
    plan = nmsolve.sinkhorn(ours, 0.4, 6, backend="triton")
    expected = nmsolve.sinkhorn(wide, 0.4, 6, backend="torch")
    assert plan.dtype == torch.float32
    for found in (plan, nmsolve.sinkhorn(ours.detach(), 0.4, 6, backend="triton")):
        assert (found.cpu() - expected).abs().max() < 5e-6
    pull = torch.randn(batch, rows, cols, generator=torch.Generator().manual_seed(2))
    (plan * pull.to(DEVICE)).sum().backward()
    (expected * pull).sum().backward()
    scale = wide.grad.abs().max().clamp(min=1)
    assert (ours.grad.cpu() - wide.grad).abs().max() < (2 * torch.finfo(dtype).eps + 2e-5) * scale


@pytest.mark.parametrize("m", cases([8, 32], (8,)))
def test_sinkhorn_stops_each_block_by_itself(m: int) -> None:
    logits = torch.randn(6, m, m, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    logits[::2] *= 0.01
    together = nmsolve.sinkhorn(logits, 0.2, 150, tolerance=1e-3, backend="triton")
    assert (together.sum(2) - 1).abs().max() < 1.1e-3
    for k in range(sized(6, 2)):
        alone = nmsolve.sinkhorn(logits[k : k + 1], 0.2, 150, tolerance=1e-3, backend="triton")
        assert torch.equal(alone[0], together[k])


@pytest.mark.parametrize("m", cases([1, 2, 3, 8, 13, 16, 32, 64], (3,)))
def test_assignment(m: int) -> None:
    scores = oracles.sample("signed", (sized(200, 3), m, m), seed=14)
    solution = nmsolve.assignment(scores.to(DEVICE), return_solution=True, backend="triton")
    permutation = solution.permutation.cpu()
    assert torch.equal(permutation.sort(-1).values, torch.arange(m).expand_as(permutation))
    kept = scores.double().gather(2, permutation.unsqueeze(2)).sum((1, 2))
    best = nmsolve.assignment(scores.double(), return_solution=True, backend="torch").objective
    size = scores.abs().sum((1, 2)).double()
    assert ((best - kept).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "groups", "width", "rows"),
    cases([(1, 1, 1, 16), (3, 70, 33, 48), (2, 5, 130, 1552), (1, 64, 64, 4112)], ((1, 1, 1, 16),), names=4),
)
def test_sums_of_maxima(batch: int, groups: int, width: int, rows: int, dtype: torch.dtype) -> None:
    """Of integers, whose sums are exact; the same wherever a sum is made."""
    generator = torch.Generator().manual_seed(16)
    columns = torch.randint(-9, 10, (200, rows), generator=generator).to(dtype)
    index = torch.randint(200, (batch, width), generator=generator)
    thresholds = columns[torch.randint(200, (batch, groups), generator=generator)]
    found = gpu_permute.sum_maxima(thresholds.to(DEVICE), columns.to(DEVICE), index.to(DEVICE))
    for b in range(batch):
        expected = torch.maximum(thresholds[b, :, None], columns[index[b]]).sum(-1, dtype=torch.float64)
        assert torch.equal(found[b].cpu(), expected)
    noise = torch.randn(200, rows, generator=generator).to(dtype).to(DEVICE)
    inputs = noise[index[:, :1].expand(-1, groups).to(DEVICE)], noise, index.to(DEVICE)
    together = gpu_permute.sum_maxima(*inputs)
    alone = gpu_permute.sum_maxima(inputs[0][-1:, -1:], noise, inputs[2][-1:, -1:].contiguous())
    assert torch.equal(alone[0, 0, 0], together[-1, -1, -1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", cases([1, 2, 3, 7, 15, 31, 33], (3,)))
def test_nth_largest(k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(17)
    columns = torch.randint(-9, 10, (50, sized(2064, 528)), generator=generator).to(dtype)
    groups = torch.stack([torch.randperm(50, generator=generator)[:k] for _ in range(sized(40, 2))])
    for n in (1, k // 2 + 1, k):
        found = gpu_permute.nth_largest(columns.to(DEVICE), groups.to(DEVICE), n)
        assert torch.equal(found.cpu(), columns[groups].sort(1, descending=True).values[:, n - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", cases([2, 3, 4], (4,)))
def test_sums_of_the_largest(m: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(19)
    columns = torch.randint(-9, 10, (50, sized(2064, 272)), generator=generator).to(dtype)
    members = torch.stack([torch.randperm(50, generator=generator)[: 2 * m] for _ in range(sized(40, 2))])
    subsets = torch.combinations(torch.arange(2 * m), m)
    for n in range(1, m):
        found = gpu_permute.sum_largest(*(x.to(DEVICE) for x in (columns, members, subsets)), n)
        largest = columns[members][:, subsets].sort(2, descending=True).values[:, :, :n]
        assert torch.equal(found.cpu(), largest.sum((2, 3), dtype=torch.float64))


@cuda_only
@pytest.mark.parametrize("name", ["ria", "swap", "stripe"])
def test_searches_for_orders(name: str) -> None:
    """On a GPU they keep about what they keep on a CPU: rounding may decide between swaps that gain alike."""
    from nmsolve import permute

    generator = torch.Generator().manual_seed(18)
    scores = torch.rand(300, 256, generator=generator) * torch.rand(256, generator=generator)
    search = getattr(permute, {"ria": "ria_permutation"}.get(name, f"{name}_search"))
    natural = permute.retained_score(scores, 2, 4)
    gains = []
    for x in (scores, scores.to(DEVICE)):
        order = search(x, 2, 4, window=64)
        assert order.device == x.device
        gains.append(float(permute.retained_score(scores, 2, 4, order.cpu()) - natural))
    assert gains[1] > 0.95 * gains[0] > 0


@pytest.mark.parametrize("dtype", cases([*DTYPES, torch.int32], (torch.bfloat16,)))
@pytest.mark.parametrize("shape", cases([(5,), (3, 7), (2, 3, 600), (9, 1024), (4, 1500)], ((3, 7),)))
def test_columns(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (10 * torch.randn(shape, generator=torch.Generator().manual_seed(4))).to(dtype).to(DEVICE)
    order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(5)).to(DEVICE)
    y = nmsolve.permute_columns(x, order, backend="triton")
    assert torch.equal(y, x[..., order])
    assert torch.equal(nmsolve.permute_columns(y, order.argsort(), backend="triton"), x)
    if x.ndim > 1:
        down = torch.randperm(shape[-2], generator=torch.Generator().manual_seed(6)).to(DEVICE)
        assert torch.equal(nmsolve.permute_columns(x.mT, down, backend="triton"), x.mT[..., down])


@pytest.mark.parametrize("dtype", cases(DTYPES[:3], (torch.bfloat16,)))
@pytest.mark.parametrize("shape", cases([(3, 7), (2, 3, 600), (4, 1024), (2, 1500), (6,)], ((3, 7),)))
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(6)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.randn(shape[-1:], generator=generator).to(dtype)
    order = torch.randperm(shape[-1], generator=generator)
    ours = [tensor.clone().to(DEVICE).requires_grad_(True) for tensor in (x, weight)]
    y = nmsolve.rms_norm_permute(*ours, order.to(DEVICE), 1e-5, backend="triton")
    wide = [tensor.double().requires_grad_(True) for tensor in (x, weight)]
    expected = rms_norm(wide[0], shape[-1:], wide[1], 1e-5)[..., order]
    eps = torch.finfo(dtype).eps
    assert y.dtype == dtype
    assert torch.allclose(y.cpu().double(), expected, rtol=4 * eps, atol=2e-6)
    y.float().sum().backward()
    expected.sum().backward()
    for mine, theirs in zip(ours, wide, strict=True):
        assert torch.allclose(mine.grad.cpu().double(), theirs.grad, rtol=8 * eps, atol=1e-4)


# --- hierarchical masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases(DTYPES))
@pytest.mark.parametrize(
    "pattern", cases(["4:2:8", "64:2:16", "16:1:12", "128:2:32", "200:2:40"], ("4:2:8",))
)
def test_hierarchical(pattern: str, dtype: torch.dtype) -> None:
    """As much as the reference, proven; a last strip and a last group are partial."""
    v, _, m = map(int, pattern.split(":"))
    groups = sized(16, 1)
    scores = oracles.sample("student_t", (v + 1, m * groups + 3), seed=8, dtype=dtype)
    found = nmsolve.hierarchical_mask(scores.to(DEVICE), pattern, backend="triton", return_solution=True)
    nmsolve.check_hierarchical_mask(found.mask.cpu(), pattern)
    expected = nmsolve.hierarchical_mask(scores, pattern, backend="torch", return_solution=True)
    assert torch.allclose(found.objective.cpu(), expected.objective, rtol=1e-12, atol=0)
    assert found.max_gap <= 1e-12


# --- what surrounds the kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("m", cases([4, 12, 16, 64], (4,)))
def test_every_kernel_once(m: int) -> None:
    """Every specialisation on a few blocks: docs/internals/kernels.md points compute-sanitizer at it."""
    n, pattern = m // 2, NMPattern(m // 2, m)
    for shape in ((2, m, 2 * m), (1, m + 1, m + 3)):
        scores = oracles.sample("normal", shape, seed=12).to(DEVICE)
        first = gpu.exact(scores, pattern, want_solution=True)
        duals = (first.row_duals, first.col_duals)
        masks = [first.mask, gpu.exact(scores, pattern).mask, gpu.exact(scores, pattern, warm=duals).mask]
        masks += [gpu.exact(scores, pattern, warm=duals, want_solution=True).mask]
        for want_solution in (False, True):
            results = gpu.exact_group([scores, scores[:1, :m]], pattern, want_solution=want_solution)
            masks += [result.mask for result in results]
        masks += [gpu.greedy(scores, pattern), gpu.tsenor(scores, pattern, iterations=9, tau=50.0)]
        for mask in masks:
            assert mask.view(torch.uint8).max() <= 1
            oracles.check_mask_counts(mask.cpu(), n, m)
        ordinary = gpu.ordinary(scores, pattern)
        assert torch.equal(ordinary.cpu(), reference.ordinary(scores.cpu(), pattern))
    if m > 4:
        hierarchical = nmsolve.hierarchical_mask(scores[0], (2, 2, m), backend="triton")
        nmsolve.check_hierarchical_mask(hierarchical.cpu(), (2, 2, m))
    logits = torch.randn(3, m, m + 1, device=DEVICE, requires_grad=True)
    for tolerance in (None, 1e-3):
        plan = nmsolve.sinkhorn(logits, 0.5, 5, tolerance=tolerance, backend="triton")
        plan.square().sum().backward()
    assert torch.isfinite(logits.grad).all()
    permutation = nmsolve.assignment(logits.detach()[..., :m], backend="triton")
    assert torch.equal(permutation[0].sort().values.cpu(), torch.arange(m))
    columns = torch.randn(m, 16, device=DEVICE)
    order = permutation[:1].contiguous()
    thresholds = gpu_permute.nth_largest(columns, order, n)
    assert torch.equal(thresholds[0], columns.sort(0, descending=True).values[n - 1])
    every = torch.arange(m, device=DEVICE)[None]
    largest = gpu_permute.sum_largest(columns, order, every, n)[0, 0]
    kept = columns.sort(0, descending=True).values[:n].sum(dtype=torch.float64)
    assert torch.allclose(largest, kept, rtol=1e-5, atol=1e-4)
    for dtype in (torch.float32, torch.float64):
        for repeats in (1, 97):
            long = columns.repeat(1, repeats).to(dtype)
            sums = gpu_permute.sum_maxima(long[None], long, order)
            expected = torch.maximum(columns[:, None], columns[order[0]]).sum(2, dtype=torch.float64)
            assert torch.allclose(sums[0], expected * repeats, rtol=1e-5, atol=1e-4)
    x = torch.randn(5, m, device=DEVICE)
    y = nmsolve.permute_columns(x, permutation[0], backend="triton")
    assert torch.equal(y, x[:, permutation[0]])
    z = nmsolve.rms_norm_permute(x, torch.ones(m, device=DEVICE), permutation[0], backend="triton")
    assert torch.allclose(z, rms_norm(y, (m,), eps=1e-6), atol=1e-5)


def test_values_that_are_not_finite_are_refused() -> None:
    scores = torch.rand(8, 8, device=DEVICE)
    scores[3, 5] = float("nan")
    with pytest.raises(nmsolve.NMSolveError, match=r"1 NaN of 64, the first nan at \(3, 5\)"):
        nmsolve.transposable_mask(scores, 2, 4, backend="triton")


@pytest.mark.parametrize("mode", cases(["default", "reduce-overhead"]))
def test_compiled(mode: str) -> None:
    """In a graph of torch.compile; a mode with CUDA graphs leaves the operator out of them."""

    def pruned(weight: Tensor) -> Tensor:
        return 2 * weight * nmsolve.transposable_mask(weight.abs() + 1, 2, 4, backend="triton")

    options: dict[str, Any] = {"backend": "aot_eager"} if ON_CPU else {"mode": mode}
    compiled = torch.compile(pruned, fullgraph=True, **options)
    for seed in range(3):
        weight = oracles.sample("signed", (16, 24), seed=seed).to(DEVICE)
        assert torch.equal(compiled(weight), pruned(weight))
    torch._dynamo.reset()


@cuda_only
def test_more_than_two_to_the_31_elements() -> None:
    rows, cols = 65536, 32768 + 16
    elements = rows * cols
    assert elements > 2**31
    # Scores (2 bytes), two masks, and a block of float32 to fill the scores from.
    if torch.cuda.mem_get_info()[0] < 4.5 * elements:
        pytest.skip(f"needs {4.5 * elements / 2**30:.0f} GiB of free memory")
    scores = torch.empty((1, rows, cols), dtype=torch.bfloat16, device=DEVICE)
    scores.view(-1, 512 * cols).copy_(torch.randn(512 * cols, device=DEVICE).abs())
    pattern = NMPattern(8, 16)
    ways = {
        "exact": lambda x: gpu.exact(x, pattern).mask,
        "group": lambda x: gpu.exact_group([x[:, :32], x], pattern)[1].mask,
        "greedy": lambda x: gpu.greedy(x, pattern),
        "ordinary": lambda x: gpu.ordinary(x, pattern),
    }
    for name, way in ways.items():
        first = way(scores[:, :512])
        assert torch.equal(way(scores)[:, -512:], first), name


@cuda_only
def test_no_working_memory() -> None:
    scores = torch.randn(1, 4096, 4096, device=DEVICE).abs()
    pattern = NMPattern(8, 16)
    gpu.exact(scores, pattern)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = gpu.exact(scores, pattern).mask
    assert torch.cuda.max_memory_allocated() - before <= mask.numel() + 2**21


@cuda_only
@pytest.mark.parametrize("grouped", [False, True])
def test_a_side_stream(grouped: bool) -> None:
    """The scores arrive late on another stream: a launch on the wrong one would read zeros."""
    scores = oracles.sample("normal", (1, 256, 256), seed=10).to(DEVICE)
    pattern = NMPattern(4, 8)
    expected = gpu.exact(scores, pattern).mask
    gpu.exact_group([scores, scores], pattern)  # compiled before the clock runs
    late = torch.zeros_like(scores)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(scores)
        masks = (
            [result.mask for result in gpu.exact_group([late, late], pattern)]
            if grouped
            else [gpu.exact(late, pattern).mask]
        )
    torch.cuda.current_stream().wait_stream(stream)
    for mask in masks:
        assert torch.equal(mask, expected)


@cuda_only
def test_tables_of_groups_outlive_their_launch() -> None:
    """Launched faster than they run, each group still reads its own table."""
    pattern = NMPattern(8, 16)
    lists = [[torch.rand(1, 16 * (1 + k), 160, device=DEVICE) for _ in range(3)] for k in range(20)]
    gpu.exact_group(lists[0], pattern)
    torch.cuda._sleep(200_000_000)
    results = [gpu.exact_group(scores, pattern) for scores in lists]
    for scores, group in zip(lists, results, strict=True):
        for matrix, result in zip(scores, group, strict=True):
            assert torch.equal(result.mask, gpu.exact(matrix, pattern).mask)


@cuda_only
@pytest.mark.parametrize("shape", [(1, 128, 128), (2, 60, 39)])
def test_a_cuda_graph(shape: tuple[int, ...]) -> None:
    """Captured and replayed with other scores; a group, whose table no graph can hold, goes one by one."""
    pattern = NMPattern(8, 16)
    scores = oracles.sample("normal", shape, seed=11).to(DEVICE)

    def solve() -> list[Tensor]:
        alone = gpu.exact(scores, pattern, want_solution=True)
        group = gpu.exact_group([scores, scores.mT], pattern)
        return [*alone, *(result.mask for result in group), gpu.ordinary(scores, pattern),
                gpu.greedy(scores, pattern)]  # fmt: skip

    solve()  # compiled before the capture
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        solve()
        gpu.exact(scores.mT, pattern)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve()
    for seed in (12, 13):
        scores.copy_(oracles.sample("normal", shape, seed=seed))
        graph.replay()
        assert_same(captured, solve())


@cuda_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device() -> None:
    """While the first is the current one."""
    scores = oracles.sample("normal", (1, 70, 64), seed=13)
    pattern = NMPattern(4, 8)
    first, second = (gpu.exact(scores.to(f"cuda:{k}"), pattern).mask for k in (0, 1))
    assert second.device == torch.device("cuda:1")
    assert torch.equal(first.cpu(), second.cpu())
    everywhere = [scores[0].to(f"cuda:{k % 2}") for k in range(4)]
    for mask, matrix in zip(nmsolve.transposable_masks(everywhere, 4, 8), everywhere, strict=True):
        assert mask.device == matrix.device
        assert torch.equal(mask.cpu(), first[0].cpu())
