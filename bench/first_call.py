"""What the first call costs: importing, compiling the CPU backend once, and loading it in later processes.

Writes bench/results/first_call.csv. Each case runs in a process of its own with a Numba cache folder that
starts empty: the first process compiles, the second finds the compiled code there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

from common import RESULTS, table, write_csv

CALLS = {
    "exact": "nmsolve.transposable_mask(scores, 8, 16)",
    "exact with certificate": "nmsolve.transposable_mask(scores, 8, 16, return_solution=True)",
    "greedy": "nmsolve.transposable_mask(scores, 8, 16, method='greedy')",
    "tsenor": "nmsolve.transposable_mask(scores, 8, 16, method='tsenor')",
    "ordinary N:M": "nmsolve.nm_mask(scores, 8, 16)",
}
LIMITS = {"empty": 30.0, "filled": 1.0}

CODE = """
import json, time, torch
start = time.perf_counter()
import nmsolve
nmsolve.transposable_mask, nmsolve.nm_mask
imported = time.perf_counter()
scores = torch.randn(256, 256).abs()
called = time.perf_counter()
{call}
first = time.perf_counter()
{call}
second = time.perf_counter()
print(json.dumps({{"import": imported - start, "first": first - called, "second": second - first}}))
"""


def main() -> int:
    rows = []
    for method, call in CALLS.items():
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "filled"):
                done = subprocess.run(
                    [sys.executable, "-c", CODE.format(call=call)],
                    env={**os.environ, "NUMBA_CACHE_DIR": cache},
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                got = json.loads(done.stdout)
                rows.append(
                    {
                        "method": method,
                        "cache": state,
                        "import_seconds": got["import"],
                        "first_call_seconds": got["first"],
                        "second_call_seconds": got["second"],
                        "holds": "yes" if got["first"] <= LIMITS[state] and got["import"] <= 1 else "NO",
                    }
                )
    head = list(rows[0])
    print(
        table(
            [head, *([f"{v:.3f}" if isinstance(v, float) else v for v in row.values()] for row in rows)],
            "llrrrl",
        )
    )
    write_csv(RESULTS / "first_call.csv", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
