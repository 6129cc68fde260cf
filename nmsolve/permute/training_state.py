"""What learning permutations has found so far, and the file from which it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from nmsolve.checkpoint.format import read_shard
from nmsolve.errors import NMSolveError
from nmsolve.files import replacing

__all__ = ["LearnedPermutations", "State", "load_state", "save_state"]

_FORMAT = "nmsolve learning 3"

# Before the tensors of the best permutations found so far.
_BEST = "best."


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

    def add(
        self, step: int, loss: float | None, held_out: float, kept: float, permutations: dict[str, Tensor]
    ) -> None:
        """A further check, and its permutations if they are the best so far."""
        best = min((float(row["held_out"] or 0) for row in self.history), default=math.inf)
        self.history.append({"step": step, "loss": loss, "held_out": held_out, "kept": kept})
        if held_out < best:
            self.best_step, self.permutations = step, permutations

    def checks_since_best(self) -> int:
        """How often the held-out loss has been taken since it was lowest."""
        steps = [row["step"] for row in self.history]
        return len(steps) - 1 - steps.index(self.best_step)


@dataclass(frozen=True)
class State:
    """Where a run is.

    Attributes
    ----------
    run : mapping
        What two runs must have in common for one to go on where the other ended; JSON.
    found : LearnedPermutations
    step : int
        Steps made.
    tensors, numbers : mapping
        The trainer's own.
    """

    run: Mapping[str, object]
    found: LearnedPermutations
    step: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float] = field(default_factory=dict)


def save_state(path: Path, state: State) -> None:
    """Writes what :func:`load_state` needs; whole or not at all."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in state.tensors.items()}
    for name, order in state.found.permutations.items():
        tensors[f"{_BEST}{name}"] = order.contiguous()
    history, best = state.found.history, state.found.best_step
    text = json.dumps({"history": history, "best": best, "run": state.run, "numbers": state.numbers})
    with replacing(path) as partial:
        save_file(tensors, partial, metadata={"format": _FORMAT, "step": str(state.step), "state": text})


def load_state(path: Path, run: Mapping[str, object]) -> State:
    """What a file of :func:`save_state` holds.

    Raises
    ------
    NMSolveError
        If it is the state of another run than this one.
    """
    from safetensors.torch import load_file

    metadata = read_shard(path).metadata
    try:
        said = json.loads(metadata["state"])
        same = metadata["format"] == _FORMAT and said["run"] == run
    except (KeyError, TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise NMSolveError(f"resume: {path} holds the state of another run")
    tensors = load_file(path)
    orders = {name.removeprefix(_BEST): tensors.pop(name) for name in [*tensors] if name.startswith(_BEST)}
    found = LearnedPermutations(orders, said["history"], said["best"])
    return State(run, found, int(metadata["step"]), tensors, said["numbers"])
