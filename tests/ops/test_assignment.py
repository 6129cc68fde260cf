"""Assignment: every backend against SciPy, and the certificate against what it claims."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nmsolve
from nmsolve import assignment

scipy_optimize = pytest.importorskip("scipy.optimize")


@pytest.fixture(params=["torch", "cpu", "triton"])
def backend(request):
    if request.param != "torch":
        pytest.importorskip({"cpu": "numba", "triton": "triton"}[request.param])
    return request.param


def families(batch, m, seed=0):
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(m, generator=g) for _ in range(batch)])
    identity = torch.eye(m)[order]
    yield "uniform", torch.rand(batch, m, m, generator=g)
    yield "signed", torch.randn(batch, m, m, generator=g)
    yield "plan", nmsolve.sinkhorn(torch.rand(batch, m, m, generator=g), 0.03, 20, backend="torch")
    yield "permuted", identity + 0.3 * torch.randn(batch, m, m, generator=g)
    yield "ties", torch.randint(0, 4, (batch, m, m), generator=g).float()
    yield "constant", torch.full((batch, m, m), 0.37)
    yield "rank one", torch.rand(batch, m, 1, generator=g) * torch.rand(batch, 1, m, generator=g)
    yield "steep", torch.randn(batch, m, m, generator=g).mul(3).exp()
    yield "tiny", torch.rand(batch, m, m, generator=g) * 1e-30
    yield "huge", torch.randn(batch, m, m, generator=g) * 1e30


def check(scores, permutation, tolerance):
    """Permutations, and as good as SciPy's."""
    m = scores.shape[-1]
    wide = scores.double()
    assert torch.equal(permutation.sort(-1).values, torch.arange(m).expand_as(permutation))
    ours = wide.gather(2, permutation.unsqueeze(2)).sum((1, 2))
    for k, matrix in enumerate(wide.numpy()):
        rows, cols = scipy_optimize.linear_sum_assignment(matrix, maximize=True)
        best = matrix[rows, cols].sum()
        assert ours[k] >= best - tolerance * np.abs(matrix[rows, cols]).sum() - 1e-300


@pytest.mark.parametrize("m", [1, 2, 3, 8, 13])
def test_optimal(backend, m):
    for _, scores in families(4, m, seed=m):
        check(scores, assignment(scores, backend=backend), 1e-6 if backend == "triton" else 1e-12)


@pytest.mark.parametrize("m", [16, 31, 64, 100])
def test_optimal_numba(m):
    pytest.importorskip("numba")
    for _, scores in families(5, m, seed=m):
        check(scores, assignment(scores, backend="cpu"), 1e-12)
        check(scores.double(), assignment(scores.double(), backend="cpu"), 1e-12)


def test_triton_64():
    pytest.importorskip("triton")
    scores = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(0))
    check(scores, assignment(scores, backend="triton"), 1e-6)


@pytest.mark.parametrize("m", [257, 512])
def test_large(m):
    pytest.importorskip("numba")
    for name, scores in families(1, m, seed=m):
        if name in ("uniform", "plan", "ties", "rank one"):
            check(scores, assignment(scores, backend="cpu"), 1e-12)


@pytest.mark.slow
def test_1024():
    for _, scores in families(1, 1024):
        check(scores, assignment(scores, backend="cpu"), 1e-12)


def test_certificate(backend):
    for _, scores in families(3, 9):
        solution = assignment(scores, backend=backend, return_solution=True)
        assert torch.equal(solution.permutation, assignment(scores, backend=backend))
        wide = scores.double()
        taken = wide.gather(2, solution.permutation.unsqueeze(2)).squeeze(2)
        u, v = solution.row_duals, solution.col_duals
        assert u.dtype == v.dtype == solution.objective.dtype == torch.float64
        assert torch.allclose(solution.objective, taken.sum(1), rtol=1e-12)
        assert torch.allclose(solution.scale, taken.abs().sum(1), rtol=1e-12)
        over = (wide - u.unsqueeze(2) - v.unsqueeze(1)).clamp(min=0).sum((1, 2))
        bound = u.sum(1) + v.sum(1) + over
        size = u.abs().sum(1) + v.abs().sum(1)
        assert ((bound - solution.bound).abs() <= 1e-12 * size).all()
        assert solution.max_gap < (1e-5 if backend == "triton" else 1e-12)


def test_one_matrix(backend):
    scores = torch.rand(5, 5, generator=torch.Generator().manual_seed(6))
    solution = assignment(scores, backend=backend, return_solution=True)
    assert solution.permutation.shape == solution.row_duals.shape == (5,)
    assert solution.objective.shape == solution.gap.shape == ()
    assert torch.equal(solution.permutation, assignment(scores, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_strides_and_leading_dimensions(backend, dtype):
    scores = torch.randn(6, 2, 6, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    scores = scores.permute(3, 1, 2, 0)
    permutation = assignment(scores, backend=backend)
    assert permutation.shape == (3, 2, 6)
    assert permutation.dtype == torch.int64
    check(scores.reshape(6, 6, 6), permutation.view(6, 6), 1e-6)
    one = torch.rand(4, 1, generator=torch.Generator().manual_seed(2)).expand(2, 4, 4)
    assert assignment(one, backend=backend).shape == (2, 4)


def test_same_answer_in_any_batch_and_on_any_number_of_threads(backend):
    scores = torch.randint(0, 3, (50, 7, 7), generator=torch.Generator().manual_seed(3)).float()
    whole = assignment(scores, backend=backend)
    assert torch.equal(assignment(scores[11:13], backend=backend), whole[11:13])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(assignment(scores, backend=backend), whole)
    finally:
        torch.set_num_threads(threads)


def test_many_threads_share_the_work():
    pytest.importorskip("numba")
    scores = torch.rand(700, 24, 24, generator=torch.Generator().manual_seed(4))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        many = assignment(scores, backend="cpu")
        torch.set_num_threads(1)
        assert torch.equal(assignment(scores, backend="cpu"), many)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.sampled_from([0, 1, 2, 5]))
def test_property_optimal(m, seed, levels):
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, m, m, generator=g)
    if levels:
        scores = scores.mul(levels).round()
    solution = assignment(scores, backend="cpu", return_solution=True)
    check(scores, solution.permutation, 1e-12)
    assert solution.max_gap < 1e-12


def test_adding_constants_to_lines_changes_nothing():
    g = torch.Generator().manual_seed(5)
    scores = torch.randn(3, 20, 20, generator=g, dtype=torch.float64)
    moved = scores + torch.randn(3, 20, 1, generator=g) + torch.randn(3, 1, 20, generator=g)
    assert torch.equal(assignment(scores), assignment(moved))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 0), (2, 0, 5, 5)])
def test_empty(backend, shape):
    scores = torch.zeros(shape)
    assert assignment(scores, backend=backend).shape == shape[:-1]
    solution = assignment(scores, backend=backend, return_solution=True)
    assert solution.objective.shape == shape[:-2]
    assert solution.max_gap == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.zeros(2, 3, 4), "scores: expected square"),
        (torch.zeros(4), "scores: expected"),
        (torch.zeros(2, 2).int(), "scores: expected dtype"),
        (
            torch.tensor([[0.0, float("nan")], [0.0, 1.0]]),
            r"scores: expected numbers, got 1 NaN .*\(0, 1\)",
        ),
        (
            torch.tensor([[0.0, float("-inf")], [0.0, float("-inf")]]),
            "scores: the matrix has no permutation that takes every inf and no -inf: "
            "column 1 holds 0 other than -inf, and keeps 1",
        ),
        (
            torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[float("inf"), float("inf")], [0.0, 1.0]]]),
            r"scores: matrix \(1,\) has no permutation .*: row 0 holds 2 inf, and keeps 1",
        ),
    ],
)
def test_refuses(scores, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        assignment(scores)


@pytest.mark.parametrize("place", [(0, 0), (3, 8), (10, 10)])
def test_refuses_nan_anywhere(backend, place):
    scores = torch.rand(6, 11, 11)
    scores[(4, *place)] = float("nan")
    with pytest.raises(nmsolve.NMSolveError, match="scores: expected numbers, got 1 NaN"):
        assignment(scores, backend=backend)
    scores[2, 5, 5] = float("inf")
    with pytest.raises(nmsolve.NMSolveError, match="scores: expected numbers, got 1 NaN"):
        assignment(scores, backend=backend)


def test_refuses_backends():
    with pytest.raises(nmsolve.NMSolveError, match="backend: expected"):
        assignment(torch.eye(2), backend="scipy")
    pytest.importorskip("triton")
    with pytest.raises(nmsolve.BackendError, match="up to M=64"):
        assignment(torch.eye(65), backend="triton")


def test_compiles_and_vmaps():
    scores = torch.rand(3, 2, 6, 6)
    expected = assignment(scores)
    assert torch.equal(torch.compile(assignment, fullgraph=True, backend="eager")(scores), expected)
    assert torch.equal(torch.vmap(assignment, in_dims=1, out_dims=1)(scores), expected)
