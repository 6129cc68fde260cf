"""Scores, SparseGPT and ALPS against the published formulas, written out plainly in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layer_problems import error, problem, rule

import nmsolve
from nmsolve.prune import MaskRule, alps, frank_wolfe, magnitude_scores, ria_scores, sparsegpt, wanda_scores
from nmsolve.prune.layerwise.sparsegpt import sparsegpt_factor


def choose(scores: np.ndarray, n: int, m: int, transposable: bool) -> np.ndarray:
    """The mask of one slab, from the public functions."""
    given = torch.from_numpy(np.ascontiguousarray(scores))
    if transposable:
        return nmsolve.transposable_mask(given, n, m, backend="torch").numpy()
    return nmsolve.nm_mask(given, n, m, backend="torch").numpy()


# --- scores -------------------------------------------------------------------------------------------------


def test_scores_are_the_published_ones():
    weight, inputs = problem(5, 7)
    norms = inputs.norm(dim=0)
    w, x = weight.numpy(), inputs.numpy()
    wanda = np.empty_like(w)
    ria = np.empty_like(w)
    for i in range(5):
        for j in range(7):
            energy = np.sqrt(np.sum(x[:, j] ** 2))
            wanda[i, j] = abs(w[i, j]) * energy
            relative = abs(w[i, j]) / np.abs(w[:, j]).sum() + abs(w[i, j]) / np.abs(w[i]).sum()
            ria[i, j] = relative * energy**0.5
    np.testing.assert_allclose(wanda_scores(weight, norms), wanda)
    np.testing.assert_allclose(ria_scores(weight, norms), ria)
    np.testing.assert_array_equal(magnitude_scores(weight), np.abs(w))


def test_a_line_of_zeros_scores_zero():
    assert torch.equal(ria_scores(torch.zeros(2, 3), torch.ones(3)), torch.zeros(2, 3))


# --- SparseGPT ----------------------------------------------------------------------------------------------


def published_sparsegpt(
    weight: np.ndarray, hessian: np.ndarray, n: int, m: int, transposable: bool, damping: float
) -> np.ndarray:
    """Algorithm 1 of arXiv 2301.00774 without its blocks, by the inverse of each remaining Hessian.

    Instead of a Cholesky factor it takes the optimal brain surgeon update literally: with F the inverse of H
    over the columns from j on, the error of column j is w_j / F_00 and the update is -error * F_0,:.
    """
    w = weight.copy()
    h = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    size = w.shape[1]
    mask = np.ones(w.shape, dtype=bool)
    diagonal = np.array([np.linalg.inv(h[j:, j:])[0, 0] for j in range(size)])
    for j in range(size):
        if j % m == 0:
            stop = min(j + m, size)
            mask[:, j:stop] = choose(w[:, j:stop] ** 2 / diagonal[j:stop], n, m, transposable)
        inverse = np.linalg.inv(h[j:, j:])
        lost = np.where(mask[:, j], 0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= np.outer(lost, inverse[0])
        w[~mask[:, j], j] = 0
    return w * mask


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize(("pattern", "out", "size"), [("2:4", 8, 16), ("4:8", 16, 24), ("2:4", 6, 10)])
def test_sparsegpt_is_the_published_algorithm(pattern, out, size, transposable):
    weight, inputs = problem(out, size)
    hessian = inputs.T @ inputs
    n, m = map(int, pattern.split(":"))
    expected = published_sparsegpt(weight.numpy(), hessian.numpy(), n, m, transposable, 0.01)
    pruned = sparsegpt(weight, hessian, rule(pattern, transposable))
    np.testing.assert_allclose(pruned.weight.numpy(), expected, rtol=1e-7, atol=1e-9)
    nmsolve.check_mask(pruned.mask, n, m, transposable=transposable)


def test_sparsegpt_is_the_same_beyond_one_lazy_block():
    weight, inputs = problem(8, 200, tokens=400)
    hessian = inputs.T @ inputs
    expected = published_sparsegpt(weight.numpy(), hessian.numpy(), 2, 4, False, 0.01)
    pruned = sparsegpt(weight, hessian, rule("2:4", False))
    np.testing.assert_allclose(pruned.weight.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_sparsegpt_drops_inputs_that_are_always_zero():
    weight, inputs = problem(8, 8)
    inputs[:, 3] = 0
    pruned = sparsegpt(weight, inputs.T @ inputs, rule("2:4", True))
    assert (pruned.weight[:, 3] == 0).all()
    assert torch.isfinite(pruned.weight).all()


def test_a_shared_factor_gives_the_same():
    weight, inputs = problem(8, 8)
    hessian = inputs.T @ inputs
    a = sparsegpt(weight, hessian, rule("2:4", True))
    b = sparsegpt(weight, sparsegpt_factor(hessian), rule("2:4", True))
    assert torch.equal(a.weight, b.weight)


def test_a_hessian_that_is_not_positive_is_an_error():
    with pytest.raises(nmsolve.NMSolveError, match="damping: the Hessian is not positive definite"):
        sparsegpt(torch.ones(4, 4), -torch.eye(4), rule("2:4", True))


# --- ALPS ---------------------------------------------------------------------------------------------------


def published_alps(
    weight: np.ndarray, hessian: np.ndarray, n: int, m: int, transposable: bool, damping: float = 0.01
) -> tuple[np.ndarray, np.ndarray]:
    """arXiv 2406.07831 with the constants of its code, by dense solves instead of an eigendecomposition.

    The least squares on the support are solved exactly where the paper stops conjugate gradients early.
    """
    h = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    scale = np.sqrt(np.diag(h))
    h = h / np.outer(scale, scale)
    dense = weight * scale
    target = dense @ h
    eye = np.eye(len(h))

    def project(z: np.ndarray) -> np.ndarray:
        return choose(z**2, n, m, transposable)

    rho, moved = 0.1, False
    last = project(dense)
    d, v = dense * last, np.zeros_like(dense)
    kept = last.sum()
    mask = last
    for k in range(1, 301):
        b = np.linalg.solve(h + rho * eye, (target - v + rho * d).T).T
        z = b + v / rho
        mask = project(z)
        d = z * mask
        v = v + rho * (b - d)
        if k % 3:
            continue
        changed = (mask != last).sum()
        last = mask
        if changed > 0.1 * kept:
            rho, moved = rho * 1.3, True
        elif changed > 0.005 * kept:
            rho, moved = rho * 1.2, True
        elif moved and changed:
            rho *= 1.1
        elif moved:
            break
        else:
            rho /= 5
            if changed:
                d, v = dense * project(dense), np.zeros_like(dense)
        if k > 30 and changed < 0.0003 * kept:
            break
    solved = np.zeros_like(dense)
    for i, row in enumerate(mask):
        solved[i, row] = np.linalg.solve(h[np.ix_(row, row)], target[i, row])
    return solved / scale, mask


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize(("pattern", "out", "size"), [("2:4", 8, 16), ("4:8", 16, 24), ("8:16", 16, 32)])
def test_alps_is_the_published_algorithm(pattern, out, size, transposable):
    weight, inputs = problem(out, size)
    hessian = inputs.T @ inputs
    n, m = map(int, pattern.split(":"))
    expected, support = published_alps(weight.numpy(), hessian.numpy(), n, m, transposable)
    pruned = alps(weight, hessian, rule(pattern, transposable))
    nmsolve.check_mask(pruned.mask, n, m, transposable=transposable)
    np.testing.assert_array_equal(pruned.mask.numpy(), support)
    # Ten conjugate-gradient steps come close to the exact least squares, never below.
    best, found = error(weight, torch.from_numpy(expected), inputs), error(weight, pruned.weight, inputs)
    assert best * 0.999 <= found <= best * 1.02


@pytest.mark.parametrize("energy", [0.0, 1.0])
def test_alps_leaves_weights_of_unrelated_inputs_alone(energy):
    """Without correlations (or any input at all) least squares has nothing to make up for."""
    weight, _ = problem(8, 8)
    pruned = alps(weight, energy * torch.eye(8, dtype=torch.float64), rule("4:8", True))
    nmsolve.check_mask(pruned.mask, 4, 8)
    torch.testing.assert_close(pruned.weight, weight * pruned.mask)


# --- all of them --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposable", [False, True])
def test_better_methods_lose_less(transposable):
    """ALPS <= SparseGPT <= Wanda in reconstruction error, on correlated inputs."""
    errors = []
    for seed in range(3):
        weight, inputs = problem(32, 32, seed=seed)
        hessian = inputs.T @ inputs
        mask = rule("8:16", transposable).choose(wanda_scores(weight, inputs.norm(dim=0)))
        wanda = error(weight, weight * mask, inputs)
        second = error(weight, sparsegpt(weight, hessian, rule("8:16", transposable)).weight, inputs)
        third = error(weight, alps(weight, hessian, rule("8:16", transposable)).weight, inputs)
        errors.append((wanda, second, third))
    wanda, second, third = np.mean(errors, axis=0)
    assert third < second < wanda


@pytest.mark.parametrize("method", [sparsegpt, alps])
def test_float32_comes_close_to_float64(method):
    weight, inputs = problem(32, 64)
    hessian = inputs.T @ inputs
    double = method(weight, hessian, rule("8:16", True)).weight
    single = method(weight.float(), hessian.float(), rule("8:16", True)).weight
    assert single.dtype == torch.float32
    assert error(weight, single.double(), inputs) == pytest.approx(error(weight, double, inputs), rel=0.02)


@pytest.mark.parametrize("method", [sparsegpt, alps, frank_wolfe])
@pytest.mark.parametrize("transposable", [False, True])
def test_kernel_positions_have_masks_of_their_own(method, transposable):
    """Six channels at each of three positions: groups of four do not reach into the next position."""
    weight, inputs = problem(8, 18)
    pruned = method(weight, inputs.T @ inputs, rule("2:4", transposable), positions=3)
    for position in pruned.mask.unflatten(1, (3, 6)).unbind(1):
        nmsolve.check_mask(position, 2, 4, transposable=transposable)


@pytest.mark.parametrize("method", [sparsegpt, alps, frank_wolfe])
def test_what_an_earlier_mask_prunes_stays_pruned(method):
    weight, inputs = problem(16, 16)
    allowed = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) < 0.7
    pruned = method(weight * allowed, inputs.T @ inputs, rule("4:8", True), allowed=allowed)
    assert not (pruned.mask & ~allowed).any()
    assert (pruned.weight[~pruned.mask] == 0).all()
    assert (pruned.mask.unflatten(1, (-1, 8)).sum(-1) <= 4).all()
    assert (pruned.mask.unflatten(0, (-1, 8)).sum(1) <= 4).all()


def best_within(scores: np.ndarray, allowed: np.ndarray, n: int) -> float:
    """The most that at most n allowed entries of every line keep, by HiGHS."""
    from scipy.optimize import linprog

    rows, cols = np.nonzero(allowed)
    if not len(rows):
        return 0.0
    lines = np.zeros((sum(scores.shape), len(rows)))
    lines[rows, np.arange(len(rows))] = 1
    lines[len(scores) + cols, np.arange(len(rows))] = 1
    worth = scores[rows, cols]
    result = linprog(-worth, A_ub=lines, b_ub=np.full(len(lines), n), bounds=(0, 1), method="highs")
    assert result.status == 0
    return float(-result.fun)


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize(
    ("n", "m", "rows", "cols"), [(2, 4, 8, 12), (2, 3, 3, 3), (3, 8, 13, 9), (8, 16, 16, 32)]
)
def test_of_what_is_allowed_the_most_is_kept(backend, share, n, m, rows, cols):
    """Also where no mask with n in every line is allowed, or where one would keep less."""
    if backend == "cpu":
        pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(rows)
    scores = torch.randn(2, rows, cols, generator=generator, dtype=torch.float64).square()
    allowed = torch.rand(2, rows, cols, generator=generator) < share
    mask_rule = MaskRule(f"{n}:{m}", backend=backend)
    mask = mask_rule.choose(scores, allowed)
    within = mask_rule.step(scores, allowed)
    assert not ((mask | within) & ~allowed).any()
    best = 0.0
    for b in range(2):
        for i in range(0, rows, m):
            for j in range(0, cols, m):
                block = (b, slice(i, i + m), slice(j, j + m))
                for found in (mask, within):
                    assert found[block].sum(0).max() <= n
                    assert found[block].sum(1).max() <= n
                best += best_within(scores[block].numpy(), allowed[block].numpy(), n)
    assert float((scores * mask).sum()) == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert 0.95 * best <= float((scores * within).sum()) <= best * (1 + 1e-9)
    assert mask_rule.tally.objective == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert mask_rule.tally.score == pytest.approx(float((scores * allowed).sum()))
    assert mask_rule.tally.max_gap <= 1e-12


def test_where_all_is_allowed_n_are_kept():
    """Also where fewer would keep more: a line may give up its entries for those of others."""
    scores = torch.randn(64, 16, 32, generator=torch.Generator().manual_seed(0)).square()
    scores[::2, 3] = 0
    allowed = torch.ones_like(scores, dtype=torch.bool)
    mask = MaskRule("4:8").choose(scores, allowed)
    assert torch.equal(mask, MaskRule("4:8").choose(scores))
    allowed[:, :8, :8] = False
    within = MaskRule("4:8").choose(scores, allowed)
    assert not within[:, :8, :8].any()
    assert torch.equal(within[:, 8:], mask[:, 8:])


def test_groups_of_what_is_allowed():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0]])
    allowed = torch.tensor([[False, True, False, True]])
    ordinary = MaskRule("1:2", transposable=False)
    assert ordinary.choose(scores, allowed).tolist() == [[False, True, False, True]]
    assert ordinary.tally.objective == 6.0


def test_the_tally_has_the_certificate():
    weight, inputs = problem(16, 32)
    exact, greedy = rule("4:8", True), MaskRule("4:8", True, "greedy", "torch")
    scores = wanda_scores(weight, inputs.norm(dim=0))
    exact.choose(scores)
    greedy.choose(scores)
    assert exact.tally.gap == pytest.approx(0, abs=1e-12)
    assert exact.tally.retained >= greedy.tally.retained
    assert greedy.tally.gap > 0
    assert greedy.tally.bound == pytest.approx(exact.tally.objective)
    assert exact.tally.solves == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "2-4"}, "pattern"),
        ({"pattern": 3}, "pattern"),
        ({"pattern": "2:4", "method": "best"}, "mask_method"),
        ({"pattern": "2:4", "transposable": False, "method": "tsenor"}, "needs transposable=True"),
    ],
)
def test_a_rule_says_what_is_wrong(arguments, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        MaskRule(**arguments)


@pytest.mark.parametrize("method", [sparsegpt, alps, frank_wolfe])
def test_a_parameter_is_pruned_without_gradients(method):
    weight, inputs = problem(8, 8)
    pruned = method(torch.nn.Parameter(weight), inputs.T @ inputs, rule("2:4", True))
    assert not pruned.weight.requires_grad
    assert torch.equal(pruned.weight, method(weight, inputs.T @ inputs, rule("2:4", True)).weight)


@pytest.mark.parametrize("method", [sparsegpt, alps, frank_wolfe])
def test_autocast_does_not_lower_the_precision(method):
    weight, inputs = problem(16, 16)
    arguments = weight.float(), (inputs.T @ inputs).float(), rule("4:8", True)
    expected = method(*arguments).weight
    with torch.autocast("cpu", torch.bfloat16):
        found = method(*arguments).weight
    assert torch.equal(found, expected)


@pytest.mark.parametrize("method", [sparsegpt, alps, frank_wolfe])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weight": torch.ones(8)},
            r"weight: expected a floating-point tensor \(out, in\), got float32 tensor of shape \(8,\)",
        ),
        ({"weight": torch.ones(8, 6)}, r"hessian: expected \(in, in\) with in=6, got \(8, 8\)"),
        (
            {"hessian": torch.ones(8, 6)},
            r"hessian: expected a tensor \(in, in\), got float32 tensor of shape \(8, 6\)",
        ),
        ({"hessian": torch.eye(8).bfloat16()}, "hessian: expected float32 or float64, got bfloat16"),
        ({"hessian": torch.full((8, 8), torch.nan)}, "hessian: expected finite values"),
        ({"positions": 3}, "positions: expected a divisor of in=8, got 3"),
        ({"allowed": torch.ones(8, 8)}, r"allowed: expected a bool tensor of shape \(8, 8\)"),
    ],
)
def test_arguments_that_do_not_fit(method, changes, message):
    given = {"weight": torch.ones(8, 8), "hessian": torch.eye(8), "rule": rule("2:4", True), **changes}
    with pytest.raises(nmsolve.NMSolveError, match=message):
        method(**given)
