"""Sinkhorn's kernels under the interpreter: references, quiet iterations, spans, neighbours."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nmsolve.backends.torch import permutations as reference

gpu = pytest.importorskip("nmsolve.backends.triton.permutations")


def problem(batch: int, rows: int, cols: int, scale: float, seed: int) -> tuple[Tensor, ...]:
    """Logits with entries and lines of -inf, marginals, a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, rows, cols, generator=generator)
    logits[torch.rand(batch, rows, cols, generator=generator) < 0.1] = -torch.inf
    if rows > 2 and cols > 2:
        logits[0, 1], logits[-1, :, 2] = -torch.inf, -torch.inf
    a = torch.rand(batch, rows, generator=generator) + 0.1
    b = torch.rand(batch, cols, generator=generator) + 0.1
    pull = torch.randn(batch, rows, cols, generator=generator)
    return logits, a, b * (a.sum(1) / b.sum(1))[:, None], pull


def solve(solver, logits, a, b, pull, iterations: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Plan, iterations made and gradient at temperature 0.1."""
    plan, f, g, made = solver.sinkhorn_forward(logits, a, b, 0.1, iterations, tolerance, True)
    return plan, made[:, 0], solver.sinkhorn_backward(pull, logits, a, b, f, g, made, 0.1)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from([0.01, 1.0, 10.0, 100.0, 1000.0]),
    st.integers(1, 60),
    st.sampled_from([-1.0, 1e-2]),
    st.integers(0, 1 << 30),
)
def test_plans_and_gradients_of_any_logits(batch, rows, cols, scale, iterations, tolerance, seed) -> None:
    """Plans to what float32 makes of logits so large, gradients to that of the reference in float32."""
    inputs = problem(batch, rows, cols, scale, seed)
    plan, made, gradient = solve(gpu, *inputs, iterations, tolerance)
    exact = solve(reference, *(x.double() for x in inputs), iterations, tolerance)
    rough = solve(reference, *inputs, iterations, tolerance)
    if not torch.equal(made, exact[1].to(made.dtype)):  # a row sum that is at the tolerance, up to rounding
        assert tolerance > 0
        return
    rounding = torch.finfo(torch.float32).eps * 10 * scale * 60
    assert (plan - exact[0]).abs().max() < 1e-5 + rounding
    error, theirs = ((x.double() - exact[2]).abs().max() for x in (gradient, rough[2]))
    assert error < 1e-4 + 10 * rounding + 3 * theirs


@pytest.mark.parametrize("m", [3, 8, 16, 29, 32])
@pytest.mark.parametrize("tolerance", [-1.0, 1e-3])
def test_blocks_do_not_depend_on_their_neighbours(m: int, tolerance: float) -> None:
    """Bit for bit, though others of the same program start anew at other times."""
    logits, a, b, pull = problem(9, m, m, 1.0, seed=m)
    logits *= torch.tensor([0.01, 1, 100, 3000, 0.1, 10, 30, 300, 1])[:, None, None]
    logits[4, 0, 0] = torch.nan
    together = solve(gpu, logits, a, b, pull, 50, tolerance)
    for k in range(9):
        alone = solve(gpu, *(x[k : k + 1] for x in (logits, a, b, pull)), 50, tolerance)
        for one, of_all in zip(alone, together, strict=True):
            assert torch.equal(one.nan_to_num(7.0), of_all[k : k + 1].nan_to_num(7.0))
    assert together[0][4].isnan().any()
    assert not together[0][[0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("m", [8, 32])
def test_marginals_of_any_size(m: int) -> None:
    """From 1 down to 1e-30, beside lines of nothing as well; every sum to its own rounding."""
    generator = torch.Generator().manual_seed(m)
    logits = torch.randn(3, m, m, generator=generator)
    logits[1, 2], logits[1, :, 3] = -torch.inf, -torch.inf
    a, b = (10 ** (-30 * torch.rand(3, m, generator=generator)) for _ in "ab")
    a[:, 0], b[:, 0] = 1, 1
    b *= (a.sum(1) / b.sum(1))[:, None]
    plan, *_ = gpu.sinkhorn_forward(logits, a, b, 1.0, 30, -1.0, False)
    wide = (logits.double(), a.double(), b.double())
    expected, *_ = reference.sinkhorn_forward(*wide, 1.0, 30, -1.0, False)
    large = expected > 1e-37
    assert ((plan - expected)[large].abs() < 2e-5 * expected[large]).all()
    held = plan.double().sum(1) / b - 1
    held[1, 3] += 1
    assert held.abs().max() < 1e-6


@pytest.mark.parametrize(("scale", "least"), [(1.0, 1), (1000.0, 5)])
def test_spans_start_where_the_iteration_was_made_in_the_log_domain(scale: float, least: int) -> None:
    """The kept factors are in range, and each span's first iteration has its scalings."""
    logits, a, b, _ = problem(4, 16, 16, scale, seed=1)
    _, f, g, made = gpu.sinkhorn_forward(logits, a, b, 0.1, 40, -1.0, True)
    assert made[:, 0].tolist() == [40] * 4
    spans = []
    for block in range(4):
        last, starts = 39, []
        while last >= 0:
            start = int(made[block, 1 + last])
            assert 0 <= start <= last
            quiet = slice(start + 1, last + 1)
            inside = torch.cat([f[block, quiet].flatten(), g[block, quiet].flatten()])
            assert ((inside > 2.0**-30) & (inside < 2.0**30)).all()
            starts.append(start)
            last = start - 1
        assert not g[block, 0].any()  # the first starts from scalings of 1
        spans.append(len(starts))
    assert max(spans) >= least
