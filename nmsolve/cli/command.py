"""What a command is, what its outcome is for the shell, and how its errors are told."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from nmsolve.errors import NMSolveError, NMSolveWarning, WorkFailed, one_line, printable
from nmsolve.files import Interrupts
from nmsolve.ranks import ALONE, Ranks, joined, started

__all__ = ["OK", "Command", "Parser", "exit_codes", "refuse_ranks", "run", "warnings_told"]

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130

NOTHING = "nothing was written"


@dataclass(frozen=True)
class Command:
    """A row of the table of commands: its name, what ``--help`` says, its options, and what it does.

    ``run`` gets the parsed arguments and returns when all is done; it raises :class:`NMSolveError` (``name:
    expected ..., got ...``, with the names of the library's arguments) before any work has begun, and
    :class:`WorkFailed` afterwards. Where ``ranks`` is set, the processes that torchrun starts share the work:
    they are joined, ``args.ranks`` has them, and what fails is told once.
    """

    name: str
    summary: str
    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    ranks: bool = False


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
    _, ranks, _ = started()
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
        with joined() as ranks:  # all of them have the same arguments
            ranks.once(lambda: _fail(f"{message} (see {self.prog} --help)"))
        sys.exit(USAGE)

    def print_help(self, file: Any = None) -> None:
        if started()[0] == 0:
            super().print_help(file)


def run(command: Command, parser: Parser, args: argparse.Namespace) -> int:
    """Runs a command and returns its exit code; an error is one line on standard error."""
    if not command.ranks:
        return _run(command, parser, args, ALONE)
    try:
        with joined() as ranks:
            return _run(command, parser, args, ranks)
    except Exception as error:
        _fail(f"the ranks of torchrun cannot be joined: {_describe(error)}")
        return FAILED


def _run(command: Command, parser: Parser, args: argparse.Namespace, ranks: Ranks) -> int:
    args.ranks = ranks
    try:
        with ranks.agreed():
            command.run(args)
        return OK
    except NMSolveError as error:
        message, code = _in_options(_complete(str(error), error), parser.options), _code(error)
    except KeyboardInterrupt as error:
        left = getattr(error, "left_behind", None) or (error.args[0] if error.args else NOTHING)
        message, code = f"interrupted; {left}", INTERRUPTED
    except Exception as error:
        if args.traceback:
            traceback.print_exc()
        message, code = _complete(_describe(error), error), FAILED
    if ranks.count > 1 and threading.current_thread() is threading.main_thread():
        for number in Interrupts.SIGNALS:  # torchrun's, for one, when the first rank has ended
            signal.signal(number, signal.SIG_IGN)
    ranks.once(lambda: _fail(message))
    return code


@contextmanager
def warnings_told(ranks: Ranks = ALONE) -> Iterator[None]:
    """Warnings of nmsolve are a line on standard error each, by the first rank; those of other libraries stay
    as they are.
    """
    show = warnings.showwarning

    def tell(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, NMSolveWarning):
            if ranks.rank == 0:
                print(f"nmsolve: warning: {_shortened(printable(one_line(message)))}", file=sys.stderr)
        else:
            show(message, category, *where, **options)

    with warnings.catch_warnings():
        warnings.showwarning = tell
        warnings.simplefilter("always", NMSolveWarning)
        yield


def _complete(message: str, error: Exception) -> str:
    """The message with the name of the rank that failed, where there are several, and, where the work can be
    gone on with, what is kept: the error's ``of_rank`` and ``left_behind``.
    """
    rank, left = getattr(error, "of_rank", None), getattr(error, "left_behind", None)
    message = f"{rank}: {message}" if rank else message
    return f"{message}; {left}" if left else message


def _code(error: NMSolveError) -> int:
    return FAILED if isinstance(error, WorkFailed) else USAGE


def _in_options(message: str, options: Container[str]) -> str:
    """The library speaks of its arguments: ``out: expected`` becomes ``--out: expected`` and
    ``overwrite=True`` becomes ``--overwrite``, where there are such options.
    """
    found = re.match(r"(rank \d+ of \d+: )?(\w+):", message)
    if found is not None and found[2] in options:
        message = f"{found[1] or ''}{_option(found[2])}{message[found.end(2) :]}"
    return re.sub(r"\b(\w+)=True\b", lambda m: _option(m[1]) if m[1] in options else m[0], message)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {printable(error.filename)}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _fail(message: str) -> None:
    line = _shortened(printable(one_line(message)))
    print(f"nmsolve: error: {line}", file=sys.stderr, flush=True)


def _shortened(line: str) -> str:
    """A line of bearable length: names in files may be as long as someone likes."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 300]} ... {line[-300:]}"


_LONGEST = 1500
