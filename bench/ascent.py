"""How many augmenting paths a block needs after the dual ascent: writes bench/results/ascent.csv.

For each pattern and score distribution, the mean and the largest number per block after the ascent, and the
mean after variants of it: a fixed schedule (ten sweeps with tau from 5 to 250 in geometric steps, relative to
the block's largest score), fewer sweeps, steps that are Newton's (not longer ones), fractional entries
counted in every sweep, or in none.
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
FEWER = 9
FIXED = 10
NEWTON = 6.0
DISTRIBUTIONS = ("normal", "student_t", "lognormal", "wanda", "outliers", "bfloat16", "ties")


def augmentations(blocks: Tensor, n: int, u: Tensor, v: Tensor) -> Tensor:
    """Units of imbalance of [A - u - v > 0]: the number of augmenting paths each block needs."""
    mask = blocks - u.unsqueeze(2) - v.unsqueeze(1) > 0
    return (n - mask.sum(2)).clamp(min=0).sum(1) + (mask.sum(1) - n).clamp(min=0).sum(1)


def fixed_schedule(blocks: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ascent with tau * max|A| from 5 to 250, steps up to max|A| / 5."""
    peak = blocks.abs().amax((1, 2)).unsqueeze(1)
    u, v = torch.zeros_like(blocks[:, 0]), torch.zeros_like(blocks[:, 0])
    for sweep in range(FIXED):
        tau = 5 * 50 ** (sweep / (FIXED - 1)) / peak
        for duals, dim in ((u, 2), (v, 1)):
            s = tau.unsqueeze(2) * (blocks - u.unsqueeze(2) - v.unsqueeze(1)) + 0.5
            step = (s.clamp(0, 1).sum(dim) - n) / (tau * (((s > 0) & (s < 1)).sum(dim) + 0.3))
            duals += torch.minimum(torch.maximum(step, -peak / 5), peak / 5)
    return u, v


def variant(
    blocks: Tensor,
    n: int,
    *,
    sweeps: int = ascent_schedule.SWEEPS,
    curvature: float = ascent_schedule.CURVATURE,
    counted: int = 1,
) -> tuple[Tensor, Tensor]:
    """The ascent with other sweeps, longer or shorter steps, or other sweeps that count, the last ones."""
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
        for duals, dim in ((u, 2), (v, 1)):
            s = (blocks - u - v) * tau + 0.5
            held = s.clamp(0, 1)
            if sweep >= sweeps - counted:
                fractional = (s == held).to(s.dtype).sum(dim, keepdim=True)
                slope = fractional + ascent_schedule.LAST_DAMPING
            else:
                fractional = 6 * (held * (1 - held)).sum(dim, keepdim=True)
                slope = curvature / 6 * fractional + ascent_schedule.DAMPING
            step = (held.sum(dim, keepdim=True) - n) / slope
            duals += step.clamp(-ascent_schedule.STEP_LIMIT, ascent_schedule.STEP_LIMIT) / tau
        goal *= shrink
        growth = fractional.mean((1, 2), keepdim=True) / goal
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
            variants = {
                "mean_fixed_schedule": fixed_schedule(blocks, n),
                f"mean_{FEWER}_sweeps": variant(blocks, n, sweeps=FEWER),
                "mean_newton": variant(blocks, n, curvature=NEWTON),
                "mean_counted": variant(blocks, n, counted=ascent_schedule.SWEEPS),
                "mean_never_counted": variant(blocks, n, counted=0),
            }
            left = augmentations(blocks, n, *reference.dual_ascent(blocks, n)).double()
            rows.append(
                {
                    "pattern": f"{n}:{m}",
                    "distribution": name,
                    "blocks": count,
                    "sweeps": ascent_schedule.SWEEPS,
                    "mean": f"{left.mean():.3f}",
                    "largest": int(left.max()),
                    "blocks_done": f"{(left == 0).double().mean():.3f}",
                    **{
                        name: f"{augmentations(blocks, n, *duals).double().mean():.3f}"
                        for name, duals in variants.items()
                    },
                }
            )
            print(*rows[-1].values(), sep="\t")
    common.write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
