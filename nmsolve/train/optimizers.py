"""What happens to pruned weights in the step of an optimizer: they decay, or their gradients do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from nmsolve.errors import NMSolveError
from nmsolve.train.weights import MaskedWeight

__all__ = ["decay_gradients", "decay_weights", "stepping_optimizers", "with_decayed_gradients"]


def stepping_optimizers(
    optimizers: Iterable[object], weights: Sequence[MaskedWeight], gradient: str
) -> list[Optimizer]:
    """The optimizers that step masked weights, out of their wrappers.

    Raises
    ------
    NMSolveError
        If one is no torch optimizer, a weight is in none of them, or one has no learning rate to decay by.
    """
    inner = [_unwrapped(optimizer) for optimizer in optimizers]
    held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in inner]
    missing = [
        weight.name
        for weight in weights
        if weight.parameter.requires_grad and not any(id(weight.parameter) in ids for ids in held)
    ]
    if missing:
        raise NMSolveError(
            f"optimizer: expected one that holds the masked weights, got none with {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        )
    if gradient == "sr-ste" and any("lr" not in group for o in inner for group in o.param_groups):
        raise NMSolveError("optimizer: 'sr-ste' needs a learning rate 'lr' in its param_groups, got none")
    return [
        optimizer
        for optimizer, ids in zip(inner, held, strict=True)
        if any(id(weight.parameter) in ids for weight in weights)
    ]


def _unwrapped(optimizer: object) -> Optimizer:
    """The optimizer that steps: accelerate and Lightning wrap it."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return _unwrapped(inner)
    if not isinstance(optimizer, Optimizer):
        raise NMSolveError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _held_by(
    optimizer: Optimizer, weights: Iterable[MaskedWeight]
) -> Iterator[tuple[MaskedWeight, Mapping[str, Any]]]:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for weight in weights:
        group = groups.get(id(weight.parameter))
        if group is not None and weight.parameter.grad is not None:
            yield weight, group


def decay_gradients(optimizer: Optimizer, weights: Iterable[MaskedWeight], strength: float) -> None:
    """``G += lambda (1 - S) W`` for the weights that the optimizer holds."""
    # GradScaler leaves the gradients of a fused optimizer scaled, and has it divide.
    scale = getattr(optimizer, "grad_scale", None)
    for weight, _ in _held_by(optimizer, weights):
        gradient = weight.local_gradient
        assert gradient is not None
        pruned = weight.local.masked_fill(weight.mask, 0)
        if scale is not None:
            pruned = pruned * scale.to(pruned)
        gradient.add_(pruned.to(gradient.dtype), alpha=strength)


def decay_weights(optimizer: Optimizer, weights: Iterable[MaskedWeight], strength: float) -> None:
    """``W -= eta lambda (1 - S) W`` for the weights that the optimizer holds."""
    for weight, group in _held_by(optimizer, weights):
        local = weight.local
        local.sub_(local.masked_fill(weight.mask, 0) * (group["lr"] * strength))


def with_decayed_gradients(
    optimizer: Optimizer, weights: Sequence[MaskedWeight], strength: float, args: Any, kwargs: Any
) -> Any:
    """Decays gradients before a step, or after its closure: then the arguments that the step is to have."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        decay_gradients(optimizer, weights, strength)
        return None

    @torch.no_grad()
    def with_decay() -> Any:
        with torch.enable_grad():
            loss = closure()
        decay_gradients(optimizer, weights, strength)
        return loss

    if len(args) > 1:
        return (args[0], with_decay, *args[2:]), kwargs
    return args, {**kwargs, "closure": with_decay}
