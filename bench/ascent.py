"""How many augmenting paths a block needs after the dual ascent: writes bench/results/ascent.csv.

For each pattern and score distribution, the mean and the largest number per block after the ascent with its
self-steering tau, and the mean after three variants of it: a fixed schedule (as many sweeps with tau from 5
to 250 in geometric steps, relative to the block's largest score), fewer sweeps, and a smooth count of the
fractional entries of a line, 6 sum s (1 - s).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import torch
from torch import Tensor

from nmsolve.backends import ascent_schedule
from nmsolve.backends.torch import masks as reference

PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32), (32, 64))
FEWER = 7
DISTRIBUTIONS = ("normal", "student_t", "lognormal", "wanda", "outliers", "bfloat16", "ties")


def augmentations(blocks: Tensor, n: int, u: Tensor, v: Tensor) -> Tensor:
    """Units of imbalance of [A - u - v > 0]: the number of augmenting paths each block needs."""
    mask = blocks - u.unsqueeze(2) - v.unsqueeze(1) > 0
    return (n - mask.sum(2)).clamp(min=0).sum(1) + (mask.sum(1) - n).clamp(min=0).sum(1)


def fixed_schedule(blocks: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ascent with tau * max|A| from 5 to 250, steps up to max|A| / 5."""
    peak = blocks.abs().amax((1, 2)).unsqueeze(1)
    u, v = torch.zeros_like(blocks[:, 0]), torch.zeros_like(blocks[:, 0])
    for sweep in range(ascent_schedule.SWEEPS):
        tau = 5 * 50 ** (sweep / (ascent_schedule.SWEEPS - 1)) / peak
        for duals, dim in ((u, 2), (v, 1)):
            s = tau.unsqueeze(2) * (blocks - u.unsqueeze(2) - v.unsqueeze(1)) + 0.5
            step = (s.clamp(0, 1).sum(dim) - n) / (
                tau * (((s > 0) & (s < 1)).sum(dim) + ascent_schedule.DAMPING)
            )
            duals += torch.minimum(torch.maximum(step, -peak / 5), peak / 5)
    return u, v


def variant(blocks: Tensor, n: int, sweeps: int, smooth: bool) -> tuple[Tensor, Tensor]:
    """The steered ascent with another number of sweeps, or with the smooth count."""
    mean = blocks.mean((1, 2), keepdim=True)
    deviation = (blocks - mean).abs().mean((1, 2), keepdim=True).clamp_min(ascent_schedule.DEVIATION_FLOOR)
    reach = ascent_schedule.WINSOR * deviation
    clipped = torch.minimum(torch.maximum(blocks, mean - reach), mean + reach)
    u = clipped.mean(2, keepdim=True)
    v = clipped.mean(1, keepdim=True) - u.mean(1, keepdim=True)
    tau = ascent_schedule.TAU_START / deviation
    goal = ascent_schedule.FRACTION_START * blocks.shape[2]
    shrink = (ascent_schedule.FRACTION_END / goal) ** (1 / (sweeps - 1))
    for sweep in range(sweeps):
        fractional = 0.0
        for duals, dim in ((u, 2), (v, 1)):
            s = (blocks - u - v) * tau + 0.5
            held = s.clamp(0, 1)
            count = 6 * (held * (1 - held)) if smooth else (s == held).to(s.dtype)
            count = count.sum(dim, keepdim=True)
            step = (held.sum(dim, keepdim=True) - n) / (count + ascent_schedule.DAMPING)
            duals += step.clamp(-ascent_schedule.STEP_LIMIT, ascent_schedule.STEP_LIMIT) / tau
            fractional = fractional + count.mean((1, 2), keepdim=True) / 2
        goal *= shrink if sweep < sweeps - 1 else 1
        growth = torch.clamp(fractional, min=ascent_schedule.FRACTION_FLOOR) / goal
        tau = tau * growth.clamp(ascent_schedule.GROWTH_MIN, ascent_schedule.GROWTH_MAX)
    return u.squeeze(2), v.squeeze(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=4000, help="blocks of 16x16; others by equal work")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "ascent.csv")
    arguments = parser.parse_args()
    rows = []
    for n, m in PATTERNS:
        count = min(4 * arguments.blocks, max(64, arguments.blocks * 256 // m**2))
        for name in DISTRIBUTIONS:
            blocks, _ = reference.normalise(common.scores(name, (count, m, m), seed=m))
            steered = augmentations(blocks, n, *reference.dual_ascent(blocks, n)).double()
            fixed = augmentations(blocks, n, *fixed_schedule(blocks, n)).double()
            fewer = augmentations(blocks, n, *variant(blocks, n, FEWER, False)).double()
            smooth = augmentations(blocks, n, *variant(blocks, n, ascent_schedule.SWEEPS, True)).double()
            rows.append(
                {
                    "pattern": f"{n}:{m}",
                    "distribution": name,
                    "blocks": count,
                    "sweeps": ascent_schedule.SWEEPS,
                    "mean": f"{steered.mean():.3f}",
                    "largest": int(steered.max()),
                    "blocks_done": f"{(steered == 0).double().mean():.3f}",
                    "mean_fixed_schedule": f"{fixed.mean():.3f}",
                    f"mean_{FEWER}_sweeps": f"{fewer.mean():.3f}",
                    "mean_smooth_count": f"{smooth.mean():.3f}",
                }
            )
            print(*rows[-1].values(), sep="\t")
    common.write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
