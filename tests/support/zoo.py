"""Tiny random models of many architectures: what transformers builds from configurations of a few kilobytes.

Every size of a configuration that has one of the names in ``SIZES`` is small, in its parts as well; the rows
of ``ZOO`` (species.py) say what else an architecture needs, and what it is called with.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from species import SIZES, VOCABULARY, ZOO
from torch import nn


def build(name: str) -> nn.Module:
    """The model of a row of ``ZOO``, the same every time; skips the test where transformers has none yet."""
    import transformers

    species = ZOO[name]
    kind = getattr(transformers, species.kind, None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no {species.kind}")
    torch.manual_seed(0)
    return kind(configuration(kind.config_class, species.config, species.parts)).eval()


def configuration(kind: Any, changes: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> Any:
    """A configuration of a class with sizes of ``SIZES`` and ``changes``."""
    inner = {}
    for part, of in parts.items():
        kinds = getattr(kind, "sub_configs", {})
        named = kinds.get(part)
        if named is None or named.__name__ == "AutoConfig":
            from transformers import CONFIG_MAPPING

            of = dict(of)
            named = CONFIG_MAPPING[of.pop("model_type")]
        inner[part] = configuration(named, of, {}).to_dict()
    # transformers 4 makes no empty configuration of two models, and takes apart what it makes one of.
    needed = copy.deepcopy(inner) if getattr(kind, "has_no_defaults_at_init", False) else {}
    known = kind(**needed).to_dict()
    own = {key: kind.attribute_map.get(key, key) for key in SIZES}
    sizes = {own[key]: value for key, value in SIZES.items() if own[key] in known and own[key] not in changes}
    return kind(**{**sizes, **inner, **changes})


def batches(name: str, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """What the model of a row is calibrated on."""
    generator = torch.Generator().manual_seed(1)

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (2, length), generator=generator)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator)

    make = {
        "tokens": lambda: {"input_ids": tokens(12)},
        "both": lambda: {"input_ids": tokens(12), "decoder_input_ids": tokens(6)},
        "images": lambda: {"pixel_values": noise(3, 16, 16)},
        "features": lambda: {"input_features": noise(8, 32), "decoder_input_ids": tokens(5)},
        "audio": lambda: {"input_values": noise(1600)},
    }
    return [make[ZOO[name].called]() for _ in range(count)]
