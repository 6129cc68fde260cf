"""Which configuration speaks for a part of a model, and how many heads it says there are.

Models of several parts (a vision tower and a language model) have a configuration for each, inside that of
the whole. In memory every part carries its own; in a config.json the names of a tensor's modules lead to it,
and where they do not, the width of the residual stream does if it leaves no choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

__all__ = ["OWN_HEADS", "Config", "PartConfigs", "head_size", "heads_of", "narrowed"]

Config = Mapping[str, object]

# Names of modules, and the keys of their configurations where that is not NAME_config or NAME.
_KEYS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("vision_model", "vision_tower", "visual", "image_embed"), ("vision_config",)),
    **dict.fromkeys(("language_model", "text_model"), ("text_config", "llm_config")),
    **dict.fromkeys(("audio_model", "audio_tower", "audio_embed"), ("audio_config",)),
}
OWN_HEADS = "heads of this module"
"""A key for the number that an attention itself has, beside which nothing counts."""

_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_SIDES = ("encoder", "decoder")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
_HEAD_SIZES = ("v_head_dim", "head_dim", "d_kv", "attention_head_dim", "attention_head_size")


class PartConfigs:
    """The configurations of a model's parts.

    Parameters
    ----------
    config : mapping
        That of the whole model, with those of its parts inside.
    """

    def __init__(self, config: Config) -> None:
        self.whole = config

    def at(self, tensor: str, width: int) -> Config:
        """The configuration of the part that a weight belongs to; ``width`` is that of its outputs."""
        return narrowed(self.whole, tensor.split("."), width)


def narrowed(config: Config, path: list[str], width: int) -> Config:
    """The configuration inside ``config`` that the modules of ``path`` lead to."""
    for name in path:
        for key in (f"{name}_config", name, *_KEYS.get(name, ())):
            inner = config.get(key)
            if not isinstance(inner, Mapping):
                continue
            if inner.get("model_type") or _said_heads(inner, path) is not None:
                config = inner
                break
    if _said_heads(config, path) is not None:
        return config
    fitting = [
        part
        for part in _inner(config)
        if _said_heads(part, path) is not None and width in [part.get(key) for key in _WIDTHS]
    ]
    alike = {(part.get("model_type"), repr(_said_heads(part, path))) for part in fitting}
    return fitting[0] if len(alike) == 1 else config


def _inner(config: Config) -> Iterator[Config]:
    """The configurations inside a configuration, however deep."""
    left = [value for value in config.values() if isinstance(value, Mapping)]
    while left:
        part = left.pop()
        yield part
        left += [value for value in part.values() if isinstance(value, Mapping)]


def _said_heads(config: Config, path: list[str]) -> object:
    """What a configuration says about heads: a number, or something else where layers differ; or None."""
    if OWN_HEADS in config:
        return config[OWN_HEADS]
    sides = [side for side in _SIDES if side in path]
    own = (key for side in sides for key in (f"{side}_attention_heads", f"num_{side}_attention_heads"))
    return next((config[key] for key in (*own, *_HEADS) if config.get(key) is not None), None)


def heads_of(config: Config, module: str) -> tuple[int, str]:
    """The number of query heads in a module, and why it is unknown (empty if it is known)."""
    heads = _said_heads(config, module.split("."))
    if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
        return heads, ""
    if heads is None:
        return 1, "the number of attention heads is unknown: the model has no config that says it"
    return 1, f"the number of attention heads is unknown: the config says {str(heads)[:40]}"


def head_size(config: Config) -> int | None:
    """The channels of a value head, if the configuration says so."""
    found = next((config[key] for key in _HEAD_SIZES if config.get(key) is not None), None)
    return found if isinstance(found, int) else None
