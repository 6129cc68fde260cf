"""Experts that are one parameter: which tokens reach each, seen at the products with their matrices.

transformers 5 holds the experts of a mixture as parameters ``(experts, out, in)`` or ``(experts, in, out)``
of one module, whose forward pass multiplies the tokens of each expert by its slice. However it is written,
each such product is an operation of torch on a view of the parameter, from which the expert and its inputs
can be told. What runs instead of a module's own forward pass is chosen from
``transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS``; some of these copy the slices, so that the module's
own, "eager", is asked for while a model is pruned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nmsolve.errors import NMSolveError
from nmsolve.prune.layers import Layer

__all__ = ["check_routing", "eager_experts", "reroutable", "routed", "watched"]

_aten = torch.ops.aten
# Where the two factors of a product stand among its arguments.
_FACTORS = {
    _aten.mm.default: (0, 1),
    _aten.bmm.default: (0, 1),
    _aten.matmul.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.baddbmm.default: (1, 2),
    _aten.linear.default: (0, 1),
}

Told = Callable[[Layer, int, Tensor], None]
"""Called with a layer, the number of an expert, and the inputs ``(tokens, in)`` that it is multiplied by."""


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Positional and by name."""


class Products(TorchDispatchMode):
    """Tells of the products with matrices of stacked experts."""

    def __init__(self, layers: Sequence[Layer], tell: Told) -> None:
        super().__init__()
        self.layers, self.tell = layers, tell

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _FACTORS:
            left, right = (args[place] for place in _FACTORS[func])
            if func is _aten.linear.default:
                right = right.mT
            if not self._look(left, right):
                self._look(right.mT, left.mT)
        return func(*args, **(kwargs or {}))

    def _look(self, x: Tensor, matrix: Tensor) -> bool:
        """Tells of ``x @ matrix`` if the matrix ``(in, out)`` is one of an expert, or those of several."""
        for layer in self.layers:
            weight = layer.weight
            start = matrix.data_ptr() - weight.data_ptr()
            if weight.device != matrix.device or not 0 <= start < weight.nbytes:
                continue
            expert, rest = divmod(start // weight.element_size(), weight.stride(0))
            size, stride = layer.matrix_shape[1], weight.stride(1 + layer.stack_axis)
            if rest or matrix.shape[-2] != size or matrix.stride(-2) != stride:
                return True
            several = matrix.ndim == 3 and len(matrix) > 1 and matrix.stride(0) == weight.stride(0)
            for k in range(len(matrix) if several else 1):
                self.tell(layer, expert + k, (x[k] if several else x).reshape(-1, size))
            return True
        return False


@contextmanager
def watched(
    modules: Mapping[nn.Module, Sequence[Layer]],
    tell: Told,
    calls: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Iterable[Arguments] | None],
    stop: Callable[[], None],
) -> Iterator[None]:
    """Modules of experts tell of their products while they are called.

    Parameters
    ----------
    modules : mapping of module to sequence of Layer
    tell : callable
    calls : callable
        Arguments with which a module is called to be measured, before it is called as it is; None where that
        call itself is what is measured.
    stop : callable
        Called when a module has been measured; it may raise.
    """

    def forward_of(module: nn.Module, layers: Sequence[Layer]) -> Callable[..., Any]:
        run = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            others = calls(module, args, kwargs)
            if others is None:
                with Products(layers, tell):
                    found = run(*args, **kwargs)
                stop()
                return found
            for other, named in others:
                with Products(layers, tell):
                    run(*other, **named)
            stop()
            return run(*args, **kwargs)

        return forward

    with ExitStack() as undo:
        for module, layers in modules.items():
            undo.callback(_restore, module, module.__dict__.get("forward"))
            module.forward = forward_of(module, layers)
        yield


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        del module.forward
    else:
        module.forward = own


def reroutable(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int, int] | None:
    """The tokens ``(T, in)`` of a call of experts, and which arguments are its experts and their weights.

    Both are ``(T, k)``, the first of integers. None if it is called with anything else.
    """
    given = (*args, *kwargs.values())
    if len(given) != 3 or not all(isinstance(value, Tensor) and value.ndim == 2 for value in given):
        return None
    kinds = [value.is_floating_point() for value in given]
    if not kinds[0] or sum(kinds) != 2 or len({len(value) for value in given}) != 1:
        return None
    index = kinds.index(False)
    return given[0], index, 3 - index


def check_routing(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises NMSolveError if a module of experts is not called with a choice of experts for its tokens."""
    if reroutable(args, kwargs) is None:
        raise NMSolveError(
            f"all_experts: {type(module).__name__} is not called with the experts of each token, so that all "
            "of them cannot be chosen"
        )


def routed(
    experts: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    every: bool,
    real: Tensor | None,
) -> Iterator[Arguments] | None:
    """Calls by which experts are measured: without padding, and with every token to every expert if asked.

    None if that is how they are called anyway, or if they are not called with a choice of experts, as
    :func:`check_routing` tells.
    """
    found = reroutable(args, kwargs)
    if found is None:
        return None
    tokens, index, weights = found
    keep = None if real is None or real.numel() != len(tokens) else real.flatten().to(tokens.device)
    if not every and keep is None:
        return None
    given = [value if keep is None else value[keep] for value in (*args, *kwargs.values())]

    def arguments(values: list[Tensor]) -> Arguments:
        return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))

    if not every:
        return iter([arguments(given)])

    def calls() -> Iterator[Arguments]:
        # One after the other: with all at once, some models make (T, experts, experts).
        for expert in range(experts):
            call = list(given)
            call[index] = torch.full_like(given[index][:, :1], expert)
            if given[weights].shape == given[index].shape:
                call[weights] = torch.ones_like(given[weights][:, :1])
            yield arguments(call)

    return calls()


@contextmanager
def eager_experts(layers: Iterable[Layer]) -> Iterator[None]:
    """Modules of stacked experts run as they are written; all as before afterwards."""
    configs = {id(config): config for layer in layers if (config := _chooses(layer)) is not None}
    before = [(config, config._experts_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, chosen in before:
            config._experts_implementation = chosen


def _chooses(layer: Layer) -> Any:
    """The configuration that says how a module of experts runs, if one does."""
    config = getattr(layer.module, "config", None) if layer.is_stack else None
    return config if hasattr(config, "_experts_implementation") else None
