"""The errors that nmsolve raises on purpose, and text that is safe to print."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "BackendError",
    "NMSolveError",
    "NMSolveWarning",
    "WorkFailed",
    "begun",
    "counted",
    "one_line",
    "printable",
]


def printable(text: object) -> str:
    r"""``str(text)`` as it can be shown on a terminal: what is not printable is escaped.

    Names in files may hold anything: control characters move the cursor, newlines forge lines.

    Examples
    --------
    >>> printable("fc\n\x1b[2K.weight")
    'fc\\n\\x1b[2K.weight'
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(text: object) -> str:
    r"""What another library says, on one line.

    Examples
    --------
    >>> one_line("expected one of:\n  a\n  b")
    'expected one of: a b'
    """
    return " ".join(str(text).split())


def counted(count: int, noun: str) -> str:
    """A number of things, in words.

    Examples
    --------
    >>> counted(1, "tensor"), counted(1234, "layer")
    ('1 tensor', '1,234 layers')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class NMSolveError(ValueError):
    """An argument is not what a function takes.

    The message names the argument, what was expected and what came; whatever is not printable in it is
    escaped. It is raised before any work is done and before anything is written.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class BackendError(NMSolveError):
    """The backend that was asked for cannot run this tensor on this machine; the message says why."""


class NMSolveWarning(UserWarning):
    """Something that does not end the work, but that its user should know."""

    def __str__(self) -> str:
        return printable(super().__str__())


class WorkFailed(NMSolveError):
    """The arguments are right, but what they name cannot be worked on: weights that are not finite, say.

    Unlike other errors of nmsolve it may come late. Files appear whole or not at all all the same.
    """


@contextmanager
def begun() -> Iterator[None]:
    """From here on, errors of nmsolve are failures of the work: :class:`WorkFailed`.

    Examples
    --------
    >>> with begun():
    ...     raise NMSolveError("scores: expected finite values")
    Traceback (most recent call last):
    nmsolve.errors.WorkFailed: scores: expected finite values
    """
    try:
        yield
    except WorkFailed:
        raise
    except NMSolveError as error:
        raise WorkFailed(str(error)) from error
