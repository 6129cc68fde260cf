"""Compiling kernels for GPUs that are not here, and reading the machine code.

The compiler can abort its process, so jobs run in children: :func:`compile_all` starts some at a time. A job
is a plain dict; :func:`jobs_of` makes those of the configurations that nmsolve ships.

The NVIDIA tools (ptxas, cuobjdump, nvdisasm) come with the triton wheel; nothing else is needed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

# One process compiles a few jobs: starting one costs as much as a job.
_JOBS_PER_PROCESS = 6


def compile_all(jobs: Iterable[dict[str, Any]], *, processes: int = 2) -> Iterator[dict[str, Any]]:
    """Compile every job; yields ``job | result``, where a result may be ``{"error": ...}``."""
    queue = list(jobs)
    chunks = [queue[i : i + _JOBS_PER_PROCESS] for i in range(0, len(queue), _JOBS_PER_PROCESS)]
    with ThreadPoolExecutor(processes) as pool:
        for results in pool.map(_compile_chunk, chunks):
            yield from results


def _compile_chunk(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One child for all of them; if it dies, a child for each."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"}
        child = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env=environment,
            timeout=600,
        )
    results = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if len(results) == len(jobs):
        return results
    if len(jobs) > 1:
        return [result for job in jobs for result in _compile_chunk([job])]
    return [jobs[0] | {"error": f"exit code {child.returncode}: {child.stderr[-2000:]}"}]


def jobs_of(
    kernel: str, m: int, target: str, dtype: str = "float32", **options: bool
) -> Iterator[dict[str, Any]]:
    """The job of one shipped configuration: ``kernel`` is exact, dykstra or nm.

    Options: ``edge`` (partial blocks), ``padded``, ``packed``, ``warm``, ``solution``, ``transport``.
    """
    yield {"kernel": kernel, "m": m, "target": target, "dtype": dtype, "options": options}


# --- inside the child ---------------------------------------------------------------------------------------


class _Driver:
    """All that compiling asks of a driver."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _arguments(job: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """(kernel, positional arguments, meta) as nmsolve.gpu passes them; dtypes stand for pointers."""
    import torch
    from nmsolve.kernels import _launch, dykstra, exact, nm

    from nmsolve import gpu

    m, options = job["m"], job["options"]
    scores = getattr(torch, job["dtype"])
    matrix = (8192, 8192, 1, 8192 * 8192, 8192, 1)
    if job["kernel"] == "nm":
        size, groups = _launch.group_tile(m, scores.itemsize * 8)
        return nm.nm_kernel, [scores, torch.uint8, 2, m, *matrix], {
            "SIZE": size,
            "GROUPS": groups,
            "num_warps": 1,
        }  # fmt: skip
    edge = options.get("edge", False)
    table = "dykstra" if job["kernel"] == "dykstra" else "exact_edge" if edge else "exact"
    tile = _launch.tile(table, m)
    packed = options.get("packed", not edge and m % 4 == 0)
    meta = gpu.tile_arguments(tile, amd=job["target"].startswith("gfx")) | {
        "PADDED": edge or tile.size != m,
        "SLACK": edge,
        "PACKED": packed,
    }
    mask = torch.int32 if packed else torch.uint8
    if job["kernel"] == "dykstra":
        meta["TRANSPORT"] = options.get("transport", True)
        return dykstra.dykstra_kernel, [scores, mask, 2, m, *matrix, 0, 0, 512, 512, 1, 300, 150.0], meta
    duals = torch.float64 if job["dtype"] == "float64" else torch.float32
    meta |= {"WARM": options.get("warm", False), "SOLUTION": options.get("solution", False)}
    outputs = [duals, duals, torch.float64, torch.float64] if meta["SOLUTION"] else [None] * 4
    warm = [duals, duals] if meta["WARM"] else [None] * 2
    positional = [scores, mask, *outputs, *warm, 2, m, *matrix, 0, 0, 512, 512, 512, 512, 1]
    return exact.exact_kernel, positional, meta | gpu.SCHEDULE


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import MockTensor

    kernel, positional, meta = _arguments(job)
    name = job["target"]
    target = GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)
    driver.set_active(_Driver(target))
    kernel.device_caches.clear()  # it does not know targets
    return resources(kernel.warmup(*map(MockTensor.wrap_dtype, positional), grid=(1,), **meta))


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory, loads and stores of spilled registers, loops.

    ``spills`` counts local-memory instructions (NVIDIA) or spilled registers (AMD). A stack without them is
    what calls of the 64-bit division subroutine ask for. ``loops`` are the opcodes of every loop by address.
    """
    if "hsaco" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
        }
        shared = int(re.search(r"\.group_segment_fixed_size:\s*(\d+)", text)[1])  # type: ignore[index]
        return {
            "registers": found["vgpr_count"],
            "spills": found["vgpr_spill_count"],
            "stack": found["private_segment_fixed_size"],
            "shared": shared,
        }
    usage = _cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    code = disassemble(compiled.asm["cubin"])
    opcodes = Counter(opcode.split(".")[0] for _, _, opcode, _ in code)
    return {
        "registers": sizes["REG"],
        "spills": opcodes["LDL"] + opcodes["STL"],
        "stack": sizes["STACK"],
        "shared": sizes["SHARED"],
        "local": sizes["LOCAL"],
        "instructions": len(code),
        "loops": [dict(loop) for loop in loops(code)],
    }


def _cuobjdump(cubin: bytes, *flags: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tools / "cuobjdump", *flags, file.name],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"},
        ).stdout


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);", re.MULTILINE)

Instruction = tuple[int, str, str, str]
"""(address, predicate, opcode, operands)."""


def disassemble(cubin: bytes) -> list[Instruction]:
    found = _LINE.findall(_cuobjdump(cubin, "-sass"))
    return [(int(address, 16), predicate.strip(), opcode, rest) for address, predicate, opcode, rest in found]


def loops(code: list[Instruction]) -> Iterator[Counter[str]]:
    """Opcode counts of every natural loop, innermost ones without their out-of-line slow paths.

    A loop is a backward branch's target with everything between; branches of diverged warps (BRA.DIV) and
    those that lead back from behind the kernel's EXIT (their slow paths) start none.
    """
    index = {address: k for k, (address, *_) in enumerate(code)}
    end = next(k for k, line in enumerate(code) if line[2] == "EXIT" and not line[1])
    for k, (address, _, opcode, rest) in enumerate(code[:end]):
        target = re.search(r"0x([0-9a-f]+)", rest)
        if opcode.split(".")[0] == "BRA" and ".DIV" not in opcode and target and int(target[1], 16) < address:
            yield Counter(line[2].split(".")[0] for line in code[index[int(target[1], 16)] : k + 1])


def main() -> None:
    for job in json.load(sys.stdin):
        try:
            result = _compile(job)
        except Exception as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            result = {"error": " <- ".join(f"{type(cause).__name__}: {cause}" for cause in causes)[-3000:]}
        print(json.dumps(job | result), flush=True)


if __name__ == "__main__":
    main()
