"""Is exact on the Pareto front: is any peer as fast and as accurate, at any size and pattern?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

EXACT = "nmsolve exact (cpu)"
RESOLUTION = 1e-9  # relative errors below it count as none: float64 sums of float32 scores in another order


def dominating(rows: Iterable[Mapping[str, object]]) -> list[str]:
    """The rows of peers.csv that take no more time than exact and lose no more; none if all is well.

    Raises ``ValueError`` if a case lacks its row of exact.
    """
    rows = list(rows)
    cases = {_case(row): row for row in rows if row["peer"] == EXACT}
    found = []
    for row in rows:
        if _case(row) not in cases:
            raise ValueError(f"no row of {EXACT} for {row['n']}:{row['m']} at {row['size']}")
        exact = cases[_case(row)]
        fast = float(row["seconds_per_block"]) <= float(exact["seconds_per_block"])
        limit = float(exact["mean_relative_error"]) + RESOLUTION
        others = not str(row["peer"]).startswith("nmsolve")
        if others and fast and float(row["mean_relative_error"]) <= limit:
            found.append(f"{row['peer']}, {row['n']}:{row['m']}, {row['size']}²")
    return found


def _case(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in ("n", "m", "size", "distribution"))
