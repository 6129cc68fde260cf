"""The benchmark of learned orders: exchanges are what they say, and results hold what the page says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gguf")
import numpy as np
from common import RESULTS, read_csv
from learned_orders import swapped
from tables.pruning import bootstrapped

ROWS = read_csv(RESULTS / "learned_orders.csv")


@pytest.mark.parametrize("swaps", [1, 5, 40])
def test_exchanges_stay_in_their_block_and_are_valued_by_the_plan(swaps):
    generator = torch.Generator().manual_seed(0)
    order, slopes = torch.randperm(24, generator=generator), torch.randn(3, 8, 8)
    new, said = swapped(order, slopes, swaps, generator)
    assert torch.equal(new.sort().values, torch.arange(24))
    change = torch.zeros(3, 8, 8)
    for position in range(24):
        was, now = (int((order == channel).nonzero()) for channel in (order[position], new[position]))
        assert was // 8 == now // 8
        change[position // 8, position % 8, was % 8] -= 1
        change[position // 8, position % 8, now % 8] += 1
    assert not torch.equal(new, order)
    assert said == pytest.approx(float((change * slopes).sum()), abs=1e-4)


def test_perplexities_are_those_of_their_windows():
    for row in ROWS:
        losses = np.array(row["losses"].split(), float)
        assert float(row["perplexity"]) == pytest.approx(np.exp(losses.mean()), rel=1e-4)
        assert len(losses) == 64


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_learned_orders_lose_at_least_three_percent_less_than_the_search(pattern):
    losses = {
        row["order"]: np.array(row["losses"].split(), float) for row in ROWS if row["pattern"] == pattern
    }
    _, high = bootstrapped(losses["frank-wolfe"] - losses["ria"])
    assert np.expm1(high) < -0.03
