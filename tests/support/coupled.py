"""Tiny random models of the families of docs/permutation.md, in float64, and what folds in each.

Sizes are such that a wrong axis, head or half changes what a model computes: grouped key/value heads, heads
of another size than hidden over heads, parts of one model with different numbers of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import species
import torch
import zoo
from torch import nn


@dataclass(frozen=True)
class Family:
    """A model, and the last names of the consumers that fold.

    ``stored`` has those of its files where they differ; ``config`` and ``parts`` are as in ``Species``.
    """

    kind: str
    folds: str
    stored: str = ""
    called: str = "tokens"
    config: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# Query heads that share key/value heads, and are not hidden / heads wide.
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
WIDE = {**GROUPED, "head_dim": 12}
FOUR = {"num_attention_heads": 4, "num_hidden_layers": 1}
EXPERTS = {**GROUPED, "head_dim": 8}

FAMILIES: dict[str, Family] = {
    "phi3": Family("Phi3ForCausalLM", "down_proj o_proj", config=GROUPED),
    "glm4": Family("Glm4ForCausalLM", "down_proj o_proj", config=EXPERTS),
    "qwen3": Family("Qwen3ForCausalLM", "down_proj o_proj", config=WIDE),
    "gpt_neox": Family("GPTNeoXForCausalLM", "dense dense_4h_to_h", config=FOUR),
    "gpt_neox in sequence": Family(
        "GPTNeoXForCausalLM", "dense dense_4h_to_h", config={**FOUR, "use_parallel_residual": False}
    ),
    "falcon 7b": Family("FalconForCausalLM", "dense dense_4h_to_h", config=FOUR),
    "falcon 40b": Family(
        "FalconForCausalLM",
        "dense dense_4h_to_h",
        config={**FOUR, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon rw": Family(
        "FalconForCausalLM",
        "dense dense_4h_to_h",
        config={**FOUR, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
    ),
    "bloom": Family("BloomForCausalLM", "dense dense_4h_to_h", config={"n_head": 4, "n_layer": 1}),
    "mpt": Family("MptForCausalLM", "out_proj down_proj", config={"n_heads": 4, "n_layers": 1}),
    "gpt_bigcode": Family("GPTBigCodeForCausalLM", "c_proj c_proj", config={"n_head": 4, "n_layer": 1}),
    "gpt_bigcode of heads": Family(
        "GPTBigCodeForCausalLM", "c_proj c_proj", config={"n_head": 4, "n_layer": 1, "multi_query": False}
    ),
    "gpt2": Family("GPT2LMHeadModel", "c_proj c_proj", config={"n_head": 4, "n_layer": 1}),
    "gptj": Family("GPTJForCausalLM", "out_proj fc_out", config={"n_head": 4, "n_layer": 1, "rotary_dim": 4}),
    "phi": Family("PhiForCausalLM", "dense fc2", config=GROUPED),
    "modernbert": Family("ModernBertForMaskedLM", "Wo Wo", config={**FOUR, "intermediate_size": 40}),
    "distilbert": Family("DistilBertForMaskedLM", "out_lin lin2", config={"n_heads": 4, "n_layers": 1}),
    "albert": Family("AlbertForMaskedLM", "dense ffn_output", config={**FOUR, "embedding_size": 16}),
    "deberta": Family("DebertaV2ForMaskedLM", "dense dense", config=FOUR),
    "t5": Family("T5ForConditionalGeneration", "o wo o o wo o o wo", called="both", config={"num_layers": 1}),
    "t5 gated": Family(
        "T5ForConditionalGeneration",
        "o wo o o wo",
        called="both",
        config={
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_heads": 4,
            "d_kv": 12,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "bart": Family(
        "BartForConditionalGeneration",
        "out_proj fc2 out_proj out_proj fc2",
        called="both",
        config={
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
        },
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "out_proj fc2 out_proj out_proj fc2",
        called="features",
        config={
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 2,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
        },
    ),
    "clip": Family(
        "CLIPModel",
        "out_proj fc2 out_proj fc2",
        called="images and tokens",
        config={"projection_dim": 16},
        parts={
            "text_config": {"num_attention_heads": 4, "num_hidden_layers": 1, "hidden_size": 48},
            "vision_config": {"num_attention_heads": 2, "num_hidden_layers": 1},
        },
    ),
    "vit": Family("ViTForImageClassification", "o_proj fc2", "dense dense", "images", config=FOUR),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "out_proj fc2 linear_2 o_proj down_proj",
        config={"image_token_index": 95},
        parts={
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {
                "model_type": "clip_vision_model",
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        },
    ),
    "convnext": Family(
        "ConvNextForImageClassification",
        "pwconv2 pwconv2",
        called="images",
        config={"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 16},
    ),
    "convnext v2": Family(
        "ConvNextV2ForImageClassification",
        "pwconv2 pwconv2",
        called="images",
        config={"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "num_labels": 16},
    ),
    "resnet basic": Family(
        "ResNetForImageClassification",
        "convolution convolution",
        called="images",
        config={
            "embedding_size": 8,
            "hidden_sizes": [8, 12],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 16,
        },
    ),
    "resnet bottleneck": Family(
        "ResNetForImageClassification",
        "convolution convolution convolution convolution",
        called="images",
        config={"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 16},
    ),
    "mixtral": Family("MixtralForCausalLM", "o_proj down_proj", "o_proj" + 4 * " w2", config=EXPERTS),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", "o_proj down_proj", "o_proj" + 4 * " down_proj", config=EXPERTS
    ),
    "olmoe": Family("OlmoeForCausalLM", "o_proj down_proj", "o_proj" + 4 * " down_proj", config=GROUPED),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        "q_b_proj kv_b_proj o_proj down_proj down_proj",
        "q_b_proj kv_b_proj o_proj down_proj" + 4 * " down_proj",
        config={
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "qk_nope_head_dim": 16,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v3 dense": Family(
        "DeepseekV3ForCausalLM",
        "kv_b_proj o_proj down_proj",
        config={
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "qk_nope_head_dim": 16,
            "head_dim": 8,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": Family("GptOssForCausalLM", "o_proj down_proj", config=EXPERTS),
    "llama4": Family(
        "Llama4ForCausalLM",
        "o_proj down_proj down_proj",
        config={**EXPERTS, "intermediate_size_mlp": 64, "attention_chunk_size": 16},
    ),
    "llama4 dense": Family(
        "Llama4ForCausalLM",
        "o_proj down_proj",
        config={**EXPERTS, "intermediate_size_mlp": 40, "attention_chunk_size": 16, "moe_layers": []},
    ),
    "dbrx": Family(
        "DbrxForCausalLM",
        "out_proj w2",
        config={
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 1,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
        },
    ),
    "granitemoe": Family("GraniteMoeForCausalLM", "o_proj down_proj", "o_proj output_linear", config=GROUPED),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        "o_proj down_proj down_proj down_proj",
        "o_proj down_proj" + 5 * " down_proj",
        config={
            **EXPERTS,
            "hybrid_override_pattern": "M*-E",
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "moe_shared_expert_intermediate_size": 48,
        },
    ),
}


def build(name: str) -> nn.Module:
    """The model of a row in float64, with no parameter at a constant, which no wrong order would show."""
    import transformers

    family = FAMILIES[name]
    kind = getattr(transformers, family.kind, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.kind}")
    torch.manual_seed(0)
    model = kind(zoo.configuration(kind.config_class, family.config, family.parts)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer, tensor in model.named_buffers():
            if buffer.endswith("running_mean"):
                tensor.normal_()
            elif buffer.endswith("running_var"):
                tensor.uniform_(0.5, 2)
    return exact(model)


def exact(model: nn.Module) -> nn.Module:
    """The model with experts that know float64, and norms that do not round to float32 on their way."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if "LatentRMSNorm" in type(module).__name__ or type(module).__name__ == "DeepseekV3RMSNorm":
            norm = nn.RMSNorm(len(module.weight), eps=module.variance_epsilon)
            norm.weight = module.weight
            module.forward = norm.forward
    return model


def outputs(name: str, model: nn.Module) -> torch.Tensor:
    """What the model of a row computes: its first output."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, species.VOCABULARY, (2, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator).double()

    make = {
        "tokens": lambda: {"input_ids": tokens(12)},
        "both": lambda: {"input_ids": tokens(12), "decoder_input_ids": tokens(6)},
        "images": lambda: {"pixel_values": noise(3, 16, 16)},
        "images and tokens": lambda: {"pixel_values": noise(3, 16, 16), "input_ids": tokens(8)},
        "features": lambda: {"input_features": noise(8, 32), "decoder_input_ids": tokens(5)},
    }
    with torch.no_grad():
        try:
            return model(**make[FAMILIES[name].called]())[0]
        except RuntimeError as error:
            # transformers 4 fills the mask of a text with the least float64 in a tensor of float32.
            if "without overflow" not in str(error):
                raise
            pytest.skip(f"the {name} of this transformers has no float64")
