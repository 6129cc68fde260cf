"""The steps of a day: how much time each gets, a process for each, and what is known when one has ended.

Nothing here imports torch: whatever is wrong with a GPU or its software ends a step, not the day.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plain_checkout import ROOT

from nmsolve.errors import NMSolveError
from nmsolve.files import locked, write_text

FORMAT = "nmsolve-gpu-day"
PART = 3
"""Exit code of a step that has no more time, and would go on where it ended."""
REFUSED = 2
"""Exit code of a step that cannot run here at all."""
GRACE = 5.0
"""Seconds beyond its time after which a step is ended, and then killed."""


class Step(NamedTuple):
    """``share`` is that of the time which is left to this and all later steps."""

    name: str
    share: float
    least: float
    """Seconds under which it is not started."""


STEPS = (
    Step("machine", 15, 30),
    Step("suite", 190, 30),
    Step("sanitizer", 60, 20),
    Step("times", 120, 20),
    Step("peers", 70, 15),
    Step("launches", 35, 10),
    Step("tiles", 90, 30),
)


def sources() -> str:
    """A short digest of all Python that a result depends on."""
    digest = hashlib.sha256()
    for top in ("kernels", "nmsolve", "bench/gpu_day", "bench/peers", "tests/kernels"):
        for file in sorted((ROOT / top).rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def read_day(out: Path) -> dict[str, Any]:
    """What a day has written to its folder; empty if there was none.

    Raises
    ------
    NMSolveError
        If day.json is something else.
    """
    try:
        day = json.loads((out / "day.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise NMSolveError(f"out: cannot read {out / 'day.json'}: {error}") from None
    if not isinstance(day, dict) or day.get("format") != FORMAT:
        raise NMSolveError(f"out: {out / 'day.json'} is not of a day with a GPU")
    return day


def begin(out: Path, rehearsal: bool) -> dict[str, Any]:
    """The day of a folder, new or to be gone on with.

    Raises
    ------
    NMSolveError
        If the folder holds something else, or results of other sources.
    """
    if out.exists() and not out.is_dir():
        raise NMSolveError(f"out: expected a folder, {out} is none")
    day = read_day(out)
    if not day:
        if out.is_dir() and any(out.iterdir()):
            raise NMSolveError(f"out: {out} holds other files; expected a new or empty folder, or a day's")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise NMSolveError(f"out: cannot make {out}: {error.strerror}") from None
        return {"format": FORMAT, "rehearsal": rehearsal, "sources": sources(), "steps": {}}
    if day["rehearsal"] != rehearsal:
        raise NMSolveError(f"out: {out} holds a {'rehearsal' if day['rehearsal'] else 'real day'}")
    if day["sources"] != sources():
        raise NMSolveError(f"out: {out} holds results of other sources; expected a new folder")
    return day


def run_day(
    out: Path,
    seconds: float,
    command: Callable[[Step, float], Sequence[str]],
    *,
    rehearsal: bool = False,
    steps: Sequence[Step] = STEPS,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Every step that is not done yet; the state of each: done, part, failed or skipped.

    ``command(step, seconds)`` is what runs a step. Its exit code says how it ended, its last line what was
    found. day.json is written after each.

    Raises
    ------
    NMSolveError
        If the folder is not to be used, or the first step finds that this is no machine for a day.
    """
    end = time.monotonic() + seconds
    day = begin(out, rehearsal)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(out))
        except BlockingIOError:
            raise NMSolveError(f"out: another process works in {out}") from None
        write_text(out / "day.json", json.dumps(day, indent=1) + "\n")
        states: dict[str, str] = {}
        for position, step in enumerate(steps):
            before = day["steps"].get(step.name, {})
            if before.get("state") == "done":
                states[step.name] = "done"
                say(f"{step.name}: done before: {before['line']}")
                continue
            # Steps that are done need nothing; what they would have had goes to the others.
            later = [s for s in steps[position:] if day["steps"].get(s.name, {}).get("state") != "done"]
            left = end - time.monotonic()
            budget = max(0.0, left) * step.share / sum(s.share for s in later)
            if left < step.least:
                short = f"skipped, {max(left, 0):.0f} s left and {step.least:g} needed"
                found = before or {"state": "skipped", "seconds": 0, "line": short}
                say(f"{step.name}: {short}" + (f"; before: {before['line']}" if before else ""))
            else:
                budget = min(left, max(budget, step.least))
                found = _run_step(out, command(step, budget), step, budget)
                say(f"{step.name}: {found['state']}, {found['seconds']:.0f} s: {found['line']}")
            states[step.name] = found["state"]
            day["steps"][step.name] = found
            day["written"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
            write_text(out / "day.json", json.dumps(day, indent=1) + "\n")
            if found.get("code") == REFUSED and not position:
                raise NMSolveError(found["line"].partition("error: ")[2] or found["line"])
    return states


def _run_step(out: Path, command: Sequence[str], step: Step, budget: float) -> dict[str, Any]:
    start = time.monotonic()
    with (out / "day.log").open("a+", encoding="utf-8", errors="replace") as log:
        log.write(f"\n=== {step.name}, {budget:.0f} s\n")
        log.flush()
        begin_at = log.tell()
        with _group(command, log) as child:
            try:
                child.wait(budget + GRACE)
                state = {0: "done", PART: "part"}.get(child.returncode, "failed")
                note = f"exit code {child.returncode}: " if state == "failed" else ""
            except subprocess.TimeoutExpired:
                state, note = "part", "ended by force: "
        log.seek(begin_at)
        lines = [line for line in log.read().splitlines() if line.strip()]
    line = note + (lines[-1].strip() if lines else "nothing was said")
    seconds = round(time.monotonic() - start, 1)
    return {"state": state, "code": child.returncode, "seconds": seconds, "line": line[:500]}


@contextlib.contextmanager
def _group(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child in a process group of its own, of which nothing is left afterwards."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield child
    finally:
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(patience)


def command_of(out: Path, rehearsal: bool) -> Callable[[Step, float], list[str]]:
    """How a step of this package is run; a rehearsal's on the emulator of PTX."""
    start = [sys.executable, str(ROOT / "bench")]
    if rehearsal:
        start = [sys.executable, str(ROOT.joinpath("tests", "support", "on_emulator.py")), "90"]

    def command(step: Step, seconds: float) -> list[str]:
        given = ["gpu_day", "--out", str(out), "--step", step.name, "--seconds", f"{seconds:.0f}"]
        return [*start, *given, *(["--rehearse"] if rehearsal else [])]

    return command
