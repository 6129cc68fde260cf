"""``nmsolve bench``: timings, launch tables in files, and the search for tiles under the interpreter."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nmsolve
from nmsolve import NMSolveError
from nmsolve.backends.triton import launch_table
from nmsolve.cli import main
from nmsolve.pattern import NMPattern
from nmsolve.timing import methods, tiles

pytest.importorskip("triton")

from nmsolve.kernels import _launch

from nmsolve.backends.triton import masks as gpu


def bench(*options: str) -> int:
    return main(["bench", "--backend", "torch", "--device", "cpu", "--repeats", "1", *options])


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("nmsolve: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    return captured.err


def test_every_method_is_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.csv"
    assert bench("--pattern", "2:4", "--pattern", "4:8", "--size", "16x32", "--out", str(out)) == 0
    rows = list(csv.DictReader(out.open()))
    assert [(row["pattern"], row["method"]) for row in rows] == [
        (pattern, method) for pattern in ("2:4", "4:8") for method in methods.TIMED
    ]
    for row in rows:
        assert (row["rows"], row["cols"], row["backend"], row["dtype"]) == ("16", "32", "torch", "float32")
        seconds = float(row["milliseconds"]) / 1e3
        assert float(row["least"]) <= float(row["milliseconds"]) <= float(row["most"])
        assert float(row["gigaweights_per_second"]) == pytest.approx(512 / seconds / 1e9)
        assert float(row["microseconds_per_block"]) == pytest.approx(
            seconds * 1e6 / (512 / int(row["pattern"][2:]) ** 2)
        )
        assert (row["gap"] == "") == (row["method"] == "ordinary")
    assert {float(row["gap"]) < 1e-6 for row in rows if row["method"] == "exact"} == {True}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows)
    assert printed[0].split()[:2] == ["pattern", "method"]


def test_json_has_the_same_rows(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    assert bench("--pattern", "2:4", "--size", "8", "--method", "greedy", "--out", str(out)) == 0
    (row,) = json.loads(out.read_text())
    assert (row["method"], row["rows"]) == ("greedy", 8)
    assert row["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert row["gap"] >= 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pattern", "5:4"], "--pattern: "),
        (["--size", "big"], "--size: expected rows and columns"),
        (["--size", "0"], "--size: "),
        (["--repeats", "0"], "--repeats: expected at least 1, got 0"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--out", "speed.txt"], "--out: expected a name that ends in .csv or .json"),
        (["--out", "nowhere/speed.csv"], "--out: the folder"),
        (["--tune", "--pattern", "2:4"], "--pattern: not with --tune"),
    ],
)
def test_mistakes_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(*options) == 2
    assert message in one_error(capsys)


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.csv"
    out.write_text("mine")
    assert bench("--size", "8", "--out", str(out)) == 2
    assert "--overwrite replaces it" in one_error(capsys)
    assert out.read_text() == "mine"


def test_tuning_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--tune", "--device", "cpu"]) == 2
    assert "--tune: needs a GPU" in one_error(capsys)


# --- launch tables ------------------------------------------------------------------------------------------


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    entries = {("exact", 16): (16, 4, 4, 2, 1), ("dykstra", 8): (8, 4, 4, 8, 1)}
    path = tmp_path / "new" / "table.json"
    launch_table.save(path, entries, {"gpu": "any"})
    assert launch_table.load(path) == entries
    assert json.loads(path.read_text())["gpu"] == "any"
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("kernel", "entry", "message"),
    [
        ("other", [16, 4, 4, 2, 1], "expected kernels"),
        ("exact", [16, 4, 4, 2], "five powers of two"),
        ("exact", [16, 4, 4, 3, 1], "five powers of two"),
        ("exact", [16, 4, 4, "2", 1], "five powers of two"),
        ("exact", [128, 8, 8, 1, 8], "expected a size"),
        ("exact", [4, 8, 4, 32, 1], "rows_in up to 4"),
        ("exact", [16, 4, 2, 1, 1], "cols_in of 4 to 16"),
        ("exact", [16, 4, 4, 4, 1], "fill 1 warps = 32 lanes, got 64"),
    ],
)
def test_tables_that_no_kernel_can_run_are_refused(kernel: str, entry: list[object], message: str) -> None:
    with pytest.raises(NMSolveError, match=message):
        launch_table.check_entry(kernel, entry)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "nmsolve-launch-table"}'])
def test_files_that_are_no_tables_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(NMSolveError, match="launch table"):
        launch_table.load(path)
    with pytest.raises(NMSolveError, match="cannot read"):
        launch_table.load(tmp_path / "none.json")


def test_the_environment_chooses_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    launch_table.save(path, {("exact", 16): (16, 4, 4, 2, 1)}, {})
    code = (
        "from nmsolve.backends.triton import masks as gpu; from nmsolve.kernels import _launch;"
        "print(tuple(_launch.tile('exact', 12)), _launch.tile('exact', 8) == _launch.tabled('exact', 8))"
    )
    environment = os.environ | {launch_table.ENVIRONMENT: str(path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "(16, 4, 4, 2, 1) True", done.stderr


def test_the_shipped_table_would_be_accepted() -> None:
    for kernel in launch_table.KERNELS:
        for size in launch_table.SIZES:
            assert launch_table.check_entry(kernel, gpu.shipped_tile(kernel, size))[0] == size
            assert gpu.shipped_tile(kernel, size) == _launch.tile(kernel, size)


# --- the search ---------------------------------------------------------------------------------------------


def test_candidates_are_tiles_that_the_kernels_can_run() -> None:
    for size in launch_table.SIZES:
        found = list(tiles.candidates("exact", size))
        assert len(found) == len(set(found)) > 1


def test_the_fastest_sound_tile_wins() -> None:
    """Under the interpreter, with times that are made up: the tile under test is known to the timer."""
    used: list[tuple[int, ...]] = []
    faster = {(8, 4, 8, 16, 1): 0.5, (8, 8, 8, 32, 1): 0.4}
    messages: list[str] = []

    def timer(work: object, device: torch.device, repeats: int) -> list[float]:
        entry = tuple(_launch.tile("exact", 8))
        used.append(entry)
        return [faster.get(entry, 1.0)] * repeats

    won = tiles.tune(
        gpu,
        sizes=[8],
        kernels=["exact"],
        side=16,
        device="cpu",
        repeats=3,
        choose=lambda kernel, size: [(8, 4, 4, 8, 1), (8, 4, 8, 16, 1), (8, 8, 8, 32, 1)],
        timer=timer,
        progress=messages.append,
    )
    assert won == {("exact", 8): (8, 8, 8, 32, 1)}
    assert used[0] == tuple(gpu.shipped_tile("exact", 8))
    assert _launch.tile("exact", 8) == gpu.shipped_tile("exact", 8), "the table is as before"
    assert "0.400" in messages[-1] or "400.000 ms" in messages[-1]


@pytest.mark.parametrize(
    ("kernel", "method"), [("exact", "exact"), ("dykstra", "greedy"), ("tsenor", "tsenor")]
)
def test_a_tile_whose_masks_are_worse_does_not_win(
    kernel: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = (8, 4, 4, 8, 1)
    solve = nmsolve.transposable_mask

    def tampered(scores: torch.Tensor, n: int, m: int, **options: object) -> object:
        if options.get("method") == method and tuple(_launch.tile(kernel, 8)) == wrong:
            return solve(-scores, n, m, **options)  # type: ignore[call-overload]
        return solve(scores, n, m, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(nmsolve, "transposable_mask", tampered)
    messages: list[str] = []
    won = tiles.tune(
        gpu,
        sizes=[8],
        kernels=[kernel],
        side=16,
        device="cpu",
        repeats=1,
        choose=lambda kernel, size: [wrong],
        timer=lambda work, device, repeats: [0.1 if tuple(_launch.tile(kernel, 8)) == wrong else 1.0],
        progress=messages.append,
    )
    assert won == {}
    assert "passed over" in messages[0]


@pytest.mark.parametrize("kernel", ["exact", "exact_edge", "dykstra", "tsenor"])
def test_every_kernel_can_be_tuned(kernel: str) -> None:
    """Real candidates on the interpreter; the smallest time is that of the tile that is tried last."""
    tried: list[launch_table.Entry] = []

    def timer(work: object, device: torch.device, repeats: int) -> list[float]:
        tried.append(tuple(_launch.tile(kernel, 4)))  # type: ignore[arg-type]
        return [1.0 / len(tried)]

    won = tiles.tune(
        gpu,
        sizes=[4],
        kernels=[kernel],
        side=8,
        device="cpu",
        repeats=1,
        choose=lambda kernel, size: [(4, 2, 4, 16, 1), (4, 4, 4, 64, 2)],
        timer=timer,
        progress=lambda message: None,
    )
    assert tried == [gpu.shipped_tile(kernel, 4), (4, 2, 4, 16, 1), (4, 4, 4, 64, 2)]
    assert won == {(kernel, 4): (4, 4, 4, 64, 2)}


def test_seconds_are_those_of_each_repeat() -> None:
    calls: list[int] = []
    taken = methods.seconds_of(lambda: calls.append(1), torch.device("cpu"), 3, warm_up=2)
    assert len(taken) == 3
    assert len(calls) == 5
    assert all(second >= 0 for second in taken)


def test_patterns_that_a_backend_cannot_run_are_refused_first() -> None:
    with pytest.raises(NMSolveError, match="do not fit"):
        next(methods.measure([NMPattern(2, 4), NMPattern(64, 128)], [(128, 128)], backend="triton"))
