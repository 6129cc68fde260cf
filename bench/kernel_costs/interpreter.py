"""Triton's interpreter, made fast enough to test with and strict enough to trust.

:func:`install` changes the interpreter of the running process (TRITON_INTERPRET=1 has to be set before triton
is imported) in five ways:

- ``triton.language`` is patched once per launch and not again at every call of a jitted helper;
- what belongs to a type (its name, checked shape and NumPy dtype) is worked out once, not for every value;
- reductions with a custom combine function run on whole arrays, not element by element, and combine lanes in
  the order of the compiled code;
- ``tl.device_assert`` is checked;
- a load or store outside the launch's tensors, or a store to where another program has stored, is an error.

The tensors of a group launch are those that its table is made from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.runtime.interpreter as interpreter

_installed = False


def install() -> None:
    """Change the interpreter of this process; calls after the first do nothing."""
    global _installed
    if not _installed:
        _installed = True
        _patch_once_per_launch()
        _remember_types()
        _reduce_whole_arrays()
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, debug=True)
        _guard_memory()


def _patch_once_per_launch() -> None:
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    nothing = getattr(interpreter, "_LangPatchScope", lambda: None)  # None before Triton 3.6
    patched: set[int] = set()

    def patch_if_new(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module in patched:
            return nothing()
        patched.add(module)
        return patch(fn)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            with np.errstate(all="ignore"):  # infinities are ordinary values in lanes that are masked later
                return call(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_if_new
    interpreter.GridExecutor.__call__ = launch


def _remember_types() -> None:
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    make_type, make_tensor, numpy_dtype = (
        core.block_type.__init__,
        core.tensor.__init__,
        interpreter._get_np_dtype,
    )
    broadcast = semantic.broadcast_impl_value
    types: dict[Any, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}
    alike: dict[tuple[str, str], bool] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name], handle=handle, type=type)

    def dtype_of(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(dtype)
        return dtypes[name]

    def broadcast_unless_alike(self: Any, lhs: Any, rhs: Any) -> Any:
        """Blocks of the same shape are returned as they are."""
        names = lhs.type.name, rhs.type.name
        if names not in alike:
            blocks = lhs.type.is_block() and rhs.type.is_block()
            alike[names] = blocks and [*lhs.type.shape] == [*rhs.type.shape]
        return (lhs, rhs) if alike[names] else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = dtype_of
    semantic.broadcast_impl_value = broadcast_unless_alike


def _reduce_whole_arrays() -> None:
    def generic_reduce(self: Any, inputs: Any) -> list[Any]:
        whole = self.axis is None
        inputs, axis = self.unravel(inputs, self.axis)
        arrays = [x.handle.data for x in inputs]

        def at(index: int) -> tuple[Any, ...]:
            slices = (np.ascontiguousarray(np.take(a, index, axis=axis)) for a in arrays)
            return tuple(self.to_tensor(s, x.dtype) for s, x in zip(slices, inputs, strict=True))

        def combined(some: Any, more: Any) -> Any:
            total = self.combine_fn.fn(*some, *more)
            return total if isinstance(total, tuple) else (total,)

        parts = [at(index) for index in range(arrays[0].shape[axis])]
        for span in _spans(arrays[0].shape, axis):
            parts = [
                combined(parts[k], parts[k + span // 2])
                for first in range(0, len(parts), span)
                for k in range(first, first + span // 2)
            ]
        total: Any = parts[0]
        for part in parts[1:]:
            total = combined(total, part)
        results = []
        for value, x in zip(total, inputs, strict=True):
            data = value.handle.data
            if self.keep_dims:
                axes = tuple(range(arrays[0].ndim)) if whole else axis
                data = np.expand_dims(data.reshape(()) if whole else data, axes)
            elif whole or arrays[0].ndim == 1:
                data = data.item()
            results.append(self.to_tensor(data, x.dtype))
        return results

    interpreter.ReduceOps.generic_reduce = generic_reduce


def _spans(shape: tuple[int, ...], axis: int | None) -> Iterator[int]:
    """Of how many lanes an axis is dealt to the one half is combined with the other, step after step.

    Each lane with the one half of the lanes away, first within the warp, then among warps, as it is compiled;
    for sums that are rounded the order matters. Axes that lie in one lane are combined in their order.
    """
    if len(shape) != 5 or axis not in (3, 4):
        return
    lanes = min(shape[axis], 32 // shape[4] if axis == 3 else 32)
    for together in (lanes, shape[axis] // lanes):
        while together > 1:
            yield together
            together //= 2


def _guard_memory() -> None:
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    prepare, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store
    ranges: list[tuple[int, int]] = []
    written: dict[tuple[int, ...], np.ndarray] = {}
    group = _last_group()

    def add_range(argument: Any) -> None:
        if hasattr(argument, "data_ptr"):
            if argument.numel():
                last = sum((n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True))
                start = argument.data_ptr()
                ranges.append((start, start + (last + 1) * argument.element_size()))
        elif isinstance(argument, tuple | list):
            for item in argument:
                add_range(item)

    def checked_prepare(self: Any, args: Any, kwargs: Any) -> Any:
        prepared = prepare(self, args, kwargs)
        ranges.clear()
        written.clear()
        add_range([*prepared[0], *prepared[1].values()])
        for argument in (*args, *kwargs.values()):
            if group and argument is group[-1][0]:
                add_range(group[-1][1])
        return prepared

    def addresses(pointers: Any, mask: Any, what: str) -> np.ndarray:
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        found = pointers.data[active]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(found.shape, bool)
        for start, end in ranges:
            inside |= (found >= start) & (found + np.uint64(size) <= end)
        if not inside.all():
            program = interpreter.interpreter_builder.grid_idx
            raise IndexError(f"{what} out of bounds: {int((~inside).sum())} elements, program {program}")
        return found

    def checked_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        addresses(pointers, mask, "load")
        mask.data = mask.data.astype(bool, copy=False)  # in Triton 3.9 a scalar makes it integers
        return load(self, pointers, mask, *args)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        found = addresses(pointers, mask, "store")
        program = self.grid_idx
        for other, theirs in written.items():
            if other != program and np.isin(found, theirs).any():
                raise RuntimeError(f"programs {other} and {program} store to the same address")
        written[program] = np.concatenate([written.get(program, found[:0]), found])
        return store(self, pointers, value, mask, *args)

    executor._init_args_hst = checked_prepare
    builder.create_masked_load = checked_load
    builder.create_masked_store = checked_store


def _last_group() -> list[tuple[Any, Any]]:
    """A list that holds the table that the Triton backend made last, and the tensors that it points to."""
    from nmsolve.backends.triton import masks as gpu

    make = gpu._table
    last: list[tuple[Any, Any]] = []

    def make_and_tell(members: Any, *args: Any) -> Any:
        table, programs = make(members, *args)
        last[:] = [(table, [tensor for member in members for tensor in (member.scores, *member.result)])]
        return table, programs

    gpu._table = make_and_tell
    return last
