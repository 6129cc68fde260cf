"""SparseTraining in several processes: FSDP2, tensor parallel, DDP against one process (gloo on the CPU)."""

from __future__ import annotations

from pathlib import Path

import pytest
import sparse_training_spread as spread
from gloo import outcomes


def faults(processes: int, folder: Path) -> dict[str, dict[int, str | None]]:
    """The cases that failed, with what each process said; one test for all, which share processes."""
    found = outcomes(spread.work, processes, folder, spread.CASES)
    assert found.keys() == spread.CASES.keys()
    return {case: said for case, said in found.items() if said != dict.fromkeys(range(processes))}


def test_two_processes(tmp_path: Path) -> None:
    assert faults(2, tmp_path) == {}


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    assert faults(4, tmp_path) == {}
