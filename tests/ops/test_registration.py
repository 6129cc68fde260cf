"""Every operator is registered the same way, and the compiler stays out where nobody asked for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import nmsolve.ops  # noqa: F401  registers the operators
from nmsolve.ops.plan_operators import _Sinkhorn, _SinkhornGradient
from nmsolve.ops.registration import shortcut

CALLS = """
import sys
import torch
import nmsolve

x, order = torch.rand(4, 8, 8), torch.arange(8).flip(0)
wanted = x.clone().requires_grad_()
nmsolve.transposable_mask(x, 2, 4, return_solution=True)
nmsolve.transposable_masks([x, x], 2, 4)
nmsolve.nm_mask(x, 2, 4)
nmsolve.assignment(x, return_solution=True)
nmsolve.sinkhorn(wanted).sum().backward()
nmsolve.permute_columns(wanted, order).sum().backward()
nmsolve.rms_norm_permute(wanted, torch.ones(8), order).sum().backward()
print(*[name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
"""


def test_first_calls_do_not_import_the_compiler():
    """It takes a second or two."""
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# The product of sparse training is a custom_op with a gradient of its own, there once its module is.
NOT_OF_OPS = ("name", "sparse24_product")
OPERATORS = [name for name in dir(torch.ops.nmsolve) if name[0] != "_" and name not in NOT_OF_OPS]


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_a_fake_implementation_and_tags(name):
    operator = getattr(torch.ops.nmsolve, name).default
    assert torch.Tag.pt2_compliant_tag in operator.tags
    assert torch.Tag.flexible_layout in operator.tags
    assert torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeExplicitAutograd")
    assert torch._library.simple_registry.singleton.find(operator.name()).fake_impl.kernel is not None


def test_a_bare_operator_is_not_silently_constant():
    """The functions of nmsolve have gradients; differentiating the operator inside them raises."""
    x = torch.rand(2, 4, 4, requires_grad=True)
    moved = torch.ops.nmsolve.permute_columns(x, torch.arange(4).flip(0), False, "torch")
    with pytest.raises(NotImplementedError, match="are not differentiable"):
        moved.sum().backward()


class Named(torch.Tensor):
    """More than its values."""


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_kernel_runs_without_its_operator_only_where_nobody_looks_on():
    called = []
    both = shortcut(lambda x, _: called.append("operator") or x, lambda x, _: called.append("kernel") or x)

    def how(x: torch.Tensor) -> str:
        both(x, "a setting")
        return called.pop()

    x = torch.rand(2, 3)
    assert how(x) == how(x.t()) == how(x.clone().requires_grad_()) == how(torch.nn.Parameter(x)) == "kernel"
    with torch.inference_mode():
        assert how(torch.rand(3)) == how(x) == "kernel"
    assert how(torch.complex(x, x).conj()) == "operator"
    assert how(x.as_subclass(Named)) == "operator"
    assert how(torch.empty(2, device="meta")) == "operator"
    with Seen():
        assert how(x) == "operator"
    with FakeTensorMode() as mode:
        assert how(x) == "operator"
    assert how(mode.from_tensor(x)) == "operator"
    with torch.autograd.profiler.profile():
        assert how(x) == "operator"
    torch.func.vmap(lambda row: both(row, "a setting"))(x)
    torch.func.grad(lambda x: both(x, "a setting").sum())(x)
    torch._vmap_internals._vmap(lambda row: both(row, "a setting"))(x)
    torch.jit.trace(lambda x: both(x, "a setting"), x, check_trace=False)
    assert called == ["operator"] * 4


def test_the_signature_that_a_function_keeps_is_its_own():
    for function in (_Sinkhorn, _SinkhornGradient):
        names = list(function.forward.__signature__.parameters)
        assert names == list(function.forward.__code__.co_varnames[: function.forward.__code__.co_argcount])
