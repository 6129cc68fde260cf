"""SparseTraining in several processes: FSDP2, tensor parallel, DDP against one process (gloo on the CPU)."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import sparse_training_spread as spread
import torch.multiprocessing

LIMIT_S = 600


def outcomes(processes: int, folder: Path) -> dict[str, dict[int, str | None]]:
    context = torch.multiprocessing.spawn(spread.work, (processes, str(folder)), nprocs=processes, join=False)
    end = time.monotonic() + LIMIT_S
    try:
        while not context.join(timeout=max(1.0, end - time.monotonic())):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    found = {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)}
    return {name: {rank: found[rank][name] for rank in found} for name in spread.CASES}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str | None]]:
    return outcomes(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, str | None]]:
    return outcomes(4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("case", spread.CASES)
def test_two_processes(two: dict[str, dict[int, str | None]], case: str) -> None:
    assert two[case] == dict.fromkeys(range(2))


@pytest.mark.slow
@pytest.mark.parametrize("case", spread.CASES)
def test_four_processes(four: dict[str, dict[int, str | None]], case: str) -> None:
    assert four[case] == dict.fromkeys(range(4))
