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

from nmsolve.errors import NMSolveError, WorkFailed
from nmsolve.ops.distributed import shard_of
from nmsolve.ops.masks import check_mask, nm_mask, transposable_masks
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import Patterns
from nmsolve.train.arguments import (
    Decay,
    Refresh,
    check_layout,
    check_settings,
    choose_weights,
    decay_at,
    inner_model,
    interval_at,
)
from nmsolve.train.masked_modules import MASK, is_masked
from nmsolve.train.metrics import LayerMetrics, SparseMetrics
from nmsolve.train.packed import pack_rows, unpack_rows
from nmsolve.train.weights import GatheredWeight, MaskedWeight, ModuleWeight, check_fsdp, fsdp_parameters

__all__ = ["SparseTraining"]

_STATE_VERSION = 1


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
        start: int = 0,
        stop: int | None = None,
        backend: str = "auto",
    ) -> None:
        self._settings = check_settings(transposable, gradient, start, stop, backend)
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
        _check_finite([(item.layer.weight_name, item.layer.weight) for item in chosen])

        self._model, self._refresh, self._decay = model, refresh, decay
        self.patterns: dict[str, NMPattern] = {item.layer.weight_name: item.pattern for item in chosen}
        straight = gradient != "masked"
        self._weights: list[MaskedWeight] = []
        for item in chosen:
            fsdp = gathered.get(id(item.layer.module))
            made = ModuleWeight(item, straight) if fsdp is None else GatheredWeight(item, fsdp, straight)
            self._weights.append(made)
        self.step = 0
        self.phase = "warm-up" if start else "sparse"
        self._refreshed_at, self._refreshes = 0, 0
        self._looked_back: int | None = None
        self._flips: Tensor | None = None
        self._counts: dict[int, int] = {}
        self._handles: list[Any] = []
        if any(isinstance(weight, GatheredWeight) for weight in self._weights):
            self._handles.append(model.register_forward_pre_hook(self._bind, prepend=True))
        self._leave_out_of_ddp()
        if self.phase == "sparse":
            try:
                self._solve()
            except NMSolveError:
                self._release()
                raise

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
        inner = [_unwrapped(optimizer) for optimizer in optimizers]
        held = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in inner]
        missing = [
            weight.name
            for weight in self._weights
            if weight.parameter.requires_grad and not any(id(weight.parameter) in ids for ids in held)
        ]
        if missing:
            raise NMSolveError(
                f"optimizer: expected one that holds the masked weights, got none with {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            )
        if self._settings.gradient == "sr-ste" and any(
            "lr" not in group for o in inner for group in o.param_groups
        ):
            raise NMSolveError("optimizer: 'sr-ste' needs a learning rate 'lr' in its param_groups, got none")
        for optimizer, ids in zip(inner, held, strict=True):
            if any(id(weight.parameter) in ids for weight in self._weights):
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
        self.phase = "sparse"
        self._solve()
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
        self.phase = "dense"
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
        self._put_back_into_ddp()

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
        columns = []
        for k, weight in enumerate(self._weights):
            magnitude = weight.local.abs()
            total = magnitude.sum(dtype=torch.float64)
            kept = magnitude.masked_fill_(~weight.mask, 0).sum(dtype=torch.float64)
            flips = torch.zeros_like(total) if self._flips is None else self._flips[k].to(total)
            columns.append(_summed(torch.stack([flips, kept, total]), weight.groups_that_share()))
        flips, kept, total = (row.tolist() for row in torch.stack([c.cpu() for c in columns]).T)
        sizes = [weight.parameter.numel() for weight in self._weights]
        return SparseMetrics(
            self.step,
            self.phase,
            self._refreshes,
            *self._rates(sum(flips), sum(sizes)),
            _share(sum(kept), sum(total)),
            tuple(
                LayerMetrics(weight.name, str(weight.pattern), *self._rates(f, size), _share(k, t))
                for weight, f, size, k, t in zip(self._weights, flips, sizes, kept, total, strict=True)
            ),
        )

    # --- saving and resuming --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks packed to bits, the step and the phase, to be saved beside the model's and the optimizer's.

        Schedules that are functions are not in it. Under FSDP2 and tensor parallelism the packed masks are
        DTensors, which torch.distributed.checkpoint saves and spreads over any number of processes.
        """
        self._must_be_going("state_dict")
        return {
            "version": _STATE_VERSION,
            "settings": self._signature(),
            "step": self.step,
            "phase": self.phase,
            "refreshed_at": self._refreshed_at,
            "refreshes": self._refreshes,
            "masks": {weight.name: pack_rows(weight.mask, weight.parameter) for weight in self._weights},
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
        fields = {"version", "settings", "step", "phase", "refreshed_at", "refreshes", "masks"}
        if not isinstance(state, Mapping) or not fields <= state.keys():
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise NMSolveError(f"state: expected what state_dict() returned, got {got}")
        if state["version"] != _STATE_VERSION:
            raise NMSolveError(f"state: expected version {_STATE_VERSION}, got {state['version']!r}")
        for key, value in self._signature().items():
            got = state["settings"].get(key)
            if got != value:
                raise NMSolveError(f"state: expected {key}={value!r}, as this run has, got {got!r}")
        stored = state["masks"]
        if stored.keys() != self.patterns.keys():
            odd = sorted(stored.keys() ^ self.patterns.keys())[0]
            raise NMSolveError(
                f"state: expected the masks of {len(self.patterns)} weights, got others ({odd})"
            )
        masks = [unpack_rows(stored[w.name], w.name, w.parameter) for w in self._weights]
        if state["phase"] in ("sparse", "frozen"):
            for weight, mask in zip(self._weights, masks, strict=True):
                self._check(weight, mask)
        for weight, mask in zip(self._weights, masks, strict=True):
            weight.write(mask)
        self.step, self.phase = int(state["step"]), str(state["phase"])
        self._refreshed_at, self._refreshes = int(state["refreshed_at"]), int(state["refreshes"])
        self._flips = self._looked_back = None
        self._counts = dict.fromkeys(self._counts, self.step)

    def _signature(self) -> dict[str, Any]:
        return {
            "transposable": self._settings.transposable,
            "gradient": self._settings.gradient,
            "patterns": {name: str(pattern) for name, pattern in self.patterns.items()},
        }

    def _check(self, weight: MaskedWeight, mask: Tensor) -> None:
        if not mask.numel():
            return
        n, m = weight.pattern.n, weight.pattern.m
        try:
            check_mask(weight.matrices(mask), n, m, transposable=self._settings.transposable)
        except NMSolveError as error:
            raise NMSolveError(f"state: {weight.name}: {error}") from None

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
            self._decay_weights(optimizer, strength)
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._decay_gradients(optimizer, strength)
            return None

        @torch.no_grad()
        def with_decay() -> Any:
            with torch.enable_grad():
                loss = closure()
            self._decay_gradients(optimizer, strength)
            return loss

        if len(args) > 1:
            return (args[0], with_decay, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_decay}

    def _held_by(self, optimizer: Optimizer) -> Iterable[tuple[MaskedWeight, Mapping[str, Any]]]:
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for weight in self._weights:
            group = groups.get(id(weight.parameter))
            if group is not None and weight.parameter.grad is not None:
                yield weight, group

    def _decay_gradients(self, optimizer: Optimizer, strength: float) -> None:
        # GradScaler leaves the gradients of a fused optimizer scaled, and has it divide.
        scale = getattr(optimizer, "grad_scale", None)
        for weight, _ in self._held_by(optimizer):
            gradient = weight.local_gradient
            assert gradient is not None
            pruned = weight.local.masked_fill(weight.mask, 0)
            if scale is not None:
                pruned = pruned * scale.to(pruned)
            gradient.add_(pruned.to(gradient.dtype), alpha=strength)

    def _decay_weights(self, optimizer: Optimizer, strength: float) -> None:
        for weight, group in self._held_by(optimizer):
            local = weight.local
            local.sub_(local.masked_fill(weight.mask, 0) * (group["lr"] * strength))

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
        found: dict[int, Tensor] = {}
        for pattern in dict.fromkeys(weight.pattern for weight in self._weights):
            members = [k for k, weight in enumerate(self._weights) if weight.pattern == pattern]
            members = [k for k in members if self._weights[k].local.numel()]
            scores = [self._weights[k].matrices(self._weights[k].local.abs()) for k in members]
            try:
                if self._settings.transposable:
                    masks = transposable_masks(scores, pattern.n, pattern.m, backend=self._settings.backend)
                else:
                    backend = self._settings.backend
                    masks = [nm_mask(matrix, pattern.n, pattern.m, backend=backend) for matrix in scores]
            except NMSolveError:
                _check_finite([(self._weights[k].name, self._weights[k].local) for k in members])
                raise
            found.update(zip(members, masks, strict=True))
        flips = []
        for k, weight in enumerate(self._weights):
            flips.append(torch.zeros((), dtype=torch.int64))
            if k in found:
                mask = weight.from_matrices(found[k])
                flips[k] = (mask != weight.mask).sum()
                weight.write(mask)
        self._flips = torch.stack([count.to(flips[0].device) for count in flips])

    def _bind(self, model: nn.Module, args: Any) -> None:
        for weight in self._weights:
            if isinstance(weight, GatheredWeight):
                weight.bind()

    def _rates(self, flips: float, size: int) -> tuple[float | None, float | None]:
        if self._looked_back is None or self._flips is None:
            return None, None
        return flips / size, flips / size / self._looked_back

    def _must_be_going(self, what: str) -> None:
        if self.phase == "finished":
            raise NMSolveError(f"{what}: expected a SparseTraining that goes on, got one that is finished")

    def _leave_out_of_ddp(self) -> None:
        """DDP sends every buffer at every forward pass; masks are alike on every process already."""
        names = {
            f"{n}.{MASK}" if n else MASK for n, module in self._model.named_modules() if is_masked(module)
        }
        if names:
            known = set(getattr(self._model, _DDP_IGNORES, ()))
            setattr(self._model, _DDP_IGNORES, [*known, *sorted(names - known)])

    def _put_back_into_ddp(self) -> None:
        known = [n for n in getattr(self._model, _DDP_IGNORES, ()) if n.rpartition(".")[2] != MASK]
        if known:
            setattr(self._model, _DDP_IGNORES, known)
        elif hasattr(self._model, _DDP_IGNORES):
            delattr(self._model, _DDP_IGNORES)


# Where DDP looks for names of what it leaves alone.
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


def _unwrapped(optimizer: object) -> Optimizer:
    """The optimizer that steps: accelerate and Lightning wrap it."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, Optimizer):
        return _unwrapped(inner)
    if not isinstance(optimizer, Optimizer):
        raise NMSolveError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _check_finite(weights: Iterable[tuple[str, Tensor]]) -> None:
    for name, weight in weights:
        local = shard_of(weight)
        wrong = local.numel() - int(torch.isfinite(local).sum())
        if wrong:
            raise WorkFailed(
                f"model: {name}: expected finite values, got {wrong} NaN or infinite of {local.numel()}"
            )


def _summed(numbers: Tensor, groups: Iterable[Any]) -> Tensor:
    for group in groups:
        torch.distributed.all_reduce(numbers, group=group)
    return numbers


def _share(kept: float, total: float) -> float:
    return kept / total if total else 1.0
