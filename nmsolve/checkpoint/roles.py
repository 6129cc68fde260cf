"""What the weights of a model are: a layer's matrices, or what stays dense unless it is asked for.

A model answers for itself (:func:`roles_of`): by the classes of its modules, by what shares its weights, by
its own word for its head, and by what stands beside the experts of a mixture. Where there is no model to ask,
the name of a weight answers (:func:`dense_by_name`).

Nothing here imports torch before it is given a module.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DENSE_BY_NAME", "Role", "dense_by_name", "is_conv1d", "roles_of", "stack_axis", "told"]

# What stays dense, by the last parts of a layer's name. A part is what stands between dots, and `*` does not
# reach over a dot; `^` begins the whole name. A lost weight hurts one token here and not a channel
# (embeddings, heads), or sends tokens elsewhere (routers).
DENSE_BY_NAME: Mapping[str, tuple[str, ...]] = {
    "embedding": (
        *("embed", "embed_*", "*_embed", "*embed_tokens", "*embedding", "*embeddings", "embed_in", "*_emb"),
        *("wte", "wpe", "shared", "transformer.w", "relative_attention_bias"),
    ),
    "patch embedding": ("*patch_embed*", "*patch_embed*.*", "vision_embed_tokens"),
    "head": (
        *(
            "*lm_head",
            "lm_heads.*",
            "lm_head.decoder",
            "head",
            "^output",
            "output_layer",
            "output_projection",
        ),
        *("embed_out", "predictions.decoder", "vocab_projector", "pred_layer.proj", "classifier", "score"),
        *("qa_outputs", "class_labels_classifier"),
    ),
    "norm": ("*norm", "*norm[0-9]", "*Norm", "ln_*"),
    "router": (
        *("*router", "router.*", "mlp.gate", "*moe.gate", "ffn.gate", "feed_forward.gate", "mixer.gate"),
        *("gate.wg", "mlp.gate.*"),
    ),
}
_ROUTERS = ("Router", "Gate", "Gating")
_PATTERNS = tuple((what, pattern) for what, patterns in DENSE_BY_NAME.items() for pattern in patterns)


@dataclass(frozen=True)
class Role:
    """What a parameter of two or more dimensions is in its model.

    Attributes
    ----------
    owner : str
        Class of the module that holds it.
    dense : str or None
        Why it stays dense by default; None for what is pruned.
    kind : {"linear", "convolution", "stack", ""}
        How it is seen as matrices, see :class:`nmsolve.checkpoint.selection.MatrixLayout`; empty where the
        shape has to tell.
    input_dim : int or None
        The axis of its matrices along which the weights of one output lie: 1 for ``(out, in)``, 0 for
        ``(in, out)``, None where the model does not say.
    groups : int
        Of a convolution.
    """

    owner: str
    dense: str | None = None
    kind: str = ""
    input_dim: int | None = 1
    groups: int = 1


def dense_by_name(layer: str, only: Container[str] = DENSE_BY_NAME) -> str | None:
    """Why the layer of a name stays dense, such as ``"head (name ends with 'lm_head')"``, or None.

    ``only`` names the kinds to look for.

    >>> dense_by_name("transformer.h.0.mlp.gate")
    "router (name ends with 'mlp.gate')"
    >>> dense_by_name("blocks.0.norm_attn_norm.attn.Wqkv") is None
    True
    """
    parts = layer.split(".")
    for what, pattern in _PATTERNS:
        if what not in only:
            continue
        wanted = pattern.removeprefix("^").split(".")
        whole = pattern.startswith("^")
        if len(wanted) > len(parts) or (whole and len(wanted) < len(parts)):
            continue
        ends = parts[len(parts) - len(wanted) :]
        if all(fnmatchcase(part, want) for part, want in zip(ends, wanted, strict=True)):
            return f"{what} (name {'is' if whole else 'ends with'} {pattern.removeprefix('^')!r})"
    return None


def stack_axis(name: str, shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The input axis (0 or 1) of the matrices of stacked experts, by the shapes of what stands beside them.

    With a gate beside each input projection, ``gate_up (E, 2 I, H)`` and ``down (E, H, I)`` are
    ``(out, in)``, ``gate_up (E, H, 2 I)`` and ``down (E, I, H)`` are ``(in, out)``; no sizes are both. None
    if the two are not there, or are neither.
    """
    prefix = name.removesuffix("gate_up_proj").removesuffix("down_proj")
    if prefix == name:
        return None
    up, down = shapes.get(f"{prefix}gate_up_proj"), shapes.get(f"{prefix}down_proj")
    if up is None or down is None or len(up) != 3 or len(down) != 3:
        return None
    if (up[1], up[2]) == (2 * down[2], down[1]):
        return 1
    if (up[1], up[2]) == (down[2], 2 * down[1]):
        return 0
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D or derived from it: a linear layer whose weight is ``(in, out)``.

    transformers is not imported: who has such a layer has imported it.
    """
    kinds = type(module).__mro__
    return any(kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in kinds)


def told(model: object, name: str) -> object:
    """What a transformers model's method ``name`` returns, None if it has no answer."""
    method = getattr(model, name, None)
    try:
        return method() if callable(method) else None
    except (NotImplementedError, AttributeError):
        return None


def roles_of(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of two or more dimensions, by its name; weights may be on the meta device.

    A parameter with several names is there under each.
    """
    from torch import nn

    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    heads = _heads(model)
    routers = {id(module) for module in _routers(model)}
    outside = _outside_base(model)
    outputs = _output_sizes(model)
    found: dict[str, Role] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for own, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim < 2:
                continue
            role = _role_of(module, own)
            reason = role.dense
            if reason is not None:
                pass
            elif id(parameter) in embeddings:
                reason = "shares its weight with an embedding"
            elif id(parameter) in heads:
                reason = "language-model head"
            elif id(module) in routers:
                reason = "router"
            elif outside is None:
                reason = dense_by_name(prefix)
            else:
                of_output = not outputs.isdisjoint(parameter.shape)
                named = of_output or id(module) in outside
                reason = dense_by_name(prefix, ("patch embedding", *(["head"] if named else [])))
                if of_output and id(module) in outside:
                    reason = "head"
            found[f"{prefix}.{own}" if prefix else own] = replace(role, dense=reason)
    return found


def _role_of(module: nn.Module, own: str) -> Role:
    """The role of a module's parameter ``own`` by the class of the module alone."""
    from torch import nn
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    owner = type(module).__name__
    other = f"a parameter of {owner}, which is no layer that can be pruned"
    if owner.endswith(_ROUTERS) and not isinstance(module, nn.Linear):
        return Role(owner, "router", "linear")
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Role(owner, "embedding", "linear")
    if own == "weight" and (isinstance(module, nn.Linear) or is_conv1d(module)):
        return Role(owner, None, "linear", 0 if is_conv1d(module) else 1)
    if own == "weight" and isinstance(module, _ConvNd):
        transposed = isinstance(module, _ConvTransposeNd)
        dense = None if isinstance(module, nn.Conv1d | nn.Conv2d) else other
        return Role(owner, dense, "convolution", 0 if transposed else 1, module.groups)
    weight = getattr(module, own)
    if weight.ndim != 3 or "expert" not in owner.lower():
        return Role(owner, other, "", None)
    return Role(owner, None, "stack", _stacked_input(module, own))


def _stacked_input(module: nn.Module, own: str) -> int | None:
    """The input axis of the matrices of stacked experts, by their module's own word or by their shapes."""
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return 0 if transposed else 1
    axis = stack_axis(own, {name: weight.shape for name, weight in module.named_parameters(recurse=False)})
    if axis is not None:
        return axis
    sizes = getattr(module, "output_size", None), getattr(module, "input_size", None)
    shape = tuple(getattr(module, own).shape[1:])
    if sizes[0] != sizes[1] and shape in (sizes, sizes[::-1]):
        return 1 if shape == sizes else 0
    return None


def _heads(model: nn.Module) -> set[int]:
    """Identities of the weights of what the model, or a model within it, calls its output embeddings."""
    outputs = (told(module, "get_output_embeddings") for module in model.modules())
    return {id(weight) for output in outputs if (weight := getattr(output, "weight", None)) is not None}


def _outside_base(model: nn.Module) -> set[int] | None:
    """Identities of the modules that a transformers model adds to its base, None if it is none of those."""
    prefix = getattr(model, "base_model_prefix", None)
    if not isinstance(prefix, str):
        return None
    base = getattr(model, prefix, None)
    if base is None or base is model:
        return set()
    inside = {id(module) for module in base.modules()}
    return {id(module) for module in model.modules()} - inside


def _output_sizes(model: nn.Module) -> set[int]:
    """How many labels and tokens a transformers model tells apart."""
    config = getattr(model, "config", None)
    configs = (config, told(config, "get_text_config"))
    names = ("num_labels", "vocab_size", "tgt_vocab_size")
    sizes = (getattr(config, name, None) for config in configs for name in names)
    return {size for size in sizes if isinstance(size, int)}


def _routers(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers that choose experts: by class or name, or with one output for each expert beside them."""
    from torch import nn

    for module in model.modules():
        if type(module).__name__.endswith(_ROUTERS):
            yield from (child for child in module.children() if isinstance(child, nn.Linear))
        yield from (child for name, child in module.named_children() if name.endswith("router"))
        counts = {count for name, child in module.named_children() if (count := _experts(name, child))}
        for name, child in module.named_children() if counts else ():
            if "expert" not in name:
                inner = (child, *child.children())
                yield from (x for x in inner if isinstance(x, nn.Linear) and x.out_features in counts)


def _experts(name: str, module: nn.Module) -> int:
    """How many experts a module holds, 0 if it is none of theirs."""
    from torch import nn

    if "expert" not in name:
        return 0
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return len(module)
    return max((len(x) for x in module.parameters(recurse=False) if x.ndim == 3), default=0)
