"""``python bench NAME`` runs a script or a folder of bench/, from wherever it is called."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tables.pruning import NAMES_OF_METHODS

from nmsolve.prune.methods import PRUNING_METHODS

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "bench", *arguments], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def listed() -> dict[str, str]:
    """Name -> question, as printed."""
    done = bench(cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[1:])


def test_everything_that_has_results_is_listed(listed):
    assert {"ascent", "kernel_costs", "quality", "speed_cpu", "tables"} <= listed.keys()
    assert not {"common", "pareto", "peers", "micro", "results", "__main__"} & listed.keys()
    assert all(question.endswith(".") for question in listed.values())


def test_make_runs_only_what_is_listed(listed):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    run = set(re.findall(r"\$\(BENCH\) (\w+)", makefile))
    # A model that others load, what asks for a commit to compare with, and what make test-versions runs.
    assert run == listed.keys() - {"smollm2_model", "against", "stacks"}


@pytest.mark.parametrize("name", ["ascent", "kernel_costs"])
def test_a_script_and_a_folder_run_from_anywhere(name, tmp_path):
    done = bench(name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")


def test_unknown_names_are_refused_with_the_list(tmp_path, listed):
    done = bench("speed", cwd=tmp_path)
    assert done.returncode == 2
    assert not done.stdout
    assert all(name in done.stderr for name in listed)


def test_every_pruning_method_has_a_name_in_the_tables():
    assert NAMES_OF_METHODS.keys() == PRUNING_METHODS.keys()
