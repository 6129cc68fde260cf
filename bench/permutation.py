"""What channel permutations are worth on SmolLM2-135M: kept score, and perplexity of the pruned model.

Part "model": the linears of all MLPs are pruned to ordinary N:M by Wanda's score in their natural order, in
RIA's, and in learned orders (down_proj's order folds into up_proj and gate_proj, which share one order of
their inputs). Learning starts from three passes of RIA's search, may not keep less score than one pass does,
and takes the order with the lowest loss on the last batches of the calibration text. Part "layers":
transposable masks of single linears with and without the best row and column order found, beside ordinary
N:M. Part "pictures": docs/permutation_*.png from the results and one plan.

Rows are appended to results/permutation.csv, and every check of learning to results/permutation_learning.csv;
what is there already is not run again. ``retained`` is the kept share of the score, ``closed`` the share of
the gap between transposable and ordinary N:M that the orders close, ``steps`` those of learning or the passes
of a search, ``tokens`` the calibration tokens (the held-out ones among them), ``batch`` those of one step,
``seconds`` the time for the order, with that of the start for learned ones. ``products`` says how float32
matrix products are computed: "bf16" rounds their factors to bfloat16, which the CPU's matrix unit takes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import RESULTS, ROOT, append_csv, read_csv
from smollm2_model import load_model, load_tokenizer, texts, tokens
from torch import Tensor, nn

import nmsolve
from nmsolve.permute import (
    Coupling,
    LearnableChannelPermutation,
    calibration_scores,
    find_couplings,
    learn_permutation,
    retained_score,
    ria_permutation,
    transposable_permutation,
)
from nmsolve.prune import perplexity

KEY = ("part", "scope", "pattern", "order")
ORDERS = ("natural", "ria", "ria 3 passes", "permllm", "cost-matrix")
LAYERS = (
    "model.layers.0.mlp.down_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.15.mlp.gate_proj",
    "model.layers.29.mlp.down_proj",
    "model.layers.29.self_attn.o_proj",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("model", "layers", "pictures"))
    parser.add_argument("--patterns", nargs="+", metavar="N:M", default=["2:4", "4:8"])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--passes", type=int, default=3, help="of the row and column search")
    parser.add_argument("--steps", type=int, default=14, help="of learning")
    parser.add_argument("--window", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=2, help="windows in a batch")
    parser.add_argument("--batches", type=int, default=16, help="of calibration; the last two are held out")
    parser.add_argument("--products", choices=("ieee", "bf16"), default="bf16", help="of float32 matrices")
    parser.add_argument("--test-windows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS / "permutation.csv")
    args = parser.parse_args()

    torch.backends.mkldnn.matmul.fp32_precision = args.products
    parts = args.parts or ("model", "layers", "pictures")
    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()
    if set(parts) & {"model", "layers"}:
        tokenizer = load_tokenizer()
        calibration, test = (tokens(tokenizer, text) for text in texts())
        size = args.batch * args.window
        used = calibration[: args.batches * size].view(args.batches, args.batch, args.window)
        model = load_model().eval()
        for pattern in args.patterns:
            if "model" in parts:
                part_model(model, list(used), test, nmsolve.NMPattern.parse(pattern), args, done)
            if "layers" in parts:
                part_layers(model, list(used), nmsolve.NMPattern.parse(pattern), args, done)
    if "pictures" in parts:
        pictures(args.out)


def record(args: argparse.Namespace, row: dict[str, object]) -> None:
    append_csv(args.out, {**row, "products": args.products}, "transformers")
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


# --- all MLPs, ordinary N:M ---------------------------------------------------------------------------------


def part_model(
    model: nn.Module,
    calibration: list[Tensor],
    test: Tensor,
    pattern: nmsolve.NMPattern,
    args: argparse.Namespace,
    done: set[tuple[str, ...]],
) -> None:
    todo = [order for order in args.orders if ("model", "mlp", str(pattern), order) not in done]
    if not todo:
        return
    couplings = [c for c in find_couplings(model) if ".mlp." in c.name]
    names = [site.tensor for c in couplings for site in c.consumers]
    scores = calibration_scores(model, calibration, names)
    total = sum(float(scores[name].double().sum()) for name in names)
    searched: dict[int, tuple[dict[str, Tensor], float]] = {}

    def ria(passes: int) -> tuple[dict[str, Tensor], float]:
        if passes not in searched:
            begun = time.perf_counter()
            n, m = pattern.n, pattern.m
            orders = {c.name: ria_permutation(c.scores(scores), n, m, passes=passes) for c in couplings}
            searched[passes] = orders, time.perf_counter() - begun
        return searched[passes]

    for order in todo:
        batch = 0
        if order == "natural":
            orders, seconds, steps = {c.name: torch.arange(c.size) for c in couplings}, 0.0, 0
        elif order.startswith("ria"):
            steps = 1 if order == "ria" else 3
            orders, seconds = ria(steps)
        else:
            start, seconds = ria(3)
            begun = time.perf_counter()
            found = learn_permutation(
                model,
                calibration,
                pattern.n,
                pattern.m,
                strategy=order,
                couplings=couplings,
                scores=scores,
                start=start,
                floor=ria(1)[0],
                steps=args.steps,
                held_out=2 / len(calibration),
                check_every=max(1, args.steps // 4),
                patience=args.steps,
                progress=True,
            )
            seconds += time.perf_counter() - begun
            orders, steps, batch = found.permutations, args.steps, args.batch * args.window
            for check in found.history:
                curve = {"pattern": str(pattern), "order": order, **check, "taken": found.best_step}
                append_csv(args.out.with_name(f"{args.out.stem}_learning.csv"), curve, "transformers")
        kept = sum(
            float(retained_score(c.scores(scores), pattern.n, pattern.m, orders[c.name])) for c in couplings
        )
        record(
            args,
            {
                "part": "model",
                "scope": "mlp",
                "pattern": str(pattern),
                "order": order,
                "retained": kept / total,
                "perplexity": pruned_perplexity(model, couplings, scores, orders, pattern, test, args),
                "closed": "",
                "steps": steps,
                "tokens": len(calibration) * args.batch * args.window,
                "batch": batch,
                "test_tokens": args.test_windows * args.window,
                "seconds": seconds,
            },
        )


def pruned_perplexity(
    model: nn.Module,
    couplings: list[Coupling],
    scores: dict[str, Tensor],
    orders: dict[str, Tensor],
    pattern: nmsolve.NMPattern,
    test: Tensor,
    args: argparse.Namespace,
) -> float:
    """Of the model with masks made in the given orders; the weights are put back."""
    dense = {}
    for coupling in couplings:
        for site in coupling.consumers:
            weight = model.get_parameter(site.tensor)
            dense[site.tensor] = weight.detach().clone()
            order = coupling.index(orders[coupling.name], site)
            mask = nmsolve.nm_mask(scores[site.tensor][:, order], pattern.n, pattern.m)
            weight.data.mul_(mask[:, order.argsort()])
    try:
        return perplexity(
            model, test, window=args.window, windows=args.test_windows, progress=False
        ).perplexity
    finally:
        for name, weight in dense.items():
            model.get_parameter(name).data.copy_(weight)


# --- single linears, transposable N:M -----------------------------------------------------------------------


def part_layers(
    model: nn.Module,
    calibration: list[Tensor],
    pattern: nmsolve.NMPattern,
    args: argparse.Namespace,
    done: set[tuple[str, ...]],
) -> None:
    names = [name for name in args.layers if ("layers", name, str(pattern), "rows and columns") not in done]
    if not names:
        return
    scores = calibration_scores(model, calibration, [f"{name}.weight" for name in names])
    for name in names:
        score = scores[f"{name}.weight"]
        total = float(score.double().sum())
        ordinary = float(retained_score(score, pattern.n, pattern.m))
        begun = time.perf_counter()
        found = transposable_permutation(score, pattern.n, pattern.m, passes=args.passes)
        seconds = time.perf_counter() - begun
        before, after = float(found.before), float(found.after)
        common = {"part": "layers", "scope": name, "pattern": str(pattern)}
        tokens = len(calibration) * args.batch * args.window
        ends = {"perplexity": "", "closed": "", "steps": 0, "tokens": tokens, "batch": 0, "test_tokens": 0}
        record(args, {**common, "order": "ordinary", "retained": ordinary / total, **ends, "seconds": 0.0})
        record(args, {**common, "order": "natural", "retained": before / total, **ends, "seconds": 0.0})
        ends |= {"closed": (after - before) / (ordinary - before), "steps": args.passes}
        row = {**common, "order": "rows and columns", "retained": after / total, **ends, "seconds": seconds}
        record(args, row)


# --- pictures -----------------------------------------------------------------------------------------------


def pictures(results: Path) -> None:
    """docs/permutation_plan.png and docs/permutation_retained.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    torch.manual_seed(0)
    module = LearnableChannelPermutation(24, block=24)
    with torch.no_grad():
        module.logits.copy_(torch.randn(1, 24, 24) * 0.3 + torch.eye(24)[torch.randperm(24)] * 0.5)
    temperatures = (1.0, 0.3, 0.1, 0.03)
    figure, axes = plt.subplots(1, len(temperatures) + 1, figsize=(11, 2.6))
    for axis, temperature in zip(axes, temperatures, strict=False):
        module.temperature = temperature
        axis.imshow(module.plan()[0].detach(), vmin=0, vmax=1, cmap="Blues")
        axis.set_title(f"temperature {temperature}")
    axes[-1].imshow(module.hard()[0], vmin=0, vmax=1, cmap="Blues")
    axes[-1].set_title("assignment")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "permutation_plan.png", dpi=110)

    rows = [row for row in read_csv(results) if row["part"] == "layers"]
    scopes = list(dict.fromkeys((row["scope"], row["pattern"]) for row in rows))
    figure, axis = plt.subplots(figsize=(9, 1 + 0.4 * len(scopes)))
    colours = {"natural": "#b0b7c3", "rows and columns": "#2f6db3", "ordinary": "#333333"}
    for order, colour in colours.items():
        kept = {(r["scope"], r["pattern"]): float(r["retained"]) for r in rows if r["order"] == order}
        label = "ordinary N:M" if order == "ordinary" else f"transposable, {order} order"
        label = label.replace("rows and columns order", "rows and columns reordered")
        axis.scatter([kept[s] for s in scopes], range(len(scopes)), color=colour, label=label, zorder=3)
    axis.set_yticks(range(len(scopes)), [f"{s.removeprefix('model.')}  {p}" for s, p in scopes], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("kept share of Wanda's score")
    axis.grid(axis="x", alpha=0.4)
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "permutation_retained.png", dpi=110)
    print("wrote docs/permutation_plan.png and docs/permutation_retained.png")


if __name__ == "__main__":
    main()
