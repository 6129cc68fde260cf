"""Transposable masks through llmcompressor's ``oneshot``."""

from __future__ import annotations

from functools import partial

import gloo
import pytest
import tiny_models
import torch
from clients import best_score, check_counts, inputs_of, kept, linears

import nmsolve
from nmsolve.prune import MaskRule, sparsegpt

pytest.importorskip("llmcompressor")

import llmcompressor_spread
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from tokenizers import Tokenizer, models

from nmsolve.integrations.llmcompressor import TransposableSparseGPTModifier, TransposableWandaModifier

HEAD = ["re:.*lm_head"]
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """oneshot wants a model that stands in a folder."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_models.make("llama").save_pretrained(path)
    return path


@pytest.fixture
def prune(folder):
    def run(recipe, **options):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        tokens = tiny_models.tokens()
        words = {f"w{k}": k for k in range(tiny_models.VOCABULARY)}
        return oneshot(
            model=model,
            dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
            processor=transformers.PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(models.WordLevel(words))
            ),
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
        )

    return run


def test_wanda_prunes_n_of_m_both_ways(prune, folder):
    dense = tiny_models.make("llama")
    model = prune(TransposableWandaModifier(mask_structure="12:16", ignore=HEAD))
    for name, layer in linears(model):
        check_counts(layer.weight != 0, 4, 16)
        assert torch.equal(layer.weight, dense.get_submodule(name).weight * (layer.weight != 0))
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    norms = inputs_of(dense, FIRST, tiny_models.tokens()).norm(dim=0)
    scores = dense.get_submodule(FIRST).weight.detach().abs() * norms
    mask = model.get_submodule(FIRST).weight != 0
    optimum = nmsolve.transposable_mask(scores, 4, 16, return_solution=True).total_objective
    assert kept(scores, mask) == pytest.approx(optimum, rel=1e-5)
    assert kept(scores, mask) == pytest.approx(best_score(scores, 4, 16), rel=1e-5)


def test_the_pattern_counts_as_the_library_does(prune):
    ours = prune(TransposableWandaModifier(mask_structure="3:4", targets=[FIRST]))
    theirs = prune(WandaPruningModifier(sparsity=0.75, mask_structure="3:4", targets=[FIRST]))
    for model in (ours, theirs):
        kept_of_4 = (model.get_submodule(FIRST).weight != 0).view(-1, 4).sum(1)
        assert kept_of_4.unique().tolist() == [1]


def test_sparsegpt_updates_what_it_keeps(prune):
    dense = tiny_models.make("llama")
    model = prune(TransposableSparseGPTModifier(mask_structure="12:16", ignore=HEAD, dampening_frac=0.02))
    for name, layer in linears(model):
        mask = layer.weight != 0
        check_counts(mask, 4, 16)
        assert not torch.equal(layer.weight, dense.get_submodule(name).weight * mask)
    inputs = inputs_of(dense, FIRST, tiny_models.tokens())
    weight = dense.get_submodule(FIRST).weight.detach()
    expected = sparsegpt(weight, inputs.T @ inputs, MaskRule("4:16"), damping=0.02)
    found = model.get_submodule(FIRST).weight.detach()
    torch.testing.assert_close(found, expected.weight, rtol=1e-3, atol=1e-5)
    assert (inputs @ (found - weight).T).norm() < (inputs @ (weight * expected.mask - weight).T).norm()


def test_patterns_for_each_layer_and_dtype(prune):
    recipe = [
        TransposableWandaModifier(mask_structure="2:4", targets=["re:.*self_attn.*proj$"]),
        TransposableSparseGPTModifier(mask_structure="4:16", sparsity=0.25, targets=["re:.*mlp.*proj$"]),
    ]
    model = prune(recipe, dtype=torch.bfloat16)
    for name, layer in linears(model):
        assert layer.weight.dtype == torch.bfloat16
        if "mlp" in name:
            check_counts(layer.weight != 0, 12, 16)
        else:
            check_counts(layer.weight != 0, 2, 4)


def test_an_existing_mask_is_kept(prune):
    def wanda():
        return TransposableWandaModifier(mask_structure="8:16", targets=[FIRST])

    more = TransposableSparseGPTModifier(mask_structure="12:16", targets=[FIRST], preserve_sparsity_mask=True)
    first = prune(wanda()).get_submodule(FIRST).weight != 0
    both = prune([wanda(), more]).get_submodule(FIRST).weight != 0
    check_counts(first, 8, 16)
    assert not (both & ~first).any()
    blocks = both.view(2, 16, 2, 16)
    assert blocks.sum(1).max() <= 4
    assert blocks.sum(3).max() <= 4
    assert both.sum() > 32 * 32 / 4 * 0.8


def test_recipes_in_yaml_and_the_saved_model(prune, tmp_path):
    recipe = """
    test_stage:
      pruning_modifiers:
        TransposableWandaModifier:
          mask_structure: "8:16"
          ignore: ["re:.*lm_head"]
    """
    model = prune(recipe)
    model.save_pretrained(tmp_path / "sparse")
    assert "TransposableWandaModifier" in (tmp_path / "sparse" / "recipe.yaml").read_text()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, layer in linears(model):
        check_counts(layer.weight != 0, 8, 16)
        assert torch.equal(again.get_submodule(name).weight, layer.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "mask_structure"),
        ({"mask_structure": "half"}, "expected 'N:M' with N pruned of M, such as '16:32', got 'half'"),
        ({"mask_structure": "5:4"}, "pruned: expected 0 <= pruned <= m=4"),
        ({"mask_structure": "1:4", "sparsity": 0.75}, r"prunes 1 of 4, expected 0.25 or nothing, got 0.75"),
        ({"mask_structure": "1:4", "mask_method": "best"}, "mask_method: expected one of"),
        (
            {"mask_structure": "1:4", "sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.1},
            "sparsity_profile: .*expected None",
        ),
    ],
)
@pytest.mark.parametrize("modifier", [TransposableWandaModifier, TransposableSparseGPTModifier])
def test_recipes_that_are_refused(modifier, options, message):
    with pytest.raises(ValueError, match=message):
        modifier(**options)


def test_an_error_names_the_layer(prune):
    recipe = TransposableSparseGPTModifier(mask_structure="2:4", targets=[FIRST], dampening_frac=-1.0)
    with pytest.raises(
        nmsolve.NMSolveError, match=rf"{FIRST}: damping: the Hessian is not positive definite"
    ):
        prune(recipe)


@pytest.mark.parametrize(
    "names",
    [
        ("sparsegpt, on disk", "failure"),
        pytest.param(tuple(llmcompressor_spread.CASES), marks=pytest.mark.slow, id="all"),
    ],
)
def test_ranks_with_parts_of_the_samples_agree_with_one_process_that_has_all(names, tmp_path):
    """Also where they share the weights in memory or on disk, and where an expert has tokens on one alone."""
    llmcompressor_spread.expect(tmp_path, names)
    work = partial(llmcompressor_spread.work, names)
    found = gloo.outcomes(work, llmcompressor_spread.PROCESSES, tmp_path, names)
    assert found == {name: {0: None, 1: None} for name in names}
