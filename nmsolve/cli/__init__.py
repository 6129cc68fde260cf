"""The command ``nmsolve``: the table of its commands, and the way from arguments to an exit code.

A command parses arguments, calls one function of the library and prints what it returns. torch is imported
when there is work for it, so that ``--help`` and a mistyped argument answer at once.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from nmsolve.about import __version__
from nmsolve.cli import bench, eval_ppl, info, mask, permute, prune
from nmsolve.cli.command import Command, Parser, exit_codes, run

__all__ = ["COMMANDS", "main"]

COMMANDS: tuple[Command, ...] = (
    mask.COMMAND,
    prune.COMMAND,
    permute.COMMAND,
    eval_ppl.COMMAND,
    bench.COMMAND,
    info.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; argparse exits by itself for --help and mistakes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack the letters of a tensor's name
            stream.reconfigure(errors="backslashreplace")
    parser, parsers = _parsers()
    args = parser.parse_args(argv)
    return run(args.command, parsers[args.command.name], args)


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole, and that of each command."""
    width = max(len(command.name) for command in COMMANDS)
    listing = "\n".join(f"  nmsolve {command.name:<{width}}  {command.summary}" for command in COMMANDS)
    parser = Parser(
        prog="nmsolve",
        description=f"Provably optimal N:M and transposable N:M sparsity masks.\n\n{listing}\n\n"
        "nmsolve COMMAND --help says more, with examples.",
        epilog=exit_codes(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nmsolve {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    parsers: dict[str, Parser] = {}
    for command in COMMANDS:
        own = parsers[command.name] = commands.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=command.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        own.set_defaults(command=command)
        own.add_argument(
            "--traceback", action="store_true", help="print the traceback of an unexpected error"
        )
        command.add_options(own)
    return parser, parsers
