"""The public functions' contract, on every backend that runs here."""

from __future__ import annotations

import itertools

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmsolve
from nmsolve import NMPattern, NMSolveError
from nmsolve.backends.dispatch import BACKENDS, backend_reasons, select

RUNNABLE = [name for name, reason in backend_reasons("cpu").items() if reason is None]
PATTERNS = [(2, 4), (1, 4), (4, 8), (5, 8), (8, 16), (3, 6)]

# For what does not depend on the number of iterations: in the interpreter the default takes long.
QUICK = {"exact": {}, "greedy": {}, "tsenor": {"iterations": 10}}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in RUNNABLE:
        pytest.skip(f"{request.param}: {backend_reasons('cpu')[request.param]}")
    return request.param


def optimum(scores: torch.Tensor, n: int, m: int) -> float:
    return sum(oracles.min_cost_flow(block, n) for _, _, block in oracles.blocks_of(scores, m))


def assert_optimal(scores: torch.Tensor, solution: nmsolve.BlockSolution, n: int, m: int) -> None:
    """Counts, the optimum of an independent solver, and the certificate, matrix by matrix."""
    work = torch.float64 if scores.dtype == torch.float64 else torch.float32
    tolerance = 1e-9 if work == torch.float64 else 1e-6
    rows, cols = scores.shape[-2:]
    oracles.check_mask_counts(solution.mask.reshape(-1, rows, cols), n, m)
    best = sum(optimum(matrix, n, m) for matrix in scores.reshape(-1, rows, cols))
    scale = float((scores.double() * solution.mask).abs().sum())
    assert solution.total_objective == pytest.approx(best, abs=1e-6 * scale)
    assert solution.total_objective == pytest.approx(oracles.kept_score(scores, solution.mask), rel=1e-12)
    assert (solution.gap <= tolerance).all()
    assert (solution.bound >= solution.objective - 1e-12 * solution.scale).all()
    assert solution.row_duals.dtype == solution.col_duals.dtype == work


@pytest.mark.parametrize("name", oracles.distributions)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_exact_is_optimal_with_a_certificate(backend: str, name: str, n: int, m: int) -> None:
    scores = oracles.sample(name, (3 * m, 4 * m), seed=n)
    solution = nmsolve.transposable_mask(scores, n, m, backend=backend, return_solution=True)
    assert_optimal(scores, solution, n, m)


@pytest.mark.parametrize("shape", [(1, 1), (3, 3), (7, 4), (4, 7), (9, 14), (14, 9), (1, 13), (13, 1)])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_partial_blocks(backend: str, shape: tuple[int, int], n: int) -> None:
    scores = oracles.sample("signed", shape, seed=n)
    solution = nmsolve.transposable_mask(scores, n, 4, backend=backend, return_solution=True)
    assert_optimal(scores, solution, n, 4)
    nmsolve.check_mask(solution.mask, n, 4)
    for method in ("greedy", "tsenor"):
        mask = nmsolve.transposable_mask(scores, n, 4, method=method, backend=backend, **QUICK[method])
        nmsolve.check_mask(mask, n, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_leading_dimensions(backend: str, dtype: torch.dtype) -> None:
    scores = oracles.sample("normal", (2, 3, 10, 17), dtype=dtype)
    solution = nmsolve.transposable_mask(scores, 2, 4, backend=backend, return_solution=True)
    assert solution.mask.shape == scores.shape
    assert solution.row_duals.shape == (2, 3, 3, 5, 4)
    assert solution.bound.shape == (2, 3, 3, 5)
    if backend == "triton" and dtype == torch.float64:
        # GPU kernels work in float32: the mask is optimal to single precision, the certificate says so.
        assert solution.max_gap <= 1e-6
        nmsolve.check_mask(solution.mask, 2, 4)
    else:
        assert_optimal(scores, solution, 2, 4)


def _views() -> dict[str, torch.Tensor]:
    base = oracles.sample("normal", (2, 3, 8, 12))
    wide = torch.randn(16, 80).abs()
    return {
        "transposed": base.mT,
        "permuted batch": base.transpose(0, 1),
        "batch between": base.permute(2, 0, 3, 1).permute(3, 1, 0, 2),
        "sliced": wide[1::2, 3:71:3],
        "kernel positions": torch.randn(16, 8, 3, 3).permute(2, 3, 0, 1),
        "one row repeated": torch.rand(1, 24).expand(16, 24),
        "one matrix repeated": torch.rand(8, 8).expand(3, 8, 8),
    }


@pytest.mark.parametrize("view", _views())
@pytest.mark.parametrize("method", ["exact", "greedy", "tsenor"])
def test_strides_do_not_matter(backend: str, method: str, view: str) -> None:
    scores = _views()[view]
    before = scores.clone()
    options = {"method": method, "backend": backend, **QUICK[method]}
    mask = nmsolve.transposable_mask(scores, 2, 4, **options)
    copy = nmsolve.transposable_mask(before.contiguous(), 2, 4, **options)
    assert torch.equal(mask, copy)
    assert torch.equal(scores, before)
    ordinary = nmsolve.nm_mask(scores, 2, 4, backend=backend)
    assert torch.equal(ordinary, nmsolve.nm_mask(before.contiguous(), 2, 4, backend=backend))


def test_offsets_beyond_two_to_the_31(backend: str) -> None:
    stride = 2**28
    memory = torch.empty(9 * stride, dtype=torch.bfloat16)  # 4.8 GB of address space, a few pages of memory
    far = memory.as_strided((9, 12), (stride, 1))
    far.copy_(oracles.sample("normal", (9, 12), dtype=torch.bfloat16))
    for scores in (far, far.mT):
        mask = nmsolve.transposable_mask(scores, 2, 4, backend=backend)
        assert torch.equal(mask, nmsolve.transposable_mask(scores.clone(), 2, 4, backend=backend))
        ordinary = nmsolve.nm_mask(scores, 2, 4, backend=backend)
        assert torch.equal(ordinary, nmsolve.nm_mask(scores.clone(), 2, 4, backend=backend))


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 8, 8), (2, 0, 8), (0, 0)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    scores = torch.empty(shape)
    for method in ("exact", "greedy", "tsenor"):
        solution = nmsolve.transposable_mask(
            scores, 2, 4, method=method, backend=backend, return_solution=True
        )
        assert solution.mask.shape == shape
        assert solution.mask.dtype == torch.bool
        assert solution.bound.shape == (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 4))
        assert (solution.total_objective, solution.max_gap, solution.relative_gap) == (0.0, 0.0, 0.0)
    assert nmsolve.nm_mask(scores, 2, 4, backend=backend).shape == shape


@pytest.mark.parametrize("method", ["exact", "greedy", "tsenor"])
def test_a_block_does_not_depend_on_its_neighbours(backend: str, method: str) -> None:
    blocks = oracles.sample("bfloat16_ties", (9 if backend == "triton" else 21, 8, 8))
    options = {"method": method, "backend": backend, **QUICK[method]}
    together = nmsolve.solve_blocks(blocks, 4, **options)
    alone = [nmsolve.solve_blocks(block[None], 4, **options) for block in blocks]
    assert torch.equal(together.mask, torch.cat([one.mask for one in alone]))
    assert torch.equal(together.row_duals, torch.cat([one.row_duals for one in alone]))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        single = nmsolve.solve_blocks(blocks, 4, **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together.mask, single.mask)
    assert torch.equal(together.col_duals, single.col_duals)


@pytest.mark.parametrize("method", ["greedy", "tsenor"])
def test_an_approximate_mask_reports_its_distance_from_the_optimum(backend: str, method: str) -> None:
    blocks = oracles.sample("normal", (8, 8, 8))
    solution = nmsolve.solve_blocks(blocks, 4, method=method, backend=backend)
    best = np.array([oracles.min_cost_flow(block, 4) for block in blocks])
    assert solution.bound.numpy() == pytest.approx(best, rel=1e-6)
    kept = np.array([oracles.kept_score(*pair) for pair in zip(blocks, solution.mask, strict=True)])
    assert solution.gap.numpy() == pytest.approx((best - kept) / kept, abs=1e-6)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (4, 8), (2, 6), (7, 8)])
@pytest.mark.parametrize("name", ["normal", "ties", "constant", "signed"])
def test_greedy_is_the_sequential_greedy_completed(backend: str, name: str, n: int, m: int) -> None:
    scores = oracles.sample(name, (3 * m + 2, 2 * m + 1), seed=m)
    mask = nmsolve.transposable_mask(scores, n, m, method="greedy", backend=backend)
    for (_, _, block), (_, _, kept) in zip(
        oracles.blocks_of(scores, m), oracles.blocks_of(mask, m), strict=True
    ):
        # Two moves of equal gain may be told apart by rounding; the kept scores may not.
        expected = oracles.completed_greedy(block, n)
        before = oracles.sequential_greedy(block, n)
        if before.sum() == expected.sum():
            assert np.array_equal(kept.numpy(), before)
        assert oracles.kept_score(block, kept) == pytest.approx(
            oracles.kept_score(block, expected), rel=1e-6, abs=1e-6
        )


@pytest.mark.parametrize(("n", "m"), [(4, 8), (8, 16)])
def test_tsenor_is_close_and_full(backend: str, n: int, m: int) -> None:
    blocks = oracles.sample("normal", (64 // m if backend == "triton" else 200, m, m))
    solution = nmsolve.solve_blocks(blocks, n, method="tsenor", backend=backend)
    nmsolve.check_mask(solution.mask, n, m)
    assert float(solution.gap.mean()) <= 2e-3
    rough = nmsolve.solve_blocks(blocks, n, method="tsenor", backend=backend, iterations=2)
    assert float(rough.gap.mean()) > float(solution.gap.mean())
    warm = nmsolve.solve_blocks(blocks, n, method="tsenor", backend=backend, tau=5.0)
    assert float(warm.gap.mean()) > float(solution.gap.mean())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (0, 4), (4, 4), (16, 32), (70, 128)])
@pytest.mark.parametrize("name", ["normal", "ties", "signed"])
def test_ordinary_mask_is_a_stable_sort(backend: str, name: str, n: int, m: int) -> None:
    if backend == "triton" and m > 64:
        with pytest.raises(nmsolve.BackendError, match="m=128"):
            nmsolve.nm_mask(torch.ones(4, 128), n, m, backend=backend)
        return
    scores = oracles.sample(name, (5, 2 * m + 3), seed=m)
    expected = np.zeros(scores.shape, dtype=bool)
    for start in range(0, scores.shape[1], m):
        order = np.argsort(-scores[:, start : start + m].numpy(), axis=1, kind="stable")[:, :n]
        np.put_along_axis(expected[:, start : start + m], order, True, axis=1)
    mask = nmsolve.nm_mask(scores, n, m, backend=backend)
    assert np.array_equal(mask.numpy(), expected)
    nmsolve.check_mask(mask, n, m, transposable=False)
    across = nmsolve.nm_mask(scores.T, n, m, dim=0, backend=backend)
    assert np.array_equal(across.numpy(), expected.T)
    nmsolve.check_mask(across, n, m, transposable=False, dim=0)
    assert torch.equal(nmsolve.nm_mask(scores[0], n, m, backend=backend), mask[0])


def test_warm_start(backend: str) -> None:
    scores = oracles.sample("normal", (2, 19, 24))
    cold = nmsolve.transposable_mask(scores, 4, 8, backend=backend, return_solution=True)
    again = nmsolve.transposable_mask(scores, 4, 8, backend=backend, return_solution=True, warm_start=cold)
    assert torch.equal(cold.mask, again.mask)
    moved = scores + 0.01 * torch.rand(scores.shape)
    for u, v in ((cold.row_duals, cold.col_duals), (-cold.row_duals, 100 + cold.col_duals)):
        solution = nmsolve.transposable_mask(
            moved, 4, 8, backend=backend, return_solution=True, warm_start=(u, v)
        )
        assert_optimal(moved, solution, 4, 8)
    blocks = oracles.sample("normal", (5, 8, 8))
    first = nmsolve.solve_blocks(blocks, 4, backend=backend)
    assert torch.equal(nmsolve.solve_blocks(blocks, 4, backend=backend, warm_start=first).mask, first.mask)


def test_gradients_stay_out(backend: str) -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    mask = nmsolve.transposable_mask(weight, 2, 4, backend=backend)
    (weight * mask).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, mask.float())


def test_backends_keep_the_same_score() -> None:
    scores = oracles.sample("wanda", (32, 48))
    kept = {
        name: nmsolve.transposable_mask(scores, 4, 8, backend=name, return_solution=True).total_objective
        for name in RUNNABLE
    }
    for a, b in itertools.combinations(kept.values(), 2):
        assert a == pytest.approx(b, rel=1e-7)


@settings(deadline=None, max_examples=60)
@given(
    st.data(),
    st.integers(1, 9),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.sampled_from(["torch", *(name for name in RUNNABLE if name == "cpu")]),
)
def test_any_matrix_any_pattern(data: st.DataObject, m: int, shape: tuple[int, int], backend: str) -> None:
    n = data.draw(st.integers(0, m))
    name = data.draw(st.sampled_from(sorted(oracles.distributions)))
    scores = oracles.sample(name, shape, seed=data.draw(st.integers(0, 1000)))
    solution = nmsolve.transposable_mask(scores, n, m, backend=backend, return_solution=True)
    oracles.check_mask_counts(solution.mask[None], n, m)
    assert solution.max_gap <= 1e-6
    recomputed = nmsolve.dual_bound(scores, solution.row_duals, solution.col_duals, NMPattern(n, m))
    torch.testing.assert_close(solution.bound, recomputed, rtol=1e-12, atol=0.0)
    for i, j, block in oracles.blocks_of(scores, m):
        value = oracles.dual_value(block, solution.row_duals[i, j], solution.col_duals[i, j], n)
        assert float(solution.bound[i, j]) == pytest.approx(
            value, rel=1e-9, abs=1e-9 * float(solution.scale[i, j])
        )


# --- errors -------------------------------------------------------------------------------------------------

GOOD = torch.ones(8, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nmsolve.transposable_mask(GOOD, 5, 4), r"n: expected 0 <= n <= m=4 .* got 5"),
        (lambda: nmsolve.transposable_mask(GOOD, -1, 4), r"n: .* got -1"),
        (lambda: nmsolve.transposable_mask(GOOD, 0, 0), r"m: .* at least 1, got 0"),
        (lambda: nmsolve.transposable_mask(GOOD, 2.0, 4), r"n: expected an integer, got 2\.0 \(float\)"),
        (lambda: nmsolve.transposable_mask(GOOD, 2, "4"), r"m: expected an integer, got '4' \(str\)"),
        (lambda: nmsolve.transposable_mask(GOOD, True, 4), r"n: expected an integer, got True"),
        (lambda: nmsolve.transposable_mask([[1.0]], 1, 1), r"scores: expected a torch.Tensor, got list"),
        (lambda: nmsolve.transposable_mask(GOOD.numpy(), 1, 1), r"scores: .* got ndarray"),
        (lambda: nmsolve.transposable_mask(GOOD[0], 2, 4), r"scores: .* got float32 tensor of shape \(8,\)"),
        (lambda: nmsolve.transposable_mask(GOOD.int(), 2, 4), r"scores: expected dtype .* got int32"),
        (lambda: nmsolve.transposable_mask(GOOD.cfloat(), 2, 4), r"scores: expected dtype .* got complex64"),
        (lambda: nmsolve.transposable_mask(GOOD.bool(), 2, 4), r"scores: expected dtype .* got bool"),
        (lambda: nmsolve.transposable_mask(GOOD.to_sparse(), 2, 4), r"scores: expected a dense tensor"),
        (
            lambda: nmsolve.transposable_mask(GOOD.to("meta"), 2, 4),
            r"scores: expected a dense tensor .* meta",
        ),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, method="best"),
            r"method: expected one of exact, .*'best'",
        ),
        (lambda: nmsolve.transposable_mask(GOOD, 2, 4, backend="cuda"), r"backend: expected 'auto' .*'cuda'"),
        (lambda: nmsolve.transposable_mask(GOOD, 2, 4, tau=3.0), r"tau: an option of method 'tsenor'"),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, method="greedy", iterations=3),
            r"iterations: an option",
        ),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, method="tsenor", iterations=0),
            r"iterations: .* got 0",
        ),
        (lambda: nmsolve.transposable_mask(GOOD, 2, 4, method="tsenor", tau=-1.0), r"tau: .* got -1\.0"),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, method="tsenor", tau=float("nan")),
            r"tau: .* got nan",
        ),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, method="greedy", warm_start=(GOOD, GOOD)),
            r"warm_start: only method 'exact'",
        ),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, warm_start=(GOOD, GOOD)),
            r"row_duals of shape \(2, 2, 4\)",
        ),
        (
            lambda: nmsolve.transposable_mask(GOOD, 2, 4, warm_start=7),
            r"warm_start: expected a BlockSolution",
        ),
        (
            lambda: nmsolve.transposable_mask(
                GOOD, 2, 4, warm_start=(torch.zeros(2, 2, 4), torch.full((2, 2, 4), float("inf")))
            ),
            r"warm_start: expected finite col_duals",
        ),
        (lambda: nmsolve.solve_blocks(GOOD, 2), r"blocks: expected a tensor of shape \(B, M, M\)"),
        (lambda: nmsolve.solve_blocks(torch.ones(3, 4, 5), 2), r"blocks: .* \(3, 4, 5\)"),
        (lambda: nmsolve.solve_blocks(torch.ones(3, 0, 0), 0), r"blocks: expected blocks of at least 1 x 1"),
        (
            lambda: nmsolve.solve_blocks(GOOD[None], 2, warm_start=(GOOD[0], GOOD[0])),
            r"warm_start: .* \(B, M\)",
        ),
        (lambda: nmsolve.nm_mask(torch.tensor(1.0), 1, 1), r"scores: expected at least one dimension"),
        (lambda: nmsolve.nm_mask(GOOD, 2, 4, dim=2), r"dim: expected an integer in \[-2, 2\), got 2"),
        (lambda: nmsolve.check_mask(GOOD, 2, 4), r"mask: expected a bool tensor .* got float32"),
        (lambda: nmsolve.check_mask(GOOD.bool(), 2, 4, transposable=False, dim=3), r"dim: .* got 3"),
        (lambda: NMPattern.parse("2-4"), r"pattern: expected 'N:M'"),
        (lambda: NMPattern.from_pruned(5, 4), r"pruned: .* got 5"),
    ],
)
def test_errors_name_argument_expectation_and_value(call: object, message: str) -> None:
    with pytest.raises(NMSolveError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(6, 7), (3, 6, 7), (300, 5000)])
@pytest.mark.parametrize("transposed", [False, True])
def test_nans_are_counted_and_located(shape: tuple[int, ...], transposed: bool) -> None:
    scores = torch.zeros(shape)
    first, last = (*[d // 2 for d in shape[:-1]], 3), tuple(d - 1 for d in shape)
    scores[first], scores[last] = float("nan"), float("nan")
    if transposed:
        scores, first = scores.mT, (*first[:-2], first[-1], first[-2])
    message = rf"got 2 NaN of {scores.numel()}, the first nan at {first}".replace("(", r"\(")
    for solve in (nmsolve.transposable_mask, nmsolve.nm_mask):
        with pytest.raises(NMSolveError, match=message.replace(")", r"\)")):
            solve(scores, 2, 4)


def test_an_explicit_backend_raises_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("numba", "triton") else real(name, *a)
    )
    for name, package in (("cpu", "numba"), ("triton", "triton")):
        with pytest.raises(
            nmsolve.BackendError, match=f"'{name}' cannot run on cpu: {package} is not installed"
        ):
            nmsolve.transposable_mask(GOOD, 2, 4, backend=name)
    assert select("auto", "cpu", 4).name == "torch"


# --- check_mask ---------------------------------------------------------------------------------------------


def test_check_mask_names_block_line_and_count() -> None:
    mask = torch.eye(4, dtype=torch.bool).repeat(2, 3, 2)
    nmsolve.check_mask(mask, 1, 4)
    mask[1, 5, 7] = True
    with pytest.raises(
        NMSolveError, match=r"block \(1, 1, 1\), row 1 keeps 2 of 4 entries, expected 1 .*1:4"
    ):
        nmsolve.check_mask(mask, 1, 4)
    mask[1, 5, 5] = False
    with pytest.raises(NMSolveError, match=r"block \(1, 1, 1\), column 1 keeps 0 of 4"):
        nmsolve.check_mask(mask, 1, 4)
    with pytest.raises(
        NMSolveError, match=r"line \(0, 0\), group 0 along dim -1 keeps 1 of 4 entries, expected 2"
    ):
        nmsolve.check_mask(mask, 2, 4, transposable=False)


def test_check_mask_of_partial_blocks() -> None:
    wide = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    nmsolve.check_mask(wide, 2, 4)
    nmsolve.check_mask(wide.T, 2, 4)
    with pytest.raises(NMSolveError, match=r"row 0 keeps 2 of 4 entries, expected 1"):
        nmsolve.check_mask(wide, 1, 4)
    tall = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 1]], dtype=torch.bool)
    with pytest.raises(NMSolveError, match=r"column 0 keeps 3 of 4 entries, expected 2"):
        nmsolve.check_mask(tall, 2, 4)


# --- patterns -----------------------------------------------------------------------------------------------


def test_pattern_counts_what_is_kept() -> None:
    pattern = NMPattern.parse(" 8 : 16 ")
    assert (pattern.n, pattern.m, pattern.pruned, pattern.density, str(pattern)) == (8, 16, 8, 0.5, "8:16")
    assert NMPattern.from_pruned(1, 4) == NMPattern(3, 4)
    assert NMPattern(np.int64(2), np.int32(4)) == NMPattern(2, 4)  # type: ignore[arg-type]
