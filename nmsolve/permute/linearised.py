r"""Learning by moves: the loss of the pruned model made linear in its masks, and exact assignments on it.

Let W be a weight and M its mask. To first order the loss falls by ``u = - dL/d(M W) * W`` where an entry is
kept that was pruned, and rises by it the other way. In a group, masks go by the scores and not by u; what a
column is worth in another group's slot is therefore the sum of u over the rows in which its score would be
kept there, less that of the entries that it displaces (:mod:`nmsolve.permute.insertions`). One assignment for
every slot finds the best of all ways to give columns to groups for these values: the oracle of Frank and
Wolfe's method, on permutations.

**Trust region.** The whole way to the best vertex changes a quarter of the mask, far beyond what a gradient
says anything about. Every entry is therefore charged for being changed: ``damping`` times its curvature ``W^2
f x``, f the mean square of the gradient at its output and x that of its input (the diagonal of a
Kronecker-factored Fisher matrix). Dear entries hardly move, and damping is chosen in every step so that the
loss is to fall, to first order, by a small share of itself, ``rate``.

**Noise.** Gradient and curvature are running means over the batches of the last few steps. Orders have few
degrees of freedom beside weights: a column moves in all of its rows at once, whose noise averages out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nmsolve.permute.masked_weights import MaskedModel
from nmsolve.permute.objective import Batch, Objective
from nmsolve.permute.training import Training, TrainingPlan
from nmsolve.permute.training_state import LearnedPermutations, State

__all__ = ["LinearisedTrainer"]

# Of the running means.
_MOMENTUM = 0.75

# The promised fall may be so many times the one that is aimed at, or that part of it.
_TOLERANCE = 2.0

# How often damping is chosen anew for a step, and its factors until there is a bracket.
_TRIES, _FACTOR = 4, 1.5
_FIRST_TRIES, _FIRST_FACTOR = 12, 8.0


class LinearisedTrainer(Training):
    """Learns the orders of a model's parts."""

    def __init__(self, model: MaskedModel, objective: Objective, seed: int) -> None:
        self.model, self.objective, self.seed = model, objective, seed
        self.damping = math.nan
        self.steps_made = 0

    def _step(self, step: int, key: int, batch: Batch, plan: TrainingPlan) -> float:
        loss = self._measure(key, batch)
        self._move(step, plan.rate(step) * abs(loss))
        return loss

    def _measure(self, key: int, batch: Batch) -> float:
        """The loss of a batch; its gradient goes into the running means."""
        share = 1 - _MOMENTUM
        self.steps_made += 1
        self._remember(key, batch)
        with self.model.watched(share), torch.enable_grad():
            loss = self.objective.loss(key, batch, train=True)
            (loss * share).backward()
        return float(loss.detach())

    def _move(self, step: int, target: float) -> None:
        """Moves columns so that the loss is to fall by about ``target``, to first order."""
        begun = self.steps_made > 1
        if not begun:
            self.damping = self._first_damping()
        target *= 1 - _MOMENTUM**self.steps_made  # as much is in the means
        low, high = 0.0, math.inf
        best: tuple[float, float, list[Tensor]] | None = None
        for _ in range(_TRIES if begun else _FIRST_TRIES):
            generator = torch.Generator().manual_seed(self.seed + step)
            found = [self.model.better(part, self.damping, generator) for part in self.model.parts]
            fall = sum(fall for _, fall in found)
            if fall <= _TOLERANCE * target and (best is None or fall > best[0]):
                best = fall, self.damping, [order for order, _ in found]
            if fall > _TOLERANCE * target:
                low = self.damping
            elif fall < target / _TOLERANCE:
                high = self.damping
            else:
                break
            factor = _FACTOR if begun else _FIRST_FACTOR
            if 0 < low < high < math.inf:
                self.damping = math.sqrt(low * high)
            else:
                self.damping = low * factor if low else high / factor
        if best is not None:
            _, self.damping, orders = best
            for part, order in zip(self.model.parts, orders, strict=True):
                self.model.reorder(part, order)

    def _first_damping(self) -> float:
        """Where typical entries cost what they gain."""
        ratios = []
        for weight in self.model.weights():
            gain, cost = (
                weight.first_order().square().mean().sqrt(),
                weight.curvature().square().mean().sqrt(),
            )
            if float(gain) > 0 and float(cost) > 0:
                ratios.append(float(gain) / float(cost))
        return sorted(ratios)[len(ratios) // 2] if ratios else 1.0

    def _remember(self, key: int, batch: Batch) -> None:
        if self.objective.needs_dense:
            self.model.show(dense=True)
            self.objective.remember(key, batch)
            self.model.show(dense=False)

    @torch.no_grad()
    def _check(
        self, found: LearnedPermutations, step: int, loss: float | None, test: Sequence[Batch]
    ) -> None:
        """The held-out loss; the best orders so far are kept in ``found``."""
        values = []
        for k, batch in enumerate(test):
            self._remember(-1 - k, batch)
            values.append(float(self.objective.loss(-1 - k, batch, train=False)))
        found.add(step, loss, sum(values) / len(values), self.model.kept(), self.model.permutations())

    # --- the state that a run goes on from ------------------------------------------------------------------

    def _run(self) -> dict[str, object]:
        return {
            "couplings": [part.coupling.name for part in self.model.parts],
            "pattern": str(self.model.pattern),
            "strategy": "frank-wolfe",
            "windows": [part.window for part in self.model.parts],
            "mask": "ordinary",
        }

    def _state(self, found: LearnedPermutations, step: int) -> State:
        tensors: dict[str, Tensor] = {}
        for k, part in enumerate(self.model.parts):
            tensors[f"{k}.order"] = part.order
            for i, weight in enumerate(part.weights):
                assert weight.pruned.grad is not None
                tensors[f"{k}.{i}.gradient"] = weight.pruned.grad
                tensors[f"{k}.{i}.inputs"], tensors[f"{k}.{i}.outputs"] = weight.inputs, weight.outputs
        numbers = {"damping": self.damping, "made": self.steps_made}
        return State(self._run(), found, step, tensors, numbers)

    def _load(self, state: State) -> tuple[LearnedPermutations, int]:
        for k, part in enumerate(self.model.parts):
            self.model.reorder(part, state.tensors[f"{k}.order"].to(part.order.device))
            for i, weight in enumerate(part.weights):
                assert weight.pruned.grad is not None
                weight.pruned.grad.copy_(state.tensors[f"{k}.{i}.gradient"])
                weight.inputs.copy_(state.tensors[f"{k}.{i}.inputs"])
                weight.outputs.copy_(state.tensors[f"{k}.{i}.outputs"])
        self.damping, self.steps_made = state.numbers["damping"], int(state.numbers["made"])
        return state.found, state.step
