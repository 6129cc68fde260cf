"""What layers of SmolLM2-135M lose by each method, on the calibration text and on other text.

The linears of the block in the middle, each with the Hessian of its inputs in the dense model: 16,384 tokens
to prune on, 8,192 others (of other articles) to judge by. Rows are appended to results/layer_errors.csv as
they are measured; what is there already is not run again.

Columns: ``error`` and ``held_out`` are shares of ``||X W^T||^2`` on either text, ``seconds`` the time with
the layer's own factors, ``mask_seconds`` the part of it in the mask solver, ``retained`` the tally's share.
"exchanges" start from the
mask of squared Wanda scores, as all of Frank-Wolfe does, and "plain" has neither penalty nor exchanges.
``bound`` (of the method of that name) is what any mask loses at least on the calibration text, if the
weights that stay do not change.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import RESULTS, append_csv, read_csv
from smollm2_model import load_model, load_tokenizer, texts, tokens
from torch import Tensor, nn

from nmsolve.prune import (
    MaskRule,
    Pruned,
    alps,
    frank_wolfe,
    layer_error_bound,
    make_batches,
    sparsegpt,
    wanda_scores,
)

BLOCKS = (15,)
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
MASKS = (("2:4", "transposable"), ("8:16", "transposable"), ("16:32", "transposable"), ("2:4", "ordinary"))
BOUND = "bound"
KEY = ("layer", "pattern", "mask", "method")

Method = Callable[[Tensor, Tensor, MaskRule], Pruned]


def by_scores(power: int, weight: Tensor, hessian: Tensor, rule: MaskRule) -> Pruned:
    """The mask of the largest Wanda scores, or of their squares."""
    mask = rule.choose(wanda_scores(weight, hessian.diagonal().sqrt()) ** power)
    return Pruned(weight * mask, mask)


def then(solve: Callable[..., Pruned], weight: Tensor, hessian: Tensor, rule: MaskRule) -> Pruned:
    """The weights by another method, for the mask of Frank-Wolfe."""
    return solve(weight, hessian, rule, allowed=frank_wolfe(weight, hessian, rule).mask)


METHODS: dict[str, Method] = {
    "wanda": partial(by_scores, 1),
    "wanda squared": partial(by_scores, 2),
    "exchanges": partial(frank_wolfe, iterations=0),
    "frank-wolfe, plain": partial(frank_wolfe, penalty=0.0, sweeps=0),
    "frank-wolfe, no exchanges": partial(frank_wolfe, sweeps=0),
    "frank-wolfe": frank_wolfe,
    "sparsegpt": sparsegpt,
    "sparsegpt, mask of frank-wolfe": partial(then, sparsegpt),
    "alps": alps,
    "alps, mask of frank-wolfe": partial(then, alps),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", nargs="+", type=int, default=BLOCKS)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS / "layer_errors.csv")
    args = parser.parse_args()
    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()
    names = [f"model.layers.{block}.{linear}" for block in args.blocks for linear in LINEARS]
    keys = [
        (name, *mask, method)
        for name, mask, method in itertools.product(names, MASKS, (*METHODS, BOUND))
        if (name, *mask, method) not in done
    ]
    if not keys:
        return
    model, tokenizer = load_model(), load_tokenizer()
    hessians = []
    for text, samples in zip(texts(), (32, 16), strict=True):
        batches = make_batches(
            tokens(tokenizer, text), samples=samples, sequence_length=args.window, batch_size=4
        )
        hessians.append(measure(model, batches, {key[0] for key in keys}))
    for key in keys:
        row = run(key, model.get_submodule(key[0]).weight.data, *(found[key[0]] for found in hessians))
        append_csv(args.out, row, "transformers")
        print(", ".join(str(value) for value in row.values()), flush=True)


@torch.no_grad()
def measure(model: nn.Module, batches: list[Tensor], names: set[str]) -> dict[str, Tensor]:
    """The Hessians of the layers' inputs."""
    found: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def add(module: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            inputs = args[0].flatten(0, -2)
            if name not in found:
                found[name] = torch.zeros(inputs.shape[1], inputs.shape[1])
            found[name].addmm_(inputs.T, inputs)

        hooks.append(model.get_submodule(name).register_forward_pre_hook(add))
    for batch in batches:
        model.base_model(batch)
    for hook in hooks:
        hook.remove()
    return found


def run(key: tuple[str, ...], weight: Tensor, hessian: Tensor, other: Tensor) -> dict[str, object]:
    """One row."""
    row: dict[str, object] = dict(zip(KEY, key, strict=True))
    rule = MaskRule(key[1], key[2] == "transposable")
    start = time.perf_counter()
    if key[3] == BOUND:
        row |= {"error": layer_error_bound(weight, hessian, rule), "held_out": ""}
        retained: float | str = ""
    else:
        lost = weight - METHODS[key[3]](weight, hessian, rule).weight
        row |= {"error": energy(lost, hessian) / energy(weight, hessian)}
        row |= {"held_out": energy(lost, other) / energy(weight, other)}
        retained = rule.tally.retained
    seconds = time.perf_counter() - start
    return {**row, "seconds": seconds, "mask_seconds": rule.tally.seconds, "retained": retained}


def energy(weight: Tensor, hessian: Tensor) -> float:
    """``||X W^T||^2`` over the inputs X of the Hessian."""
    return float(((weight @ hessian) * weight).sum(dtype=torch.float64))


if __name__ == "__main__":
    main()
