"""The layers that can be pruned, each seen as matrices ``(out, in)`` and inputs ``(tokens, in)``.

=====================  ====================================  ============================================
layer                  weight as stored                      matrices ``(groups, out, positions * in)``
=====================  ====================================  ============================================
nn.Linear              ``(out, in)``                         itself
Conv1D (GPT-2)         ``(in, out)``                         its transpose
nn.Conv1d, nn.Conv2d   ``(out, in / groups, *kernel)``       one for each group, positions of the kernel
                                                             one after the other, each with all channels
stacked experts        ``(experts, out, in)`` or             one for each expert
                       ``(experts, in, out)``
=====================  ====================================  ============================================

N:M groups lie along the channels of one kernel position: a convolution is a batch of ``out x in`` matrices.
Experts that are one parameter, as in transformers 5, are a layer with statistics for each; the gates and the
inputs of gated experts, one above the other, are two matrices.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.roles import Role, is_conv1d, roles_of
from nmsolve.errors import NMSolveError, counted
from nmsolve.pattern import NMPattern

__all__ = ["Layer", "Selected", "find_layers", "find_stacks", "matches", "select_layers", "uncompiled"]

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module with a weight to prune; ``name`` is its dotted name in the model.

    Stacked experts have the name of their parameter, which is the module's ``own``, and ``stack_input``: the
    axis, 0 or 1, of the inputs of their matrices.
    """

    name: str
    module: nn.Module
    own: str = "weight"
    stack_input: int | None = None

    @property
    def weight(self) -> Tensor:
        weight = getattr(self.module, self.own)
        assert isinstance(weight, Tensor)
        return weight

    @property
    def weight_name(self) -> str:
        """Name of the weight in the model's state dict."""
        if self.own != "weight":
            return self.name
        return f"{self.name}.weight" if self.name else "weight"

    @property
    def is_stack(self) -> bool:
        """Whether it is the matrices of several experts."""
        return self.stack_input is not None

    @property
    def parts(self) -> int:
        """How many matrices the outputs of one expert belong to, one above the other: gates and inputs."""
        gated = (
            self.is_stack and self.own == "gate_up_proj" and self.weight.shape[2 - self.stack_axis] % 2 == 0
        )
        return 2 if gated and getattr(self.module, "is_concatenated", True) else 1

    @property
    def stack_axis(self) -> int:
        return 1 if self.stack_input is None else self.stack_input

    @property
    def expert_of(self) -> tuple[str, str] | None:
        """Of a layer in one of several expert modules: the name of their container, and its own in each."""
        found = _EXPERT.fullmatch(self.name)
        return (found[1], found[2]) if found else None

    @property
    def input_first(self) -> bool:
        """Whether the weight is stored ``(in, out)``."""
        return self.stack_input == 0 if self.is_stack else is_conv1d(self.module)

    @property
    def is_convolution(self) -> bool:
        return isinstance(self.module, _Convolution)

    @property
    def groups(self) -> int:
        """Number of matrices with inputs of their own."""
        if self.is_stack:
            return len(self.weight)
        return self.module.groups if isinstance(self.module, _Convolution) else 1

    @property
    def positions(self) -> int:
        """Number of kernel positions, 1 for a linear layer."""
        return math.prod(self.module.kernel_size) if isinstance(self.module, _Convolution) else 1

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Size ``(out, in)`` of the matrices whose rows (and columns) are N:M."""
        shape = self.weight.shape
        if self.is_stack:
            rows, cols = shape[2 - self.stack_axis], shape[1 + self.stack_axis]
            return rows // self.parts, cols
        if self.input_first:
            return shape[1], shape[0]
        return shape[0] // self.groups, shape[1]

    @property
    def input_size(self) -> int:
        """Columns of the matrices."""
        return self.matrix_shape[1] * self.positions

    def matrices(self, tensor: Tensor) -> Tensor:
        """``(groups, out, positions * in)`` of a tensor in the weight's shape; a view if possible."""
        if self.is_stack:
            return tensor.transpose(1, 2) if self.input_first else tensor
        if self.input_first:
            return tensor.T.unsqueeze(0)
        grouped = tensor.reshape(self.groups, tensor.shape[0] // self.groups, tensor.shape[1], -1)
        return grouped.transpose(2, 3).flatten(2)

    def from_matrices(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices`."""
        if self.is_stack:
            return self.matrices(matrices)
        if self.input_first:
            return matrices.squeeze(0).T
        grouped = matrices.unflatten(2, (self.positions, -1)).transpose(2, 3)
        return grouped.reshape(self.weight.shape)

    def inputs(self, x: Tensor) -> Tensor:
        """``(groups, tokens, positions * in)`` of what the module was called with."""
        module = self.module
        if not isinstance(module, _Convolution):
            return x.reshape(1, -1, x.shape[-1])
        if x.ndim == len(module.kernel_size) + 1:
            x = x.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = nn.functional.pad(x, _padding(module), mode=mode)
        kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
        if len(kernel) == 1:
            x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
        patches = nn.functional.unfold(
            x, kernel, dilation=dilation, stride=stride
        )  # (batch, in * positions, tokens)
        split = patches.unflatten(1, (self.groups, -1, self.positions))
        return split.permute(1, 0, 4, 3, 2).reshape(self.groups, -1, split.shape[2] * self.positions)


_Convolution = (nn.Conv1d, nn.Conv2d)
_EXPERT = re.compile(r"(.*\bexperts)\.(?:experts?_?)?\d+\.(.+)")


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """What ``F.pad`` takes: before and after, the last dimension first."""
    sides: list[int] = []
    for k in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            total = module.dilation[k] * (module.kernel_size[k] - 1) if module.padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [module.padding[k]] * 2
    return sides


def find_layers(model: nn.Module) -> list[Layer]:
    """Every linear layer and convolution of a model with a weight of its own, in the order of its modules."""
    return [
        Layer(name, module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or is_conv1d(module))
        and isinstance(getattr(module, "weight", None), Tensor)
    ]


def find_stacks(model: nn.Module, roles: Mapping[str, Role]) -> list[Layer]:
    """The stacked experts of a model whose matrices tell which of their axes is the input."""
    found = []
    for prefix, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{own}" if prefix else own
            role = roles.get(name)
            if role is not None and role.kind == "stack" and role.input_dim is not None:
                found.append(Layer(prefix if own == "weight" else name, module, own, role.input_dim))
    return found


@dataclass(frozen=True)
class Selected:
    """What to prune, in the order of the model's modules, and what stays dense with the reason why.

    ``skipped`` has the other layers, and parameters that hold matrices but belong to no layer, such as the
    stacked experts of a mixture of experts.
    """

    layers: Mapping[Layer, NMPattern]
    skipped: Mapping[str, str]


def select_layers(
    model: nn.Module,
    patterns: Mapping[str, NMPattern | None],
    dense: Sequence[str] = (),
    *,
    stacks: bool = False,
    away: bool = False,
) -> Selected:
    """Decides for every layer which pattern it gets.

    Parameters
    ----------
    model : nn.Module
    patterns : mapping of glob to NMPattern or None
        The last glob that matches a layer's name, or its name from any dot on, decides; None leaves it dense.
        ``"*"`` covers every layer but embeddings, heads, routers and layers smaller than one block; any other
        glob is taken at its word.
    dense : sequence of str
        Globs of layers to leave dense.
    stacks : bool
        Whether stacked experts are among the layers.
    away : bool
        Whether weights on the meta device are read when they are needed.

    Raises
    ------
    NMSolveError
        If a glob matches no layer, or no layer is left to prune.
    """
    roles = roles_of(model)
    layers = find_layers(model)
    if stacks:
        order = {module: place for place, module in enumerate(model.modules())}
        layers = sorted((*layers, *find_stacks(model, roles)), key=lambda layer: order[layer.module])
    if not layers:
        raise NMSolveError("model: expected linear layers or convolutions, found none")
    others = _other_matrices(model, layers)
    for option, globs in (("pattern", patterns), ("dense", dense)):
        for glob in globs:
            if not any(matches(layer.name, glob) for layer in layers):
                names = ", ".join(layer.name for layer in layers[:3])
                meant = (f"; {name} is {what}" for name, what in others.items() if matches(name, glob))
                have = f"{counted(len(layers), 'layer')} ({names}, ...)"
                raise NMSolveError(f"{option}: {glob!r} matches none of the model's {have}" + next(meant, ""))
    chosen: dict[Layer, NMPattern] = {}
    skipped: dict[str, str] = {}
    seen: dict[int, str] = {}
    for layer in layers:
        found = next((glob for glob in reversed(list(patterns)) if matches(layer.name, glob)), None)
        pattern = None if found is None else patterns[found]
        reason: str | None = None
        if any(matches(layer.name, named) for named in dense):
            reason = "named in dense"
        elif pattern is None:
            reason = "no pattern for it"
        elif layer.weight.dtype not in _DTYPES:
            reason = f"dtype {str(layer.weight.dtype).removeprefix('torch.')}"
        elif layer.weight.numel() == 0 or (layer.weight.is_meta and not away):
            reason = "no weights in memory"
        elif layer.module._parameters.get(layer.own) is None:
            reason = "its weight is computed from other parameters"
        elif id(layer.weight) in seen:
            reason = f"shares its weight with {seen[id(layer.weight)]}"
        elif found == "*":
            reason = roles[layer.weight_name].dense or _too_small(layer, pattern)
        if reason is None and pattern is not None:
            chosen[layer] = pattern
            seen[id(layer.weight)] = layer.name
        else:
            skipped[layer.name] = reason or "no pattern for it"
    if not chosen:
        reasons = "; ".join(sorted(set(skipped.values()))[:4])
        raise NMSolveError(
            f"model: no layer to prune among {counted(len(layers), 'linear layer')} and convolutions"
            + (f" ({reasons})" if reasons else "")
        )
    return Selected(chosen, skipped | others)


def _other_matrices(model: nn.Module, layers: Sequence[Layer]) -> dict[str, str]:
    """Parameters that hold matrices but belong to no layer and no embedding, with what they are."""
    known = {id(layer.module) for layer in layers if not layer.is_stack}
    stacks = {layer.weight_name for layer in layers if layer.is_stack}
    found = {}
    for prefix, module in model.named_modules():
        if id(module) in known or isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name not in stacks and (parameter.ndim == 2 or (parameter.ndim > 2 and len(parameter) > 1)):
                found[name] = f"a parameter of {type(module).__name__}, which is no layer that can be pruned"
    return found


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` has wrapped, whose names are those of the checkpoint."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def matches(name: str, glob: str) -> bool:
    """Whether a glob matches a layer's name, or its name from any dot on."""
    return fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}")


def _too_small(layer: Layer, pattern: NMPattern) -> str | None:
    rows, cols = layer.matrix_shape
    if min(rows, cols) < pattern.m:
        return f"{rows} x {cols} matrices are smaller than one block of {pattern.m}"
    return None
