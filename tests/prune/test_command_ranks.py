"""``nmsolve prune`` by several ranks of torchrun: what one process makes, and one outcome for all.

Ranks are forked from a process that runs support/prune_command_spread.py, which has the cases; with torchrun
itself, which takes long to start, where a test is slow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from prune_command_spread import Place

pytest.importorskip("transformers")

SUPPORT = Path(__file__).resolve().parents[1] / "support"


def spread(folder: Path, *what: str, limit: float = 900) -> None:
    command = [sys.executable, str(SUPPORT / "prune_command_spread.py"), str(folder), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= (10 if what in (("cases",), ("slow",)) else len(what))
    failed = [f"{name}\n{problem}" for name, problem in found.items() if problem is not None]
    assert not failed, "\n".join(failed)


def test_some_cases(tmp_path):
    spread(tmp_path, "weights_on_disk", "a_full_disk_ends_all")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cases", "slow"])
def test_all_cases(what, tmp_path):
    spread(tmp_path, what)


@pytest.mark.slow
def test_a_rank_that_is_killed_at_a_random_moment(tmp_path):
    spread(tmp_path, *map(str, range(20)))


def torchrun(count: int, arguments: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*command, "-m", "nmsolve", *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_torchrun(tmp_path):
    place = Place(tmp_path, "--method", "sparsegpt", "--transposable")
    done = torchrun(2, place.arguments(place.out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    place.compare()
    done = torchrun(2, place.arguments(place.out))
    assert done.returncode == 1
    assert done.stderr.count("nmsolve: error: --out: ") == 1
    done = torchrun(1, place.arguments(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
