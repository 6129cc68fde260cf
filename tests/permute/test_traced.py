"""Couplings that a forward pass shows: blocks of convolutions, sums, gates, and what fixes an order."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nmsolve import NMSolveError
from nmsolve.permute import apply_permutations, find_couplings


class Basic(nn.Module):
    """A block of a ResNet: two convolutions and a sum, with torchvision's names."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 12, 2), Basic(12, 12))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Squeezed(nn.Module):
    """An inverted bottleneck: a depthwise convolution, and a gate for each channel from their means."""

    def __init__(self):
        super().__init__()
        self.expand, self.depth = nn.Conv2d(4, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.reduce, self.restore = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)
        self.project = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        y = F.silu(self.norm(self.depth(self.expand(x))))
        gate = self.restore(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.project(y * gate)


class Looped(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.middle(self.first(x))))))


def made(module):
    """In float64, with no norm at a constant."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    return module.double().eval()


def orders_of(couplings):
    generator = torch.Generator().manual_seed(2)
    return {c.name: torch.randperm(c.size, generator=generator) for c in couplings}


class Permuted(nn.Module):
    """A block of a ConvNeXt by hand: linear layers on channels that are moved to the end and back."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(x.permute(0, 2, 3, 1))
        return self.head(x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2))


# What the blocks of a stage pass on is one set of channels, from the layer before them to the next stage.
CASES = {
    "resnet": (
        ResNet,
        (2, 3, 32, 32),
        {
            *("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv2"),
            *("layer2.0.conv2", "layer2.1.conv1", "layer2.1.conv2"),
        },
    ),
    "gates": (Squeezed, (2, 4, 9, 9), {"reduce", "restore"}),
    "called twice": (Looped, (3, 4), {"middle"}),
    "moved axes": (Permuted, (2, 3, 5, 5), {"up", "down"}),
}


@pytest.mark.parametrize("case", CASES)
def test_random_orders_leave_the_model_as_it_was(case):
    kind, shape, folding = CASES[case]
    model = made(kind())
    x = torch.randn(shape, dtype=torch.float64)
    before = model(x)
    found = [c for c in find_couplings(model) if c.folds]
    assert {c.name for c in found} == folding
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    done = apply_permutations(model, orders_of(found), couplings=found, how="fold")
    for one in done:
        assert not any(torch.equal(model.state_dict()[tensor], kept[tensor]) for tensor in one.tensors)
    assert (model(x) - before).abs().max() < 1e-9


def test_a_stage_is_one_coupling_of_all_that_it_passes():
    (stage,) = [c for c in find_couplings(made(ResNet())) if c.name == "layer2.1.conv1"]
    assert {site.tensor for site in stage.consumers} == {"layer2.1.conv1.weight", "fc.weight"}
    written = {site.tensor.rpartition(".")[0] for site in stage.producers}
    assert written == {
        *("layer2.0.conv2", "layer2.0.bn2", "layer2.0.downsample.0", "layer2.0.downsample.1"),
        *("layer2.1.conv2", "layer2.1.bn2"),
    }


class Between(nn.Module):
    """Two layers with names that a rule knows, and something between them."""

    def __init__(self, between):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 3)
        self.between = between

    def forward(self, x):
        return self.fc2(self.between(self, self.fc1(x)))


class Standardised(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x):
        return F.linear(x, self.weight * torch.arange(8, dtype=x.dtype), self.bias)


def _other_layer(model, y):
    return y + F.linear(y, model.fc2.weight).sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "between",
    [
        lambda model, y: y.flip(-1),
        lambda model, y: y.softmax(-1),
        lambda model, y: torch.cat([y[..., 1:], y[..., :1]], -1),
        lambda model, y: y * torch.arange(8, dtype=y.dtype),
        lambda model, y: y.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8),
        lambda model, y: F.layer_norm(y, (8,), torch.arange(8, dtype=y.dtype)),
        _other_layer,
    ],
    ids=["flip", "softmax", "cat", "scale", "shuffle", "norm", "other use"],
)
def test_what_is_not_known_to_be_alike_fixes_the_order(between):
    model = made(Between(between))
    (second,) = [c for c in find_couplings(model) if "fc2.weight" in [s.tensor for s in c.consumers]]
    assert not second.folds
    assert second.reason
    with pytest.raises(NMSolveError, match="cannot be folded"):
        apply_permutations(model, {second.name: torch.arange(8).flip(0)}, how="fold")


def test_channels_that_leave_keep_their_order():
    class Two(Between):
        def forward(self, x):
            y = self.fc1(x)
            return self.fc2(torch.relu(y)), y

    (second,) = [c for c in find_couplings(Two(None)) if c.name == "fc2"]
    assert "leave" in second.reason


def test_layers_that_compute_otherwise_are_not_followed():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Standardised(8, 3))
    normed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3)))
    for chain in (model, normed):
        assert not any(coupling.folds for coupling in find_couplings(chain))


def test_tracing_leaves_nothing_behind():
    class Remembers(Looped):
        def forward(self, x):
            self.seen = self.first(x)
            return self.last(torch.relu(self.seen))

    model = made(Remembers())
    model.train()
    before = {name: id(value) for name, value in model.named_parameters()}
    assert {c.name for c in find_couplings(model) if c.folds} == {"last"}
    assert not hasattr(model, "seen")
    assert model.training
    assert before == {name: id(value) for name, value in model.named_parameters()}


def test_encoder_layers_of_torch_fold_and_are_not_gathered():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 4, 40, batch_first=True).double().eval()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    before = layer(x)
    couplings = {c.name: c for c in find_couplings(layer)}
    assert {name for name, c in couplings.items() if c.folds} == {"self_attn.out_proj", "linear2"}
    assert couplings["self_attn.out_proj"].shape == (4, 6)
    generator = torch.Generator().manual_seed(1)
    orders = {
        "self_attn.out_proj": torch.stack([torch.randperm(6, generator=generator) for _ in range(4)]),
        "linear2": torch.randperm(40, generator=generator),
    }
    apply_permutations(layer, orders)
    assert (layer(x) - before).abs().max() < 1e-9
    with torch.no_grad():
        assert (layer(x) - before).abs().max() < 1e-9
    for name, size in (("self_attn.out_proj", 24), ("linear1", 24)):
        with pytest.raises(NMSolveError, match="without calling them"):
            apply_permutations(layer, {name: torch.randperm(size)})
