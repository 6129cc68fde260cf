"""Derivatives of every function that has any: of first and second order, in reverse and in forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import nmsolve
from nmsolve.ops.columns import permute_columns, rms_norm_permute

ORDER = torch.tensor([2, 0, 3, 1])
ROWS = torch.tensor([[0.5, 1.0, 1.5], [1.0, 1.0, 1.0]], dtype=torch.float64)
EPS = 0.1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_sinkhorn(x: Tensor, iterations: int, temperature: Tensor | float = 0.4) -> Tensor:
    """Through PyTorch's own graph."""
    k = x / temperature
    g = torch.zeros_like(k[..., :1, :])
    for _ in range(iterations):
        f = -(k + g).logsumexp(-1, keepdim=True)
        g = math.log(x.shape[-2] / x.shape[-1]) - (k + f).logsumexp(-2, keepdim=True)
    return (k + f + g).exp()


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight)[..., ORDER]


# name: the function for a backend, the same in plain PyTorch where that is simple, inputs
CASES: dict[str, tuple[Callable, Callable | None, tuple[Tensor, ...]]] = {
    "sinkhorn": (
        lambda backend: lambda x: nmsolve.sinkhorn(x, 0.4, 3, backend=backend),
        lambda x: plain_sinkhorn(x, 3),
        (normal(2, 3, 4),),
    ),
    "sinkhorn, temperature": (
        lambda backend: lambda x, t: nmsolve.sinkhorn(x, t, 2, backend=backend),
        lambda x, t: plain_sinkhorn(x, 2, t),
        (normal(2, 3, 3), torch.tensor(0.6, dtype=torch.float64)),
    ),
    "sinkhorn, marginals": (
        lambda backend: lambda x: nmsolve.sinkhorn(x, 0.5, 3, row_marginals=ROWS, backend=backend),
        None,
        (normal(2, 3, 3, seed=1),),
    ),
    "sinkhorn, tolerance": (
        lambda backend: lambda x: nmsolve.sinkhorn(x, 0.5, 9, tolerance=1e-2, backend=backend),
        None,
        (normal(2, 3, 3, seed=2) * torch.tensor([0.1, 1.0]).view(2, 1, 1),),
    ),
    "permute_columns": (
        lambda backend: lambda x: permute_columns(x, ORDER, backend=backend),
        lambda x: x[..., ORDER],
        (normal(2, 4),),
    ),
    "rms_norm_permute": (
        lambda backend: lambda x, w: rms_norm_permute(x, w, ORDER, EPS, backend=backend),
        plain_norm,
        (normal(2, 4), normal(4, seed=3)),
    ),
}
WITH_PLAIN = [name for name, (_, plain, _) in CASES.items() if plain is not None]


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba")
    return request.param


@pytest.mark.parametrize("name", CASES)
def test_against_finite_differences(name: str, backend: str) -> None:
    make, _, inputs = CASES[name]
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    function = make(backend)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("name", WITH_PLAIN)
def test_transforms(name: str, backend: str) -> None:
    """grad, jvp, both Jacobians and every nesting of two, against PyTorch's own derivatives."""
    make, plain, inputs = CASES[name]
    function, every = make(backend), tuple(range(len(inputs)))
    directions = tuple(normal(*x.shape, seed=7 + k) for k, x in enumerate(inputs))

    def value(f: Callable) -> Callable:
        return lambda *x: f(*x).pow(3).sum()

    def along(f: Callable) -> Callable:
        return lambda *x: torch.func.jvp(f, x, directions)[1]

    for transform in (
        lambda f: torch.func.grad(value(f), every),
        lambda f: along(f),
        lambda f: torch.func.jacrev(f, every),
        lambda f: torch.func.jacfwd(f, every),
        lambda f: torch.func.hessian(value(f), every),
        lambda f: torch.func.jacrev(torch.func.jacrev(value(f), every), every),
        lambda f: torch.func.jacfwd(torch.func.jacfwd(value(f), every), every),
        lambda f: torch.func.grad(lambda *x: along(f)(*x).square().sum(), every),
        lambda f: along(along(f)),
        lambda f: torch.func.grad(lambda *x: along(along(f))(*x).square().sum(), every),
    ):
        found, expected = transform(function)(*inputs), transform(plain)(*inputs)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", WITH_PLAIN)
def test_over_batches(name: str, backend: str) -> None:
    make, plain, inputs = CASES[name]
    function = make(backend)
    stacked = tuple(torch.stack([x, x + 0.1, x + 0.3], 1 if x.ndim else 0) for x in inputs)

    def loss(f: Callable) -> Callable:
        return torch.func.grad(lambda *x: f(*x).square().sum(), tuple(range(len(inputs))))

    for batched in {(True,) * len(inputs), (True, *[False] * (len(inputs) - 1))}:
        dims = tuple((1 if x.ndim else 0) if b else None for x, b in zip(inputs, batched, strict=True))
        given = tuple(s if b else x for s, x, b in zip(stacked, inputs, batched, strict=True))
        if len(inputs) > 1 and all(batched) and name == "sinkhorn, temperature":
            continue  # whether a temperature is positive cannot be asked of a batch
        for wrap in (lambda f: f, loss):
            found = torch.func.vmap(wrap(function), dims)(*given)
            torch.testing.assert_close(found, torch.func.vmap(wrap(plain), dims)(*given))


def test_a_batch_of_permutations() -> None:
    x, orders = normal(3, 2, 4), torch.stack([ORDER, ORDER.flip(0), torch.arange(4)])
    expected = torch.stack([a[:, p] for a, p in zip(x, orders, strict=True)])
    assert torch.equal(torch.vmap(permute_columns)(x, orders), expected)


def test_third_order(backend: str) -> None:
    x = normal(2, 3).requires_grad_()

    def third(f: Callable) -> Tensor:
        (first,) = torch.autograd.grad(f(x).pow(2).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), x)[0]

    found = third(lambda x: nmsolve.sinkhorn(x, 0.4, 3, backend=backend))
    torch.testing.assert_close(found, third(lambda x: plain_sinkhorn(x, 3)), rtol=1e-9, atol=1e-11)


def test_a_gradient_penalty_in_float32(backend: str) -> None:
    """What is trained with: the gradient of a norm of a gradient, whose incoming gradient needs none."""
    logits = normal(4, 8, 8).float().requires_grad_()
    wide = logits.detach().double().requires_grad_()
    for x, f in (
        (logits, lambda x: nmsolve.sinkhorn(x, 0.4, 10, backend=backend)),
        (wide, lambda x: plain_sinkhorn(x, 10)),
    ):
        (gradient,) = torch.autograd.grad(f(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert wide.grad.abs().max() > 1e-2
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)


def test_marginals_have_no_tangents() -> None:
    marginals = torch.ones(3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(marginals, torch.ones(3))
        with pytest.raises(nmsolve.NMSolveError, match="row_marginals: constants for the gradient"):
            nmsolve.sinkhorn(torch.zeros(1, 3, 3), row_marginals=dual, backend="torch")


def test_masks_are_constants() -> None:
    scores = normal(4, 4).abs().requires_grad_()
    solution = nmsolve.transposable_mask(scores, 2, 4, backend="torch", return_solution=True)
    for name in ("mask", "row_duals", "col_duals", "objective", "bound", "scale"):
        assert not getattr(solution, name).requires_grad
    found = torch.func.grad(
        lambda x: (x * nmsolve.transposable_mask(x, 2, 4, backend="torch")).square().sum()
    )(scores.detach())
    assert torch.equal(found, 2 * scores.detach() * solution.mask)


def bare_calls() -> dict[str, Callable[[Tensor], Tensor]]:
    """Operators that public functions differentiate by Functions around them, of ``(1, 4, 4)``."""
    op, order = torch.ops.nmsolve, ORDER
    plans = op.sinkhorn(normal(1, 4, 4), None, None, 0.5, 3, -1.0, "torch", True)
    return {
        "sinkhorn": lambda x: op.sinkhorn(x, None, None, 0.5, 3, -1.0, "torch", True)[0],
        "sinkhorn_backward": lambda x: op.sinkhorn_backward(x, x, None, None, *plans[1:], 0.5, "torch"),
        "permute_columns": lambda x: op.permute_columns(x, order, False, "torch"),
        "rms_norm_permute": lambda x: op.rms_norm_permute(x, x[0, 0], order, 0.1, "torch"),
    }


@pytest.mark.parametrize("name", ["sinkhorn", "sinkhorn_backward", "permute_columns", "rms_norm_permute"])
def test_bare_operators_say_that_they_have_no_gradient(name: str) -> None:
    call, x = bare_calls()[name], normal(1, 4, 4)
    with pytest.raises(NotImplementedError, match="are not differentiable"):
        call(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(NotImplementedError, match="are not differentiable"), forward_ad.dual_level():
        call(forward_ad.make_dual(x, x))
    for transform in (lambda f: torch.func.jvp(f, (x,), (x,)), lambda f: torch.func.jacfwd(f)(x)):
        with pytest.raises(NotImplementedError, match="are not differentiable"):
            transform(call)
    of_a_constant = torch.func.jvp(lambda y: call(x) * y.sum(), (x,), (x,))[1]
    torch.testing.assert_close(of_a_constant, call(x) * x.sum())
