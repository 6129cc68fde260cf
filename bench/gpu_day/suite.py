"""The GPU suite, in as many processes as there are cores: most of its time goes to compiling.

Writes checks.csv: a row for each test, with the whole text of a failure. What passed is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from plain_checkout import ROOT

from gpu_day.recorder import LOST
from gpu_day.setting import Setting, Sheet

COLUMNS = ("check", "name", "outcome", "seconds", "text")
FILE = "tests/kernels/test_gpu.py"
REHEARSED = "test_exact_edges[2-4-1-1] or test_columns[shape0-dtype0] or a_side_stream"
STARTS = 4
"""How often a process may be replaced, for each that runs."""


def run(setting: Setting, selected: str | None = None) -> tuple[bool, str]:
    sheet = Sheet(setting, "checks.csv", COLUMNS, 2)
    selected = selected or (REHEARSED if setting.rehearsal else None)
    with tempfile.TemporaryDirectory() as folder:
        collected = _share(setting, sheet, Path(folder), selected)
    rows = {str(row["name"]): row for row in sheet if row["check"] == "suite"}
    count = Counter(str(row["outcome"]) for row in rows.values())
    missing = [name for name in collected if name not in rows]
    for name, row in rows.items():
        if row["outcome"] not in ("passed", "skipped"):
            print(f"--- {name}: {row['outcome']}\n{row['text']}")
    said = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items())) or "nothing ran"
    if not collected:
        return False, f"{said}; no test was collected, see day.log"
    return not missing, f"{said}; {len(missing)} of {len(collected)} not run"


def environment_of(setting: Setting) -> dict[str, str]:
    """Of a pytest that finds this package, and the emulator in a rehearsal."""
    path = [str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    for name in ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "NMSOLVE_PTX_SM"):
        environment.pop(name, None)
    return environment | ({"NMSOLVE_PTX_SM": setting.target[3:]} if setting.rehearsal else {})


def command_of(selected: str | None, *more: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "gpu"]
    return [*command, *more, *(["-k", selected] if selected else []), FILE]


def _share(setting: Setting, sheet: Sheet, folder: Path, selected: str | None) -> list[str]:
    """Runs what is not recorded yet; the names of all tests that were collected."""
    done = [
        row["name"] for row in sheet if row["check"] == "suite" and row["outcome"] in ("passed", "skipped")
    ]
    environment = environment_of(setting) | {
        "GPU_DAY_SHARE": str(folder),
        "GPU_DAY_DEADLINE": str(time.time() + setting.left - 8),
        "GPU_DAY_DONE": json.dumps(done),
    }
    command = command_of(selected, "-p", "gpu_day.recorder")

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)

    with (folder / "log").open("wb") as log:
        processes = max(1, setting.processes)
        running = [start() for _ in range(processes)]
        starts = STARTS * processes
        seen: dict[str, dict[str, Any]] = {}
        collected: list[str] = []
        while running:
            time.sleep(0.2)
            if setting.left < 3:
                for child in running:
                    child.kill()
            alive = [child for child in running if child.poll() is None]
            for child in running:
                crashed = child.returncode is not None and (child.returncode < 0 or child.returncode == LOST)
                if crashed and starts and setting.left > 20:
                    starts -= 1
                    alive.append(start())
            running = alive
            collected = _read(folder, sheet, seen) or collected
    for name, line in seen.items():
        if "outcome" not in line:
            text = "began and did not end: its process crashed or had no more time"
            sheet.add(check="suite", name=name, outcome="unfinished", text=text)
    if not collected:
        print((folder / "log").read_text(encoding="utf-8", errors="replace")[-8000:])
    return collected


def _read(folder: Path, sheet: Sheet, seen: dict[str, dict[str, Any]]) -> list[str]:
    """Takes new lines of the processes' files over to the sheet."""
    collected: list[str] = []
    new = []
    for file in folder.glob("*.jsonl"):
        for text in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if not text.endswith("\n"):
                continue  # half written
            line = json.loads(text)
            if "collected" in line:
                collected = line["collected"]
            elif "begun" in line:
                seen.setdefault(line["begun"], line)
            elif "test" in line and "outcome" not in seen.get(line["test"], {}):
                seen[line["test"]] = line
                new.append(line)
    sheet.add_all(
        [{"check": "suite", "name": line["test"], **{k: line[k] for k in COLUMNS[2:]}} for line in new]
    )
    return collected
