"""The arguments of ``SparseTraining``, checked before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, distributed, nn

from nmsolve.backends.dispatch import check_backend
from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import is_dtensor, sharding_of
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import Patterns, check_in_memory, parse_patterns
from nmsolve.prune.layers import Layer, Selected, matches, select_layers, uncompiled
from nmsolve.train.masked_modules import unmaskable
from nmsolve.train.reading import reader_of
from nmsolve.train.sparse24 import TOKENS, times, why_dense

__all__ = [
    "GRADIENTS",
    "OPERANDS",
    "Chosen",
    "Decay",
    "Refresh",
    "TrainSettings",
    "check_layout",
    "check_settings",
    "choose_operands",
    "choose_weights",
    "decay_at",
    "inner_model",
    "interval_at",
]

Refresh = int | Callable[[int], int]
Decay = float | Callable[[int], float]

GRADIENTS = ("straight-through", "masked", "sr-ste")
OPERANDS = ("dense", "auto", "sparse24")


@dataclass(frozen=True)
class TrainSettings:
    """What decides the masks and the gradients, beside the model; schedules apart."""

    transposable: bool
    gradient: str
    operands: str
    start: int
    stop: int | None
    backend: str


def check_settings(
    transposable: object, gradient: object, operands: object, start: object, stop: object, backend: str
) -> TrainSettings:
    if not isinstance(transposable, bool):
        raise NMSolveError(f"transposable: expected True or False, got {transposable!r}")
    if gradient not in GRADIENTS:
        raise NMSolveError(f"gradient: expected one of {', '.join(GRADIENTS)}, got {gradient!r}")
    if operands not in OPERANDS:
        raise NMSolveError(f"operands: expected one of {', '.join(OPERANDS)}, got {operands!r}")
    if not _is_int(start) or start < 0:  # type: ignore[operator]
        raise NMSolveError(f"start: expected a number of steps of at least 0, got {start!r}")
    if stop is not None and (not _is_int(stop) or stop <= start):  # type: ignore[operator]
        raise NMSolveError(f"stop: expected None or a step after start={start}, got {stop!r}")
    check_backend(backend)
    return TrainSettings(
        transposable,
        str(gradient),
        str(operands),
        start,  # type: ignore[arg-type]
        stop,  # type: ignore[arg-type]
        backend,
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def interval_at(refresh: Refresh, step: int) -> int:
    """The number of steps from a refresh to the next that holds at a step."""
    value = refresh(step) if callable(refresh) else refresh
    if not _is_int(value) or value < 1:
        where = f"refresh({step})" if callable(refresh) else "refresh"
        raise NMSolveError(f"{where}: expected a number of steps of at least 1, got {value!r}")
    return value


def decay_at(decay: Decay, step: int, gradient: str) -> float:
    """The strength of the decay of pruned weights at a step."""
    value = decay(step) if callable(decay) else decay
    where = f"decay({step})" if callable(decay) else "decay"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise NMSolveError(f"{where}: expected a number of at least 0, got {value!r}")
    if gradient == "sr-ste" and not value and not callable(decay):
        raise NMSolveError("decay: 'sr-ste' decays pruned weights, got 0.0; its paper takes 2e-4")
    return float(value)


def inner_model(model: object) -> nn.Module:
    """The module whose names are those of a checkpoint: what compilers and DDP wrap."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, nn.Module):
        inner = uncompiled(model)
        if isinstance(inner, wrappers):
            inner = inner.module
        if inner is model:
            break
        model = inner
    if not isinstance(model, nn.Module):
        raise NMSolveError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    return model


@dataclass(frozen=True)
class Chosen:
    """A weight to mask: the first layer that has it, all modules that have it, and its pattern."""

    layer: Layer
    owners: tuple[nn.Module, ...]
    pattern: NMPattern
    bypassed: bool


def choose_weights(
    model: nn.Module,
    pattern: Patterns,
    include: str | Iterable[str] | None,
    dense: str | Iterable[str],
) -> tuple[list[Chosen], dict[str, str]]:
    """The weights to mask, in the order of the model's modules, and what stays dense with the reason why.

    Raises
    ------
    NMSolveError
        As :func:`nmsolve.prune.layers.select_layers`; if a layer that a glob names cannot be masked; if no
        chosen weight requires a gradient.
    """
    _check_wrappers(model)
    check_in_memory(model)
    patterns = parse_patterns(pattern)
    dense = _globs("dense", dense)
    if include is not None:
        if isinstance(pattern, Mapping):
            raise NMSolveError(
                "include: expected with one pattern; a mapping of patterns names layers itself"
            )
        (only,) = patterns.values()
        patterns = dict.fromkeys(_globs("include", include), only)
        if not patterns:
            raise NMSolveError("include: expected at least one glob, got none")
    selected = select_layers(model, patterns, dense)
    return _maskable(model, selected, [glob for glob in patterns if glob != "*"])


def _globs(option: str, value: object) -> tuple[str, ...]:
    globs = (value,) if isinstance(value, str) else value
    if not isinstance(globs, Iterable):
        raise NMSolveError(f"{option}: expected globs of layers, got {value!r}")
    found = tuple(globs)
    for glob in found:
        if not isinstance(glob, str):
            raise NMSolveError(f"{option}: expected globs of layers, got {glob!r}")
    return found


def _check_wrappers(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise NMSolveError(
                f"model: {name} is partitioned by DeepSpeed's ZeRO-3, which leaves no blocks of it on a "
                "process; use fully_shard of torch.distributed.fsdp, and then SparseTraining"
            )
    if not distributed.is_available():
        return
    from torch.distributed.fsdp import FullyShardedDataParallel  # slow to import

    for name, module in model.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            raise NMSolveError(
                f"model: {name or 'it'} is wrapped by FullyShardedDataParallel, which flattens weights; use "
                "fully_shard of torch.distributed.fsdp, and then SparseTraining"
            )


# Low-rank adapters of peft and others are linear layers with a small side; a mask is for what they adapt.
_ADAPTERS = ("lora_", "adapter")


def _maskable(
    model: nn.Module, selected: Selected, globs: Sequence[str]
) -> tuple[list[Chosen], dict[str, str]]:
    owners = _owners(model)
    skipped = dict(selected.skipped)
    chosen = []
    for layer, pattern in selected.layers.items():
        reason = _unmaskable(layer, owners) or _bypassing(model, owners[id(layer.module.weight)])
        named = any(matches(layer.name, glob) for glob in globs)
        if reason is None and not named and any(part in layer.name for part in _ADAPTERS):
            reason = "an adapter"
        elif reason is not None and named:
            raise NMSolveError(f"model: {layer.name or 'the layer'} cannot be masked: {reason}")
        if reason is not None:
            skipped[layer.name] = reason
            continue
        modules = [module for _, module, _ in owners[id(layer.module.weight)]]
        chosen.append(Chosen(layer, tuple(modules), pattern, _bypassed(model, layer)))
        for name, _, _ in owners[id(layer.module.weight)]:
            skipped.pop(name, None)
    if not chosen:
        raise NMSolveError("model: no layer to mask (" + "; ".join(sorted(set(skipped.values()))[:4]) + ")")
    if not any(item.layer.weight.requires_grad for item in chosen):
        raise NMSolveError(
            f"model: none of the {len(chosen)} chosen weights requires a gradient; FixedMasks holds masks of "
            "frozen weights"
        )
    return chosen, skipped


def _owners(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """Id of a parameter -> every (module's name, module, leaf) that has it."""
    found: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((name, module, leaf))
    return found


def _unmaskable(layer: Layer, owners: Mapping[int, Sequence[tuple[str, nn.Module, str]]]) -> str | None:
    weight = layer.weight
    kind = type(weight.data)
    if kind is not Tensor and not is_dtensor(weight):
        return f"its weight is a {kind.__module__}.{kind.__name__}, not a plain tensor"
    for name, module, leaf in owners[id(weight)]:
        other = Layer(name, module)
        if module is not layer.module and (
            leaf != "weight"
            or unmaskable(module) is not None
            or (other.input_first, other.groups) != (layer.input_first, layer.groups)
        ):
            return (
                f"it shares its weight with {name}, a {type(module).__name__}, which would read it unmasked"
            )
    return unmaskable(layer.module)


def _bypassing(model: nn.Module, owners: Sequence[tuple[str, nn.Module, str]]) -> str | None:
    for name, _, _ in owners:
        reader = reader_of(model, name) if name else None
        if reader is not None:
            return f"{type(reader).__name__} reads its weight without calling it"
    return None


def _bypassed(model: nn.Module, layer: Layer) -> bool:
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    return isinstance(parent, nn.TransformerEncoderLayer)


def check_layout(layer: Layer, pattern: NMPattern, transposable: bool, fsdp: bool) -> None:
    """Raises unless every process can solve its shard of a weight alone.

    Raises
    ------
    NMSolveError
        If a border between shards falls inside a block, a grouped convolution is sharded, or a kernel is.
    """
    weight = layer.weight
    if not is_dtensor(weight):
        return
    if layer.groups > 1 and any(not placement.is_replicate() for placement in weight.placements):
        raise NMSolveError(f"model: {layer.weight_name}: a sharded convolution with groups cannot be masked")
    if any(getattr(placement, "dim", 0) > 1 for placement in weight.placements):
        raise NMSolveError(f"model: {layer.weight_name}: a kernel that is cut into shards cannot be masked")
    rows, cols = (1, 0) if layer.input_first else (0, 1)
    try:
        sharding_of(
            weight, pattern.m, [rows, cols] if transposable else [cols], f"model: {layer.weight_name}"
        )
    except NMSolveError as error:
        if not fsdp:
            raise
        said = str(error).partition("; ")[0]
        raise NMSolveError(
            f"{said}; fully_shard(..., shard_placement_fn=...) can cut another dimension"
        ) from None


def choose_operands(chosen: Sequence[Chosen], settings: TrainSettings) -> dict[str, str]:
    """Name of a weight -> why its products have dense operands; empty where they are to be sparse.

    Raises
    ------
    NMSolveError
        If sparse ones were asked for by name and a layer cannot have them.
    """
    if settings.operands == "dense":
        return dict.fromkeys((item.layer.weight_name for item in chosen), "asked for")
    reasons = {}
    for item in chosen:
        name, weight = item.layer.weight_name, item.layer.weight
        reason = why_dense(item.layer.module, weight, item.pattern, settings.transposable)
        if reason and settings.operands == "sparse24":
            raise NMSolveError(
                f"operands: 'sparse24' is not possible for {name}: {reason}; operands='auto' keeps such "
                "layers dense"
            )
        if not reason and settings.operands == "auto":
            reason = _if_slower(weight)
        reasons[name] = reason
    return reasons


def _if_slower(weight: Tensor) -> str:
    found = times(weight)
    assert not isinstance(found, str)
    dense, sparse = found
    if sparse < dense:
        return ""
    rows, cols = weight.shape
    return f"{rows} x {cols} on {TOKENS} tokens took {dense:.3g} ms dense, {sparse:.3g} ms sparse"
