"""In place of a GPU: kernels are compiled to PTX as ever and their launches emulated, on CPU tensors.

``kernel[grid](...)`` goes through Triton's binder, specialisation, cache and packing of arguments; only the
driver and the assembler (ptxas) are replaced. TRITON_INTERPRET must not be set when triton is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emulator.launch import Launch, Settings
from emulator.machine import Kernel
from emulator.parse import PtxError

TARGETS = (80, 90, 100)
"""Compute capabilities of the GPUs that the kernels are tuned for."""

SETTINGS = Settings()
"""Of launches from now on; tests change them."""

LAUNCHES: list[Launch] = []
"""Every launch of this process."""

_KERNELS: dict[tuple[str, bool], Kernel] = {}
_KERNELS_AT_MOST = 64
_pointed_at: list[tuple[int, int]] = []  # byte ranges that pointers within the tensors of a launch lead to


class Driver:
    """All that compiling and launching ask of a driver."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def install(capability: int) -> None:
    """From now on CPU tensors go to kernels compiled for ``sm_<capability>``, which are emulated."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    from nmsolve.backends.triton import masks as gpu

    if not isinstance(gpu.exact_kernel, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled")
    driver.set_active(Driver(capability))
    CUDABackend.make_cubin = lambda self, src, metadata, options, capability: b"none"
    # Nobody who has a GPU may find these in the cache.
    CUDABackend.hash = lambda self: f"emulated-{self.target.arch}"
    CompiledKernel._init_handles = _init_handles
    gpu.why_not = _why_not
    gpu._table = _remembering(getattr(gpu._table, "original", gpu._table))


def _init_handles(compiled: Any) -> None:
    if compiled.module is None:
        compiled.module = compiled.function = 1
        by_property = isinstance(getattr(type(compiled), "run", None), property)  # since Triton 3.5
        setattr(compiled, "_run" if by_property else "run", functools.partial(_launch, compiled))


def _why_not(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"the emulator runs CPU tensors, and this one is on {device}"


def _remembering(make: Any) -> Any:
    """The maker of a group's table, whose pointers' tensors the launch may touch."""

    def table(members: Any, *rest: Any) -> Any:
        tensors = [tensor for member in members for tensor in (member.scores, *member.result)]
        _pointed_at[:] = [span for tensor in tensors if tensor is not None for span in byte_range(tensor)]
        return make(members, *rest)

    table.original = make  # type: ignore[attr-defined]
    return table


def byte_range(tensor: Tensor) -> list[tuple[int, int]]:
    """From the first to the last byte of a tensor; none of an empty one."""
    if not tensor.numel():
        return []
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return [(start, start + (last + 1) * tensor.element_size())]


def kernel_of(text: str) -> Kernel:
    """The translation of PTX; the last ones are kept."""
    key = text, SETTINGS.contracted
    if key not in _KERNELS:
        while len(_KERNELS) >= _KERNELS_AT_MOST:
            del _KERNELS[next(iter(_KERNELS))]  # the oldest
        _KERNELS[key] = Kernel(text, contracted=SETTINGS.contracted)
    return _KERNELS[key]


def _launch(
    compiled: Any, across: int, down: int, deep: int, stream: int, function: Any, packed: Any, metadata: Any,
    enter: Any, leave: Any, *arguments: Any,
) -> None:  # fmt: skip
    """What the launcher of a compiled kernel is called with."""
    kernel = kernel_of(compiled.asm["ptx"])
    values: list[int] = []
    ranges = list(_pointed_at)
    for name, argument in zip(compiled.src.signature, arguments, strict=True):
        for kind, leaf in _leaves(compiled.src.signature[name], argument):
            values.append(_bits(name, kind, leaf))
            if isinstance(leaf, Tensor):
                ranges += byte_range(leaf)
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(compiled.metadata, scratch, 0):
            raise PtxError(f"{kernel.program.name}: {scratch} is not known")
    scratch_pointers = len(kernel.program.parameters) - len(values)
    if not 0 <= scratch_pointers <= 2:
        raise PtxError(f"{kernel.program.name}: {len(values)} arguments")
    values += [0] * scratch_pointers
    if compiled.metadata.num_warps * 32 != kernel.program.threads or compiled.metadata.num_ctas != 1:
        raise PtxError(f"{kernel.program.name}: clusters and warps that specialise are not known")
    if min(across, down, deep) < 1 or across >= 1 << 31 or max(down, deep) > 65535:
        raise PtxError(f"{kernel.program.name}: CUDA refuses the grid {across, down, deep}")
    grid = across, down, deep
    LAUNCHES.append(Launch(kernel, grid, values, ranges, compiled.metadata.shared, SETTINGS))


def _leaves(kinds: Any, argument: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of an argument, or of the members of a tuple; constexpr ones are not passed."""
    if isinstance(kinds, tuple | list):
        for kind, member in zip(kinds, argument, strict=True):
            yield from _leaves(kind, member)
    elif kinds != "constexpr":
        yield kinds, argument


def _bits(name: str, kind: str, leaf: Any) -> int:
    """An argument as the integer that its parameter holds."""
    if kind.startswith("*"):
        return 0 if leaf is None else leaf.data_ptr()
    if kind == "fp32":
        return int(np.float32(leaf).view(np.uint32))
    if kind == "fp64":
        return int(np.float64(leaf).view(np.uint64))
    width, number = int(kind.lstrip("iu")), int(leaf)
    if not -(1 << (width - 1)) <= number < 1 << width:
        raise OverflowError(f"{name}={number} does not fit {kind}")
    return number
