"""A pytest plugin: several processes share the tests of one list, and each outcome is recorded at once.

GPU_DAY_SHARE names a folder. Before a process runs a test it makes a file there that nobody had made; what
came of the test is a line of JSON in its own file, and so is that it has begun. A process whose GPU context
is lost ends, for all that it would run then would fail: another takes its place and goes on.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

LOST = 86
"""Exit code of a process that cannot use its GPU any more."""


class Recorder:
    """Of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claims = folder / "claims"
        self.claims.mkdir(exist_ok=True)
        self.deadline = float(os.environ.get("GPU_DAY_DEADLINE", "inf"))
        self.done_before = set(json.loads(os.environ.get("GPU_DAY_DONE", "[]")))
        self.outcome: dict[str, Any] = {}

    def write(self, **line: Any) -> None:
        with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def claim(self, number: int) -> bool:
        try:
            (self.claims / str(number)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.config.option.collectonly:
            return False
        self.write(collected=[item.nodeid for item in session.items])
        for number, item in enumerate(in_order(session.items)):
            if item.nodeid in self.done_before or not self.claim(number):
                continue
            if time.time() > self.deadline:
                self.write(ended=item.nodeid)
                break
            self.write(begun=item.nodeid)
            self.outcome = {"test": item.nodeid, "outcome": "passed", "seconds": 0.0, "text": ""}
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            self.write(**self.outcome)
            if self.outcome["outcome"] == "failed" and is_lost():
                os._exit(LOST)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.outcome["seconds"] = round(self.outcome["seconds"] + report.duration, 3)
        if report.failed:
            self.outcome |= {"outcome": "failed"}
            self.outcome["text"] += f"{report.longreprtext}\n"
        elif report.skipped and self.outcome["outcome"] != "failed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.outcome |= {"outcome": "skipped", "text": str(reason)}


def in_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """First one of each test function, then another of each: an early end leaves out no function."""
    turns: dict[str, int] = {}
    ranks = []
    for item in items:
        function = item.nodeid.partition("[")[0]
        turns[function] = turns.get(function, 0) + 1
        ranks.append(turns[function])
    return [item for _, item in sorted(zip(ranks, items, strict=True), key=lambda pair: pair[0])]


def is_lost() -> bool:
    """Whether an error in a kernel has made the GPU useless to this process."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get("GPU_DAY_SHARE")
    if folder:
        config.pluginmanager.register(Recorder(Path(folder)), "gpu-day-recorder")
