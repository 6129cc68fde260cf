"""What learning permutations has found so far, and the file from which it goes on."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nmsolve.checkpoint.format import read_shard
from nmsolve.errors import NMSolveError
from nmsolve.files import replacing
from nmsolve.permute.pruned_model import PrunedModel

__all__ = ["LearnedPermutations", "load_state", "save_state"]

_FORMAT = "nmsolve learning 2"


@dataclass
class LearnedPermutations:
    """What :func:`learn_permutation` found.

    Attributes
    ----------
    permutations : dict of str to Tensor
        Name of the coupling to its permutation, as :func:`~nmsolve.permute.apply_permutations` takes them.
    history : list of dict
        For every check: ``step``, ``loss`` (mean of the training losses since the last check, None at step 0)
        ``held_out`` (loss of the hard permutations on the held-out batches) and ``kept`` (their kept share of
        the score).
    best_step : int
        The check whose permutations were taken; 0 is the order that learning started from.
    """

    permutations: dict[str, Tensor]
    history: list[dict[str, float | int | None]] = field(default_factory=list)
    best_step: int = 0


def save_state(path: Path, model: PrunedModel, found: LearnedPermutations, step: int) -> None:
    """Writes what :func:`load_state` needs to go on behind ``step`` steps; whole or not at all."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for k, part in enumerate(model.parts):
        tensors[f"{k}.logits"] = part.module.logits.detach().clone()
        tensors[f"{k}.base"] = part.base
        tensors[f"{k}.best"] = found.permutations[part.coupling.name].contiguous()
        tensors[f"{k}.first"], tensors[f"{k}.average"] = part.first, part.average
    text = json.dumps({"history": found.history, "best": found.best_step, "run": _fingerprint(model)})
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT, "step": str(step), "state": text})


def load_state(path: Path, model: PrunedModel) -> tuple[LearnedPermutations, int]:
    """Puts the parts in the state of the file: what had been found, and the steps that had been made.

    Raises
    ------
    NMSolveError
        If the file holds the state of another run.
    """
    from safetensors import safe_open

    metadata = read_shard(path).metadata
    try:
        state = json.loads(metadata["state"])
        same = metadata["format"] == _FORMAT and state["run"] == _fingerprint(model)
    except (KeyError, TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise NMSolveError(f"resume: {path} holds the state of another run")
    with safe_open(path, framework="pt") as file:
        found = LearnedPermutations({}, state["history"], state["best"])
        for k, part in enumerate(model.parts):
            part.base.copy_(file.get_tensor(f"{k}.base"))
            part.first.copy_(file.get_tensor(f"{k}.first"))
            part.average.copy_(file.get_tensor(f"{k}.average"))
            with torch.no_grad():
                part.module.logits.copy_(file.get_tensor(f"{k}.logits"))
            found.permutations[part.coupling.name] = file.get_tensor(f"{k}.best").to(part.base.device)
    return found, int(metadata["step"])


def _fingerprint(model: PrunedModel) -> dict[str, object]:
    """What two runs must have in common for one to go on where the other ended."""
    return {
        "couplings": [part.coupling.name for part in model.parts],
        "pattern": str(model.pattern),
        "strategy": model.parts[0].module.strategy,
        "mask": "transposable" if model.transposable else "ordinary",
    }
