"""What does a mask within an earlier one cost, and what does it keep? Writes bench/results/initial_masks.csv.

Part "masks": transposable masks of random scores, 1024 x 1024, of which an earlier mask leaves some: 60 % at
random, or three quarters by the transposable mask of that pattern (6:8 before 4:8). In turn: the mask of all
scores ("free"), the best mask within what is left, which is proven ("choose"), and what is left of the mask
of scores that are 0 elsewhere, as iterations take it ("step"). ``kept`` is the score kept, as a share of the
best within what is left; ``gap`` the largest of a block that its certificate leaves open.

Part "layer": a layer of 1024 x 1024 pruned by each method, without ("free") and within an earlier mask.

Seconds are processor time of one thread, the median of ``repeats`` in turn (least and most beside it).
``error`` is the lost share of ``||X W^T||^2``.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import common
import torch
from torch import Tensor

import nmsolve
from nmsolve.prune import MaskRule, alps, frank_wolfe, sparsegpt, wanda_scores

SIDE = 1024
PATTERNS = ("2:4", "4:8", "8:16", "16:32")
FILE = "initial_masks.csv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("masks", "layer"), default=("masks", "layer"))
    parser.add_argument("--patterns", nargs="+", metavar="N:M", default=PATTERNS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=common.RESULTS / FILE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for pattern in args.patterns:
        for earlier in ("60 %", "three quarters"):
            for part in args.parts:
                found = (masks if part == "masks" else layer)(pattern, earlier, args.repeats)
                for row in found:
                    row = {"part": part, "pattern": pattern, "earlier": earlier, "side": SIDE} | row
                    rows.append(row)
                    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    common.write_csv(args.out, rows)


def left(scores: Tensor, pattern: str, earlier: str) -> Tensor:
    """What an earlier mask leaves."""
    if earlier == "60 %":
        return torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    m = nmsolve.NMPattern.of(pattern).m
    return nmsolve.transposable_mask(scores, 3 * m // 4, m)


def masks(pattern: str, earlier: str, repeats: int) -> list[dict[str, object]]:
    scores = common.scores("normal", (SIDE, SIDE))
    allowed = left(scores, pattern, earlier)
    rule = MaskRule(pattern)
    found: dict[str, Tensor] = {}

    def run(way: str) -> None:
        found[way] = {
            "free": lambda: rule.choose(scores),
            "choose": lambda: rule.choose(scores, allowed),
            "step": lambda: rule.step(scores, allowed),
        }[way]()

    times = common.interleaved(
        {way: partial(run, way) for way in ("free", "choose", "step")}, repeats, clock=time.process_time
    )
    proof = MaskRule(pattern)
    best = _sum(scores * proof.choose(scores, allowed))
    return [
        {"way": way, "kept": _sum(scores * found[way]) / best, "error": ""}
        | {"gap": proof.tally.max_gap if way == "choose" else ""}
        | timing(taken)
        for way, taken in times.items()
    ]


def layer(pattern: str, earlier: str, repeats: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator)
    mix = torch.randn(SIDE, SIDE, generator=generator) / SIDE**0.5 + torch.eye(SIDE)
    inputs = torch.randn(4 * SIDE, SIDE, generator=generator) @ mix
    hessian = inputs.T @ inputs
    norms = hessian.diagonal().sqrt()
    scores = wanda_scores(weight, norms)
    allowed = left(scores, pattern, earlier)
    whole = float(((weight @ hessian) * weight).sum())
    rows = []
    for method in ("wanda", "sparsegpt", "alps", "frank-wolfe"):
        errors: dict[str, float] = {}

        def run(way: str, method: str = method, errors: dict[str, float] = errors) -> None:
            rule, within = MaskRule(pattern), allowed if way == "within" else None
            before = weight if within is None else weight * within
            if method == "wanda":
                pruned = weight * rule.choose(scores, within)
            else:
                how = {"sparsegpt": sparsegpt, "alps": alps, "frank-wolfe": frank_wolfe}[method]
                pruned = how(before, hessian, rule, allowed=within).weight
            lost = weight - pruned
            errors[way] = float(((lost @ hessian) * lost).sum()) / whole

        times = common.interleaved(
            {way: partial(run, way) for way in ("free", "within")}, repeats, clock=time.process_time
        )
        rows += [
            {"way": f"{method}, {way}", "kept": "", "error": errors[way], "gap": ""} | timing(taken)
            for way, taken in times.items()
        ]
    return rows


def timing(taken: common.Seconds) -> dict[str, object]:
    return {
        "seconds": taken.median,
        "least": taken.least,
        "most": taken.most,
        "repeats": taken.repeats,
    }


def _sum(scores: Tensor) -> float:
    return float(scores.sum(dtype=torch.float64))


if __name__ == "__main__":
    main()
