"""Does the suite pass with the oldest and the newest versions that nmsolve admits? ``make test-versions``.

Makes a row of a results file from what pytest wrote with --junitxml, for the Python and the packages
that run this script: the counts of all files together, so that a run may be in pieces. The row
replaces that of the same name.

    .venv-oldest/bin/python bench stacks oldest whole.xml
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

from common import RESULTS, provenance, read_csv, write_whole

STACKS = "stacks.csv"
PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "safetensors")


def counts(reports: Iterable[Path]) -> dict[str, int]:
    """Tests that passed, failed and were skipped, and seconds. An error counts as a failure.

    A test that passes and whose fixture then fails has two entries in pytest's report, of which one counts.
    """
    outcomes: dict[tuple[str, ...], str] = {}
    seconds = 0.0
    for report in reports:
        for suite in ET.parse(report).iter("testsuite"):
            seconds += float(suite.get("time", 0))
            for case in suite.iter("testcase"):
                key = (case.get("classname", ""), case.get("name", ""))
                kinds = {child.tag for child in case}
                if kinds & {"failure", "error"}:
                    outcomes[key] = "failed"
                else:
                    outcomes.setdefault(key, "skipped" if "skipped" in kinds else "passed")
    found = [*outcomes.values()]
    return {kind: found.count(kind) for kind in ("passed", "failed", "skipped")} | {"seconds": round(seconds)}


def row_of(stack: str, reports: Iterable[Path]) -> dict[str, object]:
    """What ran, what came of it, and where."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    where = provenance()
    del where["software"]  # has columns of its own
    return {"stack": stack, "python": platform.python_version(), **versions, **counts(reports), **where}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stack", choices=("oldest", "newest"))
    parser.add_argument("reports", nargs="+", type=Path, help="files that pytest wrote with --junitxml")
    parser.add_argument("--out", type=Path, default=RESULTS / STACKS)
    arguments = parser.parse_args()
    row = row_of(arguments.stack, arguments.reports)
    rows = {old["stack"]: old for old in (read_csv(arguments.out) if arguments.out.exists() else [])}
    after = rows | {arguments.stack: row}
    write_whole(arguments.out, [after[stack] for stack in ("oldest", "newest") if stack in after])
    print(*(f"{key} {value}" for key, value in row.items()), sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
