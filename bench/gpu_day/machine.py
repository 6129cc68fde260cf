"""What the machine is: GPU, driver, clocks, software, and how fast its memory copies."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import subprocess
from typing import Any

import torch
from common import cores, cpu_model

from gpu_day.clock import timed
from gpu_day.setting import Setting, gpu_name, machine_of
from nmsolve.about import versions
from nmsolve.errors import NMSolveError
from nmsolve.files import write_text

QUERIES = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu", "persistence_mode", "mig.mode.current", "ecc.mode.current",
)  # fmt: skip


def run(setting: Setting) -> tuple[bool, str]:
    before = machine_of(setting.out).get("gpu")
    if before not in (None, gpu_name(setting)):
        raise NMSolveError(f"out: the results there are of {before}, this is {gpu_name(setting)}")
    found: dict[str, Any] = {
        "gpu": gpu_name(setting),
        "target": setting.target,
        "host": f"{cpu_model()}, {cores()} cores",
        "system": platform.platform(),
        "software": versions("pytest", "hypothesis", "scipy"),
        "compiler": next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None),
        "nvidia-smi": nvidia_smi(),
    }
    if setting.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(setting.device)
        found |= {
            "memory": gpu.total_memory,
            "multiprocessors": gpu.multi_processor_count,
            "l2_bytes": gpu.L2_cache_size,
            "cuda": torch.version.cuda,
        }
    _write(setting, found)
    found |= {"bytes_per_second": copied_per_second(setting), "clock": setting.clock}
    _write(setting, found)
    rate = found["bytes_per_second"] / 1e12
    return True, f"{found['gpu']}, {setting.target}; copies read and write {rate:.3g} TB/s ({setting.clock})"


def _write(setting: Setting, found: dict[str, Any]) -> None:
    write_text(setting.out / "machine.json", json.dumps(found, indent=1) + "\n")


def nvidia_smi() -> dict[str, str] | str:
    """What it answers to each question, or why there is no answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    with contextlib.suppress(ValueError):
        line = done.stdout.splitlines()[0]
        return dict(zip(QUERIES, map(str.strip, line.split(",")), strict=True))
    return done.stdout[:1000]


def copied_per_second(setting: Setting) -> float:
    """Bytes that copies of large tensors read and write."""
    size = 1 << (30 if setting.device.type == "cuda" else 20)
    pairs = [
        [torch.ones(size // 4, device=setting.device), torch.empty(size // 4, device=setting.device)]
        for _ in range(2)
    ]
    times = timed(setting, [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs], 1.0)  # type: ignore[misc]
    return 2 * size / times.median * 1e3
