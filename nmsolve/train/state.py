"""The state of a sparse training run: what is saved beside the model's and the optimizer's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nmsolve.errors import NMSolveError
from nmsolve.ops.masks import check_mask
from nmsolve.train.arguments import TrainSettings
from nmsolve.train.packed import pack_mask, unpack_mask
from nmsolve.train.weights import MaskedWeight

__all__ = ["packed_state", "unpacked_masks"]

_VERSION = 1


def packed_state(
    weights: Sequence[MaskedWeight], settings: TrainSettings, progress: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings, progress and the masks in bits."""
    return {
        "version": _VERSION,
        "settings": _signature(weights, settings),
        **progress,
        "masks": {w.name: pack_mask(w.mask, w.parameter, _unit(w, settings)) for w in weights},
    }


def unpacked_masks(
    state: object, weights: Sequence[MaskedWeight], settings: TrainSettings, progress: Mapping[str, Any]
) -> list[Tensor]:
    """What this process holds of the masks in a state with the fields of ``progress``, for each weight.

    Raises
    ------
    NMSolveError
        If it is of other settings, other weights, or weights of another shape, or a mask lacks its pattern.
    """
    fields = {"version", "settings", "masks", *progress}
    if not isinstance(state, Mapping) or not fields <= state.keys():
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise NMSolveError(f"state: expected what state_dict() returned, got {got}")
    if state["version"] != _VERSION:
        raise NMSolveError(f"state: expected version {_VERSION}, got {state['version']!r}")
    for key, value in _signature(weights, settings).items():
        got = state["settings"].get(key)
        if got != value:
            raise NMSolveError(f"state: expected {key}={value!r}, as this run has, got {got!r}")
    stored, names = state["masks"], {weight.name for weight in weights}
    if stored.keys() != names:
        odd = sorted(stored.keys() ^ names)[0]
        raise NMSolveError(f"state: expected the masks of {len(names)} weights, got others ({odd})")
    masks = [unpack_mask(stored[w.name], w.name, w.parameter, _unit(w, settings)) for w in weights]
    if state["phase"] in ("sparse", "frozen"):
        for weight, mask in zip(weights, masks, strict=True):
            _check(weight, mask, settings.transposable)
    return masks


def _signature(weights: Sequence[MaskedWeight], settings: TrainSettings) -> dict[str, Any]:
    return {
        "transposable": settings.transposable,
        "gradient": settings.gradient,
        "patterns": {weight.name: str(weight.pattern) for weight in weights},
    }


def _unit(weight: MaskedWeight, settings: TrainSettings) -> int:
    """How many entries of a row of a mask lie in a byte: no border between shards may split one."""
    if weight.chosen.layer.input_first and not settings.transposable:
        return 1  # rows are tiled then, columns may be cut anywhere
    return math.gcd(weight.pattern.m, 8)


def _check(weight: MaskedWeight, mask: Tensor, transposable: bool) -> None:
    if not mask.numel():
        return
    try:
        check_mask(weight.matrices(mask), weight.pattern.n, weight.pattern.m, transposable=transposable)
    except NMSolveError as error:
        raise NMSolveError(f"state: {weight.name}: {error}") from None
