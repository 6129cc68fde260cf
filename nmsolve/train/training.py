"""Sparse training: dense parameters, products with exact N:M masks, masks that follow the weights.

At every optimizer step, for a weight W, its mask S and the gradient G of the product's operand ``W * S``::

    straight-through    W' = U(W, G + lambda (1 - S) W)        gradients decay: Hu et al., arXiv 2404.01847
    masked              W' = U(W, S G + lambda (1 - S) W)      no gradient outside of the mask
    sr-ste              W' = U(W - eta lambda (1 - S) W, G)    weights decay: Zhou et al., arXiv 2102.04010

with the optimizer's update U and learning rate eta. Every k steps S becomes the N:M mask that keeps the
largest ``sum |W'|``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import Patterns
from nmsolve.train.arguments import (
    Decay,
    Refresh,
    check_layout,
    check_settings,
    choose_operands,
    choose_weights,
    decay_at,
    inner_model,
    interval_at,
)
from nmsolve.train.masked_modules import leave_out_of_ddp, put_back_into_ddp
from nmsolve.train.measuring import measure
from nmsolve.train.metrics import SparseMetrics
from nmsolve.train.optimizers import decay_weights, stepping_optimizers, with_decayed_gradients
from nmsolve.train.solving import check_finite, solve_masks, write_masks
from nmsolve.train.state import packed_state, unpacked_masks
from nmsolve.train.weights import GatheredWeight, MaskedWeight, ModuleWeight, check_fsdp, fsdp_parameters

__all__ = ["SparseTraining"]


class SparseTraining:
    """Trains a model whose matrix products see N:M weights, under masks that are solved anew every few steps.

    The parameters stay dense under their names: checkpoints of the model load both ways, and an optimizer, a
    scheduler or a gradient clip sees nothing new. With transposable masks the forward product ``Y = X W^T``
    and the backward product ``dX = dY W`` both read N:M operands. All layers of a pattern are solved in one
    call.

    Parameters
    ----------
    model : nn.Module
        In memory, dense or pruned already. Under FSDP2 and tensor parallelism it is distributed first; DDP
        and ``torch.compile`` may wrap it before or after.
    pattern : str, NMPattern or mapping of glob to either or None
        ``"2:4"`` keeps 2 of 4. As in :func:`nmsolve.prune.prune_model`: the last glob that matches a layer
        decides, None leaves it dense; ``"*"`` leaves out heads, embeddings, routers and what is smaller
        than a block.
    include : str or iterable of str, optional
        With one pattern: only the layers that these globs match.
    dense : str or iterable of str
        Globs of layers to leave dense.
    transposable : bool
        N:M along rows and columns, or ordinary N:M along the input, whose backward product is dense.
    refresh : int or callable
        Optimizer steps from one refresh of the masks to the next; or ``step -> steps``, asked after every
        step.
    gradient : {"straight-through", "masked", "sr-ste"}
        What pruned weights get: the gradient of the operand; nothing, so that they wait as they are until
        kept ones fall below them; or the operand's gradient while they decay.
    decay : float or callable
        lambda above, or ``step -> lambda``, added after clipping. On the gradients of pruned weights; with
        "sr-ste" on the pruned weights themselves, times the learning rate.
    operands : {"dense", "auto", "sparse24"}
        Products with dense operands, whose masked entries are zero; or on NVIDIA's sparse tensor cores,
        where a layer is linear, its mask is transposable 2:4 and it multiplies in float16 or bfloat16.
        "auto" times both once for each shape and keeps dense ones where they are faster or sparse ones are
        not possible, which :meth:`metrics` tells; "sparse24" is an error there. Sparse ones have never run on
        a GPU; their packing is tested.
    start : int
        Optimizer steps of dense training before the first masks.
    stop : int, optional
        The step after which training goes on dense.
    backend : {"auto", "triton", "cpu", "torch"}
        Of the masks; see :func:`nmsolve.transposable_mask`.

    Attributes
    ----------
    step : int
        Optimizer steps since the start.
    phase : {"warm-up", "sparse", "frozen", "dense", "finished"}
    patterns : dict of str to NMPattern
        Of the masked weights, by name.
    skipped : dict of str to str
        Layers that stay dense, and why.

    Raises
    ------
    NMSolveError
        If an argument is not as described, no layer fits, a named layer cannot be masked, or a border between
        the shards of a weight falls inside a block. The model is as it was then.
    WorkFailed
        If weights are not finite.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> sparse = SparseTraining(model, "2:4", refresh=2, decay=1e-3)
    >>> sparse.attach(optimizer)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 16)).square().mean().backward()
    ...     optimizer.step()
    >>> sparse.step, sparse.metrics().refreshes
    (4, 2)
    >>> masks = sparse.finish()
    >>> nmsolve.check_mask(model[0].weight != 0, 2, 4)
    """

    def __init__(
        self,
        model: nn.Module,
        pattern: Patterns = "2:4",
        *,
        include: str | Iterable[str] | None = None,
        dense: str | Iterable[str] = (),
        transposable: bool = True,
        refresh: Refresh = 40,
        gradient: str = "straight-through",
        decay: Decay = 0.0,
        operands: str = "dense",
        start: int = 0,
        stop: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._settings = check_settings(transposable, gradient, operands, start, stop, backend)
        interval_at(refresh, 0)
        decay_at(decay, 0, gradient)
        model = inner_model(model)
        chosen, self.skipped = choose_weights(model, pattern, include, dense)
        gathered = fsdp_parameters(model)
        for item in chosen:
            fsdp = gathered.get(id(item.layer.module))
            if fsdp is not None:
                check_fsdp(fsdp, item.layer.weight_name)
            check_layout(item.layer, item.pattern, transposable, fsdp is not None)
        check_finite([(item.layer.weight_name, item.layer.weight) for item in chosen])

        self._reasons = choose_operands(chosen, self._settings)

        self._model, self._refresh, self._decay = model, refresh, decay
        self.patterns: dict[str, NMPattern] = {item.layer.weight_name: item.pattern for item in chosen}
        straight = gradient != "masked"
        self._weights: list[MaskedWeight] = []
        for item in chosen:
            fsdp = gathered.get(id(item.layer.module))
            if fsdp is None:
                asked = None if self._reasons[item.layer.weight_name] else operands
                self._weights.append(ModuleWeight(item, straight, asked))
            else:
                self._weights.append(GatheredWeight(item, fsdp, straight))
        self.step = 0
        self.phase = "warm-up" if start else "sparse"
        self._refreshed_at, self._refreshes = 0, 0
        self._looked_back: int | None = None
        self._flips: Tensor | None = None
        self._counts: dict[int, int] = {}
        self._handles: list[Any] = []
        if any(isinstance(weight, GatheredWeight) for weight in self._weights):
            self._handles.append(model.register_forward_pre_hook(self._bind, prepend=True))
        leave_out_of_ddp(self._model)
        if self.phase == "sparse":
            try:
                self._solve()
            except NMSolveError:
                self._release()
                raise
            self._enter("sparse")

    # --- what a training loop calls -------------------------------------------------------------------------

    def attach(self, *optimizers: Optimizer) -> None:
        """Has masks refreshed and pruned weights decay in the steps of these optimizers.

        Between them they must hold every weight that is masked and trained. With more than one that does, a
        step is over when each of them has stepped.

        Raises
        ------
        NMSolveError
            If one is no torch optimizer, or a weight is in none of them.
        """
        self._must_be_going("attach")
        if self._counts:
            raise NMSolveError("optimizer: attach() takes all optimizers at once, and was called already")
        for optimizer in stepping_optimizers(optimizers, self._weights, self._settings.gradient):
            self._counts[id(optimizer)] = self.step
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))
        if self.phase == "sparse" and not self.step:
            # Wrappers may have brought other weights since the masks were made, and alike on every process.
            self._solve()

    def refresh(self) -> None:
        """Solves all masks anew for the weights as they are; ends the warm-up.

        Raises
        ------
        NMSolveError
            If masks are frozen, or training has gone on dense.
        WorkFailed
            If weights are not finite.
        """
        self._must_be_going("refresh")
        if self.phase in ("frozen", "dense"):
            raise NMSolveError(f"refresh: expected masks that follow the weights, got phase {self.phase!r}")
        counted = self.phase == "sparse"
        self._solve()
        self._enter("sparse")
        if counted:
            self._refreshes += 1
            self._looked_back = max(1, self.step - self._refreshed_at)
        else:
            self._flips = None
        self._refreshed_at = self.step

    def freeze(self) -> None:
        """Keeps the masks as they are from now on.

        Raises
        ------
        NMSolveError
            If there are no masks: in the warm-up, or when training has gone on dense.
        """
        self._must_be_going("freeze")
        if self.phase not in ("sparse", "frozen"):
            raise NMSolveError(f"freeze: expected masks, got phase {self.phase!r}, which has none")
        self.phase = "frozen"

    @torch.no_grad()
    def dense(self) -> None:
        """Goes on dense: products see the whole weights from now on, as they do after step ``stop``."""
        self._must_be_going("dense")
        self._enter("dense")
        for weight in self._weights:
            weight.write(torch.ones_like(weight.mask))

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        """Makes plain layers of all masked ones: pruned weights become zero, hooks go.

        Returns
        -------
        dict of str to Tensor
            The final masks by name, bool, True = keep, DTensors where weights are; what
            :func:`nmsolve.save_masks` and :class:`nmsolve.prune.FixedMasks` take. Empty in a dense phase,
            where no weight is pruned.
        """
        self._must_be_going("finish")
        masks = self.masks
        for weight in self._weights:
            weight.local.masked_fill_(~weight.mask, 0)
        self._release()
        self.phase = "finished"
        return masks

    def _release(self) -> None:
        for weight in self._weights:
            weight.release()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        put_back_into_ddp(self._model)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Copies of the masks by name, bool, True = keep; none in a dense phase."""
        if self.phase not in ("sparse", "frozen"):
            return {}
        return {weight.name: weight.spread_mask() for weight in self._weights}

    @torch.no_grad()
    def metrics(self) -> SparseMetrics:
        """Flip rates and kept shares, of all weights and of each.

        Of sharded weights they are those of the whole weight: every process has to ask for them.
        """
        self._must_be_going("metrics")
        looked_back = self._looked_back if self._flips is not None else None
        progress = self.step, self.phase, self._refreshes
        return measure(self._weights, self._reasons, self._flips, looked_back, *progress)

    # --- saving and resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks packed to bits, the step and the phase, to be saved beside the model's and the optimizer's.

        Schedules that are functions are not in it. Under FSDP2 and tensor parallelism the packed masks are
        DTensors, which torch.distributed.checkpoint saves and spreads over any number of processes.
        """
        self._must_be_going("state_dict")
        return packed_state(self._weights, self._settings, self._progress())

    def _progress(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "phase": self.phase,
            "refreshed_at": self._refreshed_at,
            "refreshes": self._refreshes,
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the run that gave ``state`` was; the weights are those of the model's checkpoint.

        Raises
        ------
        NMSolveError
            If it is of other settings, other weights, or weights of another shape. Nothing is loaded then.
        """
        self._must_be_going("load_state_dict")
        masks = unpacked_masks(state, self._weights, self._settings, self._progress())
        for weight, mask in zip(self._weights, masks, strict=True):
            weight.write(mask)
        self.step = int(state["step"])
        self._enter(str(state["phase"]))
        self._refreshed_at, self._refreshes = int(state["refreshed_at"]), int(state["refreshes"])
        self._flips = self._looked_back = None
        self._counts = dict.fromkeys(self._counts, self.step)

    # --- in the steps of optimizers -------------------------------------------------------------------------

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Decays pruned weights, or their gradients: after the closure, if the step has one."""
        if self.phase not in ("sparse", "frozen"):
            return None
        strength = decay_at(self._decay, self.step, self._settings.gradient)
        if not strength:
            return None
        if self._settings.gradient == "sr-ste":
            decay_weights(optimizer, self._weights, strength)
            return None
        return with_decayed_gradients(optimizer, self._weights, strength, args, kwargs)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):  # a fused optimizer left the weights as they were
            return
        self._counts[id(optimizer)] += 1
        step = min(self._counts.values())
        if step == self.step or self.phase == "finished":
            return
        self.step = step
        settings = self._settings
        if settings.stop is not None and step >= settings.stop:
            if self.phase != "dense":
                self.dense()
        elif (self.phase == "warm-up" and step >= settings.start) or (
            self.phase == "sparse" and step - self._refreshed_at >= interval_at(self._refresh, step)
        ):
            self.refresh()

    # --- masks ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _solve(self) -> None:
        """New masks for all weights, and how many entries changed; all are written or none."""
        self._flips = write_masks(self._weights, solve_masks(self._weights, self._settings))

    def _enter(self, phase: str) -> None:
        """What has no mask has no sparse operand: the whole weight cannot be packed."""
        self.phase = phase
        for weight in self._weights:
            weight.switch(phase in ("sparse", "frozen"))

    def _bind(self, model: nn.Module, args: Any) -> None:
        for weight in self._weights:
            if isinstance(weight, GatheredWeight):
                weight.bind()

    def _must_be_going(self, what: str) -> None:
        if self.phase == "finished":
            raise NMSolveError(f"{what}: expected a SparseTraining that goes on, got one that is finished")
