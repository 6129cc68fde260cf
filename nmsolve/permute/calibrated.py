"""A checkpoint's model with calibration data, for what magnitudes do not tell: Wanda's scores and learned
orders.

Couplings are those of the files, whose tensors may have other names in the model. What calibration cannot
see, such as experts that are one parameter in the model, has no scores here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from nmsolve.checkpoint.format import SUFFIX, Checkpoint
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern
from nmsolve.permute.calibration import calibration_scores
from nmsolve.permute.couplings import Coupling
from nmsolve.permute.learned import (
    check_block,
    is_linear,
    learn_permutation,
    linear_couplings,
)
from nmsolve.permute.model_couplings import find_couplings
from nmsolve.permute.strategies import LearningStrategy
from nmsolve.prune.arguments import sequence_length_of
from nmsolve.prune.calibration import Batch, make_batches
from nmsolve.prune.pretrained import load_model, load_tokenizer
from nmsolve.prune.stored import find_places, names_of

if TYPE_CHECKING:
    from nmsolve.permute.checkpoint_search import CheckpointSearch
    from nmsolve.permute.on_disk import CalibrationData, Learning

__all__ = ["Calibrated", "open_calibrated"]


@dataclass(frozen=True)
class Calibrated:
    """A model, its batches, and those couplings of its files that calibration can see.

    ``couplings`` has, by the names of the files' couplings, the model's; ``tensors`` the model's name of each
    linear weight that belongs to one of them, by its name in the files.
    """

    model: Any
    batches: list[Batch]
    couplings: Mapping[str, Coupling]
    tensors: Mapping[str, str]

    def scores(self) -> dict[str, Tensor]:
        """Wanda's, by the tensors' names in the files, on the CPU."""
        found = calibration_scores(self.model, self._tensors(), list(self.tensors.values()))
        return {stored: found[name].cpu() for stored, name in self.tensors.items()}

    def check(self, learning: Learning, pattern: NMPattern) -> None:
        """
        Raises
        ------
        NMSolveError
            If orders cannot be learned so for this model.
        """
        steps, model = learning.steps, self.model
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise NMSolveError(f"steps: expected at least 1, got {steps!r}")
        if len(self.batches) < 2:
            raise NMSolveError(f"samples: learning needs two batches or more, got {len(self.batches)}")
        windows = pattern if learning.strategy == "frank-wolfe" else None
        for coupling in self.couplings.values():
            check_block(coupling, learning.block_size, learning.groups, windows)
        causal = model.can_generate() and not model.config.is_encoder_decoder
        if learning.strategy != "permllm" and not causal:
            raise NMSolveError(f"learn: {type(model).__name__} is no causal language model")

    def learn(
        self,
        search: CheckpointSearch,
        learning: Learning,
        chosen: Sequence[Coupling],
        rows: Sequence[dict[str, Any]],
        orders: Mapping[str, Tensor],
    ) -> tuple[list[dict[str, Any]], dict[str, Tensor], list[dict[str, Any]]]:
        """Goes on from the orders found: their rows and all orders then, and the checks of learning."""
        seen = [coupling for coupling in chosen if coupling.name in self.couplings]
        scores = search.scores(seen)
        device = next(self.model.parameters()).device
        found = learn_permutation(
            self.model,
            self._tensors(),
            search.pattern,
            strategy=cast(LearningStrategy, learning.strategy),
            couplings=list(self.couplings.values()),
            scores={self.tensors[name]: score.to(device) for name, score in scores.items()},
            start={self.couplings[c.name].name: orders[c.name].to(device) for c in seen},
            transposable=search.transposable,
            steps=learning.steps,
            block_size=learning.block_size,
            groups=learning.groups,
            seed=learning.seed,
            progress=search.shown(),
        )
        learned = {c.name: found.permutations[self.couplings[c.name].name].cpu() for c in seen}
        new = [
            search.learned(row, coupling, learned) if coupling.name in learned else row
            for row, coupling in zip(rows, chosen, strict=True)
        ]
        return new, {**orders, **learned}, found.history

    def _tensors(self) -> list[Tensor | Mapping[str, Tensor]]:
        device = next(self.model.parameters()).device
        return [batch.to(device) for batch in self.batches if isinstance(batch, Tensor)]


def open_calibrated(
    checkpoint: Checkpoint, chosen: Sequence[Coupling], data: CalibrationData, device: str
) -> Calibrated:
    """Loads the model of a checkpoint folder and the batches of a file.

    Raises
    ------
    NMSolveError
        If the data are not as :func:`nmsolve.prune.make_batches` takes them, or calibration can see none of
        the couplings.
    """
    model = load_model(checkpoint.root, data.dtype)
    batches = make_batches(
        data.file,
        tokenizer=None if data.file.suffix == SUFFIX else load_tokenizer(checkpoint.root),
        samples=data.samples,
        sequence_length=sequence_length_of(model, data.sequence_length),
        batch_size=data.batch_size,
        seed=data.seed,
        bos=data.bos,
    )
    of_model = linear_couplings(model, find_couplings(model))
    sites = {site.tensor: site for own in of_model for site in (*own.consumers, *own.producers)}
    weights = {
        name: model.get_parameter(name)
        for name, site in sites.items()
        if name.endswith(".weight") and is_linear(model, site)
    }
    held = find_places(checkpoint, weights, names_of(model, weights))
    stored = {place.entry: name for name, places in held.items() for place in places}
    couplings, tensors = {}, {}
    by_consumers = {tuple(site.tensor for site in own.consumers): own for own in of_model}
    for coupling in chosen:
        own = by_consumers.get(tuple(stored.get(site.tensor, "") for site in coupling.consumers))
        if own is not None and (own.heads, own.size) == (coupling.heads, coupling.size):
            couplings[coupling.name] = own
            names = [site.tensor for site in (*coupling.consumers, *coupling.producers)]
            tensors.update({name: stored[name] for name in names if name in stored})
    if not couplings:
        raise NMSolveError(
            "calibration: none of the channels to reorder belong to linear layers of the model"
        )
    return Calibrated(model.to(device).eval(), batches, couplings, tensors)
