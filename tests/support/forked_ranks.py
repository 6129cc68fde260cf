"""Ranks as torchrun starts them, forked from a process that has imported everything: in no time, many times.

Like torchrun it offers a store, tells ranks by the environment, and ends the others when one has failed.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed

from nmsolve.cli import main

__all__ = ["Ended", "launch", "run_cases"]

# Seconds until ranks that do not end are said to hang.
PATIENCE = 120.0
# What gloo says of its connections in PyTorch 2.9; the ranks write at once, and into each other's lines.
GLOO = re.compile(r"\[Gloo\]|connected|peer ranks")


@dataclass(frozen=True)
class Ended:
    """How ranks ended: the exit codes (negative for a signal), and what all of them printed."""

    codes: list[int]
    out: str
    err: str
    seconds: float

    def error(self) -> str:
        """The message, once it is certain that it is one line, and all there is."""
        told = [line for line in self.out.splitlines() if line and not GLOO.search(line)]
        assert not told, told
        assert self.err.startswith("nmsolve: error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


def launch(
    count: int,
    arguments: Sequence[str],
    folder: Path,
    *,
    prepare: Callable[[int], None] = lambda rank: None,
    meanwhile: Callable[[list[int]], bool] = lambda pids: True,
) -> Ended:
    """``nmsolve ARGUMENTS`` as ``count`` ranks.

    ``prepare`` is called in each before. ``meanwhile`` is called with the process ids until it returns True.
    """
    began = time.monotonic()
    reading, writing = os.pipe()
    pids = [_fork(rank, count, reading, arguments, folder, prepare) for rank in range(count)]
    # The store has threads, which must not be there when processes are forked.
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(writing, count * f"{store.port:05}".encode())
    os.close(reading)
    os.close(writing)
    codes: dict[int, int] = {}
    waits, told = True, False
    while len(codes) < count:
        if waits:
            waits = not meanwhile(pids)
        for rank, pid in enumerate(pids):
            if rank not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[rank] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) and not told:
            told = True
            end_all(pids, codes, signal.SIGTERM)
        if time.monotonic() - began > PATIENCE:
            end_all(pids, codes, signal.SIGKILL)
        time.sleep(0.01)
    texts = [
        "".join((folder / f"{rank}.{name}").read_text() for rank in range(count)) for name in ("out", "err")
    ]
    return Ended([codes[rank] for rank in range(count)], *texts, seconds=time.monotonic() - began)


def end_all(pids: list[int], codes: dict[int, int], number: signal.Signals) -> None:
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, number)


def _fork(
    rank: int,
    count: int,
    reading: int,
    arguments: Sequence[str],
    folder: Path,
    prepare: Callable[[int], None],
) -> int:
    for name in ("out", "err"):
        (folder / f"{rank}.{name}").write_text("")
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "none",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "MASTER_ADDR": "localhost",
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        os.environ["MASTER_PORT"] = os.read(reading, 5).decode()
        prepare(rank)
        try:
            code = main(list(arguments))
        except SystemExit as exited:
            code = int(exited.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_cases(folder: Path, todo: Mapping[str, Callable[[Path], None]]) -> dict[str, str | None]:
    """For each case, which gets a folder of its name, what it raised, or None."""
    torch.set_num_threads(1)
    found: dict[str, str | None] = {}
    for name, function in todo.items():
        began = time.monotonic()
        try:
            function(folder / name)
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return found
