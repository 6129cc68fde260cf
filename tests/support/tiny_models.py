"""Tiny random transformers models for tests: two layers, sizes that 16 divides."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY = 96
HIDDEN, INNER, LAYERS, HEADS = 32, 64, 2, 2


def _sizes() -> dict[str, int]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }


def make(kind: str, **changes: object) -> nn.Module:
    """A model of one of the kinds of ``KINDS``, the same for the same arguments."""
    import transformers as t

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    match kind:
        case "llama":
            config = t.LlamaConfig(
                vocab_size=VOCABULARY, num_key_value_heads=1, **_sizes(), **special, **changes
            )
            return t.LlamaForCausalLM(config).eval()
        case "qwen2":
            config = t.Qwen2Config(
                vocab_size=VOCABULARY, num_key_value_heads=1, **_sizes(), **special, **changes
            )
            return t.Qwen2ForCausalLM(config).eval()
        case "opt":
            config = t.OPTConfig(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                ffn_dim=INNER,
                num_hidden_layers=LAYERS,
                num_attention_heads=HEADS,
                max_position_embeddings=64,
                word_embed_proj_dim=16,
                **special,
                **changes,
            )
            return t.OPTForCausalLM(config).eval()
        case "gpt2":
            config = t.GPT2Config(
                vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=64, **special
            )
            return t.GPT2LMHeadModel(config).eval()
        case "bert":
            config = t.BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **_sizes(), **special)
            return t.BertForMaskedLM(config).eval()
        case "vit":
            config = t.ViTConfig(image_size=16, patch_size=4, **_sizes())
            return t.ViTForImageClassification(config).eval()
        case "t5":
            config = t.T5Config(
                vocab_size=VOCABULARY,
                d_model=HIDDEN,
                d_kv=16,
                d_ff=INNER,
                num_layers=LAYERS,
                num_heads=HEADS,
                decoder_start_token_id=2,
                **special,
            )
            return t.T5ForConditionalGeneration(config).eval()
    raise ValueError(kind)


def mixtral(**changes: int) -> nn.Module:
    """A mixture of four experts, which transformers 5 keeps in one parameter; the same every time."""
    import transformers

    torch.manual_seed(0)
    sizes = _sizes() | {"intermediate_size": 48, "num_key_value_heads": 1, "num_local_experts": 4} | changes
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=VOCABULARY, **sizes)).eval()


KINDS = ("llama", "qwen2", "opt", "gpt2", "bert", "vit", "t5")


def tokens(count: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    """``(count, length)`` random tokens."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def calibration(kind: str) -> object:
    """Calibration data for a kind of model."""
    if kind == "vit":
        images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return [{"pixel_values": part} for part in images.split(2)]
    if kind == "t5":
        return [{"input_ids": row[None], "decoder_input_ids": row[None, :10]} for row in tokens()]
    return tokens()
