"""A day with a GPU, without one: the frame by steps that are made up, the steps on the interpreter.

The whole of it, on the emulator of PTX and from a plain checkout, is rehearsed with ``-m slow``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from common import read_csv, write_whole
from gpu_day import cases, clock, launches, peers, publish, sanitizer, suite, tiles, times
from gpu_day.compiled import compile_ahead
from gpu_day.day import PART, Step, begin, read_day, run_day
from gpu_day.recorder import LOST
from gpu_day.setting import Setting, Sheet
from tables import columns
from tables import gpu as tables

from nmsolve.backends.triton import launch_table
from nmsolve.errors import NMSolveError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    """A rehearsal's, smaller still, with kernels interpreted."""
    here = Setting.here(tmp_path, 600, True)
    return dataclasses.replace(here, side=16, warm_side=16, sizes=(4,), sinkhorn_sizes=(4,))


# --- the frame ----------------------------------------------------------------------------------------------

SAYS = "print('found', {!r}); raise SystemExit({})"


def python(**code: str):
    """What runs steps that are made up: name -> Python."""
    return lambda step, seconds: [sys.executable, "-S", "-c", code[step.name]]


def steps(*names: str, least: float = 1) -> list[Step]:
    return [Step(name, 10, least) for name in names]


def test_a_step_that_fails_ends_itself_alone(tmp_path: Path) -> None:
    said: list[str] = []
    command = python(
        first=SAYS.format("one", 0),
        second="1 / 0",
        third=SAYS.format("three", PART),
        fourth=SAYS.format("four", 0),
    )
    states = run_day(
        tmp_path / "day", 60, command, steps=steps("first", "second", "third", "fourth"), say=said.append
    )
    assert states == {"first": "done", "second": "failed", "third": "part", "fourth": "done"}
    day = read_day(tmp_path / "day")
    assert day["steps"]["second"]["line"] == "exit code 1: ZeroDivisionError: division by zero"
    assert day["steps"]["fourth"]["line"] == "found four"
    assert "Traceback" in (tmp_path / "day" / "day.log").read_text()
    assert [line.partition(":")[0] for line in said] == ["first", "second", "third", "fourth"]


def test_a_second_run_goes_on_with_what_is_not_done(tmp_path: Path) -> None:
    out, ran = tmp_path / "day", tmp_path / "ran"
    code = "open({!r}, 'a').write({!r}); raise SystemExit({})"
    first = python(
        a=code.format(str(ran), "a", 0), b=code.format(str(ran), "b", PART), c=code.format(str(ran), "c", 1)
    )
    assert run_day(out, 60, first, steps=steps("a", "b", "c"), say=str) == {
        "a": "done",
        "b": "part",
        "c": "failed",
    }
    second = python(b=code.format(str(ran), "B", 0), c=code.format(str(ran), "C", 0))
    assert set(run_day(out, 60, second, steps=steps("a", "b", "c"), say=str).values()) == {"done"}
    assert ran.read_text() == "abcBC"


def test_without_time_a_step_is_skipped_and_what_it_had_found_stays(tmp_path: Path) -> None:
    out = tmp_path / "day"
    command = python(a=SAYS.format("half", PART), b=SAYS.format("", 0))
    order = [*steps("a"), *steps("b", least=1000)]
    assert run_day(out, 30, command, steps=order, say=str) == {"a": "part", "b": "skipped"}
    said: list[str] = []
    assert run_day(out, 0.5, command, steps=order, say=said.append) == {"a": "part", "b": "skipped"}
    assert read_day(out)["steps"]["a"]["line"] == "found half"
    assert said[0].startswith("a: skipped, 0 s left and 1 needed; before: found half")


def test_a_step_that_does_not_end_is_ended_with_all_its_children(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("gpu_day.day.GRACE", 0.5)
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid));"
        "print('half', flush=True); time.sleep(1000)"
    )
    start = time.monotonic()
    states = run_day(tmp_path / "day", 4, python(a=code), steps=steps("a"), say=str)
    assert states == {"a": "part"}
    assert time.monotonic() - start < 60
    assert read_day(tmp_path / "day")["steps"]["a"]["line"] == "ended by force: half"
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        # What init has not collected yet is no process any more.
        state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] if alive(child) else "Z"
        if state == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("a child of the step is still there")


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").exists()
    return False


def test_a_machine_without_a_gpu_ends_the_day(tmp_path: Path) -> None:
    refused = "print('gpu_day: error: torch sees no GPU'); raise SystemExit(2)"
    command = python(a=refused, b=SAYS.format("", 0))
    with pytest.raises(NMSolveError, match=r"^torch sees no GPU$"):
        run_day(tmp_path / "a", 30, command, steps=steps("a", "b"), say=str)
    assert list(read_day(tmp_path / "a")["steps"]) == ["a"]
    states = run_day(tmp_path / "b", 30, python(a="", b=refused, c=""), steps=steps("a", "b", "c"), say=str)
    assert states == {"a": "done", "b": "failed", "c": "done"}


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note").touch()
    with pytest.raises(NMSolveError, match="holds other files"):
        begin(tmp_path, False)
    with pytest.raises(NMSolveError, match="expected a folder"):
        begin(tmp_path / "note", False)
    (tmp_path / "day.json").write_text("{}")
    with pytest.raises(NMSolveError, match="not of a day"):
        begin(tmp_path, False)


def test_results_of_other_sources_are_not_gone_on_with(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "day"
    run_day(out, 30, python(a=SAYS.format("", 0)), steps=steps("a"), say=str)
    with pytest.raises(NMSolveError, match="holds a real day"):
        begin(out, True)
    monkeypatch.setattr("gpu_day.day.sources", lambda: "others")
    with pytest.raises(NMSolveError, match="other sources"):
        begin(out, False)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    for given in ([], ["--publish", str(tmp_path)], ["--out", str(tmp_path), "--seconds", "0"]):
        command = [sys.executable, str(ROOT / "bench"), "gpu_day", *given]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


# --- files --------------------------------------------------------------------------------------------------


def test_a_sheet_grows_and_is_read_again(setting: Setting) -> None:
    sheet = Sheet(setting, "some.csv", ("name", "m", "value"), 2)
    sheet.add(name="exact, edge", m=4, value=1.5)
    sheet.add(name="exact", m=4)
    assert ("exact", 4) in sheet
    again = Sheet(setting, "some.csv", ("name", "m", "value"), 2)
    assert ("exact, edge", "4") in again
    again.add(name="exact", m=4, value=7)
    rows = read_csv(setting.out / "some.csv")
    assert [(row["name"], row["value"]) for row in rows] == [("exact, edge", "1.5"), ("exact", "7")]
    assert {"gpu", "machine", "software", "commit", "date"} < rows[0].keys()
    with pytest.raises(ValueError, match="no columns"):
        sheet.add(name="", m=1, other=2)


def test_rows_of_another_gpu_are_refused(setting: Setting, monkeypatch) -> None:
    Sheet(setting, "some.csv", ("name",), 1).add(name="a")
    monkeypatch.setattr("gpu_day.setting.gpu_name", lambda setting: "another")
    with pytest.raises(NMSolveError, match="has rows of emulator of PTX, this is another"):
        Sheet(setting, "some.csv", ("name",), 1)


# --- the suite ----------------------------------------------------------------------------------------------

TESTS = f"""
import os, signal, pytest

def test_good(): pass
def test_wrong(): assert 1 == 2, "no"
def test_left_out(): pytest.skip("none here")
def test_crash(): os.kill(os.getpid(), signal.SIGSEGV)
def test_lost(): os._exit({LOST})
@pytest.mark.parametrize("k", range(5))
def test_many(k): pass
"""


def test_processes_share_tests_and_survive_crashes(setting: Setting, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        str(tmp_path / "pytest.ini"),
        "--rootdir",
        str(tmp_path),
    ]
    command += ["-p", "no:cacheprovider", "-p", "gpu_day.recorder", str(tmp_path / "test_some.py")]
    monkeypatch.setattr(suite, "command_of", lambda *more: command)
    done, line = suite.run(dataclasses.replace(setting, processes=2))
    rows = {row["name"].partition("::")[2]: row for row in read_csv(tmp_path / "checks.csv")}
    found = {name: row["outcome"] for name, row in rows.items() if "many" not in name}
    expected = {"test_good": "passed", "test_wrong": "failed", "test_left_out": "skipped"}
    assert found == expected | {"test_crash": "unfinished", "test_lost": "unfinished"}
    assert "AssertionError: no" in rows["test_wrong"]["text"]
    assert sum(row["outcome"] == "passed" for row in rows.values()) == 6
    assert done
    assert line == "1 failed, 6 passed, 1 skipped, 2 unfinished; 0 of 10 not run"


@pytest.mark.parametrize(
    ("code", "text", "outcome"),
    [
        (0, "4 passed\n========= ERROR SUMMARY: 0 errors", "passed"),
        (99, "4 passed\n========= ERROR SUMMARY: 3 errors", "3 errors"),
        (99, "1 passed\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "1 errors"),
        (0, "4 passed", "failed, exit code 0"),
        (1, "1 failed\n========= ERROR SUMMARY: 0 errors", "failed, exit code 1"),
    ],
)
def test_verdict_of_the_sanitizer(code: int, text: str, outcome: str) -> None:
    assert sanitizer.verdict(code, text) == outcome


# --- times, peers, launches, tiles --------------------------------------------------------------------------


def test_every_row_of_the_cost_table_is_timed() -> None:
    tabled = {row["kernel"] for row in read_csv(ROOT / "bench" / "results" / "kernel_costs.csv")}
    assert {case.kernel for case in cases.CASES} == tabled
    chosen = dataclasses.replace(
        Setting.here(Path(), 1, True), sizes=(4, 8, 16, 32, 64), sinkhorn_sizes=(4, 8, 16, 32, 64, 128)
    )
    keys = [(job.case.kernel, str(job.m or ""), job.dtype) for job in cases.jobs(chosen)]
    assert len(set(keys)) == len(keys)
    assert times.predictions("sm_90").keys() <= set(keys)


def test_every_case_is_right_on_the_interpreter(setting: Setting, monkeypatch) -> None:
    """The smallest blocks in float32, each solved a few times; what is timed is made up."""
    few = [job for job in cases.jobs(setting) if job.dtype == "float32" or job.case.kernel == "nm"]
    monkeypatch.setattr(times, "jobs", lambda setting: iter(few))
    monkeypatch.setattr(clock, "timed", lambda setting, calls, seconds: clock.summary([2.0, 1.0, 3.0], 0.1))
    done, line = times.run(setting)
    assert done
    rows = read_csv(setting.out / "times.csv")
    assert [(row["kernel"], row["wrong"]) for row in rows] == [(job.case.kernel, "") for job in few], line
    assert {(row["ms"], row["ms_first_quartile"], row["predicted_ms"]) for row in rows} == {("2", "1.5", "")}
    by = {(row["kernel"], row["m"], row["dtype"]): int(row["moved_bytes"]) for row in rows}
    assert by["exact, exhaustive", "4", "float32"] == 16 * 16 * 5
    assert by["nm", "4", "bfloat16"] == 16 * 16 * 3
    assert by["permute_columns", "", "float32"] == 16 * 16 * 8
    before = (setting.out / "times.csv").read_bytes()
    times.run(setting)
    assert (setting.out / "times.csv").read_bytes() == before, "what is there is not timed again"


def test_times_are_medians(setting: Setting) -> None:
    called: list[int] = []
    found = clock.timed(setting, [lambda: called.append(1), lambda: called.append(2)], 1.0)
    assert called == [1, 2, 1, 1, 2], "each once, one to know how long it takes, and the repeats in turn"
    assert 0 <= found.first_quartile <= found.median <= found.third_quartile


def test_a_wrong_result_is_not_timed(setting: Setting, monkeypatch) -> None:
    prepared = {case.kernel: case.prepare(setting, 4, torch.float32, 16, 0) for case in cases.CASES}
    for kernel in ("exact, exhaustive", "greedy", "nm"):
        mask = prepared[kernel].call().clone()
        assert prepared[kernel].wrong(mask) == ""
        mask.view(-1)[0] ^= True
        assert prepared[kernel].wrong(mask) != "", kernel
    worst = cases.mask_case(lambda scores, pattern, setting: cases.gpu.exact(-scores, pattern))
    wrong = worst(setting, 4, torch.float32, 16, 0)
    assert "less than the optimum" in wrong.wrong(wrong.call())
    for kernel in ("sinkhorn, forward", "sinkhorn, backward", "permute_columns"):
        result = prepared[kernel].call()
        tampered = [result[0] + 1, *result[1:]] if isinstance(result, tuple) else result + 1
        assert "differ" in prepared[kernel].wrong(tampered), kernel
    columns_of_rows = prepared["assignment"].call()
    assert prepared["assignment"].wrong((columns_of_rows[0] * 0,)) == "columns are no permutation"
    monkeypatch.setattr(cases, "CASES", (cases.Case("exact", lambda setting: (4,), worst),))
    assert "wrong: exact 4 float32; exact 4 bfloat16" in times.run(setting)[1]
    assert [row["ms"] for row in read_csv(setting.out / "times.csv")] == ["", ""]


def test_kernels_are_compiled_in_other_processes(setting: Setting) -> None:
    jobs = [("nm", 4, "float32"), ("none", 4, "float32")]
    assert compile_ahead(setting, times.compile_one, jobs, 100) == {}, "a rehearsal compiles when it runs"
    found = compile_ahead(dataclasses.replace(setting, processes=1), times.compile_one, jobs, 500)
    assert found.keys() == {0, 1}
    assert found[0] == ""
    assert found[1].startswith("ValueError")


@pytest.mark.slow
def test_a_compiler_that_crashes_takes_only_its_own_job(
    setting: Setting, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "some_work.py").write_text(
        "import os, time\n"
        "def work(setting, job):\n"
        "    if job == 'crash': os.abort()\n"
        "    if job == 'hang': time.sleep(1000)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("some_work").work
    one = dataclasses.replace(setting, processes=1)
    assert compile_ahead(one, work, ["", "", "crash"], 300) == {0: "", 1: ""}
    start = time.monotonic()
    assert compile_ahead(one, work, ["", "hang"], 30) == {0: ""}
    assert time.monotonic() - start < 120


def test_quartiles() -> None:
    found = clock.summary([5.0, 1.0, 2.0, 4.0, 3.0], 0.1)
    assert found == (3.0, 2.0, 4.0, 0.1, 5)


def test_peers_are_compared_with_the_bound(setting: Setting, monkeypatch) -> None:
    monkeypatch.setattr(peers, "BACKEND", "torch")
    done, line = peers.run(setting)
    assert done, line
    rows = {(row["problem"], row["peer"], row["dtype"]): row for row in read_csv(setting.out / "peers.csv")}
    assert abs(float(rows["mask", "nmsolve exact", "float32"]["loss"])) < 1e-6
    assert abs(float(rows["mask", "all 90 patterns", "float32"]["loss"])) < 1e-6
    assert float(rows["mask", "2-approximation", "float32"]["loss"]) > 1e-3
    assert float(rows["sinkhorn", "nmsolve", "float32"]["loss"]) < 1e-5
    assert {"2-approximation", "TSENOR", "TSENOR without local search"} < {peer for _, peer, _ in rows}


def test_what_all_peers_start_from_may_fail(setting: Setting, monkeypatch) -> None:
    monkeypatch.setattr(peers, "BACKEND", "none")
    done, line = peers.run(setting)
    assert not done
    assert "backend: expected" in line


def test_launches(setting: Setting) -> None:
    done, line = launches.run(setting)
    assert done
    rows = read_csv(setting.out / "launches.csv")
    assert {row["way"] for row in rows} == {"one by one", "one launch", "eager", "replayed"}
    assert {row["same"] for row in rows} == {"yes"}, line


def test_ways_that_differ_are_told(setting: Setting, monkeypatch) -> None:
    calls = {"one": lambda: [torch.ones(2)], "other": lambda: [torch.zeros(2)]}
    ways = launches.Ways("group", 2, 4, (1, 1, 2), calls, lambda seed: None)
    monkeypatch.setattr(launches, "every", lambda setting: [lambda: ways, lambda: 1 / 0])
    done, line = launches.run(setting)
    assert done
    assert "not the same: group 2:4; group 2:4; capture or allocation" in line


def test_tiles_are_a_launch_table(setting: Setting) -> None:
    assert set(tiles.ORDER) == {(kernel, m) for kernel in launch_table.KERNELS for m in launch_table.SIZES}
    done, line = tiles.run(setting)
    assert done, line
    assert json.loads((setting.out / "tiles.json").read_text())["tried"] == ["exact 4"]
    launch_table.load(setting.out / "tiles.json")
    assert tiles.run(setting)[1].startswith("1 tried")


# --- what documents say -------------------------------------------------------------------------------------


def a_day(out: Path, *, rehearsal: bool = False, outcome: str = "passed", gpu: str = "H100") -> Path:
    """Written as a day writes it, with a time of one kernel."""
    out.mkdir()
    day = {"format": "nmsolve-gpu-day", "rehearsal": rehearsal, "sources": "", "steps": {}}
    (out / "day.json").write_text(json.dumps(day))
    source = {
        "gpu": gpu,
        "target": "sm_90",
        "clock": "events",
        "machine": gpu,
        "software": "torch",
        "commit": "c",
    }
    source["date"] = "2026-01-01"
    write_whole(out / "checks.csv", [{"check": "suite", "name": "a", "outcome": outcome} | source])
    row = {"kernel": "exact", "m": 16, "dtype": "float32", "ms": 1.25, "ms_first_quartile": 1.2}
    write_whole(out / "times.csv", [row | {"ms_third_quartile": 1.3} | source])
    return out


def test_only_real_days_whose_tests_pass_are_published(tmp_path: Path) -> None:
    with pytest.raises(NMSolveError, match="holds no day"):
        publish.publish(tmp_path)
    for name, options, message in (
        ("a", {"rehearsal": True}, "is a rehearsal"),
        ("b", {"outcome": "skipped"}, "no test has passed"),
        ("c", {"outcome": "failed"}, "no test has passed"),
    ):
        with pytest.raises(NMSolveError, match=message):
            publish.publish(a_day(tmp_path / name, **options), tmp_path / "results")
    assert not (tmp_path / "results").exists()
    out = a_day(tmp_path / "d")
    rows = read_csv(out / "checks.csv")
    write_whole(out / "checks.csv", [*rows, {**rows[0], "name": "b", "outcome": "unfinished"}])
    with pytest.raises(NMSolveError, match=r"1 checks of .* did not pass, the first b"):
        publish.publish(out, tmp_path / "results")


def test_tables_say_what_was_measured(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    costs = (ROOT / "bench" / "results" / "kernel_costs.csv").read_bytes()
    (folder / "kernel_costs.csv").write_bytes(costs)
    monkeypatch.setattr(columns, "RESULTS", folder)
    assert tables.status() == "No kernel has been run or timed on a GPU yet."
    assert "measured" not in tables.times()
    assert tables.peers() == tables.launches() == tables.checks() == tables.NOTHING
    for k in (1, 2):  # the second day takes the first's place
        publish.publish(a_day(tmp_path / str(k)), folder / "gpu")
    publish.publish(a_day(tmp_path / "3", gpu="H200"), folder / "gpu")
    assert "H100 (1 tests passed, 1 configurations timed); H200" in tables.status()
    shown = tables.times()
    assert shown.count("measured, 1.25 (1.2 to 1.3)") == 2
    lines = [line for line in shown.splitlines() if line.startswith("| exact | 16 | float32")]
    assert len(lines) == 1
    assert "predicted" not in lines[0]
    assert all("predicted" in line for line in shown.splitlines() if line.startswith("| nm |"))
    assert "| H200 | suite | 1 passed |" in tables.checks()


# --- from a plain checkout ----------------------------------------------------------------------------------

ALONE = (
    "torch", "triton", "numpy", "pytest", "hypothesis", "numba", "safetensors", "tqdm",
    "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "typing_extensions",
    "llvmlite", "setuptools", "pluggy", "iniconfig", "packaging", "pygments", "attrs", "sortedcontainers",
)  # fmt: skip
"""The packages that a machine with a GPU may be trusted to have, and what they require."""


UNWANTED = ("PYTHONPATH", "TRITON_INTERPRET")


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has these packages alone, nmsolve not among them."""
    folder = tmp_path_factory.mktemp("alone")
    packages = folder / "packages"
    packages.mkdir()
    names = packages_distributions()
    for name in ALONE:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        tops = [
            top
            for top, owners in names.items()
            if name in [owner.lower().replace("-", "_") for owner in owners]
        ]
        for top in {*tops, *(file.parts[0] for file in found.files or () if len(file.parts) > 1)}:
            place = Path(str(found.locate_file(top)))
            for path in (place, place.with_suffix(".py")):
                if path.exists() and not (packages / path.name).exists() and top not in ("..", "__pycache__"):
                    (packages / path.name).symlink_to(path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return folder / "venv" / "bin" / "python"


COLLECT = """
import sys
sys.path.insert(0, "bench")
import gpu_day
import importlib, pytest
for name in ("clock", "machine", "suite", "sanitizer", "times", "peers", "launches", "tiles", "publish"):
    importlib.import_module(f"gpu_day.{name}")
import nmsolve.kernels.exact
print(nmsolve.kernels.exact.__file__)
for absent in ("scipy", "ortools", "matplotlib", "transformers", "xdist"):
    assert importlib.util.find_spec(absent) is None, absent
options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu"]
sys.exit(pytest.main([*options, "tests/kernels/test_gpu.py"]))
"""


def test_a_plain_checkout_needs_no_installation(alone: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    command = [str(alone), "-c", COLLECT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert str(ROOT / "kernels" / "exact.py") in done.stdout
    assert "tests collected" in done.stdout


@pytest.mark.slow
def test_the_rehearsal_from_a_plain_checkout(alone: Path, tmp_path: Path) -> None:
    """Twice: the second run finds all done."""
    environment = {name: value for name, value in os.environ.items() if name not in UNWANTED}
    command = [str(alone), str(ROOT / "bench"), "gpu_day", "--out", str(tmp_path / "day"), "--rehearse"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--seconds", "6000"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        log = (tmp_path / "day" / "day.log").read_text(encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr + log[-8000:]
    assert done.stdout.count("done before") == 7
    files = {path.name for path in (tmp_path / "day").iterdir()}
    assert files == {
        "checks.csv", "day.json", "day.log", "launches.csv", "machine.json", "peers.csv", "tiles.json",
        "times.csv",
    }  # fmt: skip
    for name in ("checks.csv", "times.csv", "peers.csv", "launches.csv"):
        assert {row["gpu"] for row in read_csv(tmp_path / "day" / name)} == {"emulator of PTX"}
