"""Tiny random models of the families whose channels can be reordered, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "opt", "bert", "gpt2")
VOCABULARY = 96


def build(family: str) -> nn.Module:
    """A tiny random model in float64, two blocks deep, with grouped key/value heads where there can be."""
    transformers = pytest.importorskip("transformers")
    grouped = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**grouped, **common),
        "qwen2": lambda: transformers.Qwen2Config(**grouped, **common),
        "qwen3": lambda: transformers.Qwen3Config(**grouped, head_dim=16, **common),
        "mistral": lambda: transformers.MistralConfig(**grouped, **common),
        "opt": lambda: transformers.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            **common,
        ),
        "bert": lambda: transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=0,
        ),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **common
        ),
    }
    torch.manual_seed(0)
    config = configs[family]()
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    model = kind.from_config(config).double().eval()
    with torch.no_grad():  # biases and norms start at constants, which no wrong order would show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits
