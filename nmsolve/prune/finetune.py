"""Training with fixed masks, and the 2:4 format of the GPU's sparse tensor cores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.roles import roles_of
from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import is_dtensor, shard_of, spread_like, whole_of
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.prune.arguments import check_in_memory
from nmsolve.prune.layers import Layer, find_layers, find_stacks, uncompiled

__all__ = ["FixedMasks", "Operands", "to_semi_structured"]


class Operands(NamedTuple):
    """What the two matrix products of a layer see.

    ``forward`` tells whether no group of M inputs of any output holds more than N weights that are not zero
    (``Y = X W^T`` reads them along the input), ``backward`` the same for M outputs of any input
    (``dX = dY W`` reads them along the output). ``stray`` counts weights outside of the mask.
    """

    name: str
    pattern: str
    forward: bool
    backward: bool
    stray: int


class FixedMasks:
    """Keeps masked weights at zero while a model is trained, by any torch optimizer.

    Gradients of masked weights are cleared as soon as they are accumulated, so that momentum and second
    moments of optimizers never see them, and the weights themselves are cleared after every step, so that
    nothing that an optimizer does (weight decay, noise, momentum of an earlier phase) survives. Parameters
    are looked up by name: one that is replaced (``load_state_dict(assign=True)``) is masked like the first.

    Parameters may be DTensors: under FSDP2 (``fully_shard`` first) and tensor parallelism each process keeps
    its part of every mask.

    Parameters
    ----------
    model : nn.Module
    masks : mapping of weight name to bool Tensor
        Such as :attr:`PruneResult.masks`, or what :func:`nmsolve.load_masks` returns; whole on every process,
        or DTensors.
    optimizer : torch.optim.Optimizer, optional
        More can be attached later.

    Raises
    ------
    NMSolveError
        If a mask has no weight of its shape in the model.

    Examples
    --------
    >>> model = torch.nn.Linear(8, 8)
    >>> masks = {"weight": nmsolve.transposable_mask(model.weight.abs(), 2, 4)}
    >>> optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    >>> fixed = FixedMasks(model, masks, optimizer)
    >>> for _ in range(3):
    ...     model(torch.randn(4, 8)).square().sum().backward()
    ...     optimizer.step()
    >>> fixed.operands("2:4")
    [Operands(name='weight', pattern='2:4', forward=True, backward=True, stray=0)]
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if not isinstance(masks, Mapping):
            raise NMSolveError(f"masks: expected names and bool tensors, got {type(masks).__name__}")
        model = uncompiled(model)
        check_in_memory(model)
        layers = (*find_layers(model), *find_stacks(model, roles_of(model)))
        self._layers = {layer.weight_name: layer for layer in layers}
        self._held: dict[str, _Held] = {}
        for name, mask in masks.items():
            owner, _, leaf = name.rpartition(".")
            try:
                held = _Held(model.get_submodule(owner), leaf, mask)
                parameter = held.parameter
            except (AttributeError, KeyError):
                raise NMSolveError(f"masks: the model has no parameter {name!r}") from None
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise NMSolveError(
                    f"masks: {name}: expected a bool tensor of shape {tuple(parameter.shape)}, got "
                    + (f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask))
                )
            self._held[name] = held
        self._handles: list[Any] = []
        self._watching = True
        self.apply()
        if optimizer is not None:
            self.attach(optimizer)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Clears masked weights after every step of this optimizer as well."""
        self._watching = True
        self._handles.append(optimizer.register_step_post_hook(lambda *_: self.apply()))

    @torch.no_grad()
    def apply(self) -> None:
        """Sets masked weights to zero."""
        for held in self._held.values():
            if self._watching:
                held.watch()
            held.apply()

    def remove(self) -> None:
        """Removes all hooks; the weights stay as they are."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watching = [], False
        for held in self._held.values():
            held.release()

    def operands(self, pattern: PatternLike | Mapping[str, PatternLike]) -> list[Operands]:
        """Checks the weights as they are now against N:M, along the input and along the output.

        Parameters
        ----------
        pattern : NMPattern, str, (int, int) or mapping of weight name to one of these
            One for all, or such as :attr:`PruneResult.patterns`. Groups with fewer than N weights pass, as
            they do in hardware.

        Sharded weights are gathered one by one: every process has to ask.
        """
        one = None if isinstance(pattern, Mapping) else NMPattern.of(pattern)
        found = []
        for name, held in self._held.items():
            given = pattern.get(name) if isinstance(pattern, Mapping) else one
            if given is None:
                raise NMSolveError(f"pattern: expected one for {name!r}, got none")
            expected = NMPattern.of(given)
            there: Any = held.parameter.detach() != 0
            mask = held.mask
            if is_dtensor(there):
                there, mask = whole_of(there), whole_of(spread_like(mask, there))
            forward = backward = True
            for matrix in _matrices(there, self._layers.get(name)):
                forward = forward and _holds(matrix, expected)
                backward = backward and _holds(matrix.T, expected)
            stray = int((there & ~mask.to(there.device)).sum())
            found.append(Operands(name, str(expected), forward, backward, stray))
        return found


class _Held:
    """A parameter under its name, its mask, and the hook that clears its gradient."""

    def __init__(self, module: nn.Module, leaf: str, mask: Tensor) -> None:
        self.module, self.leaf, self.mask = module, leaf, mask
        self._last: nn.Parameter | None = None
        self._hooked: nn.Parameter | None = None
        self._handle: Any = None

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.module._parameters[self.leaf]
        if parameter is None:
            raise KeyError(self.leaf)
        if is_dtensor(self._last) and not is_dtensor(parameter):
            return self._last  # FSDP2 has gathered it, and the optimizer steps the shard
        self._last = parameter
        return parameter

    def local_mask(self) -> Tensor:
        """The part of the mask that this process has, of the shape of the local parameter."""
        parameter = self.parameter
        self.mask = spread_like(self.mask, parameter)
        return shard_of(self.mask).to(shard_of(parameter).device)

    def watch(self) -> None:
        parameter = self.parameter
        if parameter.requires_grad and parameter is not self._hooked:
            self.release()
            self._hooked = parameter
            self._handle = parameter.register_post_accumulate_grad_hook(self._clear)

    def _clear(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None:
            return
        if is_dtensor(gradient) and is_dtensor(parameter) and gradient.placements != parameter.placements:
            gradient = parameter.grad = gradient.redistribute(placements=parameter.placements)
        local = shard_of(gradient)
        local.masked_fill_(~self.local_mask().to(local.device), 0)

    def apply(self) -> None:
        shard_of(self.parameter).masked_fill_(~self.local_mask(), 0)

    def release(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._hooked = self._handle = None


def _matrices(tensor: Tensor, layer: Layer | None) -> list[Tensor]:
    """``(out, in)`` matrices of a weight, one for each group and kernel position."""
    if layer is None:
        return list(tensor.reshape(-1, *tensor.shape[-2:]))
    grouped = layer.matrices(tensor).unflatten(2, (layer.positions, -1))
    return [matrix for group in grouped.transpose(1, 2) for matrix in group]


def _holds(there: Tensor, pattern: NMPattern) -> bool:
    """Whether no group of M along the last dimension has more than N entries."""
    short = -there.shape[-1] % pattern.m
    groups = nn.functional.pad(there, (0, short)).unflatten(-1, (-1, pattern.m))
    return bool((groups.sum(-1) <= pattern.n).all())


def to_semi_structured(model: nn.Module, masks: Mapping[str, Tensor]) -> list[str]:
    """Stores 2:4 weights in the format of the GPU's sparse tensor cores, for inference.

    The linear layers that ``masks`` names get a weight made by ``torch.sparse.to_sparse_semi_structured``:
    half the memory, and products that skip the zeros. They can no longer be trained.

    Parameters
    ----------
    model : nn.Module
        On a GPU of compute capability 8.0 or newer, in float16 or bfloat16.
    masks : mapping of weight name to bool Tensor
        2:4 along the input at least.

    Returns
    -------
    list of str
        Names of the weights that were converted.

    Raises
    ------
    NMSolveError
        If a layer cannot be converted; then none has been.
    """
    layers = {layer.weight_name: layer for layer in find_layers(uncompiled(model))}
    chosen = []
    for name in masks:
        layer = layers.get(name)
        if layer is None or not isinstance(layer.module, nn.Linear):
            raise NMSolveError(f"masks: {name!r} is no weight of a linear layer of the model")
        weight = layer.weight
        if not _holds(weight.detach() != 0, NMPattern(2, 4)):
            raise NMSolveError(f"masks: {name}: expected a 2:4 weight, got groups of 4 with more than 2")
        if weight.device.type != "cuda" or weight.dtype not in (torch.float16, torch.bfloat16):
            raise NMSolveError(
                f"model: {name}: expected float16 or bfloat16 on a GPU, got {weight.dtype} on {weight.device}"
            )
        if weight.shape[0] % 32 or weight.shape[1] % 64:
            raise NMSolveError(
                f"model: {name}: expected sizes that 32 (out) and 64 (in) divide, got {tuple(weight.shape)}"
            )
        chosen.append((name, layer.module))
    for _, module in chosen:
        compressed = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(compressed, requires_grad=False)
    return [name for name, _ in chosen]
