"""bench compilers: what is done again, what a row says, and that the releases' rows tell of no fault."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compilers
import pytest
from common import RESULTS, read_csv
from kernel_costs.cases import Case
from tables import compilers as shown

ROWS = read_csv(RESULTS / compilers.COMPILERS) if (RESULTS / compilers.COMPILERS).exists() else []
SINCE = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
NOT_ADMITTED = "3.4.0"


def test_what_was_compiled_and_executed_is_sound() -> None:
    """Nothing spills from 3.6 on but tsenor on AMD's GPUs for desktops, or at M = 64 (compilers.md)."""
    assert ROWS
    faults = [
        row for row in ROWS if row["outcome"] not in ("compiles", "agrees") and row["triton"] != NOT_ADMITTED
    ]
    faults += [
        row
        for row in ROWS
        if row["triton"] in SINCE
        and row["spills"] not in ("", "0")
        and not (row["kernel"] == "tsenor" and (row["m"] == "64" or row["target"].startswith("gfx1")))
    ]
    assert not faults


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The bench with a compiler that is made up: exact at M = 8 spills, at 16 is beyond it."""

    def compile_all(jobs: list[dict[str, Any]], **options: Any) -> Iterator[dict[str, Any]]:
        compiled.extend(job["m"] for job in jobs)
        for job in jobs:
            result: dict[str, Any] = {"registers": 200, "spills": 3, "stack": 0, "shared": 0}
            result |= {"meta": {"BLOCKS": 1, "num_warps": 1}, "phases": "no loops"}
            if job["m"] == 16:
                result = {"error": "PassManager::run\nfailed"}
            yield job | result

    compiled: list[int] = []
    monkeypatch.setattr(compilers.offline, "compile_all", compile_all)
    monkeypatch.setattr(compilers, "unpacked", lambda release, folder, package="triton": folder / release)
    monkeypatch.setattr(compilers, "compiled_sizes", compiled, raising=False)
    return compilers


def run(bench: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> tuple[int, list[Any]]:
    out = folder / "compilers.csv"
    options = ["--releases", "3.6.0", "--targets", "sm_90", "--kernels", "exact", "--how", "compiled"]
    options += ["--folder", str(folder), "--out", str(out), *arguments]
    monkeypatch.setattr(sys, "argv", ["compilers", *options])
    return bench.main(), read_csv(out)


def test_a_row_for_each_configuration_and_only_once(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, rows = run(bench, monkeypatch, tmp_path, "--sizes", "8")
    assert (code, bench.compiled_sizes) == (0, [8])
    code, rows = run(bench, monkeypatch, tmp_path, "--sizes", "8", "16")
    assert (code, bench.compiled_sizes) == (1, [8, 16]), "what has a row is not compiled again"
    found = {row["m"]: (row["torch"], row["outcome"], row["spills"]) for row in rows}
    assert found == {
        "8": ("2.10, 2.11", "compiles", "3"),
        "16": ("2.10, 2.11", "PassManager::run failed", ""),
    }
    run(bench, monkeypatch, tmp_path, "--sizes", "8", "--anew")
    assert bench.compiled_sizes == [8, 16, 8]


def test_the_table_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"torch": "2.11", "how": "compiled", "kernel": "exact", "m": "8", "target": "sm_90"}
    base |= dict.fromkeys(("machine", "software", "date", "commit"), "x") | {"registers": "200"}
    rows = [
        base | {"triton": "3.10.0", "outcome": "compiles", "spills": "7", "instructions_per_block": "300"},
        base | {"triton": "3.7.1", "outcome": "compiles", "spills": "0", "instructions_per_block": "200"},
        base | {"triton": "3.7.1", "how": "emulated", "outcome": "differs by 1", "spills": "",
                "instructions_per_block": ""},
    ]  # fmt: skip
    costs = [{**rows[1], "dtype": "float32", "shipped": shipped} for shipped in ("1", "0")]
    costs[1]["instructions_per_block"] = "1"  # of another tile
    monkeypatch.setattr(shown, "results", {shown.COMPILERS: rows, shown.COSTS: costs}.__getitem__)
    lines = shown.releases().splitlines()[2:4]
    assert lines == [
        "| 3.7.1 | 2.11 | 1 of 1 | none | 1.00 (1.00 to 1.00) of 1 |  | 0 of 1 |",
        "| 3.10.0 | 2.11 | 1 of 1 | exact 8 on sm_90 (7) | 1.50 (1.50 to 1.50) of 1 |  |  |",
    ]
    assert shown.instructions().splitlines()[2] == "| exact | 8 | 200 | 300 |"


def test_a_child_that_ends_in_the_middle_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "tests" / "emulator" / "compared_variants.py"
    script.parent.mkdir(parents=True)
    line = json.dumps({"variant": "exact", "m": 16, "outcome": "agrees"})
    script.write_text(f"import sys\nprint({line!r})\nsys.exit(3)\n")
    monkeypatch.setattr(compilers, "ROOT", tmp_path)
    rows = compilers.executed("3.6.0", [tmp_path], "interpreted", [])
    assert next(rows)["outcome"] == "agrees"
    with pytest.raises(Exception, match="exit status 3"):
        next(rows)


def test_a_case_names_its_row() -> None:
    case = Case("exact", 8, "float32", "sm_90", True, None)
    row = compilers.row_of("3.6.0", "compiled", case.kernel, case.m, case.target)
    assert compilers.key_of(row) == ("3.6.0", "compiled", "exact", "8", "sm_90")
