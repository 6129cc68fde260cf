"""N:M and V:N:M patterns: what is kept of a group. The one place that knows keep/prune counting."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from nmsolve.errors import NMSolveError

__all__ = ["NMPattern", "PatternLike", "VNMPattern", "VNMPatternLike"]


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
        if isinstance(pattern, (tuple, list)) and len(pattern) == 2:  # Dynamo of PyTorch 2.8 takes no union
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


@dataclass(frozen=True)
class VNMPattern:
    """V:N:M: of every ``m`` columns, ``v`` rows keep the same few, and each row ``n`` entries of those.

    The pattern of VENOM (arXiv 2310.02065): the columns that are kept, four of ``m``, make a matrix that is
    ``n``:4, such as GPUs multiply 2:4 ones, and ``n / m`` of the entries are kept in all.

    Parameters
    ----------
    v : int
        Rows of a strip, ``v >= 1``.
    n : int
        Kept entries of a row in a group, ``0 <= n <= columns``.
    m : int
        Columns of a group, ``m >= columns``.
    columns : int
        Kept columns of a group in a strip, 4 in VENOM; at least 1.

    Raises
    ------
    NMSolveError
        If a number is not an integer or lies outside its range.

    Examples
    --------
    >>> VNMPattern.of("64:2:16")
    VNMPattern(v=64, n=2, m=16, columns=4)
    >>> str(VNMPattern(64, 2, 16)), VNMPattern(64, 2, 16).density
    ('64:2:16', 0.125)
    """

    v: int
    n: int
    m: int
    columns: int = 4

    def __post_init__(self) -> None:
        v, n, m, columns = (_integer(name, getattr(self, name)) for name in ("v", "n", "m", "columns"))
        if v < 1:
            raise NMSolveError(f"v: expected strips of at least 1 row, got {v}")
        if columns < 1:
            raise NMSolveError(f"columns: expected at least 1 kept column per group, got {columns}")
        if m < columns:
            raise NMSolveError(f"m: expected groups of at least columns={columns} columns, got {m}")
        if not 0 <= n <= columns:
            raise NMSolveError(f"n: expected 0 <= n <= columns={columns} kept entries per row, got {n}")
        for name, value in zip(("v", "n", "m", "columns"), (v, n, m, columns), strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, pattern: VNMPatternLike) -> VNMPattern:
        """The pattern that a VNMPattern, ``"64:2:16"`` or ``(64, 2, 16)`` stands for, with 4 columns.

        Raises
        ------
        NMSolveError
            If it is none of these.
        """
        if isinstance(pattern, VNMPattern):
            return pattern
        if isinstance(pattern, (tuple, list)) and len(pattern) == 3:  # Dynamo of PyTorch 2.8 takes no union
            return cls(*pattern)
        found = (
            re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*:\s*(\d+)\s*", pattern)
            if isinstance(pattern, str)
            else None
        )
        if found is None:
            raise NMSolveError(
                "pattern: expected 'V:N:M', strips of V rows that keep N entries of every M, "
                f"such as '64:2:8', or (64, 2, 8), got {pattern!r}"
            )
        return cls(*map(int, found.groups()))

    @property
    def density(self) -> float:
        """Kept share of a full group, between 0 and 1."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"


VNMPatternLike = VNMPattern | str | tuple[int, int, int]
"""What stands for a V:N:M pattern in one piece: see :meth:`VNMPattern.of`."""
