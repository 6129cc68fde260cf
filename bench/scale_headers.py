"""Real-sized checkpoints without their weights: what bench/scale.py computes with.

A model is its config.json, the tensors that transformers saves for it, and what `nmsolve prune` measures in
each of its blocks. Headers are made in memory as safetensors has them; a folder holds config.json alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nmsolve.checkpoint.format import SUFFIX, Checkpoint, Entry, Shard, encode_header

__all__ = ["MODELS", "Input", "Model", "checkpoint_of"]

Config = Mapping[str, Any]
Tensors = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Input:
    """Inputs that `nmsolve prune` measures once: of one layer, or of several called on the same tensor.

    ``size`` is their width and ``groups`` how many of them there are (experts); ``weights`` has the number of
    weights of each layer that they go to.
    """

    size: int
    weights: tuple[int, ...]
    groups: int = 1


@dataclass(frozen=True)
class Model:
    """A checkpoint as it is published.

    Attributes
    ----------
    name : str
    config : mapping
        Its config.json.
    tensors : callable
        Names and shapes of a configuration, in the order of the model.
    blocks : callable
        The inputs of every block of a configuration, in the order of the model.
    shard_bytes : int
        No file has more, unless one tensor has; a file is filled before the next is begun.
    """

    name: str
    config: Config
    tensors: Callable[[Config], Tensors]
    blocks: Callable[[Config], list[list[Input]]]
    shard_bytes: int


def checkpoint_of(model: Model, folder: Path) -> Checkpoint:
    """The checkpoint of a model in bfloat16, whose files are not there; its config.json is written."""
    (folder / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
    files: list[list[tuple[str, tuple[int, ...]]]] = []
    room = 0
    for name, shape in model.tensors(model.config):
        nbytes = _nbytes(shape)
        if not files or nbytes > room:
            files.append([])
            room = model.shard_bytes
        files[-1].append((name, shape))
        room -= nbytes
    shards = []
    for number, tensors in enumerate(files, 1):
        tensors.sort()  # as safetensors writes tensors of one dtype
        header = encode_header((name, "BF16", shape, _nbytes(shape)) for name, shape in tensors)
        entries, start = [], len(header)
        for name, shape in tensors:
            entries.append(Entry(name, "BF16", shape, start, start := start + _nbytes(shape)))
        path = folder / f"model-{number:05}-of-{len(files):05}{SUFFIX}"
        shards.append(Shard(path, header, tuple(entries), {}))
    return Checkpoint(folder, tuple(shards))


def _nbytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


# --- Llama --------------------------------------------------------------------------------------------------

# https://huggingface.co/meta-llama/Llama-3.1-405B/blob/main/config.json
LLAMA_405B: Config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def llama_tensors(config: Config) -> Tensors:
    hidden, inner, vocabulary = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        yield f"{block}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{block}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{block}.self_attn.o_proj.weight", (hidden, hidden)
        yield from _mlp(f"{block}.mlp", hidden, inner)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def _mlp(prefix: str, hidden: int, inner: int) -> Tensors:
    yield f"{prefix}.gate_proj.weight", (inner, hidden)
    yield f"{prefix}.up_proj.weight", (inner, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, inner)


def llama_blocks(config: Config) -> list[list[Input]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = [
        Input(hidden, (hidden * hidden, keys * hidden, keys * hidden)),
        Input(hidden, (hidden * hidden,)),
    ]
    return [[*attention, *_mlp_inputs(hidden, inner)]] * config["num_hidden_layers"]


def _mlp_inputs(hidden: int, inner: int) -> list[Input]:
    return [Input(hidden, (inner * hidden, inner * hidden)), Input(inner, (hidden * inner,))]


# --- DeepSeek-V3 --------------------------------------------------------------------------------------------

# https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/config.json, without its quantisation and without
# the layer that predicts one more token, which transformers does not load.
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def _attention(config: Config) -> dict[str, tuple[int, int]]:
    """Names and shapes ``(out, in)`` of the layers of latent attention, in the order in which they run."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    plain, value = config["qk_nope_head_dim"], config["v_head_dim"]
    return {
        "q_a_proj": (query, hidden),
        "q_b_proj": (heads * (plain + rope), query),
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_b_proj": (heads * (plain + value), latent),
        "o_proj": (hidden, heads * value),
    }


def deepseek_tensors(config: Config) -> Tensors:
    hidden, vocabulary, experts = (config[k] for k in ("hidden_size", "vocab_size", "n_routed_experts"))
    inner, shared = config["moe_intermediate_size"], config["n_shared_experts"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        for name, shape in _attention(config).items():
            yield f"{block}.self_attn.{name}.weight", shape
        yield f"{block}.self_attn.q_a_layernorm.weight", (config["q_lora_rank"],)
        yield f"{block}.self_attn.kv_a_layernorm.weight", (config["kv_lora_rank"],)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{block}.mlp", hidden, config["intermediate_size"])
        else:
            for expert in range(experts):
                yield from _mlp(f"{block}.mlp.experts.{expert}", hidden, inner)
            yield f"{block}.mlp.gate.weight", (experts, hidden)
            yield f"{block}.mlp.gate.e_score_correction_bias", (experts,)
            yield from _mlp(f"{block}.mlp.shared_experts", hidden, inner * shared)
        yield f"{block}.input_layernorm.weight", (hidden,)
        yield f"{block}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocabulary, hidden)


def deepseek_blocks(config: Config) -> list[list[Input]]:
    hidden, inner, experts = (config[k] for k in ("hidden_size", "moe_intermediate_size", "n_routed_experts"))
    attention = [Input(shape[1], (math.prod(shape),)) for shape in _attention(config).values()]
    stacks = [  # of experts transformers makes two parameters: gates and inputs, and outputs
        Input(hidden, (experts * 2 * inner * hidden,), experts),
        Input(inner, (experts * hidden * inner,), experts),
    ]
    shared = _mlp_inputs(hidden, inner * config["n_shared_experts"])
    dense = config["first_k_dense_replace"]
    return [
        *([[*attention, *_mlp_inputs(hidden, config["intermediate_size"])]] * dense),
        *([[*attention, *stacks, *shared]] * (config["num_hidden_layers"] - dense)),
    ]


# The sizes of shards are those that give the number of files that is published, 191 and 163.
MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("Llama 405B", LLAMA_405B, llama_tensors, llama_blocks, 5 * 10**9),
        Model("DeepSeek-V3", DEEPSEEK_V3, deepseek_tensors, deepseek_blocks, 83 * 10**8),
    )
}
