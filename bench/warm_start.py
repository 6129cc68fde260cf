"""Whether duals of an earlier solve save time: writes bench/results/warm_start.csv.

Weights move by a share of their own spread, as between two steps of a training run, and are solved anew from
the duals of before (``warm_start=``) and from nothing, for the mask alone and with the certificate. All four
are timed in turn. Every mask must keep as much as the cold one's, up to rounding.

A run that wants masks alone has no duals to start from: it must ask for the certificate each time, so what a
warm start saves is to be held against that as well.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import torch

import nmsolve

PATTERNS = common.PATTERNS[1:]
CHANGES = (1e-4, 1e-3, 1e-2, 1e-1)
SIDES = {"cpu": 2048, "torch": 256}
ENDS = ("", "_least", "_most")
TWIN = 1e-6  # how far two optima may differ by rounding, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--out", type=Path, default=common.RESULTS / "warm_start.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for backend in arguments.backends:
        side = SIDES[backend]
        generator = torch.Generator().manual_seed(side)
        weights = torch.randn(side, side, generator=generator)
        step = torch.randn(side, side, generator=generator)
        for n, m in PATTERNS:
            before = nmsolve.transposable_mask(weights.abs(), n, m, backend=backend, return_solution=True)
            for change in CHANGES:
                scores = (weights + change * step).abs()

                def solve(warm: bool, certificate: bool, scores=scores, n=n, m=m, start=before) -> object:
                    return nmsolve.transposable_mask(
                        scores,
                        n,
                        m,
                        backend=backend,  # noqa: B023 (called before it changes)
                        warm_start=start if warm else None,
                        return_solution=certificate,
                    )

                kept = [float((scores * solve(warm, False)).sum(dtype=torch.float64)) for warm in (0, 1)]
                assert abs(kept[1] / kept[0] - 1) < TWIN, kept
                took = common.interleaved(
                    {
                        (warm, certificate): lambda w=warm, c=certificate: solve(w, c)
                        for warm in (False, True)
                        for certificate in (False, True)
                    },
                    arguments.repeats,
                )
                row = {
                    "backend": backend,
                    "pattern": f"{n}:{m}",
                    "side": side,
                    "change": change,
                    "threads": arguments.threads,
                    "repeats": arguments.repeats,
                }
                for (warm, certificate), time in took.items():
                    name = ("warm" if warm else "cold") + ("_certificate" if certificate else "_mask")
                    row |= {f"{name}_ms{end}": 1e3 * t for end, t in zip(ENDS, time[:3], strict=True)}
                for what in ("mask", "certificate"):
                    row[f"{what}_warm_over_cold"] = row[f"warm_{what}_ms"] / row[f"cold_{what}_ms"]
                row["warm_certificate_over_cold_mask"] = row["warm_certificate_ms"] / row["cold_mask_ms"]
                rows.append(row)
                print(
                    "{backend} {pattern} moved by {change:g}: mask {cold_mask_ms:.3g} ms, warm "
                    "{warm_mask_ms:.3g}; certificate {cold_certificate_ms:.3g}, warm "
                    "{warm_certificate_ms:.3g}".format(**row),
                    flush=True,
                )
    common.write_csv(arguments.out, rows)


if __name__ == "__main__":
    main()
