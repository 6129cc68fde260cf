"""Perplexity of SmolLM2-135M pruned by every method, pattern and kind of mask.

All block linears are pruned; the text is Wikipedia (see smollm2_model.py). Rows are appended to
results/perplexity.csv as they are measured, and what is there already is not run again, so the command can
be stopped and given again. --picture draws docs/perplexity.png from the results instead.

Columns: ``mask`` is dense, ordinary, exact or tsenor (the last two transposable); ``sequential`` tells what
was pruned before a layer's inputs were measured (off: nothing, one-shot; block: the blocks before it; layer:
the layers before it); ``matmul`` is the precision of the forward passes' matrix products. ``retained`` is
the mean over layers of the kept share of the method's scores, ``gap`` how much more any layer's mask could
have kept at most (relative), ``error`` the mean relative reconstruction error; ``seconds`` is the time of
the pruning with its calibration, ``mask_seconds`` the part of it spent in the mask solver.

One-shot rows share the statistics of the dense model's inputs, which are measured once; each row counts the
time that took. results/perplexity_layers.csv has the retained score of each layer for the methods whose
scores do not depend on the mask.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from common import PATTERNS, RESULTS, ROOT, append_csv, read_csv
from peers import wanda as published
from smollm2_model import load_model, load_tokenizer, texts, tokens
from torch import Tensor, nn

from nmsolve.prune import (
    MaskRule,
    alps,
    frank_wolfe,
    magnitude_scores,
    make_batches,
    perplexity,
    prune_model,
    ria_scores,
    sparsegpt,
    wanda_scores,
)
from nmsolve.prune.layerwise.alps import alps_system
from nmsolve.prune.layerwise.sparsegpt import sparsegpt_factor
from nmsolve.prune.methods import PRUNING_METHODS

PUBLISHED = "wanda, published rule"  # peers/wanda.py, with ordinary masks alone
MASKS = ("ordinary", "exact", "tsenor")
KEY = ("method", "pattern", "mask", "sequential", "calibration_tokens", "test_tokens", "matmul")

NOTHING_PRUNED = {"retained": 1.0, "gap": 0.0, "error": 0.0, "seconds": 0.0, "mask_seconds": 0.0}

# Layers of a block that see the same input.
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    every = (*reversed(PRUNING_METHODS), PUBLISHED)  # those that take long last
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    patterns = [f"{n}:{m}" for n, m in PATTERNS]
    parser.add_argument("--patterns", nargs="+", metavar="N:M", default=patterns)
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=MASKS)
    parser.add_argument("--sequential", choices=("block", "layer", "off"), default="off")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--test-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512, help="tokens in a sequence, for both")
    parser.add_argument(
        "--matmul", choices=("float32", "bfloat16"), default="bfloat16", help="of the forward passes"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "perplexity.csv")
    parser.add_argument("--picture", action="store_true", help="draw the results, measure nothing")
    args = parser.parse_args()
    if args.sequential != "off" and args.matmul != "float32":
        parser.error(f"--sequential {args.sequential}: prunes between forward passes, needs --matmul float32")
    if args.picture:
        draw(read_csv(args.out))
        return

    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()
    todo = [("dense", "dense", "dense")]
    todo += [
        (method, pattern, mask)
        for method, pattern, mask in itertools.product(args.methods, args.patterns, args.masks)
        if method != PUBLISHED or (mask == "ordinary" and args.sequential == "off")
    ]
    todo.sort(key=lambda key: key[2] == "tsenor")  # the slowest last
    settings = (args.sequential, str(args.calibration_tokens), str(args.test_tokens), args.matmul)
    dense_settings = ("off", "0", str(args.test_tokens), args.matmul)
    keys = [(*row, *(dense_settings if row[0] == "dense" else settings)) for row in todo]
    keys = [key for key in keys if key not in done]
    if not keys:
        return
    tokenizer = load_tokenizer()
    calibration, test = (tokens(tokenizer, text) for text in texts())
    windows = args.test_tokens // args.window
    bench = Bench(load_model(), calibration, test, args.window, windows, args.matmul)
    for key in keys:
        row, layers = bench.measure(dict(zip(KEY, key, strict=True)))
        append_csv(args.out, row, "transformers")
        if layers:
            append_csv(args.out.with_stem(f"{args.out.stem}_layers"), layers, "transformers")
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """The precision in which the processor multiplies float32 matrices."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = {"float32": "ieee", "bfloat16": "bf16"}[precision]
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


class OneShot:
    """What the layers of the dense model see, measured once for all methods, patterns and masks."""

    def __init__(self, model: nn.Module, batches: list[Tensor], precision: str) -> None:
        start = time.perf_counter()
        self.leaders: dict[str, str] = {}
        self.hessians: dict[str, Tensor] = {}
        self.energies: dict[str, float] = {}
        self.prepared: dict[tuple[str, str], tuple[object, float]] = {}
        hooks = []
        for name, module in model.named_modules():
            for group in GROUPS:
                if name.endswith(group):
                    self.leaders[name] = f"{name.rsplit('.', 2)[0]}.{group[0]}"
            if self.leaders.get(name) == name:
                self.hessians[name] = torch.zeros(module.in_features, module.in_features)
                hooks.append(module.register_forward_pre_hook(measuring(self.hessians[name])))
        with torch.no_grad(), matmul(precision):
            for batch in batches:
                model.model(batch)
        for hook in hooks:
            hook.remove()
        self.seconds = time.perf_counter() - start

    def prune(self, model: nn.Module, method: str, pattern: str, mask: str) -> list[dict[str, float]]:
        """Prunes the layers of a copy of the model; what became of each."""
        return [
            self._layer(name, model.get_submodule(name).weight.data, method, mask_rule(pattern, mask))
            for name in self.leaders
        ]

    def _layer(self, name: str, weight: Tensor, method: str, rule: MaskRule) -> dict[str, float]:
        hessian = self.hessians[self.leaders[name]]
        system, waited = self._prepare(method, name)
        start = time.perf_counter()
        if method == "alps":
            pruned = alps(weight, system, rule).weight
        elif method == "sparsegpt":
            pruned = sparsegpt(weight, system, rule).weight
        elif method == "frank-wolfe":
            pruned = frank_wolfe(weight, hessian, rule).weight
        else:
            pruned = weight * rule.choose(scores(method, weight, hessian))
        seconds = waited + time.perf_counter() - start
        if name not in self.energies:
            self.energies[name] = energy(weight, hessian)
        error = energy(weight - pruned, hessian) / self.energies[name]
        weight.copy_(pruned)
        tally = rule.tally
        return {
            "retained": tally.retained,
            "gap": max(tally.gap, 0.0),
            "error": error,
            "seconds": seconds,
            "mask_seconds": tally.seconds,
        }

    def _prepare(self, method: str, name: str) -> tuple[object, float]:
        """The factors of a layer's Hessian, and the seconds they took if no layer before has needed them."""
        prepare = {"sparsegpt": sparsegpt_factor, "alps": alps_system}.get(method)
        if prepare is None:
            return None, 0.0
        leader = self.leaders[name]
        if (method, leader) not in self.prepared:
            start = time.perf_counter()
            system = prepare(self.hessians[leader])
            self.prepared[method, leader] = system, time.perf_counter() - start
        system, seconds = self.prepared[method, leader]
        return system, seconds if name == leader else 0.0


def measuring(hessian: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that adds a layer's inputs to its Hessian, always in float32."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        inputs = args[0].flatten(0, -2)
        with matmul("float32"):
            hessian.addmm_(inputs.T, inputs)

    return hook


def energy(weight: Tensor, hessian: Tensor) -> float:
    """``||W X||^2`` over the inputs X of the Hessian."""
    return float(((weight @ hessian) * weight).sum())


def mask_rule(pattern: str, mask: str) -> MaskRule:
    return MaskRule(pattern, transposable=mask != "ordinary", method="exact" if mask == "ordinary" else mask)


def scores(method: str, weight: Tensor, hessian: Tensor) -> Tensor:
    if method == "magnitude":
        return magnitude_scores(weight)
    norms = hessian.diagonal().sqrt()
    return wanda_scores(weight, norms) if method == "wanda" else ria_scores(weight, norms)


class Bench:
    """The dense model and the texts, and rows of the table measured with them."""

    def __init__(
        self,
        dense: nn.Module,
        calibration: Tensor,
        test: Tensor,
        window: int,
        windows: int,
        precision: str,
    ) -> None:
        self.dense, self.calibration, self.test = dense, calibration, test
        self.window, self.windows, self.precision = window, windows, precision
        self.one_shot: OneShot | None = None
        self.norms: dict[str, Tensor] | None = None

    def measure(self, key: dict[str, str]) -> tuple[dict[str, object], dict[str, object]]:
        """One row of the table, and one of the table of layers."""
        if key["method"] == "dense":
            return {**key, "perplexity": self._perplexity(self.dense), **NOTHING_PRUNED}, {}
        if key["method"] == PUBLISHED:
            return self._published(key), {}
        model = copy.deepcopy(self.dense)
        prune = self._one_shot if key["sequential"] == "off" else self._sequential
        layers, seconds = prune(model, key)
        row = {
            **key,
            "perplexity": self._perplexity(model),
            "retained": fmean(layer["retained"] for layer in layers),
            "gap": max(layer["gap"] for layer in layers),
            "error": fmean(layer["error"] for layer in layers),
            "seconds": seconds,
            "mask_seconds": math.fsum(layer["mask_seconds"] for layer in layers),
        }
        if key["method"] not in ("magnitude", "wanda", "ria"):
            return row, {}
        return row, {**key, "retained": " ".join(f"{layer['retained']:.7f}" for layer in layers)}

    def _perplexity(self, model: nn.Module) -> float:
        with matmul(self.precision):
            return perplexity(
                model, self.test, window=self.window, windows=self.windows, progress=False
            ).perplexity

    def _one_shot(self, model: nn.Module, key: dict[str, str]) -> tuple[list[dict[str, float]], float]:
        if self.one_shot is None:
            batches = make_batches(self.calibration, **self._draw(key))
            self.one_shot = OneShot(self.dense, batches, self.precision)
        layers = self.one_shot.prune(model, key["method"], key["pattern"], key["mask"])
        statistics = 0.0 if key["method"] == "magnitude" else self.one_shot.seconds
        return layers, statistics + math.fsum(layer["seconds"] for layer in layers)

    def _sequential(self, model: nn.Module, key: dict[str, str]) -> tuple[list[dict[str, float]], float]:
        rule = mask_rule(key["pattern"], key["mask"])
        start = time.perf_counter()
        with matmul(self.precision):
            result = prune_model(
                model,
                self.calibration,
                key["pattern"],
                transposable=rule.transposable,
                method=key["method"],
                mask_method=rule.method,
                sequential=key["sequential"],
                progress=False,
                **self._draw(key),
            )
        seconds = time.perf_counter() - start
        layers = [asdict(layer) | {"error": layer.relative_error} for layer in result.report.layers]
        return layers, seconds

    def _published(self, key: dict[str, str]) -> dict[str, object]:
        """The row of Wanda as its paper gives it, measured without nmsolve."""
        with matmul(self.precision):
            if self.norms is None:
                batches = make_batches(self.calibration, **self._draw(key))
                self.norms = published.input_norms(self.dense, batches)
            model = copy.deepcopy(self.dense)
            published.prune(model, self.norms, *map(int, key["pattern"].split(":")))
            value = published.perplexity(model, self.test, self.window, self.windows)
        return {**key, "perplexity": value, **dict.fromkeys(NOTHING_PRUNED, "")}

    def _draw(self, key: dict[str, str]) -> dict[str, int]:
        samples = int(key["calibration_tokens"]) // self.window
        return {"samples": samples, "sequence_length": self.window, "batch_size": 4}


def draw(rows: list[dict[str, str]]) -> None:
    """Perplexity against M, a panel for each method, a line for each kind of mask."""
    from matplotlib.figure import Figure
    from tables.pruning import NAMES_OF_METHODS

    dense = next(float(row["perplexity"]) for row in rows if row["method"] == "dense")
    rows = [row for row in rows if row["sequential"] == "off" and row["method"] != "dense"]
    methods = [method for method in NAMES_OF_METHODS if any(row["method"] == method for row in rows)]
    figure = Figure(figsize=(2.6 * len(methods), 3.4), layout="constrained")
    panels = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    styles = {"ordinary": "o-", "exact": "s-", "tsenor": "x--"}
    for panel, method in zip(panels, methods, strict=True):
        for mask, style in styles.items():
            points = sorted(
                (int(row["pattern"].partition(":")[2]), float(row["perplexity"]))
                for row in rows
                if (row["method"], row["mask"]) == (method, mask)
            )
            label = mask if mask == "ordinary" else f"transposable, {mask}"
            panel.plot([m for m, _ in points], [y for _, y in points], style, label=label, markersize=4)
        panel.axhline(dense, color="gray", linestyle=":", label="dense")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks([m for _, m in PATTERNS], [f"{n}:{m}" for n, m in PATTERNS])
        panel.set_title(method)
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("perplexity")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(ROOT / "docs" / "perplexity.png", dpi=120)


if __name__ == "__main__":
    main()
