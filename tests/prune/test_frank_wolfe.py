"""Frank-Wolfe and exchanges against every mask of small layers, plain float64 formulas and other methods."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_problems import error, problem

import nmsolve
from nmsolve.prune import (
    MaskRule,
    frank_wolfe,
    layer_error_bound,
    magnitude_scores,
    prune_model,
    wanda_scores,
)
from nmsolve.prune.layerwise import frank_wolfe as module
from nmsolve.prune.methods import PRUNING_METHODS


def rule(pattern: str, transposable: bool) -> MaskRule:
    """The fastest backend: there are many solves."""
    return MaskRule(pattern, transposable)


def wanda_mask(weight, inputs, given_rule):
    return given_rule.choose(wanda_scores(weight, inputs.norm(dim=0)))


def all_masks(n: int, m: int, transposable: bool) -> np.ndarray:
    """Every mask of one block ``(m, m)``."""
    lines = [np.isin(np.arange(m), kept) for kept in itertools.combinations(range(m), n)]
    blocks = np.array(list(itertools.product(lines, repeat=m)))
    return blocks[(blocks.sum(1) == n).all(1)] if transposable else blocks


@pytest.mark.parametrize("transposable", [False, True])
def test_one_block_comes_close_to_the_best_of_all_masks(transposable):
    masks = all_masks(2, 4, transposable)
    ratios = []
    for seed in range(12):
        weight, inputs = problem(4, 4, seed=seed)
        hessian = (inputs.T @ inputs).numpy()
        missing = np.where(masks, 0, weight.numpy())
        losses = np.einsum("bij,jk,bik->b", missing, hessian, missing)
        pruned = frank_wolfe(weight, inputs.T @ inputs, rule("2:4", transposable))
        lost = (weight - pruned.weight).numpy()
        ratios.append(np.einsum("ij,jk,ik", lost, hessian, lost) / losses.min())
        whole = np.einsum("ij,jk,ik", weight.numpy(), hessian, weight.numpy())
        bound = layer_error_bound(weight, inputs.T @ inputs, rule("2:4", transposable), iterations=30)
        assert 0 < bound * whole <= losses.min() * (1 + 1e-9)
    assert min(ratios) >= 1 - 1e-9
    assert np.mean(np.isclose(ratios, 1)) >= 0.5
    assert np.mean(ratios) < 1.15


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize(("pattern", "out", "size"), [("2:4", 16, 24), ("4:8", 32, 32), ("8:16", 32, 48)])
def test_it_loses_less_than_the_mask_it_starts_from(pattern, out, size, transposable):
    weight, inputs = problem(out, size)
    hessian = inputs.T @ inputs
    start = wanda_mask(weight, inputs, rule(pattern, transposable))
    pruned = frank_wolfe(weight, hessian, rule(pattern, transposable))
    n, m = map(int, pattern.split(":"))
    nmsolve.check_mask(pruned.mask, n, m, transposable=transposable)
    assert torch.equal(pruned.weight, weight * pruned.mask)
    found = error(weight, pruned.weight, inputs)
    assert found < 0.9 * error(weight, weight * start, inputs)
    assert found >= layer_error_bound(weight, hessian, rule(pattern, transposable), iterations=20)


@pytest.mark.parametrize("transposable", [False, True])
def test_no_single_exchange_is_left_that_gains(transposable):
    """Every exchange of the mask is tried out in full: its loss is computed anew."""
    weight, inputs = problem(8, 16)
    hessian = inputs.T @ inputs
    pruned = frank_wolfe(weight, hessian, rule("4:8", transposable), sweeps=100)
    mask = pruned.mask.clone()

    def loss(kept):
        missing = weight * ~kept
        return float(((missing @ hessian) * missing).sum())

    reached, tried = loss(mask), 0
    for base in (0, 8):
        for j, k in itertools.permutations(range(base, base + 8), 2):
            for one in torch.nonzero(mask[:, j] & ~mask[:, k]).flatten().tolist():
                others = torch.nonzero(mask[:, k] & ~mask[:, j]).flatten().tolist() if transposable else [one]
                for other in others:
                    changed = mask.clone()
                    changed[one, j], changed[one, k] = False, True
                    if transposable:
                        changed[other, k], changed[other, j] = False, True
                    # The sweeps end when one gains less than 0.2 %, which may leave that much.
                    assert loss(changed) >= reached * (1 - 0.003)
                    tried += 1
    assert tried > 100


def test_exchanges_alone_keep_all_counts_and_never_lose(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 300)  # several chunks
    weight, inputs = problem(24, 40)
    start = rule("4:8", True).choose(magnitude_scores(weight))
    losses = []
    for sweeps in (0, 1, 2, 5):
        given = {"start": start, "iterations": 0, "sweeps": sweeps}
        pruned = frank_wolfe(weight, inputs.T @ inputs, rule("4:8", True), **given)
        nmsolve.check_mask(pruned.mask, 4, 8)
        losses.append(error(weight, pruned.weight, inputs))
    assert losses[0] == error(weight, weight * start, inputs)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("transposable", [False, True])
def test_uncorrelated_inputs_leave_the_squared_wanda_mask(transposable):
    weight, _ = problem(16, 16)
    hessian = torch.diag(torch.linspace(0.1, 3, 16, dtype=torch.float64))
    best = rule("4:8", transposable).choose(weight.square() * hessian.diagonal())
    assert torch.equal(frank_wolfe(weight, hessian, rule("4:8", transposable)).mask, best)


def test_it_can_start_from_any_mask():
    weight, inputs = problem(32, 32)
    hessian = inputs.T @ inputs
    start = wanda_mask(weight, inputs, rule("8:16", True))
    unchanged = start.clone()
    pruned = frank_wolfe(weight, hessian, rule("8:16", True), start=start, iterations=5)
    assert torch.equal(start, unchanged)
    assert error(weight, pruned.weight, inputs) < error(weight, weight * start, inputs)
    nmsolve.check_mask(pruned.mask, 8, 16)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    pattern=st.sampled_from(["1:1", "1:2", "2:4", "3:8", "5:7", "0:4", "4:4"]),
    transposable=st.booleans(),
    single=st.booleans(),
)
def test_odd_shapes_and_patterns(seed, shape, pattern, transposable, single):
    weight, inputs = problem(*shape, tokens=30, seed=seed)
    if single:
        weight, inputs = weight.float(), inputs.float()
    pruned = frank_wolfe(weight, inputs.T @ inputs, rule(pattern, transposable), iterations=4, sweeps=2)
    n, m = map(int, pattern.split(":"))
    nmsolve.check_mask(pruned.mask, n, m, transposable=transposable)
    assert torch.equal(pruned.weight, weight * pruned.mask)


@pytest.mark.parametrize("transposable", [False, True])
def test_what_an_earlier_mask_prunes_counts_as_lost(transposable):
    weight, inputs = problem(16, 16)
    hessian = inputs.T @ inputs
    allowed = torch.rand(16, 16, generator=torch.Generator().manual_seed(3)) < 0.7
    pruned = frank_wolfe(weight, hessian, rule("4:8", transposable), allowed=allowed)
    wanda = rule("4:8", transposable).choose(wanda_scores(weight * allowed, inputs.norm(dim=0))) & allowed
    assert error(weight, pruned.weight, inputs) < error(weight, weight * wanda, inputs)


def test_no_input_at_all_and_no_weight_at_all():
    weight, _ = problem(8, 8)
    nothing = torch.zeros(8, 8, dtype=torch.float64)
    for given_weight, hessian in ((weight, nothing), (nothing, torch.eye(8, dtype=torch.float64))):
        nmsolve.check_mask(frank_wolfe(given_weight, hessian, rule("4:8", True)).mask, 4, 8)
        assert layer_error_bound(given_weight, hessian, rule("4:8", True)) == 0.0


def test_approximate_oracles_do_as_well_but_prove_nothing():
    weight, inputs = problem(16, 16)
    hessian = inputs.T @ inputs
    for method in ("greedy", "tsenor"):
        given_rule = MaskRule("4:8", True, method)
        pruned = frank_wolfe(weight, hessian, given_rule)
        wanda = wanda_mask(weight, inputs, given_rule)
        assert error(weight, pruned.weight, inputs) < error(weight, weight * wanda, inputs)
        with pytest.raises(
            nmsolve.NMSolveError, match=f"a bound needs the exact mask method, got '{method}'"
        ):
            layer_error_bound(weight, hessian, given_rule)


def test_numbers_of_iterations_have_one_default():
    for function, name in ((frank_wolfe, "frank-wolfe"), (nmsolve.prune.alps, "alps")):
        assert (
            PRUNING_METHODS[name].iterations == inspect.signature(function).parameters["iterations"].default
        )


def test_a_model_loses_less_of_every_layer_than_by_wanda():
    torch.manual_seed(0)
    data = torch.randn(256, 16) @ (torch.eye(16) + torch.randn(16, 16) / 4)

    def errors(method):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
        report = prune_model(model, data, "4:8", method=method, sequential="off", progress=False).report
        return [layer.relative_error for layer in report.layers], report.settings

    (found, said), (wanda, _) = errors("frank-wolfe"), errors("wanda")
    assert all(a < b for a, b in zip(found, wanda, strict=True))
    assert said["iterations"] == 40
    assert "damping" not in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": -1}, "iterations: expected an integer of at least 0, got -1"),
        ({"iterations": 2.0}, "iterations: expected an integer of at least 0, got 2.0"),
        ({"sweeps": True}, "sweeps: expected an integer of at least 0, got True"),
        ({"penalty": -1.0}, "penalty: expected a number of at least 0, got -1.0"),
        ({"penalty": float("nan")}, "penalty: expected a number of at least 0, got nan"),
        ({"start": torch.ones(8, 8)}, r"start: expected a bool tensor of shape \(8, 8\), got float32"),
    ],
)
def test_arguments_of_its_own_that_do_not_fit(changes, message):
    arguments = {"weight": torch.ones(8, 8), "hessian": torch.eye(8), "rule": rule("2:4", True), **changes}
    with pytest.raises(nmsolve.NMSolveError, match=message):
        frank_wolfe(**arguments)
