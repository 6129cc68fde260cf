"""Experts of a mixture: one parameter for all of them, or a module for each, calibrated on what each sees."""

from __future__ import annotations

import copy

import pytest
import species
import torch
import zoo
from pruning import QUICK, mlp, prune
from torch import nn

import nmsolve
from nmsolve.errors import NMSolveWarning
from nmsolve.prune import prune_model
from nmsolve.prune.layers import Layer
from nmsolve.prune.methods import PRUNING_METHODS
from nmsolve.prune.report import FEW_TOKENS
from nmsolve.prune.statistics import SAMPLE, Statistics

transformers = pytest.importorskip("transformers")
STACKED = pytest.mark.skipif(
    int(transformers.__version__.partition(".")[0]) < 5,
    reason="this transformers keeps the experts in layers of their own",
)
pytestmark = pytest.mark.filterwarnings("ignore")


class Unrolled(nn.Module):
    """The experts of a module of transformers as linear layers: gate, up and down for each."""

    def __init__(self, stack: nn.Module) -> None:
        super().__init__()
        self.act_fn = stack.act_fn
        self.experts = nn.ModuleList()
        for joint, down in zip(stack.gate_up_proj.data, stack.down_proj.data, strict=True):
            expert = nn.ModuleDict()
            for name, weight in zip(("gate", "up", "down"), (*joint.chunk(2), down), strict=True):
                expert[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                expert[name].weight.data.copy_(weight)
            self.experts.append(expert)

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            place, token = torch.where(k == index.T)
            if len(token):
                given = x[token]
                found = expert["down"](self.act_fn(expert["gate"](given)) * expert["up"](given))
                out.index_add_(0, token, found * weights[token, place, None])
        return out

    def stacked(self, what: dict[str, torch.Tensor], prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights or masks of the linear layers as those of the module that they came from."""
        of = [
            [what[f"{prefix}.experts.{k}.{name}.weight"] for name in ("gate", "up", "down")] for k in range(4)
        ]
        return torch.stack([torch.cat(x[:2]) for x in of]), torch.stack([x[2] for x in of])


def tokens(count: int = 4, length: int = 40) -> torch.Tensor:
    return torch.randint(3, species.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3))


@STACKED
@pytest.mark.parametrize(
    ("method", "transposable"),
    [
        pytest.param(
            method,
            transposable,
            marks=() if transposable and method in ("ria", "sparsegpt") else pytest.mark.slow,
        )
        for method in PRUNING_METHODS
        for transposable in (True, False)
    ],
)
def test_stacked_experts_are_pruned_as_linear_layers_would_be(method, transposable):
    model = zoo.build("mixtral").double()
    model.set_experts_implementation("eager")  # the others know no float64
    unrolled = copy.deepcopy(model)
    for block in unrolled.model.layers:
        block.mlp.experts = Unrolled(block.mlp.experts)
    assert torch.allclose(model(tokens()).logits, unrolled(tokens()).logits, atol=1e-12)
    options = {"method": method, "transposable": transposable, "batch_size": 1}
    if method in ("alps", "frank-wolfe"):
        options["iterations"] = 20
    by_stack, by_layer = (prune(each, tokens(), **options) for each in (model, unrolled))
    weights = unrolled.state_dict()
    for k, block in enumerate(unrolled.model.layers):
        prefix = f"model.layers.{k}.mlp.experts"
        names = [f"{prefix}.{own}" for own in ("gate_up_proj", "down_proj")]
        for name, mask in zip(names, block.mlp.experts.stacked(by_layer.masks, prefix), strict=True):
            assert torch.equal(by_stack.masks[name], mask)
        for name, weight in zip(names, block.mlp.experts.stacked(weights, prefix), strict=True):
            assert torch.allclose(model.state_dict()[name], weight, atol=1e-6, rtol=0)


LATER = ("qwen3moe", "deepseek3", "olmoe", "granitemoe")


@pytest.mark.parametrize(
    "name", ["gptoss", "llama4", *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]
)
def test_the_axis_of_the_inputs(name):
    """Every output of an expert sees N of M inputs, and every input that many outputs."""
    model = zoo.build(name)
    result = prune(model, tokens(), method="sparsegpt")
    rows = [row for row in result.report.layers if row.expert_tokens is not None]
    assert len(rows) >= 2
    for row in rows:
        mask = result.masks.get(row.name, result.masks.get(f"{row.name}.weight"))
        assert int(mask.sum()) == row.kept == row.weights // 2
        assert 0 < row.relative_error < 0.5
        assert sum(row.expert_tokens) == row.tokens
        for expert in mask:
            nmsolve.check_mask(expert, 4, 8)


@STACKED
def test_tokens_of_experts_are_those_that_the_router_sends():
    model = zoo.build("mixtral")
    sent = []
    router = model.model.layers[0].mlp.gate
    hook = router.register_forward_hook(lambda _, args, out: sent.append(out[-1]))
    model(tokens())
    hook.remove()
    expected = torch.stack(sent).flatten().bincount(minlength=4).tolist()
    result = prune(model, tokens(), sequential="off", batch_size=1)
    row = next(row for row in result.report.layers if row.name.endswith("layers.0.mlp.experts.gate_up_proj"))
    assert row.expert_tokens == expected


@STACKED
def test_all_experts():
    model = zoo.build("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = prune(model, tokens(), all_experts=True, batch_size=2)
    for row in result.report.layers:
        if row.expert_tokens is not None:
            assert row.expert_tokens == [160] * 4
    routed = zoo.build("mixtral")
    routed.load_state_dict(before)
    other = prune(routed, tokens(), batch_size=2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(result.masks[name], other.masks[name])
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # what comes before an expert sees no difference
        weight = f"model.layers.0.self_attn.{name}.weight"
        assert torch.equal(result.masks[weight], other.masks[weight])


@pytest.mark.parametrize("name", ["llama4", "llama"])
def test_all_experts_is_refused_where_it_cannot_be(name):
    model = zoo.build(name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(nmsolve.NMSolveError, match="all_experts: "):
        prune(model, tokens(), all_experts=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@STACKED
@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_an_expert_without_tokens_goes_by_its_weights(method):
    model = zoo.build("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[0] = 0
        block.mlp.gate.weight.data[1:] = 0
        block.mlp.gate.weight.data[1] += 1e-3
    weight = model.model.layers[0].mlp.experts.down_proj
    with pytest.warns(NMSolveWarning, match="no token and were pruned by their weights alone"):
        result = prune(model, tokens(1, 12), method=method)
    row = next(row for row in result.report.layers if row.name.endswith("layers.0.mlp.experts.down_proj"))
    unseen = [k for k, count in enumerate(row.expert_tokens) if count == 0]
    assert unseen
    dense = zoo.build("mixtral").model.layers[0].mlp.experts.down_proj
    for k in unseen:
        scores = dense[k].detach().abs() ** (2 if method == "sparsegpt" else 1)
        kept = nmsolve.transposable_mask(scores, 4, 8, backend="torch")
        assert torch.equal(weight[k] != 0, kept)
        assert torch.equal(weight[k], dense[k] * kept)
    assert row.expert_tokens[unseen[0]] < FEW_TOKENS


@STACKED
def test_padding_is_no_token_of_an_expert():
    data = tokens(1, 40)
    padded = {
        "input_ids": torch.cat([data, data.new_full((1, 24), 5)], dim=1),
        "attention_mask": (torch.arange(64) < 40).long()[None],
    }
    plain, with_padding = zoo.build("mixtral"), zoo.build("mixtral")
    a, b = prune(plain, data), prune(with_padding, [padded])
    counts = [[row.expert_tokens for row in x.report.layers if row.expert_tokens is not None] for x in (a, b)]
    assert counts[0] == counts[1]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert (a.masks[name] != b.masks[name]).float().mean() < 0.02


class Choosing(nn.Module):
    """Which of its experts a batch goes to, its first number says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)) for _ in range(3)])

    def forward(self, x):
        return self.experts[int(x[0, 0] > 0)](x)


def test_experts_that_only_later_batches_reach():
    first, second = torch.randn(8, 16), torch.randn(8, 16)
    first[0, 0], second[0, 0] = -1.0, 1.0
    model = Choosing()
    result = prune(model, [first, second], "2:4")
    assert len(result.masks) == 6
    rows = {row.name: row for row in result.report.layers}
    assert [rows[f"experts.{k}.0"].expert_tokens for k in range(3)] == [[8], [8], [0]]
    for k, data in enumerate((first, second)):
        scores = Choosing().experts[k][0].weight.detach().abs() * data.norm(dim=0)
        expected = nmsolve.transposable_mask(scores, 2, 4, backend="torch")
        assert torch.equal(result.masks[f"experts.{k}.0.weight"], expected)


def test_most_of_a_mixture_is_pruned_and_its_perplexity_told():
    from nmsolve.prune import perplexity

    text = tokens(1, 640)[0]
    model, dense_experts = zoo.build("mixtral"), zoo.build("mixtral")
    result = prune(model, tokens())
    stacks = [name for name in result.masks if ".experts." in name]
    weights = dict(model.named_parameters())
    held = sum(value.numel() for name, value in weights.items() if ".experts." in name)
    assert sum(result.masks[name].numel() for name in stacks) > 0.95 * held
    prune(dense_experts, tokens(), dense="experts.*")
    found = [perplexity(each, text, window=64).perplexity for each in (model, dense_experts)]
    assert all(1 < value < 2 * species.VOCABULARY for value in found)
    assert found[0] != found[1]


# --- what is kept of the inputs -----------------------------------------------------------------------------


def statistics(method: str, layer: nn.Module, exact: bool = False) -> Statistics:
    return Statistics(Layer("x", layer), PRUNING_METHODS[method], exact)


def test_methods_keep_what_they_need():
    layer = nn.Linear(2048, 8)
    size = {method: statistics(method, layer).nbytes() for method in PRUNING_METHODS}
    assert size["sparsegpt"] == size["alps"] == 4 * 2048**2
    assert size["wanda"] == size["ria"] == 4 * 2048 * (1 + SAMPLE)
    assert size["magnitude"] == 4 * 2048 * SAMPLE
    assert statistics("wanda", layer, exact=True).nbytes() == 4 * 2048**2


def test_a_sample_is_drawn_evenly():
    """Each of the tokens has the same chance, whichever batch it is in."""
    layer = nn.Linear(1, 1)
    hits = torch.zeros(8)
    for seed in range(30):
        found = statistics("wanda", layer)
        found._draw.manual_seed(seed)
        for k in range(8):
            found.add(torch.full((SAMPLE // 2, 1), float(k)))
        hits += found.sample[0, :, 0].long().bincount(minlength=8)
        assert found.error_tokens() == SAMPLE
    expected = hits.sum() / 8
    assert ((hits - expected).abs() < 6 * expected.sqrt()).all()


def test_the_error_of_a_sample_is_near_that_of_all_tokens():
    data = torch.randn(6000, 16) * torch.arange(1, 17)
    sampled, exact = (
        prune(mlp(), data, "2:4", batch_size=1000, exact_error=x, samples=6000) for x in (False, True)
    )
    for a, b in zip(sampled.report.layers, exact.report.layers, strict=True):
        assert (a.error_tokens, b.error_tokens) == (SAMPLE, 6000)
        assert a.relative_error == pytest.approx(b.relative_error, rel=0.2)
        assert (sampled.masks[f"{a.name}.weight"] != exact.masks[f"{a.name}.weight"]).float().mean() < 0.02


@pytest.mark.parametrize("option", ["all_experts", "exact_error"])
def test_options_that_are_no_bool(option):
    with pytest.raises(nmsolve.NMSolveError, match=f"{option}: expected True or False, got 1"):
        prune_model(mlp(), torch.randn(4, 16), "2:4", **{option: 1}, **QUICK)
