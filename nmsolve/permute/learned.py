"""Channel permutations learned from calibration data: the training loop.

All couplings of a model are trained together, for one loss at its end. :mod:`nmsolve.permute.module` has what
is learned for one set of channels, :mod:`nmsolve.permute.objective` the losses. Three things differ from the
papers' codes, so that few steps on few tokens are worth making:

* Both strategies start from a given order (RIA's by default): the logits begin with the identity on top. What
  is taken in the end is the order with the lowest loss on held-out batches, the start's among them.
* The logits follow the gradient's running mean, divided in every block by its largest entry, and not Adam's
  rule, whose steps are as long for entries that are noise as for those that matter.
* With a floor, logits that have come to keep less score are drawn back towards where they began.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from nmsolve.errors import NMSolveError
from nmsolve.gather import permute_columns
from nmsolve.matching import assignment
from nmsolve.pattern import NMPattern
from nmsolve.permute.calibration import calibration_scores
from nmsolve.permute.couplings import Coupling, Site, find_couplings
from nmsolve.permute.heuristics import check_permutation, ria_permutation
from nmsolve.permute.module import LearnableChannelPermutation, Strategy, kept_score, pruned_in_order
from nmsolve.permute.objective import Batch, Objective, TaskLoss
from nmsolve.staging import Staging

__all__ = ["LearnedPermutations", "learn_permutation"]

# Of the gradient's running mean.
_MOMENTUM = 0.8

# Of a channel at a position, below which float32 gradients say nothing.
_LEAST_SHARE = 1e-6

# Of the way back to the start when a floor is not kept: to 1/16 of it.
_BISECTIONS = 4


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


class _Masked(nn.Module):
    """The parametrisation that puts the pruned weight in the dense one's place."""

    def __init__(self, trainer: _Trainer, part: _Part, site: Site) -> None:
        super().__init__()
        # Kept from the module tree: the permutations are no part of the model.
        self._owners = (trainer, part, site)
        index = part.coupling.index(part.base, site)
        scores = trainer.scores[site.tensor].movedim(1 - site.axis, 0)
        self.scores: Tensor
        self.index: Tensor
        self.inverse: Tensor
        self.register_buffer("scores", scores.index_select(1, index), persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inverse", index.argsort(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The dense weight, or the pruned one: differentiable in the plans, or for the hard permutations."""
        trainer, part, site = self._owners
        if not trainer.sparse:
            return weight
        matrix = (weight if site.axis == 1 else weight.T).index_select(1, self.index)
        settings = (trainer.pattern, trainer.transposable)
        if part.plan is None:
            order = part.coupling.index(part.module.permutation(), site)
            pruned = pruned_in_order(matrix, self.scores, order, *settings)
        else:
            pruned = part.module.masked(matrix, self.scores, part.plan, *settings)
        pruned = permute_columns(pruned, self.inverse)
        return pruned if site.axis == 1 else pruned.T


@dataclass
class _Part:
    """One coupling in training: its order at the start, its module, its logits at the start.

    ``average`` is the running mean of their gradient, ``plan`` what the present step takes; without it the
    hard permutation is taken.
    """

    coupling: Coupling
    base: Tensor
    module: LearnableChannelPermutation
    first: Tensor
    average: Tensor = field(init=False)
    plan: Tensor | None = None

    def __post_init__(self) -> None:
        self.average = torch.zeros_like(self.first)

    def permutation(self) -> Tensor:
        learned = self.module.permutation()
        return self.base.gather(-1, learned)


def learn_permutation(
    model: nn.Module,
    calibration: Sequence[Batch],
    n: int,
    m: int,
    *,
    strategy: Strategy = "permllm",
    couplings: Sequence[Coupling] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
    floor: Mapping[str, Tensor] | None = None,
    transposable: bool = False,
    steps: int = 50,
    learning_rate: float | None = None,
    distillation: float = 1.0,
    held_out: float = 0.25,
    check_every: int = 10,
    patience: int = 3,
    seed: int = 0,
    task_loss: TaskLoss | None = None,
    resume: Path | str | None = None,
    progress: bool = False,
) -> LearnedPermutations:
    """Learns the order of channels for which the pruned model is closest to the dense one.

    The model's weights are frozen and unchanged afterwards; only permutations are trained, all together.

    Parameters
    ----------
    model : nn.Module
        Called as ``model(batch)`` for tensors and ``model(**batch)`` for mappings.
    calibration : sequence of Tensor or mapping
        At least two batches; the last ones are held out.
    n, m : int
        Pattern.
    strategy : {"permllm", "cost-matrix"}
        See the module's docstring.
    couplings : sequence of Coupling, optional
        Which channels to learn (all linear layers of :func:`~nmsolve.permute.find_couplings`).
    scores : mapping of str to Tensor, optional
        One-shot scores of the consumers' weights (Wanda's on the batches that are not held out).
    start : mapping of str to Tensor, optional
        Order to start from, for each coupling (RIA's channel permutation).
    floor : mapping of str to Tensor, optional
        Orders, as in ``start``, whose kept score (all couplings together) the permutations must reach.
    transposable : bool
        Train for transposable masks.
    steps : int
        One batch each. The published runs take 50 passes over 128 x 1024 tokens.
    learning_rate : float, optional
        The longest step of a logit, which falls to zero along a cosine (0.1, or 0.4 for "cost-matrix").
    distillation : float
        Weight of the smooth L1 distance of hidden states, for "cost-matrix".
    held_out : float
        Share of the batches for early stopping, at least one.
    check_every, patience : int
        Held-out loss is taken every so many steps; training ends when it has not fallen for ``patience``
        checks.
    seed : int
        Of the logits' noise.
    task_loss : callable, optional
        ``(output, batch) -> loss`` for "cost-matrix"; by default the next token's cross-entropy.
    resume : path, optional
        File that keeps the state at every check. If it is there, training goes on from it.
    progress : bool
        Show a progress bar.

    Returns
    -------
    LearnedPermutations
        Those of the lowest held-out loss, which includes the start's: learning never ends worse on it.

    Raises
    ------
    NMSolveError
        If an argument is not as described.
    """
    pattern = NMPattern(n, m)
    batches = list(calibration)
    if len(batches) < 2:
        raise NMSolveError(f"calibration: expected two batches or more, got {len(batches)}")
    if not 0 < held_out < 1:
        raise NMSolveError(f"held_out: expected a share between 0 and 1, got {held_out!r}")
    if steps < 0 or check_every < 1 or patience < 1:
        raise NMSolveError("steps, check_every, patience: expected at least 0, 1 and 1")
    kept = max(1, round(held_out * len(batches)))
    train, test = batches[:-kept], batches[-kept:]
    if not train:
        raise NMSolveError(f"held_out: {held_out} leaves no batch of {len(batches)} to train on")
    chosen = list(find_couplings(model) if couplings is None else couplings)
    if couplings is None:
        chosen = [c for c in chosen if all(_is_linear(model, site) for site in c.consumers)]
    if not chosen:
        raise NMSolveError("couplings: expected at least one; none was found in this model")
    tensors = [site.tensor for coupling in chosen for site in coupling.consumers]
    with _evaluation(model):
        if scores is None:
            scores = calibration_scores(model, train, tensors)
        scores = {name: scores[name].detach().float() for name in tensors}
        parts = []
        for k, coupling in enumerate(chosen):
            if start is not None and coupling.name in start:
                base = check_permutation(start[coupling.name], coupling.size, f"start[{coupling.name!r}]")
            else:
                base = ria_permutation(coupling.scores(scores), n, m)
            module = LearnableChannelPermutation(
                coupling.size, strategy=strategy, heads=coupling.heads, seed=seed + k
            ).to(base.device)
            parts.append(_Part(coupling, base.clone(), module, module.logits.detach().clone()))
        objective = Objective(
            model, task=strategy == "cost-matrix", distillation=distillation, task_loss=task_loss
        )
        trainer = _Trainer(model, parts, objective, pattern, scores, transposable)
        if floor is not None:
            trainer.demand(floor)
        with trainer.installed():
            return trainer.fit(
                train, test, steps, learning_rate, check_every, patience, _resume_path(resume), progress
            )


def _resume_path(resume: Path | str | None) -> Path | None:
    return None if resume is None else Path(resume).absolute()


def _is_linear(model: nn.Module, site: Site) -> bool:
    layer = model.get_submodule(site.tensor.removesuffix(".weight"))
    return isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and frozen parameters, both as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, wanted in grads.items():
            parameter.requires_grad_(wanted)


class _Trainer:
    """The training loop's state; ``sparse`` tells the parametrisations whether to prune."""

    def __init__(
        self,
        model: nn.Module,
        parts: list[_Part],
        objective: Objective,
        pattern: NMPattern,
        scores: Mapping[str, Tensor],
        transposable: bool,
    ) -> None:
        self.model, self.parts, self.objective = model, parts, objective
        self.pattern, self.scores, self.transposable = pattern, scores, transposable
        self.sparse = False
        self.total = sum(float(scores[name].double().sum()) for name in self._tensors())
        self.floor = -math.inf

    def _tensors(self) -> list[str]:
        return [site.tensor for part in self.parts for site in part.coupling.consumers]

    def demand(self, floor: Mapping[str, Tensor]) -> None:
        """From now on permutations keep at least what the orders ``floor`` keep."""
        missing = [p.coupling.name for p in self.parts if p.coupling.name not in floor]
        if missing:
            raise NMSolveError(f"floor: expected an order for every coupling; {missing[0]!r} has none")
        orders = {name: check_permutation(order, order.shape[-1], "floor") for name, order in floor.items()}
        self.floor = self._kept(orders)
        start = self._kept(self._permutations())
        if start < self.floor:
            raise NMSolveError(f"floor: the start keeps {start:.6f} of the score, less than {self.floor:.6f}")

    def _permutations(self) -> dict[str, Tensor]:
        return {part.coupling.name: part.permutation() for part in self.parts}

    def _kept(self, orders: Mapping[str, Tensor]) -> float:
        """Share of all scores that masks in these orders keep."""
        kept = 0.0
        for part in self.parts:
            for site in part.coupling.consumers:
                index = part.coupling.index(orders[part.coupling.name], site)
                scores = self.scores[site.tensor].movedim(1 - site.axis, 0)
                kept += kept_score(scores, index, self.pattern, self.transposable)
        return kept / self.total

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Puts the parametrisations in place, and takes them away."""
        done: list[nn.Module] = []
        try:
            for part in self.parts:
                for site in part.coupling.consumers:
                    layer = self.model.get_submodule(site.tensor.removesuffix(".weight"))
                    masked = _Masked(self, part, site)
                    parametrize.register_parametrization(layer, "weight", masked, unsafe=True)
                    done.append(layer)
            yield
        finally:
            self.sparse = False
            for layer in done:
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    def fit(
        self,
        train: list[Batch],
        test: list[Batch],
        steps: int,
        learning_rate: float | None,
        check_every: int,
        patience: int,
        resume: Path | None,
        progress: bool,
    ) -> LearnedPermutations:
        settings = self.parts[0].module.settings
        rate = settings.learning_rate if learning_rate is None else learning_rate
        found = LearnedPermutations({})
        first = 0
        if resume is not None and resume.exists():
            first = self._load(resume, found)
        else:
            self._check(found, 0, None, test)
        from tqdm import tqdm

        losses: list[float] = []
        for step in tqdm(range(first, steps), initial=first, total=steps, disable=not progress, unit="step"):
            share = step / max(1, steps - 1)
            high, low = settings.temperature
            for part in self.parts:
                part.module.temperature = high + (low - high) * share
                part.plan = part.module()
            k = step % len(train)
            loss = self._loss(k, train[k], train=True)
            loss.backward()
            self._descend(rate * 0.5 * (1 + math.cos(math.pi * step / steps)))
            losses.append(float(loss.detach()))
            if (step + 1) % check_every == 0 or step + 1 == steps:
                self._check(found, step + 1, sum(losses) / len(losses), test)
                losses.clear()
                if resume is not None:
                    self._save(resume, found, step + 1)
                checks = [row["step"] for row in found.history]
                if len(checks) - 1 - checks.index(found.best_step) >= patience:
                    break
        return found

    @torch.no_grad()
    def _descend(self, rate: float) -> None:
        """One step of every block's logits, at most ``rate`` long.

        Entries of the present permutation stay: theirs is the sum of the gradients of all that compete with
        them, beside which no single one would move. The gradient through a soft plan has the plan's entries
        as factors; they are taken out (mirror descent), as they would silence whatever is not there yet.
        """
        soft = self.parts[0].module.strategy == "cost-matrix"
        for part in self.parts:
            logits, plan = part.module.logits, part.module.plan()
            assert logits.grad is not None
            gradient = logits.grad / plan.clamp_min(_LEAST_SHARE) if soft else logits.grad
            part.average.lerp_(gradient, 1 - _MOMENTUM)
            move = part.average * (1 - F.one_hot(assignment(plan), part.module.block).to(plan.dtype))
            largest = move.abs().amax((1, 2), keepdim=True)
            logits.sub_(move / largest.clamp_min(torch.finfo(logits.dtype).tiny), alpha=rate)
            logits.grad = None

    @torch.no_grad()
    def _draw_back(self) -> float:
        """Moves the logits towards their start until the floor is kept; the share of the score then kept."""
        kept = self._kept(self._permutations())
        if kept >= self.floor:
            return kept
        reached = [part.module.logits.clone() for part in self.parts]
        low, high = 0.0, 1.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            self._set_logits(reached, middle)
            low, high = (middle, high) if self._kept(self._permutations()) >= self.floor else (low, middle)
        self._set_logits(reached, low)
        return self._kept(self._permutations())

    def _set_logits(self, reached: Sequence[Tensor], share: float) -> None:
        for part, logits in zip(self.parts, reached, strict=True):
            part.module.logits.copy_(torch.lerp(part.first, logits, share))

    @torch.no_grad()
    def _check(self, found: LearnedPermutations, step: int, loss: float | None, test: list[Batch]) -> None:
        """The held-out loss of the hard permutations; the best ones so far are kept in ``found``."""
        kept = self._draw_back()
        for part in self.parts:
            part.plan = None
        losses = [float(self._loss(-1 - k, batch, train=False)) for k, batch in enumerate(test)]
        value = sum(losses) / len(losses)
        best = min((float(row["held_out"] or 0) for row in found.history), default=math.inf)
        found.history.append({"step": step, "loss": loss, "held_out": value, "kept": kept})
        if value < best:
            found.best_step = step
            found.permutations = self._permutations()

    def _loss(self, key: int, batch: Batch, train: bool) -> Tensor:
        self.sparse = False
        self.objective.remember(key, batch)
        self.sparse = True
        return self.objective.loss(key, batch, train=train)

    def _save(self, path: Path, found: LearnedPermutations, step: int) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for k, part in enumerate(self.parts):
            tensors[f"{k}.logits"] = part.module.logits.detach().clone()
            tensors[f"{k}.base"] = part.base
            tensors[f"{k}.best"] = found.permutations[part.coupling.name].contiguous()
            tensors[f"{k}.first"], tensors[f"{k}.average"] = part.first, part.average
        text = json.dumps({"history": found.history, "best": found.best_step, "run": self._fingerprint()})
        with Staging(path) as staging:
            metadata = {"format": "nmsolve learning 2", "step": str(step), "state": text}
            save_file(tensors, staging.path / path.name, metadata=metadata)
            staging.publish_files([path.name], replace=True)

    def _load(self, path: Path, found: LearnedPermutations) -> int:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = json.loads(metadata.get("state", "{}"))
            if metadata.get("format") != "nmsolve learning 2" or state["run"] != self._fingerprint():
                raise NMSolveError(f"resume: {path} holds the state of another run")
            step = int(metadata["step"])
            for k, part in enumerate(self.parts):
                part.base.copy_(file.get_tensor(f"{k}.base"))
                part.first.copy_(file.get_tensor(f"{k}.first"))
                part.average.copy_(file.get_tensor(f"{k}.average"))
                with torch.no_grad():
                    part.module.logits.copy_(file.get_tensor(f"{k}.logits"))
                found.permutations[part.coupling.name] = file.get_tensor(f"{k}.best").to(part.base.device)
        found.history, found.best_step = state["history"], state["best"]
        return step

    def _fingerprint(self) -> dict[str, object]:
        names = [part.coupling.name for part in self.parts]
        strategy = self.parts[0].module.strategy
        kind = "transposable" if self.transposable else "ordinary"
        return {"couplings": names, "pattern": str(self.pattern), "strategy": strategy, "mask": kind}
