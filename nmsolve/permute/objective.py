"""What learned permutations are trained for: how far the pruned model is from the dense one.

"permllm" takes one minus the cosine similarity of the last hidden states. "cost-matrix" takes the task's loss
and, in training, adds the smooth L1 distance of every layer's hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nmsolve.errors import NMSolveError
from nmsolve.prune.calibration import call_model

__all__ = ["Batch", "Objective", "TaskLoss"]

Batch = Tensor | Mapping[str, Tensor]
TaskLoss = Callable[[Any, Batch], Tensor]


class Objective:
    """The loss of a batch. Dense hidden states are taken once for each batch and kept.

    Parameters
    ----------
    model : nn.Module
    task : bool
        The task's loss and distillation, or the cosine distance.
    distillation : float
        Weight of the distances of hidden states.
    task_loss : callable, optional
        ``(output, batch) -> loss``; the next token's cross-entropy if left out.

    Attributes
    ----------
    needs_dense : bool
        Whether the loss compares with the dense model's hidden states.
    """

    def __init__(
        self, model: nn.Module, *, task: bool, distillation: float, task_loss: TaskLoss | None
    ) -> None:
        self.task, self.distillation = task, distillation
        self.task_loss = task_loss or next_token_loss
        lists = [list(child) for child in model.modules() if isinstance(child, nn.ModuleList)]
        layers = max(lists, key=len, default=[])
        # The cosine needs the last hidden state only, and nothing behind the model's trunk.
        self.needs_dense = not task or distillation > 0
        self.watched: list[nn.Module] = layers if task else layers[-1:]
        self.runs = model if task or not layers else getattr(model, "base_model", model)
        self.dense: dict[int, list[Tensor]] = {}

    @torch.no_grad()
    def remember(self, key: int, batch: Batch) -> None:
        """Keeps the hidden states of the model, which must be dense now."""
        if key not in self.dense:
            self.dense[key] = self._hidden(batch)[1]

    def loss(self, key: int, batch: Batch, *, train: bool) -> Tensor:
        """Of the model as it is now; :meth:`remember` has seen the batch under ``key`` if that is needed."""
        output, hidden = self._hidden(batch)
        pairs = list(zip(hidden, self.dense[key], strict=True)) if self.needs_dense else []
        if not self.task:
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
            output = call_model(self.runs, batch)
        finally:
            for handle in handles:
                handle.remove()
        if not self.watched:
            return output, [getattr(output, "logits", output)]
        return output, [seen[layer] for layer in self.watched]


def next_token_loss(output: Any, batch: Batch) -> Tensor:
    """Cross-entropy of each next token, from ``output.logits`` and the batch's token numbers."""
    logits = getattr(output, "logits", output)
    tokens = batch["input_ids"] if isinstance(batch, Mapping) else batch
    if not isinstance(logits, Tensor) or tokens.dtype != torch.int64 or logits.ndim != 3:
        raise NMSolveError(
            "task_loss: expected a function (output, batch) -> loss, as this is no language model"
        )
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten().to(logits.device))
