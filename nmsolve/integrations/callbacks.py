"""What the callbacks of trainers share: when SparseTraining begins, what of it is saved, how it ends."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import whole_of
from nmsolve.prune.arguments import Patterns
from nmsolve.train import SparseTraining

__all__ = ["ShowsRun", "SparseRun", "refuse_deepspeed"]


class SparseRun:
    """Holds one :class:`nmsolve.train.SparseTraining` at a time, made when training begins.

    Attributes
    ----------
    sparse : SparseTraining or None
        Of the training that is under way or was the last.
    masks : dict of str to Tensor
        The final masks by name, once training has ended; see :meth:`SparseTraining.finish`.
    """

    def __init__(self, pattern: Patterns, options: Mapping[str, Any]) -> None:
        try:
            inspect.signature(SparseTraining).bind(nn.Identity(), pattern, **options)
        except TypeError as error:
            raise NMSolveError(f"options: SparseTraining {error}") from None
        self._pattern, self._options = pattern, dict(options)
        self.sparse: SparseTraining | None = None
        self.masks: dict[str, Tensor] = {}

    def begin(
        self, model: nn.Module, optimizers: Iterable[Optimizer], state: Mapping[str, Any] | None
    ) -> None:
        """Masks the model, from a saved state if there is one, and follows the optimizers' steps."""
        self.abandon()
        sparse = SparseTraining(model, self._pattern, **self._options)
        try:
            if state is not None:
                sparse.load_state_dict(state)
            sparse.attach(*optimizers)
        except NMSolveError:
            sparse.dense()
            sparse.finish()
            raise
        self.sparse, self.masks = sparse, {}

    def abandon(self) -> None:
        """Ends a run that was interrupted: plain layers, with all of their weights."""
        if self.going:
            assert self.sparse is not None
            self.sparse.dense()
            self.sparse.finish()

    @property
    def going(self) -> bool:
        return self.sparse is not None and self.sparse.phase != "finished"

    def whole_state(self) -> dict[str, Any]:
        """The state with whole masks in main memory, for a file. Communicates where weights are sharded."""
        assert self.sparse is not None
        state = self.sparse.state_dict()
        masks = {name: whole_of(mask).cpu() for name, mask in state["masks"].items()}
        return {**state, "masks": masks}

    def end(self) -> None:
        """Plain layers whose pruned weights are zero."""
        if self.going:
            assert self.sparse is not None
            self.masks = self.sparse.finish()


class ShowsRun:
    """What users see of a callback's :class:`SparseRun`."""

    _run: SparseRun

    @property
    def sparse(self) -> SparseTraining | None:
        return self._run.sparse

    @property
    def masks(self) -> dict[str, Tensor]:
        return self._run.masks


def refuse_deepspeed(used: bool) -> None:
    if used:
        raise NMSolveError(
            "trainer: DeepSpeed steps flat partitions of its own, which hold no blocks of weights; use DDP "
            "or FSDP2"
        )
