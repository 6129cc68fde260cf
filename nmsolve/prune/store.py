"""Finished layers on disk, so that a run that was killed can go on.

A folder holds ``run.json`` (what the run was started with) and ``layers/<name>.safetensors``: the new weight,
the mask packed to bits and the layer's report. Each file is written under another name, synced and renamed,
so a layer is there whole or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.packed import pack_mask, unpack_mask

__all__ = ["LayerStore"]


class LayerStore:
    """The finished layers of one run.

    Parameters
    ----------
    folder : path
        Made if it is not there. One that a run with other settings, another model or other calibration data
        has left is refused.
    run : mapping
        JSON data that says what is being done.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        record = self.folder / "run.json"
        if record.exists():
            found = json.loads(record.read_text(encoding="utf-8"))
            names = dict.fromkeys([*run, *found])
            differing = [name for name in names if run.get(name) != found.get(name)]
            if differing:
                name = differing[0]
                raise NMSolveError(
                    f"resume: {self.folder} holds layers of another run: {name} was {found.get(name)!r} "
                    f"there and is {run.get(name)!r} now; remove the folder or name another"
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise NMSolveError(f"resume: {self.folder} is not empty and holds no run of nmsolve")
        (self.folder / "layers").mkdir(parents=True, exist_ok=True)
        if not record.exists():
            _write_atomically(record, json.dumps(run, indent=2).encode())

    def path(self, name: str) -> Path:
        """The file of a layer; dots are no separators, so any module name is a file name."""
        return self.folder / "layers" / f"{name.replace('/', '_') or 'model'}.safetensors"

    def __contains__(self, name: str) -> bool:
        return self.path(name).exists()

    def save(self, name: str, weight: Tensor, mask: Tensor, report: Mapping[str, Any]) -> None:
        """Stores a layer."""
        from safetensors.torch import save

        tensors = {"weight": weight.detach().cpu().contiguous(), "mask": pack_mask(mask)}
        _write_atomically(self.path(name), save(tensors, {"report": json.dumps(report)}))

    def load(self, name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Weight, mask and report of a layer."""
        from safetensors import safe_open

        with safe_open(self.path(name), framework="pt") as file:
            weight = file.get_tensor("weight")
            mask = unpack_mask(file.get_tensor("mask"), weight.shape)
            return weight, mask, json.loads(file.metadata()["report"])


def _write_atomically(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
