"""N:M patterns: how many entries of a group are kept. The one place that knows keep/prune counting."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from nmsolve.errors import NMSolveError

__all__ = ["NMPattern", "PatternLike"]


def _integer(name: str, value: object) -> int:
    """``value`` as an int; a bool, a float or a string is refused, a NumPy integer is not."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise NMSolveError(f"{name}: expected an integer, got {value!r} ({type(value).__name__})")


@dataclass(frozen=True)
class NMPattern:
    """``n`` kept entries of every ``m`` consecutive ones.

    Everywhere in nmsolve the first number counts what is **kept**: 1:4 is 75 % sparse. Some peers count
    what is pruned; :meth:`from_pruned` reads theirs and :attr:`pruned` gives it back.

    Parameters
    ----------
    n : int
        Kept entries per group, ``0 <= n <= m``.
    m : int
        Group size, ``m >= 1``.

    Raises
    ------
    NMSolveError
        If a number is not an integer or lies outside its range.

    Examples
    --------
    >>> NMPattern.parse("8:16")
    NMPattern(n=8, m=16)
    >>> str(NMPattern.from_pruned(3, 4)), NMPattern(1, 4).density
    ('1:4', 0.25)
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        n, m = _integer("n", self.n), _integer("m", self.m)
        if m < 1:
            raise NMSolveError(f"m: expected a group size of at least 1, got {m}")
        if not 0 <= n <= m:
            raise NMSolveError(f"n: expected 0 <= n <= m={m} kept entries per group, got {n}")
        object.__setattr__(self, "n", n)
        object.__setattr__(self, "m", m)

    @classmethod
    def of(cls, pattern: PatternLike | int, m: int | None = None) -> NMPattern:
        """The pattern that is given in one piece, or as ``n`` and ``m``: every public function takes both.

        Parameters
        ----------
        pattern : NMPattern, str, (int, int) or int
            An NMPattern, ``"8:16"`` or ``(8, 16)``; or ``n`` alone.
        m : int, optional
            Beside ``n``. Beside a pattern it may be left out, or says the same.

        Raises
        ------
        NMSolveError
            If it is none of these.

        Examples
        --------
        >>> NMPattern.of("8:16") == NMPattern.of((8, 16)) == NMPattern.of(8, 16)
        True
        """
        if isinstance(pattern, tuple | list) and len(pattern) == 2:
            found = cls(*pattern)
        elif isinstance(pattern, str) and (m is None or ":" in pattern):
            found = cls.parse(pattern)
        elif isinstance(pattern, NMPattern):
            found = pattern
        elif m is not None:
            return cls(pattern, m)  # type: ignore[arg-type]
        else:
            raise NMSolveError(
                f"pattern: expected 'N:M' with N kept of M, such as '2:4', or (2, 4), got {pattern!r}"
            )
        if m is not None and m != found.m:
            raise NMSolveError(f"m: expected {found.m} or none beside the pattern {found}, got {m!r}")
        return found

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """The pattern that ``text``, such as ``"8:16"`` (8 kept of 16), stands for."""
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text)
        if found is None:
            raise NMSolveError(f"pattern: expected 'N:M' with N kept of M, such as '2:4', got {text!r}")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def from_pruned(cls, pruned: int, m: int) -> NMPattern:
        """The pattern that prunes ``pruned`` of every ``m``, the way some peers count."""
        m, pruned = _integer("m", m), _integer("pruned", pruned)
        if m >= 1 and not 0 <= pruned <= m:
            raise NMSolveError(f"pruned: expected 0 <= pruned <= m={m}, got {pruned}")
        return cls(m - pruned, m)

    @property
    def pruned(self) -> int:
        """Entries removed from each full group."""
        return self.m - self.n

    @property
    def density(self) -> float:
        """Kept share of a full group, between 0 and 1."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


PatternLike = NMPattern | str | tuple[int, int]
"""What stands for a pattern in one piece: see :meth:`NMPattern.of`."""
