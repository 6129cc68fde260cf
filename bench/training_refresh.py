"""What a refresh of all masks costs beside a training step: writes bench/results/training_refresh.csv.

For decoders of several sizes, in Llama's form: a step (forward, backward, AdamW) of the dense model, and one
under masks; and, for each pattern, the ordinary N:M masks of all linears inside the blocks, one call a layer;
their transposable masks, mask alone, all in one call; and a whole refresh of SparseTraining, which also takes
magnitudes, counts flips and writes the masks. All are timed in turn by the processor's clock, on one thread.
Weights are as the model draws them; the largest model has the sizes of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import nmsolve
from nmsolve.train import SparseTraining

ENDS = ("", "_least", "_most")


class Size(NamedTuple):
    blocks: int
    width: int
    inner: int
    heads: int
    shared_heads: int
    vocabulary: int
    tokens: int
    """In a step."""
    repeats: int


SIZES = {
    "2 x 64": Size(2, 64, 256, 2, 2, 256, 1024, 21),
    "4 x 256": Size(4, 256, 768, 4, 4, 256, 1024, 15),
    "8 x 512": Size(8, 512, 1536, 8, 8, 256, 1024, 5),
    "30 x 576 (SmolLM2-135M)": Size(30, 576, 1536, 9, 3, 49152, 512, 3),
}
WINDOW = 128


def decoder(size: Size) -> nn.Module:
    config = LlamaConfig(
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.shared_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def stepping(model: nn.Module, size: Size) -> Callable[[], None]:
    """A training step of a model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocabulary, (size.tokens // WINDOW, WINDOW), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    return step


def measure(name: str, size: Size) -> list[dict[str, object]]:
    """The rows of one model."""
    dense, model = decoder(size), decoder(size)
    weights = [model.get_parameter(key).data for key in SparseTraining(model, "2:4").patterns]
    scores = [weight.abs() for weight in weights]
    contenders: dict[str, Callable[[], object]] = {
        "dense_step": stepping(dense, size),
        "step": stepping(model, size),
    }
    for n, m in common.PATTERNS:
        layers = SparseTraining(nn.ModuleList(linear(weight) for weight in weights), f"{n}:{m}")
        contenders |= {
            f"{n}:{m} ordinary": lambda n=n, m=m: [nmsolve.nm_mask(score, n, m) for score in scores],
            f"{n}:{m} transposable": lambda n=n, m=m: nmsolve.transposable_masks(scores, n, m),
            f"{n}:{m} refresh": layers.refresh,
        }
    took = common.interleaved(contenders, size.repeats, clock=time.process_time)
    rows = []
    for n, m in common.PATTERNS:
        row: dict[str, object] = {
            "model": name,
            "pattern": f"{n}:{m}",
            "layers": len(scores),
            "weights": sum(score.numel() for score in scores),
            "tokens": size.tokens,
            "repeats": size.repeats,
        }
        here = {what: took[f"{n}:{m} {what}"] for what in ("ordinary", "transposable", "refresh")}
        for what, seconds in {**{key: took[key] for key in ("dense_step", "step")}, **here}.items():
            row |= {f"{what}_ms{end}": 1e3 * t for end, t in zip(ENDS, seconds[:3], strict=True)}
        row["over_ordinary"] = here["transposable"].median / here["ordinary"].median
        row["of_a_step"] = here["refresh"].median / took["step"].median
        rows.append(row)
    return rows


def linear(weight: Tensor) -> nn.Linear:
    """A layer that has this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, default=common.RESULTS / "training_refresh.csv")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.sizes:
        for row in measure(name, SIZES[name]):
            rows.append(row)
            print(
                "{model}, {pattern}: step {step_ms:.3g} ms (dense {dense_step_ms:.3g}), ordinary masks "
                "{ordinary_ms:.3g}, transposable {transposable_ms:.3g} ({over_ordinary:.2f}x), refresh "
                "{refresh_ms:.3g} ({of_a_step:.1%} of a step)".format(**row),
                flush=True,
            )
    common.write_csv(arguments.out, rows, "transformers")


if __name__ == "__main__":
    main()
