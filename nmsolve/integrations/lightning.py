"""Sparse training in Lightning's ``Trainer``: a callback around :class:`nmsolve.train.SparseTraining`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from nmsolve.integrations.callbacks import ShowsRun, SparseRun, refuse_deepspeed
from nmsolve.integrations.client import importing
from nmsolve.prune.arguments import Patterns

__all__ = ["SparseTrainingCallback"]


def _bases() -> tuple[type, ...]:
    """The callbacks of ``lightning`` and ``pytorch_lightning``: two packages that do not know each other.

    Those that are imported already, or else one that can be.
    """
    known = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    if not known:
        with importing("lightning"):
            try:
                import_module("lightning.pytorch")
            except ModuleNotFoundError:
                import_module("pytorch_lightning")
        known = [name for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules]
    return tuple(sys.modules[name].Callback for name in known)


class SparseTrainingCallback(ShowsRun, *_bases()):  # type: ignore[misc]
    """Trains a LightningModule under N:M masks that follow the weights.

    Masks come when training begins, after Lightning has placed the module and loaded its checkpoint. They
    and the step are in Lightning's checkpoints, and ``trainer.fit(ckpt_path=...)`` goes on with them. Flip
    rates and kept shares are logged every ``log_every_n_steps``. When training ends, pruned weights become
    zero.

    Works with ``lightning`` and ``pytorch_lightning``; import the one that you use first.

    Parameters
    ----------
    pattern, **options
        Of :class:`nmsolve.train.SparseTraining`. Its globs see the LightningModule's names.

    Attributes
    ----------
    sparse : SparseTraining or None
        While training and after it.
    masks : dict of str to Tensor
        The final masks by name, bool, True = keep, when training has ended.

    Raises
    ------
    NMSolveError
        If an argument is not as described; in ``fit()``, what :class:`nmsolve.train.SparseTraining` raises,
        and if DeepSpeed runs it.
    """

    def __init__(self, pattern: Patterns = "2:4", **options: Any) -> None:
        super().__init__()
        self._run = SparseRun(pattern, options)
        self._loaded: Mapping[str, Any] | None = None
        self._last: dict[str, Any] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_deepspeed("deepspeed" in str(type(trainer.strategy)).lower())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Before that, optimizers have not loaded their checkpoints yet.
        loaded, self._loaded = self._loaded, None
        self._run.begin(pl_module, trainer.optimizers, loaded)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        step = trainer.global_step
        if self._run.going and trainer.log_every_n_steps and step and step % trainer.log_every_n_steps == 0:
            assert self.sparse is not None
            pl_module.log_dict(self.sparse.metrics().numbers())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._run.going:
            self._last = self._run.whole_state()  # a checkpoint of the end is one to resume from
            self._run.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._run.abandon()

    def state_dict(self) -> dict[str, Any]:
        if self._run.going:
            return self._run.whole_state()
        return self._last

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None
