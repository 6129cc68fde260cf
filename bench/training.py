"""Sparse training from scratch: how the masks are chosen and refreshed against the loss on held-out text.

A small Llama of bytes (2 blocks of width 64) learns the Wikipedia text of smollm2_model.py: dense,
under masks that stay as they were, and under masks that follow the weights in every way that SparseTraining
has. The runs of a seed begin with the same weights and see the same batches, so that they can be compared in
pairs. Every run is a row of results/training.csv, written when it ends; what is there already is not run
again, so the command can be stopped and given again. --steps 2400 --patterns 2:4 --methods fixed sr-ste adds
longer runs of some. "frozen end" is straight-through whose masks stay as they are in the last quarter.

The learning rate and the two strengths of decay are those that did best in a run of a seed that is not among
the others (part "pilot": dense for the rate, 2:4 for the decays).

Columns: ``held_out`` is the loss in nats a byte, of the finished model, on held-out text; ``curve`` the same
on a smaller part of that text along the run, every ``steps / 20`` steps; ``flips`` the share of mask entries
that a refresh changed, per step, as of the last refresh at these steps; ``moved`` the share that changed
between a tenth of the run and the next, however often a refresh came, and ``moved_in_all`` that between the
first mask and the last; ``kept`` the share of the weights' magnitude that masks keep at the end. ``seconds``
are the processor's.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from common import RESULTS, append_csv, read_csv
from smollm2_model import texts
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from nmsolve.train import SparseTraining

PATTERNS = ("2:4", "16:32", "8:16")  # in the order in which they are run
METHODS = ("dense", "fixed", "straight-through", "sr-ste", "gradient decay", "frozen end")
REFRESHES = (1, 40, 200)
STEPS = 800
PILOT_SEED = 1000
PILOT = {
    "dense": (2e-3, 4e-3, 8e-3),
    "sr-ste": (0.1, 1.0, 10.0, 100.0),
    "gradient decay": (1e-4, 1e-3, 1e-2, 1e-1),
}

WIDTH, HEADS, BLOCKS = 64, 2, 2
WINDOW, BATCH = 64, 8
POINTS = 20
SMALL, LARGE = 128, 2048  # windows of held-out text: along the run, and at its end


@dataclass(frozen=True)
class Run:
    """What decides a run; the columns that tell rows apart."""

    part: str
    method: str
    mask: str
    pattern: str
    refresh: int
    decay: float
    rate: float
    seed: int
    steps: int

    def key(self) -> tuple[str, ...]:
        return tuple(f"{v:.5g}" if isinstance(v, float) else str(v) for v in asdict(self).values())


# --- the model and the text ---------------------------------------------------------------------------------


def decoder(seed: int) -> nn.Module:
    """A Llama whose head is its embedding, which stays dense."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=3 * WIDTH,
            num_hidden_layers=BLOCKS,
            num_attention_heads=HEADS,
            max_position_embeddings=WINDOW,
            initializer_range=0.08,
            tie_word_embeddings=True,
        )
    )


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats a byte; windows: (batch, WINDOW + 1) int64."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def batches(text: Tensor, seed: int, steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        starts = torch.randint(len(text) - WINDOW, (BATCH, 1), generator=generator)
        yield text[starts + torch.arange(WINDOW + 1)]


def held_out(model: nn.Module, text: Tensor, windows: int) -> float:
    """The loss on so many windows, spread evenly over the text."""
    starts = torch.linspace(0, len(text) - WINDOW - 1, windows).long().unsqueeze(1)
    drawn = text[starts + torch.arange(WINDOW + 1)]
    with torch.no_grad():
        return float(torch.stack([loss(model, part) for part in drawn.split(64)]).mean())


# --- one run ------------------------------------------------------------------------------------------------


def sparse_training(model: nn.Module, run: Run) -> SparseTraining | None:
    if run.method == "dense":
        return None
    gradients = {"fixed": "masked", "sr-ste": "sr-ste"}
    sparse = SparseTraining(
        model,
        run.pattern,
        transposable=run.mask == "transposable",
        refresh=run.refresh or run.steps,
        gradient=gradients.get(run.method, "straight-through"),
        decay=run.decay,
    )
    if run.method == "fixed":
        sparse.freeze()
    return sparse


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate: a twentieth of the run up, then half a cosine down to nothing."""
    warm = steps // 20
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def moved(before: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    """The share of mask entries that differ."""
    changed = sum(int((mask != now[name]).sum()) for name, mask in before.items())
    return changed / sum(mask.numel() for mask in now.values())


def train(run: Run, learned: Tensor, test: Tensor) -> dict[str, object]:
    """Trains a model and returns its row."""
    began = time.process_time()
    model = decoder(run.seed)
    sparse = sparse_training(model, run)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=run.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, run.steps))
    if sparse is not None:
        sparse.attach(optimizer)
    masks = [] if sparse is None else [sparse.masks]
    curve, flips, kept = [], [], 1.0
    for step, batch in enumerate(batches(learned, run.seed, run.steps), 1):
        optimizer.zero_grad()
        loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if run.method == "frozen end" and step == run.steps * 3 // 4:
            sparse.freeze()
        if step % (run.steps // POINTS):
            continue
        curve.append(held_out(model, test, SMALL))
        if sparse is not None:
            metrics = sparse.metrics()
            flips.append(metrics.flip_rate_per_step or 0.0)
            kept = metrics.kept_share
            if step % (run.steps // 10) == 0:
                masks.append(sparse.masks)
    if sparse is not None:
        sparse.finish()
    return {
        **asdict(run),
        "held_out": f"{held_out(model, test, LARGE):.5f}",
        "kept": kept,
        "moved_in_all": moved(masks[0], masks[-1]) if masks else 0.0,
        "curve": in_a_cell(curve),
        "flips": in_a_cell(flips),
        "moved": in_a_cell([moved(*pair) for pair in itertools.pairwise(masks)]),
        "seconds": time.process_time() - began,
    }


def in_a_cell(numbers: list[float]) -> str:
    return " ".join(f"{number:.4g}" for number in numbers)


# --- all runs -----------------------------------------------------------------------------------------------


def pilot(rows: list[dict[str, str]], steps: int, method: str) -> tuple[list[Run], float | None]:
    """The runs that choose a method's value, and the value; None until all of them are there."""
    base = Run("pilot", method, "none", "dense", 0, 0.0, 0.0, PILOT_SEED, steps)
    if method == "dense":
        runs = [replace(base, rate=value) for value in PILOT[method]]
    else:
        rate = pilot(rows, steps, "dense")[1]
        if rate is None:
            return [], None
        refresh = 1 if method == "sr-ste" else 40
        base = replace(base, mask="transposable", pattern="2:4", refresh=refresh, rate=rate)
        runs = [replace(base, decay=value) for value in PILOT[method]]
    losses = {row_key(row): float(row["held_out"]) for row in rows}
    if any(run.key() not in losses for run in runs):
        return runs, None
    best = min(runs, key=lambda run: losses[run.key()])
    return runs, best.rate if method == "dense" else best.decay


def row_key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in Run.__dataclass_fields__)


def comparison(
    seeds: int, steps: int, rate: float, sr_ste: float, gradient_decay: float
) -> Iterator[list[Run]]:
    """The runs that are compared: the dense ones, and then those of one pattern and seed at a time."""
    dense = [Run("comparison", "dense", "none", "dense", 0, 0.0, rate, seed, steps) for seed in range(seeds)]
    yield dense
    for pattern, run in itertools.product(PATTERNS, dense):
        sparse = replace(run, mask="transposable", pattern=pattern)
        yield [
            replace(sparse, method="fixed"),
            *(replace(sparse, method="straight-through", refresh=refresh) for refresh in REFRESHES),
            replace(sparse, method="sr-ste", refresh=1, decay=sr_ste),
            replace(sparse, method="gradient decay", refresh=40, decay=gradient_decay),
            replace(sparse, method="straight-through", mask="ordinary", refresh=40),
        ]
    for run in dense:
        sparse = replace(run, method="frozen end", mask="transposable", pattern=PATTERNS[0])
        yield [replace(sparse, refresh=refresh) for refresh in REFRESHES if refresh > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help=f"a multiple of {POINTS}")
    parser.add_argument("--pilot-steps", type=int, default=STEPS, help="of the runs that choose values")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS, metavar="N:M")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "training.csv")
    arguments = parser.parse_args()
    for option, steps in (("--steps", arguments.steps), ("--pilot-steps", arguments.pilot_steps)):
        if steps < POINTS or steps % POINTS:
            parser.error(f"{option}: expected a multiple of {POINTS}, got {steps}")
    torch.set_num_threads(arguments.threads)
    learned, test = (as_bytes(text) for text in texts())

    def have(runs: list[Run]) -> None:
        done = {row_key(row) for row in rows()}
        for run in runs:
            if run.key() not in done:
                row = train(run, learned, test)
                append_csv(arguments.out, row, "transformers", "gensim")
                print(", ".join(f"{name} {row[name]}" for name in (*asdict(run), "held_out")), flush=True)

    def rows() -> list[dict[str, str]]:
        return read_csv(arguments.out) if arguments.out.exists() else []

    for method in PILOT:
        have(pilot(rows(), arguments.pilot_steps, method)[0])
    rate, sr_ste, gradient_decay = (pilot(rows(), arguments.pilot_steps, method)[1] for method in PILOT)
    for runs in comparison(arguments.seeds, arguments.steps, rate, sr_ste, gradient_decay):
        wanted = [run for run in runs if run.method in arguments.methods]
        have([run for run in wanted if run.pattern in ("dense", *arguments.patterns)])


if __name__ == "__main__":
    main()
