"""The Numba backend against independent solvers, on every kind of input that is promised."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from oracles import (
    blocks_of,
    check_mask_counts,
    completed_greedy,
    distributions,
    dual_value,
    highs,
    kept_score,
    min_cost_flow,
    sample,
)

from nmsolve import NMPattern
from nmsolve.backends.cpu import masks as cpu
from nmsolve.backends.torch import masks as reference
from nmsolve.solution import BlockResult

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def solve(scores: Tensor, n: int, m: int) -> BlockResult:
    return cpu.exact(scores, NMPattern(n, m), want_solution=True)


def check_exact(scores: Tensor, n: int, m: int, oracle=min_cost_flow) -> None:
    """Counts, optimality by ``oracle``, and a certificate that anybody can recompute."""
    result = solve(scores, n, m)
    check_mask_counts(result.mask, n, m)
    tolerance = TOLERANCE[scores.dtype]
    for b, matrix in enumerate(scores):
        for i, j, block in blocks_of(matrix, m):
            r, c = block.shape
            where = (b, i, j)
            mask = result.mask[b, i * m : i * m + r, j * m : j * m + c]
            kept = kept_score(block, mask)
            size = kept_score(block.double().abs(), mask) or 1.0
            assert abs(kept - oracle(block, n)) <= tolerance * size, where
            bound = dual_value(block, result.row_duals[where], result.col_duals[where], n)
            assert abs(result.objective[where] - kept) <= 1e-12 * size, where
            assert abs(result.bound[where] - bound) <= 1e-12 * size, where
            rounding = 1e-12 * size + 1e-15 * float(block.double().abs().sum())
            assert -rounding <= bound - kept <= tolerance * size, where
            assert not result.row_duals[where][r:].any()
            assert not result.col_duals[where][c:].any()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


@pytest.mark.parametrize("name", distributions)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (3, 8), (8, 16), (2, 16), (16, 32)])
def test_exact_is_optimal_on_full_blocks(name: str, n: int, m: int) -> None:
    check_exact(sample(name, (1, m, m * (5 if m < 32 else 2)), seed=n), n, m)


@pytest.mark.parametrize("name", distributions)
@pytest.mark.parametrize(("n", "m"), [(3, 7), (6, 8), (1, 8), (5, 16)])
def test_exact_is_optimal_on_partial_blocks(name: str, n: int, m: int) -> None:
    check_exact(sample(name, (2, m + m // 3, m + m // 2), seed=m), n, m)
    check_exact(sample(name, (1, m - 2, m + 1), seed=m), n, m)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 9, 12, 13, 17, 24, 31, 33, 40, 48, 63, 64, 65, 80])
def test_exact_takes_any_block_size(m: int) -> None:
    for n in {0, 1, m // 3, m // 2, m - 1, m}:
        check_exact(sample("normal", (1, m, m), seed=n), n, m)
    check_exact(sample("signed", (1, m + 2, m + m // 2), seed=m), m // 2, m)


@pytest.mark.parametrize("name", distributions)
def test_exact_in_large_blocks(name: str) -> None:
    check_exact(sample(name, (1, 64, 64)), 32, 64)
    check_exact(sample(name, (1, 64, 40)), 20, 64)


@pytest.mark.parametrize("name", [name for name in distributions if name != "huge"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_exact_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    check_exact(sample(name, (2, 20, 27), dtype=dtype), 4, 8)
    check_exact(sample(name, (1, 20, 35), dtype=dtype), 5, 16)


@pytest.mark.parametrize("name", ["normal", "lognormal", "ties", "outlier_lines"])
def test_exact_agrees_with_a_linear_program(name: str) -> None:
    check_exact(sample(name, (1, 21, 16)), 8, 16, oracle=highs)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_exact_on_arbitrary_blocks(data: st.DataObject) -> None:
    m = data.draw(st.integers(1, 9))
    n = data.draw(st.integers(0, m))
    rows, cols = data.draw(st.integers(1, 2 * m)), data.draw(st.integers(1, 2 * m))
    # Multiples of 1/1024, whose sums float32 holds: beside larger scores it takes smaller ones for ties.
    values = st.one_of(
        st.integers(-4, 4).map(float),
        st.integers(-1_000_000, 1_000_000).map(lambda value: value / 1024),
        st.sampled_from([0.0, -0.0]),
    )
    flat = data.draw(st.lists(values, min_size=rows * cols, max_size=rows * cols))
    check_exact(torch.tensor(flat, dtype=torch.float32).view(1, rows, cols), n, m)


def layouts(scores: Tensor) -> dict[str, Tensor]:
    """The same ``(batch, rows, cols)`` values in memory laid out in different ways."""
    batch, rows, cols = scores.shape
    wide = torch.full((batch, rows + 3, 2 * cols + 5), float("nan"), dtype=scores.dtype)
    wide[:, 2 : rows + 2, 3 : 2 * cols + 3 : 2] = scores
    return {
        "transposed": scores.mT.contiguous().mT,
        "batch last": scores.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "every second column": wide[:, 2 : rows + 2, 3 : 2 * cols + 3 : 2],
        "unaligned": torch.cat((scores.new_zeros(1), scores.flatten()))[1:].view_as(scores),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (8, 16), (5, 12)])
def test_layout_does_not_matter(dtype: torch.dtype, n: int, m: int) -> None:
    scores, pattern = sample("signed", (3, 37, 50), dtype=dtype), NMPattern(n, m)
    for name, view in layouts(scores).items():
        assert same(view, scores)
        for method in (cpu.ordinary, cpu.greedy, lambda s, p: solve(s, p.n, p.m).mask):
            assert same(method(view, pattern), method(scores, pattern)), name
        a, b = solve(view, n, m), solve(scores, n, m)
        assert all(same(x, y) for x, y in zip(a, b, strict=True)), name


def test_stride_zero() -> None:
    row = sample("normal", (1, 1, 40))
    for view in (row.expand(2, 40, 40), row.mT.expand(1, 40, 33)):
        assert same(cpu.exact(view, NMPattern(4, 8)).mask, cpu.exact(view.contiguous(), NMPattern(4, 8)).mask)
        check_exact(view, 4, 8)


def test_addresses_beyond_32_bits() -> None:
    """A view whose last blocks lie more than 2^31 elements behind its first: untouched pages cost nothing."""
    stride = 2**31 // 30 + 5
    memory = torch.empty(stride * 32, dtype=torch.bfloat16)
    view = memory.as_strided((1, 32, 16), (0, stride, 1))
    view.copy_(sample("normal", (1, 32, 16)))
    for method in (cpu.ordinary, cpu.greedy, lambda s, p: cpu.exact(s, p).mask):
        assert same(method(view, NMPattern(8, 16)), method(view.contiguous(), NMPattern(8, 16)))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    scores, pattern = torch.empty(shape), NMPattern(2, 4)
    result = solve(scores, 2, 4)
    assert result.mask.shape == shape
    assert result.objective.numel() == result.bound.numel() == 0
    for mask in (cpu.greedy(scores, pattern), cpu.ordinary(scores, pattern)):
        assert mask.shape == shape
    assert cpu.tsenor(scores, pattern, iterations=3, tau=100.0).shape == shape


@pytest.mark.parametrize("name", ["normal", "ties", "student_t"])
def test_a_block_does_not_depend_on_its_neighbours(name: str) -> None:
    scores, pattern = sample(name, (1, 16 * 9, 16 * 7)), NMPattern(8, 16)
    together = solve(scores, 8, 16)
    greedy = cpu.greedy(scores, pattern)
    tsenor = cpu.tsenor(scores, pattern, iterations=30, tau=100.0)
    for i, j, block in blocks_of(scores[0], 16):
        alone = solve(block[None], 8, 16)
        rows, cols = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
        assert same(alone.mask[0], together.mask[0, rows, cols])
        for ours, theirs in zip(alone[1:], together[1:], strict=True):
            assert same(ours[0, 0, 0], theirs[0, i, j])
        assert same(cpu.greedy(block[None], pattern)[0], greedy[0, rows, cols])
        assert same(cpu.tsenor(block[None], pattern, iterations=30, tau=100.0)[0], tsenor[0, rows, cols])


def test_number_of_threads_does_not_matter() -> None:
    scores = sample("bfloat16_ties", (2, 500, 1100))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(solve(scores, 8, 16))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(same(a, b) for a, b in zip(result, results[0], strict=True))


def test_concurrent_calls() -> None:
    scores = sample("normal", (1, 256, 512))
    expected, masks = cpu.exact(scores, NMPattern(8, 16)).mask, [None] * 4

    def call(k: int) -> None:
        masks[k] = cpu.exact(scores, NMPattern(8, 16)).mask

    threads = [threading.Thread(target=call, args=(k,)) for k in range(len(masks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(mask, expected) for mask in masks)


@pytest.mark.parametrize("shape", [(2, 48, 64), (1, 41, 30)])
def test_warm_start(shape: tuple[int, int, int]) -> None:
    scores = sample("normal", shape)
    cold = solve(scores, 8, 16)
    warm = cpu.exact(scores, NMPattern(8, 16), warm=(cold.row_duals, cold.col_duals), want_solution=True)
    torch.testing.assert_close(warm.objective, cold.objective, rtol=1e-6, atol=0)
    moved = scores + 0.01 * sample("signed", shape, seed=5)
    for duals in (
        (cold.row_duals, cold.col_duals),
        (torch.zeros_like(cold.row_duals), torch.zeros_like(cold.col_duals)),
        (-7 * cold.col_duals.mT.reshape(cold.row_duals.shape), cold.row_duals.reshape(cold.col_duals.shape)),
    ):
        again = cpu.exact(moved, NMPattern(8, 16), warm=duals, want_solution=True)
        check_mask_counts(again.mask, 8, 16)
        torch.testing.assert_close(again.objective, solve(moved, 8, 16).objective, rtol=1e-6, atol=0)
        assert (again.bound - again.objective <= 1e-5 * again.objective).all()


def test_few_lines_need_repair_whatever_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is the ascent's plus one path's per unit of imbalance: heavy tails must not need more."""
    paths = []

    def counting(*arguments: object) -> int:
        paths.append(solve_exact(*arguments))
        return paths[-1]

    solve_exact = cpu.solve_exact
    monkeypatch.setattr(cpu, "solve_exact", counting)
    for name in ("normal", "student_t", "wanda", "signed", "uniform"):
        paths.clear()
        cpu.exact(sample(name, (1, 512, 512)), NMPattern(8, 16))
        assert sum(paths) < 2.0 * 1024, name


@pytest.mark.parametrize("name", distributions)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (8, 16), (5, 11), (20, 40)])
def test_greedy_is_the_sequential_one(name: str, n: int, m: int) -> None:
    scores = sample(name, (1, m + m // 2, 2 * m + m // 3), seed=m)
    for view, dtype in ((scores, np.float32), (scores.double(), np.float64)):
        mask = cpu.greedy(view, NMPattern(n, m))[0]
        for i, j, block in blocks_of(view[0], m):
            r, c = block.shape
            ours = mask[i * m : i * m + r, j * m : j * m + c].numpy()
            assert (ours == completed_greedy(block, n, dtype)).all(), (i, j)


@pytest.mark.parametrize("name", distributions)
def test_tsenor_fills_every_line(name: str) -> None:
    for n, m in ((2, 4), (8, 16), (4, 10)):
        for tau in (20.0, 150.0, 5000.0):
            scores = sample(name, (1, 2 * m + 1, 2 * m + m // 2))
            check_mask_counts(cpu.tsenor(scores, NMPattern(n, m), iterations=40, tau=tau), n, m)


@pytest.mark.parametrize(("n", "m"), [(4, 8), (8, 16), (16, 32)])
def test_tsenor_is_close_to_the_optimum(n: int, m: int) -> None:
    scores = sample("normal", (1, 256, 256))
    best = solve(scores, n, m).objective.sum()
    mask = cpu.tsenor(scores, NMPattern(n, m), iterations=300, tau=150.0)
    error = 1 - kept_score(scores, mask) / best
    assert 0 <= error <= 0.002
    other = reference.tsenor(scores[:, :64, :64], NMPattern(n, m), iterations=300, tau=150.0)
    assert (other != mask[:, :64, :64]).float().mean() < 0.01


@pytest.mark.parametrize("name", distributions)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (8, 16), (3, 7), (0, 5), (5, 5), (40, 70)])
def test_ordinary_is_a_stable_sort(name: str, n: int, m: int) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = sample(name, (2, 5, 3 * m + m // 2), seed=m, dtype=dtype)
        mask = cpu.ordinary(scores, NMPattern(n, m))
        for group, flags in zip(scores.split(m, -1), mask.split(m, -1), strict=True):
            order = group.sort(dim=-1, descending=True, stable=True).indices[..., :n]
            expected = torch.zeros_like(flags).scatter_(-1, order, True)
            assert same(flags, expected)


UNCOMMON = (torch.float64, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *UNCOMMON])
def test_ordinary_masks_of_groups_that_lie_anyhow(dtype: torch.dtype) -> None:
    """Contiguous, in wider rows, column by column, none at all, with NaN beside them that none may read."""
    for n, m in ((2, 4), (31, 32)) if dtype in UNCOMMON else ((1, 4), (4, 8), (5, 16), (31, 32)):
        generator = torch.Generator().manual_seed(m)
        for rows, cols in ((1, m), (3, 5 * m), (2, 33 * m), (5, 3 * m + 1), (40, 0), (1, 70_000)):
            wide = torch.full((2, rows + 2, cols + 7), torch.nan, dtype=dtype)
            scores = wide[:, 1:-1, 3 : 3 + cols]
            scores.copy_(torch.randint(-3, 4, scores.shape, generator=generator) * 0.5)
            scores[scores == 0.5] = torch.inf
            padded = torch.nn.functional.pad(scores.double(), (0, -cols % m), value=-100)
            groups = padded.unflatten(-1, (-1, m))
            earlier = torch.arange(m) < torch.arange(m)[:, None]
            before = groups[..., None, :] > groups[..., None]
            before |= (groups[..., None, :] == groups[..., None]) & earlier
            expected = (before.sum(-1) < n).flatten(-2)[..., :cols]
            for laid in (scores, scores.contiguous(), scores.mT.contiguous().mT):
                assert same(cpu.ordinary(laid, NMPattern(n, m)), expected), (n, m, rows, cols, laid.stride())


def test_zero_and_minus_zero_tie() -> None:
    scores = torch.tensor([[[-0.0, 0.0, 0.0, -0.0]]])
    assert cpu.ordinary(scores, NMPattern(2, 4)).tolist() == [[[True, True, False, False]]]
    block = torch.tensor([[[-0.0, 0.0], [0.0, -0.0]]])
    assert cpu.greedy(block, NMPattern(1, 2)).tolist() == [[[True, False], [False, True]]]


def test_working_memory_is_small() -> None:
    """Peak above input and output, in a process of its own: well below a tenth of the scores."""
    code = """
import resource, torch
from nmsolve import NMPattern
from nmsolve.backends.cpu import masks as cpu
scores = torch.rand(1, 4096, 4096)
pattern = NMPattern(8, 16)
for run in (cpu.exact, cpu.greedy, cpu.ordinary):
    run(scores[:, :512], pattern)
keep = torch.ones(scores.shape, dtype=torch.bool)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del keep
for run in (cpu.exact, cpu.greedy, cpu.ordinary):
    run(scores, pattern)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    )
    assert grown * 1024 < 0.1 * 4096 * 4096 * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_can_solve() -> None:
    scores = sample("normal", (1, 256, 256))
    expected = cpu.exact(scores, NMPattern(4, 8)).mask
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # torch's own threads do not survive a fork: no parallel torch operation here.
        right = np.array_equal(cpu.exact(scores, NMPattern(4, 8)).mask.numpy(), expected.numpy())
        os.write(writer, b"1" if right else b"0")
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"1"
    os.close(reader)


def test_why_not() -> None:
    assert cpu.why_not(torch.device("cpu")) is None
    assert "cuda:1" in cpu.why_not(torch.device("cuda:1"))
