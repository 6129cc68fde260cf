"""How long each folder of tests took, printed at the end of a run; with -n, the sum over the processes."""

from __future__ import annotations

from collections import defaultdict
from pathlib import PurePath

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, set[str]] = defaultdict(set)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = _folder(report.nodeid)
                seconds[folder] += report.duration  # of the test, or of its fixtures before or after it
                tests[folder].add(report.nodeid)
    if seconds:
        terminalreporter.section("seconds of tests by folder")
    for folder in sorted(seconds, key=seconds.__getitem__, reverse=True):
        terminalreporter.write_line(f"{folder:<16} {len(tests[folder]):>5} tests {seconds[folder]:>8.1f} s")


def _folder(nodeid: str) -> str:
    """``ops`` of ``tests/ops/test_masks.py::test_empty``, and of what lies in folders of it."""
    below = PurePath(nodeid.partition("::")[0]).parts[1:-1]
    return below[0] if below else "."
