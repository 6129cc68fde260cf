r"""Channel permutations learned from calibration data, by two published methods on one module.

Both learn one matrix of logits per block of channels; :func:`nmsolve.sinkhorn` makes it a doubly stochastic
plan P and :func:`nmsolve.assignment` a permutation H. Position is the row, channel the column: the reordered
weight is ``W P^T``, and ``P`` takes a mask back to the channels' own order. With N:M mask ``M`` of the
reordered scores:

* **"permllm"** (arXiv 2510.10136): blocks of 64, the forward pass uses H and the gradient that of P
  (straight-through). The layer's weight is ``W * (M H)``; M follows the scores through the softmax of each
  group. The loss is one minus the cosine similarity of the dense and the sparse model's last hidden states.
* **"cost-matrix"** (arXiv 2601.22980): four blocks, the soft plan itself in training: the weight is
  ``(M * (W P^T)) P``. The loss is the task's cross-entropy plus distillation of every layer's hidden states.

Unlike the papers' codes, both start from a given order (RIA's by default): the logits begin with the identity
on top, so that the first permutation is that order and learning can only be kept where it helps on held-out
data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from nmsolve.errors import NMSolveError
from nmsolve.masks import nm_mask, transposable_mask
from nmsolve.matching import assignment
from nmsolve.pattern import NMPattern
from nmsolve.permute.couplings import Coupling, Site, find_couplings
from nmsolve.permute.heuristics import check_permutation, ria_permutation
from nmsolve.plans import sinkhorn
from nmsolve.staging import Staging

__all__ = [
    "STRATEGIES",
    "LearnableChannelPermutation",
    "LearnedPermutations",
    "learn_permutation",
    "wanda_scores",
]

Strategy = Literal["permllm", "cost-matrix"]
Batch = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class _Settings:
    """A strategy's constants: block size, Sinkhorn iterations, temperatures, start of the identity, rate."""

    iterations: int
    temperature: tuple[float, float]
    lead: float
    learning_rate: float


STRATEGIES: Mapping[str, _Settings] = {
    "permllm": _Settings(iterations=5, temperature=(1.0, 0.1), lead=0.25, learning_rate=0.03),
    "cost-matrix": _Settings(iterations=20, temperature=(0.1, 0.03), lead=1.0, learning_rate=0.03),
}

_BLOCK = 64
_GROUPS = 4


class LearnableChannelPermutation(nn.Module):
    """A permutation of channels, block by block, that gradients can change.

    Parameters
    ----------
    channels : int
    strategy : {"permllm", "cost-matrix"}
        Blocks of 64 with hard plans, or 4 blocks with soft plans.
    block : int, optional
        Channels of a block; divides ``channels``. By default the largest divisor up to 64, or a quarter.
    heads : int
        Independent sets of ``channels`` channels.
    seed : int
        Of the logits' noise.

    Attributes
    ----------
    logits : Parameter
        float32 ``(heads * channels / block, block, block)``; the cost matrix is their negative.
    temperature : float
        Of the plan; annealed by :func:`learn_permutation`.

    Examples
    --------
    >>> module = LearnableChannelPermutation(128)
    >>> torch.equal(module.permutation(), torch.arange(128))
    True
    >>> module.plan().shape
    torch.Size([2, 64, 64])
    """

    def __init__(
        self,
        channels: int,
        *,
        strategy: Strategy = "permllm",
        block: int | None = None,
        heads: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if strategy not in STRATEGIES:
            raise NMSolveError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self.settings = STRATEGIES[strategy]
        if block is None:
            limit = _BLOCK if strategy == "permllm" else max(1, channels // _GROUPS)
            block = next(size for size in range(min(limit, channels), 0, -1) if channels % size == 0)
        if block < 1 or channels % block:
            raise NMSolveError(f"block: expected a divisor of channels={channels}, got {block!r}")
        self.strategy = strategy
        self.channels, self.block, self.heads = channels, block, heads
        self.temperature = self.settings.temperature[0]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(heads * channels // block, block, block, generator=generator) - 0.5
        eye = self.settings.lead * torch.eye(block)
        self.logits = nn.Parameter(noise * min(self.settings.lead, 1 / math.sqrt(block)) + eye)

    def plan(self) -> Tensor:
        """The doubly stochastic plans ``(blocks, block, block)``: share of each channel at each position."""
        return sinkhorn(self.logits, temperature=self.temperature, iterations=self.settings.iterations)

    def forward(self) -> Tensor:
        """The plans to train with: hard with the gradient of the soft ones, or soft ones."""
        plan = self.plan()
        if self.strategy == "cost-matrix":
            return plan
        return self.hard() + plan - plan.detach()

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The permutation matrices ``(blocks, block, block)`` nearest to the plans."""
        order = assignment(self.plan().detach())
        return F.one_hot(order, self.block).to(self.logits.dtype)

    @torch.no_grad()
    def permutation(self) -> Tensor:
        """int64 ``(channels,)``, or ``(heads, channels)`` for several heads."""
        order = assignment(self.plan().detach()).view(self.heads, -1, self.block)
        start = torch.arange(0, self.channels, self.block, device=order.device).view(1, -1, 1)
        found = (order + start).flatten(1)
        return found[0] if self.heads == 1 else found

    def reorder(self, matrix: Tensor, plan: Tensor, *, back: bool = False) -> Tensor:
        """``(rows, heads * repeats * channels)`` with the plan applied to its columns, or its transpose."""
        plan = plan.to(matrix.dtype).view(self.heads, -1, self.block, self.block)
        split = matrix.unflatten(-1, (self.heads, -1, self.channels // self.block, self.block))
        return torch.einsum("ohrgk,hgkj->ohrgj" if back else "ohrgj,hgkj->ohrgk", split, plan).flatten(1)

    def masked(
        self, weight: Tensor, scores: Tensor, plan: Tensor, pattern: NMPattern, transposable: bool
    ) -> Tensor:
        """The pruned weight in the channels' own order, differentiable in ``plan``.

        ``weight`` and ``scores`` are ``(out, in)``, columns ``(heads, repeats, channels)``.
        """
        if self.strategy == "cost-matrix":
            mask = _mask(self.reorder(scores, plan.detach()), pattern, transposable)
            return self.reorder(self.reorder(weight, plan) * mask, plan, back=True)
        ordered = self.reorder(scores, plan)
        mask = _mask(ordered.detach(), pattern, transposable).to(weight.dtype)
        full = ordered.shape[1] // pattern.m * pattern.m
        groups = ordered[:, :full].unflatten(1, (-1, pattern.m))
        spread = groups.detach().std(dim=-1, keepdim=True).mean().clamp_min(torch.finfo(scores.dtype).tiny)
        soft = F.pad((groups / spread).softmax(-1).flatten(1) * pattern.n, (0, ordered.shape[1] - full))
        return weight * self.reorder(mask + soft - soft.detach(), plan, back=True)


def _mask(scores: Tensor, pattern: NMPattern, transposable: bool) -> Tensor:
    if transposable:
        return transposable_mask(scores, pattern.n, pattern.m)
    return nm_mask(scores, pattern.n, pattern.m)


@dataclass
class LearnedPermutations:
    """What :func:`learn_permutation` found.

    Attributes
    ----------
    permutations : dict of str to Tensor
        Name of the coupling to its permutation, as :func:`~nmsolve.permute.apply_permutations` takes them.
    history : list of dict
        For every check: ``step``, ``loss`` (mean of the training losses since the last check, None at step 0)
        and ``held_out`` (loss of the hard permutations on the held-out batches).
    best_step : int
        The check whose permutations were taken; 0 is the order that learning started from.
    """

    permutations: dict[str, Tensor]
    history: list[dict[str, float | int | None]] = field(default_factory=list)
    best_step: int = 0


def wanda_scores(model: nn.Module, calibration: Sequence[Batch], tensors: Sequence[str]) -> dict[str, Tensor]:
    """Wanda's scores ``|W_ij| * ||x_j||`` (arXiv 2306.11695) of linear layers.

    Parameters
    ----------
    model : nn.Module
    calibration : sequence of Tensor or mapping
        Batches for the model.
    tensors : sequence of str
        Names of the layers' weights.

    Returns
    -------
    dict of str to Tensor
        float32 scores of each weight's own shape.
    """
    squares: dict[str, Tensor] = {}
    handles = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            squares[name] = squares.get(name, 0) + x.square().sum(0)

        return hook

    for name in tensors:
        layer = model.get_submodule(name.removesuffix(".weight"))
        handles.append(layer.register_forward_pre_hook(watch(name)))
    try:
        with torch.no_grad():
            for batch in calibration:
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for name in tensors:
        weight = model.get_parameter(name).detach().float()
        norm = squares[name].sqrt()
        scores[name] = weight.abs() * (
            norm if weight.shape[-1] == len(norm) and not _input_first(model, name) else norm[:, None]
        )
    return scores


def _input_first(model: nn.Module, name: str) -> bool:
    return type(model.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


class _Masked(nn.Module):
    """The parametrisation that puts the pruned weight in the dense one's place."""

    def __init__(self, trainer: _Trainer, part: _Part, site: Site) -> None:
        super().__init__()
        # Kept from the module tree: the permutations are no part of the model.
        self._owners = (trainer, part, site)
        axis = 1 - site.axis
        index = part.coupling.index(part.base, site)
        scores = trainer.scores[site.tensor].movedim(axis, 0)[:, index]
        self.ordered: Tensor
        self.index: Tensor
        self.inverse: Tensor
        self.register_buffer("ordered", scores, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("inverse", index.argsort(), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        trainer, part, site = self._owners
        if not trainer.sparse:
            return weight
        matrix = weight if site.axis == 1 else weight.T
        pruned = part.module.masked(
            matrix[:, self.index], self.ordered, part.plan, trainer.pattern, trainer.transposable
        )[:, self.inverse]
        return pruned if site.axis == 1 else pruned.T


@dataclass
class _Part:
    """One coupling in training: its order at the start, its module, and the plans of the present step."""

    coupling: Coupling
    base: Tensor
    module: LearnableChannelPermutation
    plan: Tensor

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
    transposable: bool = False,
    steps: int = 50,
    learning_rate: float | None = None,
    distillation: float = 1.0,
    held_out: float = 0.25,
    check_every: int = 10,
    patience: int = 3,
    seed: int = 0,
    task_loss: Callable[[Any, Batch], Tensor] | None = None,
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
    transposable : bool
        Train for transposable masks.
    steps : int
        One batch each. The published runs take 50 passes over 128 x 1024 tokens.
    learning_rate : float, optional
        Of AdamW, with a cosine schedule (0.03; the papers take smaller ones for many more steps).
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
            scores = wanda_scores(model, train, tensors)
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
            parts.append(_Part(coupling, base.clone(), module, torch.empty(0)))
        trainer = _Trainer(model, parts, pattern, strategy, scores, transposable, distillation, task_loss)
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


def _run(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _next_token_loss(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy of each next token, from ``output.logits`` and the batch's token numbers."""
    logits = getattr(output, "logits", output)
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch
    if not isinstance(logits, Tensor) or tokens.dtype != torch.int64 or logits.ndim != 3:
        raise NMSolveError(
            "task_loss: expected a function (output, batch) -> loss, as this is no language model"
        )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


class _Trainer:
    """The training loop's state; ``sparse`` tells the parametrisations whether to prune."""

    def __init__(
        self,
        model: nn.Module,
        parts: list[_Part],
        pattern: NMPattern,
        strategy: str,
        scores: Mapping[str, Tensor],
        transposable: bool,
        distillation: float,
        task_loss: Callable[[Any, Batch], Tensor] | None,
    ) -> None:
        self.model, self.parts, self.pattern, self.scores = model, parts, pattern, scores
        self.transposable, self.distillation = transposable, distillation
        self.soft = strategy == "cost-matrix"
        self.task_loss = task_loss or _next_token_loss
        self.sparse = False
        lists = [list(child) for child in model.modules() if isinstance(child, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
        # "permllm" needs the last hidden state only, and nothing behind the model's trunk.
        self.watched: list[nn.Module] = layers if self.soft else layers[-1:]
        self.runs = model if self.soft or not layers else getattr(model, "base_model", model)
        self.dense: dict[int, list[Tensor]] = {}

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
        modules = [part.module for part in self.parts]
        settings = modules[0].settings
        logits = [module.logits for module in modules]
        optimizer = torch.optim.AdamW(logits, lr=learning_rate or settings.learning_rate, weight_decay=0.0)
        rate = optimizer.param_groups[0]["lr"]
        found = LearnedPermutations({})
        first = 0
        if resume is not None and resume.exists():
            first = self._load(resume, optimizer, found)
        else:
            self._check(found, 0, None, test)
        from tqdm import tqdm

        losses: list[float] = []
        for step in tqdm(range(first, steps), initial=first, total=steps, disable=not progress, unit="step"):
            share = step / max(1, steps - 1)
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            high, low = settings.temperature
            for part in self.parts:
                part.module.temperature = high + (low - high) * share
                part.plan = part.module()
            k = step % len(train)
            loss = self._loss(k, train[k], train=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if (step + 1) % check_every == 0 or step + 1 == steps:
                self._check(found, step + 1, sum(losses) / len(losses), test)
                losses.clear()
                if resume is not None:
                    self._save(resume, optimizer, found, step + 1)
                checks = [row["step"] for row in found.history]
                if len(checks) - 1 - checks.index(found.best_step) >= patience:
                    break
        return found

    def _check(self, found: LearnedPermutations, step: int, loss: float | None, test: list[Batch]) -> None:
        """The held-out loss of the hard permutations; the best ones so far are kept in ``found``."""
        with torch.no_grad():
            for part in self.parts:
                part.plan = part.module.hard()
            value = sum(float(self._loss(-1 - k, batch, train=False)) for k, batch in enumerate(test)) / len(
                test
            )
        best = min((float(row["held_out"] or 0) for row in found.history), default=math.inf)
        found.history.append({"step": step, "loss": loss, "held_out": value})
        if value < best:
            found.best_step = step
            found.permutations = {part.coupling.name: part.permutation() for part in self.parts}

    def _loss(self, key: int, batch: Batch, train: bool) -> Tensor:
        if key not in self.dense:
            self.sparse = False
            with torch.no_grad():
                self.dense[key] = self._hidden(batch)[1]
        self.sparse = True
        output, hidden = self._hidden(batch)
        pairs = list(zip(hidden, self.dense[key], strict=True))
        if not self.soft:
            ours, dense = pairs[-1]
            return (1 - F.cosine_similarity(ours.float(), dense.float(), dim=-1)).mean()
        loss = self.task_loss(output, batch)
        if train and self.distillation:
            distances = [F.smooth_l1_loss(ours.float(), dense.float()) for ours, dense in pairs]
            loss = loss + self.distillation * torch.stack(distances).mean()
        return loss

    def _hidden(self, batch: Batch) -> tuple[Any, list[Tensor]]:
        """The model's output, and those of the watched layers (of the model itself if it has no list)."""
        seen: dict[nn.Module, Tensor] = {}

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            seen[module] = output[0] if isinstance(output, tuple) else output

        handles = [layer.register_forward_hook(hook) for layer in self.watched]
        try:
            output = _run(self.runs, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not self.watched:
            return output, [getattr(output, "logits", output)]
        return output, [seen[layer] for layer in self.watched]

    def _save(
        self, path: Path, optimizer: torch.optim.Optimizer, found: LearnedPermutations, step: int
    ) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for k, part in enumerate(self.parts):
            tensors[f"{k}.logits"] = part.module.logits.detach().clone()
            tensors[f"{k}.base"] = part.base
            tensors[f"{k}.best"] = found.permutations[part.coupling.name].contiguous()
            state = optimizer.state[part.module.logits]
            tensors[f"{k}.exp_avg"], tensors[f"{k}.exp_avg_sq"] = state["exp_avg"], state["exp_avg_sq"]
        text = json.dumps({"history": found.history, "best": found.best_step, "run": self._fingerprint()})
        with Staging(path) as staging:
            metadata = {"format": "nmsolve learning 1", "step": str(step), "state": text}
            save_file(tensors, staging.path / path.name, metadata=metadata)
            staging.publish_files([path.name], replace=True)

    def _load(self, path: Path, optimizer: torch.optim.Optimizer, found: LearnedPermutations) -> int:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = json.loads(metadata.get("state", "{}"))
            if metadata.get("format") != "nmsolve learning 1" or state["run"] != self._fingerprint():
                raise NMSolveError(f"resume: {path} holds the state of another run")
            step = int(metadata["step"])
            for k, part in enumerate(self.parts):
                device = part.base.device
                part.base.copy_(file.get_tensor(f"{k}.base"))
                with torch.no_grad():
                    part.module.logits.copy_(file.get_tensor(f"{k}.logits"))
                optimizer.state[part.module.logits] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"{k}.exp_avg").to(device),
                    "exp_avg_sq": file.get_tensor(f"{k}.exp_avg_sq").to(device),
                }
                found.permutations[part.coupling.name] = file.get_tensor(f"{k}.best").to(device)
        found.history, found.best_step = state["history"], state["best"]
        return step

    def _fingerprint(self) -> dict[str, object]:
        names = [part.coupling.name for part in self.parts]
        strategy = "cost-matrix" if self.soft else "permllm"
        kind = "transposable" if self.transposable else "ordinary"
        return {"couplings": names, "pattern": str(self.pattern), "strategy": strategy, "mask": kind}
