"""Couplings that depend on what stands between two layers."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from torch import nn

from nmsolve.permute import apply_permutations, find_couplings
from nmsolve.permute.channelwise import elementwise

ELEMENTWISE = [
    nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Mish(), nn.ELU(), nn.SELU(), nn.CELU(), nn.SiLU(),
    nn.Softplus(), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid(), nn.Hardswish(), nn.Softsign(), nn.Tanhshrink(),
]  # fmt: skip
MIXING = [
    nn.Softmax(-1),
    nn.GLU(),
    nn.LayerNorm(8),
    nn.RMSNorm(8),
    nn.LocalResponseNorm(3),
    nn.PReLU(6),
    nn.PReLU(8),
]


def folds(activation):
    model = nn.Sequential(nn.Linear(4, 8), activation, nn.Linear(8, 2))
    return next(c.folds for c in find_couplings(model) if c.name == "2")


@pytest.mark.parametrize("activation", ELEMENTWISE, ids=lambda a: type(a).__name__)
def test_activations_act_on_every_channel_alike(activation):
    assert elementwise(activation)
    assert folds(activation)


@pytest.mark.parametrize("activation", MIXING, ids=lambda a: type(a).__name__)
def test_what_depends_on_the_channel_does_not(activation):
    with torch.no_grad():
        for parameter in activation.parameters():  # they begin alike, which no trained one stays
            parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
    assert not elementwise(activation)


class Lanes(nn.Module):
    """exp, an ulp off in the first lanes of a row, as vectorised code may be against its remainder."""

    def __init__(self, ulps):
        super().__init__()
        self.off = 1 + ulps * torch.finfo(torch.float32).eps

    def forward(self, x):
        y = torch.exp(x / 3)
        return torch.cat([y[..., :4] * self.off, y[..., 4:]], -1)


def test_ulps_between_lanes_do_not_count_and_more_does():
    assert elementwise(Lanes(2))
    assert not elementwise(Lanes(200))


class Slight(nn.Module):
    """A thousandth of the neighbour."""

    def forward(self, x):
        return x + 1e-3 * x.roll(1, -1)


def test_a_slight_mixture_is_one():
    assert not folds(Slight())


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "starcoder2"])
def test_models_with_a_tanh_gelu_fold_their_down_projections(kind):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": tiny_models.VOCABULARY,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    names = ("down_proj", "mlp.c_proj")
    found = [c for c in find_couplings(model) if c.name.endswith(names)]
    assert len(found) == 2
    assert all(c.folds for c in found), [c.reason for c in found]
    tokens = tiny_models.tokens()
    model = model.double().eval()
    with torch.no_grad():
        before = model(tokens).logits
        for coupling in found:
            apply_permutations(model, {coupling.name: torch.arange(coupling.size).flip(0)})
        after = model(tokens).logits
    torch.testing.assert_close(after, before, rtol=1e-8, atol=1e-8)
