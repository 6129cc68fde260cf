"""Every solver kernel against the oracle on a real GPU: ``make test-gpu``.

The oracle (:mod:`nmsolve.reference`) runs in float64 on the CPU. Masks of tied optima may differ, so
objectives are compared; greedy and ordinary masks are unique and have to be equal.
"""

from __future__ import annotations

import oracles
import pytest
import torch
from torch import Tensor

from nmsolve import reference
from nmsolve.pattern import NMPattern

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

gpu = pytest.importorskip("nmsolve.gpu")

DEVICE = torch.device("cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATTERNS = ((2, 4), (1, 4), (4, 8), (5, 12), (8, 16), (3, 16), (10, 24), (16, 32), (32, 64), (60, 64), (1, 2))


def check_exact(scores: Tensor, n: int, m: int) -> None:
    """Counts, certificate, and the oracle's objective, for ``(batch, rows, cols)`` scores on the GPU."""
    pattern = NMPattern(n, m)
    result = gpu.exact(scores, pattern, want_solution=True)
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


@pytest.mark.parametrize("name", sorted(oracles.distributions))
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_exact(name: str, n: int, m: int) -> None:
    check_exact(oracles.sample(name, (1, 4 * m, 8 * m), seed=1).to(DEVICE), n, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("partial", [False, True])
def test_exact_dtypes(dtype: torch.dtype, n: int, m: int, partial: bool) -> None:
    shape = (2, 3 * m + m // 2, 5 * m + 1) if partial else (2, 3 * m, 5 * m)
    check_exact(oracles.sample("student_t", shape, seed=2, dtype=dtype).to(DEVICE), n, m)


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 70), (70, 3), (63, 65), (17, 16), (16, 17)])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_exact_edges(rows: int, cols: int, n: int, m: int) -> None:
    check_exact(oracles.sample("signed", (2, rows, cols), seed=3).to(DEVICE), n, m)


VIEWS = {
    "transposed": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, 3:90:2, 1:],
    "batch inside": lambda x: x.transpose(0, 1),
    "one row repeated": lambda x: x[:, :1].expand(-1, 40, -1),
}


@pytest.mark.parametrize("view", sorted(VIEWS))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (32, 64)])
def test_strides(view: str, n: int, m: int) -> None:
    scores = VIEWS[view](oracles.sample("normal", (64, 96, 80), seed=4).to(DEVICE))
    check_exact(scores, n, m)
    pattern = NMPattern(n, m)
    copy = scores.contiguous()
    assert torch.equal(gpu.exact(scores, pattern).mask, gpu.exact(copy, pattern).mask)
    assert torch.equal(gpu.greedy(scores, pattern), gpu.greedy(copy, pattern))
    assert torch.equal(gpu.ordinary(scores, pattern), gpu.ordinary(copy, pattern))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_warm_start(n: int, m: int) -> None:
    scores = oracles.sample("normal", (1, 2 * m + 1, 4 * m), seed=5).to(DEVICE)
    pattern = NMPattern(n, m)
    first = gpu.exact(scores, pattern, want_solution=True)
    again = gpu.exact(scores, pattern, warm=(first.row_duals, first.col_duals), want_solution=True)
    assert torch.equal(first.mask, again.mask)


@pytest.mark.parametrize("name", ["normal", "ties", "zero", "signed", "huge"])
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_greedy(name: str, n: int, m: int) -> None:
    scores = oracles.sample(name, (2, 3 * m + 1, 2 * m + m // 2), seed=6)
    pattern = NMPattern(n, m)
    assert torch.equal(gpu.greedy(scores.to(DEVICE), pattern).cpu(), reference.greedy(scores, pattern))


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (5, 12)])
def test_tsenor(n: int, m: int) -> None:
    scores = oracles.sample("normal", (1, 8 * m, 8 * m + m // 2), seed=7)
    pattern = NMPattern(n, m)
    mask = gpu.tsenor(scores.to(DEVICE), pattern, iterations=300, tau=150.0).cpu()
    oracles.check_mask_counts(mask, n, m)
    theirs = reference.tsenor(scores, pattern, iterations=300, tau=150.0)
    assert abs(scores[mask].sum() / scores[theirs].sum() - 1) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [*PATTERNS, (1, 1), (0, 4), (64, 64)])
def test_ordinary(dtype: torch.dtype, n: int, m: int) -> None:
    for name in ("signed", "ties"):
        scores = oracles.sample(name, (2, 33, 5 * m + m // 2 + 1), seed=8, dtype=dtype)
        pattern = NMPattern(n, m)
        assert torch.equal(
            gpu.ordinary(scores.to(DEVICE), pattern).cpu(), reference.ordinary(scores, pattern)
        )


def test_results_do_not_depend_on_the_batch_and_repeat() -> None:
    scores = oracles.sample("bfloat16_ties", (37, 16, 48), seed=9).to(DEVICE)
    pattern = NMPattern(8, 16)
    together = gpu.exact(scores, pattern, want_solution=True)
    for _ in range(5):
        for mine, theirs in zip(gpu.exact(scores, pattern, want_solution=True), together, strict=True):
            assert torch.equal(mine, theirs)
    for b in (0, 17, 36):
        alone = gpu.exact(scores[b : b + 1], pattern, want_solution=True)
        assert torch.equal(alone.mask[0], together.mask[b])
        assert torch.equal(alone.row_duals[0], together.row_duals[b])


def test_more_than_two_to_the_31_elements() -> None:
    rows, cols = 65536, 32768 + 16
    if torch.cuda.mem_get_info()[0] < 3.5 * 2 * rows * cols:
        pytest.skip("needs 15 GB of free memory")
    scores = torch.empty((1, rows, cols), dtype=torch.bfloat16, device=DEVICE)
    scores.view(-1, 512 * cols).copy_(torch.randn(512 * cols, device=DEVICE).abs())
    pattern = NMPattern(8, 16)
    assert rows * cols > 2**31
    first = gpu.exact(scores[:, :512], pattern).mask
    assert torch.equal(gpu.exact(scores, pattern).mask[:, -512:], first)
    assert torch.equal(gpu.ordinary(scores, pattern)[:, -512:], gpu.ordinary(scores[:, :512], pattern))


def test_a_side_stream() -> None:
    scores = oracles.sample("normal", (1, 256, 256), seed=10).to(DEVICE)
    expected = gpu.exact(scores, NMPattern(4, 8)).mask
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        delayed = scores.clone()
        mask = gpu.exact(delayed, NMPattern(4, 8)).mask
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(mask, expected)


def test_a_cuda_graph() -> None:
    pattern = NMPattern(8, 16)
    scores = oracles.sample("normal", (1, 128, 128), seed=11).to(DEVICE)
    gpu.exact(scores, pattern)  # compiled before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask = gpu.exact(scores, pattern).mask
    scores.copy_(oracles.sample("normal", (1, 128, 128), seed=12))
    graph.replay()
    assert torch.equal(mask, gpu.exact(scores, pattern).mask)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device() -> None:
    scores = oracles.sample("normal", (1, 64, 64), seed=13)
    pattern = NMPattern(4, 8)
    first, second = (gpu.exact(scores.to(f"cuda:{k}"), pattern).mask for k in (0, 1))
    assert second.device == torch.device("cuda:1")
    assert torch.equal(first.cpu(), second.cpu())
