"""Cases that every process of a gloo group runs, and what each of them raised."""

from __future__ import annotations

import datetime
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
import torch.multiprocessing
from torch import distributed

PATIENCE_S, LIMIT_S = 600, 1800
"""Of a call that waits for other processes, and of all cases; one of several that share two cores may compile
for minutes before it comes."""

Outcomes = dict[str, dict[int, str | None]]
"""Case -> process -> traceback or None."""


def run_cases(cases: Mapping[str, Callable[[], None]], rank: int, processes: int, folder: str) -> None:
    """In one process: every case, and for each what it raised here, or null, in a file."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=PATIENCE_S),
    )
    outcome: dict[str, str | None] = {}
    for name, function in cases.items():
        torch.manual_seed(0)
        try:
            function()
            outcome[name] = None
        except Exception:
            outcome[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
        distributed.barrier()
    distributed.destroy_process_group()


def outcomes(
    work: Callable[[int, int, str], None], processes: int, folder: Path, names: Iterable[str]
) -> Outcomes:
    """Of one group whose processes call ``work(rank, processes, folder)``."""
    context = torch.multiprocessing.spawn(work, (processes, str(folder)), nprocs=processes, join=False)
    end = time.monotonic() + LIMIT_S
    try:
        while not context.join(timeout=max(1.0, end - time.monotonic())):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    found = {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)}
    return {name: {rank: found[rank][name] for rank in found} for name in names}
