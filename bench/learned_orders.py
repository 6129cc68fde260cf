"""Channel orders learned for the loss of the pruned model, beside searches, on SmolLM2-135M's MLPs.

All linears of the MLPs are pruned to ordinary N:M by Wanda's score. Part "orders": the perplexity of
held-back articles with the channels as they are, in the orders of ten passes of RIA's search (of the scores,
and of their squares), and in orders that learning makes of the former. Every row of
results/learned_orders.csv has the mean loss of each window of the test text, in nats, so that two orders are
compared window by window. ``seconds`` is the time for the order, with that of its start; ``tokens`` are those
of learning, the held-out ones among them; ``bytes`` is what learning holds at most beyond the dense model,
for each weight that it learns for, and ``plain`` the seconds of a plain forward and backward pass of one of
its batches.

Part "gradient": what the loss of one batch does when some pairs of columns of a coupling change places, and
what two gradients at the start say of it: that of the masks, with the masks that follow from the change
(nmsolve.permute.linearised), and that of the plan, as "permllm" takes it. Rows of
results/learned_gradient.csv.

Rows are appended; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import torch
from common import RESULTS, append_csv, read_csv
from memory_cpu import status
from smollm2_model import load_model, load_tokenizer, texts, tokens
from torch import Tensor, nn
from torch.nn import functional

import nmsolve
from nmsolve.permute import (
    Coupling,
    LearnableChannelPermutation,
    calibration_scores,
    find_couplings,
    learn_permutation,
    retained_score,
    ria_permutation,
)
from nmsolve.permute.masked_weights import MaskedModel
from nmsolve.permute.objective import next_token_loss
from nmsolve.prune import perplexity

ORDERS = (
    "natural",
    "ria",
    "ria of squares",
    "frank-wolfe",
    "frank-wolfe from natural",
    "frank-wolfe of what folds",
    "permllm",
    "cost-matrix",
)
KEY = ("pattern", "order", "steps")
SWAPS = (1, 4, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=("orders", "gradient"), default=("orders", "gradient"))
    parser.add_argument("--patterns", nargs="+", metavar="N:M", default=["2:4", "4:8"])
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS[:4])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rate", type=float, help="of learning (the strategy's)")
    parser.add_argument("--batch", type=int, default=4, help="windows in a batch")
    parser.add_argument("--held-out", type=int, default=4, help="batches")
    parser.add_argument("--window", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--score-windows", type=int, default=32, help="that Wanda's scores are taken on")
    parser.add_argument("--test-windows", type=int, default=64)
    parser.add_argument("--products", choices=("ieee", "bf16"), default="bf16", help="of float32 matrices")
    parser.add_argument("--out", type=Path, default=RESULTS / "learned_orders.csv")
    args = parser.parse_args()

    torch.backends.mkldnn.matmul.fp32_precision = args.products
    tokenizer = load_tokenizer()
    calibration, test = (tokens(tokenizer, text) for text in texts())
    model = load_model().eval()
    bench = Bench(model, calibration, test, args)
    for text in args.patterns:
        pattern = nmsolve.NMPattern.parse(text)
        if "orders" in args.parts:
            bench.orders(pattern)
        if "gradient" in args.parts:
            bench.gradients(pattern)


class Bench:
    """A model with its scores and its batches, all of them drawn once."""

    def __init__(self, model: nn.Module, calibration: Tensor, test: Tensor, args: argparse.Namespace) -> None:
        self.model, self.test, self.args = model, test, args
        self.couplings = [c for c in find_couplings(model) if ".mlp." in c.name]
        windows = calibration[: len(calibration) // args.window * args.window].view(-1, args.window)
        drawn = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
        needed = (args.steps + args.held_out) * args.batch
        if needed > len(drawn):
            raise SystemExit(f"the calibration text has {len(drawn)} windows; {needed} are needed")
        self.batches = list(drawn[:needed].view(-1, args.batch, args.window))
        names = [site.tensor for c in self.couplings for site in c.consumers]
        self.scores = calibration_scores(model, list(drawn[: args.score_windows].split(2)), names)
        self.total = sum(float(score.double().sum()) for score in self.scores.values())
        self.weights = sum(score.numel() for score in self.scores.values())

    # --- orders and what they are worth ---------------------------------------------------------------------

    def orders(self, pattern: nmsolve.NMPattern) -> None:
        args = self.args
        done = set()
        if args.out.exists():
            done = {(row["pattern"], row["order"], row["steps"]) for row in read_csv(args.out)}
        squares = {name: score.square() for name, score in self.scores.items()}
        for order in args.orders:
            learns = not order.startswith("ria") and order != "natural"
            steps = args.steps if learns else 0
            if (str(pattern), order, str(steps)) in done:
                continue
            begun = time.perf_counter()
            row: dict[str, object] = {"tokens": 0, "batch": 0, "held_out": "", "bytes": "", "plain": ""}
            if order == "natural" or order.endswith("from natural"):
                orders = {c.name: torch.arange(c.size) for c in self.couplings}
            else:
                scores = squares if order == "ria of squares" else self.scores
                orders = {c.name: ria_permutation(c.scores(scores), pattern) for c in self.couplings}
            if learns:
                folded = order.endswith("of what folds")
                found, row = self.learned(pattern, order.split()[0], orders, folded)
                orders |= found
            seconds = time.perf_counter() - begun
            kept = sum(
                float(retained_score(c.scores(self.scores), pattern.n, pattern.m, orders[c.name]))
                for c in self.couplings
            )
            losses = self.losses(pattern, orders)
            self.record(
                args.out,
                {
                    "pattern": str(pattern),
                    "order": order,
                    "steps": steps,
                    **row,
                    "retained": kept / self.total,
                    "seconds": seconds,
                    "perplexity": float(torch.tensor(losses).mean().exp()),
                    "test_tokens": args.test_windows * args.window,
                    "losses": " ".join(f"{loss:.6f}" for loss in losses),
                },
            )

    def learned(
        self, pattern: nmsolve.NMPattern, strategy: str, start: dict[str, Tensor], folded: bool
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        args = self.args
        plain = self.plain_pass()
        ctypes.CDLL(None).malloc_trim(0)
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        found = learn_permutation(
            self.model,
            self.batches,
            pattern,
            strategy=strategy,
            couplings=[c for c in self.couplings if c.folds or not folded],
            scores=self.scores,
            start=start,
            steps=args.steps,
            learning_rate=args.rate,
            held_out=args.held_out / len(self.batches),
            check_every=max(1, args.steps // 6),
            patience=args.steps,
            progress=True,
        )
        held = " ".join(f"{row['step']}:{row['held_out']:.4f}" for row in found.history)
        row = {
            "tokens": len(self.batches) * args.batch * args.window,
            "batch": args.batch * args.window,
            "held_out": held,
            "bytes": (status("VmHWM") - before) / self.weights,
            "plain": plain,
        }
        return found.permutations, row

    def plain_pass(self) -> float:
        """Seconds of a forward and a backward pass of one batch, with the gradients of all weights."""
        self.model.requires_grad_(True)
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            next_token_loss(self.model(self.batches[0]), self.batches[0]).backward()
            seconds.append(time.perf_counter() - begun)
            self.model.zero_grad()
        self.model.requires_grad_(False)
        return min(seconds)

    def losses(self, pattern: nmsolve.NMPattern, orders: dict[str, Tensor]) -> tuple[float, ...]:
        """Of the windows of the test text, in nats, with masks made in the given orders."""
        dense = {}
        for coupling in self.couplings:
            for site in coupling.consumers:
                weight = self.model.get_parameter(site.tensor)
                dense[site.tensor] = weight.detach().clone()
                order = coupling.index(orders[coupling.name], site)
                mask = nmsolve.nm_mask(self.scores[site.tensor][:, order], pattern.n, pattern.m)
                weight.data.mul_(mask[:, order.argsort()])
        try:
            return perplexity(
                self.model, self.test, window=self.args.window, windows=self.args.test_windows, progress=False
            ).losses
        finally:
            for name, weight in dense.items():
                self.model.get_parameter(name).data.copy_(weight)

    # --- gradients beside differences -----------------------------------------------------------------------

    def gradients(self, pattern: nmsolve.NMPattern) -> None:
        path = self.args.out.with_name("learned_gradient.csv")
        if path.exists() and any(row["pattern"] == str(pattern) for row in read_csv(path)):
            return
        batch = self.batches[0][:2]
        start = [ria_permutation(c.scores(self.scores), pattern) for c in self.couplings]
        masked = MaskedModel(
            self.model, self.couplings, start, self.scores, pattern, [2] * len(self.couplings)
        )
        generator = torch.Generator().manual_seed(0)
        with masked.installed():
            with masked.watched(1.0):
                loss = next_token_loss(self.model(batch), batch)
                loss.backward()
            before = float(loss.detach())
            for k in range(0, len(self.couplings), 5):
                part = masked.parts[k]
                order = part.order
                slopes = self.plan_slopes(part, pattern)
                for swaps in SWAPS:
                    new, by_plan = swapped(order[0], slopes, swaps, generator)
                    by_masks = 0.0
                    for weight, mask in zip(part.weights, part.masks(new[None], pattern), strict=True):
                        change = mask.float() - weight.mask.float()
                        by_masks -= float((weight.first_order() * change).sum(dtype=torch.float64))
                    masked.reorder(part, new[None])
                    with torch.no_grad():
                        after = float(next_token_loss(self.model(batch), batch))
                    masked.reorder(part, order)
                    row = {"pattern": str(pattern), "coupling": part.coupling.name, "swaps": swaps}
                    row |= {"loss": before, "change": after - before, "masks": by_masks, "plan": by_plan}
                    self.record(path, row)

    def plan_slopes(self, part: object, pattern: nmsolve.NMPattern) -> Tensor:
        """The gradient ``(blocks, 64, 64)`` of the loss by the plan of "permllm" in the present order."""
        coupling: Coupling = part.coupling
        module = LearnableChannelPermutation(coupling.size)
        plan = functional.one_hot(module.permutation().view(-1, module.block) % module.block, module.block)
        plan = plan.float().requires_grad_(True)
        for weight in part.weights:
            index = coupling.index(part.order, weight.site)
            matrix = weight.dense.detach()[:, index]
            pruned = module.masked(matrix, weight.scores[:, index], plan, pattern, False)
            pruned.backward(weight.pruned.grad[:, index])
        return plan.grad

    def record(self, path: Path, row: dict[str, object]) -> None:
        append_csv(path, {**row, "products": self.args.products}, "transformers")
        print(", ".join(f"{name} {value}" for name, value in row.items() if name != "losses"), flush=True)


def swapped(order: Tensor, slopes: Tensor, swaps: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """An order with random pairs of one block exchanged, and what the plan's gradient says of that."""
    blocks, size = slopes.shape[:2]
    new, change = order.clone(), 0.0
    for _ in range(swaps):
        b = int(torch.randint(blocks, (1,), generator=generator))
        i, j = torch.randperm(size, generator=generator)[:2].tolist()
        new[[b * size + i, b * size + j]] = new[[b * size + j, b * size + i]]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    moved = place[new].view(blocks, size) % size  # which channel of the block is where now
    for b in range(blocks):
        rows = torch.arange(size)
        change += float((slopes[b, rows, moved[b]] - slopes[b, rows, rows]).sum())
    return new, change


if __name__ == "__main__":
    main()
