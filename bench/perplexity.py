"""Perplexity of SmolLM2-135M pruned by every method, pattern and kind of mask.

Writes results/perplexity.csv row by row: what is there already is not run again, so the command can be
stopped and given again. All block linears are pruned; the text is Wikipedia (see smollm2_model.py).

Columns: ``mask`` is dense, ordinary, exact or tsenor (the last two transposable); ``sequential`` tells what
was pruned before a layer's inputs were measured (block: the blocks before it, as in the methods' own code;
layer: the layers before it; off: nothing); ``retained`` is the mean over layers of the kept share of the
method's scores, ``error`` that of the relative reconstruction error; ``seconds`` is the time of the pruning,
``mask_seconds`` the part of it spent in the mask solver.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from pathlib import Path

import torch
from common import PATTERNS, RESULTS, append_csv, read_csv
from smollm2_model import load_model, load_tokenizer, texts, tokens

from nmsolve.prune import perplexity, prune_model

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
MASKS = ("ordinary", "exact", "tsenor")
KEY = ("method", "pattern", "mask", "sequential", "calibration_tokens", "test_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    patterns = [f"{n}:{m}" for n, m in PATTERNS]
    parser.add_argument("--patterns", nargs="+", metavar="N:M", default=patterns)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--sequential", choices=("block", "layer", "off"), default="block")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512, help="tokens in a sequence, for both")
    parser.add_argument("--out", type=Path, default=RESULTS / "perplexity.csv")
    args = parser.parse_args()

    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()
    todo = [("dense", "dense", "dense")]
    todo += list(itertools.product(args.methods, args.patterns, args.masks))
    settings = (args.sequential, str(args.calibration_tokens), str(args.test_tokens))
    dense_settings = ("off", "0", str(args.test_tokens))
    keys = [(*row, *(dense_settings if row[0] == "dense" else settings)) for row in todo]
    keys = [key for key in keys if key not in done]
    if not keys:
        return
    tokenizer = load_tokenizer()
    calibration, test = (tokens(tokenizer, text) for text in texts())
    dense = load_model()
    for key in keys:
        row = measure(dense, key, calibration, test, args.window)
        append_csv(args.out, row, "transformers")
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def measure(
    dense: torch.nn.Module, key: tuple[str, ...], calibration: torch.Tensor, test: torch.Tensor, window: int
) -> dict[str, object]:
    """One row of the table."""
    method, pattern, mask, sequential, calibration_tokens, test_tokens = key
    row: dict[str, object] = dict(zip(KEY, key, strict=True))
    model, totals = dense, {}
    if method != "dense":
        model = copy.deepcopy(dense)
        start = time.perf_counter()
        result = prune_model(
            model,
            calibration,
            pattern,
            transposable=mask != "ordinary",
            method=method,
            mask_method="exact" if mask == "ordinary" else mask,
            sequential=sequential,
            samples=int(calibration_tokens) // window,
            sequence_length=window,
            batch_size=4,
        )
        totals = {**result.report.totals(), "seconds": time.perf_counter() - start}
    found = perplexity(model, test, window=window, windows=int(test_tokens) // window, progress=False)
    return {
        **row,
        "perplexity": found.perplexity,
        "retained": totals.get("mean_retained", 1.0),
        "error": totals.get("mean_relative_error", 0.0),
        "seconds": totals.get("seconds", 0.0),
        "mask_seconds": totals.get("mask_seconds", 0.0),
    }


if __name__ == "__main__":
    main()
