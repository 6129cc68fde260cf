"""Couplings of real architectures, and that a reordered dense model computes what it did."""

from __future__ import annotations

import pytest
import torch
from permutable import FAMILIES, build, logits
from torch import nn

import nmsolve
from nmsolve import NMSolveError
from nmsolve.permute import (
    PermutedLinear,
    PermutedRMSNorm,
    apply_permutations,
    find_couplings,
    load_permutations,
    load_permuted,
    save_permutations,
)
from nmsolve.permute.named import named_couplings


def random_order(coupling, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(coupling.size, generator=generator) for _ in range(coupling.heads)]
    return torch.stack(orders).view(coupling.shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_order_of_every_coupling_leaves_the_dense_model_as_it_was(family):
    model = build(family)
    before = logits(model)
    couplings = find_couplings(model)
    orders = {c.name: random_order(c, k) for k, c in enumerate(couplings)}
    done = apply_permutations(model, orders)
    assert {d.how for d in done} == {"fold", "gather"}
    assert (logits(model) - before).abs().max() < 1e-9
    state = model.state_dict()
    fresh = build(family)
    load_permuted(fresh, state)
    assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_usual_folds_are_found(family):
    couplings = find_couplings(build(family))
    folds = [c for c in couplings if c.folds]
    assert len(folds) == 4, [c.name for c in folds]
    attention = [c for c in folds if c.heads > 1]
    grouped = family in ("llama", "qwen2", "qwen3", "mistral")
    assert [c.heads for c in attention] == ([2, 2] if grouped else [4, 4])
    assert [c.consumers[0].repeats for c in attention] == ([2, 2] if grouped else [1, 1])
    consumed = [site.tensor for c in couplings for site in c.consumers]
    assert len(consumed) == len(set(consumed))
    linears = 14 if grouped else 12
    assert len(consumed) == (8 if family == "gpt2" else linears)


def test_a_fold_reorders_the_weights_that_it_says():
    model = build("llama")
    coupling = next(c for c in find_couplings(model) if c.name.endswith("layers.1.mlp.down_proj"))
    down = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    up = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    order = random_order(coupling)
    (done,) = apply_permutations(model, {coupling.name: order})
    assert done.how == "fold"
    assert sorted(done.tensors) == sorted(
        f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "up", "gate")
    )
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, down[:, order])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, up[order])


def test_scores_of_a_coupling_are_what_the_mask_will_see():
    model = build("llama")
    for coupling in find_couplings(model):
        weights = {
            site.tensor: model.get_parameter(site.tensor).detach().abs() for site in coupling.consumers
        }
        scores = coupling.scores(weights)
        assert scores.shape[-1] == coupling.size
        order = random_order(coupling)
        expected = nmsolve.permute.retained_score(scores, 2, 4, order).sum()
        apply_permutations(model, {coupling.name: order})
        kept = 0.0
        for site in coupling.consumers:
            weight = model.get_parameter(site.tensor).detach().abs()
            kept += float((weight * nmsolve.nm_mask(weight, 2, 4)).sum())
        assert kept == pytest.approx(float(expected), rel=1e-12)


def test_forbidden_orders_are_refused_with_the_reason_and_nothing_changes():
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    name = "model.layers.0.self_attn.o_proj"
    good = {"model.layers.0.mlp.down_proj": torch.arange(48).flip(0)}
    across = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NMSolveError, match="only inside their head"):
        apply_permutations(model, {**good, name: across}, how="fold")
    with pytest.raises(NMSolveError, match="residual stream"):
        apply_permutations(model, {**good, "model.layers.0.mlp.up_proj": across}, how="fold")
    with pytest.raises(NMSolveError, match="exactly once"):
        apply_permutations(
            model, {**good, "model.layers.1.mlp.down_proj": torch.zeros(48, dtype=torch.int64)}
        )
    with pytest.raises(NMSolveError, match=r"shape \(2, 8\)"):
        apply_permutations(model, {**good, name: torch.arange(8)})
    with pytest.raises(NMSolveError, match="no coupling"):
        apply_permutations(model, {**good, "model.layers.0.mlp": across})
    for key, value in model.named_parameters():
        assert torch.equal(value, before[key])


def test_an_order_across_heads_is_gathered():
    model = build("opt")
    before = logits(model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    (done,) = apply_permutations(model, {"model.decoder.layers.0.self_attn.out_proj": order})
    assert done.how == "gather"
    assert isinstance(model.model.decoder.layers[0].self_attn.out_proj, PermutedLinear)
    assert (logits(model) - before).abs().max() < 1e-9


NORMS = {
    "model.layers.0.mlp.up_proj": "model.layers.0.post_attention_layernorm",
    "model.layers.1.self_attn.q_proj": "model.layers.1.input_layernorm",
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_norm_hands_its_channels_on_in_the_order(family):
    model = build(family)
    before = logits(model)
    couplings = {c.name: c for c in find_couplings(model)}
    orders = {name: random_order(couplings[name], k) for k, name in enumerate(NORMS)}
    weight = model.model.layers[0].mlp.gate_proj.weight.detach().clone()
    done = apply_permutations(model, orders, norms=NORMS)
    assert [d.how for d in done] == ["norm", "norm"]
    assert len(done[0].tensors) == 2
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight, weight[:, orders[done[0].name]])
    assert isinstance(model.model.layers[1].input_layernorm, PermutedRMSNorm)
    assert (logits(model) - before).abs().max() < 1e-5  # transformers' norms round to float32
    fresh = build(family)
    load_permuted(fresh, model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(NMSolveError, match="was given an order already"):
        apply_permutations(model, orders, norms=NORMS)


def test_what_is_no_plain_norm_is_refused():
    class Shifted(nn.RMSNorm):  # Gemma's
        def forward(self, x):
            return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)

    order = torch.arange(31, -1, -1)
    plain = nn.RMSNorm(32, eps=1e-5, dtype=torch.float64)
    x = torch.randn(3, 32, dtype=torch.float64)
    assert (PermutedRMSNorm.from_norm(plain, order)(x) - plain(x)[:, order]).abs().max() < 1e-12
    for norm in (Shifted(32, eps=1e-5), nn.LayerNorm(32), nn.Dropout()):
        with pytest.raises(NMSolveError, match="RMS normalisation"):
            PermutedRMSNorm.from_norm(norm, order)
    model = build("llama")
    with pytest.raises(NMSolveError, match="no module"):
        apply_permutations(
            model, {"model.layers.0.mlp.up_proj": order}, norms={"model.layers.0.mlp.up_proj": "x"}
        )
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)


def test_without_a_configuration_attention_does_not_fold():
    shapes = {n: tuple(p.shape) for n, p in build("llama").named_parameters()}
    couplings = {c.name: c for c in named_couplings(shapes)}
    coupling = couplings["model.layers.0.self_attn.o_proj"]
    assert not coupling.folds
    assert "number of attention heads" in coupling.reason
    assert couplings["model.layers.0.mlp.down_proj"].folds


def test_unknown_tensors_between_the_layers_forbid_the_fold():
    shapes = {n: tuple(p.shape) for n, p in build("llama").named_parameters()}
    shapes["model.layers.0.mlp.sub_norm.weight"] = (48,)
    couplings = {c.name: c for c in named_couplings(shapes)}
    assert "sub_norm" in couplings["model.layers.0.mlp.down_proj"].reason
    assert couplings["model.layers.1.mlp.down_proj"].folds


class Halves(nn.Module):
    """An activation that mixes channels."""

    def forward(self, x):
        return x * x.flip(-1).sigmoid()


def test_an_activation_that_mixes_channels_forbids_the_fold():
    model = build("llama")
    model.model.layers[0].mlp.act_fn = Halves()
    couplings = {c.name: c for c in find_couplings(model)}
    assert "Halves" in couplings["model.layers.0.mlp.down_proj"].reason
    assert couplings["model.layers.1.mlp.down_proj"].folds


def test_shared_weights_forbid_the_fold():
    model = build("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    couplings = {c.name: c for c in find_couplings(model)}
    for layer in (0, 1):
        assert "shared with" in couplings[f"model.layers.{layer}.mlp.down_proj"].reason


def chain_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(12, 12, 3, groups=12),
        nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.LayerNorm(16),
        nn.Dropout(),
        nn.SiLU(),
        nn.Linear(16, 24, bias=False),
        nn.Softmax(-1),
        nn.Linear(24, 4),
    ).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def test_chains():
    model = chain_model()
    couplings = {c.name: c for c in find_couplings(model)}
    folds = {name: [s.tensor for s in c.producers] for name, c in couplings.items() if c.folds}
    assert folds == {
        "1": ["0.0.weight", "0.0.bias", "0.1.weight", "0.1.bias", "0.1.running_mean", "0.1.running_var"],
        "4": ["1.weight", "1.bias", "3.weight", "3.bias"],
        "7": ["4.weight", "4.bias"],
        "11": ["7.weight", "7.bias", "8.weight", "8.bias"],
    }
    assert "first layer" in couplings["0.0"].reason
    assert "Softmax" in couplings["13"].reason
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = model(x)
    orders = {name: random_order(c) for name, c in couplings.items() if name != "0.0"}
    apply_permutations(model, orders)
    assert (model(x) - before).abs().max() < 1e-9
    with pytest.raises(NMSolveError, match="first layer"):
        apply_permutations(model, {"0.0": torch.arange(3)}, how="fold")
    with pytest.raises(NMSolveError, match="Conv2d"):
        apply_permutations(model, {"0.0": torch.arange(3)})


def test_permuted_linear_on_both_sides():
    torch.manual_seed(0)
    linear = nn.Linear(6, 5).double()
    x = torch.randn(3, 2, 6, dtype=torch.float64)
    columns, rows = torch.randperm(6), torch.randperm(5)
    permuted = PermutedLinear.from_linear(linear, columns, rows)
    assert torch.equal(permuted.weight, linear.weight[rows][:, columns])
    assert (permuted(x) - linear(x)).abs().max() < 1e-12
    other = nn.ModuleDict({"a": nn.Linear(6, 5).double()})
    load_permuted(other, nn.ModuleDict({"a": permuted}).state_dict())
    assert torch.equal(other["a"](x), permuted(x))
    with pytest.raises(NMSolveError, match="shape"):
        PermutedLinear.from_linear(linear, torch.arange(5))
    with pytest.raises(NMSolveError, match="no such layer"):
        load_permuted(nn.ModuleDict(), {"b.permutation": columns})


def test_permutations_on_disk(tmp_path):
    orders = {"a.b": torch.tensor([2, 0, 1]), "c": torch.tensor([[1, 0], [0, 1]])}
    path = tmp_path / "orders.safetensors"
    save_permutations(path, orders)
    loaded = load_permutations(path)
    assert all(torch.equal(loaded[k], v) for k, v in orders.items())
    assert [p.name for p in tmp_path.iterdir()] == ["orders.safetensors"]
    from safetensors.torch import save_file

    save_file(orders, tmp_path / "other.safetensors")
    with pytest.raises(NMSolveError, match="file of permutations"):
        load_permutations(tmp_path / "other.safetensors")
    save_permutations(path, {"a": torch.tensor([0, 0])})
    with pytest.raises(NMSolveError, match="exactly once"):
        load_permutations(path)
    with pytest.raises(NMSolveError, match="no such file"):
        load_permutations(tmp_path / "none.safetensors")
