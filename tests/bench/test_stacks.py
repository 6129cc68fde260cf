"""bench stacks: what it counts, and that the oldest stack is what pyproject.toml promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import stacks
from common import ROOT, read_csv

SUITE = """
import pytest

@pytest.fixture
def late():
    yield
    raise OSError

def test_passes(): pass
def test_passes_and_then_not(late): pass
def test_fails(): assert 0
def test_has_no_fixture(missing): pass
def test_is_skipped(): pytest.skip()
@pytest.mark.xfail
def test_is_known_to_fail(): assert 0
@pytest.mark.parametrize("case", range(5))
def test_of_cases(case): pass
"""


def test_counts_of_a_run_in_pieces(tmp_path: Path) -> None:
    reports = []
    for piece in ("one", "two"):
        (tmp_path / f"test_{piece}.py").write_text(SUITE)
        reports.append(tmp_path / f"{piece}.xml")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={reports[-1]}",
        ]
        done = subprocess.run([*command, f"test_{piece}.py"], cwd=tmp_path, capture_output=True)
        assert done.returncode == 1, done.stderr
    found = stacks.counts(reports)
    assert found.pop("seconds") >= 0
    assert found == {"passed": 12, "failed": 6, "skipped": 4}


def test_a_row_takes_the_place_of_its_own_stack_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, out = tmp_path / "report.xml", tmp_path / "stacks.csv"
    for stack, cases in (("newest", 1), ("oldest", 2), ("newest", 3)):
        tests = "".join(f'<testcase classname="a" name="{k}"/>' for k in range(cases))
        report.write_text(f'<testsuites><testsuite time="2.4">{tests}</testsuite></testsuites>')
        monkeypatch.setattr(sys, "argv", ["stacks", stack, str(report), "--out", str(out)])
        assert stacks.main() == 0
    rows = read_csv(out)
    assert [(row["stack"], row["passed"], row["seconds"]) for row in rows] == [
        ("oldest", "2", "2"),
        ("newest", "3", "2"),
    ]


def minima() -> dict[str, str]:
    """Package -> the least version, of what nmsolve and its extras for users require."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    required = [
        re.search(rf"^{key} = \[(.*?)\]$", text, re.M | re.S) for key in ("dependencies", "cpu", "hf")
    ]
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)', "".join(found[1] for found in required if found)))


def test_the_oldest_stack_is_the_least_that_is_promised() -> None:
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert len(minima()) >= 9
    for package, least in minima().items():
        assert (oldest[package] + ".").startswith(least + "."), package
