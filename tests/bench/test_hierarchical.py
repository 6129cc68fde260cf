"""What docs/hierarchical.md says of the results is what they say."""

from __future__ import annotations

import pytest
from tables.columns import results
from tables.hierarchical import of_layers

ROWS = results("hierarchical.csv")


@pytest.mark.parametrize("pattern", of_layers())
def test_kept_shares_are_in_order(pattern):
    """Layer by layer: sums, ours, columns in another order, rows too; N:M and unstructured above all."""
    methods = of_layers()[pattern]
    kept = {method: [float(row["kept"]) for row in rows] for method, rows in methods.items()}
    for better, worse in (
        ("exact", "sums"),
        ("exact", "exchanges"),
        ("columns", "exact"),
        ("rows and columns", "exact"),
        ("ordinary", "exact"),
        ("unstructured", "ordinary"),
    ):
        assert all(a >= b for a, b in zip(kept[better], kept[worse], strict=True)), (better, worse)
    assert kept["exact"] == kept["enumerated"]


def test_orders_gain_more_than_proven_columns():
    for pattern, methods in of_layers().items():
        kept = {method: sum(float(row["kept"]) for row in rows) for method, rows in methods.items()}
        assert kept["rows and columns"] - kept["exact"] > 3 * (kept["exact"] - kept["sums"]), pattern


def test_taller_strips_keep_less():
    low, high = of_layers()["16:2:8"]["exact"], of_layers()["64:2:8"]["exact"]
    assert all(float(a["kept"]) > float(b["kept"]) for a, b in zip(low, high, strict=True))


def test_every_choice_in_the_tables_is_proven():
    exact = [row for row in ROWS if row["method"] == "exact"]
    assert len(exact) > 20
    assert all(float(row["proven"]) == 1 and float(row["gap"]) == 0 for row in exact)
