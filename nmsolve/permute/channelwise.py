"""What single layers do to channels: which hold weights, which hand every channel on alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nmsolve.permute.couplings import Site

__all__ = ["CONVOLUTIONS", "NORMS", "POOLS", "elementwise", "is_plain", "norm_sites"]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.RMSNorm)
POOLS: tuple[type[nn.Module], ...] = (
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
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

# How far one input may be apart at two places, relative to values of 1: vectorised code computes exponentials
# in another way than the loop over what is left at the end, and tanh(x) + 1 loses what that costs.
_ULPS = 16


def is_plain(layer: nn.Module) -> bool:
    """Whether it is a linear or convolution layer of torch that computes with its own parameter.

    Not one whose class computes something else, nor one whose weight is made from others before each call
    (weight norm, parametrisations).
    """
    kinds = (nn.Linear, *CONVOLUTIONS)
    plain = any(type(layer).forward is kind.forward for kind in kinds if isinstance(layer, kind))
    return plain and isinstance(layer._parameters.get("weight"), nn.Parameter)


def norm_sites(name: str, layer: nn.Module, channels: int) -> tuple[Site, ...] | None:
    """The parameters and running statistics of a norm, one for each channel; None if they are others."""
    tensors = [n for n, _ in layer.named_parameters(recurse=False)]
    tensors += [n for n, b in layer.named_buffers(recurse=False) if b.ndim == 1]
    normalised = getattr(layer, "normalized_shape", (channels,))
    if tuple(normalised) != (channels,) or any(getattr(layer, t).shape != (channels,) for t in tensors):
        return None
    return tuple(Site(f"{name}.{tensor}", 0) for tensor in tensors)


def elementwise(layer: nn.Module) -> bool:
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
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
    finally:
        layer.train(was_training)


def _alike(a: Tensor, b: Tensor) -> bool:
    tolerance = _ULPS * torch.finfo(a.dtype).eps
    return a.shape == b.shape and torch.allclose(a, b, rtol=tolerance, atol=tolerance)
