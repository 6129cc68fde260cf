"""Fine-tuning with fixed masks, the 2:4 format, and perplexity."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import nmsolve
from nmsolve.prune import FixedMasks, perplexity, to_semi_structured

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, fused=True),
    "groups": lambda p: torch.optim.SGD(
        [{"params": [next(p)], "lr": 0.2}, {"params": list(p), "weight_decay": 0.5}], lr=0.1, momentum=0.9
    ),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))


def masks_of(model: nn.Module, transposable: bool = True) -> dict[str, torch.Tensor]:
    choose = nmsolve.transposable_mask if transposable else nmsolve.nm_mask
    return {
        name: choose(weight.detach().abs(), 2, 4, backend="torch")
        for name, weight in model.named_parameters()
        if weight.ndim == 2
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> list[float]:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 16, generator=g), torch.randn(64, 16, generator=g)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_stay_zero(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 1)  # moments of the dense model are there before the masks come
    masks = masks_of(model)
    fixed = FixedMasks(model, masks, optimizer)
    losses = train(model, optimizer)
    assert losses[-1] < losses[0]
    for key, mask in masks.items():
        assert torch.equal(model.state_dict()[key] != 0, mask)
    assert fixed.operands("2:4") == [(key, "2:4", True, True, 0) for key in masks]


def test_gradients_of_masked_weights_are_cleared():
    model = network()
    masks = masks_of(model)
    FixedMasks(model, masks)
    model(torch.randn(4, 16)).sum().backward()
    model(torch.randn(4, 16)).sum().backward()
    assert not model[0].weight.grad[~masks["0.weight"]].any()
    assert model[0].weight.grad[masks["0.weight"]].any()


def test_ordinary_masks_are_sparse_in_the_forward_product_alone():
    model = network()
    fixed = FixedMasks(model, masks_of(model, transposable=False))
    assert [(x.forward, x.backward) for x in fixed.operands("2:4")] == [(True, False)] * 2


def test_a_stray_weight_is_found():
    model = network()
    fixed = FixedMasks(model, masks_of(model))
    model[0].weight.data.fill_(1)
    first, second = fixed.operands("2:4")
    assert (first.forward, first.backward, first.stray) == (False, False, 16 * 32 // 2)
    assert (second.forward, second.backward, second.stray) == (True, True, 0)
    fixed.apply()
    assert fixed.operands("2:4")[0].stray == 0


def test_operands_of_a_convolution_are_those_of_its_kernel_positions():
    model = nn.Sequential(nn.Conv2d(8, 8, 3))
    scores = model[0].weight.detach().abs().permute(2, 3, 0, 1)
    mask = nmsolve.transposable_mask(scores, 2, 4, backend="torch").permute(2, 3, 0, 1)
    (found,) = FixedMasks(model, {"0.weight": mask}).operands("2:4")
    assert (found.forward, found.backward) == (True, True)
    with torch.no_grad():
        model[0].weight[0, :4] = 1
    (found,) = FixedMasks(model, {}).operands("2:4") or [None]
    assert found is None


def test_restored_moments_of_an_optimizer_do_not_bring_weights_back():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, optimizer)
    dense = copy.deepcopy(optimizer.state_dict())
    fixed = FixedMasks(model, masks_of(model), optimizer)
    optimizer.load_state_dict(dense)
    train(model, optimizer)
    assert all((x.forward, x.backward, x.stray) == (True, True, 0) for x in fixed.operands("2:4"))


@pytest.mark.parametrize("replace", ["assign", "parameter", "dtype", "overwrite", "unfrozen"])
def test_parameters_that_are_replaced_are_masked_as_well(replace):
    """What operands() reports is what the model computes with, whichever tensors that are by now."""
    model = network()
    dense, masks, dtype = copy.deepcopy(model.state_dict()), masks_of(model), torch.float32
    if replace == "unfrozen":
        model.requires_grad_(False)
    fixed = FixedMasks(model, masks)
    match replace:
        case "assign":
            model.load_state_dict(dense, assign=True)
        case "parameter":
            model[0].weight = nn.Parameter(torch.ones(32, 16))
        case "dtype":
            dtype = torch.bfloat16
            model.to(dtype)
        case "overwrite":
            dtype = torch.float64
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            try:
                model.to(dtype)
            finally:
                torch.__future__.set_overwrite_module_params_on_conversion(False)
        case "unfrozen":
            model.requires_grad_(True)
    assert sum(x.stray for x in fixed.operands("2:4")) == sum(
        int((model.state_dict()[name] != 0)[~mask].sum()) for name, mask in masks.items()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fixed.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 16, dtype=dtype)).square().sum().backward()
        optimizer.step()
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert not (parameter != 0)[~mask].any()
        assert (parameter != 0)[mask].any()
        assert not parameter.grad[~mask].any()
    assert all((x.forward, x.backward, x.stray) == (True, True, 0) for x in fixed.operands("2:4"))


def test_operands_with_a_pattern_for_each_weight():
    model = network()
    fixed = FixedMasks(model, masks_of(model))
    patterns = {"0.weight": nmsolve.NMPattern(2, 4), "2.weight": nmsolve.NMPattern(1, 4)}
    found = [(x.name, x.pattern, x.forward) for x in fixed.operands(patterns)]
    assert found == [("0.weight", "2:4", True), ("2.weight", "1:4", False)]
    with pytest.raises(nmsolve.NMSolveError, match=r"pattern: expected one for '2\.weight'"):
        fixed.operands({"0.weight": nmsolve.NMPattern(2, 4)})


def test_masks_of_a_compiled_model():
    model = network()
    masks = masks_of(model)
    fixed = FixedMasks(torch.compile(model, backend="eager"), masks)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])
    assert fixed.operands("2:4")[0].stray == 0


def test_remove_ends_it():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fixed = FixedMasks(model, masks_of(model), optimizer)
    fixed.remove()
    train(model, optimizer, 1)
    assert fixed.operands("2:4")[0].stray > 0


def test_frozen_weights_are_masked_too():
    model = network().requires_grad_(False)
    masks = masks_of(model)
    FixedMasks(model, masks)
    assert torch.equal(model[0].weight != 0, masks["0.weight"])


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"missing": torch.ones(1, dtype=torch.bool)}, "no parameter 'missing'"),
        ({"0.weight": torch.ones(3, 3, dtype=torch.bool)}, r"expected a bool tensor of shape \(32, 16\)"),
        ({"0.weight": torch.ones(32, 16)}, "expected a bool tensor"),
        ({"0.bias.weight": torch.ones(1, dtype=torch.bool)}, "no parameter '0.bias.weight'"),
        ("folder", "masks: expected names and bool tensors, got str"),
    ],
)
def test_wrong_masks(masks, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(nmsolve.NMSolveError, match=message):
        FixedMasks(model, masks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- 2:4 on a GPU -------------------------------------------------------------------------------------------


def test_what_cannot_be_converted_says_why():
    model = nn.Sequential(nn.Linear(64, 64))
    masks = masks_of(model)
    with pytest.raises(nmsolve.NMSolveError, match="expected a 2:4 weight"):
        to_semi_structured(model, masks)
    FixedMasks(model, masks)
    with pytest.raises(
        nmsolve.NMSolveError, match=r"expected float16 or bfloat16 on a GPU, got torch\.float32"
    ):
        to_semi_structured(model, masks)
    with pytest.raises(nmsolve.NMSolveError, match="'bias' is no weight of a linear layer"):
        to_semi_structured(model, {"bias": torch.ones(64, dtype=torch.bool)})


def test_masks_fit_the_format_of_the_gpu():
    """torch's own compression to the hardware format loses nothing of a masked weight or its transpose."""
    from torch.sparse import _semi_structured_conversions as conversions

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()
    weight = weight * nmsolve.transposable_mask(weight.abs(), 2, 4, backend="torch")
    for operand in (weight, weight.T.contiguous()):
        kept, meta = conversions.sparse_semi_structured_from_dense_cutlass(operand)
        assert kept.shape == (64, 32)
        back = conversions.sparse_semi_structured_to_dense_cutlass(kept, meta)
        assert torch.equal(back, operand)


@pytest.mark.gpu
def test_converted_layers_compute_the_same():
    model = nn.Sequential(nn.Linear(128, 128, device="cuda", dtype=torch.float16))
    masks = masks_of(model)
    FixedMasks(model, masks).remove()
    x = torch.randn(32, 128, device="cuda", dtype=torch.float16)
    expected = model(x)
    assert to_semi_structured(model, masks) == ["0.weight"]
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


# --- perplexity ---------------------------------------------------------------------------------------------


class Bigram(nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_perplexity_is_the_definition(batch_size):
    model = Bigram()
    tokens = torch.randint(0, 8, (23,), generator=torch.Generator().manual_seed(0))
    probability = model.table.detach().double().softmax(-1)
    lost = [
        -math.log(probability[tokens[k - 1], tokens[k]])
        for k in range(20)
        if k % 5  # four windows of five
    ]
    found = perplexity(model, tokens, window=5, batch_size=batch_size, progress=False)
    assert found.perplexity == pytest.approx(math.exp(sum(lost) / len(lost)), rel=1e-6)
    assert (found.windows, found.window) == (4, 5)
    assert perplexity(model, tokens, window=5, windows=2, progress=False).windows == 2


def test_perplexity_windows_are_what_the_model_takes():
    class Positions(Bigram):
        """Has learned positions for four tokens."""

        config = type("Config", (), {"max_position_embeddings": 4})

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) + torch.zeros(4)[torch.arange(tokens.shape[1])][:, None]

    tokens = torch.zeros(9, dtype=torch.int64)
    assert perplexity(Positions(), tokens, progress=False)[1:3] == (2, 4)
    with pytest.raises(nmsolve.NMSolveError, match="window: the model cannot be called on windows of 5"):
        perplexity(Positions(), tokens, window=5, progress=False)


def test_a_model_that_puts_out_nan_has_no_perplexity():
    model = Bigram()
    model.table.data[0, 0] = torch.nan
    with pytest.raises(nmsolve.NMSolveError, match="expected finite logits, got NaN"):
        perplexity(model, torch.zeros(9, dtype=torch.int64), window=3, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.ones(3, 3, dtype=torch.int64)}, r"tokens: expected a tensor \(T,\)"),
        ({"tokens": torch.ones(9)}, "of integers"),
        ({"window": 1}, "window: expected an integer of at least 2, got 1"),
        ({"window": 10}, "9 tokens do not fill one window of 10"),
        ({"windows": 4}, "windows: 4 asked for, but 9 tokens fill only 3"),
        ({"batch_size": 0}, "batch_size: expected"),
    ],
)
def test_perplexity_says_what_is_wrong(changes, message):
    given = {"tokens": torch.zeros(9, dtype=torch.int64), "window": 3, **changes}
    with pytest.raises(nmsolve.NMSolveError, match=message):
        perplexity(Bigram(), progress=False, **given)
