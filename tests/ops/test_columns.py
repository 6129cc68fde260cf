"""permute_columns and rms_norm_permute: every backend against indexing and PyTorch's normalisation."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn.functional import rms_norm

import nmsolve
from nmsolve import permute_columns, rms_norm_permute
from nmsolve.ops import columns


@pytest.fixture(params=["torch", "cpu", "triton"])
def backend(request):
    if request.param != "torch":
        pytest.importorskip({"cpu": "numba", "triton": "triton"}[request.param])
    return request.param


def order(cols, seed=0):
    return torch.randperm(cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32])
@pytest.mark.parametrize("shape", [(5,), (1, 1), (3, 7), (2, 3, 600), (9, 1024)])
def test_columns(backend, dtype, shape):
    x = (10 * torch.randn(shape)).to(dtype)
    p = order(shape[-1])
    y = permute_columns(x, p, backend=backend)
    assert torch.equal(y, x[..., p])
    assert y.is_contiguous()
    assert torch.equal(permute_columns(y, p.argsort(), backend=backend), x)


def test_strides(backend):
    x = torch.randn(40, 6, 9)
    for view in (
        x.mT,
        x.permute(2, 1, 0),
        x[::3, :, ::2],
        x[:1].expand(4, 6, 9),
        x[..., :1].expand(40, 6, 9),
    ):
        p = order(view.shape[-1])
        assert torch.equal(permute_columns(view, p, backend=backend), view[..., p])
    strided = order(18)[::2].argsort().repeat_interleave(2)[::2]
    assert torch.equal(permute_columns(x, strided, backend=backend), x[..., strided])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 600), (4, 1024), (2, 1500), (6,)])
def test_norm(backend, dtype, shape):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("works in float32")
    x = (3 * torch.randn(shape)).to(dtype)
    weight = torch.randn(shape[-1:]).to(dtype)
    p = order(shape[-1])
    y = rms_norm_permute(x, weight, p, 1e-5, backend=backend)
    expected = rms_norm(x.double(), shape[-1:], weight.double(), 1e-5)[..., p]
    assert y.dtype == dtype
    assert torch.allclose(y.double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_norm_of_strided_rows(backend):
    x = torch.randn(20, 5, 3).mT
    p = order(5)
    weight = torch.randn(10)[::2]
    y = rms_norm_permute(x, weight, p, backend=backend)
    assert torch.allclose(y, rms_norm(x, (5,), weight, 1e-6)[..., p], atol=1e-6)


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_gradcheck(name):
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    p = order(5)
    assert torch.autograd.gradcheck(lambda x: permute_columns(x, p, backend=name), (x,))
    assert torch.autograd.gradgradcheck(lambda x: permute_columns(x, p, backend=name), (x,))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_permute(x, w, p, 0.1, backend=name), (x, weight))
    line = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm_permute(x, w, p, 0.1, backend=name), (line, weight))


def test_gradient(backend):
    x = torch.randn(4, 30)
    weight = torch.randn(30)
    p = order(30)
    pull = torch.randn(4, 30)
    ours, theirs = ([t.clone().requires_grad_(True) for t in (x, weight)] for _ in range(2))
    (rms_norm_permute(*ours, p, backend=backend) * pull).sum().backward()
    (rms_norm(theirs[0], (30,), theirs[1], 1e-6)[..., p] * pull).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)
    (permute_columns(ours[0], p, backend=backend).sum() * 2).backward()


def test_empty(backend):
    for shape in ((0, 4), (3, 0), (0, 0)):
        x, p = torch.zeros(shape), torch.arange(shape[-1])
        assert permute_columns(x, p, backend=backend).shape == shape
        assert rms_norm_permute(x, torch.zeros(shape[-1]), p, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("permutation", "message"),
    [
        (torch.tensor([0, 1]), "permutation: expected \\(3,\\) int64"),
        (torch.tensor([0, 1, 2]).int(), "permutation: expected"),
        ([0, 1, 2], "permutation: expected"),
        (torch.tensor([0, 1, 1]), "each of 0 .. 2 once; sorted, entry 2 is 1"),
        (torch.tensor([0, 1, 3]), "each of 0 .. 2 once; sorted, entry 2 is 3"),
        (torch.tensor([-1, 1, 2]), "each of 0 .. 2 once; sorted, entry 0 is -1"),
    ],
)
def test_refuses(permutation, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        permute_columns(torch.zeros(2, 3), permutation)
    with pytest.raises(nmsolve.NMSolveError, match=message):
        rms_norm_permute(torch.zeros(2, 3), torch.ones(3), permutation)


def test_refuses_other_arguments():
    x, p = torch.zeros(2, 3), torch.arange(3)
    for call, message in (
        (lambda: permute_columns(torch.tensor(1.0), p), "x: expected"),
        (lambda: permute_columns(x, p, backend="gpu"), "backend: expected"),
        (lambda: rms_norm_permute(x.int(), torch.ones(3), p), "x: expected a floating"),
        (lambda: rms_norm_permute(x, torch.ones(4), p), "weight: expected"),
        (lambda: rms_norm_permute(x, torch.ones(3), p, -1.0), "eps: expected"),
    ):
        with pytest.raises(nmsolve.NMSolveError, match=message):
            call()


def test_a_changed_permutation_is_checked_again():
    x, p = torch.arange(3.0).unsqueeze(0), torch.tensor([2, 0, 1])
    permute_columns(x, p)
    p[0] = 0
    with pytest.raises(nmsolve.NMSolveError, match="permutation"):
        permute_columns(x, p)
    p.copy_(torch.tensor([1, 0, 2]))
    assert permute_columns(x, p).tolist() == [[1, 0, 2]]
    with torch.inference_mode():
        assert permute_columns(x, torch.tensor([1, 0, 2])).tolist() == [[1, 0, 2]]


def test_checked_permutations_are_forgotten_with_their_tensors():
    gc.collect()
    before = len(columns._CHECKED)
    p = order(6)
    permute_columns(torch.zeros(1, 6), p)
    assert len(columns._CHECKED) == before + 1
    del p
    gc.collect()
    assert len(columns._CHECKED) == before


def test_compiles_in_one_graph():
    x, weight, p = torch.randn(3, 8, requires_grad=True), torch.randn(8), order(8)

    def both(x):
        return permute_columns(x, p) + rms_norm_permute(x, weight, p)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, both(x))
    compiled.sum().backward()
