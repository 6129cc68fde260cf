"""bench emulated: what the files say, what is executed again, and that trips are those of the cost table."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from common import RESULTS, ROOT, read_csv

TARGETS = ("sm_80", "sm_90", "sm_100")
TRIPS = RESULTS / "kernel_trips.csv"
COUNTS = ("trips", "m", "blocks", "distribution")


def load() -> Any:
    """The script: tests/support has a module of its name."""
    spec = importlib.util.spec_from_file_location("bench_emulated", ROOT / "bench" / "emulated.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# --- trips --------------------------------------------------------------------------------------------------

Key = tuple[str, ...]
STRAIGHT = {"exhaustive", "permute_columns"}
"""What is compiled to code without a loop, its branches merged with what is around them."""


def counted() -> dict[Key, dict[str, float]]:
    """Configuration -> region -> mean entries, as the interpreter counts them for the cost table."""
    found: dict[Key, dict[str, float]] = {}
    for row in read_csv(TRIPS):
        found.setdefault(tuple(row[name] for name in COUNTS), {})[row["region"]] = float(row["entries"])
    return found


ONE_PATH = 6
"""Entries of a loop of the search, of all programs together, that one path of one block makes at most."""


def unlike(executed: Mapping[str, float], expected: Mapping[str, float], programs: int) -> list[str]:
    """Regions that are entered over 5 % more or less often than counted.

    Branches are compared with what they lie in: one that settles ties is taken by a few programs, and those
    of a plan that the approximate instructions round are not all the same. A half of the ascent that they
    round may give a block a path more or less.
    """
    faults = []
    for region, times in executed.items():
        around = expected.get(region.rpartition(".")[0], 1.0)
        branch = region.rpartition(".")[2].startswith(("if", "else"))
        allowed = 0.05 * max(around if branch else 0.0, expected[region])
        if region.startswith("augment."):
            allowed = max(allowed, ONE_PATH / programs)
        if abs(times - expected[region]) > allowed:
            faults.append(f"{region}: executed {times:.3f}, counted {expected[region]:.3f}")
    return faults


def test_a_difference_of_trips_would_be_noticed() -> None:
    expected = {"kernel.while1": 10.0, "kernel.while1.while1": 2.0, "kernel.while1.if1": 1.0}
    assert not unlike(expected, expected, 16)
    assert not unlike(expected | {"kernel.while1.if1": 1.4}, expected, 16)
    assert unlike(expected | {"kernel.while1.if1": 1.6}, expected, 16)
    assert unlike(expected | {"kernel.while1.while1": 2.2}, expected, 16)
    assert unlike(expected | {"kernel.while1": 9.0}, expected, 16)
    assert not unlike({"augment.while1": 1.25}, {"augment.while1": 1.0}, 16)
    assert unlike({"augment.while1": 1.5}, {"augment.while1": 1.0}, 16)


def check_anew(
    target: str, chosen: list[Key], expected: Mapping[Key, Mapping[str, float]], cache: Path
) -> None:
    """Execute the PTX that is compiled now, and compare."""
    pytest.importorskip("triton")
    programs = {tuple(row[name] for name in COUNTS): int(row["programs"]) for row in read_csv(TRIPS)}
    lines = [[k[0], int(k[1]), int(k[2]), k[3], programs[k], ""] for k in chosen]
    environment = os.environ | {"NMSOLVE_PTX_SM": target[3:], "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    script = ROOT / "tests" / "emulator" / "emulated_trips.py"
    child = subprocess.run(
        [sys.executable, str(script)], input="".join(json.dumps(line) + "\n" for line in lines),
        capture_output=True, text=True, env=environment, check=True, timeout=3600,
    )  # fmt: skip
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(rows) == len(chosen)
    faults = [
        f"{key}: {fault}"
        for key, row in zip(chosen, rows, strict=True)
        for fault in unlike(row["entries"], expected[key], programs[key])
    ]
    assert not faults, "\n".join(faults)


def test_trips_of_small_blocks(tmp_path: Path) -> None:
    pytest.importorskip("numpy", minversion="2.0", reason="the emulator promotes integers as NumPy 2 does")
    expected = counted()
    chosen = [
        key for key in expected if key[:2] in {("nm", "4"), ("exact, edge", "4")} and key[3] == "normal"
    ]
    assert len(chosen) == 2
    check_anew("sm_90", chosen, expected, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_trips_counted_anew(target: str, tmp_path: Path) -> None:
    """Blocks of up to 16, on normal scores."""
    expected = counted()
    chosen = [key for key in expected if int(key[1]) <= 16 and key[3] == "normal"]
    check_anew(target, chosen, expected, tmp_path)


def test_trips_in_the_file_are_those_of_the_cost_table() -> None:
    """Every configuration of the table, executed for each target."""
    expected = counted()
    programs = {tuple(row[name] for name in COUNTS): int(row["programs"]) for row in read_csv(TRIPS)}
    for target in TARGETS:
        executed: dict[Key, dict[str, float]] = {}
        for row in read_csv(RESULTS / "emulator_trips.csv"):
            if row["target"] == target:
                key = tuple(row[name] for name in COUNTS)
                executed.setdefault(key, {})[row["region"]] = float(row["executed"])
        without = expected.keys() - executed.keys()
        assert {key[0] for key in without} == STRAIGHT
        assert executed.keys() | without == expected.keys()
        faults = [
            f"{key}: {fault}"
            for key in executed
            for fault in unlike(executed[key], expected[key], programs[key])
        ]
        assert not faults, "\n".join(faults)


# --- rows ---------------------------------------------------------------------------------------------------


def row(m: int, difference: float = 0.0, ptx: str = "a") -> dict[str, Any]:
    return {"variant": "exact", "m": m, "dtype": "float32", "target": "sm_90",
            "worst_difference": difference, "ptx": ptx}  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with children that print what ``says`` holds, and tell what they were asked."""
    module = load()
    module.says, module.asked = [], []

    def child(script: str, capability: int, arguments: list[str], lines: Iterable[Any]) -> Iterable[Any]:
        module.asked = [script, capability, arguments, list(lines)]
        for said in module.says:
            if isinstance(said, Exception):
                raise said
            yield said

    monkeypatch.setattr(module, "child", child)
    return module


def test_rows_are_kept_replaced_and_dropped(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "emulator.csv"
    bench.says = [row(4), row(8), row(16), row(32)]
    assert bench.survey(path, 90, "float32", [], anew=False) == 0
    assert bench.asked == ["emulated_rows.py", 90, ["float32"], []]
    # Known, executed again, wrong, and no longer a variant.
    bench.says = [
        {"variant": "exact", "m": 4, "known": True}, row(8, 0.5, "b"),
        {"variant": "exact", "m": 16, "error": "a race"},
    ]  # fmt: skip
    assert bench.survey(path, 90, "float32", [], anew=False) == 1
    assert bench.asked[3] == [["exact", m, "a"] for m in (4, 8, 16, 32)]
    assert [(r["m"], r["worst_difference"], r["ptx"]) for r in read_csv(path)] == [
        ("4", "0", "a"), ("8", "0.5", "b"),
    ]  # fmt: skip
    bench.says = [row(4)]
    bench.survey(path, 90, "float32", ["4"], anew=True)
    assert bench.asked == ["emulated_rows.py", 90, ["float32", "4"], []]
    assert [r["m"] for r in read_csv(path)] == ["4", "8"], "of the other sizes nothing is known"


def test_rows_of_other_targets_and_dtypes_stay(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "emulator.csv"
    for capability, dtype in ((90, "float32"), (80, "float32"), (90, "float16")):
        bench.says = [row(4) | {"target": f"sm_{capability}", "dtype": dtype}]
        bench.survey(path, capability, dtype, [], anew=False)
        assert bench.asked[3] == []
    assert len(read_csv(path)) == 3


def test_what_is_known_is_written_when_the_child_is_killed(bench: Any, tmp_path: Path) -> None:
    path = tmp_path / "emulator.csv"
    bench.says = [row(4), row(8), subprocess.CalledProcessError(-9, "python")]
    with pytest.raises(subprocess.CalledProcessError):
        bench.survey(path, 90, "float32", [], anew=False)
    assert [r["m"] for r in read_csv(path)] == ["4", "8"]


def test_the_file_says_what_the_documents_claim() -> None:
    """What it has agrees with the oracle as far as is allowed, exact masks to the last digits."""
    rows = read_csv(RESULTS / "emulator.csv")
    for found in rows:
        assert float(found["worst_difference"]) <= float(found["allowed_difference"]), found
        assert found["races"] == "0"
        assert float(found["warp_instructions_per_block"]) > 0
        if found["variant"].startswith(("exact", "exhaustive", "assignment")):
            assert float(found["allowed_difference"]) == 1e-12
    variants = {(found["variant"], found["m"]) for found in rows if found["dtype"] == "float32"}
    for target in TARGETS:
        here = {(r["variant"], r["m"]) for r in rows if (r["target"], r["dtype"]) == (target, "float32")}
        assert here == variants
