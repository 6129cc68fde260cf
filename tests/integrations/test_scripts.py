"""Masks for scripts with a W_metric and for apex ASP: polarity, counting, calling conventions."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import tiny_models
import torch
from clients import best_score, check_counts, inputs_of, kept, linears
from torch import Tensor, nn

import nmsolve
from nmsolve.integrations.apex_asp import create_mask, mask_calculator
from nmsolve.integrations.scripts import prune_mask

pytest.importorskip("transformers")


def test_true_is_pruned_and_the_first_number_counts_the_pruned():
    metric = torch.tensor([[4.0, 3.0], [3.0, 1.0]])
    assert prune_mask(metric, 1, 2).tolist() == [[True, False], [False, True]]
    metric = torch.rand(32, 64, generator=torch.Generator().manual_seed(0))
    mask = prune_mask(metric, 1, 4)
    assert mask.float().mean() == 0.25
    check_counts(~mask, 3, 4)
    assert torch.equal(prune_mask(metric, 0, 4), torch.zeros(32, 64, dtype=torch.bool))


def test_rows_alone_are_what_the_scripts_prune_themselves():
    metric = torch.rand(24, 48, generator=torch.Generator().manual_seed(0))
    mask = prune_mask(metric, 5, 8, transposable=False)
    for row, pruned in zip(metric.view(-1, 8), mask.view(-1, 8), strict=True):
        assert set(pruned.nonzero().flatten().tolist()) == set(row.argsort()[:5].tolist())


def test_wanda_on_a_model():
    model = tiny_models.make("llama")
    for name, layer in linears(model):
        weight = layer.weight.data
        scaler_row = inputs_of(model, name, tiny_models.tokens()).square().mean(0)
        metric = weight.abs() * scaler_row.sqrt()
        mask = prune_mask(metric, 12, 16)
        weight[mask] = 0
        check_counts(weight != 0, 4, 16)
        assert kept(metric, ~mask) == pytest.approx(best_score(metric, 4, 16), rel=1e-6)


def test_slabs_of_sparsegpt_are_blocks_of_the_matrix():
    metric = torch.rand(40, 64, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for i in range(0, 64, 16):
        mask[:, i : i + 16] = prune_mask(metric[:, i : i + 16], 8, 16)
    assert torch.equal(mask, prune_mask(metric, 8, 16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_metrics_of_any_dtype_and_size(dtype):
    metric = torch.rand(21, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = prune_mask(metric, 2, 4)
    assert mask.dtype == torch.bool
    nmsolve.check_mask(~mask, 2, 4)


@pytest.mark.parametrize(
    ("metric", "prune_n", "prune_m", "message"),
    [
        (torch.ones(4, 4), 0, 0, "m: expected a group size of at least 1, got 0"),
        (torch.ones(4, 4), 5, 4, "pruned: expected 0 <= pruned <= m=4"),
        (torch.full((4, 4), torch.inf, dtype=torch.float16), 2, 4, "scores"),
        (torch.ones(4), 2, 4, "scores"),
    ],
)
def test_what_is_no_metric_or_pattern_is_refused(metric, prune_n, prune_m, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        prune_mask(metric, prune_n, prune_m)


def test_apex_patterns_by_enumeration():
    tensor = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[float(k in chosen) for k in range(4)] for chosen in combinations(range(4), 2)])
    squares = torch.stack([torch.stack(choice) for choice in product(rows, repeat=4)])
    squares = squares[(squares.sum(1) == 2).all(1)]
    assert len(squares) == 90
    blocks = tensor.abs().view(3, 4, 4, 4).transpose(1, 2).reshape(12, 16)
    best = float((blocks @ squares.flatten(1).T).max(1).values.sum())
    for pattern in ("m4n2_2d", "m4n2_2d_best"):
        mask = create_mask(tensor, pattern, 0.5)
        check_counts(mask.bool(), 2, 4)
        assert float((tensor.abs() * mask).sum()) == pytest.approx(best, rel=1e-6)
    greedy = create_mask(tensor, "m4n2_2d_greedy")
    check_counts(greedy.bool(), 2, 4)
    assert float((tensor.abs() * greedy).sum()) < best
    line = create_mask(tensor)
    assert float((tensor.abs() * line).sum()) == pytest.approx(
        float((tensor.abs().view(-1, 4) @ rows.T).max(1).values.sum()), rel=1e-6
    )
    assert torch.equal(create_mask(tensor.flatten()), line.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_apex_masks_have_the_tensor_dtype_and_kernel_positions_are_matrices(dtype):
    tensor = torch.randn(32, 64, 3, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = create_mask(tensor, "m32n8_2d", 0.25)
    assert mask.dtype == dtype
    assert mask.shape == tensor.shape
    assert mask.is_contiguous()
    for i, j in product(range(3), range(2)):
        check_counts(mask[:, :, i, j].bool(), 8, 32)
    line = create_mask(tensor[:, :, :, 0], "m16n1_1d")
    assert torch.equal(line.sum(1).unique(), torch.full((1,), 4, dtype=dtype))


def test_an_ordinary_mask_has_one_method():
    with pytest.raises(nmsolve.NMSolveError, match="'greedy' needs transposable=True"):
        prune_mask(torch.ones(4, 4), 2, 4, transposable=False, method="greedy")


@pytest.mark.parametrize(
    ("pattern", "density", "message"),
    [
        ("2:4", None, "pattern: expected 'm4n2_'"),
        ("m4n2_3d", None, "pattern: expected 'm4n2_'"),
        ("m4n5_2d", None, "n: expected 0 <= n <= m=4"),
        ("m4n1_2d", 0.5, "density: expected 0.25 for m4n1_2d, got 0.5"),
    ],
)
def test_apex_patterns_that_are_refused(pattern, density, message):
    with pytest.raises(nmsolve.NMSolveError, match=message):
        create_mask(torch.ones(8, 8), pattern, density)
    if density is None:
        with pytest.raises(nmsolve.NMSolveError, match=message):
            mask_calculator(pattern)


class Asp:
    """How ASP uses the calculator: called with a parameter, its result becomes the mask buffer
    (``Tensor.set_``), its complement the stored part; gradients and weights are multiplied by it."""

    def __init__(self, model: nn.Module, calculator) -> None:
        self.calculator = calculator
        self.parameters: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for _, layer in linears(model):
            layer.register_buffer("__weight_mma_mask", torch.ones_like(layer.weight).bool())
            layer.register_buffer("__weight_mma_pruned_p", torch.zeros_like(layer.weight))
            buffers = dict(layer.named_buffers())
            self.parameters.append(
                (layer.weight, buffers["__weight_mma_mask"], buffers["__weight_mma_pruned_p"])
            )

    @torch.no_grad()
    def compute_sparse_masks(self) -> None:
        for p, mask, pruned in self.parameters:
            if not mask.all():
                p.add_(pruned)
            mask.set_(self.calculator(p))
            pruned.set_(p * (~mask))
            p.mul_(mask)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> None:
        for p, mask, _ in self.parameters:
            p.grad.mul_(mask)
        optimizer.step()
        for p, mask, _ in self.parameters:
            p.mul_(mask)


def test_apex_asp_prunes_and_fine_tunes_a_model():
    model, dense = tiny_models.make("llama"), tiny_models.make("llama")
    asp = Asp(model, mask_calculator("m16n4_2d"))
    asp.compute_sparse_masks()
    first = [mask.clone() for _, mask, _ in asp.parameters]
    for (name, layer), mask in zip(linears(model), first, strict=True):
        weight = dense.get_submodule(name).weight.detach()
        check_counts(mask, 4, 16)
        assert torch.equal(layer.weight, weight * mask)
        assert kept(weight.abs(), mask) == pytest.approx(best_score(weight.abs(), 4, 16), rel=1e-6)
    asp.compute_sparse_masks()
    assert all(torch.equal(mask, old) for (_, mask, _), old in zip(asp.parameters, first, strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = tiny_models.tokens()
    model(tokens, labels=tokens).loss.backward()
    asp.step(optimizer)
    for (name, layer), mask in zip(linears(model), first, strict=True):
        assert not torch.equal(layer.weight, dense.get_submodule(name).weight * mask)
        assert torch.equal(layer.weight != 0, mask)
