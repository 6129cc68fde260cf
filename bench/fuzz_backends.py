"""Do the backends agree on random blocks, of every size and N? Millions of blocks, every kind of scores.

Writes bench/results/fuzz_backends.csv: a row per pair of backends, dtype and block size M, with every N from
0 to M. Of each block the counts of the masks are checked, objectives are compared, and the gap is what its
duals prove by complementary slackness, summed here, or what the solution says, whichever is larger. A part
of the blocks is solved once more from duals that say nothing, and a part is partial.

The cpu backend is compared with torch here, with triton in a child whose kernels are interpreted, and in one
that executes their PTX (tests/support/on_emulator.py). A row is written as soon as it is known; rows of as
many blocks that are there are not made again.

Blocks whose largest score is larger than all that they keep are counted apart ("mixed"): floats of their
scale cannot tell apart what is worth keeping, and docs/internals/solver.md says how the gap tells so.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor

import nmsolve
from nmsolve.solution import relative_gap

DTYPES = ("float32", "float64", "bfloat16", "float16")
LIMITS = {"float64": 1e-12}  # of a gap; 1e-6 for the others, which are solved in float32
LARGEST = 64
STEP = 4096  # blocks solved together
CAPABILITY = 90  # of the target whose PTX is executed

PARTS: dict[str, tuple[str, str]] = {
    "torch": ("cpu", "torch"),
    "interpreter": ("cpu", "triton"),
    "ptx": ("cpu", "triton"),
}
"""What runs where, and the two backends that it compares."""


# --- blocks -------------------------------------------------------------------------------------------------


def _normal(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def _uniform(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64)


def _integers(low: int, high: int, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=g).double()


def _row(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], 1, shape[2]


def _column(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[1], 1


def _some_equal_rows(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    choice = torch.randint(0, 1 + shape[1] // 4, (shape[1],), generator=g)
    return _normal(shape, g).abs()[:, choice]


def _with_some(shape: tuple[int, ...], g: torch.Generator, share: float, value: float) -> Tensor:
    scores = _integers(1, 101, shape, g)
    return scores.masked_fill(_uniform(shape, g) < share, value)


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator, torch.finfo], Tensor]] = {
    "normal": lambda shape, g, finfo: _normal(shape, g).abs(),
    "signed": lambda shape, g, finfo: _normal(shape, g),
    "negative": lambda shape, g, finfo: -_normal(shape, g).abs() - 1,
    "student t": lambda shape, g, finfo: _normal(shape, g) / _normal(shape, g).abs().clamp(min=1e-4),
    "heavy tails": lambda shape, g, finfo: (3 * _normal(shape, g)).exp(),
    "ties": lambda shape, g, finfo: _integers(0, 8, shape, g),
    "small integers": lambda shape, g, finfo: _integers(-3, 4, shape, g),
    "ternary": lambda shape, g, finfo: _integers(-1, 2, shape, g),
    "two values": lambda shape, g, finfo: _integers(0, 2, shape, g) * 0.1 + 1,
    "near ties": lambda shape, g, finfo: 1 + 4 * finfo.eps * _integers(0, 4, shape, g),
    "constant": lambda shape, g, finfo: _normal((shape[0], 1, 1), g).expand(shape),
    "zeros": lambda shape, g, finfo: torch.zeros(shape, dtype=torch.float64),
    "mostly zeros": lambda shape, g, finfo: _normal(shape, g) * (_uniform(shape, g) < 0.2),
    "nonpositive": lambda shape, g, finfo: -_normal(shape, g).clamp(min=0),
    "equal rows": lambda shape, g, finfo: _normal(_row(shape), g).abs().expand(shape),
    "equal columns": lambda shape, g, finfo: _normal(_column(shape), g).abs().expand(shape),
    "some equal rows": lambda shape, g, finfo: _some_equal_rows(shape, g),
    "rank 1": lambda shape, g, finfo: (_normal(_row(shape), g) * _normal(_column(shape), g)).abs(),
    "scaled lines": lambda shape, g, finfo: (
        _normal(shape, g).abs() * (2 * _normal(_row(shape), g)).exp() * (2 * _normal(_column(shape), g)).exp()
    ),
    "tiny": lambda shape, g, finfo: _normal(shape, g) * finfo.smallest_normal / 8,
    "huge": lambda shape, g, finfo: (2 * _uniform(shape, g) - 1) * finfo.max,
    "huge, positive": lambda shape, g, finfo: _uniform(shape, g) * finfo.max,
    "any exponent": lambda shape, g, finfo: torch.exp2(100 * _uniform(shape, g) - 50),
    "nearly forbidden": lambda shape, g, finfo: _with_some(shape, g, 0.3, -1e9),
    "nearly forced": lambda shape, g, finfo: _with_some(shape, g, 0.05, 1e12),
}
"""Kind -> float64 scores ``(B, R, C)``, before they are rounded to the dtype whose limits are given."""


def blocks(kind: str, shape: tuple[int, ...], dtype: str, g: torch.Generator) -> Tensor:
    """Scores of a kind and dtype; what is beyond the dtype's largest number is that number."""
    kept_as = getattr(torch, dtype)
    finfo = torch.finfo(kept_as)
    return KINDS[kind](shape, g, finfo).clamp(-finfo.max, finfo.max).to(kept_as).contiguous()


def mixture(count: int, shape: tuple[int, int], dtype: str, g: torch.Generator) -> Tensor:
    """``count`` blocks in a random order, about as many of each kind."""
    share = math.ceil(count / len(KINDS))
    made = torch.cat([blocks(kind, (share, *shape), dtype, g) for kind in KINDS])
    return made[torch.randperm(len(made), generator=g)[:count]]


# --- what is checked ----------------------------------------------------------------------------------------


def infeasible(masks: Tensor, n: int) -> int:
    """How many of ``(B, R, C)`` masks do not keep what a block may (nmsolve/blocks.py)."""
    rows, cols = masks.shape[1:]
    exact = min(n, max(rows, cols))
    in_row, in_col = (exact if rows <= cols else n), (exact if cols <= rows else n)
    of_rows, of_cols = masks.sum(2), masks.sum(1)
    wrong = (of_rows > in_row).any(1) | (of_cols > in_col).any(1)
    wrong |= of_rows.sum(1) != exact * min(rows, cols)
    return int(wrong.sum())


def scaled(x: Tensor, exponent: Tensor) -> Tensor:
    """``x`` in float64 over the power of two of its block."""
    half = exponent.div(2, rounding_mode="floor")
    by = (torch.exp2(-e.double()).view(-1, *[1] * (x.ndim - 1)) for e in (half, exponent - half))
    return x.double() * next(by) * next(by)


class Blocks:
    """Scores as multiples of a power of two near the largest of their block, so that no sum overflows."""

    def __init__(self, scores: Tensor) -> None:
        self.exponent = torch.frexp(scores.double().abs().amax((1, 2))).exponent
        self.scores = scaled(scores, self.exponent)
        self.largest = self.scores.abs().amax((1, 2))

    def kept(self, masks: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and sum of absolute scores."""
        kept = self.scores * masks
        return kept.sum((1, 2)), kept.abs().sum((1, 2))

    def gaps(self, solution: nmsolve.BlockSolution, n: int) -> tuple[Tensor, Tensor]:
        """What the duals prove, relative to the kept scores, and what the solution says."""
        rows, cols = self.scores.shape[1:]
        u = scaled(solution.row_duals.flatten(0, -2)[:, :rows], self.exponent)
        v = scaled(solution.col_duals.flatten(0, -2)[:, :cols], self.exponent)
        masks = solution.mask
        surplus = self.scores - u.unsqueeze(2) - v.unsqueeze(1)
        left = torch.where(masks, -surplus, surplus).clamp(min=0).sum((1, 2))
        if rows != cols:  # prices of lines that may fall short; negative ones would prove nothing
            prices, held = (u, masks.sum(2)) if rows > cols else (v, masks.sum(1))
            left = left + (prices * (n - held)).sum(1)
            left = left.masked_fill((prices < 0).any(1), torch.inf)
        _, size = self.kept(masks)
        said = solution.gap.flatten()
        return relative_gap(left, size), torch.where(said >= 0, said, torch.inf)  # neither NaN nor negative


# --- a row --------------------------------------------------------------------------------------------------


class Row:
    """What is found of one dtype and M, over every N."""

    def __init__(self, part: str, dtype: str, m: int) -> None:
        self.key = {"part": part, "dtype": dtype, "m": str(m)}
        self.m, self.limit = m, LIMITS.get(dtype, 1e-6)
        self.counts = dict.fromkeys(
            ("blocks", "partial", "compared", "warm", "infeasible", "beyond", "rounded"), 0
        )
        self.worst = dict.fromkeys(("difference", "gap", "gap_of_second", "gap_warm"), 0.0)
        self.mixed_counts = {"mixed": 0, "mixed_beyond": 0}
        self.mixed_worst = {"mixed_difference": 0.0, "mixed_gap": 0.0}

    def add(self, scores: Tensor, n: int, compared: int, g: torch.Generator) -> None:
        """Solve ``(B, R, C)`` blocks with the first backend, ``compared`` of them with the second.

        One in ten starts once more from duals that say nothing, in small blocks on either backend in turn.
        """
        first, second = PARTS[self.key["part"]]
        mixed, objective, size, duals = self._solved(scores, n, first, "gap")
        self.counts["blocks"] += len(scores)
        self.counts["partial"] += len(scores) * (scores.shape[1:] != (self.m, self.m))
        self.mixed_counts["mixed"] += int(mixed.sum())
        if compared:
            part = slice(0, compared)
            _, value, other_size, _ = self._solved(scores[part], n, second, "gap_of_second")
            apart = relative_gap((value - objective[part]).abs(), torch.maximum(size[part], other_size))
            self._note("difference", "mixed_difference", apart, mixed[part])
            self.counts["compared"] += len(apart)
        few = slice(0, compared or len(scores), 10)
        unit = scores[few].abs().amax((1, 2)).view(-1, 1, 1, 1).to(duals.dtype).clamp(max=1e30)
        noise = torch.randn(2, *duals[few].shape, generator=g).to(duals.dtype) * unit * 3
        turned = second if n % 2 and self.m <= 16 else first
        self._solved(scores[few], n, turned, "gap_warm", (noise[0], noise[1]))
        self.counts["warm"] += len(noise[0])

    def _solved(
        self, scores: Tensor, n: int, backend: str, gap: str, warm: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which blocks are mixed, what they keep, their scale, the row duals; counts and gaps are noted."""
        blocks = Blocks(scores)
        solution = nmsolve.transposable_mask(
            scores, n, self.m, backend=backend, warm_start=warm, return_solution=True
        )
        objective, size = blocks.kept(solution.mask)
        mixed = (blocks.largest > size) & (n > 0)
        self.counts["infeasible"] += infeasible(solution.mask, n)
        proven, said = blocks.gaps(solution, n)
        rounded = (proven > self.limit) & (said <= self.limit)
        found = torch.where(rounded, said, torch.maximum(proven, said))
        self.counts["rounded"] += int(rounded.sum())
        self._note(gap, "mixed_gap", found, mixed)
        beyond = ~(found <= self.limit)
        self.counts["beyond"] += int((beyond & ~mixed).sum())
        self.mixed_counts["mixed_beyond"] += int((beyond & mixed).sum())
        return mixed, objective, size, solution.row_duals

    def _note(self, name: str, name_of_mixed: str, values: Tensor, mixed: Tensor) -> None:
        """Keep the largest value of either sort."""
        for worst, key, of in ((self.worst, name, ~mixed), (self.mixed_worst, name_of_mixed, mixed)):
            if of.any():
                worst[key] = max(worst[key], float(values[of].max()))

    def finished(self) -> dict[str, object]:
        worst, of_mixed = (
            {f"worst_{name}": value for name, value in values.items()}
            for values in (self.worst, self.mixed_worst)
        )
        backends = " ".join(PARTS[self.key["part"]])
        return {
            **self.key,
            "backends": backends,
            **self.counts,
            **worst,
            **self.mixed_counts,
            **of_mixed,
        }


class Plan(NamedTuple):
    """Full blocks that the first backend solves, and how many of them the second does too."""

    first: int
    second: int


def plan(part: str, dtype: str, m: int, n: int) -> Plan | None:
    """What is solved of a pattern in a dtype; most blocks where they are cheap.

    Blocks up to 8 are compared in every dtype, those up to 16 in the two that they are solved in, and larger
    ones, for which torch takes milliseconds, in one of these and for every fourth or eighth N.
    Kernels that are not compiled take a few N, the ends among them, and one dtype for each M; the interpreter
    takes every dtype up to 8, and leaves out most large M, of which a block takes seconds.
    """
    if part == "torch":
        if m <= 8:
            return Plan(*[100_000 if m <= 4 else 20_000] * 2)
        if m <= 16:
            return Plan(200, 200 if dtype in DTYPES[:2] else 0)
        every = 4 if m <= 40 else 8
        turn = n % every == m % every and DTYPES[n // every % 2] == dtype
        return Plan(100, 30 if turn else 0) if m <= 40 else Plan(40, 10 if turn else 0)
    every_dtype = part == "interpreter" and m <= 8
    if n not in (0, 1, m // 2, m - 1, m) or not (every_dtype or DTYPES[m % len(DTYPES)] == dtype):
        return None
    if part == "ptx":
        return Plan(*[64 if m <= 8 else 16 if m <= 32 else 4] * 2)
    if m <= 16:
        return Plan(*[32 if m <= 8 else 8] * 2)
    return Plan(1, 1) if m in (24, 32, 48, 64) and n == m // 2 else None


def fuzz(part: str, dtype: str, m: int, share: float) -> Row | None:
    """Full blocks of every N, and a fourth as many partial ones, of a random shape for each N."""
    row = Row(part, dtype, m)
    for n in range(m + 1):
        wanted = plan(part, dtype, m, n)
        if wanted is None:
            continue
        g = torch.Generator().manual_seed((m * 100 + n) * 100 + DTYPES.index(dtype))
        rows, cols = torch.randint(1, m + 1, (2,), generator=g).tolist()
        full, both = (math.ceil(share * count) for count in wanted)
        parts = 4 if m <= 16 else full + 1  # partial blocks of the largest are not compared: no time
        for shape, count, compared in (((m, m), full, both), ((rows, cols), full // 4, both // parts)):
            for start in range(0, count, STEP):
                size = min(STEP, count - start)
                scores = mixture(size, shape, dtype, g)
                if part == "interpreter" and dtype == "bfloat16":  # it reads subnormal ones as other numbers
                    scores = scores.masked_fill(scores.abs() < torch.finfo(scores.dtype).tiny, 0)
                row.add(scores, n, min(size, max(0, compared - start)), g)
    return row if row.counts["blocks"] else None


# --- the parts ----------------------------------------------------------------------------------------------


def child(part: str, arguments: list[str]) -> None:
    """Run a part in a process of its own, where Triton's kernels are interpreted or executed from PTX."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(common.ROOT / "bench"), "fuzz_backends"]
    if part == "ptx":
        del environment["TRITON_INTERPRET"]
        on_emulator = common.ROOT.joinpath("tests", "support", "on_emulator.py")
        command = [sys.executable, str(on_emulator), str(CAPABILITY), "fuzz_backends"]
    subprocess.run([*command, "--here", part, *arguments], env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", type=int, nargs="+", default=range(1, LARGEST + 1), metavar="M")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--share", type=float, default=1.0, help="of the blocks")
    parser.add_argument("--anew", action="store_true", help="make rows that are there, too")
    parser.add_argument(
        "--here", choices=PARTS, help="one part, with Triton's kernels as this process has them"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS / "fuzz_backends.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in [arguments.here] if arguments.here else arguments.parts:
        if part != "torch" and not arguments.here:
            child(part, given(arguments))
            continue
        for m in arguments.sizes:
            for dtype in arguments.dtypes:
                make_row(arguments, part, dtype, m)
    found = [row for row in common.read_csv(arguments.out) if row["part"] in arguments.parts]
    wrong = [row for row in found if int(row["infeasible"]) or int(row["beyond"])]
    for row in wrong:
        print("{part}, M={m}, {dtype}: {infeasible} infeasible, {beyond} beyond the limit".format(**row))
    return 1 if wrong else 0


def given(arguments: argparse.Namespace) -> list[str]:
    """The options of a child."""
    several = {"--sizes": map(str, arguments.sizes), "--dtypes": arguments.dtypes}
    options = ["--share", str(arguments.share), "--out", str(arguments.out.resolve())]
    options += ["--anew"] if arguments.anew else []
    return [*options, *(word for name, values in several.items() for word in (name, *values))]


def make_row(arguments: argparse.Namespace, part: str, dtype: str, m: int) -> None:
    """Make a row and keep it in the file, unless one of as many blocks is there."""
    key = {"part": part, "dtype": dtype, "m": str(m), "share": f"{arguments.share:.5g}"}
    before = common.read_csv(arguments.out) if arguments.out.exists() else []
    if not arguments.anew and any(key.items() <= row.items() for row in before):
        return
    began = time.process_time()
    row = fuzz(part, dtype, m, arguments.share)
    if row is not None:
        made = row.finished() | {"share": arguments.share, "seconds": time.process_time() - began}
        common.replace_rows(arguments.out, [made], lambda old: row.key.items() <= old.items())
        print(*list(made.values())[:20], flush=True)


if __name__ == "__main__":
    sys.exit(main())
