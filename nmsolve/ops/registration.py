"""Operators ``torch.ops.nmsolve.*``: what compilers, exporters and transforms see.

Every operator has its real implementation, which runs a backend, and a fake one, which knows the outputs'
shapes, dtypes and strides from the inputs' alone. None is differentiable by itself: where there is a
gradient, a :class:`torch.autograd.Function` calls one operator forward and another one backward. The others
have a rule for :func:`torch.func.vmap`, under which a batch dimension becomes one more leading dimension.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "batch_first",
    "has_tangent",
    "may_be_differentiated",
    "register",
    "shortcut",
    "signature_kept",
    "tangents_of_tangents",
]

_LIBRARY = torch.library.Library("nmsolve", "FRAGMENT")

# The solvers read any strides, so a compiler may choose the inputs' layout.
_TAGS = ("pt2_compliant_tag", "flexible_layout")
# The check for finite scores waits for the device: a CUDA graph must not capture it.
_WAITS = "cudagraph_unsafe"

_NO_TENSORS = (type(None), bool, int, float, str)


def register(
    name: str,
    schema: str,
    real: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    in_function: bool = False,
) -> torch._ops.OpOverload:
    """Make ``torch.ops.nmsolve.<name>`` of a real and a fake implementation; "name.overload" adds to a name.

    Both take the schema's arguments in their order. The outputs of most operators are constants to autograd;
    under vmap, their tensors get a leading dimension more. An operator that is called ``in_function``, inside
    a :class:`torch.autograd.Function` that knows its gradient, has neither; differentiating through the bare
    operator raises, backward and forward.
    """
    names = _TAGS if in_function else (*_TAGS, _WAITS)
    tags = [getattr(torch.Tag, tag) for tag in names if hasattr(torch.Tag, tag)]
    _LIBRARY.define(name + schema, tags=tags)
    _LIBRARY.impl(name, _hidden_from_compilers(real), "CompositeExplicitAutograd")
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.nmsolve, packet), overload or "default")
    torch.library.register_fake(operator, fake, lib=_LIBRARY)
    setup = None if in_function else _not_differentiable
    torch.library.register_autograd(operator, _no_gradient, setup_context=setup, lib=_LIBRARY)
    if in_function:
        _LIBRARY.impl(name, _refusing_tangents(operator), "ADInplaceOrView", with_keyset=True)
        return operator

    def over_batches(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        moved = [batch_first(arg, dim, info.batch_size) for arg, dim in zip(args, in_dims, strict=True)]
        outputs = operator(*moved)
        return outputs, 0 if isinstance(outputs, Tensor) else type(outputs)([0] * len(outputs))

    torch.library.register_vmap(operator, over_batches, lib=_LIBRARY)
    return operator


def _hidden_from_compilers(real: Callable[..., Any]) -> Callable[..., Any]:
    """``real``, which torch.compile does not trace where it leaves a function that calls it to Python.

    torch.library.custom_op would do the same, but imports the compiler at an operator's first call, which
    takes a second or two. Here it stays out where nobody has imported it.
    """
    hidden: Callable[..., Any] | None = None

    def kernel(*args: Any) -> Any:
        nonlocal hidden
        if "torch._dynamo" not in sys.modules:
            return real(*args)
        if hidden is None:
            torch._dynamo.decorators.skip(kernel)  # its own frame, too
            hidden = torch.compiler.disable(real)
        return hidden(*args)

    return kernel


def _refusing_tangents(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """The kernel behind autograd's: tangents are an error, as PyTorch would drop them without a word.

    A Function calls its operators with forward mode off, and has a jvp of its own.
    """

    def kernel(keys: Any, *args: Any) -> Any:
        if torch._C._is_fwd_grad_enabled() and any(map(_has_tangent, args)):
            _no_gradient(None)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

    return kernel


def _has_tangent(arg: Any) -> bool:
    """Whether a plain tensor, or one that torch.func wraps, has one; a compiler's stand-ins have none."""
    if type(arg) not in (Tensor, torch.nn.Parameter):
        return False
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
        return forward_ad.unpack_dual(arg).tangent is not None


def may_be_differentiated(tensor: Tensor) -> bool:
    """Whether autograd, forward mode or a transform of torch.func may ask for a derivative in ``tensor``."""
    return (
        torch._C._are_functorch_transforms_active()  # some of which do not know unpack_dual
        or (torch.is_grad_enabled() and tensor.requires_grad)
        or has_tangent(tensor)
    )


def has_tangent(tensor: Tensor) -> bool:
    """Whether it has a tangent of the innermost level of forward mode; not for functorch's tensors."""
    # Without a level there are no tangents, and asking for one takes as long as all else.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def shortcut(operator: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, or where nobody looks on its kernel alone, which saves some 50 microseconds a call.

    Those who look on are compilers, tracers, transforms, modes, the profiler, and tensors that are more than
    their values. What it is called with needs no derivative, as in an operator that is called in a Function.
    """
    kernel = _hidden_from_compilers(real)

    def call(*args: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack() > 0
            or torch._C._get_tracing_state() is not None
            or torch._C._are_functorch_transforms_active()
            or torch.autograd._profiler_enabled()
        ):
            return operator(*args)
        for arg in args:
            if type(arg) not in _NO_TENSORS and isinstance(arg, Tensor) and not _is_plain(arg):
                return operator(*args)
        return kernel(*args)

    return call


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is its values alone: no subclass, no fake, conjugated, wrapped or batched tensor."""
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return type(tensor) in (Tensor, torch.nn.Parameter) and keys in _plain_keys(tensor.device.type)


@cache
def _plain_keys(device: str) -> frozenset[int]:
    """The dispatch keys of plain tensors, made in and out of inference mode; none that have no values."""
    if device == "meta":
        return frozenset()
    found = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


def signature_kept(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a Function's ``forward``, whose signature ``apply`` works out anew at every call."""
    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    return forward


@contextmanager
def tangents_of_tangents(*saved: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Inside a Function's jvp: its saved tensors without their tangents, and forward mode switched on.

    PyTorch calls a jvp with forward mode off, so that those tangents do not count twice; but then those of
    an outer :func:`torch.func.jvp` do not count at all, without a word.
    """
    plain = tuple(x if x is None else forward_ad.unpack_dual(x).primal for x in saved)
    with forward_ad._set_fwd_grad_enabled(True):
        yield plain


def batch_first(arg: Any, dim: Any, size: int) -> Any:
    """An argument of an operator with its batch dimension, of that size, in front."""
    if isinstance(arg, list):
        return [batch_first(*pair, size) for pair in zip(arg, dim, strict=True)]
    if isinstance(arg, Tensor):
        return arg.expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return arg


def _not_differentiable(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))


def _no_gradient(ctx: Any, *gradients: Any) -> None:
    raise NotImplementedError(
        "torch.ops.nmsolve.* are not differentiable; the functions of nmsolve that call them are, where a "
        "gradient is defined"
    )
