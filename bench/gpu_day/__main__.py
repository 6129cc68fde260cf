"""What does everything do on a real GPU? Machine, tests, sanitizer, times, peers and tiles, in ten minutes.

Each step has its own process and time. What a step finds is written at once, whole, and a second run into the
same folder goes on where the first ended; an error ends its step alone. --publish copies
what was measured to where the documents' tables look for it.

    python bench gpu_day --out DIR                 # from a plain checkout, too
    python bench gpu_day --out DIR --rehearse      # no GPU: small sizes on the emulator of PTX
    python bench gpu_day --publish DIR             # for the documents' tables
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

from gpu_day.day import PART, STEPS, command_of, run_day
from nmsolve.errors import NMSolveError


def run_step(name: str, out: Path, seconds: float, rehearsal: bool) -> int:
    """In the child: the step's module does the work; what it returns says whether all is done."""
    # Nobody waits for a step whose day was killed.
    signal.setitimer(signal.ITIMER_REAL, seconds + 60)
    from gpu_day.setting import Setting

    done, line = importlib.import_module(f"gpu_day.{name}").run(Setting.here(out, seconds, rehearsal))
    print(line, flush=True)
    return 0 if done else PART


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="new, empty, or of a day to be gone on with")
    parser.add_argument("--seconds", type=float, default=585, help="for all that is to be done (585)")
    parser.add_argument("--rehearse", action="store_true", help="on the emulator of PTX, with small sizes")
    parser.add_argument("--step", choices=[step.name for step in STEPS], help="this one alone")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="take a day's results over")
    arguments = parser.parse_args()
    if (arguments.out is None) == (arguments.publish is None):
        parser.error("expected --out DIR or --publish DIR")
    if arguments.seconds <= 0:
        parser.error(f"--seconds: expected a positive number, got {arguments.seconds:g}")
    try:
        if arguments.publish is not None:
            from gpu_day.publish import publish

            publish(arguments.publish)
            return 0
        out = arguments.out.resolve()
        if arguments.step is not None:
            return run_step(arguments.step, out, arguments.seconds, arguments.rehearse)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        command = command_of(out, arguments.rehearse)
        states = run_day(out, arguments.seconds, command, rehearsal=arguments.rehearse)
    except NMSolveError as error:
        print(f"gpu_day: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpu_day: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0 if set(states.values()) == {"done"} else 1


if __name__ == "__main__":
    sys.exit(main())
