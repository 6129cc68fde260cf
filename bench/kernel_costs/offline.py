"""Compiling kernels for GPUs that are not here, and reading the machine code.

The compiler can abort its process, so jobs run in children: :func:`compile_all` starts some at a time. A job
is a plain dict; :func:`jobs_of` makes those of the configurations that nmsolve ships.

The NVIDIA tools (ptxas, cuobjdump, nvdisasm) come with the triton wheel; nothing else is needed.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import ROOT

from kernel_costs import sass, source_regions

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
OTHER_TARGETS = ("sm_86", "sm_89", "sm_120", "gfx90a", "gfx950", "gfx1100", "gfx1201")
"""GPUs that the launch table is not made for, but that users have."""

STRIP = 64
"""Rows of a strip of the hierarchical masks that are counted, which keep 2 of 4 of M."""

# One process compiles a few jobs: starting one costs as much as a job.
_JOBS_PER_PROCESS = 12
# A job that has not ended by then is ended, and is one that fails.
_SECONDS = 600


def compile_all(
    jobs: Iterable[dict[str, Any]], *, processes: int = 2, triton: Path | None = None
) -> Iterator[dict[str, Any]]:
    """Compile every job; yields ``job | result``, where a result may be ``{"error": ...}``.

    ``triton`` is the folder of another Triton than the one that is installed.
    """
    queue = list(jobs)
    chunks = [queue[i : i + _JOBS_PER_PROCESS] for i in range(0, len(queue), _JOBS_PER_PROCESS)]
    with ThreadPoolExecutor(processes) as pool:
        for results in pool.map(lambda chunk: _compile_chunk(chunk, triton), chunks):
            yield from results


def _compile_chunk(jobs: list[dict[str, Any]], triton: Path | None) -> list[dict[str, Any]]:
    """One child for all of them; if it dies, a child for each."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"} | import_first(triton)
        child = subprocess.run(
            [sys.executable, "-m", "kernel_costs.offline"],
            cwd=ROOT / "bench",
            input=json.dumps(jobs),
            capture_output=True,
            text=True,
            env=environment,
        )
    results = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    if len(results) == len(jobs):
        return results
    if len(jobs) > 1:
        return [result for job in jobs for result in _compile_chunk([job], triton)]
    return [jobs[0] | {"error": f"exit code {child.returncode}: {child.stderr[-2000:]}"}]


def import_first(*folders: Path | None) -> dict[str, str]:
    """What makes a child import the packages in folders, None being those that are installed."""
    named = [str(folder) for folder in folders if folder is not None]
    path = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*named, path] if path else named)} if named else {}


def jobs_of(
    kernel: str, m: int, target: str, dtype: str = "float32", **options: Any
) -> Iterator[dict[str, Any]]:
    """The job of one shipped configuration: ``kernel`` is a key of :data:`KERNELS`.

    Options: ``edge`` (partial blocks), ``padded``, ``packed``, ``warm``, ``solution``, ``transport``;
    ``tile`` (rows_in, cols_in, blocks, warps) in place of the launch table's; for Sinkhorn ``cols`` (default
    m), ``keep``, ``tolerance``; for the gather ``norm``; for the exhaustive one, whole groups and the
    largest columns ``n``; for strips ``v`` and ``k``; for maxima ``parts``.
    """
    yield {"kernel": kernel, "m": m, "target": target, "dtype": dtype, "options": options}


_EXACT = ("exact.py", "ascent.py", "paths.py")
KERNELS = {
    "exact": (_EXACT, "exact_kernel"),
    "exhaustive": (("exhaustive.py",), "exhaustive_kernel"),
    "grouped": (("grouped.py", *_EXACT), "grouped_kernel"),
    "grouped_exhaustive": (("grouped.py", "exhaustive.py"), "grouped_exhaustive_kernel"),
    "dykstra": (("dykstra.py",), "dykstra_kernel"),
    "nm": (("nm.py",), "nm_kernel"),
    "nm_groups": (("nm_groups.py",), "nm_groups_kernel"),
    "strips": (("strips.py",), "strips_kernel"),
    "sinkhorn_forward": (("sinkhorn.py",), "sinkhorn_forward_kernel"),
    "sinkhorn_backward": (("sinkhorn_gradient.py", "sinkhorn.py"), "sinkhorn_backward_kernel"),
    "gather": (("gather.py",), "permute_columns_kernel"),
    "maxima": (("maxima.py",), "sum_maxima_kernel"),
    "add_parts": (("maxima.py",), "add_parts_kernel"),
    "nth_largest": (("maxima.py", "nm_groups.py"), "nth_largest_kernel"),
    "sum_largest": (("maxima.py", "nm_groups.py"), "sum_largest_kernel"),
}
"""Files and function of each kernel."""


def sources_of(kernel: str) -> source_regions.Sources:
    """The regions of the sources that a kernel is made from."""
    folder = ROOT / "kernels"
    files, entry = KERNELS[kernel]
    return source_regions.Sources([folder / file for file in (*files, "_tile.py")], entry)


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
    """(kernel, positional arguments, meta) as nmsolve's launchers pass them; dtypes stand for pointers."""
    import torch

    scores = getattr(torch, job["dtype"])
    if job["kernel"] in (
        "exact",
        "exhaustive",
        "grouped",
        "grouped_exhaustive",
        "dykstra",
        "nm",
        "nm_groups",
    ):
        return _block_arguments(job, scores)
    if job["kernel"] == "strips":
        return _strip_arguments(job)
    if job["kernel"] in ("maxima", "add_parts", "nth_largest", "sum_largest"):
        return _maxima_arguments(job, scores)
    return _permute_arguments(job, scores)


def _maxima_arguments(job: dict[str, Any], dtype: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    import torch
    from nmsolve.kernels import _launch, maxima

    from nmsolve.backends.triton import permutations as gpu_permute

    m, options, bits = job["m"], job["options"], dtype.itemsize * 8
    if job["kernel"] == "maxima":
        sums = dtype if options.get("parts", True) else torch.float64
        positional = [dtype, dtype, torch.int64, sums, 4, 512, 512, 8192, 1024, 512 * 8192, 8192, 8192]
        return maxima.sum_maxima_kernel, positional, gpu_permute.maxima_arguments(bits)
    if job["kernel"] == "add_parts":
        meta = {"PARTS": 8, "ENTRIES": _launch.PARTS_ENTRIES, **_launch.options(warps=4)}
        return maxima.add_parts_kernel, [dtype, torch.float64, 1 << 20], meta
    n = options.get("n", m // 2)
    if job["kernel"] == "sum_largest":
        positional = [dtype, torch.int64, torch.int64, torch.float64, 2 * m, 70, 8192, 8192]
        return maxima.sum_largest_kernel, positional, gpu_permute.sorting_arguments(n, m, bits, warps=1)
    meta = gpu_permute.sorting_arguments(n, m - 1, bits, warps=4)
    return maxima.nth_largest_kernel, [dtype, torch.int64, dtype, 8192, 8192], meta


def _strip_arguments(job: dict[str, Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    import torch
    from nmsolve.kernels import strips

    from nmsolve.backends.triton.strips import strip_tile

    v, n, k = job["options"].get("v", STRIP), 2, job["options"].get("k", 4)
    positional = [*[torch.float64] * 4, torch.int64, torch.int8, n, job["m"], v, k, 1 << 18]
    amd = job["target"].startswith("gfx")
    return strips.strips_kernel, positional, strip_tile(v, job["m"], k, amd=amd)


def _block_arguments(job: dict[str, Any], scores: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    import torch
    from nmsolve.kernels import _launch, dykstra, exact, exhaustive, grouped, nm, nm_groups

    from nmsolve.backends.triton import masks as gpu
    from nmsolve.pattern import NMPattern

    m, options = job["m"], job["options"]
    matrix = (8192, 8192, 1, 8192 * 8192, 8192, 1)
    if job["kernel"] == "nm":
        size, groups = _launch.group_tile(m, scores.itemsize * 8)
        meta = {"SIZE": size, "GROUPS": groups, **_launch.options(warps=1)}
        return nm.nm_kernel, [scores, torch.uint8, 2, m, *matrix], meta
    if job["kernel"] == "nm_groups":
        pattern = NMPattern(options.get("n", m // 2), m)
        meta = gpu.whole_groups_arguments(pattern, scores.itemsize * 8)
        return nm_groups.nm_groups_kernel, [scores, torch.int32, 8192 * 8192 // m], meta
    if job["kernel"].endswith("exhaustive"):
        packed = options.get("packed", True)
        meta = gpu.exhaustive_arguments(NMPattern(options.get("n", 2), m)) | {"PACKED": packed}
        if job["kernel"] == "grouped_exhaustive":
            meta["ELEMENT"] = gpu._ELEMENTS[scores]
            return grouped.grouped_exhaustive_kernel, [torch.int64, 40], meta
        mask = torch.int32 if packed else torch.uint8
        return exhaustive.exhaustive_kernel, [scores, mask, *matrix, 0, 0, 2048, 2048], meta
    edge = options.get("edge", False)
    tile = gpu._exact_tile(edge, m)
    packed = options.get("packed", not edge and m % 4 == 0)
    if job["kernel"] == "dykstra":
        tile = gpu.dykstra_tile(m, scores, transport=options.get("transport", True), packed=packed)
    if "tile" in options:
        tile = _launch.Tile(tile.size, *options["tile"])
    meta = gpu.tile_arguments(tile, amd=job["target"].startswith("gfx")) | {
        "PADDED": edge or tile.size != m,
        "SLACK": edge,
        "PACKED": packed,
    }
    mask = torch.int32 if packed else torch.uint8
    if job["kernel"] == "dykstra":
        meta["TRANSPORT"] = options.get("transport", True)
        return dykstra.dykstra_kernel, [scores, mask, 2, m, *matrix, 0, 0, 512, 512, 1, 300, 150.0], meta
    if job["kernel"] == "grouped":
        meta |= {"ELEMENT": gpu._ELEMENTS[scores], "SOLUTION": options.get("solution", False)}
        return grouped.grouped_kernel, [torch.int64, 40, 2, m, 1], meta | {"SCHEDULE": gpu.SCHEDULE}
    duals = torch.float64 if job["dtype"] == "float64" else torch.float32
    meta |= {"WARM": options.get("warm", False), "SOLUTION": options.get("solution", False)}
    outputs = [duals, duals, torch.float64, torch.float64] if meta["SOLUTION"] else [None] * 4
    warm = [duals, duals] if meta["WARM"] else [None] * 2
    positional = [scores, mask, *outputs, *warm, 2, m, *matrix, 0, 0, 512, 512, 512, 512, 1]
    return exact.exact_kernel, positional, meta | {"SCHEDULE": gpu.SCHEDULE}


def _permute_arguments(job: dict[str, Any], dtype: Any) -> tuple[Any, list[Any], dict[str, Any]]:
    import torch
    from nmsolve.kernels import _launch, gather, sinkhorn, sinkhorn_gradient

    from nmsolve.backends.triton import permutations as gpu_permute

    options = job["options"]
    if job["kernel"] == "gather":
        norm = options.get("norm", False)
        per_row, per_col, warps = gpu_permute.NORM_TILE if norm else gpu_permute.GATHER_TILE
        positional = [dtype, torch.int64, dtype, dtype, 8192, 8192, 8192, 1, 1e-6]
        meta = {"NORM": norm, "ROWS": per_row, "COLS": per_col, **_launch.options(warps)}
        return gather.permute_columns_kernel, positional, meta
    rows, real, amd = job["m"], torch.float32, job["target"].startswith("gfx")
    cols = options.get("cols", rows)
    strides = (rows * cols, cols, 1)
    keep, tolerance = options.get("keep", False), options.get("tolerance", False)
    backward = job["kernel"] == "sinkhorn_backward"
    plain = not (backward or keep or tolerance)
    tile = gpu_permute.sinkhorn_tile(rows, cols, backward=backward, plain=plain, amd=amd)
    if "tile" in options:
        tile = gpu_permute.SinkhornTile(*options["tile"])
    if not backward:
        sizes = [1000, rows, cols, *strides, rows, cols, 14.4, 20, 0.1, 1]
        return (
            sinkhorn.sinkhorn_forward_kernel,
            [dtype, *[real] * 5, torch.int32, *sizes],
            {"KEEP": keep, "TOLERANCE": tolerance, **tile.meta(amd=amd)},
        )
    sizes = [1000, rows, cols, *strides, *strides, rows, cols, 14.4, 10.0, 20, 1]
    positional = [real, dtype, *[real] * 4, torch.int32, real, dtype, *sizes]
    return sinkhorn_gradient.sinkhorn_backward_kernel, positional, tile.meta(amd=amd)


def _compile(job: dict[str, Any]) -> dict[str, Any]:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import MockTensor

    kernel, positional, meta = _arguments(job)
    name = job["target"]
    if name.startswith("sm_"):
        target = GPUTarget("cuda", int(name[3:]), 32)
    else:
        target = GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    driver.set_active(_Driver(target))
    kernel.device_caches.clear()  # it does not know targets
    compiled = kernel.warmup(*map(MockTensor.wrap_dtype, positional), grid=(1,), **meta)
    numbers = {name: value for name, value in meta.items() if isinstance(value, int | float)}
    return resources(compiled, sources_of(job["kernel"])) | {"meta": numbers}


def resources(compiled: Any, sources: source_regions.Sources) -> dict[str, Any]:
    """Registers, bytes of stack and shared memory, loads and stores of spilled registers, loops, phases.

    ``spills`` counts local-memory instructions (NVIDIA) or spilled registers (AMD). A stack without them is
    what calls of the 64-bit division subroutine ask for. ``loops`` are the opcodes of every loop, ``phases``
    the instructions by region of the source (or why there are none), see :func:`source_regions.phases`.
    """
    if "hsaco" in compiled.asm:
        text = compiled.asm["amdgcn"]
        found = {
            name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
            for name in (
                "vgpr_count", "vgpr_spill_count", "private_segment_fixed_size",
                "group_segment_fixed_size",
            )
        }  # fmt: skip
        return {
            "registers": found["vgpr_count"],
            "spills": found["vgpr_spill_count"],
            "stack": found["private_segment_fixed_size"],
            "shared": max(found["group_segment_fixed_size"], compiled.metadata.shared),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "--dump-resource-usage", file.name)
        code = sass.parse(_nvidia_tool("nvdisasm", "-g", "-c", file.name))
    sizes = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    blocks = sass.basic_blocks(code)
    loops = [
        Counter(line.name for b in loop.body for line in code[blocks[b].first : blocks[b].last])
        for loop in sass.natural_loops(blocks)
    ]
    try:
        phases: dict[str, Any] | str = source_regions.phases(code, sources)
    except ValueError as error:
        phases = str(error)
    opcodes = Counter(line.name for line in code)
    return {
        "registers": sizes["REG"],
        "spills": opcodes["LDL"] + opcodes["STL"],
        "stack": sizes["STACK"],
        "shared": max(sizes["SHARED"], compiled.metadata.shared),
        "local": sizes["LOCAL"],
        "instructions": len(code),
        "loops": [dict(loop) for loop in loops],
        "phases": phases,
    }


def _nvidia_tool(name: str, *arguments: str) -> str:
    """Output of a program of the triton wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    command = [tools / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def main() -> None:
    for job in json.load(sys.stdin):
        # Of the processor, not of the clock: a busy machine is no fault of the compiler's.
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time()) + _SECONDS, -1))
        try:
            result = _compile(job)
        except Exception as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            result = {"error": " <- ".join(f"{type(cause).__name__}: {cause}" for cause in causes)[-3000:]}
        print(json.dumps(job | result, default=str), flush=True)


if __name__ == "__main__":
    main()
