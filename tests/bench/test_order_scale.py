"""Searches for orders at real sizes: the peers search as they say, and results hold what the page says."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch

pytest.importorskip("gguf")
import order_scale
from common import RESULTS, read_csv
from peers.forced_masks import forced_masks
from peers.ria_channels import ria_channels

import nmsolve
from nmsolve.permute import retained_score, ria_permutation, transposable_permutation

ROWS = read_csv(RESULTS / "order_scale.csv")


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** 2


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 3), (4, 8)])
def test_the_published_search_assigns_every_slot(n, m):
    matrix = scores(20, 3 * m)
    order = ria_channels(matrix, n, m)
    assert torch.equal(order.sort().values, torch.arange(3 * m))
    # The last slot's columns cannot be given to the groups any better.
    groups, last = order.view(3, m), float(retained_score(matrix, n, m, order))
    for other in itertools.permutations(range(3)):
        trial = groups.clone()
        trial[:, -1] = groups[list(other), -1]
        assert float(retained_score(matrix, n, m, trial.flatten())) <= last + 1e-6
    ours = ria_permutation(matrix, n, m, passes=1)
    assert float(retained_score(matrix, n, m, ours)) >= last - 1e-6


def test_forced_masks_reorder_and_keep_more():
    matrix = scores(16, 24)
    found = forced_masks(matrix, 2, 4, 2)
    assert torch.equal(found.flatten().sort().values, matrix.flatten().sort().values)
    assert found.shape == matrix.shape
    before, after = (
        nmsolve.transposable_mask(x, 2, 4, return_solution=True).total_objective for x in (matrix, found)
    )
    ours = float(transposable_permutation(matrix, 2, 4, passes=2).after)
    assert after > before
    assert ours - before > 0.7 * (after - before)


def test_what_is_there_is_not_measured_again(tmp_path):
    out = tmp_path / "found.csv"
    args = argparse.Namespace(out=out, methods=["dealt", "ria"], passes=None)
    for _ in range(2):
        order_scale.measure(args, "ordinary", "random", scores(16, 64), nmsolve.NMPattern(2, 4))
    rows = read_csv(out)
    assert [row["method"] for row in rows] == ["dealt", *["ria"] * 5]
    assert all(float(row["gain"]) >= float(rows[0]["gain"]) - 1e-6 for row in rows)


def test_one_pass_keeps_no_less_than_the_published_search():
    cases = [row for row in ROWS if row["method"] == "published"]
    assert len(cases) >= 6
    for case in cases:
        same = [row for row in ROWS if all(row[key] == case[key] for key in ("part", "scope", "pattern"))]
        ours = {int(row["passes"]): float(row["gain"]) for row in same if row["method"] == "ria"}
        assert ours[1] >= float(case["gain"])
        assert sorted(ours.values()) == [ours[passes] for passes in sorted(ours)]


def test_windows_keep_most_of_the_gain():
    rows = [row for row in ROWS if row["part"] == "ordinary" and row["method"] == "ria"]
    whole = [row for row in rows if row["window"] == "0"]
    assert whole
    for case in whole:
        here = [row for row in rows if (row["scope"], row["cols"]) == (case["scope"], case["cols"])]
        for most, share in ((15, 0.85), (60, 0.95)):
            soon = [float(row["gain"]) for row in here if row is not case and float(row["seconds"]) < most]
            assert max(soon) > share * float(case["gain"]), (case, most)
