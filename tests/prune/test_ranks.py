"""prune_model on models that FSDP2 spreads over real processes (gloo); the cases are in prune_spread.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import prune_spread
import pytest
from gloo import Outcomes, outcomes


def spread(folder: Path, processes: int, cases: str) -> Outcomes:
    work = partial(prune_spread.work, cases=cases)
    return outcomes(work, processes, folder, prune_spread.CASES[cases])


def fine(processes: int, cases: str) -> Outcomes:
    return {case: dict.fromkeys(range(processes)) for case in prune_spread.CASES[cases]}


def test_two_ranks(tmp_path: Path) -> None:
    """One group for all cases: each process imports torch."""
    assert spread(tmp_path, 2, "two") == fine(2, "two")


@pytest.mark.slow
def test_four_ranks(tmp_path: Path) -> None:
    assert spread(tmp_path, 4, "four") == fine(4, "four")


@pytest.mark.slow
def test_one_rank(tmp_path: Path) -> None:
    assert spread(tmp_path, 1, "one") == fine(1, "one")
