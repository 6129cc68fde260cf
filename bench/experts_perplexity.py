"""What does it cost to prune the experts of a mixture? A small Mixtral of bytes that is trained here.

    python bench experts_perplexity

Three blocks of width 128 with eight experts each, two to a token, learn bytes of the Wikipedia text of
smollm2_model.py. The model is pruned by ``prune_model``, with its experts and with ``dense="experts.*"``,
where attention alone is pruned, and the perplexity of a byte of held-out text is measured. Writes
bench/results/experts_perplexity.csv; ``expert_share`` is the share of the experts' weights that were pruned
to the pattern, ``share`` that of all parameters, ``fewest_tokens`` what the expert that saw least was
calibrated on.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from common import RESULTS, write_csv
from smollm2_model import texts
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM

from nmsolve.prune import perplexity, prune_model

FILE = "experts_perplexity.csv"
WINDOW, BATCH, STEPS, RATE = 128, 8, 200, 4e-3
CALIBRATION, TEST = 64, 64  # windows
CASES = (
    ("2:4", False, "magnitude"),
    ("2:4", False, "wanda"),
    ("2:4", False, "sparsegpt"),
    ("8:16", True, "wanda"),
    ("8:16", True, "sparsegpt"),
)


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def trained(text: Tensor) -> MixtralForCausalLM:
    """A Mixtral that has learned the text for some hundred steps."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=WINDOW,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 50, (1 + math.cos(math.pi * step / STEPS)) / 2)
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        starts = torch.randint(len(text) - WINDOW, (BATCH, 1), generator=generator)
        windows = text[starts + torch.arange(WINDOW)]
        optimizer.zero_grad()
        out = model(input_ids=windows, use_cache=False)
        loss = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        (loss + config.router_aux_loss_coef * out.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f}", flush=True)
    config.output_router_logits = False
    return model.eval()


def measured(model: nn.Module, test: Tensor) -> float:
    return perplexity(model, test, window=WINDOW, windows=TEST, batch_size=16, progress=False).perplexity


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)  # the layers are too small for more
    learned, test = map(as_bytes, texts())
    model = trained(learned)
    calibration = learned[: CALIBRATION * WINDOW].view(CALIBRATION, WINDOW)
    of_experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    parameters = sum(weight.numel() for weight in model.parameters())
    dense = measured(model, test)
    print(f"{parameters} parameters, {of_experts} of experts; perplexity {dense:.4f}", flush=True)
    rows = []
    for pattern, transposable, method in CASES:
        for pruned in (True, False):
            copied = copy.deepcopy(model)
            result = prune_model(
                copied,
                None if method == "magnitude" else calibration,
                pattern,
                transposable=transposable,
                method=method,
                dense=() if pruned else "experts.*",
                batch_size=8,
                progress=False,
            )
            layers = result.report.layers
            experts = [layer for layer in layers if ".experts." in layer.name]
            rows.append(
                {
                    "pattern": pattern,
                    "transposable": int(transposable),
                    "method": method,
                    "experts": "pruned" if pruned else "dense",
                    "parameters": parameters,
                    "expert_weights": of_experts,
                    "expert_share": sum(layer.weights for layer in experts) / of_experts,
                    "share": sum(layer.weights for layer in layers) / parameters,
                    "fewest_tokens": min((min(layer.expert_tokens or [0]) for layer in experts), default=""),
                    "perplexity": measured(copied, test),
                    "perplexity_dense": dense,
                    "test_bytes": TEST * WINDOW,
                }
            )
            print(*rows[-1].values(), flush=True)
    write_csv(RESULTS / FILE, rows, "transformers")


if __name__ == "__main__":
    main()
