"""Times of every kernel, beside what the cost table predicts and what the memory traffic alone takes.

Writes times.csv. ``predicted_ms`` is the bound of bench/results/kernel_costs.csv for the table's GPU of this
target, ``floor_ms`` the bytes that have to move, at the rate of the machine's own copies.
"""

from __future__ import annotations

import time
from typing import Any

from common import RESULTS, read_csv

from gpu_day import clock
from gpu_day.cases import CASES, Job, jobs
from gpu_day.compiled import compile_ahead
from gpu_day.setting import Setting, Sheet, machine_of

COLUMNS = (
    "kernel", "m", "dtype", "side", *clock.COLUMNS, "inputs", "moved_bytes", "floor_ms", "predicted_ms",
    "wrong", "first_call_s",
)  # fmt: skip
FOR_COMPILING = 0.55
"""Of the time."""


def compile_one(setting: Setting, key: tuple[str, int, str]) -> None:
    """In a process of its own: the job's kernels, on a small matrix."""
    job = job_of(key)
    job.prepare(setting, setting.warm_side, 0).call()
    setting.synchronize()


def key_of(job: Job) -> tuple[str, int, str]:
    return job.case.kernel, job.m, job.dtype


def job_of(key: tuple[str, int, str]) -> Job:
    kernel, m, dtype = key
    (case,) = [case for case in CASES if case.kernel == kernel]
    return Job(case, m, dtype)


def predictions(target: str) -> dict[tuple[str, str, str], float]:
    """(kernel, m, dtype) -> milliseconds."""
    return {
        (row["kernel"], row["m"], row["dtype"]): float(row["predicted_ms_8192"])
        for row in read_csv(RESULTS / "kernel_costs.csv")
        if row["shipped"] == "1" and row["target"] == target and row["predicted_ms_8192"]
    }


def run(setting: Setting) -> tuple[bool, str]:
    sheet = Sheet(setting, "times.csv", COLUMNS, 3)
    todo = [job for job in jobs(setting) if (job.case.kernel, job.m or "", job.dtype) not in sheet]
    start = time.monotonic()
    failures = compile_ahead(
        setting, compile_one, [key_of(job) for job in todo], FOR_COMPILING * setting.left
    )
    if setting.processes:
        print(f"compiled {len(failures)} of {len(todo)} in {time.monotonic() - start:.0f} s")
    bounds = predictions(setting.target)
    rate = machine_of(setting.out).get("bytes_per_second")
    # What was not compiled in time comes last.
    order = sorted(range(len(todo)), key=lambda k: k not in failures)
    for k in order:
        if setting.left < 3:
            break
        job = todo[k]
        row: dict[str, Any] = {"kernel": job.case.kernel, "m": job.m or "", "dtype": job.dtype}
        row |= {"side": setting.side, "predicted_ms": ""}
        if setting.side == 8192:
            row["predicted_ms"] = bounds.get((job.case.kernel, str(job.m or ""), job.dtype), "")
        try:
            if failures.get(k):
                raise RuntimeError(failures[k])
            row |= measure(setting, job, rate)
        except Exception as error:
            row["wrong"] = f"{type(error).__name__}: {error}"[:500]
        sheet.add(**row)
        print(describe(job, row), flush=True)
    rows = list(sheet)
    missing = sum((job.case.kernel, job.m or "", job.dtype) not in sheet for job in jobs(setting))
    wrong = [f"{row['kernel']} {row['m']} {row['dtype']}" for row in rows if row["wrong"]]
    line = f"{len(rows) - len(wrong)} timed, wrong: {'; '.join(wrong) or 'none'}; {missing} without time"
    return not missing, line


def measure(setting: Setting, job: Job, rate: float | None) -> dict[str, Any]:
    """Columns of a row; a result that is wrong has no times."""
    begin = time.monotonic()
    first = job.prepare(setting, setting.side, 1)
    result = first.call()
    setting.synchronize()
    seconds = time.monotonic() - begin
    found: dict[str, Any] = {
        "moved_bytes": first.moved,
        "first_call_s": seconds,
        "wrong": first.wrong(result),
    }
    if rate:
        found["floor_ms"] = 1e3 * first.moved / rate
    if found["wrong"]:
        return found
    del result
    number = clock.inputs_to_rotate(setting, first.moved)
    inputs = [first, *(job.prepare(setting, setting.side, 1 + k) for k in range(1, number))]
    return found | {"inputs": number} | clock.timed(setting, [one.call for one in inputs], 0.25).columns()


def describe(job: Job, row: dict[str, Any]) -> str:
    if row.get("wrong"):
        return f"{job.name}: {row['wrong']}"
    beside = [f"{row[key]:.4g} ms {what}" for key, what in BESIDE.items() if isinstance(row.get(key), float)]
    return f"{job.name}: {row['ms']:.4g} ms; {', '.join(beside)}"


BESIDE = {"predicted_ms": "predicted at least", "floor_ms": "for the memory alone"}
