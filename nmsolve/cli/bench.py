"""The command ``nmsolve bench``: how fast masks are on this machine, and which tiles suit its GPU."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from nmsolve.backends.devices import check_device, chosen_device
from nmsolve.backends.dispatch import SCORE_DTYPES
from nmsolve.backends.triton import launch_table
from nmsolve.cli import options
from nmsolve.cli.command import Command, exit_codes
from nmsolve.errors import NMSolveError, counted
from nmsolve.files import check_out
from nmsolve.timing import TIMED

if TYPE_CHECKING:
    from nmsolve.timing.methods import Timing

__all__ = ["COMMAND"]

PATTERNS = ("2:4", "4:8", "8:16", "16:32")

DESCRIPTION = """\
Times the mask methods on random scores, here: the median over some repeats, after calls that are not timed.
The gap is how far a mask is below the optimum, by the certificate of the exact method.
"""

EPILOG = f"""\
examples:
  nmsolve bench
      every method for {", ".join(PATTERNS)}

  nmsolve bench --pattern 8:16 --size 4096x11008 --method exact --method tsenor --out speed.csv

  nmsolve bench --tune
      measures other tiles for the Triton kernels on this GPU, and writes those that are faster to
      $XDG_CONFIG_HOME/nmsolve/launch_table.json (or below ~/.config); they are used where
      {launch_table.ENVIRONMENT} names that file

{exit_codes()}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pattern",
        metavar="N:M",
        action="append",
        help=f"may be repeated (default: {' '.join(PATTERNS)})",
    )
    parser.add_argument(
        "--size",
        metavar="SIZE",
        action="append",
        help="rows and columns, as 4096 or 4096x11008; may be repeated (default: 8192 on a GPU, else 1024)",
    )
    parser.add_argument("--method", choices=TIMED, action="append", help="may be repeated (default: all)")
    parser.add_argument("--dtype", choices=SCORE_DTYPES, default="float32", help="of the scores (float32)")
    options.add_device(parser)
    options.add_backend(parser)
    parser.add_argument("--repeats", type=int, help="timed calls (default: 20 on a GPU, else 5)")
    options.add_out(parser, "write a .csv or .json file too")
    options.add_overwrite(parser, "replace OUT if it is there")
    parser.add_argument("--tune", action="store_true", help="look for faster tiles; needs a GPU")


def run(args: argparse.Namespace) -> None:
    if args.repeats is not None and args.repeats < 1:
        raise NMSolveError(f"repeats: expected at least 1, got {args.repeats}")
    check_device(args.device)
    if args.tune:
        _tune(args)
    else:
        _measure(args)


def _measure(args: argparse.Namespace) -> None:
    patterns = [options.pattern_of(text) for text in args.pattern or PATTERNS]
    sizes = [_size(text) for text in args.size or ()]
    if args.out is not None:
        check_out(args.out, args.overwrite, suffixes=(".csv", ".json"))

    import torch

    from nmsolve.timing.methods import measure, write_timings

    device = chosen_device(args.device)
    gpu = device != "cpu"
    timings = []
    print(HEAD)
    for timing in measure(
        patterns,
        sizes or [(8192, 8192) if gpu else (1024, 1024)],
        methods=args.method or TIMED,
        dtype=getattr(torch, args.dtype),
        device=device,
        backend=args.backend,
        repeats=args.repeats or (20 if gpu else 5),
    ):
        timings.append(timing)
        print(_line(timing), flush=True)
    if args.out is not None:
        write_timings(args.out, timings, device)
        print(f"wrote {args.out}")


def _tune(args: argparse.Namespace) -> None:
    for name in ("pattern", "size", "method"):
        if getattr(args, name):
            raise NMSolveError(f"{name}: not with tune=True, which measures every kernel and block size")
    out: Path = args.out or launch_table.default_path()
    if args.out is not None:
        check_out(out, args.overwrite, suffixes=(".json",))
    device = chosen_device(args.device)

    from nmsolve.timing.tiles import tune_to_file

    won = tune_to_file(out, device=device, repeats=args.repeats or 20)
    faster = f"{counted(len(won), 'tile')} {'is' if len(won) == 1 else 'are'} faster"
    print(f"{faster} than the shipped ones; wrote {out}")
    print(f"to use them: export {launch_table.ENVIRONMENT}={out}")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise NMSolveError(f"size: expected rows and columns as 4096 or 4096x11008, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


HEAD = f"{'pattern':<8} {'method':<9} {'backend':<8} {'matrix':<13} {'dtype':<9} {'ms':>10} {'spread':>19}"
HEAD += f" {'Gweights/s':>11} {'µs/block':>9} {'gap':>8}"


def _line(timing: Timing) -> str:
    gap = "" if timing.gap is None else f"{timing.gap:.1e}"
    spread = f"{timing.least:.3f} to {timing.most:.3f}"
    return (
        f"{timing.pattern:<8} {timing.method:<9} {timing.backend:<8} {f'{timing.rows}x{timing.cols}':<13} "
        f"{timing.dtype:<9} {timing.milliseconds:>10.3f} {spread:>19} {timing.gigaweights_per_second:>11.4f} "
        f"{timing.microseconds_per_block:>9.3f} {gap:>8}"
    )


COMMAND = Command("bench", "time the mask methods on this machine", DESCRIPTION, EPILOG, add_options, run)
