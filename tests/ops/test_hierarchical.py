"""Hierarchical masks, against brute force, HiGHS and published loops.

The interpreter makes the Triton backend slow: its tests are in tests/kernels/test_strips.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers.venom import enumerated, largest_sums
from torch.export import export

import nmsolve
from nmsolve import NMSolveError, VNMPattern, check_hierarchical_mask, hierarchical_mask
from nmsolve.backends.dispatch import BACKENDS
from nmsolve.backends.torch import strips as reference

# (V, N, M, columns)
PATTERNS = [(4, 2, 8, 4), (3, 1, 6, 4), (5, 3, 7, 4), (2, 1, 5, 2), (1, 2, 8, 4), (4, 4, 9, 4), (3, 4, 9, 6)]
SCORES = {
    "normal": lambda g, *shape: torch.randn(shape, generator=g),
    "ties": lambda g, *shape: torch.randint(0, 3, shape, generator=g).float(),
    "zero": lambda g, *shape: torch.zeros(shape),
    "tiny": lambda g, *shape: torch.randn(shape, generator=g).abs() * 1e-30,
    "huge": lambda g, *shape: torch.randn(shape, generator=g).abs() * 1e30,
    "columns": lambda g, *shape: (
        torch.randn(shape, generator=g).abs() * torch.randn(shape[-1], generator=g).exp()
    ),
}


def scores_of(kind: str, *shape: int, seed: int = 0) -> torch.Tensor:
    return SCORES[kind](torch.Generator().manual_seed(seed), *shape)


@pytest.fixture(params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    if not BACKENDS[request.param].is_installed():
        pytest.skip(f"{BACKENDS[request.param].needs} is not installed")
    return request.param


def largest(block: np.ndarray, n: int) -> float:
    """What a block's rows keep of these columns."""
    return float(np.sort(block, axis=1)[:, max(0, block.shape[1] - n) :].sum()) if n else 0.0


def best_choice(block: np.ndarray, pattern: VNMPattern) -> float:
    """The best of all choices of columns, one by one."""
    width = block.shape[1]
    k = min(pattern.columns, width)
    n = min(pattern.n, k)
    return max(largest(block[:, list(chosen)], n) for chosen in itertools.combinations(range(width), k))


def by_strip_and_group(matrix: torch.Tensor, pattern: VNMPattern):
    values = matrix.double().numpy()
    for s, top in enumerate(range(0, values.shape[0], pattern.v)):
        for g, left in enumerate(range(0, values.shape[1], pattern.m)):
            yield s, g, values[top : top + pattern.v, left : left + pattern.m]


def assert_sound(scores: torch.Tensor, pattern: VNMPattern, found: nmsolve.HierarchicalSolution) -> None:
    """Counts, and that mask, columns and numbers say the same."""
    check_hierarchical_mask(found.mask, pattern)
    kept = (scores.double() * found.mask).numpy()
    for s, g, block in by_strip_and_group(torch.from_numpy(kept), pattern):
        where = found.mask[s * pattern.v :, g * pattern.m :][: block.shape[0], : block.shape[1]]
        chosen = [j for j in found.columns[s, g].tolist() if j >= 0]
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(pattern.columns, block.shape[1])
        assert set(where.any(0).nonzero().flatten().tolist()) <= set(chosen)
        assert float(found.objective[s, g]) == pytest.approx(block.sum(), rel=1e-12, abs=1e-300)
        assert float(found.scale[s, g]) == pytest.approx(np.abs(block).sum(), rel=1e-12, abs=1e-300)
    assert (found.bound >= found.objective).all()


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("numbers", PATTERNS)
def test_no_choice_of_columns_keeps_more(backend, numbers, kind):
    pattern = VNMPattern(*numbers)
    # A last strip and a last group are partial.
    scores = scores_of(kind, 2 * pattern.v + 1, 2 * pattern.m + 3)
    found = hierarchical_mask(scores, pattern, backend=backend, return_solution=True)
    assert_sound(scores, pattern, found)
    for s, g, block in by_strip_and_group(scores, pattern):
        best = best_choice(block, pattern)
        assert float(found.objective[s, g]) == pytest.approx(best, rel=1e-12)
    assert found.max_gap == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(4, 10),
    st.integers(1, 13),
    st.integers(1, 21),
    st.sampled_from(["normal", "ties", "columns"]),
    st.sampled_from([0, 1, 30, 1 << 18]),
    st.integers(0, 1 << 30),
)
def test_bounds_hold_however_early_the_search_ends(v, n, m, rows, cols, kind, limit, seed):
    pattern = VNMPattern(v, n, m)
    scores = scores_of(kind, rows, cols, seed=seed)
    for name in ("cpu", "torch"):
        if BACKENDS[name].is_installed():
            found = hierarchical_mask(scores, pattern, limit=limit, backend=name, return_solution=True)
            assert_sound(scores, pattern, found)
            assert (found.gap >= 0).all()
            for s, g, block in by_strip_and_group(scores, pattern):
                best = best_choice(block, pattern)
                assert float(found.bound[s, g]) >= best - 1e-12 * abs(best)


def integer_program(block: np.ndarray, n: int, k: int) -> float:
    """The optimum by HiGHS: y_j of the columns, and x_rj <= y_j of the entries."""
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import block_diag, coo_array, eye_array, hstack, kron

    v, m = block.shape
    ones, rows, entries = coo_array(np.ones((1, m))), eye_array(v), eye_array(v * m)
    below = hstack([kron(coo_array(np.ones((v, 1))), eye_array(m)), -entries])
    counts = block_diag([ones, kron(rows, ones)])
    held = np.concatenate([[k], np.full(v, n)])
    result = milp(
        np.concatenate([np.zeros(m), -block.ravel()]),
        constraints=[LinearConstraint(below, lb=0), LinearConstraint(counts, held, held)],
        integrality=np.concatenate([np.ones(m), np.zeros(v * m)]),
        bounds=(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    assert result.status == 0, result.message
    return -result.fun


@pytest.mark.parametrize(
    ("v", "n", "m", "columns"),
    [
        (8, 2, 16, 4),
        (16, 2, 24, 4),
        (12, 4, 24, 8),
        (32, 2, 32, 4),
    ],
)
def test_integer_programming_finds_nothing_better(backend, v, n, m, columns):
    pattern = VNMPattern(v, n, m, columns)
    scores = scores_of("columns", v, 2 * m)
    found = hierarchical_mask(scores, pattern, backend=backend, return_solution=True)
    assert found.max_gap == 0
    for _, g, block in by_strip_and_group(scores, pattern):
        assert float(found.objective[0, g]) == pytest.approx(integer_program(block, n, columns), rel=1e-7)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_against_the_loops_of_venom(backend, n):
    scores = scores_of("normal", 32, 36).abs()
    found = hierarchical_mask(scores, (16, n, 12), backend=backend, return_solution=True)
    peer = enumerated(scores, 16, n, 12)
    check_hierarchical_mask(peer, (16, n, 12))
    assert found.total_objective == pytest.approx(float((scores.double() * peer).sum()), rel=1e-12)
    by_sums = largest_sums(scores, 16, n, 12)
    check_hierarchical_mask(by_sums, (16, n, 12))
    assert float((scores.double() * by_sums).sum()) < found.total_objective


def test_a_strip_of_one_row_is_ordinary(backend):
    scores = scores_of("normal", 16, 32)
    mask = hierarchical_mask(scores, "1:2:8", backend=backend)
    assert torch.equal(mask, nmsolve.nm_mask(scores, 2, 8))
    mask = hierarchical_mask(scores, "16:2:4", backend=backend)
    assert torch.equal(mask, nmsolve.nm_mask(scores, 2, 4))


def test_huge_negative_scores_cost_digits_and_the_gap_says_so(backend):
    scores = scores_of("normal", 16, 32).abs()
    scores[:, ::3] = -1e14
    found = hierarchical_mask(scores, "8:2:16", backend=backend, return_solution=True)
    assert (scores[found.mask] > 0).all()
    for s, g, block in by_strip_and_group(scores, VNMPattern(8, 2, 16)):
        assert float(found.bound[s, g]) >= best_choice(block, VNMPattern(8, 2, 16)) - 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_strides_and_batches(backend, dtype):
    scores = scores_of("normal", 3, 20, 2, 24).to(dtype).transpose(1, 2)[:, :, ::2]
    found = hierarchical_mask(scores, "4:2:8", backend=backend, return_solution=True)
    assert found.columns.shape == (3, 2, 3, 3, 4)
    for index in itertools.product(range(3), range(2)):
        alone = hierarchical_mask(scores[index].clone(), "4:2:8", backend=backend)
        assert torch.equal(found.mask[index], alone)
    same = hierarchical_mask(scores.float(), "4:2:8", backend=backend)
    assert dtype == torch.float64 or torch.equal(found.mask, same)


def test_more_columns_than_can_be_searched(backend):
    pattern = VNMPattern(4, 10, 40, 20)
    scores = scores_of("normal", 8, 80)
    found = hierarchical_mask(scores, pattern, backend=backend, return_solution=True)
    assert_sound(scores, pattern, found)
    for s, g, block in by_strip_and_group(scores, pattern):
        best = integer_program(block, pattern.n, pattern.columns)
        assert float(found.objective[s, g]) <= best * (1 + 1e-7) <= float(found.bound[s, g]) * (1 + 2e-7)
        assert float(found.objective[s, g]) >= 0.97 * best


def test_a_matrix_in_pieces(backend, monkeypatch):
    scores = scores_of("columns", 37, 45)
    whole = hierarchical_mask(scores, "8:2:16", backend=backend, return_solution=True)
    monkeypatch.setattr("nmsolve.ops.hierarchical._CHUNK", 256)
    monkeypatch.setattr(reference, "_CHUNK", 300)
    pieces = hierarchical_mask(scores, "8:2:16", backend=backend, return_solution=True)
    assert torch.equal(whole.mask, pieces.mask)
    assert torch.equal(whole.objective, pieces.objective)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 4, 8), (2, 0, 8)])
def test_empty(backend, shape):
    found = hierarchical_mask(torch.empty(shape), "4:2:8", backend=backend, return_solution=True)
    assert found.mask.shape == shape
    assert found.total_objective == found.total_bound == found.max_gap == found.relative_gap == 0
    check_hierarchical_mask(found.mask, "4:2:8")


def test_nothing_and_everything_kept(backend):
    scores = scores_of("normal", 8, 16)
    assert not hierarchical_mask(scores, "4:0:8", backend=backend).any()
    assert hierarchical_mask(scores, VNMPattern(4, 8, 8, 8), backend=backend).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_compilers_and_transforms():
    scores = scores_of("normal", 2, 8, 16)

    def mask_of(x: torch.Tensor) -> torch.Tensor:
        return hierarchical_mask(x, "4:2:8", backend="torch")

    expected = mask_of(scores)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(mask_of, fullgraph=True, backend="aot_eager")(scores), expected)
    assert torch.equal(torch.func.vmap(mask_of)(scores), expected)

    class Masked(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> nmsolve.HierarchicalSolution:
            return hierarchical_mask(x, "4:2:8", backend="torch", return_solution=True)

    assert torch.equal(export(Masked(), (scores,)).module()(scores).mask, expected)
    operator = torch.ops.nmsolve.hierarchical_solution.default
    torch.library.opcheck(
        operator, (scores, 4, 2, 8, 4, 1 << 18, "torch"), test_utils=("test_schema", "test_faketensor")
    )


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("2:4", "pattern: expected 'V:N:M'"),
        ((2, 4), "pattern: expected 'V:N:M'"),
        (None, "pattern: expected 'V:N:M'"),
        ("0:2:8", "v: expected strips of at least 1 row, got 0"),
        ("4:5:8", "n: expected 0 <= n <= columns=4"),
        ("4:2:3", "m: expected groups of at least columns=4 columns, got 3"),
        ((4.0, 2, 8), "v: expected an integer, got 4.0"),
        ((4, True, 8), "n: expected an integer, got True"),
    ],
)
def test_patterns_that_are_none(pattern, message):
    with pytest.raises(NMSolveError, match=message):
        hierarchical_mask(torch.zeros(8, 8), pattern)


def test_the_pattern():
    assert VNMPattern.of(" 64 : 2 : 16 ") == VNMPattern.of((64, 2, 16)) == VNMPattern(64, 2, 16)
    assert VNMPattern.of(VNMPattern(1, 1, 2, 2)).columns == 2
    assert VNMPattern(np.int64(64), 2, 16) == VNMPattern(64, 2, 16)
    with pytest.raises(NMSolveError, match="columns: expected at least 1"):
        VNMPattern(4, 0, 8, 0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0]], "scores: expected a torch.Tensor, got list"),
        (torch.zeros(8), "scores: expected"),
        (torch.zeros(8, 8, dtype=torch.int64), "scores: expected dtype"),
        (torch.full((8, 8), torch.nan), "scores: expected finite values"),
        (torch.full((8, 8), -torch.inf), "scores: expected finite values"),
        (torch.full((8, 8), 1e300, dtype=torch.float64), "scores: expected absolute values below"),
    ],
)
def test_scores_that_are_refused(backend, scores, message):
    with pytest.raises(NMSolveError, match=message):
        hierarchical_mask(scores, "4:2:8", backend=backend)


@pytest.mark.parametrize("limit", [-1, 1.5, True, None])
def test_limits_that_are_refused(limit):
    with pytest.raises(NMSolveError, match="limit: expected an integer of at least 0"):
        hierarchical_mask(torch.zeros(8, 8), "4:2:8", limit=limit)


def test_backends_that_are_refused():
    with pytest.raises(NMSolveError, match="backend: expected 'auto' or one of"):
        hierarchical_mask(torch.zeros(8, 8), "4:2:8", backend="tpu")


def test_masks_that_are_not():
    mask = hierarchical_mask(torch.rand(2, 9, 20), "4:2:8")
    check_hierarchical_mask(mask, "4:2:8")
    wrong = mask.clone()
    wrong[1, 8, 17] = ~wrong[1, 8, 17]
    with pytest.raises(NMSolveError, match=r"matrix 1, strip 2, group 2, row 0 keeps . entries, expected 2"):
        check_hierarchical_mask(wrong, "4:2:8")
    spread = torch.zeros(4, 8, dtype=torch.bool)
    for row in range(4):
        spread[row, 2 * row : 2 * row + 2] = True
    with pytest.raises(NMSolveError, match="strip 0, group 0 keeps 8 columns, expected at most 4"):
        check_hierarchical_mask(spread, "4:2:8")
    with pytest.raises(NMSolveError, match="mask: expected a bool tensor"):
        check_hierarchical_mask(spread.float(), "4:2:8")
