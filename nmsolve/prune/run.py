"""One pruning run: from the plan of the walk to new weights, masks and the report."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.checkpoint.mask_files import pack_mask, unpack_mask
from nmsolve.errors import NMSolveError, begun
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import PruneSettings
from nmsolve.prune.calibration import Batch, call_model, real_positions
from nmsolve.prune.layers import Layer, Selected
from nmsolve.prune.methods import PRUNING_METHODS, LayerPruner
from nmsolve.prune.report import LayerReport, PruneReport
from nmsolve.prune.rule import MaskRule
from nmsolve.prune.store import LayerStore
from nmsolve.prune.walk import Chain, Group, Loose, Plan, Stop, input_of, make_plan

__all__ = ["PackedMasks", "Run"]


class PackedMasks(Mapping[str, Tensor]):
    """Masks by the name of their weight, held as bits and unpacked when they are asked for."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, torch.Size]] = {}

    def add(self, name: str, mask: Tensor) -> None:
        self._packed[name] = pack_mask(mask), mask.shape

    def __getitem__(self, name: str) -> Tensor:
        return unpack_mask(*self._packed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)


@dataclass
class Hessian:
    """``X.T @ X`` ``(groups, in, in)`` over the inputs of a group of layers, and how many there were.

    ``real`` tells for the batch at hand which of its positions ``(B, T)`` are no padding.
    """

    layer: Layer
    matrix: Tensor
    tokens: int = 0
    real: Tensor | None = None

    @classmethod
    def of(cls, layer: Layer) -> Hessian:
        size = layer.matrices(layer.weight).shape[2]
        dtype, device = _work_dtype(layer.weight), layer.weight.device
        return cls(layer, torch.zeros((layer.groups, size, size), dtype=dtype, device=device))

    def add(self, x: Tensor) -> None:
        if self.real is not None and not self.layer.is_convolution:
            real = self.real.flatten().to(x.device)
            if x.shape[:-1] in (self.real.shape, real.shape):
                x = x.reshape(-1, x.shape[-1])[real]
        x = self.layer.inputs(x).to(self.matrix.dtype)
        self.matrix.baddbmm_(x.transpose(1, 2), x)
        self.tokens += x.shape[1]


@dataclass
class Run:
    model: nn.Module
    settings: PruneSettings
    selected: Selected
    allowed: Mapping[Layer, Tensor]
    batches: list[Batch]
    report: PruneReport
    store: LayerStore | None
    progress: bool | None
    check: Callable[[], None] | None
    masks: PackedMasks = field(default_factory=PackedMasks)
    pruned: dict[Layer, NMPattern] = field(default_factory=dict)
    delayed: list[tuple[Layer, Tensor]] = field(default_factory=list)
    delay: bool = False

    def all(self) -> None:
        """Prunes every layer.

        Raises
        ------
        NMSolveError
            If the model cannot be called on the first batch, or calls no layer then; nothing is changed.
        WorkFailed
            If a layer cannot be pruned.
        """
        layers = list(self.selected.layers)
        plan = make_plan(self.model, layers, self.batches[0]) if self.batches else None
        with begun():
            self._all(plan)

    def _all(self, plan: Plan | None) -> None:
        from tqdm import tqdm

        for layer, mask in self.allowed.items():
            layer.weight.data.mul_(mask.to(layer.weight.device))
        self._memory(model=sum(p.numel() * p.element_size() for p in self.model.parameters()))
        for layer in plan.unreached if plan else ():
            self.report.skipped[layer.name] = "not called in the forward pass of the first batch"
        total = sum(x.weight.numel() for x in self.selected.layers if x.name not in self.report.skipped)
        disable = None if self.progress is None else not self.progress
        with tqdm(total=total, unit="w", unit_scale=True, disable=disable) as self.bar:
            if plan:
                self._walk(plan)
            else:
                for layer in self.selected.layers:
                    self._group(Group([layer]), None)
            for layer, weight in self.delayed:
                layer.weight.data.copy_(weight)
        order = {layer.name: place for place, layer in enumerate(self.selected.layers)}
        self.report.layers.sort(key=lambda row: order[row.name])
        self._memory(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if torch.cuda.is_available():
            self._memory(peak_gpu=torch.cuda.max_memory_allocated())

    def _walk(self, plan: Plan) -> None:
        # Inputs of the dense model need it dense to the end, unless one chain is all there is: its blocks
        # are left behind one by one.
        one_chain = len(plan.stages) == 1 and isinstance(plan.stages[0], Chain)
        self.delay = self.settings.sequential == "off" and not one_chain
        for stage in plan.stages:
            if isinstance(stage, Loose):
                for group in stage.groups:
                    self._one_by_one([group], self._whole)
            else:
                self._chain(stage)

    def _whole(self, batch: int) -> None:
        call_model(self.model, self.batches[batch])

    def _chain(self, chain: Chain) -> None:
        last = max(k for k, groups in enumerate(chain.groups) if groups)
        if all(self._done(group) for groups in chain.groups for group in groups):
            for groups in chain.groups:
                for group in groups:
                    self._group(group, None)
            return
        chain.capture(self.model, self.batches)
        self._memory(activations=sum(t.numel() * t.element_size() for t in chain.hidden))
        for index, groups in enumerate(chain.groups[: last + 1]):
            self._block(chain, index, groups, index == last)
        chain.release()

    def _block(self, chain: Chain, index: int, groups: list[Group], last: bool) -> None:
        """Prunes one block and hands the hidden states on to the next."""
        run, advance = partial(chain.run, index), partial(chain.advance, index)
        finished = all(self._done(group) for group in groups)
        if (
            self.settings.sequential == "off"
        ):  # the dense block hands them on, while it is measured if need be
            if not finished:
                self._all_at_once(groups, self._measure(groups, run if last else advance, stop=False))
                return
        elif self.settings.sequential == "layer":
            self._one_by_one(groups, run)
        else:
            self._all_at_once(groups, [] if finished else self._measure(groups, run))
        if not last:
            for batch in range(len(self.batches)):
                advance(batch)
        if self.settings.sequential == "off":
            self._all_at_once(groups, [])

    def _one_by_one(self, groups: Sequence[Group], forward: Callable[[int], Any]) -> None:
        for group in groups:
            if self._done(group):
                self._group(group, None)
            else:
                (hessian,) = self._measure([group], forward)
                self._group(group, hessian)

    def _all_at_once(self, groups: Sequence[Group], hessians: Sequence[Hessian]) -> None:
        for k, group in enumerate(groups):
            self._group(group, hessians[k] if hessians else None)

    def _done(self, group: Group) -> bool:
        return self.store is not None and all(layer.name in self.store for layer in group.layers)

    def _measure(
        self, groups: Sequence[Group], forward: Callable[[int], Any], stop: bool = True
    ) -> list[Hessian]:
        """The Hessians of groups of layers, from a pass over all batches; a pass may stop at the last one."""
        hessians = []
        with ExitStack() as hooks:
            for group in groups:
                first = group.layers[0]
                hessian = Hessian.of(first)
                early = stop and len(groups) == 1 and group.once
                hook = first.module.register_forward_pre_hook(_measuring(hessian, early), with_kwargs=True)
                hooks.callback(hook.remove)
                hessians.append(hessian)
            self._memory(statistics=sum(h.matrix.numel() * h.matrix.element_size() for h in hessians))
            for batch in range(len(self.batches)):
                if self.check is not None:
                    self.check()
                real = real_positions(self.model, self.batches[batch])
                for hessian in hessians:
                    hessian.real = real
                with suppress(Stop):
                    forward(batch)
        for group, hessian in zip(groups, hessians, strict=True):
            if not bool(torch.isfinite(hessian.matrix).all()):
                raise NMSolveError(
                    f"calibration: the inputs of {group.layers[0].name} hold NaN or infinite values, or "
                    "overflow when squared"
                )
        return hessians

    def _group(self, group: Group, hessian: Hessian | None) -> None:
        """Prunes the layers of a group, or takes them from the store."""
        prepared = cache(partial(self._prepare, hessian))  # by the first layer that is not in the store
        for layer in group.layers:
            if self.check is not None:
                self.check()
            if self.store is not None and layer.name in self.store:
                weight, mask, report = self.store.load(layer.name, layer.weight)
                self.report.resumed += 1
            else:
                weight, mask, report = self._layer(layer, hessian, prepared)
                if self.store is not None:
                    self.store.save(layer.name, weight, mask, report)
            self.masks.add(layer.weight_name, mask)
            self.pruned[layer] = self.selected.layers[layer]
            self.report.layers.append(report)
            if self.delay:
                self.delayed.append((layer, weight.cpu()))
            else:
                layer.weight.data.copy_(weight)
            error = "" if report.relative_error is None else f"error {report.relative_error:.3g}, "
            self.bar.set_description_str(layer.name, refresh=False)
            self.bar.set_postfix_str(f"{error}gap {report.gap:.1e}", refresh=False)
            self.bar.update(report.weights)

    def _prepare(self, hessian: Hessian | None) -> LayerPruner:
        """What prunes the layers of a group by the method of the run."""
        method = PRUNING_METHODS[self.settings.method]
        options = {name: getattr(self.settings, name) for name in method.options}
        return method.prepare(None if hessian is None else hessian.matrix, **options)

    def _layer(
        self, layer: Layer, hessian: Hessian | None, prepared: Callable[[], LayerPruner]
    ) -> tuple[Tensor, Tensor, LayerReport]:
        """New weight and mask of one layer, both in the weight's shape."""
        start = time.perf_counter()
        pattern = self.selected.layers[layer]
        rule = MaskRule(pattern, self.settings.transposable, self.settings.mask_method, self.settings.backend)
        allowed = self.allowed.get(layer)
        keep = None if allowed is None else layer.matrices(allowed.to(layer.weight.device))
        dense = layer.matrices(layer.weight.detach()).to(_work_dtype(layer.weight))
        error = None
        with torch.autocast(dense.device.type, enabled=False):
            try:
                pruned, mask = prepared()(dense, rule, layer.positions, keep)
            except NMSolveError as problem:
                raise NMSolveError(f"{layer.name}: {problem}") from None
            weight = layer.from_matrices(pruned).to(layer.weight.dtype)
            if hessian is not None:
                error = _relative_error(dense, layer.matrices(weight), hessian.matrix)
        full_mask = layer.from_matrices(mask)
        tally = rule.tally
        report = LayerReport(
            name=layer.name,
            shape=tuple(layer.weight.shape),
            dtype=str(layer.weight.dtype).removeprefix("torch."),
            pattern=str(pattern),
            weights=layer.weight.numel(),
            kept=int(mask.sum()),
            tokens=0 if hessian is None else hessian.tokens,
            relative_error=error,
            retained=tally.retained,
            score=tally.score,
            objective=tally.objective,
            bound=tally.bound,
            gap=tally.gap,
            max_gap=tally.max_gap,
            seconds=time.perf_counter() - start,
            mask_seconds=tally.seconds,
            mask_solves=tally.solves,
        )
        return weight, full_mask, report

    def _memory(self, **sizes: int) -> None:
        for name, size in sizes.items():
            self.report.memory[name] = max(size, self.report.memory.get(name, 0))


def _work_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _measuring(hessian: Hessian, stop: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hessian.add(input_of(args, kwargs).detach())
        if stop:
            raise Stop

    return hook


def _relative_error(dense: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """``||(W - W') X||^2 / ||W X||^2``, with ``X X^T`` the Hessian."""
    lost = dense - pruned.to(dense.dtype)
    top = ((lost @ hessian) * lost).sum(dtype=torch.float64)
    whole = ((dense @ hessian) * dense).sum(dtype=torch.float64)
    return max(0.0, float(top / whole)) if whole > 0 else 0.0
