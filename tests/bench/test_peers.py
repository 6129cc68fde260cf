"""The peers that the benchmarks compare with do what their papers and packages promise.

Exact ones reach the optimum of HiGHS; the others hold at most n a line, and exactly n where they say so.
"""

# ruff: noqa: E402 (bench/ goes on the path before what lies there is imported)

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
for package in ("networkx", "ortools", "ot", "scipy", "torch_linear_assignment"):
    pytest.importorskip(package)

import peers_cpu
from peers.best_of_random import best_of_random, random_masks
from peers.linear_assignment import as_masks, scipy_assignment, torch_assignment
from peers.linear_program import highs, primal_dual
from peers.min_cost_flow import optimal_masks
from peers.network_simplex import network_simplex
from peers.patterns_2_4 import best_pattern, patterns
from peers.permllm_sinkhorn import permllm_sinkhorn
from peers.pot_sinkhorn import pot_batch, pot_one_by_one
from peers.row_then_column import row_then_column
from peers.torch_sparse_tile import sparse_tile
from peers.tsenor import tsenor
from peers.two_approximation import two_approximation

import nmsolve

BLOCKS = 9  # no multiple of the blocks that a graph or a linear program takes together


def normal(m: int, count: int = BLOCKS) -> torch.Tensor:
    return torch.randn(count, m, m, generator=torch.Generator().manual_seed(m)).abs()


def optimum(blocks: torch.Tensor, n: int) -> torch.Tensor:
    return torch.tensor([oracles.highs(block, n) for block in blocks])


def kept(blocks: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    return (blocks.double() * masks).sum((1, 2)).float()


def counts(masks: torch.Tensor) -> torch.Tensor:
    return torch.cat([masks.sum(1), masks.sum(2)])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (8, 16)])
@pytest.mark.parametrize(
    "peer", [highs, primal_dual, network_simplex, optimal_masks, lambda a, n: optimal_masks(a, n, 4)]
)
def test_exact_peers(peer, n, m):
    blocks = normal(m)
    masks = torch.from_numpy(peer(blocks.double().numpy(), n))
    assert (counts(masks) == n).all()
    torch.testing.assert_close(kept(blocks, masks), optimum(blocks, n), rtol=1e-6, atol=0)


def test_exact_peers_take_no_blocks():
    for peer in (highs, primal_dual, network_simplex, optimal_masks):
        assert peer(np.zeros((0, 4, 4)), 2).shape == (0, 4, 4)


def test_all_90_patterns():
    found = patterns()
    assert found.shape == (90, 4, 4)
    assert len(torch.unique(found.flatten(1), dim=0)) == 90
    assert (counts(found) == 2).all()
    blocks = normal(4, 50)
    torch.testing.assert_close(kept(blocks, best_pattern(blocks)), optimum(blocks, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("m", [2, 8])
def test_assignments(m):
    blocks = normal(m)
    for columns in (torch.from_numpy(scipy_assignment(blocks.numpy())), torch_assignment(blocks)):
        masks = as_masks(columns)
        assert (counts(masks) == 1).all()
        torch.testing.assert_close(kept(blocks, masks), optimum(blocks, 1), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (5, 8), (8, 16)])
def test_heuristics_hold_at_most_n(n, m):
    blocks = normal(m, 40)
    best = optimum(blocks, n)
    for peer in (row_then_column, two_approximation, tsenor, lambda a, n: tsenor(a, n, search=False)):
        assert (counts(peer(blocks, n)) <= n).all()
    assert (kept(blocks, two_approximation(blocks, n)) >= best / 2).all()
    searched, greedy = tsenor(blocks, n), tsenor(blocks, n, search=False)
    assert searched.sum() >= greedy.sum()


def test_row_then_column_keeps_the_largest_of_each_row_first():
    blocks = normal(8)
    masks = row_then_column(blocks, 4)
    rows = nmsolve.nm_mask(blocks, 4, 8)
    assert (masks <= rows).all()
    assert ((masks.sum(1) == 4) == (rows.sum(1) >= 4)).all()


def test_best_of_random():
    pool = random_masks(4, 8, tries=200)
    assert (counts(pool) == 4).all()
    assert len(torch.unique(pool.flatten(1), dim=0)) == 200
    blocks = normal(8)
    scores = (blocks.flatten(1) @ pool.flatten(1).float().T).max(1).values
    torch.testing.assert_close(kept(blocks, best_of_random(blocks, 4, tries=200)), scores)


def test_random_masks_reach_every_2_4_pattern():
    assert len(torch.unique(random_masks(2, 4).flatten(1), dim=0)) == 90


def test_torch_sparse_tile_is_the_2_approximation():
    blocks = normal(4, 30)
    assert torch.equal(sparse_tile(blocks), two_approximation(blocks, 2))


def test_peers_compute_the_same_plan_and_gradient():
    logits = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pull = torch.randn(3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for plan in (nmsolve.sinkhorn, permllm_sinkhorn, pot_batch, pot_one_by_one):
        source = logits.clone().requires_grad_(True)
        value = plan(source, 0.3, 7)
        (gradient,) = torch.autograd.grad((value * pull).sum(), source)
        found.append((value.detach(), gradient))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 16)])
def test_the_comparison_runs(n, m, capsys):
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)).abs()
    names = [name for name, peer in peers_cpu.PEERS.items() if f"{n}:{m}".startswith(peer.only)]
    rows = peers_cpu.measure(n, m, matrix, names, 1, 1)
    assert [row["peer"] for row in rows] == names
    for row in rows:
        assert row["seconds"] == pytest.approx(row["seconds_per_block"] * 32**2 / m**2)
        assert row["extrapolated"] == 0
        assert row["sampled_blocks"] == row["error_blocks"] == 32**2 // m**2
    assert rows[0]["mean_relative_error"] == 0


def test_a_sample_of_the_matrix():
    matrix = torch.arange(64 * 64, dtype=torch.float32).reshape(64, 64)
    part = peers_cpu.case(peers_cpu.Peer(lambda a, b, n, m: lambda: a, weights=70), matrix, 4, 8)
    assert part.call().shape == (8, 64)
    assert torch.equal(part.blocks, matrix[:8, :8].unsqueeze(0))
