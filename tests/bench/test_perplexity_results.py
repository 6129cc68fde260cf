"""What docs/choosing.md says of the measured perplexities is what the committed results say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from common import RESULTS, read_csv
from tables import pruning

SIZES = ("2:4", "4:8", "8:16", "16:32")
METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")

Row = dict[str, str]


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str, str], Row]:
    found = [row for row in read_csv(RESULTS / "perplexity.csv") if row["sequential"] == "off"]
    return {(row["method"], row["pattern"], row["mask"]): row for row in found if row["matmul"] == "bfloat16"}


@pytest.fixture(scope="module")
def perplexities(rows) -> dict[tuple[str, str, str], float]:
    return {key: float(row["perplexity"]) for key, row in rows.items()}


def test_every_method_is_there(rows):
    masks = ("ordinary", "exact")
    wanted = {(method, size, mask) for method in METHODS for size in SIZES for mask in masks}
    assert wanted <= rows.keys()
    counts = {(row["calibration_tokens"], row["test_tokens"]) for row in rows.values()}
    assert counts == {("0", "8192"), ("16384", "8192")}


@pytest.mark.parametrize("method", METHODS)
def test_larger_m_closes_the_gap_to_ordinary_masks(perplexities, method):
    ratios = [perplexities[method, size, "exact"] / perplexities[method, size, "ordinary"] for size in SIZES]
    assert ratios == sorted(ratios, reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_transposable_16_32_beats_ordinary_2_4(perplexities, method):
    assert perplexities[method, "16:32", "exact"] < perplexities[method, "2:4", "ordinary"]


@pytest.mark.parametrize(("better", "worse"), [("sparsegpt", "wanda"), ("alps", "sparsegpt")])
def test_methods_that_make_up_for_more_of_the_error_have_lower_perplexity(perplexities, better, worse):
    compared = [
        (value, perplexities[worse, size, mask])
        for (method, size, mask), value in perplexities.items()
        if method == better and (worse, size, mask) in perplexities
    ]
    assert len(compared) >= 8
    assert all(a <= b for a, b in compared)


def test_exact_retains_at_least_tsenors_score_in_every_layer():
    rows = read_csv(RESULTS / "perplexity_layers.csv")
    retained = {
        (row["method"], row["pattern"], row["mask"]): [float(x) for x in row["retained"].split()]
        for row in rows
        if row["sequential"] == "off"
    }
    compared = 0
    for (method, size, mask), other in retained.items():
        if mask == "tsenor":
            exact = retained[method, size, "exact"]
            assert len(exact) == len(other) == 210
            assert all(a >= b for a, b in zip(exact, other, strict=True)), (method, size)
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_inputs_of_pruned_blocks_help_methods_that_make_up_for_errors(perplexities, method):
    in_turn = {
        (row["pattern"], row["mask"]): float(row["perplexity"])
        for row in read_csv(RESULTS / "perplexity.csv")
        if row["sequential"] == "block" and row["method"] == method
    }
    assert len(in_turn) >= 4
    assert all(value < perplexities[(method, *key)] for key, value in in_turn.items())


def test_exact_masks_are_proven_optimal_and_tsenors_are_not(rows):
    """SparseGPT and ALPS score weights that depend on earlier masks: the bound is for those same scores."""
    for (_, _, mask), row in rows.items():
        if mask == "exact":
            assert float(row["gap"]) < 1e-6, row
        if mask == "tsenor":
            assert float(row["gap"]) > 1e-6, row


@pytest.mark.parametrize("size", SIZES)
def test_wanda_agrees_with_its_published_rule(perplexities, size):
    expected = perplexities["wanda, published rule", size, "ordinary"]
    assert perplexities["wanda", size, "ordinary"] == pytest.approx(expected, rel=1e-3)


def test_masks_take_less_than_half_of_a_run_with_wanda(rows):
    shares = {
        key: float(row["mask_seconds"]) / float(row["seconds"])
        for key, row in rows.items()
        if key[0] == "wanda"
    }
    assert {("wanda", size, mask) for size in SIZES for mask in ("ordinary", "exact")} <= shares.keys()
    assert max(shares.values()) < 0.5


def spreads(model: str, pattern: str, tokens: int):
    """Differences in loss, window by window: the middle 95 % of what other draws of windows give."""
    losses = {
        row["method"]: np.array(row["losses"].split(), float)
        for row in read_csv(RESULTS / "perplexity_spread.csv")
        if (row["model"], row["pattern"], row["mask"]) == (model, pattern, "transposable")
    }
    assert all(len(of_windows) * tokens >= 32768 for of_windows in losses.values())

    def spread(method: str, other: str) -> tuple[float, float]:
        return pruning.bootstrapped(losses[method] - losses[other])

    return spread


@pytest.mark.parametrize("pattern", ["8:16", "16:32"])
def test_what_is_said_to_be_beyond_the_spread_of_another_family_is(pattern):
    spread = spreads("gpt2-bytes", pattern, 256)
    assert spread("frank-wolfe", "wanda")[1] < 0
    assert spread("frank-wolfe", "ria")[1] < 0
    assert 0 < spread("sparsegpt, mask of frank-wolfe", "sparsegpt")[0] < math.log(1.002)
    assert 0 < spread("alps, mask of frank-wolfe", "alps")[0] < math.log(1.002)


@pytest.mark.parametrize("pattern", ["8:16", "16:32"])
def test_what_is_said_to_be_beyond_the_spread_is(pattern):
    spread = spreads("smollm2", pattern, 512)
    assert spread("frank-wolfe", "wanda")[1] < math.log(0.6)
    assert spread("frank-wolfe", "ria")[1] < math.log(0.6)
    assert spread("sparsegpt, mask of frank-wolfe", "sparsegpt")[1] < 0
    squared = spread("wanda squared", "wanda")
    if pattern == "8:16":
        assert squared[0] > 0
        assert spread("frank-wolfe", "sparsegpt")[1] < 0
        least, most = 1.005, 1.035
    else:
        assert squared[1] < 0
        least, most = 1.035, 1.06
    on_its_mask = spread("alps, mask of frank-wolfe", "alps")
    assert math.log(least) < on_its_mask[0] < on_its_mask[1] < math.log(most)
