"""The couplings of a model in memory: those that its names show, and what only its modules tell.

Chains of layers in ``torch.nn.Sequential`` are read from the modules, and a fold is refused where an
activation mixes channels or a tensor is shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.permute.couplings import Coupling, Site, named_couplings

__all__ = ["find_couplings", "sequential_couplings"]

_ELEMENTWISE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
_POOLS: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_couplings(model: nn.Module) -> list[Coupling]:
    """The couplings of a model: transformer blocks by the names of their layers, and sequential chains.

    Parameters
    ----------
    model : nn.Module
        Its ``config``, if it has one, gives the numbers of heads.

    Returns
    -------
    list of Coupling
        In the order of the model's parameters. A coupling that does not fold says why in ``reason``.

    Examples
    --------
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> [(c.name, c.size, c.folds) for c in find_couplings(mlp)]
    [('0', 4, False), ('2', 8, True)]
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    chains = sequential_couplings(model)
    taken = {site.tensor for coupling in chains for site in coupling.consumers}
    named = [
        coupling
        for coupling in named_couplings(shapes, fields)
        if not any(site.tensor in taken for site in coupling.consumers)
    ]
    found = [_refuse_shared(coupling, parameters) for coupling in named + chains]
    found = [_probe_activation(coupling, model) for coupling in found]
    order = {name: k for k, name in enumerate(parameters)}
    return sorted(found, key=lambda coupling: order[coupling.consumers[0].tensor])


def sequential_couplings(model: nn.Module) -> list[Coupling]:
    """The couplings of linear and convolution layers that follow each other in ``nn.Sequential`` modules.

    Between them may stand element-wise activations, dropout, norms with a parameter for each channel (which
    are reordered too) and pooling.
    """
    found: list[Coupling] = []
    for prefix, module in model.named_modules():
        inside = any(
            isinstance(parent, nn.Sequential)
            for name, parent in model.named_modules()
            if name != prefix and (prefix.startswith(f"{name}.") or not name)
        )
        if isinstance(module, nn.Sequential) and not inside:
            found += _chain(prefix, module)
    return found


# --- chains -------------------------------------------------------------------------------------------------


def _chain(prefix: str, sequence: nn.Sequential) -> list[Coupling]:
    found: list[Coupling] = []
    producers: tuple[Site, ...] = ()
    channels, reason = 0, "it is the first layer: its inputs come from outside"
    for name, layer in _flattened(prefix, sequence):
        weight = f"{name}.weight"
        if isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
            grouped = isinstance(layer, _CONVOLUTIONS) and layer.groups != 1
            inputs = layer.weight.shape[1]
            if not grouped:
                if producers and inputs != channels:
                    reason, producers = f"it has {inputs} inputs for {channels} channels", ()
                found.append(
                    Coupling(name, 1, inputs, (Site(weight, 1),), producers, "" if producers else reason)
                )
            channels, reason = layer.weight.shape[0], ""
            producers = (Site(weight, 0),)
            if layer.bias is not None:
                producers += (Site(f"{name}.bias", 0),)
            if grouped:
                reason, producers = (
                    f"{name} is a grouped convolution, whose outputs are tied to its groups",
                    (),
                )
        elif isinstance(layer, _ELEMENTWISE_NORMS):
            tensors = [n for n, p in layer.named_parameters(recurse=False)]
            tensors += [n for n, b in layer.named_buffers(recurse=False) if b.ndim == 1]
            if any(getattr(layer, t).shape != (channels,) for t in tensors):
                reason, producers = f"{name} normalises over more than the channels", ()
            elif producers:
                producers += tuple(Site(f"{name}.{t}", 0) for t in tensors)
        elif isinstance(layer, (nn.Dropout, nn.Identity, nn.Dropout1d, nn.Dropout2d, *_POOLS)):
            continue
        elif any(True for _ in layer.parameters()) or not _elementwise(layer):
            reason, producers = f"{name} ({type(layer).__name__}) does not act on every channel alike", ()
    return found


def _flattened(prefix: str, sequence: nn.Sequential) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, child in sequence.named_children():
        path = f"{prefix}.{name}" if prefix else name
        found += _flattened(path, child) if isinstance(child, nn.Sequential) else [(path, child)]
    return found


# --- what only the modules can tell -------------------------------------------------------------------------


# How far one input may be apart at two places, relative to values of 1: vectorised code computes exponentials
# in another way than the loop over what is left at the end, and tanh(x) + 1 loses what that costs.
_ULPS = 16


def _elementwise(layer: nn.Module) -> bool:
    """Whether reordering the channels before or after the layer is the same, found by trying it."""
    probe = torch.linspace(-3, 3, 48).view(1, 6, 8)
    order = torch.tensor([5, 2, 0, 7, 6, 1, 4, 3])
    was_training = layer.training
    try:
        with torch.no_grad():
            layer.eval()
            rows = [4, 0, 5, 1, 3, 2]
            out = layer(probe)
            other = probe.clone()
            other[..., 2] = 0.5  # which a softmax tells the other channels
            return (
                _alike(layer(probe[..., order]), out[..., order])
                and _alike(layer(probe[:, rows]), out[:, rows])
                and _alike(layer(other)[..., 3:], out[..., 3:])
            )
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    finally:
        layer.train(was_training)


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = _ULPS * torch.finfo(a.dtype).eps
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def _probe_activation(coupling: Coupling, model: nn.Module) -> Coupling:
    """Refuses the fold of an MLP whose activation is a module that mixes channels."""
    if not coupling.folds or coupling.heads != 1:
        return coupling
    path = coupling.name.rpartition(".")[0]
    parent = model.get_submodule(path) if path else model
    if isinstance(parent, nn.Sequential):
        return coupling
    for name, child in parent.named_children():
        if name.startswith(("act", "intermediate_act")) and not _elementwise(child):
            reason = f"{path}.{name} ({type(child).__name__}) does not act on every channel alike"
            return replace(coupling, producers=(), reason=reason)
    return coupling


def _refuse_shared(coupling: Coupling, parameters: Mapping[str, Tensor]) -> Coupling:
    """A tensor that two places of the model share cannot be reordered for one of them."""
    if not coupling.folds:
        return coupling
    sites = {site.tensor for site in (*coupling.consumers, *coupling.producers) if site.tensor in parameters}
    for site in sites:
        for name, parameter in parameters.items():
            if name not in sites and parameter is parameters[site]:
                return replace(coupling, producers=(), reason=f"{site} is shared with {name}")
    return coupling
