"""Where a step runs, with which sizes, and the files it writes to."""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import commit, cores, cpu_model, read_csv, write_whole

from nmsolve.about import versions
from nmsolve.errors import NMSolveError


@dataclass(frozen=True)
class Setting:
    """A real day's sizes, or those of a rehearsal on the emulator."""

    out: Path
    deadline: float
    rehearsal: bool
    device: torch.device
    side: int
    """Of the matrices that are timed."""
    warm_side: int
    """Of those that only have kernels compiled; sizes are divisible by as much, so that these serve."""
    sizes: tuple[int, ...]
    sinkhorn_sizes: tuple[int, ...]
    tsenor: Mapping[str, float]
    repeats: tuple[int, int]
    """At least and at most."""
    processes: int
    """That compile or test side by side; 0: none beside this one."""

    @staticmethod
    def here(out: Path, seconds: float, rehearsal: bool) -> Setting:
        deadline = time.monotonic() + seconds
        if rehearsal:
            torch.set_num_threads(1)
            few = {"iterations": 20, "tau": 50.0}
            cpu = torch.device("cpu")
            return Setting(out, deadline, True, cpu, 32, 32, (4, 8), (4, 8), few, (2, 2), 0)
        if not torch.cuda.is_available():
            raise NMSolveError(f"torch {torch.__version__} sees no GPU")
        many = {"iterations": 300, "tau": 150.0}
        sizes = (4, 8, 16, 32, 64)
        gpu = torch.device("cuda", torch.cuda.current_device())
        return Setting(
            out, deadline, False, gpu, 8192, 1024, sizes, (*sizes, 128), many, (5, 40), min(cores(), 16)
        )

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @property
    def target(self) -> str:
        if self.rehearsal:
            return "sm_90"
        return "sm_{}{}".format(*torch.cuda.get_device_capability(self.device))

    @property
    def clock(self) -> str:
        """What times are read from."""
        return "events" if self.device.type == "cuda" else "wall clock, in place of events"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def provenance(self) -> dict[str, str]:
        """The columns that every row ends with."""
        known = {name: version for name, version in versions().items() if version is not None}
        return {
            "gpu": gpu_name(self),
            "target": self.target,
            "clock": self.clock,
            "machine": f"{gpu_name(self)}, {driver()}; {cpu_model()}, {cores()} cores",
            "software": "; ".join(f"{name} {version}" for name, version in known.items()),
            "commit": commit(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        }


def gpu_name(setting: Setting) -> str:
    return "emulator of PTX" if setting.rehearsal else torch.cuda.get_device_name(setting.device)


def driver() -> str:
    """The version of NVIDIA's driver, as nvidia-smi says it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return f"driver {done.stdout.split()[0]}"
    return "no driver" if platform.system() == "Linux" else platform.system()


def machine_of(out: Path) -> dict[str, Any]:
    """What the first step found; empty before."""
    try:
        found = json.loads((out / "machine.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(found)


class Sheet:
    """A CSV file of a day: it grows by rows, and is whole after each.

    ``columns`` are those of every row but the provenance; the first ``keys`` of them tell rows apart.
    """

    def __init__(self, setting: Setting, name: str, columns: tuple[str, ...], keys: int) -> None:
        self.path = setting.out / name
        self.columns, self.keys = columns, columns[:keys]
        self.rows: list[dict[str, object]] = []
        if self.path.exists():
            self.rows = [dict(row) for row in read_csv(self.path)]
        self.source = setting.provenance()
        others = {str(row["gpu"]) for row in self.rows} - {self.source["gpu"]}
        if others:
            raise NMSolveError(f"out: {self.path} has rows of {others.pop()}, this is {self.source['gpu']}")

    def key(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in self.keys)

    def __contains__(self, key: tuple[object, ...]) -> bool:
        return tuple(map(str, key)) in {self.key(row) for row in self.rows}

    def __iter__(self) -> Iterator[dict[str, object]]:
        return iter(self.rows)

    def add(self, **row: object) -> None:
        """A row; one with the same keys is replaced. Columns that are not named are empty."""
        self.add_all([row])

    def add_all(self, rows: Sequence[Mapping[str, object]]) -> None:
        """Several, of which the file is written once."""
        for row in rows:
            unknown = set(row) - set(self.columns)
            if unknown:
                raise ValueError(f"{self.path.name} has no columns {sorted(unknown)}")
            whole = {name: row.get(name, "") for name in self.columns} | self.source
            self.rows = [other for other in self.rows if self.key(other) != self.key(whole)]
            self.rows.append(whole)
        if rows:
            write_whole(self.path, self.rows)
