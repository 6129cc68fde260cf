"""The error for a library that an adapter needs and that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nmsolve.errors import NMSolveError

__all__ = ["MissingClientError", "importing"]


class MissingClientError(NMSolveError, ModuleNotFoundError):
    """The library of an adapter is not installed; the message has the command that installs it."""


@contextmanager
def importing(package: str) -> Iterator[None]:
    """Wraps the imports of ``package``, named as pip knows it.

    Raises
    ------
    MissingClientError
        If a module is not found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingClientError(f"{package} cannot be imported ({error}): pip install {package}") from None
