"""Any module: chains of blocks, modules that are none, convolutions, awkward inputs."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
import torch.nn.utils.prune
from pruning import inputs_of, mlp, prune
from torch import nn

import nmsolve
from nmsolve.checkpoint.roles import is_conv1d
from nmsolve.permute import PermutedLinear, calibration_scores, learn_permutation
from nmsolve.prune.layers import Layer, find_layers
from nmsolve.prune.walk import Chain, Loose, make_plan, quiet_model

pytest.importorskip("transformers")


class Residual(nn.Module):
    """Its first layer is in place, and it is no chain: blocks are called twice and skipped over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.unused = nn.Linear(16, 16)

    def forward(self, x):
        for layer in (self.inner[0], self.inner[2], self.inner[0]):
            x = x + torch.relu(layer(x))
        return self.inner[1](x)


def test_any_module_is_walked():
    torch.manual_seed(0)
    model, data = Residual(), torch.randn(40, 16)
    dense = copy.deepcopy(model)
    result = prune(model, data, "2:4", batch_size=8)
    assert sorted(result.masks) == ["inner.0.weight", "inner.1.weight", "inner.2.weight"]
    assert result.report.skipped == {"unused": "not called in the forward pass of any batch"}
    rows = {row.name: row for row in result.report.layers}
    assert rows["inner.0"].tokens == 80
    x = inputs_of(dense, "inner.0", [data])
    expected = nmsolve.transposable_mask(
        (dense.inner[0].weight.detach().abs() * x.norm(dim=0)).float(), 2, 4, backend="torch"
    )
    assert torch.equal(result.masks["inner.0.weight"], expected)
    halfway = copy.deepcopy(dense)
    halfway.inner[0].weight.data.mul_(expected)
    x = inputs_of(halfway, "inner.2", [data])
    scores = halfway.inner[2].weight.detach().abs() * x.norm(dim=0)
    assert torch.equal(
        result.masks["inner.2.weight"], nmsolve.transposable_mask(scores.float(), 2, 4, backend="torch")
    )


class InPlace(nn.Module):
    """Tensors are written to between a block and the next, or between two layers that take them."""

    def __init__(self, between_blocks: bool) -> None:
        super().__init__()
        self.between_blocks = between_blocks
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])

    def forward(self, x):
        scale = 1 + torch.arange(16) ** 2
        if self.between_blocks:
            for layer in self.layers:
                x = layer(x).mul_(scale)
            return x
        x = x.clone()
        first = self.layers[0](x)
        return first + self.layers[1](x.mul_(scale)) + self.layers[2](x.mul_(scale))


@pytest.mark.parametrize("between_blocks", [True, False])
def test_tensors_that_are_written_to_on_the_way(between_blocks):
    torch.manual_seed(0)
    model, data = InPlace(between_blocks), torch.randn(64, 16)
    dense = copy.deepcopy(model)
    result = prune(model, data, "2:4", sequential="off", batch_size=64)
    for k, layer in enumerate(dense.layers):
        scores = (layer.weight.detach().abs() * inputs_of(dense, f"layers.{k}", [data]).norm(dim=0)).float()
        expected = nmsolve.transposable_mask(scores, 2, 4, backend="torch")
        assert (result.masks[f"layers.{k}.weight"] != expected).float().mean() < 0.02


def uncommon(kind: str) -> tuple[nn.Module, list[dict[str, torch.Tensor]]]:
    """Models whose blocks get masks of two kinds, hand on stacks of states, or come after convolutions."""
    t = pytest.importorskip("transformers")
    torch.manual_seed(0)
    text = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    attention = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4}
    tokens = [{"input_ids": row[None]} for row in tiny_models.tokens(3, 12)]
    match kind:
        case "gemma2":
            config = t.Gemma2Config(num_hidden_layers=3, **text, **special, **attention)
            return t.Gemma2ForCausalLM(config).eval(), tokens
        case "gemma3n":
            config = t.Gemma3nTextConfig(
                num_hidden_layers=4,
                num_kv_shared_layers=2,
                hidden_size_per_layer_input=16,
                vocab_size_per_layer_input=96,
                laurel_rank=8,
                activation_sparsity_pattern=[0.0] * 4,
                layer_types=["sliding_attention", "full_attention"] * 2,
                **text,
                **special,
                **attention,
            )
            return t.Gemma3nForCausalLM(config).eval(), tokens
        case "whisper":
            config = t.WhisperConfig(
                vocab_size=96,
                num_mel_bins=8,
                d_model=32,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_ffn_dim=64,
                max_source_positions=16,
                max_target_positions=32,
                decoder_start_token_id=1,
                **special,
            )
            batches = [
                {"input_features": torch.randn(1, 8, 32), "decoder_input_ids": batch["input_ids"][:, :5]}
                for batch in tokens
            ]
            return t.WhisperForConditionalGeneration(config).eval(), batches
    raise ValueError(kind)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3n", "whisper"])
def test_statistics_are_those_of_the_whole_model(kind):
    """Masks of linear layers, from inputs recorded in an ordinary forward pass of the dense model."""
    model, batches = uncommon(kind)
    dense = copy.deepcopy(model)
    if kind == "gemma3n" and pytest.importorskip("transformers").__version__.startswith("4."):
        dense.config.use_cache = False  # with one its last layers take keys of others, without one their own
    result = prune(model, batches, "4:8", sequential="off")
    linear = [name for name in result.masks if result.masks[name].ndim == 2]
    assert len(linear) >= 16
    for name in linear[::3]:
        module = name.removesuffix(".weight")
        x = inputs_of(dense, module, batches)
        scores = (dense.get_submodule(module).weight.detach().abs() * x.norm(dim=0)).float()
        expected = nmsolve.transposable_mask(scores, 4, 8, backend="torch")
        assert (result.masks[name] != expected).float().mean() < 0.02, name


def test_a_transformers_model_without_embeddings():
    """Its get_input_embeddings raises NotImplementedError."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=2
    )
    model = transformers.ResNetForImageClassification(config)
    result = prune(model, torch.randn(4, 3, 16, 16), "2:4")
    assert len(result.masks) == 9
    for name, mask in result.masks.items():
        assert torch.equal(model.state_dict()[name] != 0, mask)


def test_weights_that_are_computed_stay_dense():
    """Writing to them would change nothing."""
    torch.manual_seed(0)
    reparametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    masked = torch.nn.utils.prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.2)
    model = nn.Sequential(reparametrised, masked, nn.Linear(16, 16))
    result = prune(model, torch.randn(20, 16), "2:4")
    assert list(result.masks) == ["2.weight"]
    for name in ("0", "1"):
        assert result.report.skipped[name] == "its weight is computed from other parameters"


def test_a_model_that_calls_none_of_its_layers():
    class Idle(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 16)
            self.inner = nn.Linear(16, 16)

        def forward(self, x):
            return x

    model = nn.Sequential(Idle())
    with pytest.raises(nmsolve.NMSolveError, match="calls none of the 1 layers to prune"):
        prune(model, torch.randn(4, 16), {"0.inner": "2:4"})


def test_a_sequential_is_a_chain_and_may_work_in_place():
    model, data = mlp(), torch.randn(64, 16)
    with quiet_model(model):
        (stage,) = make_plan(model, find_layers(model), data).stages
    assert isinstance(stage, Chain)
    dense = copy.deepcopy(model)
    result = prune(model, data, "2:4", batch_size=16)
    x = data
    for k in (0, 2, 4):
        scores = dense[k].weight.detach().abs() * x.norm(dim=0)
        expected = nmsolve.transposable_mask(scores, 2, 4, backend="torch")
        assert (result.masks[f"{k}.weight"] != expected).float().mean() < 0.02
        x = torch.relu(model[k](x)).detach()


CONVOLUTIONS = {
    "plain": nn.Conv2d(8, 16, 3, padding=1, stride=2),
    "dilated": nn.Conv2d(8, 16, (3, 2), dilation=2, padding=(1, 2)),
    "grouped": nn.Conv2d(16, 24, 3, groups=2),
    "same": nn.Conv2d(8, 16, (2, 3), padding="same"),
    "circular": nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"),
    "1d": nn.Conv1d(8, 16, 3, padding=1, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_inputs_of_a_convolution(kind):
    """The matrices and the inputs of a layer multiply to what the layer computes."""
    module = copy.deepcopy(CONVOLUTIONS[kind]).double()
    layer = Layer("conv", module)
    shape = (2, module.in_channels, *[9, 7][: len(module.kernel_size)])
    x = torch.randn(shape, dtype=torch.float64)
    rows = layer.inputs(x) @ layer.matrices(module.weight).transpose(1, 2)
    expected = module(x) - module.bias.view(-1, *[1] * len(module.kernel_size))
    expected = expected.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(rows, expected)
    assert torch.equal(layer.from_matrices(layer.matrices(module.weight)), module.weight)


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "alps"])
@pytest.mark.parametrize("kind", ["plain", "grouped", "1d"])
def test_convolutions_have_a_mask_for_each_kernel_position(kind, method):
    torch.manual_seed(0)
    module = copy.deepcopy(CONVOLUTIONS[kind])
    data = torch.randn(6, module.in_channels, *[9, 9][: len(module.kernel_size)])
    result = prune(nn.Sequential(module), data, "2:4", method=method)
    mask = result.masks["0.weight"]
    assert torch.equal(module.weight != 0, mask)
    for position in mask.flatten(2).unbind(-1):
        for group in position.chunk(module.groups):
            nmsolve.check_mask(group, 2, 4)
    assert 0 < result.report.layers[0].relative_error < 0.5


def derived_conv1d():
    """A layer of a class derived from transformers' Conv1D, and GPT-2 with such layers."""
    from transformers.pytorch_utils import Conv1D

    class Tuned(Conv1D):
        pass

    model = tiny_models.make("gpt2")
    for module in model.modules():
        if type(module) is Conv1D:
            module.__class__ = Tuned
    return Tuned(6, 4), model


def test_conv1d_is_known_by_its_class():
    """transformers' Conv1D stores (in, out); PyTorch's Conv1d and a foreign class of that name do not."""
    layer, _ = derived_conv1d()
    foreign = type("Conv1D", (nn.Linear,), {})(4, 6)
    assert [is_conv1d(module) for module in (layer, nn.Conv1d(4, 6, 1), nn.Linear(4, 6), foreign)] == [
        True,
        False,
        False,
        False,
    ]


def test_layers_derived_from_conv1d_are_pruned_and_permuted_as_it_is():
    layer, model = derived_conv1d()
    assert Layer("x", layer).matrix_shape == (6, 4)
    x = torch.randn(3, 4)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(PermutedLinear.from_linear(layer, order)(x), layer(x))
    name = "transformer.h.0.mlp.c_proj.weight"
    batches = list(tiny_models.tokens().split(2))
    scores = calibration_scores(model, batches, [name])[name]
    plain = calibration_scores(tiny_models.make("gpt2"), batches, [name])[name]
    assert torch.equal(scores, plain)
    assert name.removesuffix(".weight") in learn_permutation(model, batches, 2, 4, steps=0).permutations


def test_loose_layers_around_a_chain():
    """OPT's projections stand before and after its blocks; each stage is calibrated in its turn."""
    model = tiny_models.make("opt")
    result = prune(model, tiny_models.tokens(), {"*": "4:8"})
    names = [row.name.rpartition(".")[2] for row in result.report.layers]
    assert "project_in" in names
    with quiet_model(model):
        plan = make_plan(model, [x for x in find_layers(model) if x.name != "lm_head"], tiny_models.tokens())
    assert [type(stage) for stage in plan.stages] == [Loose, Chain, Loose]


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "alps"])
def test_inputs_that_are_always_zero_or_few(method):
    """A singular Hessian: most channels dead, and fewer tokens than inputs."""
    data = torch.randn(3, 16) * (torch.arange(16) % 3 == 0)
    model = mlp()
    result = prune(model, data, "2:4", method=method)
    for name, mask in result.masks.items():
        nmsolve.check_mask(mask, 2, 4)
        assert torch.isfinite(model.state_dict()[name]).all()
