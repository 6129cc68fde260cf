"""Finished layers on disk, so that a run that was killed can go on.

A folder holds ``run.json`` (what the run was started with) and ``layers/<name>.safetensors``: the new weight,
the mask packed to bits and the layer's report. Each file is written under another name, synced and renamed,
so a layer is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nmsolve.checkpoint.format import read_shard
from nmsolve.checkpoint.mask_files import pack_mask, packed_size, unpack_mask
from nmsolve.errors import NMSolveError
from nmsolve.files import is_partial, locked, read_json, write_bytes, write_text
from nmsolve.prune.report import LayerReport

__all__ = ["LayerStore", "file_name", "finished_in", "stored_part"]

_RECORD, _LAYERS = "run.json", "layers"

_REMOVE = "remove it to begin anew"


class LayerStore:
    """The finished layers of one run; a context manager that holds the folder for this process.

    Parameters
    ----------
    folder : path
        Made if it is not there, and removed at the end if it has no layer. One with layers of a run with
        other settings, another model or other calibration data is refused, and so is one in use.
    run : mapping
        JSON data that says what is being done.

    Raises
    ------
    NMSolveError
        If the folder is refused or cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._held = ExitStack()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._hold()
            self._check(run)
            write_text(self.folder / _RECORD, json.dumps(run, indent=2))
            (self.folder / _LAYERS).mkdir(exist_ok=True)
        except OSError as error:
            self._held.close()
            where = error.filename or self.folder
            raise NMSolveError(f"resume: {where}: {error.strerror or error}; {_REMOVE}") from None
        except BaseException:
            self._held.close()
            raise

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.names():
            with suppress(OSError):
                shutil.rmtree(self.folder / _LAYERS)
                record = self.folder / _RECORD
                for path in self.folder.iterdir():
                    if path == record or is_partial(path, record):
                        path.unlink()
                self.folder.rmdir()
        self._held.close()

    def names(self) -> list[str]:
        """Of the finished layers, as :func:`file_name` spells them."""
        return finished_in(self.folder)

    def _check(self, run: Mapping[str, Any]) -> None:
        record = self.folder / _RECORD
        if not record.exists():
            # Where a run was killed while it wrote its record, only the beginning of that is here.
            if not all(is_partial(path, record) for path in self.folder.iterdir()):
                raise NMSolveError(f"resume: {self.folder} is not empty and holds no run of nmsolve")
            return
        try:
            found = read_json(record)
        except ValueError as error:
            raise NMSolveError(f"resume: {record}: expected JSON: {error}; {_REMOVE}") from None
        if not isinstance(found, dict):
            raise NMSolveError(f"resume: {record}: expected what a run was started with; {_REMOVE}")
        names = dict.fromkeys([*run, *found])
        differing = [name for name in names if run.get(name) != found.get(name)]
        if differing and self.names():
            name = differing[0]
            raise NMSolveError(
                f"resume: {self.folder} holds layers of another run: {name} was {found.get(name)!r} "
                f"there and is {run.get(name)!r} now; {_REMOVE}"
            )

    def _hold(self) -> None:
        """Locks the folder, where the file system has locks."""
        try:
            self._held.enter_context(locked(self.folder))
        except BlockingIOError:
            raise NMSolveError(f"resume: {self.folder} is in use by another run") from None

    def path(self, name: str) -> Path:
        """The file of a layer."""
        return _path(self.folder, name)

    def save(self, name: str, weight: Tensor, mask: Tensor, report: LayerReport) -> None:
        """Stores a layer."""
        from safetensors.torch import save

        tensors = {"weight": weight.detach().cpu().contiguous(), "mask": pack_mask(mask)}
        write_bytes(self.path(name), save(tensors, {"report": json.dumps(asdict(report))}))

    def load(self, name: str, like: Tensor) -> tuple[Tensor, Tensor, LayerReport]:
        """Weight, mask and report of a layer whose weight has the shape and dtype of ``like``.

        Raises
        ------
        NMSolveError
            If the file holds anything else.
        """
        from safetensors import safe_open

        path = self.path(name)
        wrong = NMSolveError(
            f"resume: {path}: expected a finished layer of this run, got something else; remove it to prune "
            "that layer anew"
        )
        try:
            shard = read_shard(path)
            row = json.loads(shard.metadata["report"])
            report = LayerReport(**{**row, "shape": tuple(row["shape"])})
        except (NMSolveError, KeyError, TypeError, ValueError, RecursionError):
            raise wrong from None
        shapes = {entry.name: entry.shape for entry in shard.entries}
        packed = (packed_size(like.numel()),)
        whole = shapes == {"weight": tuple(like.shape), "mask": packed} and _fits(report)
        if not whole or (report.name, report.shape) != (name, tuple(like.shape)):
            raise wrong
        with safe_open(path, framework="pt") as file:
            weight, mask = file.get_tensor("weight"), file.get_tensor("mask")
        if weight.dtype != like.dtype or mask.dtype != torch.uint8:
            raise wrong
        return weight, unpack_mask(mask, weight.shape), report


def finished_in(folder: Path) -> list[str]:
    """The layers that are finished in a folder, as :func:`file_name` spells them."""
    return sorted(path.stem for path in (folder / _LAYERS).glob("[!.]*.safetensors"))


def file_name(name: str) -> str:
    """What the file of a layer is called; dots are no separators, so any module name is a file name."""
    return name.replace("/", "_") or "model"


def _path(folder: Path, name: str) -> Path:
    return folder / _LAYERS / f"{file_name(name)}.safetensors"


def stored_part(folder: Path, name: str, part: Callable[[Tensor], Tensor] = Tensor.detach) -> Tensor:
    """The new weight of a finished layer, or a part of it."""
    from safetensors import safe_open

    with safe_open(_path(folder, name), framework="pt") as file:
        return part(file.get_tensor("weight")).clone()


_KINDS = {"str": str, "int": int, "float": float | int, "float | None": float | int | None}
_SEQUENCES = {"tuple[int, ...]": tuple, "list[int] | None": list | None}


def _fits(report: LayerReport) -> bool:
    """Whether the fields of a report are of their types."""
    for field in fields(report):
        value, kind = getattr(report, field.name), str(field.type)
        if kind in _KINDS and not isinstance(value, _KINDS[kind]):
            return False
        if kind not in _KINDS:
            if not isinstance(value, _SEQUENCES[kind]):
                return False
            if not all(isinstance(part, int) for part in value or ()):
                return False
    return True
