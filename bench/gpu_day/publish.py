"""Takes a day's results over to the results that the documents' tables are made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common import RESULTS, read_csv, write_whole

from gpu_day.day import read_day
from nmsolve.errors import NMSolveError

FILES = ("checks.csv", "times.csv", "peers.csv", "launches.csv")
DAYS = RESULTS / "gpu"


def publish(out: Path, folder: Path = DAYS) -> list[Path]:
    """Rows of a day, in place of those that there are of its GPU; the files that were written.

    Raises
    ------
    NMSolveError
        If it is no day's folder or a rehearsal's, or a test or a sanitizer failed: times are those of code
        whose tests pass.
    """
    day = read_day(out)
    if not day:
        raise NMSolveError(f"publish: {out} holds no day with a GPU")
    if day["rehearsal"]:
        raise NMSolveError(f"publish: {out} is a rehearsal, which measured nothing")
    found = {name: read_csv(out / name) for name in FILES if (out / name).exists()}
    checks = found.get("checks.csv", [])
    if not any(row["check"] == "suite" and row["outcome"] == "passed" for row in checks):
        raise NMSolveError(f"publish: no test has passed in {out}: the suite comes first")
    failed = [row["name"] for row in checks if row["outcome"] not in ("passed", "skipped")]
    if failed:
        raise NMSolveError(f"publish: {len(failed)} checks of {out} did not pass, the first {failed[0]}")
    written = []
    for name, rows in found.items():
        path = folder / name
        gpus = {row["gpu"] for row in rows}
        kept = [row for row in (read_csv(path) if path.exists() else []) if row["gpu"] not in gpus]
        write_whole(path, aligned([*kept, *rows]))
        written.append(path)
        print(f"wrote {path} ({len(rows)} rows of {', '.join(sorted(gpus))})")
    return written


def aligned(rows: list[dict[str, str]]) -> list[Mapping[str, object]]:
    """With the same columns, in their order: an older day may not have had them all."""
    columns = dict.fromkeys(key for row in reversed(rows) for key in row)
    return [{key: row.get(key, "") for key in columns} for row in rows]
