"""A pattern may be given as ``"8:16"``, ``(8, 16)``, an NMPattern or n and m, wherever one is taken."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import nmsolve
import nmsolve.permute
import nmsolve.prune
import nmsolve.train
from nmsolve import NMPattern, NMSolveError
from nmsolve.integrations.client import MissingClientError

SURFACE = json.loads(Path(__file__).with_name("public_surface.json").read_text(encoding="utf-8"))
SCORES = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
MASK = nmsolve.transposable_mask(SCORES, 2, 4, backend="torch")


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def saved(given: object, tmp_path: Path) -> dict[str, torch.Tensor]:
    nmsolve.save_masks(tmp_path / "m.masks.safetensors", {"w": MASK}, given)
    return load_file(tmp_path / "m.masks.safetensors")


def checkpoint(given: object, tmp_path: Path, command: str) -> dict[str, torch.Tensor]:
    from nmsolve.checkpoint import mask_checkpoint
    from nmsolve.permute.on_disk import permute_checkpoint

    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    names = ("mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight")
    save_file({name: SCORES.clone() for name in names}, source)
    work = mask_checkpoint if command == "mask" else permute_checkpoint
    work(source, out, given, progress=False, overwrite=True)
    return load_file(out)


def pruned(given: object) -> dict[str, torch.Tensor]:
    model = nn.Sequential(layer())
    result = nmsolve.prune.prune_model(
        model, None, given, method="magnitude", backend="torch", progress=False
    )
    assert nmsolve.prune.FixedMasks(model, result.masks).operands(given)
    return dict(result.masks)


def trained(given: object) -> dict[str, torch.Tensor]:
    return nmsolve.train.SparseTraining(nn.Sequential(layer()), given, backend="torch").masks


def sparsified(given: object) -> torch.Tensor:
    from nmsolve.integrations.torch_ao import NMSparsifier

    model = nn.Sequential(layer())
    sparsifier = NMSparsifier(given)
    sparsifier.prepare(model, config=None)
    sparsifier.step()
    sparsifier.squash_mask()
    return model[0].weight


def from_torch_prune(given: object, name: str) -> torch.Tensor:
    from nmsolve.integrations import torch_prune

    module = layer()
    if name == "NMPruning":
        torch_prune.NMPruning.apply(module, "weight", given)
    else:
        torch_prune.nm_structured(module, "weight", given)
    return module.weight


def learned(*given: object) -> dict[str, torch.Tensor]:
    found = nmsolve.permute.learn_permutation(
        tiny_models.make("llama"), list(tiny_models.tokens().split(2)), *given, steps=0
    )
    return found.permutations


def duals(given: object) -> torch.Tensor:
    solution = nmsolve.transposable_mask(SCORES, 2, 4, backend="torch", return_solution=True)
    return nmsolve.dual_bound(SCORES, solution.row_duals, solution.col_duals, given)


# What is done with n and m, or with a pattern; what needs a folder has it as ``tmp_path``.
IN_TWO = {
    "nmsolve.check_mask": lambda *given: nmsolve.check_mask(MASK, *given),
    "nmsolve.nm_mask": lambda *given: nmsolve.nm_mask(SCORES, *given, backend="torch"),
    "nmsolve.transposable_mask": lambda *given: nmsolve.transposable_mask(SCORES, *given, backend="torch"),
    "nmsolve.transposable_masks": lambda *given: nmsolve.transposable_masks([SCORES], *given)[0],
    "nmsolve.permute.learn_permutation": learned,
    "nmsolve.permute.retained_score": lambda *given: nmsolve.permute.retained_score(SCORES, *given),
    "nmsolve.permute.ria_permutation": lambda *given: nmsolve.permute.ria_permutation(SCORES, *given),
    "nmsolve.permute.stripe_search": lambda *given: nmsolve.permute.stripe_search(SCORES, *given),
    "nmsolve.permute.swap_search": lambda *given: nmsolve.permute.swap_search(SCORES, *given),
    "nmsolve.permute.transposable_permutation": lambda *given: (
        nmsolve.permute.transposable_permutation(SCORES, *given, backend="torch").columns
    ),
}
IN_ONE = {
    "nmsolve.dual_bound": duals,
    "nmsolve.kept_score": lambda given: nmsolve.kept_score(SCORES, MASK, given)[0],
    "nmsolve.save_masks": saved,
    "nmsolve.prune.MaskRule": lambda given: nmsolve.prune.MaskRule(given, backend="torch").choose(SCORES),
    "nmsolve.prune.prune_model": pruned,
    "nmsolve.train.SparseTraining": trained,
    "nmsolve.integrations.torch_ao.NMSparsifier": sparsified,
    "nmsolve.integrations.torch_prune.NMPruning": lambda given: from_torch_prune(given, "NMPruning"),
    "nmsolve.integrations.torch_prune.nm_structured": lambda given: from_torch_prune(given, "nm_structured"),
    "nmsolve.checkpoint.mask_checkpoint": lambda given, tmp_path: checkpoint(given, tmp_path, "mask"),
    "nmsolve.permute.permute_checkpoint": lambda given, tmp_path: checkpoint(given, tmp_path, "permute"),
}
# Those that speak as their clients do: apex's names of patterns, and calculators of its own. And a result.
OTHERS = {
    "nmsolve.integrations.apex_asp.create_mask",
    "nmsolve.integrations.apex_asp.mask_calculator",
    "nmsolve.train.LayerMetrics",
}

FORMS = ("2:4", " 2 : 4 ", (2, 4), [2, 4], NMPattern(2, 4))
WRONG = ("half", "2-4", "4:2", (2, 4, 8), (2.0, 4), ("2", "4"), 2.5, None, b"2:4", (True, 4))


def outcome(name: str, given: tuple[object, ...], tmp_path: Path) -> object:
    work = IN_TWO.get(name) or IN_ONE[name]
    if "tmp_path" in inspect.signature(work).parameters:
        return work(*given, tmp_path=tmp_path)
    return work(*given)


def as_tensors(found: object) -> dict[object, torch.Tensor]:
    return dict(found) if isinstance(found, dict) else {None: found}


@pytest.mark.parametrize("name", [*IN_TWO, *IN_ONE])
def test_every_form_is_the_same(name, tmp_path):
    if "llama" in inspect.getsource(IN_TWO.get(name) or IN_ONE[name]):
        pytest.importorskip("transformers")
    first = (2, 4) if name in IN_TWO else (NMPattern(2, 4),)
    expected = as_tensors(outcome(name, first, tmp_path))
    for form in FORMS:
        found = as_tensors(outcome(name, (form,), tmp_path))
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert value is None if expected[key] is None else torch.equal(value, expected[key]), form
    for wrong in WRONG:
        if wrong is None and name == "nmsolve.prune.prune_model":
            continue
        with pytest.raises(NMSolveError, match=r"expected|keeps"):
            outcome(name, (wrong,), tmp_path)
    if name in IN_TWO:
        for wrong in (("2:4", 8), ("2", 4), (2, "4"), (2,), (2, (2, 4)), (2.0, 4)):
            with pytest.raises(NMSolveError, match="expected"):
                outcome(name, wrong, tmp_path)


def test_every_public_function_that_takes_a_pattern_is_here():
    for name, parameters in SURFACE["signatures"].items():
        if "pattern" in parameters or {"n", "m"} <= set(parameters):
            assert name in {*IN_TWO, *IN_ONE, *OTHERS, "nmsolve.NMPattern"}, name


def test_blocks_and_groups():
    blocks = SCORES.unfold(0, 4, 4).unfold(1, 4, 4).reshape(-1, 4, 4)
    expected = nmsolve.solve_blocks(blocks, 2, backend="torch").mask
    for form in FORMS:
        assert torch.equal(nmsolve.solve_blocks(blocks, form, backend="torch").mask, expected)
    with pytest.raises(NMSolveError, match="m: expected 8 or none beside the pattern 2:8, got 4"):
        nmsolve.solve_blocks(blocks, "2:8")
    with pytest.raises(NMSolveError, match="m: expected an integer, got '2:4'"):
        nmsolve.permute.deal_columns(SCORES, "2:4")


@pytest.mark.parametrize("form", ["2:4", "2:4 sparsity", (2, 4)])
def test_modelopt(form):
    try:
        modelopt = importlib.import_module("nmsolve.integrations.modelopt")
    except MissingClientError as error:
        pytest.skip(str(error))
    assert modelopt._rule({"pattern": form}).pattern == NMPattern(2, 4)
