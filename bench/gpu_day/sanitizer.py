"""compute-sanitizer on every kernel: accesses out of bounds, and races in shared memory of the larger blocks.

One process for each tool and block size, side by side, as most of their time is starting. Adds rows to
checks.csv.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from plain_checkout import ROOT

from gpu_day.setting import Setting, Sheet
from gpu_day.suite import COLUMNS, command_of, environment_of

PLACES = ("/usr/local/cuda*/bin/compute-sanitizer", "/opt/nvidia/*/compute-sanitizer")
RUNS = {"memcheck": (4, 12, 16, 64), "racecheck": (16, 64)}
"""Tool -> the sizes for which test_every_kernel_once runs under it."""


def find() -> str | None:
    """The tool: on PATH, of the environment's CUDA, or where NVIDIA's packages put it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    found = shutil.which("compute-sanitizer")
    others = [path for home in homes for path in glob.glob(f"{home}/bin/compute-sanitizer")]
    others += [path for place in PLACES for path in sorted(glob.glob(place))]
    return found or next(iter(others), None)


def run(setting: Setting) -> tuple[bool, str]:
    tool = find()
    if setting.rehearsal:
        return True, "not rehearsed: the emulator makes these checks itself"
    if tool is None:
        return True, "compute-sanitizer is not installed here"
    sheet = Sheet(setting, "checks.csv", COLUMNS, 2)
    wanted = [(check, m) for check, sizes in RUNS.items() for m in sizes if (check, f"M = {m}") not in sheet]
    environment = environment_of(setting) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        children = {}
        for check, m in wanted:
            options = ["--tool", check, "--target-processes", "application-only", "--error-exitcode", "99"]
            command = [tool, *options, *command_of(f"test_every_kernel_once[{m}]")]
            with Path(folder, f"{check}-{m}").open("wb") as log:
                children[check, m] = subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
                )
        for (check, m), child in children.items():
            try:
                child.wait(max(1.0, setting.left - 3))
            except subprocess.TimeoutExpired:
                child.kill()
                print(f"{check}, M = {m}: no more time")
                continue
            text = Path(folder, f"{check}-{m}").read_text(encoding="utf-8", errors="replace")
            outcome = verdict(child.returncode, text)
            shown = "" if outcome == "passed" else text[-6000:]
            sheet.add(check=check, name=f"M = {m}", outcome=outcome, text=shown)
            print(f"{check}, M = {m}: {outcome}\n{shown}")
    rows = [row for row in sheet if row["check"] in RUNS]
    wrong = [f"{row['check']} {row['name']}" for row in rows if row["outcome"] != "passed"]
    missing = sum(map(len, RUNS.values())) - len(rows)
    line = f"{len(rows) - len(wrong)} runs found nothing"
    return not missing, f"{line}; wrong: {', '.join(wrong) or 'none'}; {missing} without time"


def verdict(code: int, text: str) -> str:
    """``passed`` where the tests passed and the tool found nothing."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", text)
    if code == 0 and " passed" in text and summaries and not any(map(int, summaries)):
        return "passed"
    if any(map(int, summaries)):
        return f"{max(map(int, summaries))} errors"
    return f"failed, exit code {code}"
