"""What test_llmcompressor.py runs in two processes: oneshot on parts of the samples, against the whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
import zoo
from compressed_tensors.offload import dispatch_with_map
from datasets import Dataset
from gloo import run_cases
from llmcompressor import oneshot
from tokenizers import Tokenizer, models
from torch import distributed, nn

import nmsolve
from nmsolve.integrations.llmcompressor import TransposableSparseGPTModifier, TransposableWandaModifier

PROCESSES = 2
DENSE = ["re:.*lm_head", "re:.*gate$"]


def recipe(method: str, **options: Any) -> Any:
    kind = {"wanda": TransposableWandaModifier, "sparsegpt": TransposableSparseGPTModifier}[method]
    return kind(mask_structure="12:16", **{"ignore": DENSE} | options)


def prune(model: nn.Module, tokens: torch.Tensor, modifier: Any, **options: Any) -> nn.Module:
    """``model`` after oneshot on these samples."""
    words = {f"w{k}": k for k in range(tiny_models.VOCABULARY)}
    warnings.simplefilter("ignore")
    return oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist()}),
        processor=transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words))),
        recipe=modifier,
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
        **options,
    )


def load(folder: str, kind: str) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder, kind))


def compare(folder: str, model: nn.Module, expected: str) -> None:
    """The weights against those of one process with all samples."""
    wanted = torch.load(Path(folder, f"{expected}.pt"), weights_only=True)
    found = model.state_dict()
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name] != 0, weight != 0), name
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6, msg=name)


def half() -> torch.Tensor:
    """This process's samples: not equally many."""
    return tiny_models.tokens().tensor_split([3])[distributed.get_rank()]


def of_llama(method: str, offloaded: str | None, folder: str) -> None:
    model = load(folder, "llama")
    if offloaded is not None:
        cpu = torch.device("cpu")
        where = {name: (cpu, offloaded) for name, _ in model.named_modules()}
        dispatch_with_map(model, where, offload_dir=folder, show_progress=False)
    compare(folder, prune(model, half(), recipe(method)), method)


def of_experts(folder: str) -> None:
    """Each only with the tokens that are routed to it, which not every process has."""
    compare(folder, with_routing(load(folder, "mixtral"), half()), "experts")


def with_routing(model: nn.Module, tokens: torch.Tensor) -> nn.Module:
    return prune(model, tokens, recipe("sparsegpt", dampening_frac=0.1), moe_calibrate_all_experts=False)


def of_a_failure(folder: str) -> None:
    """It ends all, with the process and the layer."""
    target = "model.layers.0.self_attn.q_proj"
    before = "" if distributed.get_rank() == 0 else "rank 0: "
    with pytest.raises(nmsolve.NMSolveError, match=f"^{before}{target}: damping"):
        prune(load(folder, "llama"), half(), recipe("sparsegpt", targets=[target], dampening_frac=-1.0))


CASES: dict[str, Callable[[str], None]] = {
    "wanda": partial(of_llama, "wanda", None),
    "sparsegpt": partial(of_llama, "sparsegpt", None),
    "sparsegpt, in shared memory": partial(of_llama, "sparsegpt", "cpu"),
    "sparsegpt, on disk": partial(of_llama, "sparsegpt", "disk"),
    "experts": of_experts,
    "failure": of_a_failure,
}


def work(names: tuple[str, ...], rank: int, processes: int, folder: str) -> None:
    run_cases({name: partial(CASES[name], folder) for name in names}, rank, processes, folder)


def expect(folder: Path, names: tuple[str, ...]) -> None:
    """The models, and what one process with all samples makes of them."""
    tiny_models.make("llama").save_pretrained(folder / "llama")
    zoo.build("mixtral").save_pretrained(folder / "mixtral")
    tokens = tiny_models.tokens()
    for method in ("wanda", "sparsegpt"):
        if any(name.startswith(method) for name in names):
            model = prune(load(str(folder), "llama"), tokens, recipe(method))
            torch.save(model.state_dict(), folder / f"{method}.pt")
    if "experts" in names:
        model = with_routing(load(str(folder), "mixtral"), tokens)
        torch.save(model.state_dict(), folder / "experts.pt")
