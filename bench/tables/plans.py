"""The tables of soft and hard permutations of small matrices: Sinkhorn plans and assignments."""

from __future__ import annotations

from collections.abc import Callable

from tables.columns import Row, left, listing, number, results, right, rounding


def _batch(row: Row) -> str:
    return f"{row['batch']} x {row['m']}²"


def assignment() -> str:
    file = "assignment.csv"
    return listing(
        file,
        results(file),
        [
            left("matrices", _batch),
            left("scores"),
            right("nmsolve, µs", number("us_per_matrix")),
            right("SciPy, µs", number("scipy_us_per_matrix")),
            right("torch-linear-assignment, µs", number("torch_linear_assignment_us_per_matrix")),
            right("SciPy / nmsolve", lambda row: f"{number('times_faster')(row)}x"),
        ],
    )


def sinkhorn() -> str:
    file = "sinkhorn.csv"
    return listing(
        file,
        results(file),
        [
            left("logits", _batch),
            right("iterations"),
            left("method"),
            right("forward, ms", number("forward_ms")),
            right("with the gradient kept, ms", number("kept_ms")),
            right("and backward, ms", number("both_ms")),
            right("held between", lambda row: f"{number('held_bytes', unit=2**20)(row)} MiB"),
            right("error of the gradient", lambda row: rounding(row["gradient_error"])),
        ],
    )


TABLES: dict[str, Callable[[], str]] = {"assignment": assignment, "sinkhorn": sinkhorn}
