"""What a command is, what its outcome is for the shell, and how its errors are told."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from nmsolve.errors import NMSolveError, NMSolveWarning, WorkFailed, one_line, printable

__all__ = ["OK", "Command", "Parser", "exit_codes", "refuse_ranks", "run", "warnings_told"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

NOTHING = "nothing was written"


@dataclass(frozen=True)
class Command:
    """A row of the table of commands: its name, what ``--help`` says, its options, and what it does.

    ``run`` gets the parsed arguments and returns when all is done; it raises :class:`NMSolveError` (``name:
    expected ..., got ...``, with the names of the library's arguments) before any work has begun, and
    :class:`WorkFailed` afterwards.
    """

    name: str
    summary: str
    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def exit_codes(failed: str = NOTHING, interrupted: str = NOTHING) -> str:
    """The table for a command's ``--help``, with what is left behind."""
    return f"""\
exit codes:
  {OK:<3}  done
  {FAILED:<3}  the work failed; {failed}
  {USAGE:<3}  an argument or the input is wrong; nothing was begun
  {INTERRUPTED:<3}  interrupted (SIGINT, SIGTERM, SIGHUP); {interrupted}
"""


def refuse_ranks(name: str, instead: str) -> None:
    """Raise, with the argument ``name``, if torchrun started several of this process."""
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if ranks > 1:
        raise NMSolveError(f"{name}: torchrun started {ranks} processes, this command is one; {instead}")


class Parser(argparse.ArgumentParser):
    """An argument parser that knows its options, and whose errors take one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.options: set[str] = set()
        super().__init__(*args, **options)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        if action.option_strings:
            self.options.add(action.dest)
        return action

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message} (see {self.prog} --help)", USAGE))


def run(command: Command, parser: Parser, args: argparse.Namespace) -> int:
    """Runs a command and returns its exit code; an error is one line on standard error."""
    try:
        command.run(args)
        return OK
    except NMSolveError as error:
        return _fail(_in_options(_with_rest(str(error), error), parser.options), _code(error))
    except KeyboardInterrupt as error:
        left = getattr(error, "left_behind", None) or (error.args[0] if error.args else NOTHING)
        return _fail(f"interrupted; {left}", INTERRUPTED)
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        return _fail(_with_rest(_describe(error), error), FAILED)


@contextmanager
def warnings_told() -> Iterator[None]:
    """Warnings of nmsolve are a line on standard error each; those of other libraries stay as they are."""
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, NMSolveWarning):
            print(f"nmsolve: warning: {_shortened(printable(one_line(message)))}", file=sys.stderr)
        else:
            show(message, category, *where, **options)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        warnings.simplefilter("always", NMSolveWarning)
        yield


def _with_rest(message: str, error: Exception) -> str:
    """The message and, where the work can be gone on with, what is kept: the error's ``left_behind``."""
    left = getattr(error, "left_behind", None)
    return f"{message}; {left}" if left else message


def _code(error: NMSolveError) -> int:
    return FAILED if isinstance(error, WorkFailed) else USAGE


def _in_options(message: str, options: Container[str]) -> str:
    """The library speaks of its arguments: ``out: expected`` becomes ``--out: expected`` and
    ``overwrite=True`` becomes ``--overwrite``, where there are such options.
    """
    name, colon, rest = message.partition(":")
    if colon and name in options:
        message = f"{_option(name)}:{rest}"
    return re.sub(r"\b(\w+)=True\b", lambda m: _option(m[1]) if m[1] in options else m[0], message)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {printable(error.filename)}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _fail(message: str, code: int) -> int:
    print(f"nmsolve: error: {_shortened(printable(one_line(message)))}", file=sys.stderr)
    return code


def _shortened(line: str) -> str:
    """A line of bearable length: names in files may be as long as someone likes."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-300:]}"


_LONGEST = 1500
