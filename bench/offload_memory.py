"""How much memory `nmsolve prune` takes with the weights in the model, on the host or in the files.

    python bench offload_memory

A Llama of 1 GB with random weights (float32, 8 blocks) is pruned 2:4 by Wanda on the CPU, with --offload
none, cpu and disk; here the host is the device, so that cpu saves nothing. Each run is a process of its own.
Writes bench/results/offload_memory.csv: the most that was resident, that of the same run on a model of nearly
no size, which is what Python and its packages take, and what the report says of weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import RESULTS, write_csv
from mask_scale import watched
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

FILE = "offload_memory.csv"
OFFLOADS = ("none", "cpu", "disk")
BLOCKS, WIDTH, INNER, WORDS = 8, 1536, 4096, 8000
SEQUENCES, LENGTH = 2, 16


def make(folder: Path, width: int, inner: int, blocks: int) -> int:
    """A Llama with random weights; its bytes."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="300MB")
    return sum(parameter.nbytes for parameter in model.parameters())


def prune(source: Path, tokens: Path, out: Path, offload: str) -> tuple[int, dict[str, int]]:
    """Most resident bytes of a process, and the bytes of its report."""
    options = ["--pattern", "2:4", "--method", "wanda", "--device", "cpu", "--quiet", "--no-picture"]
    options += [] if offload == "none" else ["--offload", offload]
    command = [sys.executable, "-m", "nmsolve", "prune", str(source), "--calibration", str(tokens)]
    child = subprocess.Popen([*command, "--out", str(out), *options])
    with watched(child.pid) as peaks:
        code = child.wait()
    if code:
        raise subprocess.CalledProcessError(code, child.args)
    memory = json.loads((out / "nmsolve_report.json").read_text(encoding="utf-8"))["memory"]
    return sum(peaks.values()), memory


def main() -> None:
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stored = make(folder / "big", WIDTH, INNER, BLOCKS)
        make(folder / "small", 64, 64, 2)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(WORDS, (SEQUENCES, LENGTH), generator=generator)
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        for offload in OFFLOADS:
            base, _ = prune(
                folder / "small", folder / "tokens.safetensors", folder / f"small-{offload}", offload
            )
            peak, memory = prune(
                folder / "big", folder / "tokens.safetensors", folder / f"big-{offload}", offload
            )
            rows.append(
                {
                    "offload": offload,
                    "model_mb": stored / 1e6,
                    "blocks": BLOCKS,
                    "peak_mb": peak / 1e6,
                    "without_model_mb": base / 1e6,
                    "at_once_mb": memory.get("block", memory["model"]) / 1e6,
                }
            )
            print(*rows[-1].values(), flush=True)
    write_csv(RESULTS / FILE, rows, "transformers")


if __name__ == "__main__":
    main()
