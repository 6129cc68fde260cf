"""Sinkhorn: every backend against float64 NumPy, the gradient against finite differences and autograd."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import nmsolve
from nmsolve import sinkhorn
from nmsolve.backends.dispatch import select

BACKENDS = ("torch", "cpu", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request):
    package = {"cpu": "numba", "triton": "triton"}.get(request.param)
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return request.param


def by_numpy(logits, temperature, iterations, a, b):
    """The textbook iteration in float64: plan (R, C) of one block."""
    k = np.asarray(logits, np.float64) / temperature
    g = np.zeros(k.shape[1])
    for _ in range(iterations):
        f = np.log(a) - np.logaddexp.reduce(k + g, axis=1)
        g = np.log(b) - np.logaddexp.reduce(k + f[:, None], axis=0)
    return np.exp(k + f[:, None] + g)


def autograd_loop(logits, temperature, iterations):
    """The same through PyTorch's graph, marginals 1 and R / C."""
    k = logits / temperature
    rows, cols = k.shape[-2:]
    g = torch.zeros_like(k[..., :1, :])
    for _ in range(iterations):
        f = -(k + g).logsumexp(-1, keepdim=True)
        g = np.log(rows / cols) - (k + f).logsumexp(-2, keepdim=True)
    return (k + f + g).exp()


def marginals(batch, rows, cols, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(batch, rows, generator=generator) + 0.1
    b = torch.rand(batch, cols, generator=generator) + 0.1
    return a, b * (a.sum(1, keepdim=True) / b.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (4, 4), (5, 3), (3, 7), (16, 16), (33, 20), (64, 64), (1, 9)]
)
def test_plans_of_uniform_marginals(backend, rows, cols):
    logits = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(1))
    plan = sinkhorn(logits, 0.3, 8, backend=backend)
    for block, out in zip(logits.numpy(), plan, strict=True):
        expected = by_numpy(block, 0.3, 8, np.ones(rows), np.full(cols, rows / cols))
        assert np.abs(out.numpy() - expected).max() < 2e-6
    assert (plan.sum(1) - rows / cols).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(2, 128, 128), (2, 8, 128), (2, 100, 70)])
def test_large_tiles(backend, shape):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    plan = sinkhorn(logits, 0.5, 3, backend=backend)
    reference = sinkhorn(logits.double(), 0.5, 3, backend="torch")
    assert (plan - reference).abs().max() < 2e-6


def test_given_marginals(backend):
    logits = torch.randn(5, 6, 9, generator=torch.Generator().manual_seed(3))
    a, b = marginals(5, 6, 9)
    plan = sinkhorn(logits, 0.4, 60, row_marginals=a, col_marginals=b, backend=backend)
    for k in range(5):
        expected = by_numpy(logits[k], 0.4, 60, a[k].double().numpy(), b[k].double().numpy())
        assert np.abs(plan[k].numpy() - expected).max() < 2e-6
    assert (plan.sum(1) - b).abs().max() < 2e-6
    assert (plan.sum(2) - a).abs().max() < 1e-3

    one = sinkhorn(logits, 0.4, 60, row_marginals=a[0], backend=backend)
    assert (one.sum(1) - a[0].sum() / 9).abs().max() < 1e-5
    one = sinkhorn(logits, 0.4, 60, col_marginals=b[:1], backend=backend)
    assert (one.sum(1) - b[0]).abs().max() < 1e-5
    assert (one.sum(2) - b[0].sum() / 6).abs().max() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_strides_and_leading_dimensions(backend, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("works in float32")
    logits = torch.randn(2, 7, 3, 6, generator=torch.Generator().manual_seed(4)).to(dtype)
    logits = logits.permute(2, 0, 3, 1)[..., ::2]  # (3, 2, 6, 4) with mixed strides
    plan = sinkhorn(logits, 0.5, 5, backend=backend)
    assert plan.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert plan.shape == logits.shape
    expected = autograd_loop(logits.double(), 0.5, 5)
    assert (plan - expected).abs().max() < 1e-6

    source = logits.detach().clone().requires_grad_(True)
    sinkhorn(source, 0.5, 5, backend=backend).square().sum().backward()
    wide = logits.detach().double().requires_grad_(True)
    autograd_loop(wide, 0.5, 5).square().sum().backward()
    assert source.grad.dtype == dtype
    assert (source.grad - wide.grad).abs().max() < 4 * torch.finfo(dtype).eps + 2e-6


def test_extreme_logits_keep_the_marginals(backend):
    """Offsets on rows and columns change nothing, a dominant permutation comes out, nothing overflows."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(4, 16, 16, generator=generator)
    offsets = 2e4 * torch.rand(4, 16, 1, generator=generator) - 1e4
    across = 2e4 * torch.rand(4, 1, 16, generator=generator) - 1e4
    plan = sinkhorn(noise + offsets + across, 1.0, 40, backend=backend)
    assert (plan.sum(1) - 1).abs().max() < 1e-5
    assert (plan.sum(2) - 1).abs().max() < 1e-4

    order = torch.randperm(16, generator=generator)
    dominant = torch.full((1, 16, 16), -1e4)
    dominant[0, torch.arange(16), order] = 1e4
    assert torch.equal(sinkhorn(dominant, 0.1, 5, backend=backend)[0].argmax(1), order)

    wild = (2e4 * torch.rand(8, 16, 16, generator=generator) - 1e4).requires_grad_(True)
    plan = sinkhorn(wild, 0.1, 30, backend=backend)
    assert torch.isfinite(plan).all()
    assert (plan.sum(1) - 1).abs().max() < 1e-5
    plan.square().sum().backward()
    assert torch.isfinite(wild.grad).all()


def test_sharpens_to_the_assignment(backend):
    scores = torch.rand(4, 12, 12, generator=torch.Generator().manual_seed(6))
    plan = sinkhorn(scores, 0.01, 200, tolerance=1e-3, backend=backend)
    assert (plan.sum(2) - 1).abs().max() < 1e-2
    assert torch.equal(nmsolve.assignment(plan, backend="torch"), nmsolve.assignment(scores, backend="torch"))


def test_tolerance_stops_each_block_by_itself(backend):
    logits = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(7))
    logits[::2] *= 0.01
    together = sinkhorn(logits, 0.2, 150, tolerance=1e-3, backend=backend)
    assert (together.sum(2) - 1).abs().max() < 1.1e-3
    assert (together.sum(1) - 1).abs().max() < 1e-5
    for k in range(6):
        alone = sinkhorn(logits[k : k + 1], 0.2, 150, tolerance=1e-3, backend=backend)
        assert torch.equal(alone[0], together[k])
    runner = select(backend, logits.device).permutations
    ones = torch.ones(6, 8)
    made = runner.sinkhorn_forward(logits, ones, ones, 0.2, 150, 1e-3, True)[3][:, 0]
    assert made[::2].max() <= 3 < made[1::2].min() <= made.max() < 150
    assert torch.equal(
        made,
        select("torch", logits.device).permutations.sinkhorn_forward(
            logits, ones, ones, 0.2, 150, 1e-3, True
        )[3][:, 0],
    )


def test_same_bits_in_any_batch_and_on_any_number_of_threads(backend):
    logits = 30 * torch.randn(40, 7, 7, generator=torch.Generator().manual_seed(8))
    whole = sinkhorn(logits, 0.3, 12, backend=backend)
    assert torch.equal(sinkhorn(logits[5:8], 0.3, 12, backend=backend), whole[5:8])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(sinkhorn(logits, 0.3, 12, backend=backend), whole)
    finally:
        torch.set_num_threads(threads)


def test_same_bits_in_shares(monkeypatch):
    pytest.importorskip("numba")
    logits = torch.randn(9, 20, 13, generator=torch.Generator().manual_seed(27))

    def both():
        source = logits.clone().requires_grad_(True)
        plan = sinkhorn(source, 0.1, 12, backend="cpu")
        plan.square().sum().backward()
        return plan.detach(), source.grad

    together = both()
    monkeypatch.setattr("nmsolve.backends.cpu.permutations._ALONE", 0)
    monkeypatch.setattr("nmsolve.backends.cpu._numba.threads._SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for apart, expected in zip(both(), together, strict=True):
        assert torch.equal(apart, expected)


def test_a_bad_block_does_not_spoil_its_neighbours(backend):
    logits = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(9))
    logits[1, 2, 3] = float("nan")
    plan = sinkhorn(logits, 0.3, 6, tolerance=1e-6, backend=backend)
    assert plan[1].isnan().all()
    good = sinkhorn(logits[::2], 0.3, 6, tolerance=1e-6, backend=backend)
    assert torch.equal(plan[::2], good)


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (3, 5), (5, 2)])
def test_gradcheck(name, rows, cols):
    generator = torch.Generator().manual_seed(10)
    logits = torch.randn(2, rows, cols, dtype=torch.float64, generator=generator, requires_grad=True)
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    a, b = (m.double() for m in marginals(2, rows, cols))
    b = b * (a.sum(1, keepdim=True) / b.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(lambda x, t: sinkhorn(x, t, 4, backend=name), (logits, temperature))
    assert torch.autograd.gradcheck(
        lambda x: sinkhorn(x, 0.4, 4, row_marginals=a, col_marginals=b, backend=name), (logits,)
    )
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 0.5, 9, tolerance=1e-2, backend=name), (logits,))


@pytest.mark.parametrize(
    ("shape", "temperature", "iterations"),
    [
        ((3, 8, 8), 0.1, 20),
        ((2, 64, 64), 0.05, 8),
        ((5, 10, 6), 0.02, 30),
        ((1, 128, 128), 0.2, 3),
        ((2, 5, 5), 9.0, 1),
    ],
)
def test_gradient_against_autograd(backend, shape, temperature, iterations):
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(shape, generator=generator)
    weight = torch.randn(shape, generator=generator)
    ours = logits.clone().requires_grad_(True)
    (sinkhorn(ours, temperature, iterations, backend=backend) * weight).sum().backward()
    theirs = logits.double().requires_grad_(True)
    (autograd_loop(theirs, temperature, iterations) * weight).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() < 2e-5 * (1 + theirs.grad.abs().max())


def test_gradient_of_blocks_that_stopped_at_different_iterations(backend):
    """The sweep of each block starts at its own last iteration."""
    logits = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(12))
    logits[::2] *= 0.05
    together = logits.clone().requires_grad_(True)
    sinkhorn(together, 0.3, 60, tolerance=1e-3, backend=backend).square().sum().backward()
    for k in range(5):
        alone = logits[k : k + 1].clone().requires_grad_(True)
        sinkhorn(alone, 0.3, 60, tolerance=1e-3, backend=backend).square().sum().backward()
        assert torch.allclose(alone.grad[0], together.grad[k], atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "spread"), [((3, 9, 33), 8), ((2, 64, 64), 5), ((4, 7, 5), 40), ((2, 1, 9), 5)]
)
def test_gradient_where_references_change(shape, spread):
    """Iterations in the log domain, the first one too, among the others, and blocks that stop early."""
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(23)
    logits = spread * torch.randn(shape, dtype=torch.float64, generator=generator)
    pull = torch.randn(shape, dtype=torch.float64, generator=generator)
    for tolerance in (None, 0.05):
        found = []
        for name in ("torch", "cpu"):
            source = logits.clone().requires_grad_(True)
            plan = sinkhorn(source, 0.1, 30, tolerance=tolerance, backend=name)
            plan.backward(pull)
            found += [plan.detach(), source.grad]
        assert (found[2] - found[0]).abs().max() < 1e-11
        assert (found[3] - found[1]).abs().max() < 1e-11 * (1 + found[1].abs().max())
    solver = select("cpu", logits.device).permutations
    changes = solver.sinkhorn_forward(logits, None, None, 0.1, 30, -1.0, True)[3][:, 1:]
    assert changes.sum() >= 2


def test_what_is_kept_is_read_in_any_layout():
    pytest.importorskip("numba")
    solver = select("cpu", torch.device("cpu")).permutations
    logits, pull = (torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(seed)) for seed in (24, 25))
    _, *kept = solver.sinkhorn_forward(logits, None, None, 0.1, 4, -1.0, True)
    expected = solver.sinkhorn_backward(pull, logits, None, None, *kept, 0.1)
    inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (pull, logits, *kept)]
    assert not any(x.is_contiguous() for x in inputs)
    assert torch.equal(solver.sinkhorn_backward(*inputs[:2], None, None, *inputs[2:], 0.1), expected)
    assert torch.equal(solver.sinkhorn_backward(pull.double(), logits, None, None, *kept, 0.1), expected)


def test_marginals_that_are_given_and_the_same_by_default(backend):
    logits = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(26))
    a, b = torch.ones(6), torch.full((9,), 6 / 9)
    plan = sinkhorn(logits, 0.2, 7, backend=backend)
    assert torch.equal(sinkhorn(logits, 0.2, 7, row_marginals=a, col_marginals=b, backend=backend), plan)


def test_gradient_of_an_expanded_sum(backend):
    """The incoming gradient may have stride 0; that of a sum is zero, since the sum is a constant."""
    logits = torch.randn(2, 5, 5, requires_grad=True)
    sinkhorn(logits, 0.3, 5, backend=backend).sum().backward()
    assert logits.grad.abs().max() < 1e-5


def test_memory_between_forward_and_backward_grows_with_lines_not_entries():
    logits = torch.randn(2, 32, 32, requires_grad=True)
    plan = sinkhorn(logits, 0.1, 50, backend="torch")
    saved = [t for t in plan.grad_fn.saved_tensors if t is not None]
    extra = sum(t.numel() for t in saved) - logits.numel()
    assert extra == 2 * 50 * (32 + 32 + 1) + 2


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_compiles_in_one_graph(name):
    logits = torch.randn(2, 8, 8)
    ours, compiled = (logits.clone().requires_grad_(True) for _ in range(2))

    def loss(x):
        return sinkhorn(x, 0.2, 5, backend=name).square().sum()

    loss(ours).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(ours.grad, compiled.grad)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(0.01, 5),
    st.integers(1, 12),
    st.floats(0, 300),
    st.integers(0, 99),
)
@example(1, 2, 1.0, 1, 32.0, 0)  # a column that is 0 in float32 beside the rows' largest
def test_properties(rows, cols, temperature, iterations, spread, seed):
    logits = spread * torch.randn(2, rows, cols, generator=torch.Generator().manual_seed(seed))
    plan = sinkhorn(logits, temperature, iterations, backend="cpu")
    assert (plan >= 0).all()
    assert (plan.sum(1) - rows / cols).abs().max() < 1e-5 * max(1, rows / cols)
    shifted = sinkhorn(
        logits.double() + 7 * torch.arange(rows).unsqueeze(1), temperature, iterations, backend="cpu"
    )
    plain = sinkhorn(logits.double(), temperature, iterations, backend="torch")
    assert (shifted - plain).abs().max() < 1e-9


# --- logits of -inf -----------------------------------------------------------------------------------------

INF = float("inf")


def by_scaling(logits, temperature, iterations):
    """Scaling ``exp(logits / temperature)`` itself, in float64; a line that sums to 0 is left as it is."""
    kernel = (logits.double() / temperature).exp()
    rows, cols = kernel.shape[-2:]
    v = torch.ones_like(kernel[..., :1, :])
    for _ in range(iterations):
        held = (kernel * v).sum(-1, keepdim=True)
        u = torch.where(held > 0, 1 / held.where(held > 0, 1), 1)
        held = (kernel * u).sum(-2, keepdim=True)
        v = torch.where(held > 0, rows / cols / held.where(held > 0, 1), 1)
    return kernel * u * v


def with_holes(shape, share, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return logits.masked_fill(torch.rand(shape, generator=generator) < share, -INF)


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((3, 1, 1), 0.5),
        ((6, 4, 4), 0.3),
        ((6, 3, 7), 0.6),
        ((4, 9, 5), 0.8),
        ((2, 32, 32), 0.9),
        ((2, 3, 3), 1),
    ],
)
def test_minus_infinity_is_never(backend, shape, share):
    """Zeros in the plan and the gradient; the others are what the textbook makes of them."""
    logits = with_holes(shape, share, 13)
    never = logits.isneginf()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(14))
    wide = logits.double().requires_grad_(True)
    expected = by_scaling(wide, 0.5, 7)
    (expected * weight).sum().backward()
    for tolerance in (None, 0.0):
        ours = logits.clone().requires_grad_(True)
        plan = sinkhorn(ours, 0.5, 7, tolerance=tolerance, backend=backend)
        assert (plan[never] == 0).all()
        assert (plan - expected).abs().max() < 3e-6
        assert torch.equal(sinkhorn(logits, 0.5, 7, tolerance=tolerance, backend=backend), plan.detach())
        (plan * weight).sum().backward()
        assert (ours.grad[never] == 0).all()
        assert (ours.grad - wide.grad.nan_to_num()).abs().max() < 1e-5


def test_only_one_way_through(backend):
    """One permutation is allowed: it is the plan, whatever its logits are, after enough iterations."""
    generator = torch.Generator().manual_seed(15)
    order = torch.randperm(12, generator=generator)
    logits = torch.full((1, 12, 12), -INF)
    logits[0, torch.arange(12), order] = 1e4 * torch.randn(12, generator=generator)
    plan = sinkhorn(logits, 0.1, 3, backend=backend)
    assert torch.equal(plan[0] > 0, torch.eye(12)[order] > 0)
    assert (plan.sum(2) - 1).abs().max() < 1e-5
    # Upper triangle: what is above the diagonal dwindles like 1 / iterations, and no sum is missed.
    triangle = torch.zeros(5, 5).masked_fill(torch.ones(5, 5).tril(-1) > 0, -INF)
    plan = sinkhorn(triangle, 1.0, 3000, backend="cpu" if backend == "triton" else backend)
    assert (plan - torch.eye(5)).abs().max() < 5e-3


def test_lines_that_may_hold_nothing(backend):
    """Zeros there, and the other lines as if it did not exist; its neighbours in the batch do not notice."""
    logits = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(16))
    logits[1, 2] = -INF
    logits[1, :, 3] = -INF
    plan = sinkhorn(logits, 0.5, 40, backend=backend)
    assert (plan[1, 2] == 0).all()
    assert (plan[1, :, 3] == 0).all()
    rest = torch.tensor([0, 1, 3, 4])
    smaller = logits[1:2, rest][:, :, torch.tensor([0, 1, 2, 4])]
    alone = sinkhorn(smaller, 0.5, 40, backend=backend)
    assert (plan[1, rest][:, [0, 1, 2, 4]] - alone[0]).abs().max() < 1e-6
    assert torch.equal(plan[::2], sinkhorn(logits[::2], 0.5, 40, backend=backend))


@pytest.mark.parametrize("value", [INF, float("nan")])
def test_plus_infinity_and_nan_spoil_their_block_alone(backend, value):
    """Also beside -inf, in one iteration, and in the gradient."""
    logits = with_holes((4, 4, 4), 0.5, 17)
    logits[1] = -INF
    logits[1, 2, 3] = value
    logits[2, 0, 1] = value
    for iterations in (1, 6):
        ours = logits.clone().requires_grad_(True)
        plan = sinkhorn(ours, 0.3, iterations, tolerance=1e-6, backend=backend)
        assert plan[1:3].isnan().all()
        assert torch.isfinite(plan[::3]).all()
        plan.square().sum().backward()
        assert ours.grad[1:3].isnan().all()
        assert torch.isfinite(ours.grad[::3]).all()


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_derivatives_beside_minus_infinity(name):
    """First and second order in both modes with respect to finite logits and the temperature."""
    logits = with_holes((3, 2, 3), 0.3, 18, torch.float64)
    logits[1, 0] = -INF
    logits[2, :, 1] = -INF
    finite = logits.isfinite()
    assert not finite.all(2).all()
    temperature = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    values = logits.masked_fill(~finite, 0).requires_grad_(True)

    def plan(values, temperature):
        return sinkhorn(values.masked_fill(~finite, -INF), temperature, 3, backend=name)

    arguments = (values, temperature)
    assert torch.autograd.gradcheck(plan, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(plan, arguments, check_fwd_over_rev=True)

    def textbook(values, temperature):
        return by_scaling(values.masked_fill(~finite, -INF), temperature, 3)

    hessians = [
        torch.func.hessian(lambda v, f=f: f(v, 0.6).pow(3).sum())(values.detach()) for f in (plan, textbook)
    ]
    torch.testing.assert_close(*hessians, rtol=1e-9, atol=1e-11)
    whole = logits.clone().requires_grad_(True)
    (first,) = torch.autograd.grad(
        sinkhorn(whole, 0.6, 3, backend=name).pow(3).sum(), whole, create_graph=True
    )
    (second,) = torch.autograd.grad(first.square().sum(), whole)
    for gradient in (first, second):
        assert torch.isfinite(gradient).all()
        assert (gradient[~finite] == 0).all()


# --- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (2, 4, 0)])
def test_empty(shape):
    logits = torch.zeros(shape, requires_grad=True)
    plan = sinkhorn(logits)
    assert plan.shape == shape
    plan.sum().backward()
    assert logits.grad.shape == shape


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X.int(),), "logits: expected dtype"),
        ((torch.zeros(3),), "logits: expected"),
        ((X, 0.0), "temperature: expected a positive"),
        ((X, -1), "temperature: expected a positive"),
        ((X, torch.tensor(-1.0)), "temperature: expected a positive"),
        ((X, torch.ones(2)), "temperature: expected a real tensor of one element"),
        ((X, "1"), "temperature: expected a number"),
        ((X, 0.1, 0), "iterations: expected an integer of at least 1, got 0"),
        ((X, 0.1, 2.5), "iterations: expected an integer"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        sinkhorn(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance: expected"),
        ({"backend": "cuda"}, "backend: expected"),
        ({"row_marginals": torch.ones(4)}, "row_marginals: expected .* 3 lines"),
        ({"col_marginals": torch.ones(5, 4)}, "col_marginals: expected"),
        ({"col_marginals": torch.ones(4).int()}, "col_marginals: expected a real tensor"),
        ({"row_marginals": torch.tensor([1.0, 0.0, 1.0])}, "row_marginals: expected positive"),
        (
            {"row_marginals": torch.ones(3), "col_marginals": torch.ones(4)},
            "col_marginals: expected the total",
        ),
        ({"row_marginals": torch.ones(3, requires_grad=True)}, "row_marginals: constants"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        sinkhorn(X, **options)


def test_triton_refuses_what_it_cannot_hold():
    pytest.importorskip("triton")
    with pytest.raises(nmsolve.BackendError, match="up to 128"):
        sinkhorn(torch.zeros(1, 129, 4), backend="triton")
    with pytest.raises(nmsolve.BackendError, match="float32"):
        sinkhorn(torch.zeros(1, 4, 4, dtype=torch.float64), backend="triton")


@pytest.mark.parametrize("m", [5, 16])
def test_blocks_that_need_new_references_are_as_they_are_alone(backend, m):
    """Neighbours with other ranges, in one launch; bit for bit."""
    logits = torch.randn(6, m, m, generator=torch.Generator().manual_seed(21))
    logits *= torch.tensor([0.01, 40.0, 1.0, 400.0, 3.0, 100.0]).view(-1, 1, 1)
    pull = torch.randn(6, m, m, generator=torch.Generator().manual_seed(22))

    def both(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        source = x.clone().requires_grad_(True)
        plan = sinkhorn(source, 1.0, 25, backend=backend)
        (plan * weight).sum().backward()
        return plan.detach(), source.grad

    plans, gradients = both(logits, pull)
    wide = logits.double().requires_grad_(True)
    expected = autograd_loop(wide, 1.0, 25)
    (expected * pull).sum().backward()
    assert (plans - expected).abs().max() < 2e-4
    assert (gradients - wide.grad).abs().max() < 2e-3 * (1 + wide.grad.abs().max())
    for k in range(6):
        plan, gradient = both(logits[k : k + 1], pull[k : k + 1])
        assert torch.equal(plan[0], plans[k])
        assert torch.equal(gradient[0], gradients[k])
