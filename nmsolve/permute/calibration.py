"""Scores of a model's weights from calibration data, in the shapes that couplings take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.roles import is_conv1d
from nmsolve.permute.objective import Batch
from nmsolve.prune.calibration import call_model
from nmsolve.prune.layerwise.scores import wanda_scores

__all__ = ["calibration_scores"]


def calibration_scores(
    model: nn.Module, calibration: Sequence[Batch], tensors: Sequence[str]
) -> dict[str, Tensor]:
    """Wanda's scores ``|W_ij| * ||x_j||`` of linear layers, with the inputs x that calibration batches give.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(batch)`` for tensors and ``model(**batch)`` for mappings.
    calibration : sequence of Tensor or mapping
    tensors : sequence of str
        Names of the layers' weights.

    Returns
    -------
    dict of str to Tensor
        float32 scores of each weight's own shape, ``(out, in)`` or ``(in, out)``; see
        :func:`nmsolve.prune.wanda_scores`.
    """
    squares: dict[str, Tensor] = {}
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in tensors}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            squares[name] = squares.get(name, 0) + x.square().sum(0)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in calibration:
                call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for name, layer in layers.items():
        weight = model.get_parameter(name).detach().float()
        input_first = is_conv1d(layer)
        score = wanda_scores(weight.T if input_first else weight, squares[name].sqrt())
        scores[name] = score.T if input_first else score
    return scores
