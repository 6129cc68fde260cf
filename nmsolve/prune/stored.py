"""A model's weights in the checkpoint that it was loaded from: where each lies, and the checkpoint rewritten.

transformers renames tensors when it loads them, cuts some into several weights, and spells configurations in
its own way when it saves them, so that another version of it reads another model. What was pruned therefore
goes back into the files that it came from, and every other byte stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.format import (
    INDEX_SUFFIX,
    Checkpoint,
    Entry,
    Shard,
    encode_header,
)
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.checkpoint.streams import StreamWriter
from nmsolve.errors import NMSolveError
from nmsolve.files import write_bytes
from nmsolve.prune.unloaded import read_entry

__all__ = ["Place", "StoredMasks", "find_places", "names_of", "unplaced", "write_checkpoint"]

_CODES = {name: code for code, name in DTYPES.items()}


class Place(NamedTuple):
    """Rows ``first`` to ``last`` (not included) of a tensor in a checkpoint; ``rows`` is how many it has.

    What lies there is a whole weight, or of stacked experts ``(experts, rows, ...)`` the rows ``begin`` to
    ``end`` of one ``expert``.
    """

    entry: str
    first: int
    last: int
    rows: int
    expert: int | None = None
    begin: int = 0
    end: int = 0

    def of(self, weight: Tensor) -> Tensor:
        """What lies there, of a weight or its mask."""
        return weight if self.expert is None else weight[self.expert, self.begin : self.end]

    @property
    def is_whole(self) -> bool:
        return self.last - self.first == self.rows


def names_of(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Every name that the model has for each of ``weights``: a shared weight may have several."""
    known: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known.setdefault(id(parameter), []).append(name)
    return {name: known.get(id(weight), [name]) for name, weight in weights.items()}


def find_places(
    checkpoint: Checkpoint, weights: Mapping[str, Tensor], names: Mapping[str, Collection[str]]
) -> dict[str, list[Place]]:
    """Where weights lie in a checkpoint, found by what they hold, as names may differ.

    Parameters
    ----------
    checkpoint : Checkpoint
    weights : mapping of str to Tensor
        As loaded, of any dtype.
    names : mapping of str to collection of str
        All names that each has in the model: :func:`names_of`.

    Returns
    -------
    dict of str to list of Place
        More than one place where the checkpoint holds a shared weight twice, or each expert of a stack by
        itself; none where no tensor, and no run of rows of one, holds it.
    """
    with ExitStack() as stack:
        search = _Search(checkpoint, stack)
        return {name: search.places(weight, names[name]) for name, weight in weights.items()}


class _Search:
    """The tensors of a checkpoint by shape; each is read when a weight may lie in it."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._files: dict[Path, Any] = {}
        self._stack = stack
        self._held: dict[str, tuple[Shard, Entry]] = {}
        self._by_shape: dict[tuple[int, ...], list[str]] = {}
        self._by_numbers: dict[tuple[tuple[int, ...], tuple[str, ...]], list[str]] = {}
        for shard, entry in checkpoint.entries():
            self._held[entry.name] = shard, entry
            self._by_shape.setdefault(entry.shape, []).append(entry.name)
            numbers = tuple(_numbers(entry.name))
            self._by_numbers.setdefault((entry.shape, numbers), []).append(entry.name)
        self._taken: set[str] = set()

    def places(self, weight: Tensor, names: Iterable[str]) -> list[Place]:
        weight = weight.detach().cpu()
        shape = tuple(weight.shape)
        found = []
        for name in names:
            if name in self._held and self._holds(name, weight, whole=False):
                found.append(name)
        if not found:
            likely = _by_likeness(self._by_shape.get(shape, ()), next(iter(names)))
            free = (name for name in likely if name not in self._taken)
            found = [name for name in free if self._holds(name, weight)][:1]
        self._taken.update(found)
        if found:
            return [Place(name, 0, shape[0], shape[0]) for name in found]
        return self._part(weight, next(iter(names))) or self._experts(weight, next(iter(names)))

    def _experts(self, weight: Tensor, name: str) -> list[Place]:
        """Tensors with the experts of a stack, or with the halves of each: gates and inputs."""
        if weight.ndim != 3:
            return []
        for parts in (1, 2):
            rows = weight.shape[1] // parts
            found: list[Place] = []
            for expert in range(len(weight) if rows * parts == weight.shape[1] else 0):
                for begin in range(0, weight.shape[1], rows):
                    place = Place("", 0, rows, rows, expert, begin, begin + rows)
                    numbers = (*_numbers(name), str(expert))
                    held = self._by_numbers.get((tuple(place.of(weight).shape), numbers), ())
                    free = (entry for entry in sorted(held) if entry not in self._taken)
                    entry = next((entry for entry in free if self._holds(entry, place.of(weight))), None)
                    if entry is None:
                        break
                    self._taken.add(entry)
                    found.append(place._replace(entry=entry))
            if len(found) == parts * len(weight):
                return found
            self._taken.difference_update(place.entry for place in found)
        return []

    def _part(self, weight: Tensor, name: str) -> list[Place]:
        """The run of rows that holds a weight."""
        rows = len(weight)
        for shape, entries in self._by_shape.items():
            if len(shape) != weight.ndim or shape[1:] != tuple(weight.shape[1:]) or shape[0] <= rows:
                continue
            for entry in _by_likeness(entries, name):
                if _numbers(entry) == _numbers(name):
                    tensor = self._file(entry).get_tensor(entry).to(weight.dtype)
                    starts = (tensor[: shape[0] - rows + 1] == weight[0]).flatten(1).all(1).nonzero()
                    for start in starts.flatten().tolist():
                        if _same(tensor[start : start + rows], weight):
                            return [Place(entry, start, start + rows, shape[0])]
        return []

    def _holds(self, name: str, weight: Tensor, whole: bool = True) -> bool:
        """Whether a tensor holds a weight; by its first row alone where the name is the same."""
        if self._held[name][1].shape != tuple(weight.shape):
            return False
        file = self._file(name)
        if not _same(file.get_slice(name)[:1].to(weight.dtype), weight[:1]):
            return False
        return not whole or _same(file.get_tensor(name).to(weight.dtype), weight)

    def _file(self, name: str) -> Any:
        from safetensors import safe_open

        path = self._held[name][0].path
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._files[path]


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, and NaN where the other is."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _by_likeness(entries: Iterable[str], name: str) -> list[str]:
    """Names with the same numbers in them first, then those with more words in common at the end."""

    def key(entry: str) -> tuple[bool, int]:
        ends = zip(reversed(entry.split(".")), reversed(name.split(".")), strict=False)
        common = 0
        for a, b in ends:
            if a != b:
                break
            common += 1
        return _numbers(entry) != _numbers(name), -common

    return sorted(entries, key=key)


def _numbers(name: str) -> list[str]:
    return [part for part in name.split(".") if part.isdigit()]


# --- masks --------------------------------------------------------------------------------------------------


class StoredMasks(Mapping[str, Tensor]):
    """Masks of a model's weights under the names of the checkpoint's tensors, made when they are asked for.

    A tensor that holds several weights gets one mask; True where it holds a weight that was not pruned.
    """

    def __init__(self, masks: Mapping[str, Tensor], places: Mapping[str, list[Place]]) -> None:
        self._masks = masks
        self.weights: dict[str, list[tuple[str, Place]]] = {}
        for name in masks:
            for place in places[name] or [Place(name, 0, 1, 1)]:
                self.weights.setdefault(place.entry, []).append((name, place))

    def __getitem__(self, entry: str) -> Tensor:
        parts = self.weights[entry]
        first, place = parts[0]
        mask = self._masks[first]
        if place.is_whole:
            return place.of(mask)
        whole = torch.ones((place.rows, *mask.shape[1:]), dtype=torch.bool)
        for name, place in parts:
            whole[place.first : place.last] = self._masks[name]
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


# --- the checkpoint rewritten -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rewriting:
    """What changes: rows of tensors, and the dtype of floating-point ones."""

    parts: Mapping[str, list[tuple[Place, Callable[[], Tensor]]]]
    dtypes: Mapping[str, str]


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    model: nn.Module,
    changed: Mapping[str, list[tuple[Place, Callable[[], Tensor]]]],
    dtype: str | None,
    check: Callable[[], None],
) -> None:
    """Writes a checkpoint folder again: its files and names, with some weights replaced.

    Parameters
    ----------
    checkpoint : Checkpoint
    folder : Path
        Is there, and empty.
    model : nn.Module
        Tells which tensors transformers keeps in a dtype of their own.
    changed : mapping of str to list of (Place, callable)
        What returns new values, by the name of the tensor in the checkpoint.
    dtype : str, optional
        torch's name of the dtype of floating-point tensors; by default each keeps its own.
    check : callable
        Called before each tensor.
    """
    dtypes = {} if dtype is None else _new_dtypes(checkpoint, model, dtype)
    what = _Rewriting(changed, dtypes)
    for shard in checkpoint.shards:
        _write_shard(shard, folder / shard.path.name, what, check)
    for path in checkpoint.extras:
        check()
        if path.name == "config.json" and dtype is not None and path.parent == Path():
            write_bytes(folder / path, _with_dtype((checkpoint.root / path).read_bytes(), dtype))
        elif path.name.endswith(INDEX_SUFFIX) and dtypes and path.parent == Path():
            write_bytes(folder / path, _with_size((checkpoint.root / path).read_bytes(), checkpoint, dtypes))
    checkpoint.copy_extras(folder)


def _new_dtypes(checkpoint: Checkpoint, model: nn.Module, dtype: str) -> dict[str, str]:
    """Codes of the tensors whose dtype changes. transformers may keep some in float32 for its range."""
    own = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in model.state_dict().items()}
    found = {}
    for _, entry in checkpoint.entries():
        if entry.dtype in DTYPES:
            code = _CODES.get(own.get(entry.name, dtype), entry.dtype)
            if code != entry.dtype:
                found[entry.name] = code
    return found


def _write_shard(shard: Shard, path: Path, what: _Rewriting, check: Callable[[], None]) -> None:
    def code(entry: Entry) -> str:
        return what.dtypes.get(entry.name, entry.dtype)

    def size(entry: Entry) -> int:
        return entry.size * _itemsize(code(entry)) if entry.name in what.dtypes else entry.nbytes

    header = shard.header
    if any(entry.name in what.dtypes for entry in shard.entries):
        header = encode_header(((e.name, code(e), e.shape, size(e)) for e in shard.entries), shard.metadata)
    total = sum(size(entry) for entry in shard.entries)
    with (
        shard.path.open("rb") as source,
        StreamWriter(path, header, total) as writer,
    ):
        for entry in shard.entries:
            check()
            if entry.name not in what.parts and entry.name not in what.dtypes:
                for _ in writer.copy(source, entry):
                    check()
                continue
            tensor = read_entry(source, entry).to(getattr(torch, DTYPES[code(entry)]))
            for place, values in what.parts.get(entry.name, ()):
                tensor[place.first : place.last] = values().to("cpu", tensor.dtype)
            writer.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _itemsize(code: str) -> int:
    dtype: torch.dtype = getattr(torch, DTYPES[code])
    return dtype.itemsize


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """A configuration that names ``dtype`` wherever it names one, of a part of the model as well."""
    named = rb'("(?:torch_)?dtype"\s*:\s*")(?:float16|bfloat16|float32|float64)(")'
    return re.sub(named, rb"\g<1>" + dtype.encode() + rb"\g<2>", config)


def _with_size(index: bytes, checkpoint: Checkpoint, dtypes: Mapping[str, str]) -> bytes:
    """An index that tells the new number of bytes, if it tells any."""
    fields = json.loads(index)
    if "total_size" not in (fields.get("metadata") or {}):
        return index
    for _, entry in checkpoint.entries():
        if entry.name in dtypes:
            fields["metadata"]["total_size"] += entry.size * _itemsize(dtypes[entry.name]) - entry.nbytes
    return json.dumps(fields, indent=2).encode() + b"\n"


def unplaced(name: str) -> NMSolveError:
    """What is wrong with a weight that lies in no tensor of the checkpoint."""
    return NMSolveError(
        f"model: {name} is put together from several tensors of the checkpoint, so that its mask fits none "
        f"of them; leave it dense: dense={name.rpartition('.')[0]!r}"
    )
