"""Many architectures: the right tensors are masked, along the right axis, under the names that they have.

A few run by default, all of ``species.ZOO`` with ``-m slow``.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import species
import torch
import zoo
from safetensors.torch import load_file
from torch import nn

import nmsolve
from nmsolve.checkpoint import mask_checkpoint
from nmsolve.checkpoint.roles import is_conv1d, roles_of
from nmsolve.prune import prune_checkpoint, prune_model
from nmsolve.prune.layers import find_stacks

transformers = pytest.importorskip("transformers")

# An embedding tied to the head; a base that has its head inside; GPT-2 inside another model; tensors that are
# renamed, split and joined; routers of two forms; an embedding and a head whose names say nothing.
FEW = ("bart", "fsmt", "gpt2encdec", "vit", "dinov2", "mixtral", "dbrx", "ctrl", "rwkv")

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(few=FEW):
    return [name if name in few else pytest.param(name, marks=pytest.mark.slow) for name in species.ZOO]


def saved(name: str, folder: Path) -> Path:
    zoo.build(name).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def loaded(name: str, folder: Path) -> nn.Module:
    """The model in a folder, once it is certain that every weight of it was there."""
    kind = getattr(transformers, species.ZOO[name].kind)
    model, found = kind.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["mismatched_keys"]
    return model


def last(weight: str) -> str:
    return [part for part in weight.removesuffix(".weight").split(".") if not part.isdigit()][-1]


def check_inputs(model: nn.Module, dense: nn.Module, n: int, m: int) -> int:
    """Of every ``m`` inputs in a row, each output of a changed layer sees ``n`` at most. Returns how many."""
    count = 0
    of_experts = {layer.weight_name: layer for layer in find_stacks(model, roles_of(model))}
    before_of = dict(dense.named_parameters())
    for name, layer in of_experts.items():
        seen = layer.matrices(layer.weight)
        if not torch.equal(layer.weight, before_of[name]):
            count += layer.groups * layer.parts
            assert int((seen != 0).unflatten(-1, (-1, m)).sum(-1).max()) <= n
    for (name, layer), (_, before) in zip(model.named_modules(), dense.named_modules(), strict=True):
        if f"{name}.weight" in of_experts:
            continue
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor) or torch.equal(weight, before.weight):
            continue
        count += 1
        if isinstance(layer, nn.Conv1d | nn.Conv2d):
            seen = weight.flatten(2).permute(0, 2, 1)
        else:
            assert isinstance(layer, nn.Linear) or is_conv1d(layer)
            size = weight.shape[0 if is_conv1d(layer) else 1]
            both = torch.cat([torch.eye(size), torch.zeros(1, size)])
            out = layer(both)
            seen = (out[:-1] - out[-1:]).abs().gt(1e-7).T
        assert seen.shape[-1] % m == 0
        assert int((seen != 0).unflatten(-1, (-1, m)).sum(-1).max()) <= n
    return count


@pytest.mark.parametrize("name", rows())
def test_mask_and_prune_agree(name, tmp_path):
    row, source = species.ZOO[name], saved(name, tmp_path / "in")
    options = {"backend": "torch", "device": "cpu", "progress": False}
    report = mask_checkpoint(source, tmp_path / "masked", "4:8", **options)
    assert report.settings["chosen_by"].startswith(f"modules of {row.kind} of transformers")
    prune_checkpoint(source, tmp_path / "pruned", "4:8", method="magnitude", picture=False, **options)

    by_mask, by_prune = (nmsolve.load_masks(tmp_path / folder) for folder in ("masked", "pruned"))
    assert {last(weight) for weight in by_mask} == set((row.masked + " " + row.experts).split())
    # Experts that are one tensor without ".weight" are pruned by default, masked where they are named.
    joint = {weight for weight in by_prune if not weight.endswith(".weight")}
    assert by_prune.keys() - joint == by_mask.keys()
    assert {last(weight) for weight in joint} <= {"gate_up_proj", "down_proj"}
    stay = {
        last(x.name)
        for x in report.skipped
        if len(x.shape) > 1 and x.name.endswith(".weight") and "smaller than one block" not in x.reason
    }
    assert stay == set(row.dense.split())

    before = tensors(source)
    for folder, masks in (("masked", by_mask), ("pruned", by_prune)):
        after = tensors(tmp_path / folder)
        assert masks.keys() <= before.keys() == after.keys()
        for weight, tensor in before.items():
            kept = masks.get(weight, torch.ones((), dtype=torch.bool))
            assert torch.equal(after[weight], torch.where(kept, tensor, 0))
        loaded(name, tmp_path / folder)
    for weight, mask in by_mask.items():
        assert torch.equal(mask, by_prune[weight])

    dense, pruned = loaded(name, source), loaded(name, tmp_path / "pruned")
    assert check_inputs(pruned, dense, 4, 8) >= len(by_prune)

    again = {"initial_masks": tmp_path / "masked", "method": "magnitude", "picture": False}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        prune_checkpoint(source, tmp_path / "again", "4:8", **again, **options)
    assert not [w for w in told if "not used, of what stays dense" in str(w.message)]
    kept = nmsolve.load_masks(tmp_path / "again")
    assert kept.keys() == by_prune.keys()
    assert all(torch.equal(kept[weight], mask) for weight, mask in by_prune.items())


@pytest.mark.parametrize("name", rows(("bart", "vit", "ctrl")))
def test_wanda(name, tmp_path):
    model, row = zoo.build(name), species.ZOO[name]
    dense = zoo.build(name)
    result = prune_model(
        model, zoo.batches(name), "4:8", transposable=False, method="wanda", backend="torch", progress=False
    )
    assert check_inputs(model, dense, 4, 8) >= len(result.masks)
    result.save(model, tmp_path / "out", picture=False)
    masks, held = nmsolve.load_masks(tmp_path / "out"), tensors(tmp_path / "out")
    named = set((row.masked + " " + row.experts).split())
    assert {last(weight) for weight in masks if weight.endswith(".weight")} <= named
    for weight, mask in masks.items():
        assert torch.equal(held[weight] != 0, mask)
    loaded(name, tmp_path / "out")


def test_the_page_lists_the_zoo():
    """docs/models.md has a line for each architecture; this is what it is to say."""
    lines = (
        f"| `{row.kind}` | {row.masked} | {row.dense} | {row.experts} |"
        for row in sorted(species.ZOO.values(), key=lambda row: row.kind)
    )
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    listed = [line for line in page.splitlines() if line.startswith("| `")]
    assert listed == list(dict.fromkeys(lines))
