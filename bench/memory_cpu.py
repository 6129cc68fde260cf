"""Working memory on the CPU: the most that a call holds beyond its input and its output.

Writes bench/results/memory_cpu.csv. Each case runs in a process of its own. After a warm-up on a small matrix
the process's high-water mark is reset (/proc/self/clear_refs); what the mark then rises by, less the bytes of
the returned tensors, is the working memory.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from common import RESULTS, scores, table, write_csv
from torch import Tensor

import nmsolve

CASES = (
    ("exact", "cpu"),
    ("exact with certificate", "cpu"),
    ("greedy", "cpu"),
    ("tsenor", "cpu"),
    ("ordinary N:M", "cpu"),
    ("exact", "torch"),
)
PATTERNS = ((4, 8), (16, 32))
LIMIT = 0.10


def status(field: str) -> int:
    """A memory field of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def call(method: str, backend: str, matrix: Tensor, n: int, m: int) -> int:
    """Run one case; the bytes of what it returns."""
    if method == "ordinary N:M":
        return nmsolve.nm_mask(matrix, n, m, backend=backend).nbytes
    if method == "exact with certificate":
        solution = nmsolve.transposable_mask(matrix, n, m, backend=backend, return_solution=True)
        tensors = [getattr(solution, field.name) for field in dataclasses.fields(solution)]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
    return nmsolve.transposable_mask(matrix, n, m, method=method, backend=backend).nbytes


def measure(method: str, backend: str, n: int, m: int, side: int) -> dict[str, int]:
    matrix = scores("normal", (side, side))
    call(method, backend, matrix[: 8 * m, : 8 * m], n, m)
    ctypes.CDLL(None).malloc_trim(0)  # or freed pages that are still there would take what the call allocates
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    returned = call(method, backend, matrix, n, m)
    # The kernel counts pages per thread and adds them up late: the difference can be a little below zero.
    peak = max(0, status("VmHWM") - before - returned)
    return {"peak": peak, "returned": returned, "scores": matrix.nbytes}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=8192, help="rows and columns of the score matrix (8192)")
    parser.add_argument("--case", nargs=4, metavar=("METHOD", "BACKEND", "N", "M"), help="one case, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        method, backend, n, m = arguments.case
        print(json.dumps(measure(method, backend, int(n), int(m), arguments.side)))
        return 0

    rows = []
    for method, backend in CASES:
        for n, m in PATTERNS:
            # tsenor takes long; its working memory does not grow with the matrix: a smaller one is stricter.
            side = arguments.side // 4 if method == "tsenor" else arguments.side
            command = [
                sys.executable,
                __file__,
                "--side",
                str(side),
                "--case",
                method,
                backend,
                str(n),
                str(m),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            got = json.loads(done.stdout)
            share = got["peak"] / got["scores"]
            holds = ("yes" if share <= LIMIT else "NO") if backend == "cpu" else ""
            rows.append(
                {
                    "method": method,
                    "backend": backend,
                    "pattern": f"{n}:{m}",
                    "rows": side,
                    "cols": side,
                    "dtype": "float32",
                    "scores_mib": got["scores"] / 2**20,
                    "returned_mib": got["returned"] / 2**20,
                    "working_mib": got["peak"] / 2**20,
                    "working_share": share,
                    "holds": holds,
                }
            )
            print(
                f"{method}, {backend}, {n}:{m}: {got['peak'] / 2**20:.1f} MiB, {share:.1%} of the scores",
                flush=True,
            )
    if arguments.side == parser.get_default("side"):
        write_csv(RESULTS / "memory_cpu.csv", rows)
    head = ["method", "backend", "pattern", "working_share", "holds"]
    print(
        table(
            [
                head,
                *(
                    [f"{row[key]:.3g}" if key == "working_share" else row[key] for key in head]
                    for row in rows
                ),
            ],
            "lllrl",
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
