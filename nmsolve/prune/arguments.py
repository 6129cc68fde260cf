"""The arguments of ``prune_model``, checked before any work."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.mask_files import load_masks
from nmsolve.checkpoint.roles import told
from nmsolve.errors import NMSolveError, WorkFailed
from nmsolve.ops.distributed import is_dtensor
from nmsolve.ops.validation import check_flag
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.prune.calibration import Batch, fingerprint
from nmsolve.prune.homes import Home
from nmsolve.prune.layers import Layer, Selected
from nmsolve.prune.methods import PRUNING_METHODS, check_pruning_method, check_sequential
from nmsolve.prune.peers import Peers
from nmsolve.prune.rule import MaskRule

__all__ = [
    "Patterns",
    "PruneSettings",
    "check_in_memory",
    "check_initial_masks",
    "check_plain",
    "check_settings",
    "check_tokens",
    "check_weights",
    "fingerprints",
    "parse_patterns",
    "sequence_length_of",
    "used_settings",
]

Patterns = PatternLike | Mapping[str, PatternLike | None]


@dataclass(frozen=True)
class PruneSettings:
    """What decides the result, beside the model and the calibration data."""

    method: str
    transposable: bool
    mask_method: str
    backend: str
    sequential: str
    damping: float
    iterations: int | None
    all_experts: bool
    exact_error: bool


def check_settings(
    method: str,
    transposable: bool,
    mask_method: str,
    backend: str,
    sequential: str,
    damping: float,
    iterations: int | None,
    all_experts: bool,
    exact_error: bool,
    model: object,
) -> PruneSettings:
    if not isinstance(model, nn.Module):
        raise NMSolveError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_flag("transposable", transposable)
    check_flag("all_experts", all_experts)
    check_flag("exact_error", exact_error)
    row = check_pruning_method(method)
    check_sequential(sequential)
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not 0 < damping < float("inf"):
        raise NMSolveError(f"damping: expected a positive number, got {damping!r}")
    if iterations is None:
        iterations = row.iterations
    elif isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise NMSolveError(f"iterations: expected an integer of at least 1, got {iterations!r}")
    MaskRule(NMPattern(1, 1), transposable, mask_method, backend)
    return PruneSettings(
        method,
        transposable,
        mask_method,
        backend,
        sequential,
        float(damping),
        iterations,
        all_experts,
        exact_error,
    )


def parse_patterns(pattern: Patterns) -> dict[str, NMPattern | None]:
    given = pattern if isinstance(pattern, Mapping) else {"*": NMPattern.of(pattern)}
    found: dict[str, NMPattern | None] = {}
    for glob, value in given.items():
        if not isinstance(glob, str):
            raise NMSolveError(f"pattern: expected 'N:M' or a mapping of glob to 'N:M', got {pattern!r}")
        found[glob] = None if value is None else NMPattern.of(value)
    if not found:
        raise NMSolveError("pattern: expected at least one, got an empty mapping")
    return found


def used_settings(settings: PruneSettings, calibrated: bool) -> dict[str, object]:
    """Those that the run uses, for its report."""
    found = asdict(settings)
    for option in ("damping", "iterations"):
        if option not in PRUNING_METHODS[settings.method].options:
            del found[option]
    if not settings.transposable:
        del found["mask_method"]
    if not calibrated:
        for option in ("sequential", "all_experts", "exact_error"):
            del found[option]
    return found


def check_in_memory(model: nn.Module) -> None:
    """Raises if what would be changed is not there as numbers.

    What is changed here would not get to a part that accelerate holds elsewhere, and one byte is what is left
    of a weight after quantisation.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.element_size() == 1:
            raise NMSolveError(
                f"model: {name} is {str(parameter.dtype).removeprefix('torch.')}, quantised: prune first, in "
                "bfloat16 or wider, then quantise"
            )
    away = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if away and any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise NMSolveError(
            f"model: {len(away)} of its parameters are offloaded ({away[0]}, ...); load it without "
            "device_map, or with memory for all of it"
        )


def check_plain(name: str, tensor: Tensor) -> None:
    """Raises if a model's tensor is stored in another form, as quantisation libraries do."""
    kind = type(tensor)
    if kind is not Tensor:
        raise NMSolveError(
            f"model: {name} is a {kind.__module__}.{kind.__name__}, not a plain tensor: prune first, then "
            "quantise or wrap"
        )


def check_weights(selected: Selected, home: Home) -> int:
    """The number of zeros in the weights to prune, as far as this process holds them.

    Raises
    ------
    NMSolveError
        If a weight is stored in another form, as quantisation libraries do.
    WorkFailed
        If one is not finite: a model may be right and hold such weights.
    """
    for layer in selected.layers:
        if not is_dtensor(layer.weight):  # those of fully_shard alone have got here
            check_plain(layer.weight_name, layer.weight.data)
    zeros = 0
    for layer in selected.layers:
        weight = Peers.held(home.value(layer.weight_name, layer.weight))
        wrong = weight.numel() - int(torch.isfinite(weight).sum())
        if wrong:
            raise WorkFailed(
                f"model: {layer.weight_name}: expected finite values, got {wrong} NaN or infinite of "
                f"{weight.numel()}"
            )
        zeros += weight.numel() - int(weight.count_nonzero())
    return zeros


def check_initial_masks(
    given: Mapping[str, Tensor] | str | os.PathLike[str] | None, selected: Selected
) -> dict[Layer, Tensor]:
    if given is None:
        return {}
    masks = given if isinstance(given, Mapping) else load_masks(given)
    by_name = {layer.weight_name: layer for layer in selected.layers}
    found = {}
    for name, mask in masks.items():
        layer = by_name.get(name)
        if layer is None:
            raise NMSolveError(f"initial_masks: {name!r} is no weight that is pruned")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != layer.weight.shape:
            raise NMSolveError(
                f"initial_masks: {name}: expected a bool tensor of shape {tuple(layer.weight.shape)}, got "
                + (f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__)
            )
        found[layer] = mask
    return found


def sequence_length_of(model: nn.Module, asked: int | None) -> int:
    """``asked``, or else as many tokens as the model takes, 2048 at most."""
    if asked is not None:
        return asked
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    text = text_config() if callable(text_config) else config
    longest = getattr(text, "max_position_embeddings", None)
    return min(2048, longest) if isinstance(longest, int) and longest > 0 else 2048


def check_tokens(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Integer batches of a transformers model must be tokens that it knows."""
    embeddings = told(model, "get_input_embeddings")
    if not isinstance(embeddings, nn.Embedding):
        return
    for batch in batches:
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else batch
        if isinstance(tokens, Tensor) and not tokens.is_floating_point() and tokens.numel():
            low, high = (int(end) for end in tokens.aminmax())
            if low < 0 or high >= embeddings.num_embeddings:
                raise NMSolveError(
                    f"calibration: expected tokens from 0 to {embeddings.num_embeddings - 1}, "
                    f"got {low if low < 0 else high}"
                )


def fingerprints(
    home: Home, selected: Selected, batches: Iterable[Batch], allowed: Mapping[Layer, Tensor]
) -> dict[str, str]:
    """What tells a run's inputs from those of another: all that its results depend on but the settings."""
    named = chain(home.model.named_parameters(), home.model.named_buffers())
    tensors = ((name, home.value(name, tensor)) for name, tensor in named)
    return {
        "model": fingerprint({name: value} for name, value in tensors if not value.is_meta),
        "calibration": fingerprint(batches),
        "initial_masks": fingerprint([{layer.weight_name: mask} for layer, mask in allowed.items()]),
        "patterns of the layers": hashlib.sha256(
            repr([(x.name, str(p)) for x, p in selected.layers.items()]).encode()
        ).hexdigest()[:16],
    }
