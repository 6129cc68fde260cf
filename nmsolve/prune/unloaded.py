"""Models whose weights stay in their checkpoint's files: built without them, each read when it is asked for.

transformers' own tables say which tensors become which parameter, and its own converters join and split them;
a model that they do not explain whole is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.format import Checkpoint, Entry
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.checkpoint.stored_names import destinations
from nmsolve.checkpoint.streams import read_into
from nmsolve.errors import NMSolveError

__all__ = ["StoredWeights", "built_without_weights", "read_entry"]

_KINDS: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
} | {code: getattr(torch, name) for code, name in DTYPES.items()}
_INSTEAD = "leave offload='disk' out"


@dataclass(frozen=True)
class _Source:
    """Tensors of a checkpoint that become one parameter, or several."""

    entries: tuple[tuple[str, str | None], ...]
    converter: Any
    parameter: str

    def convert(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters by name, of the tensors by name."""
        if self.converter is None:
            return {self.parameter: tensors[self.entries[0][0]]}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.entries:
            converter.add_tensor(self.parameter, name, pattern, tensors[name])
        found = converter.convert(self.parameter, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


class StoredWeights:
    """The parameters and persistent buffers of a model, in the files of its checkpoint.

    Parameters
    ----------
    checkpoint : Checkpoint
    model : nn.Module
        Of :func:`built_without_weights`; its dtypes are those that weights are read in.

    Attributes
    ----------
    lacking : list of str
        Parameters that no tensor holds.
    unused : set of str
        Tensors that are no part of the model.

    Raises
    ------
    NMSolveError
        If a parameter has another shape, or is stored in a form that cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint, model: nn.Module) -> None:
        self._model = model
        self._where = {entry.name: (shard.path, entry) for shard, entry in checkpoint.entries()}
        self._wanted = dict(model.state_dict(keep_vars=True))
        self._sources: dict[str, tuple[_Source, str]] = {}
        try:
            self._find(checkpoint)
        except NMSolveError:
            raise
        except Exception as error:  # whatever transformers' converters make of a wrong checkpoint
            raise NMSolveError(
                f"{checkpoint.root}: its tensors cannot be told from their names: {error}; {_INSTEAD}"
            ) from None
        self._share_ties()
        self.lacking = [name for name, _ in model.named_parameters() if name not in self._sources]

    def _find(self, checkpoint: Checkpoint) -> None:
        gathered: dict[tuple[str, int], list[tuple[str, str | None]]] = {}
        converters: dict[int, Any] = {}
        self.unused = set(self._where)
        for name, place in destinations(self._model, self._where).items():
            converters[id(place.converter)] = place.converter
            gathered.setdefault((place.parameter, id(place.converter)), []).append((name, place.pattern))
            self.unused.discard(name)
        for (parameter, converter), entries in gathered.items():
            source = _Source(tuple(entries), converters[converter], parameter)
            shapes = {name: self._where[name][1].shape for name, _ in entries}
            on_meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            for name, value in source.convert(self._model, on_meta).items():
                if name in self._wanted:
                    self._add(checkpoint, source, name, tuple(value.shape))

    def _add(self, checkpoint: Checkpoint, source: _Source, name: str, shape: tuple[int, ...]) -> None:
        wanted = tuple(self._wanted[name].shape)
        if shape != wanted:
            raise NMSolveError(
                f"{checkpoint.root}: {name} has another shape than in the model: {shape} against {wanted}"
            )
        for entry, _ in source.entries:
            if self._where[entry][1].dtype not in _KINDS:
                raise NMSolveError(f"{checkpoint.root}: {entry} is {self._where[entry][1].dtype}; {_INSTEAD}")
        self._sources.setdefault(name, (source, name))

    def _share_ties(self) -> None:
        """Of the names of one parameter, all lead to where one of them does."""
        by_tensor: dict[int, list[str]] = {}
        for name, value in self._wanted.items():
            by_tensor.setdefault(id(value), []).append(name)
        for names in by_tensor.values():
            found = next((self._sources[name] for name in names if name in self._sources), None)
            if found is not None:
                self._sources |= {name: found for name in names if name not in self._sources}

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def read(self, names: Collection[str]) -> dict[str, Tensor]:
        """New tensors on the CPU, by name; what several of them come from is read once."""
        wanted: dict[int, tuple[_Source, list[str]]] = {}
        for name in names:
            source, _ = self._sources[name]
            wanted.setdefault(id(source), (source, []))[1].append(name)
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            files: dict[Path, BinaryIO] = {}
            for source, of_source in wanted.values():
                tensors = {}
                for entry, _ in source.entries:
                    path, place = self._where[entry]
                    if path not in files:
                        files[path] = stack.enter_context(path.open("rb"))
                    tensors[entry] = read_entry(files[path], place)
                made = source.convert(self._model, tensors)
                for name in of_source:
                    dtype = self._wanted[name].dtype
                    found[name] = made[self._sources[name][1]].to(dtype).contiguous()
        return {name: found[name] for name in names}


def read_entry(file: BinaryIO, entry: Entry) -> Tensor:
    """A new tensor with what a file holds; its pages are in memory no longer than they are read."""
    tensor = torch.empty(entry.shape, dtype=_KINDS[entry.dtype])
    read_into(file, entry.start, tensor.view(-1).view(torch.uint8).numpy().data)
    return tensor


@contextmanager
def built_without_weights() -> Iterator[None]:
    """Parameters of modules that are made in here are on the meta device; buffers are what they are."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # may return one
    try:
        yield
    finally:
        handle.remove()
