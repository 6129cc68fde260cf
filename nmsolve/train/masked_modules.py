r"""Layers whose products see a masked weight, while the parameter stays dense under its name.

Forward, for a weight W, a mask S and the straight-through gradient::

    y = f(x; W * S),    dL/dW = dL/d(W * S)        (Bengio et al., arXiv 1308.3432)

and ``dL/dW = S * dL/d(W * S)`` for the masked gradient. Both are compositions of differentiable operators, so
that compilers, ``torch.func`` and higher derivatives know them already.

A layer is masked by changing its class to a subclass of its own. Its parameters, their names and their hooks
stay, and the mask is a buffer that no checkpoint holds: it moves with the module, a copy has a copy, and a
new mask is written into it, which makes no new graph of a compiled model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nmsolve.checkpoint.roles import is_conv1d
from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import shard_of
from nmsolve.train.sparse24 import sparse24_linear

__all__ = [
    "MASK",
    "finish_model",
    "is_masked",
    "leave_out_of_ddp",
    "mask_module",
    "masked_weight",
    "put_back_into_ddp",
    "unmask_module",
    "unmaskable",
]

# The name of the buffer. It is not one that layers have.
MASK = "nmsolve_mask"


def masked_weight(weight: Tensor, mask: Tensor, straight_through: bool) -> Tensor:
    """``W * S`` of a weight and a bool mask of its shape, with one of the two gradients."""
    if straight_through:
        # W - W is exactly 0 for every finite W, and W - 0 is W: the value is that of a product with the mask.
        return weight - weight.detach().masked_fill(mask, 0)
    return torch.where(mask, weight, 0)


class Masked:
    """What is common to masked layers; stands before the layer's own class among the bases."""

    nmsolve_mask: Tensor
    nmsolve_straight_through: bool
    # What was asked of sparse operands while there are any: None, "auto" or "sparse24".
    nmsolve_sparse: str | None = None
    weight: Any

    def nmsolve_operand(self) -> Tensor:
        return masked_weight(self.weight, self.nmsolve_mask, self.nmsolve_straight_through)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made as it is needed, so that pickle cannot import it by its name.
        reduced: Any = super().__reduce_ex__(2)
        # Nobody tells a copy when its masks end, so that it has dense operands.
        state = {name: value for name, value in reduced[2].items() if name != "nmsolve_sparse"}
        return _bare, (own_class(self),), state


class _MaskedLinear(Masked):
    bias: Any

    def forward(self, input: Tensor) -> Tensor:
        operand = self.nmsolve_operand()
        if self.nmsolve_sparse is not None:
            return sparse24_linear(input, operand, self.bias, self.nmsolve_sparse == "sparse24")
        return functional.linear(input, operand, self.bias)


class _MaskedConvolution(Masked):
    bias: Any
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.nmsolve_operand(), self.bias)


class _MaskedConv1D(Masked):
    """transformers' Conv1D of GPT-2: the weight is ``(in, out)``."""

    bias: Any
    nf: int

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.nmsolve_operand())
        return flat.view(*x.shape[:-1], self.nf)


_FORWARDS: dict[type[nn.Module], type[Masked]] = {
    nn.Linear: _MaskedLinear,
    nn.Conv1d: _MaskedConvolution,
    nn.Conv2d: _MaskedConvolution,
}


def _known(kind: type[nn.Module], module: nn.Module) -> tuple[type[Masked], Any] | None:
    """The masked forward for a class of layers, and the function that it stands for."""
    for known, masked in _FORWARDS.items():
        if issubclass(kind, known):
            return masked, known.forward
    if is_conv1d(module):
        home = next(base for base in kind.__mro__ if base.__name__ == "Conv1D")
        return _MaskedConv1D, home.forward  # type: ignore[attr-defined]
    return None


def is_masked(module: object) -> bool:
    return isinstance(module, Masked)


def own_class(module: object) -> type[nn.Module]:
    """The class that a masked layer had; the bases of a masked class are the forward and that one."""
    for kind in type(module).__mro__:
        if len(kind.__bases__) == 2 and issubclass(kind.__bases__[0], Masked):
            own: type[nn.Module] = kind.__bases__[1]
            return own
    raise TypeError(f"expected a masked layer, got {type(module).__name__}")


_CLASSES: dict[tuple[type[Masked], type[nn.Module]], Any] = {}


def _masked_class(forward: type[Masked], own: type[nn.Module]) -> Any:
    if (forward, own) not in _CLASSES:
        name = f"Masked{own.__name__}"
        _CLASSES[forward, own] = type(name, (forward, own), {"__module__": own.__module__})
    return _CLASSES[forward, own]


def _bare(own: type[nn.Module]) -> nn.Module:
    module = own.__new__(own)
    found = _known(own, module)
    assert found is not None
    module.__class__ = _masked_class(found[0], own)
    return module


def unmaskable(module: nn.Module) -> str | None:
    """Why the products of a layer cannot be made to see a masked weight, or None."""
    kind = type(module)
    if is_masked(module):
        return "it has masks of another SparseTraining, which finish() ends"
    found = _known(kind, module)
    if found is None:
        return f"a {kind.__name__} is no linear layer and no convolution"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, as accelerate's hooks do"
    if issubclass(kind, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight without calling it"
    if kind.forward is not found[1]:
        return f"{kind.__name__} has a forward of its own"
    return None


def mask_module(module: nn.Module, mask: Tensor, straight_through: bool, bypassed: bool) -> None:
    """Has the products of a layer see ``weight * mask`` from now on.

    ``bypassed`` tells that its parent, an nn.TransformerEncoderLayer, reads the weights of its layers without
    calling them where it can: not where one of them has a hook.
    """
    found = _known(type(module), module)
    assert found is not None
    module.__class__ = _masked_class(found[0], type(module))
    module.register_buffer(MASK, mask, persistent=False)
    module.nmsolve_straight_through = straight_through  # type: ignore[assignment]
    if bypassed:
        module.register_forward_pre_hook(_is_called)


def _is_called(module: nn.Module, args: Any) -> None:
    """Does nothing."""


def unmask_module(module: nn.Module) -> None:
    """The inverse of :func:`mask_module`; the weight stays as it is."""
    module.__class__ = own_class(module)
    delattr(module, MASK)
    del module.nmsolve_straight_through
    vars(module).pop("nmsolve_sparse", None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _is_called:
            del module._forward_pre_hooks[key]


@torch.no_grad()
def finish_model(model: nn.Module) -> list[str]:
    """Makes plain layers of all masked ones: pruned weights become zero in the parameter itself.

    For a copy of a model in training, such as one to export or the average of an exponential moving average;
    the model itself is finished by :meth:`SparseTraining.finish`.

    Parameters
    ----------
    model : nn.Module
        A copy, by :func:`copy.deepcopy` or ``torch.optim.swa_utils.AveragedModel``, of a model that
        :class:`SparseTraining` was given.

    Returns
    -------
    list of str
        Names of the weights that are sparse now.

    Raises
    ------
    NMSolveError
        If ``model`` is no module, or has no masked layer.

    Examples
    --------
    >>> import copy
    >>> from nmsolve.train import SparseTraining
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    >>> sparse = SparseTraining(model, "4:8")
    >>> exported = copy.deepcopy(model)
    >>> finish_model(exported)
    ['0.weight']
    >>> nmsolve.check_mask(exported[0].weight != 0, 4, 8)
    """
    if not isinstance(model, nn.Module):
        raise NMSolveError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    found = {name: module for name, module in model.named_modules() if is_masked(module)}
    if not found:
        raise NMSolveError("model: expected masked layers of SparseTraining, found none")
    for module in found.values():
        weight, mask = module.weight, getattr(module, MASK)
        assert isinstance(weight, Tensor)
        shard_of(weight).masked_fill_(~shard_of(mask), 0)
        unmask_module(module)
    return [f"{name}.weight" if name else "weight" for name in found]


# Where DDP looks for names of what it leaves alone.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def leave_out_of_ddp(model: nn.Module) -> None:
    """DDP sends every buffer at every forward pass; masks are alike on every process already."""
    names = {f"{n}.{MASK}" if n else MASK for n, module in model.named_modules() if is_masked(module)}
    if names:
        known = set(getattr(model, _DDP_IGNORES, ()))
        setattr(model, _DDP_IGNORES, [*known, *sorted(names - known)])


def put_back_into_ddp(model: nn.Module) -> None:
    """The inverse of :func:`leave_out_of_ddp`."""
    known = [n for n in getattr(model, _DDP_IGNORES, ()) if n.rpartition(".")[2] != MASK]
    if known:
        setattr(model, _DDP_IGNORES, known)
    elif hasattr(model, _DDP_IGNORES):
        delattr(model, _DDP_IGNORES)
