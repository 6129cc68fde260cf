"""What would a model of hundreds of gigabytes take on 8 to 256 ranks? Writes bench/results/scale.csv.

Nothing is run and nothing is measured: headers of real size (bench/scale_headers.py) go through the functions
that `nmsolve mask` itself selects, cuts and deals with, and what each rank gets is divided by rates.

Quantities "mask, CPU" and "mask, H100": `nmsolve mask --pattern 8:16 --transposable`, one rank on two cores
or on a GPU. ``largest_over_mean`` is of the bytes of the ranks, ``solved_largest_over_mean`` of the weights
that they solve. A host's ranks share its disk. ``seconds`` is that of the slowest host if reading, solving
and writing overlap perfectly, ``seconds_in_turn`` if they do not overlap at all; what else a run does is in
neither. ``files_gb_per_s`` is how fast all hosts together read or write meanwhile: a file system that they
share must be as fast.

Quantities "prune, Hessians" (alps, sparsegpt, frank-wolfe) and "prune, diagonals" (wanda, ria): what ranks
sum in `nmsolve prune`, float32, for the largest block and for the model, and what a ring all-reduce sends
from each rank, 2 (R - 1) / R of it. ``at_once_gb`` is the largest single sum: with --sequential layer memory
holds one at a time. ``solving_ranks`` is how many ranks solve while layers are pruned: the layers that see
one input are dealt whole. ``seconds`` is what the sums of the model take at the rate of the network.

Rates by default: a host reads 5 GB/s and writes 2.5 GB/s, about one NVMe drive, and a GPU's network gives
50 GB/s (400 Gb/s); these are assumed. A CPU rank solves as fast as bench/results/speed_cpu.csv has measured
on two cores, with the certificate. A GPU rank solves at the H100's bound in bench/results/kernel_costs.csv,
which is predicted, has no certificate in it, and no run has reached.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
from scale_headers import MODELS, Input, Model, checkpoint_of

from nmsolve.checkpoint.format import Checkpoint
from nmsolve.checkpoint.mask_files import packed_size
from nmsolve.checkpoint.selection import select_tensors
from nmsolve.checkpoint.units import Unit, deal, units_of
from nmsolve.pattern import NMPattern

FILE = "scale.csv"
PATTERN = "8:16"
RANKS = (8, 16, 32, 64, 128, 256)
PER_HOST = 8
GB = 1e9


@dataclass(frozen=True)
class Share:
    """What one rank, or several together, read, write and solve: bytes, bytes and weights."""

    read: int = 0
    written: int = 0
    solved: int = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.read + other.read, self.written + other.written, self.solved + other.solved)


@dataclass(frozen=True)
class Rates:
    """Bytes per second of a host's disk, and weights per second of a rank."""

    read: float
    write: float
    solve: float


class Shares:
    """The pieces of a checkpoint, and what each takes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        chosen = select_tensors(checkpoint, NMPattern.of(PATTERN), transposable=True)
        self.masked = {item.entry.name for item in chosen.masked}
        self.units = units_of(checkpoint)

    def of(self, units: Sequence[Unit]) -> Share:
        """What a rank with these pieces does; the output is of the input's size, and a bit a mask entry."""
        entries = [entry for unit in units for entry in unit.entries]
        masked = [entry.size for entry in entries if entry.name in self.masked]
        read = sum(unit.nbytes for unit in units)
        return Share(read, read + sum(map(packed_size, masked)), sum(masked))

    def dealt(self, ranks: int) -> list[Share]:
        """What each rank does."""
        return [self.of(part) for part in deal(self.units, ranks)]


def largest_over_mean(sizes: Sequence[int]) -> float:
    return max(sizes) * len(sizes) / sum(sizes)


def masking(shares: Sequence[Share], rates: Rates) -> dict[str, float]:
    """What `nmsolve mask` takes on so many ranks, the ranks of a host one after the other."""
    hosts = [shares[first : first + PER_HOST] for first in range(0, len(shares), PER_HOST)]
    times = []
    for ranks in hosts:
        whole = sum(ranks, Share())
        solving = max(rank.solved for rank in ranks) / rates.solve
        times.append((whole.read / rates.read, solving, whole.written / rates.write))
    seconds = max(max(parts) for parts in times)
    everything = sum(shares, Share())
    return {
        "read_rate_gb": rates.read / GB,
        "write_rate_gb": rates.write / GB,
        "solve_rate_m": rates.solve / 1e6,
        "largest_over_mean": largest_over_mean([share.read for share in shares]),
        "solved_largest_over_mean": largest_over_mean([share.solved for share in shares]),
        "read_gb": everything.read / len(shares) / GB,
        "most_read_gb": max(share.read for share in shares) / GB,
        "most_written_gb": max(share.written for share in shares) / GB,
        "read_seconds": max(read for read, _, _ in times),
        "solve_seconds": max(solve for _, solve, _ in times),
        "write_seconds": max(write for _, _, write in times),
        "files_gb_per_s": (everything.read + everything.written) / seconds / GB,
        "seconds": seconds,
        "seconds_in_turn": max(map(sum, times)),
    }


def summed(inputs: Sequence[Input], diagonal: bool) -> list[int]:
    """Bytes of each sum of a block."""
    return [4 * x.groups * x.size * (1 if diagonal else x.size) for x in inputs]


def reductions(
    blocks: Sequence[Sequence[Input]], ranks: int, diagonal: bool, network: float
) -> dict[str, float]:
    """What `nmsolve prune` sums over ranks, and how many of these solve while layers are pruned."""
    sizes = [summed(block, diagonal) for block in blocks]
    largest, model = max(map(sum, sizes)), sum(map(sum, sizes))
    ring = 2 * (ranks - 1) / ranks
    return {
        "network_rate_gb": network / GB,
        "at_once_gb": max(map(max, sizes)) / GB,
        "block_gb": largest / GB,
        "model_gb": model / GB,
        "block_sent_gb": ring * largest / GB,
        "model_sent_gb": ring * model / GB,
        "solving_ranks": solving_ranks(blocks, ranks),
        "seconds": ring * model / network,
    }


def solving_ranks(blocks: Sequence[Sequence[Input]], ranks: int) -> float:
    """How many ranks solve, over the time of all: layers of one input at a time, each whole, in turn."""
    solved = waited = turn = 0
    for x in (x for block in blocks for x in block):
        loads = [0] * ranks
        for weights in x.weights:
            loads[turn % ranks] += weights
            turn += 1
        solved, waited = solved + sum(loads), waited + max(loads)
    return solved / waited


COLUMNS = (
    *("read_rate_gb", "write_rate_gb", "solve_rate_m", "network_rate_gb"),
    *("largest_over_mean", "solved_largest_over_mean", "read_gb", "most_read_gb", "most_written_gb"),
    *("read_seconds", "solve_seconds", "write_seconds", "files_gb_per_s"),
    *("at_once_gb", "block_gb", "model_gb", "block_sent_gb", "model_sent_gb", "solving_ranks"),
    *("seconds", "seconds_in_turn"),
)


def rows_of(
    model: Model, counts: Sequence[int], devices: Mapping[str, Rates], network: float
) -> Iterator[dict[str, object]]:
    """A row for each number of ranks and each quantity; what it has no number for is empty."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_of(model, Path(folder))
        shares = Shares(checkpoint)
    sizes = [(entry.size, entry.nbytes) for _, entry in checkpoint.entries()]
    parameters, nbytes = map(sum, zip(*sizes, strict=True))
    whole = {
        "model": model.name,
        "parameters": parameters,
        "gb": nbytes / GB,
        "files": len(checkpoint.shards),
        "tensors": len(sizes),
        "masked": len(shares.masked),
        "pieces": len(shares.units),
    }
    blocks = model.blocks(model.config)
    for ranks in counts:
        dealt = shares.dealt(ranks)
        found: dict[str, Mapping[str, float]] = {
            f"mask, {device}": masking(dealt, rates) for device, rates in devices.items()
        }
        for what in ("Hessians", "diagonals"):
            found[f"prune, {what}"] = reductions(blocks, ranks, what == "diagonals", network)
        for quantities, values in found.items():
            at = {**whole, "ranks": ranks, "hosts": -(-ranks // PER_HOST), "quantities": quantities}
            yield {**at, **{column: values.get(column, "") for column in COLUMNS}}


def cpu_rate() -> float:
    """Weights per second of a rank of two cores, measured."""
    rows = common.read_csv(common.RESULTS / "speed_cpu.csv")
    case = {"pattern": PATTERN, "distribution": "normal", "contender": "exact with certificate, cpu"}
    row = next(row for row in rows if case.items() <= row.items())
    return 1e6 * 16 * 16 / float(row["us_per_block"])


def gpu_rate() -> float:
    """Weights per second of an H100 at its bound, predicted."""
    rows = common.read_csv(common.RESULTS / "kernel_costs.csv")
    case = {"kernel": "exact", "m": "16", "n": "8", "dtype": "bfloat16", "target": "sm_90", "shipped": "1"}
    row = next(row for row in rows if case.items() <= row.items())
    return 8192**2 / (1e-3 * float(row["predicted_ms_8192"]))


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    rates = {
        "read": (5.0, "GB/s that a host reads"),
        "write": (2.5, "GB/s that a host writes"),
        "network": (50.0, "GB/s that a rank sends"),
        "cpu": (cpu_rate() / 1e6, "million weights per second that a CPU rank solves"),
        "gpu": (gpu_rate() / 1e6, "million weights per second that a GPU rank solves"),
    }
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    for name, (default, what) in rates.items():
        help_text = f"{what} ({default:.5g})"
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="RATE", help=help_text)
    parser.add_argument("--out", type=Path, default=common.RESULTS / FILE)
    args = parser.parse_args()
    if min(args.ranks) < 1:
        parser.error("argument --ranks: expected numbers from 1 on")
    disk = args.read * GB, args.write * GB
    devices = {"CPU": Rates(*disk, args.cpu * 1e6), "H100": Rates(*disk, args.gpu * 1e6)}
    rows = [
        row for model in MODELS.values() for row in rows_of(model, args.ranks, devices, args.network * GB)
    ]
    for row in rows:
        told = (f"{value:.5g}" if isinstance(value, float) else str(value) for value in row.values())
        print(", ".join(f"{name} {value}" for name, value in zip(row, told, strict=True) if value))
    common.write_csv(args.out, rows, "transformers")


if __name__ == "__main__":
    main()
