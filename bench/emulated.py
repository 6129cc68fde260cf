"""What do the compiled kernels do, executed without a GPU? Runs their tests on the emulator of PTX.

For every target a child runs tests/emulator/emulated_variants.py, in which each variant of each kernel is
compiled, executed from its PTX and compared with the float64 oracle. The file is written after each target;
a test that fails ends it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from common import RESULTS, ROOT, write_csv

TARGETS = (90, 80, 100)


def survey(capability: int, selected: str) -> Iterator[dict[str, object]]:
    """A row for each test that ran on ``sm_<capability>``."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {"TRITON_CACHE_DIR": folder} | os.environ | {"NMSOLVE_PTX_SM": str(capability)}
        file = "tests/emulator/emulated_variants.py"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "slow or not slow"]
        command += ["-k", selected, f"--junitxml={report}", "-o", "junit_family=xunit1", file]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        for case in ElementTree.parse(report).iter("testcase"):
            row: dict[str, object] = {}
            for item in case.iter("property"):
                row[item.attrib["name"]] = _number(item.attrib["value"])
            yield row


def _number(text: str) -> object:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities")
    parser.add_argument("--select", default="test_variant", help="which tests, as pytest -k")
    parser.add_argument("--out", type=Path, default=RESULTS / "emulator.csv")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for capability in arguments.targets:
        rows += survey(capability, arguments.select)
        write_csv(arguments.out, rows, "triton")


if __name__ == "__main__":
    main()
