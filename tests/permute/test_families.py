"""Every family of docs/permutation.md: what folds, and that random orders leave the dense model as it was.

A few run by default, all of ``coupled.FAMILIES`` with ``-m slow``.
"""

from __future__ import annotations

import coupled
import pytest
import torch

import nmsolve
from nmsolve import NMSolveError
from nmsolve.permute import apply_permutations, find_couplings, permute_checkpoint, retained_score

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

# Values after queries and keys, by head and by group of heads; gates in halves and in turn, transposed or
# not; parts with their own heads; convolutions with norms between.
FEW = ("phi3", "gpt_neox", "falcon 40b", "t5 gated", "clip", "resnet bottleneck", "gpt_oss", "llama4")
FEW_ON_DISK = ("mixtral", "whisper", "resnet basic")


def marked(few):
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in coupled.FAMILIES]


def last(name):
    return [part for part in name.split(".") if not part.isdigit()][-1]


def random_order(coupling, seed):
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(coupling.size, generator=generator) for _ in range(coupling.heads)]
    return torch.stack(orders).view(coupling.shape)


@pytest.mark.parametrize("name", marked(FEW))
def test_random_orders_leave_the_model_as_it_was(name):
    model = coupled.build(name)
    before = coupled.outputs(name, model)
    found = [coupling for coupling in find_couplings(model) if coupling.folds]
    assert sorted(last(c.name) for c in found) == sorted(coupled.FAMILIES[name].folds.split())
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    orders = {coupling.name: random_order(coupling, seed) for seed, coupling in enumerate(found)}
    done = apply_permutations(model, orders, couplings=found, how="fold")
    for one in done:
        assert all(not torch.equal(model.state_dict()[tensor], kept[tensor]) for tensor in one.tensors)
    assert (coupled.outputs(name, model) - before).abs().max() < 1e-9 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize("name", marked(FEW_ON_DISK))
def test_a_checkpoint_on_disk_computes_what_it_did(name, tmp_path):
    model = coupled.build(name)
    model.save_pretrained(tmp_path / "in")
    report = permute_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", passes=1, progress=False)
    family = coupled.FAMILIES[name]
    assert sorted(last(row["name"]) for row in report.couplings) == sorted(
        (family.stored or family.folds).split()
    )
    assert any(row["after"] > row["before"] for row in report.couplings)
    before, after = (
        coupled.outputs(
            name, coupled.exact(type(model).from_pretrained(tmp_path / at, dtype="float64").eval())
        )
        for at in ("in", "out")
    )
    assert (after - before).abs().max() < 1e-9 * max(1.0, float(before.abs().max()))


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("mixtral", -1),
        ("gpt_oss", 0),
        pytest.param("llama4", 0, marks=pytest.mark.slow),
        pytest.param("dbrx", 0, marks=pytest.mark.slow),
    ],
)
def test_scores_of_experts_are_what_their_masks_will_see(name, inputs):
    model = coupled.build(name)
    of_experts = [c for c in find_couplings(model) if c.heads == 4 and "experts" in c.name]
    if not of_experts and name == "mixtral":
        pytest.skip("this transformers keeps the experts in layers of their own")
    (coupling,) = of_experts
    parameter = model.get_parameter(coupling.consumers[0].tensor).detach()
    order = random_order(coupling, 0)
    scores = coupling.scores({coupling.consumers[0].tensor: parameter.abs()})
    assert scores.shape[0] == 4
    expected = retained_score(scores, 2, 4, order)
    apply_permutations(model, {coupling.name: order}, how="fold")
    weight = parameter.abs().unflatten(0, (4, -1)) if parameter.ndim == 2 else parameter.abs()
    for expert, total in zip(weight.unbind(0), expected, strict=True):
        matrix = expert.movedim(inputs, -1)
        kept = (matrix * nmsolve.nm_mask(matrix.contiguous(), 2, 4)).sum()
        assert float(kept) == pytest.approx(float(total), rel=1e-12)
    with pytest.raises(NMSolveError, match="a run-time gather exists for linear layers"):
        apply_permutations(model, {coupling.name: torch.arange(4 * coupling.size)})


TRANSPOSABLE = ("gpt_oss", "phi3", "gpt_neox", "deepseek_v3", "dbrx", "granitemoe", "resnet bottleneck")


@pytest.mark.parametrize(
    "name",
    [name if name == "gpt_oss" else pytest.param(name, marks=pytest.mark.slow) for name in TRANSPOSABLE],
)
def test_transposable_masks_keep_more_and_the_checkpoint_computes_the_same(name, tmp_path):
    coupled.build(name).save_pretrained(tmp_path / "in")
    report = permute_checkpoint(
        tmp_path / "in", tmp_path / "out", "2:4", transposable=True, passes=1, progress=False
    )
    totals = report.totals()
    assert totals["before"] < totals["after"] < totals["score"]
    kind = type(coupled.build(name))
    before, after = (
        coupled.outputs(name, coupled.exact(kind.from_pretrained(tmp_path / at, dtype="float64").eval()))
        for at in ("in", "out")
    )
    assert (after - before).abs().max() < 1e-9 * max(1.0, float(before.abs().max()))
