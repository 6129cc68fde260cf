"""Trains a small language model whose matrix products see transposable N:M weights all along.

    python docs/examples/sparse_language_model.py

needs nothing but `pip install '.[cpu,hf]'` and, on one core, about two minutes. The text is Python's own
documentation, which every Python brings; --text takes another file. The folder of --out gets the pruned model
(config.json, model.safetensors), its masks (model.masks.safetensors) and a picture of the run (curves.png).
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import nmsolve
from nmsolve.train import SparseTraining

WINDOW = 128  # bytes that the model sees at once
HELD_OUT = 64  # windows of held-out text
HEAD = 32  # width of an attention head
GRADIENTS = ("straight-through", "masked", "sr-ste")


def main() -> int:
    try:
        train(parsed())
    except (OSError, nmsolve.NMSolveError) as error:
        print(f"sparse_language_model: {error}", file=sys.stderr)
        return 1
    return 0


def train(arguments: argparse.Namespace) -> None:
    learned, test = read(arguments.text)
    torch.manual_seed(arguments.seed)
    model = language_model(arguments.width, arguments.blocks)
    sparse = SparseTraining(
        model,
        arguments.pattern,
        transposable=not arguments.ordinary,
        refresh=arguments.refresh,
        gradient=arguments.gradient,
        decay=arguments.decay,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step / arguments.steps))
    sparse.attach(optimizer)  # from here on the loop is that of any training

    history: dict[str, list[tuple[int, float]]] = {}
    with tqdm(range(1, arguments.steps + 1), unit="step") as progress:
        for step in progress:
            optimizer.zero_grad()
            loss = model_loss(model, windows(learned, arguments.batch))
            loss.backward()
            optimizer.step()
            schedule.step()
            now = {"loss": loss.item()}
            if step % max(1, arguments.steps // 40) == 0 or step == arguments.steps:
                now["held-out loss"] = held_out_loss(model, test)
                metrics = sparse.metrics()
                now["kept share"] = metrics.kept_share
                if metrics.flip_rate_per_step is not None:  # None until the first refresh
                    now["flips per step"] = metrics.flip_rate_per_step
                progress.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in now.items()))
            for name, value in now.items():
                history.setdefault(name, []).append((step, value))

    masks = sparse.finish()  # plain layers again, with zeros where the masks are False
    for mask in masks.values():
        nmsolve.check_mask(mask, arguments.pattern, transposable=not arguments.ordinary)
    model.save_pretrained(arguments.out)
    nmsolve.save_masks(
        arguments.out / "model.masks.safetensors",
        masks,
        arguments.pattern,
        transposable=not arguments.ordinary,
    )
    draw(history, arguments.pattern, arguments.out / "curves.png")
    print(
        f"held-out loss {held_out_loss(model, test):.4f} nats a byte; the pruned model is in {arguments.out}"
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pattern", default="2:4", help="N:M, N kept of M")
    parser.add_argument("--ordinary", action="store_true", help="N:M along the input alone")
    parser.add_argument("--refresh", type=int, default=40, help="steps from one set of masks to the next")
    parser.add_argument("--gradient", choices=GRADIENTS, default=GRADIENTS[0], help="of pruned weights")
    parser.add_argument("--decay", type=float, default=1e-4, help="of pruned weights")
    parser.add_argument("--text", type=Path, help="a text file to learn; by default Python's documentation")
    parser.add_argument("--steps", type=positive, default=600, help="optimizer steps")
    parser.add_argument("--batch", type=positive, default=8, help=f"windows of {WINDOW} bytes in a step")
    parser.add_argument("--width", type=positive, default=128, help=f"of the model, a multiple of {HEAD}")
    parser.add_argument("--blocks", type=positive, default=2, help="of the model")
    parser.add_argument("--rate", type=float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and the batches")
    parser.add_argument("--out", type=Path, default=Path("sparse-language-model"), help="folder to write to")
    arguments = parser.parse_args()
    if arguments.width % HEAD:
        parser.error(f"--width: expected a multiple of {HEAD}, got {arguments.width}")
    if not 0 < arguments.rate < math.inf:
        parser.error(f"--rate: expected a positive number, got {arguments.rate}")
    return arguments


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def rate_at(done: float) -> float:
    """Share of the learning rate: a tenth of the run up, then half a cosine down."""
    return max(0.01, done / 0.1) if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def read(file: Path | None) -> tuple[Tensor, Tensor]:
    """The bytes of a text as two int64 tensors: nine tenths to learn, one tenth held out."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics)).encode() if file is None else file.read_bytes()
    if len(text) < 20 * WINDOW:
        raise nmsolve.NMSolveError(
            f"--text: {file}: expected at least {20 * WINDOW} bytes to learn from, got {len(text)}"
        )
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    border = len(ids) * 9 // 10
    return ids[:border], ids[border:]


def language_model(width: int, blocks: int) -> LlamaForCausalLM:
    """A Llama of bytes. Its head is its embedding, which SparseTraining leaves dense."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=blocks,
            num_attention_heads=width // HEAD,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def windows(text: Tensor, count: int) -> Tensor:
    """(count, WINDOW + 1) bytes from random places."""
    starts = torch.randint(len(text) - WINDOW, (count, 1))
    return text[starts + torch.arange(WINDOW + 1)]


def model_loss(model: LlamaForCausalLM, drawn: Tensor) -> Tensor:
    """The mean loss of the next byte, in nats."""
    logits = model(input_ids=drawn[:, :-1]).logits
    return functional.cross_entropy(logits.flatten(0, 1), drawn[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, text: Tensor) -> float:
    """The same for windows that are spread evenly over a text."""
    starts = torch.linspace(0, len(text) - WINDOW - 1, HELD_OUT).long().unsqueeze(1)
    return float(model_loss(model, text[starts + torch.arange(WINDOW + 1)]))


def draw(history: dict[str, list[tuple[int, float]]], pattern: str, file: Path) -> None:
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    losses, flips, kept = figure.subplots(1, 3)
    for axis, names in (
        (losses, ("loss", "held-out loss")),
        (flips, ("flips per step",)),
        (kept, ("kept share",)),
    ):
        for name in names:
            steps = [step for step, _ in history.get(name, [])]
            values = [value for _, value in history.get(name, [])]
            axis.plot(steps, values, label=name, linewidth=0.7 if name == "loss" else 1.5)
        axis.set(xlabel="optimizer step", title=names[-1])
        axis.grid(alpha=0.3)
    losses.set(ylabel="nats a byte", title=f"loss, {pattern}")
    losses.legend(frameon=False)
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    sys.exit(main())
