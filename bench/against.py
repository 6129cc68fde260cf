"""Are masks of ordinary scores made as fast as by another commit? Both in one run, in turn.

    python bench against COMMIT

Each checkout has a process of its own, which imports nmsolve from there; the two solve the same scores one
after the other, on one thread. Writes bench/results/against.csv: medians of both in processor time, which
other work on the machine disturbs less, and the median and quartiles of the ratios of neighbours, this
checkout's time over the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, replace_rows

FILE = "against.csv"
KEY = ("before", "what", "pattern", "dtype", "backend", "side")
CASES = [
    (what, pattern, dtype, "cpu", 2048)
    for what in ("mask", "solution")
    for pattern in ("2:4", "4:8", "8:16", "16:32")
    for dtype in ("float32", "bfloat16")
]
CASES += [
    ("ordinary", pattern, dtype, "cpu", 2048)
    for pattern in ("2:4", "8:16")
    for dtype in ("float32", "bfloat16")
]
CASES += [(what, "8:16", "float32", "torch", 128) for what in ("mask", "solution")]
CASES += [("assignment", "1:64", dtype, "cpu", 512) for dtype in ("float32", "float64")]
WHAT = tuple(dict.fromkeys(case[0] for case in CASES))

WORKER = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import torch
import nmsolve
assert nmsolve.__file__.startswith(sys.argv[1]), nmsolve.__file__
torch.set_num_threads(1)
for line in sys.stdin:
    what, pattern, dtype, backend, side = json.loads(line)
    n, m = map(int, pattern.split(":"))
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).abs().to(getattr(torch, dtype))
    calls = {
        "mask": lambda: nmsolve.transposable_mask(x, n, m, backend=backend),
        "solution": lambda: nmsolve.transposable_mask(x, n, m, backend=backend, return_solution=True),
        "ordinary": lambda: nmsolve.nm_mask(x, n, m, backend=backend),
        "assignment": lambda: nmsolve.assignment(x.view(-1, m, m), backend=backend),
    }
    start = time.process_time()
    calls[what]()
    print(time.process_time() - start, flush=True)
"""


class Worker:
    """A process that solves with the nmsolve of a checkout."""

    def __init__(self, root: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.child = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def seconds(self, case: tuple[Any, ...]) -> float:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        print(json.dumps(case), file=self.child.stdin, flush=True)
        return float(self.child.stdout.readline())

    def close(self) -> None:
        self.child.terminate()
        self.child.wait()


def compared(case: tuple[Any, ...], new: Worker, old: Worker, runs: int) -> dict[str, Any]:
    """Times of both, the first of each left out."""
    times = []
    for k in range(runs + 1):
        pair = [(worker, worker.seconds(case)) for worker in ((new, old) if k % 2 else (old, new))]
        times.append(dict(pair))
    ratios = [pair[new] / pair[old] for pair in times[1:]]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "runs": runs,
        "ms_before": 1e3 * statistics.median(pair[old] for pair in times[1:]),
        "ms": 1e3 * statistics.median(pair[new] for pair in times[1:]),
        "ratio": middle, "ratio_first_quartile": low, "ratio_third_quartile": high,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("commit", help="to compare with")
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT, help=", ".join(WHAT))
    parser.add_argument("--runs", type=int, default=20, help="of each case (20)")
    arguments = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run(
        [*git, "rev-parse", "--short=10", arguments.commit], check=True, capture_output=True, text=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder).resolve() / "before"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(before), name], check=True)
        try:
            new, old = Worker(ROOT), Worker(before)
            for case in (case for case in CASES if case[0] in arguments.what):
                key = dict(zip(KEY, (name, *case), strict=True))
                row = key | compared(case, new, old, arguments.runs)
                replace_rows(
                    RESULTS / FILE, [row], lambda old, key=key: all(old[k] == str(key[k]) for k in KEY)
                )
                print(*row.values(), flush=True)
            for worker in (new, old):
                worker.close()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)


if __name__ == "__main__":
    main()
