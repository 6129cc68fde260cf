"""The command ``nmsolve bench``: how fast the mask methods are on this machine, and which tiles suit its GPU.

torch is imported when there is work for it.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.about import __version__, versions
from nmsolve.backends.devices import check_device, chosen_device
from nmsolve.backends.triton import launch_table
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern

if TYPE_CHECKING:
    from nmsolve.timing.methods import Timing

__all__ = ["add_commands"]

OK = 0

METHODS = ("exact", "tsenor", "greedy", "ordinary")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PATTERNS = ("2:4", "4:8", "8:16", "16:32")

HELP = """\
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
      {launch_table.default_path()}; they are used where {launch_table.ENVIRONMENT} names that file
"""

AddCommand = Callable[[str, str, str, str], argparse.ArgumentParser]


def add_commands(add: AddCommand) -> None:
    """Adds the command; ``add(name, help, description, epilog)`` returns the parser of a new one."""
    parser = add("bench", "time the mask methods on this machine", HELP, EPILOG)
    parser.set_defaults(run=_bench)
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
    parser.add_argument("--method", choices=METHODS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the scores (float32)")
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)"
    )
    parser.add_argument(
        "--backend", choices=("auto", "triton", "cpu", "torch"), default="auto", help="as for nmsolve mask"
    )
    parser.add_argument("--repeats", type=int, help="timed calls (default: 20 on a GPU, else 5)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write a .csv or .json file too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--tune", action="store_true", help="look for faster tiles; needs a GPU")


def _bench(args: argparse.Namespace) -> int:
    if args.repeats is not None and args.repeats < 1:
        raise NMSolveError(f"--repeats: expected at least 1, got {args.repeats}")
    check_device(args.device)
    return _tune(args) if args.tune else _measure(args)


def _measure(args: argparse.Namespace) -> int:
    patterns = [_pattern(text) for text in args.pattern or PATTERNS]
    sizes = [_size(text) for text in args.size or ()]
    if args.out is not None:
        _check_out(args.out, (".csv", ".json"), args.overwrite)

    import torch

    from nmsolve.timing.methods import measure, measured_on

    device = chosen_device(args.device)
    gpu = device != "cpu"
    timings = []
    print(HEAD)
    for timing in measure(
        patterns,
        sizes or [(8192, 8192) if gpu else (1024, 1024)],
        methods=args.method or METHODS,
        dtype=getattr(torch, args.dtype),
        device=device,
        backend=args.backend,
        repeats=args.repeats or (20 if gpu else 5),
    ):
        timings.append(timing)
        print(_line(timing), flush=True)
    if args.out is not None:
        _write(args.out, timings, {**measured_on(device), **versions()})
        print(f"wrote {args.out}")
    return OK


def _tune(args: argparse.Namespace) -> int:
    for name in ("pattern", "size", "method"):
        if getattr(args, name):
            raise NMSolveError(f"--{name}: not with --tune, which measures every kernel and block size")
    out = args.out or launch_table.default_path()
    _check_out(out, (".json",), args.overwrite or args.out is None, folder=args.out is not None)

    import torch

    device = chosen_device(args.device)
    if device == "cpu":
        raise NMSolveError(f"--tune: needs a GPU; torch {torch.__version__} sees {torch.cuda.device_count()}")
    from nmsolve.backends.dispatch import select
    from nmsolve.timing.methods import measured_on
    from nmsolve.timing.tiles import tune

    tiles: Any = select("triton", device, 16).masks
    with torch.cuda.device(device):
        won = tune(tiles, device=device, repeats=args.repeats or 20)
        launch_table.save(out, won, measured_on(device))
    print(f"{len(won)} tiles are faster than the shipped ones; wrote {out}")
    print(f"to use them: export {launch_table.ENVIRONMENT}={out}")
    return OK


def _pattern(text: str) -> NMPattern:
    try:
        return NMPattern.parse(text)
    except NMSolveError as error:
        raise NMSolveError(f"--pattern: {error}") from None


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise NMSolveError(f"--size: expected rows and columns as 4096 or 4096x11008, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def _check_out(out: Path, suffixes: tuple[str, ...], overwrite: bool, *, folder: bool = True) -> None:
    if out.suffix not in suffixes:
        raise NMSolveError(f"--out: expected a name that ends in {' or '.join(suffixes)}, got {out}")
    if folder and not out.resolve().parent.is_dir():
        raise NMSolveError(f"--out: the folder {out.resolve().parent} does not exist")
    if out.is_dir() or (out.exists() and not overwrite):
        remedy = "it is a folder" if out.is_dir() else "--overwrite replaces it"
        raise NMSolveError(f"--out: {out} exists; {remedy}")


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


def _write(out: Path, timings: list[Timing], where: dict[str, Any]) -> None:
    """The timings as a file that appears whole or not at all."""
    rows = [{**asdict(timing), **where, "nmsolve": __version__} for timing in timings]
    if out.suffix == ".json":
        text = json.dumps(rows, indent=2) + "\n"
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
