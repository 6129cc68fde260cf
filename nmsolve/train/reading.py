"""Modules that read the weight of a layer inside them, instead of calling the layer.

Such a module computes with the parameter, not with what a masked layer multiplies by: fused kernels of state
space models take ``self.out_proj.weight``, attention hands ``self.q_proj.weight`` to a function. Whether a
class does so is in the code of its ``forward`` and of the methods that this one names.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn

__all__ = ["reader_of"]

# What is asked of a weight without computing with it.
_ASKED = {
    "data_ptr", "device", "dim", "dtype", "element_size", "grad", "is_contiguous", "is_cuda", "is_meta",
    "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride",
}  # fmt: skip


# Instructions that may stand between a name and what is loaded of it.
_SILENT = ("EXTENDED_ARG", "PUSH_NULL")


def reader_of(model: nn.Module, name: str) -> nn.Module | None:
    """The module around the layer ``name`` that reads ``<layer>.weight`` itself, if there is one."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        outer = model.get_submodule(".".join(parts[:depth]))
        # The first asks for hooks before it reads, see mask_module; Bloom reads in a mode that is off.
        if isinstance(outer, nn.TransformerEncoderLayer) or getattr(outer, "slow_but_exact", None) is False:
            continue
        if (*parts[depth:], "weight") in _paths_read(type(outer)):  # type: ignore[arg-type]
            return outer
    return None


@functools.cache
def _paths_read(kind: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Attributes of ``self`` that ``forward`` and the methods that it names compute with: ``(a, b)`` of
    ``self.a.b``.
    """
    found: set[tuple[str, ...]] = set()
    todo, seen = ["forward"], set()
    while todo:
        name = todo.pop()
        own = name == "forward" or not hasattr(nn.Module, name)
        function = inspect.unwrap(getattr(kind, name)) if own and hasattr(kind, name) else None
        if name in seen or not inspect.isfunction(function):
            continue
        seen.add(name)
        for path in _paths_in(function.__code__):
            found.add(path)
            todo.append(path[0])
    return frozenset(found)


def _paths_in(code: CodeType) -> Iterator[tuple[str, ...]]:
    """Every ``a.b`` of ``self.a.b`` that is loaded; one that ends in an attribute of _ASKED is left out."""
    path: list[str] | None = None
    before: object = None
    for step in (*(s for s in dis.get_instructions(code) if s.opname not in _SILENT), None):
        if path is not None and step is not None and step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            path.append(step.argval)
            continue
        if path:
            yield from _read(path)
        loaded = step.argval if step is not None and step.opname.startswith("LOAD_") else None
        last = loaded[-1:] if isinstance(loaded, tuple) else (loaded,)  # Python 3.13 loads two at once
        path = [] if last == ("self",) and before != "isinstance" else None
        before = loaded
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _paths_in(constant)


def _read(path: list[str]) -> Iterator[tuple[str, ...]]:
    """``self.a.weight.t`` reads ``a.weight``; ``self.a.weight.dtype`` does not."""
    if "weight" in path[1:]:
        end = path.index("weight", 1) + 1
        if path[end : end + 1] and path[end] in _ASKED:
            return
        path = path[:end]
    yield tuple(path)
