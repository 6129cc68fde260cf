"""Small checkpoints on disk for the tests of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["METADATA", "llama", "save_sharded"]

METADATA = {"format": "pt", "note": 'ä "quoted" note'}


def llama(
    dtype: torch.dtype = torch.bfloat16, hidden: int = 32, inner: int = 80, seed: int = 0
) -> dict[str, Tensor]:
    """A random state dict with the names of a two-layer Llama whose head is tied to its embeddings."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    state = {"model.embed_tokens.weight": weight(50, hidden), "model.norm.weight": weight(hidden)}
    for layer in range(2):
        name = f"model.layers.{layer}"
        for part, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (16, hidden),
            "self_attn.v_proj": (16, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            state[f"{name}.{part}.weight"] = weight(*shape)
        state[f"{name}.input_layernorm.weight"] = weight(hidden)
        state[f"{name}.post_attention_layernorm.weight"] = weight(hidden)
    return state


def save_sharded(folder: Path, state: Mapping[str, Tensor], shards: int = 2) -> dict[str, str]:
    """Saves a checkpoint folder in ``shards`` files with an index, a configuration and a tokenizer."""
    folder.mkdir(parents=True)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {
            name: tensor
            for k, (name, tensor) in enumerate(state.items())
            if k * shards // len(state) == number
        }
        save_file(part, folder / file, metadata=METADATA)
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("a\nb\n")
    return weight_map
