"""Options that several commands have, with the choices of the library's tables. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nmsolve.backends.dispatch import AUTO, BACKENDS, MASK_METHODS
from nmsolve.errors import NMSolveError, printable
from nmsolve.pattern import NMPattern

__all__ = [
    "SOME",
    "add_backend",
    "add_bos",
    "add_calibration",
    "add_device",
    "add_dtype",
    "add_globs",
    "add_mask_method",
    "add_out",
    "add_overwrite",
    "add_quiet",
    "add_transposable",
    "need_out",
    "pattern_of",
    "progress_of",
    "tell_start",
]

_DTYPE = "of the model while it runs, and of what is saved (default: the checkpoint's)"
SOME = 0.01
"""Share of zeros in dense weights that is worth a line: of a model that was pruned before."""

_FILE_OR_FOLDER = "file (for a file) or folder (for a folder) to write"


def add_out(
    parser: argparse.ArgumentParser, help_text: str = _FILE_OR_FOLDER, *, required: bool = False
) -> None:
    parser.add_argument("--out", metavar="OUT", type=Path, required=required, help=help_text)


def add_overwrite(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--overwrite", action="store_true", help=help_text)


def add_transposable(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transposable", action="store_true", help="N:M along rows and along columns")


def add_mask_method(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument(
        option,
        choices=tuple(MASK_METHODS),
        help="with --transposable: exact is optimal (default); tsenor and greedy approximate",
    )


def add_backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=(AUTO, *BACKENDS),
        default=AUTO,
        help="of the mask solver: auto (default) takes triton on a GPU, cpu (Numba) on a CPU if it is "
        "installed, else torch",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)"
    )


def add_dtype(parser: argparse.ArgumentParser, choices: Sequence[str], help_text: str = _DTYPE) -> None:
    parser.add_argument("--dtype", choices=tuple(choices), help=help_text)


def add_calibration(parser: argparse.ArgumentParser, what: str = "") -> None:
    """The options that say what a model is calibrated on; ``what`` says what for, where not all is."""
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help=f"{what}text in UTF-8, or tokens (or images) in a .safetensors file with one tensor",
    )
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences (default 128)")
    parser.add_argument(
        "--sequence-length", type=int, help="tokens in each (default: what the model takes, 2048 at most)"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="sequences in a forward pass (default 1)")
    add_bos(parser, "sequence of a calibration text")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of sequences (default 0)")


def add_bos(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help=f"begin each {what} with the tokenizer's BOS token (default: as the tokenizer does)",
    )


def add_globs(parser: argparse.ArgumentParser, option: str, help_text: str) -> None:
    """An option that takes one glob and may be repeated."""
    parser.add_argument(
        option, metavar="GLOB", action="append", default=[], help=f"{help_text}; may be repeated"
    )


def add_quiet(parser: argparse.ArgumentParser, help_text: str = "no progress bar and no summary") -> None:
    parser.add_argument("--quiet", action="store_true", help=help_text)


def pattern_of(text: str) -> NMPattern:
    """The pattern that ``--pattern`` gives."""
    try:
        pattern = NMPattern.parse(text)
    except NMSolveError as error:
        raise NMSolveError(f"pattern: {str(error).removeprefix('pattern: ')}") from None
    if pattern.n == 0:
        raise NMSolveError(f"pattern: {text} keeps no weight at all; expected N:M with 0 < N < M")
    if pattern.n == pattern.m:
        raise NMSolveError(f"pattern: {text} prunes nothing; expected N:M with 0 < N < M")
    return pattern


def need_out(out: Path | None) -> Path:
    """``--out`` of a command that has work to do."""
    if out is None:
        raise NMSolveError("out: expected a path to write to (only --dry-run needs none)")
    return out


def progress_of(args: argparse.Namespace) -> bool | None:
    """Whether to show a progress bar: never with ``--quiet``, else on a terminal."""
    return False if args.quiet else None


def tell_start(args: argparse.Namespace, what: str, path: Path) -> None:
    """A line before imports and headers take their time, where there will be a progress bar."""
    if progress_of(args) is None and sys.stderr.isatty():
        print(f"nmsolve: {what} {printable(path)}: reading it", file=sys.stderr, flush=True)
