"""Runs the microbenchmarks of bench/micro with pytest-benchmark and writes bench/results/micro.csv.

One row for each operation, backend and shape that can run here; on a GPU the Triton backend is among them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, write_csv


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "micro.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-quiet"]
        done = subprocess.run(
            [*command, str(ROOT / "bench" / "micro"), f"--benchmark-json={report}"], cwd=folder
        )
        if done.returncode:
            return done.returncode
        found = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    rows = []
    for one in found:
        took, extra = one["stats"], one["extra_info"]
        rows.append(
            {
                "operation": one["name"].partition("[")[0].removeprefix("test_"),
                "parameters": " ".join(f"{key}={value}" for key, value in (one["params"] or {}).items()),
                "device": extra["device"],
                "threads": extra["threads"],
                "weights": extra["weights"],
                "us_median": took["median"] * 1e6,
                "us_least": took["min"] * 1e6,
                "us_most": took["max"] * 1e6,
                "ns_per_weight": took["median"] / extra["weights"] * 1e9,
                "rounds": took["rounds"],
            }
        )
    write_csv(
        RESULTS / "micro.csv",
        sorted(rows, key=lambda r: (r["operation"], r["parameters"])),
        "pytest-benchmark",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
