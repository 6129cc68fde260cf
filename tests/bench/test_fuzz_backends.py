"""The fuzz across backends: its counts, what it would notice, and that it goes on where it was."""

from __future__ import annotations

import sys
from dataclasses import replace

import fuzz_backends
import oracles
import pytest
import torch
from common import RESULTS, read_csv

import nmsolve

pytest.importorskip("numba")


def test_a_small_run_finds_nothing_wrong():
    for dtype in fuzz_backends.DTYPES:
        row = fuzz_backends.fuzz("torch", dtype, 5, 0.002)
        assert row is not None
        found = row.finished()
        assert found["blocks"] == 6 * (40 + 10)
        assert found["compared"] == found["blocks"]
        assert found["infeasible"] == found["beyond"] == found["mixed_beyond"] == 0
        assert float(str(found["worst_difference"])) < row.limit


def test_kinds_are_what_they_are_called():
    g = torch.Generator().manual_seed(0)
    for kind in fuzz_backends.KINDS:
        for dtype in fuzz_backends.DTYPES:
            scores = fuzz_backends.blocks(kind, (3, 4, 5), dtype, g)
            assert scores.shape == (3, 4, 5)
            assert torch.isfinite(scores).all()
    assert fuzz_backends.mixture(7, (4, 4), "float16", g).shape == (7, 4, 4)


@pytest.mark.parametrize(("shape", "n"), [((6, 4, 4), 2), ((6, 3, 4), 2), ((6, 4, 2), 3), ((6, 1, 4), 0)])
def test_counts_of_masks_are_those_of_the_oracle(shape, n):
    good = nmsolve.transposable_mask(torch.rand(shape), n, 4, backend="torch")
    assert fuzz_backends.infeasible(good, n) == 0
    other = torch.rand(shape) < 0.5
    for mask in other:
        try:
            oracles.check_block(mask, n)
        except AssertionError:
            assert fuzz_backends.infeasible(mask[None], n) == 1
        else:
            assert fuzz_backends.infeasible(mask[None], n) == 0


@pytest.mark.parametrize("fault", ["mask", "gap", "duals", "optimum", "negative prices"])
def test_faults_are_counted(monkeypatch, fault):
    solve = nmsolve.transposable_mask

    def faulty(scores, n, m, **options):
        found = solve(scores, n, m, **options)
        if fault == "mask":
            return replace(found, mask=torch.ones_like(found.mask))
        if fault == "gap":
            return replace(found, bound=found.bound * float("nan"))
        if fault == "duals":  # the bound says that they prove it
            return replace(found, bound=found.objective + 1e-3 * found.scale, row_duals=found.row_duals + 1)
        if fault == "negative prices":
            return replace(found, bound=found.bound + found.scale, col_duals=found.col_duals - 1)
        return solve(-scores, n, m, **options) if options["backend"] == "torch" else found

    monkeypatch.setattr(nmsolve, "transposable_mask", faulty)
    row = fuzz_backends.Row("torch", "float32", 4)
    shape = (20, 3, 4) if fault == "negative prices" else (20, 4, 4)
    row.add(torch.rand(shape), 2, 20, torch.Generator().manual_seed(0))
    found = row.finished()
    if fault == "optimum":
        assert found["worst_difference"] > 1e-3
    else:
        assert found["infeasible" if fault == "mask" else "beyond"] >= 40


def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    out = tmp_path / "found.csv"
    options = ["--parts", "torch", "--dtypes", "float16", "--share", "0.0001", "--out", str(out), "--sizes"]

    def run(*sizes: str) -> int:
        monkeypatch.setattr(sys, "argv", ["fuzz_backends", *options, *sizes])
        threads = torch.get_num_threads()
        assert fuzz_backends.main() == 0
        torch.set_num_threads(threads)
        return len(capsys.readouterr().out.splitlines())

    assert run("1", "2") == 2
    first = read_csv(out)
    assert run("1", "2", "3") == 1
    assert [row["m"] for row in read_csv(out)] == ["1", "2", "3"]
    assert read_csv(out)[:2] == first


def test_the_results_say_what_the_page_says():
    rows = read_csv(RESULTS / "fuzz_backends.csv")
    here = [row for row in rows if row["part"] == "torch"]
    assert sum(int(row["blocks"]) for row in here) >= 10_000_000
    for row in rows:
        assert (row["infeasible"], row["beyond"]) == ("0", "0"), row
        assert float(row["worst_difference"]) <= 1e-6, row
