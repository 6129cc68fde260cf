"""Every method for transposable masks, ours and others', time and error, side by side in one run on a CPU.

Writes bench/results/peers.csv. Each contender solves the blocks of a square |N(0, 1)| matrix. Fast ones
solve all of it; slow ones its first blocks, as many as the column ``sampled_blocks`` says, and ``seconds``
is then ``seconds_per_block`` times the matrix's blocks (``extrapolated`` is 1). Ours get the matrix; the
others get its blocks, cut out and converted beforehand. Errors are ``1 - kept score / optimum``, in
float64, over the first sampled blocks (up to ``ERROR_WEIGHTS`` weights); the optimum is OR-tools' min-cost
flow's. ``lines_short`` is the share of rows and columns that hold fewer than n: such a mask is none of the
pattern's, and can even score more than the best of those. Ends with exit code 1 if a peer is as fast and as
accurate as exact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from common import RESULTS, Seconds, cores, interleaved, scores, table, write_csv
from pareto import EXACT, dominating
from peers.best_of_random import best_of_random, random_masks
from peers.linear_assignment import as_masks, scipy_assignment, torch_assignment
from peers.linear_program import highs, primal_dual
from peers.min_cost_flow import optimal_masks
from peers.network_simplex import network_simplex
from peers.patterns_2_4 import best_pattern
from peers.row_then_column import row_then_column
from peers.torch_sparse_tile import sparse_tile
from peers.tsenor import tsenor
from peers.two_approximation import two_approximation
from torch import Tensor

import nmsolve

PATTERNS = ("2:4", "4:8", "8:16", "16:32", "1:16")
SIZES = (512, 2048, 8192)
REPEATS = {512: 7, 2048: 5, 8192: 3}
FLOWS_TOGETHER = 16
ERROR_WEIGHTS = 1 << 20
EVERYTHING = 1 << 62

# (matrix, its blocks, n, m) -> the call that is timed; it returns masks of either, or each row's column.
Prepare = Callable[[Tensor, Tensor, int, int], Callable[[], Tensor]]


class Peer(NamedTuple):
    """A contender: how it is called, and the most weights it runs on."""

    prepare: Prepare
    weights: int
    threads: int = 0  # 0: as many as the run has
    slow: bool = False  # timed once, apart from the others
    only: str = ""  # the only pattern it can do, "1:" for n = 1


def ours(method: str, backend: str) -> Prepare:
    return lambda matrix, blocks, n, m: (
        lambda: nmsolve.transposable_mask(matrix, n, m, method=method, backend=backend)
    )


def on_tensors(method: Callable[..., Tensor], *options: object) -> Prepare:
    return lambda matrix, blocks, n, m: lambda: method(blocks, n, *options)


def on_arrays(method: Callable[..., np.ndarray], *options: object) -> Prepare:
    def prepare(matrix: Tensor, blocks: Tensor, n: int, m: int) -> Callable[[], Tensor]:
        arrays = blocks.double().numpy()
        return lambda: torch.from_numpy(method(arrays, n, *options))

    return prepare


def fixed(method: Callable) -> Callable:
    """A method for one n, called as the others are."""
    return lambda blocks, n: method(blocks)


def from_prepared_masks(matrix: Tensor, blocks: Tensor, n: int, m: int) -> Callable[[], Tensor]:
    random_masks(n, m)
    return lambda: best_of_random(blocks, n)


PEERS = {
    EXACT: Peer(ours("exact", "cpu"), EVERYTHING),
    "nmsolve greedy (cpu)": Peer(ours("greedy", "cpu"), EVERYTHING),
    "nmsolve tsenor (cpu)": Peer(ours("tsenor", "cpu"), 1 << 22),
    "nmsolve exact (torch)": Peer(ours("exact", "torch"), 1 << 21),
    "nmsolve assignment (cpu)": Peer(on_tensors(fixed(nmsolve.assignment)), EVERYTHING, only="1:"),
    "row-then-column": Peer(on_tensors(row_then_column), 1 << 22),
    "2-approximation": Peer(on_tensors(two_approximation), 1 << 21),
    "best of 1000 random": Peer(from_prepared_masks, 1 << 21),
    "all 90 patterns": Peer(on_tensors(fixed(best_pattern)), EVERYTHING, only="2:4"),
    "SciPy assignment": Peer(on_arrays(fixed(scipy_assignment)), 1 << 21, threads=1, only="1:"),
    "torch-linear-assignment": Peer(on_tensors(fixed(torch_assignment)), 1 << 21, threads=1, only="1:"),
    "min-cost flow (OR-tools)": Peer(on_arrays(optimal_masks, FLOWS_TOGETHER), 1 << 20, threads=1),
    "torch.sparse tile": Peer(on_tensors(fixed(sparse_tile)), 1 << 16, threads=1, slow=True, only="2:4"),
    "TSENOR": Peer(on_tensors(tsenor), 1 << 19, slow=True),
    "TSENOR without local search": Peer(on_tensors(tsenor, False), 1 << 19, slow=True),
    "PDLP (OR-tools)": Peer(on_arrays(primal_dual), 1 << 15, threads=1, slow=True),
    "linear program (HiGHS)": Peer(on_arrays(highs), 1 << 15, threads=1, slow=True),
    "network simplex (networkx)": Peer(on_arrays(network_simplex), 1 << 14, threads=1, slow=True),
}


def split(matrix: Tensor, m: int) -> Tensor:
    """The blocks of a matrix, ``(B, m, m)``."""
    return matrix.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2).flatten(0, 1)


class Case(NamedTuple):
    """What one contender solves."""

    call: Callable[[], Tensor]
    blocks: Tensor


def case(peer: Peer, matrix: Tensor, n: int, m: int) -> Case:
    """The contender on the first blocks of the matrix; ours on whole rows of blocks."""
    side = matrix.shape[1]
    strips = max(1, min(side, peer.weights // side) // m)
    part = matrix[: strips * m]
    count = min(strips * side // m, max(1, peer.weights // m**2))
    blocks = split(part, m)[:count].contiguous()
    return Case(peer.prepare(part, blocks, n, m), blocks)


def masks_of(result: Tensor, blocks: Tensor) -> Tensor:
    """A contender's result as ``(B, m, m)`` masks of its blocks."""
    if result.dtype != torch.bool:
        return as_masks(result)
    return result if result.ndim == 3 else split(result, blocks.shape[1])


def measure(
    n: int, m: int, matrix: Tensor, names: list[str], repeats: int, threads: int
) -> list[dict[str, object]]:
    cases = {name: case(PEERS[name], matrix, n, m) for name in names}
    fast = {name: c.call for name, c in cases.items() if not PEERS[name].slow}
    times = interleaved(fast, repeats) if fast else {}
    for name in names:
        if PEERS[name].slow:
            PEERS[name].prepare(matrix[:m], cases[name].blocks[:2], n, m)()
            times |= interleaved({name: cases[name].call}, 1, warm_up=0)

    largest = max((c.blocks for c in cases.values()), key=len)[: ERROR_WEIGHTS // m**2].double()
    best = kept(largest, torch.from_numpy(optimal_masks(largest.numpy(), n, FLOWS_TOGETHER)))
    everything = matrix.numel() // m**2
    rows = []
    for name in names:
        blocks = cases[name].blocks
        masks = masks_of(cases[name].call(), blocks)[: len(best)]
        error = 1 - kept(blocks[: len(best)].double(), masks) / best[: len(masks)]
        lines = torch.cat([masks.sum(1), masks.sum(2)])
        if (lines > n).any():
            raise RuntimeError(f"{name}: a line holds {int(lines.max())} of {m}, expected at most {n}")
        rows.append(row(name, n, m, matrix, times[name], len(blocks), everything, error, lines < n, threads))
    return rows


def kept(blocks: Tensor, masks: Tensor) -> Tensor:
    return (blocks * masks).sum((1, 2))


def row(
    name: str,
    n: int,
    m: int,
    matrix: Tensor,
    took: Seconds,
    sampled: int,
    everything: int,
    error: Tensor,
    short: Tensor,
    threads: int,
) -> dict[str, object]:
    per_block = took.median / sampled
    line = {
        "peer": name,
        "n": n,
        "m": m,
        "size": matrix.shape[0],
        "distribution": "normal",
        "seconds": per_block * everything,
        "seconds_per_block": per_block,
        "seconds_per_block_least": took.least / sampled,
        "seconds_per_block_most": took.most / sampled,
        "repeats": took.repeats,
        "sampled_blocks": sampled,
        "extrapolated": int(sampled < everything),
        "mean_relative_error": float(error.mean()),
        "worst_relative_error": float(error.max()),
        "error_blocks": len(error),
        "lines_short": float(short.double().mean()),
        "threads": PEERS[name].threads or threads,
    }
    print(
        "{peer}, {n}:{m}, {size}: {seconds_per_block:.3g} s a block, {seconds:.3g} s, "
        "error {mean_relative_error:.2g}, {lines_short:.2%} of lines short".format(**line),
        flush=True,
    )
    return line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of the square matrices")
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, metavar="N:M")
    parser.add_argument("--peers", nargs="+", default=tuple(PEERS), choices=tuple(PEERS), metavar="PEER")
    parser.add_argument("--threads", type=int, default=cores(), help="threads (every core)")
    parser.add_argument("--out", type=Path, help="result file (bench/results/peers.csv, of a full run only)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = []
    for size in arguments.sizes:
        matrix = scores("normal", (size, size), seed=size)
        for pattern in arguments.patterns:
            n, m = map(int, pattern.split(":"))
            names = [name for name in arguments.peers if pattern.startswith(PEERS[name].only)]
            rows += measure(n, m, matrix, names, REPEATS.get(size, 3), arguments.threads)

    full = (arguments.sizes, arguments.patterns, arguments.peers) == (SIZES, PATTERNS, tuple(PEERS))
    out = arguments.out or (RESULTS / "peers.csv" if full else None)
    if out is not None:
        write_csv(out, rows, "ortools", "scipy", "networkx", "torch-linear-assignment")
    head = ["peer", "n", "m", "size", "seconds_per_block", "mean_relative_error", "lines_short"]
    cells = [[f"{r[key]:.3g}" if isinstance(r[key], float) else str(r[key]) for key in head] for r in rows]
    print(table([head, *cells], "lrrrrrr"))
    better = dominating(rows) if EXACT in arguments.peers else []
    for peer in better:
        print(f"as fast and as accurate as exact: {peer}")
    return 1 if better else 0


if __name__ == "__main__":
    sys.exit(main())
