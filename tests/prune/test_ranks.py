"""prune_model on models that FSDP2 spreads over real processes (gloo); the cases are in prune_spread.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import prune_spread
import pytest
from gloo import Outcomes, outcomes

LIMIT_S = 1800


def spread(folder: Path, processes: int, cases: str) -> Outcomes:
    return outcomes(
        partial(prune_spread.work, cases=cases), processes, folder, prune_spread.CASES[cases], LIMIT_S
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return spread(tmp_path_factory.mktemp("two"), 2, "two")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return spread(tmp_path_factory.mktemp("four"), 4, "four")


@pytest.mark.parametrize("case", prune_spread.CASES["two"])
def test_two_ranks(two: Outcomes, case: str) -> None:
    assert two[case] == dict.fromkeys(range(2))


@pytest.mark.slow
@pytest.mark.parametrize("case", prune_spread.CASES["four"])
def test_four_ranks(four: Outcomes, case: str) -> None:
    assert four[case] == dict.fromkeys(range(4))


@pytest.mark.slow
def test_one_rank(tmp_path: Path) -> None:
    assert spread(tmp_path, 1, "one") == {"one_rank": {0: None}}
