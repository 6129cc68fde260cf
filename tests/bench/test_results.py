"""What the committed results say: exact is on the Pareto front, and extrapolation is what it claims to be."""

# ruff: noqa: E402 (bench/ goes on the path before what lies there is imported)

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
from common import RESULTS, read_csv
from pareto import EXACT, dominating


@pytest.fixture(scope="module")
def peers() -> list[dict[str, str]]:
    return read_csv(RESULTS / "peers.csv")


def test_no_peer_is_as_fast_and_as_accurate_as_exact(peers):
    assert dominating(peers) == []


@pytest.mark.parametrize(
    ("seconds", "error", "dominates"), [(0.5, 0.0, 1), (1.0, 1e-12, 1), (0.5, 0.01, 0), (1.1, 0.0, 0)]
)
def test_dominating(seconds, error, dominates):
    case = {"n": 8, "m": 16, "size": 512, "distribution": "normal"}
    exact = {**case, "peer": EXACT, "seconds_per_block": 1.0, "mean_relative_error": 0.0}
    peer = {**case, "peer": "other", "seconds_per_block": seconds, "mean_relative_error": error}
    assert len(dominating([exact, peer])) == dominates
    assert dominating([exact, {**peer, "peer": "nmsolve greedy (cpu)"}]) == []
    with pytest.raises(ValueError, match="no row of"):
        dominating([peer])


def test_every_size_and_pattern_is_there(peers):
    sizes = {"512", "2048", "8192"}
    patterns = {("2", "4"), ("4", "8"), ("8", "16"), ("16", "32"), ("1", "16")}
    found = {(row["size"], row["n"], row["m"]) for row in peers if row["peer"] == EXACT}
    assert found == {(size, *pattern) for size in sizes for pattern in patterns}
    everywhere = {row["peer"] for row in peers if (row["n"], row["m"]) == ("8", "16")}
    for case in found:
        here = {row["peer"] for row in peers if (row["size"], row["n"], row["m"]) == case}
        assert everywhere <= here, case


def test_samples_are_extrapolated_openly(peers):
    for row in peers:
        blocks = int(row["size"]) ** 2 // int(row["m"]) ** 2
        assert int(row["extrapolated"]) == (int(row["sampled_blocks"]) < blocks), row
        assert float(row["seconds"]) == pytest.approx(float(row["seconds_per_block"]) * blocks, rel=1e-3), row


def test_exact_is_exact_in_every_case(peers):
    for row in peers:
        if row["peer"].startswith("nmsolve exact"):
            assert abs(float(row["worst_relative_error"])) < 1e-9, row
            assert float(row["lines_short"]) == 0, row
        if row["peer"].startswith("nmsolve"):
            assert float(row["lines_short"]) == 0, row


def test_warm_starts_pay_where_the_page_says_so():
    rows = [row for row in read_csv(RESULTS / "warm_start.csv") if row["backend"] == "cpu"]
    assert {row["pattern"] for row in rows} == {"4:8", "8:16", "16:32"}
    for row in rows:
        assert float(row["warm_certificate_over_cold_mask"]) > 0.9, row
        takes, change = float(row["certificate_warm_over_cold"]), float(row["change"])
        least, most = {1e-4: (0.7, 0.9), 1e-3: (0.9, 1.15), 1e-2: (1.4, 3), 1e-1: (4, 8)}[change]
        assert least < takes < most, row


def test_sinkhorn_is_compared_with_loops_of_both_forms():
    rows = read_csv(RESULTS / "sinkhorn.csv")
    for m, batch, iterations in {(row["m"], row["batch"], row["iterations"]) for row in rows}:
        ours, log_domain, permllm = (
            next(row for row in rows if (row["m"], row["batch"], row["method"]) == (m, batch, name))
            for name in ("nmsolve, cpu", "PyTorch loop, log domain", "PyTorch loop, PermLLM's form")
        )
        assert 10 * int(ours["held_bytes"]) < int(permllm["held_bytes"])
        assert 2 * float(permllm["forward_ms"]) < float(log_domain["forward_ms"])
        assert float(ours["both_ms"]) < float(log_domain["both_ms"])
        for time in ("forward_ms", "kept_ms", "both_ms"):
            assert float(permllm[time]) / float(ours[time]) > 1, (m, batch, iterations, time)
        if int(m) >= 64 and iterations == "20":
            assert float(permllm["forward_ms"]) / float(ours["forward_ms"]) > 1.8


def test_every_sweep_is_there():
    rows = read_csv(RESULTS / "scaling.csv")
    sweeps = {row["sweep"] for row in rows}
    assert sweeps == {"weights", "m", "n", "ties", "student_t", "lognormal", "dtype", "real"}


def test_pictures_are_drawn_from_the_results(tmp_path):
    plots = pytest.importorskip("plots", exc_type=ImportError)
    plots.peers(read_csv(RESULTS / "peers.csv"), tmp_path / "peers.png")
    plots.growth(read_csv(RESULTS / "scaling.csv"), tmp_path / "growth.png")
    for file in tmp_path.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    for file in (ROOT / "docs").glob("benchmarks_*.png"):
        assert file.stat().st_size < 150_000, file
