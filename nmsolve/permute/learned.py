"""Channel permutations learned from calibration data: arguments checked, defaults filled in, training run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from nmsolve.checkpoint.roles import is_conv1d
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.permute.calibration import calibration_scores
from nmsolve.permute.couplings import Coupling, Site
from nmsolve.permute.heuristics import ria_permutation
from nmsolve.permute.linearised import LinearisedTrainer
from nmsolve.permute.masked_weights import MaskedModel
from nmsolve.permute.model_couplings import find_couplings
from nmsolve.permute.module import STRATEGIES, LearnableChannelPermutation
from nmsolve.permute.objective import Batch, Objective, TaskLoss
from nmsolve.permute.orders import check_permutation
from nmsolve.permute.pruned_model import Part, PrunedModel
from nmsolve.permute.strategies import LearningStrategy, check_learning
from nmsolve.permute.training import Trainer, TrainingPlan
from nmsolve.permute.training_state import LearnedPermutations
from nmsolve.permute.windows import check_window
from nmsolve.prune.arguments import check_in_memory

__all__ = ["LearnedPermutations", "check_block", "is_linear", "learn_permutation", "linear_couplings"]

# Of "frank-wolfe": the share of the loss that it is to fall by in a step, and groups of a window.
_RATE = 0.1
_WINDOW_GROUPS = 1024


def learn_permutation(
    model: nn.Module,
    calibration: Sequence[Batch],
    n: int | PatternLike,
    m: int | None = None,
    *,
    strategy: LearningStrategy = "permllm",
    block_size: int | None = None,
    groups: int | None = None,
    couplings: Sequence[Coupling] | None = None,
    scores: Mapping[str, Tensor] | None = None,
    start: Mapping[str, Tensor] | None = None,
    floor: Mapping[str, Tensor] | None = None,
    transposable: bool = False,
    steps: int = 50,
    learning_rate: float | None = None,
    distillation: float | None = None,
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
        Pattern, or in one piece, as in :func:`nmsolve.transposable_mask`.
    strategy : {"permllm", "cost-matrix", "frank-wolfe"}
        Logits of a plan, as published (:mod:`nmsolve.permute.module`), or moves by exact assignments on the
        loss made linear (:mod:`nmsolve.permute.linearised`), for ordinary masks, in tens of steps.
    block_size, groups : int, optional
        Channels move inside of blocks of so many, or of so many blocks (64 channels for "permllm", 4 blocks
        for "cost-matrix"). For "frank-wolfe" the blocks are dealt anew for every slot (up to 1,024 groups of
        the mask).
    couplings : sequence of Coupling, optional
        Which channels to learn (all linear layers of :func:`~nmsolve.permute.find_couplings`).
    scores : mapping of str to Tensor, optional
        One-shot scores of the consumers' weights (Wanda's on the batches that are not held out).
    start : mapping of str to Tensor, optional
        Order to start from, for each coupling (RIA's channel permutation).
    floor : mapping of str to Tensor, optional
        Orders, as in ``start``, whose kept score (all couplings together) the permutations must reach; not
        for "frank-wolfe".
    transposable : bool
        Train for transposable masks; not for "frank-wolfe".
    steps : int
        One batch each. The published runs take 50 passes over 128 x 1024 tokens.
    learning_rate : float, optional
        The longest step of a logit, which falls to zero along a cosine (0.1, or 0.4 for "cost-matrix"). For
        "frank-wolfe" the share of the loss that it is to fall by, to first order (0.1).
    distillation : float, optional
        Weight of the smooth L1 distance of hidden states (1 for "cost-matrix", 0 for "frank-wolfe", none for
        "permllm").
    held_out : float
        Share of the batches for early stopping, at least one.
    check_every, patience : int
        Held-out loss is taken every so many steps; training ends when it has not fallen for ``patience``
        checks.
    seed : int
        Of the logits' noise, or of the order in which columns are dealt.
    task_loss : callable, optional
        ``(output, batch) -> loss``, not for "permllm"; by default the next token's cross-entropy.
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
    pattern = NMPattern.of(n, m)
    check_learning(strategy, transposable)
    if strategy == "frank-wolfe" and floor is not None:
        raise NMSolveError(f"floor: {strategy!r} has none; its orders follow the loss and not the score")
    check_in_memory(model)
    train, test = _split(list(calibration), held_out)
    if steps < 0 or check_every < 1 or patience < 1:
        raise NMSolveError("steps, check_every, patience: expected at least 0, 1 and 1")
    chosen = linear_couplings(model, find_couplings(model)) if couplings is None else list(couplings)
    if not chosen:
        raise NMSolveError("couplings: expected at least one; none was found in this model")
    moves = strategy == "frank-wolfe"
    blocks = [check_block(coupling, block_size, groups, pattern if moves else None) for coupling in chosen]
    tensors = [site.tensor for coupling in chosen for site in coupling.consumers]
    rate = _RATE if strategy == "frank-wolfe" else STRATEGIES[strategy].learning_rate
    plan = TrainingPlan(steps, rate if learning_rate is None else learning_rate, check_every, patience)
    distance = (0.0 if moves else 1.0) if distillation is None else distillation
    state = None if resume is None else Path(resume).absolute()
    with _evaluation(model):
        if scores is None:
            scores = calibration_scores(model, train, tensors)
        scores = {name: scores[name].detach().float() for name in tensors}
        bases = []
        for coupling in chosen:
            if start is not None and coupling.name in start:
                base = check_permutation(start[coupling.name], coupling.size, f"start[{coupling.name!r}]")
            else:
                base = ria_permutation(coupling.scores(scores), pattern)
            bases.append(base)
        task = moves or STRATEGIES[strategy].soft
        objective = Objective(model, task=task, distillation=distance, task_loss=task_loss)
        if strategy == "frank-wolfe":
            sizes = [_WINDOW_GROUPS if block is None else block // pattern.m for block in blocks]
            masked = MaskedModel(model, chosen, bases, scores, pattern, sizes)
            with masked.installed():
                return LinearisedTrainer(masked, objective, seed).fit(train, test, plan, state, progress)
        parts = []
        for k, (coupling, base, block) in enumerate(zip(chosen, bases, blocks, strict=True)):
            module = LearnableChannelPermutation(
                coupling.size, strategy=strategy, block=block, heads=coupling.heads, seed=seed + k
            )
            parts.append(Part(coupling, base.clone(), module.to(base.device)))
        pruned = PrunedModel(model, parts, scores, pattern, transposable)
        least = -math.inf if floor is None else _kept_by(floor, pruned)
        with pruned.installed():
            return Trainer(pruned, objective, least).fit(train, test, plan, state, progress)


def check_block(
    coupling: Coupling, block_size: int | None, groups: int | None, pattern: NMPattern | None
) -> int | None:
    """The channels of a block, or None where the strategy says it; with a pattern, those of a window.

    Raises
    ------
    NMSolveError
        If the coupling's channels cannot be divided so.
    """
    if block_size is not None and groups is not None:
        raise NMSolveError("block_size, groups: expected one of them, got both")
    if groups is not None:
        _check_divisor("groups", groups, coupling)
        return coupling.size // groups
    if block_size is not None and pattern is not None:
        check_window(block_size, pattern, 0)
    elif block_size is not None:
        _check_divisor("block_size", block_size, coupling)
    return block_size


def _check_divisor(name: str, value: object, coupling: Coupling) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or coupling.size % value:
        size = f"the {coupling.size} channels of {coupling.name}"
        raise NMSolveError(f"{name}: expected a divisor of {size}, got {value!r}")


def _split(batches: list[Batch], held_out: float) -> tuple[list[Batch], list[Batch]]:
    """The batches to train on, and those that are held out."""
    if len(batches) < 2:
        raise NMSolveError(f"calibration: expected two batches or more, got {len(batches)}")
    if not 0 < held_out < 1:
        raise NMSolveError(f"held_out: expected a share between 0 and 1, got {held_out!r}")
    kept = max(1, round(held_out * len(batches)))
    if kept == len(batches):
        raise NMSolveError(f"held_out: {held_out} leaves no batch of {len(batches)} to train on")
    return batches[:-kept], batches[-kept:]


def _kept_by(floor: Mapping[str, Tensor], model: PrunedModel) -> float:
    """The share of the score that the orders ``floor`` keep, which those at the start must reach."""
    missing = [part.coupling.name for part in model.parts if part.coupling.name not in floor]
    if missing:
        raise NMSolveError(f"floor: expected an order for every coupling; {missing[0]!r} has none")
    least = model.kept(
        {name: check_permutation(order, order.shape[-1], "floor") for name, order in floor.items()}
    )
    start = model.kept(model.permutations())
    if start < least:
        raise NMSolveError(f"floor: the start keeps {start:.6f} of the score, less than {least:.6f}")
    return least


def linear_couplings(model: nn.Module, couplings: Sequence[Coupling]) -> list[Coupling]:
    """Those all of whose consumers are linear layers, which is what can be learned for."""
    return [c for c in couplings if all(is_linear(model, site) for site in c.consumers)]


def is_linear(model: nn.Module, site: Site) -> bool:
    """Whether a site is the weight of a linear layer that is called."""
    path, _, own = site.tensor.rpartition(".")
    layer = model.get_submodule(path)
    if own != "weight":  # experts, which are a parameter of their module
        return False
    if isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention):  # never called
        return False
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


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
