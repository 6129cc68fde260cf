"""Perplexity of masks chosen in several ways, window by window: differences with their spread.

The models are SmolLM2-135M (see smollm2_model.py), and a GPT-2 of bytes that is trained here on the
calibration text: layer norms, learned positions, Conv1D and GELU where the other has RMS norms, rotations and
gates. All linears of the blocks are pruned one-shot, by the methods of bench/layer_errors.py. Each row of
results/perplexity_spread.csv has the mean loss of each window of the test text, in nats, so that two methods
can be compared window by window. Rows are appended as they are measured; what is there already is not run
again, and the GPT-2 is kept in ``--folder``.

``error`` is the mean over layers of the share of ``||X W^T||^2`` that is lost on the calibration text.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from common import RESULTS, ROOT, append_csv, read_csv
from layer_errors import METHODS as METHODS_OF_LAYERS
from layer_errors import Method, energy, measure
from perplexity import matmul
from smollm2_model import load_model, load_tokenizer, texts, tokens
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from nmsolve.prune import MaskRule, Pruned, make_batches, perplexity, ria_scores

FILE = "perplexity_spread.csv"
KEY = ("model", "pattern", "mask", "method", "calibration_tokens", "test_tokens")
MASKS = (("8:16", "transposable"), ("16:32", "transposable"), ("2:4", "ordinary"))


def by_ria(weight: Tensor, hessian: Tensor, rule: MaskRule) -> Pruned:
    """The mask of the largest RIA scores."""
    mask = rule.choose(ria_scores(weight, hessian.diagonal().sqrt()))
    return Pruned(weight * mask, mask)


METHODS: dict[str, Method] = {"ria": by_ria} | METHODS_OF_LAYERS
COMPARED = (
    "wanda",
    "wanda squared",
    "ria",
    "frank-wolfe",
    "sparsegpt",
    "sparsegpt, mask of frank-wolfe",
    "alps",
    "alps, mask of frank-wolfe",
)
SIZES = {"smollm2": (16384, 32768), "gpt2-bytes": (16384, 65536)}
"""Models, with the tokens that they are calibrated and tested on."""

WINDOW = {"smollm2": 512, "gpt2-bytes": 256}
STEPS, BATCH, RATE = 600, 8, 2e-3  # of the GPT-2


@dataclass
class Subject:
    """A model, the linears of its blocks, and its text."""

    model: nn.Module
    linears: dict[str, nn.Module]
    hessians: dict[str, Tensor]
    test: Tensor
    window: int
    windows: int
    precision: str

    def losses(self) -> tuple[float, ...]:
        """The mean loss of each window, of the weights as they are."""
        with matmul(self.precision):
            return perplexity(
                self.model, self.test, window=self.window, windows=self.windows, progress=False
            ).losses

    def prune(self, method: str, rule: MaskRule) -> tuple[tuple[float, ...], float]:
        """Losses and error with the layers pruned; the weights are the dense ones again afterwards."""
        dense = {name: layer.weight.detach().clone() for name, layer in self.linears.items()}
        errors = []
        try:
            for name, layer in self.linears.items():
                turned = isinstance(layer, Conv1D)  # its weight is (inputs, outputs)
                weight = dense[name].T.contiguous() if turned else dense[name]
                pruned = METHODS[method](weight, self.hessians[name], rule).weight
                errors.append(
                    energy(weight - pruned, self.hessians[name]) / energy(weight, self.hessians[name])
                )
                layer.weight.data.copy_(pruned.T if turned else pruned)
            return self.losses(), fmean(errors)
        finally:
            for name, layer in self.linears.items():
                layer.weight.data.copy_(dense[name])


def subject(name: str, folder: Path) -> Subject:
    """The model of this name, with what its linears see of the calibration text."""
    if name == "smollm2":
        model = load_model()
        tokenizer = load_tokenizer()
        calibration, test = (tokens(tokenizer, text) for text in texts())
    else:
        model = gpt2_of_bytes(folder / name)
        calibration, test = (as_bytes(text) for text in texts())
    blocks = {
        layer_name: layer
        for layer_name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer_name != "lm_head"
    }
    samples, windows = (count // WINDOW[name] for count in SIZES[name])
    batches = make_batches(calibration, samples=samples, sequence_length=WINDOW[name], batch_size=4)
    hessians = measure(model, batches, set(blocks))
    precision = "bfloat16" if name == "smollm2" else "float32"
    return Subject(model, blocks, hessians, test, WINDOW[name], windows, precision)


# --- the GPT-2 ----------------------------------------------------------------------------------------------


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def gpt2_of_bytes(folder: Path) -> GPT2LMHeadModel:
    """A GPT-2 with four blocks of width 256, from its folder or trained on the calibration text."""
    if folder.exists():
        return GPT2LMHeadModel.from_pretrained(folder).eval()
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=WINDOW["gpt2-bytes"], n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    text = as_bytes(texts()[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (1 + math.cos(math.pi * step / STEPS)) / 2)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        starts = torch.randint(len(text) - config.n_positions, (BATCH, 1), generator=generator)
        windows = text[starts + torch.arange(config.n_positions)]
        optimizer.zero_grad()
        logits = model(input_ids=windows, use_cache=False).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"gpt2-bytes, step {step}: {loss.item():.3f}", flush=True)
    model.eval().save_pretrained(folder)
    return model


# --- all rows -----------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--methods", nargs="+", choices=COMPARED, default=COMPARED)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the GPT-2 is kept")
    parser.add_argument("--out", type=Path, default=RESULTS / FILE)
    args = parser.parse_args()
    done = {tuple(row[k] for k in KEY) for row in read_csv(args.out)} if args.out.exists() else set()
    for name in args.models:
        sizes = tuple(map(str, SIZES[name]))
        keys = [(name, "dense", "dense", "dense", *sizes)]
        keys += [(name, *mask, method, *sizes) for mask, method in itertools.product(MASKS, args.methods)]
        keys = [key for key in keys if key not in done]
        if not keys:
            continue
        bench = subject(name, args.folder)
        for key in keys:
            pruned = key[3] != "dense"
            rule = MaskRule(key[1], key[2] == "transposable") if pruned else None
            losses, error = bench.prune(key[3], rule) if rule else (bench.losses(), 0.0)
            row = {
                **dict(zip(KEY, key, strict=True)),
                "perplexity": math.exp(fmean(losses)),
                "error": error,
                "losses": " ".join(f"{loss:.6g}" for loss in losses),
            }
            append_csv(args.out, row, "transformers")
            print(*key, f"{row['perplexity']:.4f}", f"{error:.5f}", flush=True)


if __name__ == "__main__":
    main()
