"""The devices that torch sees, and what can run on them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from nmsolve.backends.dispatch import AUTO, backend_reasons, select
from nmsolve.errors import NMSolveError

__all__ = ["Device", "check_device", "chosen_device", "devices"]


@dataclass(frozen=True)
class Device:
    """A device that torch sees.

    ``backends`` maps each backend to None if it can run there, else to why not; ``auto`` is the one that
    ``backend="auto"`` takes for blocks of 16.
    """

    name: str
    description: str
    auto: str
    backends: dict[str, str | None]


def check_device(asked: str | None) -> None:
    """Raise NMSolveError unless ``device`` is cpu, cuda, cuda:N or not given. Imports nothing."""
    if asked is not None and re.fullmatch(r"cpu|cuda(:\d+)?", asked) is None:
        raise NMSolveError(f"device: expected cpu, cuda or cuda:N, got {asked!r}")


def chosen_device(asked: str | None, local: int | None = None) -> str:
    """What ``device`` asks for (cpu, cuda or cuda:N); by default a GPU if there is one.

    Where several processes share a host, ``local`` numbers them, and each gets a GPU of its own unless one is
    asked for by its number.

    Raises
    ------
    NMSolveError
        If it is no device, or torch does not see the GPU.
    """
    check_device(asked)
    import torch

    if asked is None:
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked != "cpu":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = int(asked.partition(":")[2] or 0)
        if index >= count:
            raise NMSolveError(f"device: {asked} is not here: torch {torch.__version__} sees {count} GPUs")
        if asked == "cuda" and local is not None:
            return f"cuda:{local % count}"
    return asked


def devices() -> list[Device]:
    """The CPU, and every GPU that torch can use."""
    import torch

    found = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        found.append((f"cuda:{index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    return [
        Device(name, description, select(AUTO, name, 16).name, backend_reasons(name))
        for name, description in found
    ]
