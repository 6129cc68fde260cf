"""What do V:N:M masks keep, next to N:M and to no pattern at all? And the time it takes.

Part "layers": single linears of SmolLM2-135M with Wanda's score. At the same sparsity: the largest scores
of the whole matrix ("unstructured"), the ordinary N:M mask, and V:N:M masks of four columns: by the columns'
sums and by VENOM's enumeration (bench/peers/venom.py), ours proven and by exchanges alone, and ours in
another order of the columns, or of rows and columns. Part "cost": time of a strip and group by M, on random
scores.

Rows are appended to results/hierarchical.csv; what is there already is not run again. ``kept`` is the kept
share of the score, ``gap`` that of the whole matrix, ``proven`` the share of strips and groups whose choice
is proven optimal, ``lost`` what the exchanges alone lose against that, ``seconds`` processor time of one
thread, the median of ``repeats`` in turn (least and most beside it); of "cost" that of one strip and group.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, append_csv, interleaved, read_csv, scores
from peers.venom import enumerated, largest_sums
from torch import Tensor

import nmsolve
from nmsolve.permute import calibration_scores, hierarchical_permutation

LAYERS = (
    "model.layers.10.self_attn.q_proj",
    "model.layers.15.mlp.gate_proj",
    "model.layers.29.mlp.down_proj",
)
PATTERNS = ("64:2:8", "64:2:16", "16:2:8", "64:2:32")
SIZES = (8, 16, 32, 64, 128)
KEY = ("part", "scope", "pattern", "method")
EMPTY = dict.fromkeys(("kept", "gap", "proven", "lost", "seconds", "least", "most", "repeats"), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("layers", "cost"), default=("cost", "layers"))
    parser.add_argument("--patterns", nargs="+", metavar="V:N:M", default=PATTERNS)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--batches", type=int, default=4, help="of calibration, 1,024 tokens each")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "hierarchical.csv")
    args = parser.parse_args()

    torch.set_num_threads(1)
    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()

    def record(**row: object) -> None:
        append_csv(args.out, {**dict.fromkeys(KEY), **EMPTY, **row}, "transformers")
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    if "cost" in args.parts:
        cost(record, done, args.repeats)
    if "layers" in args.parts:
        example = torch.rand(16, 16)
        enumerated(example, 16, 2, 8)  # compiled now
        nmsolve.hierarchical_mask(example, "16:2:8")
        for name, matrix in layer_scores(args.layers, args.batches).items():
            for pattern in args.patterns:
                if ("layers", name, pattern, "rows and columns") not in done:
                    # All at once: a run that is killed leaves no half of a comparison.
                    for row in layer(name, matrix, nmsolve.VNMPattern.of(pattern), args.repeats):
                        record(**row)


def cost(record: Callable[..., None], done: set[tuple[str, ...]], repeats: int) -> None:
    for distribution in ("normal", "wanda"):
        for v in (16, 64):
            for m in SIZES:
                pattern = nmsolve.VNMPattern(v, 2, m)
                if ("cost", distribution, str(pattern), "exact") in done:
                    continue
                blocks = max(16, 2048 // m)
                matrix = scores(distribution, (v, blocks * m), seed=m)
                solved: dict[str, nmsolve.HierarchicalSolution] = {}
                contenders = {
                    "exchanges": lambda: solve(matrix, pattern, solved, "exchanges", limit=0),  # noqa: B023
                    "exact": lambda: solve(matrix, pattern, solved, "exact"),  # noqa: B023
                }
                times = interleaved(contenders, repeats, clock=time.process_time)
                for method, taken in times.items():
                    found = solved[method]
                    record(
                        part="cost",
                        scope=distribution,
                        pattern=str(pattern),
                        method=method,
                        kept=found.total_objective / float(matrix.double().sum()),
                        gap=found.relative_gap,
                        proven=float((found.gap == 0).double().mean()),
                        lost=1 - found.total_objective / solved["exact"].total_objective,
                        seconds=taken.median / blocks,
                        least=taken.least / blocks,
                        most=taken.most / blocks,
                        repeats=taken.repeats,
                    )


def solve(
    matrix: Tensor,
    pattern: nmsolve.VNMPattern,
    solved: dict[str, nmsolve.HierarchicalSolution],
    method: str,
    **options: int,
) -> None:
    solved[method] = nmsolve.hierarchical_mask(matrix, pattern, return_solution=True, **options)


def layer(name: str, matrix: Tensor, pattern: nmsolve.VNMPattern, repeats: int) -> list[dict[str, object]]:
    total = float(matrix.double().sum())
    v, n, m = pattern.v, pattern.n, pattern.m
    common = {"part": "layers", "scope": name, "pattern": str(pattern)}

    def share(mask: Tensor) -> float:
        return float((matrix.double() * mask).sum()) / total

    largest = matrix.flatten().topk(matrix.numel() * n // m).values.double().sum()
    made: list[dict[str, object]] = [
        {**common, "method": "unstructured", "kept": float(largest) / total},
        {**common, "method": "ordinary", "kept": share(nmsolve.nm_mask(matrix, n, m))},
    ]

    solved: dict[str, nmsolve.HierarchicalSolution] = {}
    masks: dict[str, Tensor] = {}
    times = interleaved(
        {
            "sums": lambda: masks.update(sums=largest_sums(matrix, v, n, m)),
            "enumerated": lambda: masks.update(enumerated=enumerated(matrix, v, n, m)),
            "exchanges": lambda: solve(matrix, pattern, solved, "exchanges", limit=0),
            "exact": lambda: solve(matrix, pattern, solved, "exact"),
        },
        # VENOM's loops try 36 thousand choices of each strip and group there.
        repeats if m < 32 else 1,
        warm_up=0,
        clock=time.process_time,
    )
    for method, taken in times.items():
        row = {"kept": share(masks[method] if method in masks else solved[method].mask)}
        if method in solved:
            nmsolve.check_hierarchical_mask(solved[method].mask, pattern)
            row["gap"] = solved[method].relative_gap
            row["proven"] = float((solved[method].gap == 0).double().mean())
            row["lost"] = 1 - solved[method].total_objective / solved["exact"].total_objective
        spread = {"seconds": taken.median, "least": taken.least, "most": taken.most}
        made.append({**common, "method": method, **row, **spread, "repeats": taken.repeats})
    for method, rows in (("columns", False), ("rows and columns", True)):
        begun = time.process_time()
        found = hierarchical_permutation(matrix, pattern, rows=rows)
        seconds = time.process_time() - begun
        spread = {"seconds": seconds, "least": seconds, "most": seconds}
        made.append({**common, "method": method, "kept": float(found.after) / total, **spread, "repeats": 1})
    return made


def layer_scores(layers: tuple[str, ...], batches: int) -> dict[str, Tensor]:
    """Wanda's score of single layers."""
    from smollm2_model import load_model, load_tokenizer, texts, tokens

    calibration = tokens(load_tokenizer(), texts()[0])[: batches * 1024].view(batches, 2, 512)
    model = load_model().eval()
    found = calibration_scores(model, list(calibration), [f"{name}.weight" for name in layers])
    return {name: found[f"{name}.weight"].contiguous() for name in layers}


if __name__ == "__main__":
    main()
