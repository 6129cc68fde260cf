"""The training loop of channel permutations: all couplings of a model together, for one loss at its end.

:mod:`nmsolve.permute.module` has what is learned for one set of channels and how its pruned weight follows
from it, :mod:`nmsolve.permute.objective` the losses. Three things differ from the papers' codes, so that few
steps on few tokens are worth making:

* Both strategies of logits start from a given order (RIA's by default): the logits begin with the identity on
  top. What is taken in the end is the order with the lowest loss on held-out batches, the start's among them.
* The logits follow the gradient's running mean, divided in every block by its largest entry, and not Adam's
  rule, whose steps are as long for entries that are noise as for those that matter.
* With a floor, logits that have come to keep less score are drawn back towards where they began.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from nmsolve.ops.assignment import assignment
from nmsolve.permute.objective import Batch, Objective
from nmsolve.permute.pruned_model import PrunedModel
from nmsolve.permute.training_state import LearnedPermutations, State, load_state, save_state

__all__ = ["Trainer", "Training", "TrainingPlan"]

# Of the gradient's running mean.
_MOMENTUM = 0.8

# Of a channel at a position, below which float32 gradients say nothing.
_LEAST_SHARE = 1e-6

# Of the way back to the start when a floor is not kept: to 1/16 of it.
_BISECTIONS = 4


@dataclass(frozen=True)
class TrainingPlan:
    """How long to train; as the parameters of :func:`nmsolve.permute.learn_permutation`."""

    steps: int
    learning_rate: float
    check_every: int
    patience: int

    def rate(self, step: int) -> float:
        """The longest way of a logit in this step: a cosine that falls to zero."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Training(ABC):
    """The loop that all strategies share: a batch a step, checks on what is held out, and its file."""

    def fit(
        self, train: list[Batch], test: list[Batch], plan: TrainingPlan, resume: Path | None, progress: bool
    ) -> LearnedPermutations:
        """One batch of ``train`` a step, and checks on ``test``; ``resume`` gets the state at every check."""
        if resume is not None and resume.exists():
            found, first = self._load(load_state(resume, self._run()))
        else:
            found, first = LearnedPermutations({}), 0
            self._check(found, 0, None, test)
        from tqdm import tqdm

        steps, losses = range(first, plan.steps), list[float]()
        for step in tqdm(steps, initial=first, total=plan.steps, disable=not progress, unit="step"):
            losses.append(self._step(step, step % len(train), train[step % len(train)], plan))
            if (step + 1) % plan.check_every == 0 or step + 1 == plan.steps:
                self._check(found, step + 1, sum(losses) / len(losses), test)
                losses.clear()
                if resume is not None:
                    save_state(resume, self._state(found, step + 1))
                if found.checks_since_best() >= plan.patience:
                    break
        return found

    @abstractmethod
    def _step(self, step: int, key: int, batch: Batch, plan: TrainingPlan) -> float:
        """One step, on the batch that the objective knows as ``key``; its loss before."""

    @abstractmethod
    def _check(
        self, found: LearnedPermutations, step: int, loss: float | None, test: Sequence[Batch]
    ) -> None:
        """The held-out loss; the best permutations so far are kept in ``found``."""

    @abstractmethod
    def _run(self) -> dict[str, object]:
        """What two runs must have in common for one to go on where the other ended."""

    @abstractmethod
    def _state(self, found: LearnedPermutations, step: int) -> State:
        """What :meth:`_load` needs."""

    @abstractmethod
    def _load(self, state: State) -> tuple[LearnedPermutations, int]:
        """Puts the trainer where it was; what it had found, and the steps that it had made."""


class Trainer(Training):
    """Learns the parts' logits; permutations keep at least the share ``floor`` of the score."""

    def __init__(self, model: PrunedModel, objective: Objective, floor: float) -> None:
        self.model, self.parts, self.objective = model, model.parts, objective
        self.floor = floor

    def _step(self, step: int, key: int, batch: Batch, plan: TrainingPlan) -> float:
        high, low = self.parts[0].module.constants.temperature
        for part in self.parts:
            part.module.temperature = high + (low - high) * (step / max(1, plan.steps - 1))
            part.plan = part.module()
        loss = self._loss(key, batch, train=True)
        loss.backward()
        self._descend(plan.rate(step))
        return float(loss.detach())

    @torch.no_grad()
    def _descend(self, rate: float) -> None:
        """One step of every block's logits, at most ``rate`` long.

        Entries of the present permutation stay: theirs is the sum of the gradients of all that compete with
        them, beside which no single one would move. The gradient through a soft plan has the plan's entries
        as factors; they are taken out (mirror descent), as they would silence whatever is not there yet.
        """
        soft = self.parts[0].module.constants.soft
        for part in self.parts:
            logits, plan = part.module.logits, part.module.plan()
            if logits.grad is None:  # a layer that the loss does not reach keeps its start
                continue
            gradient = logits.grad / plan.clamp_min(_LEAST_SHARE) if soft else logits.grad
            part.average.lerp_(gradient, 1 - _MOMENTUM)
            move = part.average * (1 - F.one_hot(assignment(plan), part.module.block).to(plan.dtype))
            largest = move.abs().amax((1, 2), keepdim=True)
            logits.sub_(move / largest.clamp_min(torch.finfo(logits.dtype).tiny), alpha=rate)
            logits.grad = None

    @torch.no_grad()
    def _check(
        self, found: LearnedPermutations, step: int, loss: float | None, test: Sequence[Batch]
    ) -> None:
        """The held-out loss of the hard permutations; the best ones so far are kept in ``found``."""
        kept = self._draw_back()
        for part in self.parts:
            part.plan = None
        losses = [float(self._loss(-1 - k, batch, train=False)) for k, batch in enumerate(test)]
        found.add(step, loss, sum(losses) / len(losses), kept, self.model.permutations())

    def _draw_back(self) -> float:
        """Moves the logits towards their start until the floor is kept; the share of the score then kept."""
        kept = self._kept()
        if kept >= self.floor:
            return kept
        reached = [part.module.logits.clone() for part in self.parts]
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self._set_logits(reached, middle)
            low, high = (middle, high) if self._kept() >= self.floor else (low, middle)
        self._set_logits(reached, low)
        return self._kept()

    def _kept(self) -> float:
        return self.model.kept(self.model.permutations())

    def _set_logits(self, reached: Sequence[Tensor], share: float) -> None:
        """A ``share`` of the way from the start to ``reached``."""
        for part, logits in zip(self.parts, reached, strict=True):
            part.module.logits.copy_(torch.lerp(part.first, logits, share))

    def _loss(self, key: int, batch: Batch, train: bool) -> Tensor:
        if self.objective.needs_dense:
            self.model.sparse = False
            self.objective.remember(key, batch)
        self.model.sparse = True
        return self.objective.loss(key, batch, train=train)

    # --- the state that a run goes on from ------------------------------------------------------------------

    def _run(self) -> dict[str, object]:
        return {
            "couplings": [part.coupling.name for part in self.parts],
            "pattern": str(self.model.pattern),
            "strategy": self.parts[0].module.strategy,
            "blocks": [part.module.block for part in self.parts],
            "mask": "transposable" if self.model.transposable else "ordinary",
        }

    def _state(self, found: LearnedPermutations, step: int) -> State:
        tensors: dict[str, Tensor] = {}
        for k, part in enumerate(self.parts):
            tensors[f"{k}.logits"], tensors[f"{k}.base"] = part.module.logits, part.base
            tensors[f"{k}.first"], tensors[f"{k}.average"] = part.first, part.average
        return State(self._run(), found, step, tensors)

    @torch.no_grad()
    def _load(self, state: State) -> tuple[LearnedPermutations, int]:
        for k, part in enumerate(self.parts):
            part.module.logits.copy_(state.tensors[f"{k}.logits"])
            part.base.copy_(state.tensors[f"{k}.base"])
            part.first.copy_(state.tensors[f"{k}.first"])
            part.average.copy_(state.tensors[f"{k}.average"])
        return state.found, state.step
