"""Sparse training in transformers' ``Trainer``: a callback around :class:`nmsolve.train.SparseTraining`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nmsolve.errors import NMSolveError
from nmsolve.files import replacing
from nmsolve.integrations.callbacks import ShowsRun, SparseRun, refuse_deepspeed
from nmsolve.integrations.client import importing
from nmsolve.prune.arguments import Patterns

with importing("transformers"):
    from transformers import TrainerCallback, TrainerState

__all__ = ["STATE_FILE", "SparseTrainingCallback"]

STATE_FILE = "sparse_training.pt"
"""What the callback adds to the folder of every checkpoint."""


class SparseTrainingCallback(ShowsRun, TrainerCallback):
    """Trains a Trainer's model under N:M masks that follow the weights.

    Masks come when training begins, after Trainer has placed the model and loaded its checkpoint. Every
    checkpoint gets a file with the masks and the step, and a run that resumes from it goes on with them.
    When training ends, pruned weights become zero, those of the best checkpoint where Trainer loads that.

    Parameters
    ----------
    pattern, **options
        Of :class:`nmsolve.train.SparseTraining`.
    resume_from : str or Path, optional
        The folder of the checkpoint that training resumes from, where it is neither
        ``args.resume_from_checkpoint`` nor in ``args.output_dir``: Trainer does not tell callbacks.

    Attributes
    ----------
    sparse : SparseTraining or None
        While training and after it.
    masks : dict of str to Tensor
        The final masks by name, bool, True = keep, when training has ended.

    Raises
    ------
    NMSolveError
        If an argument is not as described; in ``train()``, what :class:`nmsolve.train.SparseTraining` raises,
        if DeepSpeed or a search for hyperparameters runs it, or a checkpoint has no such file.

    Examples
    --------
    >>> from nmsolve.integrations.transformers import SparseTrainingCallback
    >>> callback = SparseTrainingCallback("2:4", refresh=40, decay=1e-4)
    >>> callback.sparse is None
    True
    """

    def __init__(
        self, pattern: Patterns = "2:4", *, resume_from: str | os.PathLike[str] | None = None, **options: Any
    ) -> None:
        self._run = SparseRun(pattern, options)
        self._resume_from = None if resume_from is None else Path(resume_from)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        refuse_deepspeed(getattr(args, "deepspeed_plugin", None) is not None)
        if state.is_hyper_param_search:
            raise NMSolveError(
                "trainer: a search for hyperparameters keeps its checkpoints where the callback cannot find "
                "them; train with the values that it found"
            )
        saved = self._read(self._checkpoint(args, state), state.global_step) if state.global_step else None
        self._run.begin(kwargs["model"], [kwargs["optimizer"]], saved)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._run.going and logs is not None:
            assert self.sparse is not None
            numbers = self.sparse.metrics().numbers()
            logs.update(numbers)
            state.log_history[-1].update(numbers)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._run.going:
            return
        saved = {"global_step": state.global_step, "sparse": self._run.whole_state()}
        if args.should_save:
            with replacing(_folder(args, state.global_step) / STATE_FILE) as path:
                torch.save(saved, path)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._run.going:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            assert self.sparse is not None
            best = Path(state.best_model_checkpoint)
            self.sparse.load_state_dict(self._read(best, state.best_global_step))
        self._run.end()

    def _checkpoint(self, args: Any, state: Any) -> Path:
        """The folder that Trainer resumes from: one whose history is the one that was loaded."""
        given = args.resume_from_checkpoint
        candidates = [given, _folder(args, state.global_step)]
        if self._resume_from is not None:
            candidates = [self._resume_from]
        for folder in (Path(name) for name in candidates if isinstance(name, str | os.PathLike)):
            file = folder / "trainer_state.json"
            stored = TrainerState.load_from_json(str(file)) if file.is_file() else TrainerState()
            if (stored.global_step, stored.log_history) == (state.global_step, state.log_history):
                return folder
        where = self._resume_from if self._resume_from is not None else _folder(args, state.global_step)
        raise NMSolveError(
            f"trainer: expected the checkpoint of step {state.global_step} that training resumes from at "
            f"{where}, found another or none; SparseTrainingCallback(resume_from=...) says where it is"
        )

    def _read(self, folder: Path, step: int) -> Mapping[str, Any]:
        try:
            saved = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
            if saved["global_step"] == step:
                return saved["sparse"]
            found = f"one of step {saved['global_step']}"
        except FileNotFoundError:
            found = "none"
        except Exception as error:
            found = f"one that cannot be read ({type(error).__name__})"
        raise NMSolveError(
            f"trainer: expected {STATE_FILE} of step {step} in {folder}, as the callback writes it, "
            f"found {found}"
        )


def _folder(args: Any, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")
