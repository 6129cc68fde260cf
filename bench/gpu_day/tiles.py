"""Other tiles for this GPU: what ``nmsolve bench --tune`` does, kernel by kernel until the time is over.

Every tile is compiled ahead, in many processes. tiles.json is a launch table, for NMSOLVE_LAUNCH_TABLE, of
the tiles that were faster; ``tried`` in it lists the kernels and sizes that have been looked at.
"""

from __future__ import annotations

import json
from typing import Any

from common import commit

from gpu_day.compiled import compile_ahead
from gpu_day.setting import Setting, machine_of
from nmsolve.backends.dispatch import select
from nmsolve.backends.triton import launch_table
from nmsolve.timing.methods import measured_on
from nmsolve.timing.tiles import candidates, prepared, tune

ORDER = (
    ("exact", 16), ("tsenor", 16), ("exact", 8), ("exact", 32), ("tsenor", 32), ("tsenor", 8), ("exact", 64),
    ("dykstra", 16), ("exact_edge", 16), ("tsenor", 64), ("tsenor", 4), ("dykstra", 8), ("dykstra", 32),
    ("exact", 4), ("exact_edge", 8), ("exact_edge", 32), ("dykstra", 64), ("dykstra", 4), ("exact_edge", 64),
    ("exact_edge", 4),
)  # fmt: skip
SMALL = 1024
"""Side of the matrices that are solved to have a tile compiled."""


def compile_one(setting: Setting, job: tuple[str, int, launch_table.Entry]) -> None:
    """In a process of its own."""
    kernel, size, entry = job
    tiles: Any = select("triton", setting.device, 16).masks
    tiles.use_tiles({(kernel, size): entry})
    call = prepared(kernel, size, SMALL, setting.device).call
    call()
    setting.synchronize()


def run(setting: Setting) -> tuple[bool, str]:
    path = setting.out / "tiles.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    won = launch_table.load(path) if before else {}
    tried: list[str] = list(before.get("tried", []))
    order = (("exact", 4),) if setting.rehearsal else ORDER
    side, repeats = (16, 2) if setting.rehearsal else (4096, 20)
    for kernel, size in order:
        name = f"{kernel} {size}"
        if name in tried:
            continue
        if setting.left < 15:
            break
        entries = [*candidates(kernel, size)][: 2 if setting.rehearsal else None]
        jobs = [(kernel, size, entry) for entry in entries]
        failures = compile_ahead(setting, compile_one, jobs, 0.7 * setting.left)
        if setting.processes and len(failures) < len(jobs):
            print(f"{name}: {len(failures)} of {len(jobs)} tiles compiled; no more time")
            break
        sound = [entries[k] for k in range(len(jobs)) if not failures.get(k)]
        tiles: Any = select("triton", setting.device, 16).masks
        device = str(setting.device)
        won |= tune(
            tiles, sizes=[size], kernels=[kernel], side=side, device=device, repeats=repeats,
            choose=lambda kernel, size, sound=sound: sound,  # type: ignore[misc]
        )  # fmt: skip
        tried.append(name)
        told = {"commit": commit(), "machine": machine_of(setting.out).get("gpu"), "tried": tried}
        launch_table.save(path, won, measured_on(device) | told)
    missing = [f"{kernel} {size}" for kernel, size in order if f"{kernel} {size}" not in tried]
    faster = ", ".join(f"{kernel} {size}" for kernel, size in sorted(won)) or "none"
    return not missing, f"{len(tried)} tried, faster tiles for: {faster}; {len(missing)} without time"
