"""SparseTraining in several processes: FSDP2, tensor parallel, DDP against one process (gloo on the CPU)."""

from __future__ import annotations

import pytest
import sparse_training_spread as spread
from gloo import Outcomes, outcomes

LIMIT_S = 600


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(spread.work, 2, tmp_path_factory.mktemp("two"), spread.CASES, LIMIT_S)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(spread.work, 4, tmp_path_factory.mktemp("four"), spread.CASES, LIMIT_S)


@pytest.mark.parametrize("case", spread.CASES)
def test_two_processes(two: Outcomes, case: str) -> None:
    assert two[case] == dict.fromkeys(range(2))


@pytest.mark.slow
@pytest.mark.parametrize("case", spread.CASES)
def test_four_processes(four: Outcomes, case: str) -> None:
    assert four[case] == dict.fromkeys(range(4))
