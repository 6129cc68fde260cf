"""What the benchmark scripts share: score distributions, timing, and result files with their provenance."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmsolve.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))


# --- scores -------------------------------------------------------------------------------------------------


def _student_t(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """|t| with 1.5 degrees of freedom: a normal over the root of a chi-square's mean."""
    chi2 = 2 * torch.from_numpy(np.random.default_rng(g.initial_seed()).standard_gamma(0.75, shape)).float()
    return (torch.randn(shape, generator=g) / (chi2 / 1.5).sqrt().clamp_min(1e-12)).abs()


def _wanda(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """|w| times a lognormal norm per input channel, as Wanda scores are."""
    return torch.randn(shape, generator=g).abs() * torch.randn((*shape[:-2], 1, shape[-1]), generator=g).exp()


def _outliers(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    scores = torch.randn(shape, generator=g).abs()
    scores[..., :1] *= 50
    scores[..., -1:, :] *= 300
    return scores


DISTRIBUTIONS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": lambda shape, g: torch.randn(shape, generator=g).abs(),
    "uniform": lambda shape, g: torch.rand(shape, generator=g),
    "signed": lambda shape, g: torch.randn(shape, generator=g),
    "negative": lambda shape, g: -torch.randn(shape, generator=g).abs() - 1,
    "student_t": _student_t,
    "lognormal": lambda shape, g: torch.randn(shape, generator=g).mul(3).exp(),
    "wanda": _wanda,
    "outliers": _outliers,
    "bfloat16": lambda shape, g: torch.randn(shape, generator=g).abs().bfloat16().float(),
    "ties": lambda shape, g: torch.randint(0, 8, shape, generator=g).float(),
    "constant": lambda shape, g: torch.full(shape, 0.37),
    "zero": lambda shape, g: torch.zeros(shape),
    "tiny": lambda shape, g: torch.randn(shape, generator=g).abs() * 1e-30,
    "huge": lambda shape, g: torch.randn(shape, generator=g).abs() * 1e30,
}


def scores(distribution: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """float32 scores, the same for the same arguments."""
    return DISTRIBUTIONS[distribution](tuple(shape), torch.Generator().manual_seed(seed))


# --- time ---------------------------------------------------------------------------------------------------


class Seconds(NamedTuple):
    """Median, least and most of the repeats, in seconds."""

    median: float
    least: float
    most: float
    repeats: int


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Time contenders in turn, round by round, so that whatever else the machine does meets all of them.

    ``time.process_time`` as the clock counts this process's work alone, where others wait for the same cores.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-warm_up, repeats):
        for name, contender in contenders.items():
            start = clock()
            contender()
            if turn >= 0:
                taken[name].append(clock() - start)
    return {name: Seconds(statistics.median(t), min(t), max(t), len(t)) for name, t in taken.items()}


# --- results ------------------------------------------------------------------------------------------------


def cpu_model() -> str:
    """The processor's name as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def commit() -> str:
    """The commit the sources are at; "+" if tracked files other than results and documents differ from it."""
    git = ("git", "-C", str(ROOT))
    changed = (
        *git,
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        "nmsolve",
        "kernels",
        "bench/*.py",
    )
    try:
        head = subprocess.run(
            (*git, "rev-parse", "--short=10", "HEAD"), capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(changed, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def provenance(*packages: str) -> dict[str, str]:
    """The columns that every result file ends with."""
    names = ("torch", "numba", *packages)
    versions = "; ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return {
        "machine": f"{cpu_model()}, {cores()} cores",
        "software": f"python {platform.python_version()}; {versions}",
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write_csv(path: Path, rows: Iterable[Mapping[str, object]], *packages: str) -> None:
    """Write rows with their provenance; the file appears whole or not at all."""
    source = provenance(*packages)
    lines: list[Mapping[str, object]] = [{**row, **source} for row in rows]
    write_whole(path, lines)
    print(f"wrote {os.path.relpath(path)} ({len(lines)} rows)")


def append_csv(path: Path, row: Mapping[str, object], *packages: str) -> None:
    """Add one row with its provenance to a result file that may not be there yet; whole or not at all."""
    rows: list[Mapping[str, object]] = [*read_csv(path)] if path.exists() else []
    rows.append({**row, **provenance(*packages)})
    write_whole(path, rows)


def replace_rows(
    path: Path, rows: Iterable[Mapping[str, object]], where: Callable[[Mapping[str, str]], bool]
) -> None:
    """Put rows with their provenance, Triton's included, where such rows are in a file that need not exist.

    ``where`` says of a row whether it is to go; the file appears whole or not at all.
    """
    before = read_csv(path) if path.exists() else []
    source = provenance("triton")
    place = next((k for k, row in enumerate(before) if where(row)), len(before))
    kept = [[row for row in part if not where(row)] for part in (before[:place], before[place:])]
    after = [*kept[0], *({**row, **source} for row in rows), *kept[1]]
    if after:
        write_whole(path, after)


def write_whole(path: Path, rows: list[Mapping[str, object]]) -> None:
    """Rows of the same columns as they are, as a CSV file that appears whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _text(value) for key, value in row.items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())


def _text(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a result file, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: list[list[str]], align: str) -> str:
    """Rows of text, the first the head, as lines of aligned columns ("l" or "r" each)."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(align))]
    pad = {"l": str.ljust, "r": str.rjust}
    lines = [
        "  ".join(pad[a](cell, w) for cell, w, a in zip(row, widths, align, strict=True)) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
