"""One pruning run: from the plan of the walk to new weights, masks and the report."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError, begun
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import PruneSettings
from nmsolve.prune.calibration import Batch, call_model, real_positions
from nmsolve.prune.experts import routed, watched
from nmsolve.prune.homes import Home
from nmsolve.prune.kept import Kept, Solved, told
from nmsolve.prune.layers import Layer, Selected
from nmsolve.prune.masks import PackedMasks
from nmsolve.prune.methods import PRUNING_METHODS, LayerPruner
from nmsolve.prune.peers import Peers
from nmsolve.prune.report import LayerReport, PruneReport, tell_starved
from nmsolve.prune.rule import MaskRule
from nmsolve.prune.statistics import Statistics, work_dtype
from nmsolve.prune.walk import Chain, Group, Loose, Plan, Stop, input_of, make_plan

__all__ = ["Run"]


@dataclass
class Run:
    """What is pruned, how, on what, and by whom.

    Of the batches the first ``counted`` count; those ``tried`` are what the walk is planned on.
    """

    model: nn.Module
    settings: PruneSettings
    selected: Selected
    allowed: Mapping[Layer, Tensor]
    batches: list[Batch]
    tried: list[Batch]
    report: PruneReport
    kept: Kept
    progress: bool | None
    check: Callable[[], None] | None
    home: Home
    peers: Peers
    counted: int
    masks: PackedMasks = field(default_factory=PackedMasks)
    pruned: dict[Layer, NMPattern] = field(default_factory=dict)
    delayed: list[Callable[[], object]] = field(default_factory=list)
    delay: bool = False
    turn: int = 0

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
        if self.settings.all_experts:
            self._check_experts()
        plan = None
        if self.tried:
            every = self.settings.all_experts
            plan = make_plan(self.model, layers, self.tried[0], self.tried[1:], every, self.peers)
        with begun():
            self._all(plan)

    def _check_experts(self) -> None:
        if not any(layer.is_stack for layer in self.selected.layers):
            raise NMSolveError("all_experts: expected experts that are one parameter, found none to prune")
        modules = [layer.name for layer in self.selected.layers if layer.expert_of is not None]
        if modules:
            raise NMSolveError(
                f"all_experts: {modules[0]} is in an expert that is a module of its own, which sees only the "
                "tokens that the model sends it"
            )

    def _all(self, plan: Plan | None) -> None:
        from tqdm import tqdm

        peers = self.peers
        peers.reshard()
        for layer, mask in self.allowed.items():
            self.home.mask(layer, mask)
        held = map(peers.held, self.model.parameters())
        self._memory(model=sum(p.numel() * p.element_size() for p in held))
        unreached = plan.unreached if plan else []
        working = {_container(layer) for layer in self.selected.layers if layer not in set(unreached)} - {
            None
        }
        unseen = [layer for layer in unreached if _container(layer) in working]
        for layer in unreached:
            if layer not in unseen:
                self.report.skipped[layer.name] = (
                    "no product with its experts was seen in the forward pass of any batch"
                    if layer.is_stack
                    else "not called in the forward pass of any batch"
                )
        total = sum(x.weight.numel() for x in self.selected.layers if x.name not in self.report.skipped)
        disable = None if self.progress is None else not self.progress
        with tqdm(total=total, unit="w", unit_scale=True, disable=disable) as self.bar:
            if plan:
                self._walk(plan)
            else:
                for layer in self.selected.layers:
                    self._group(Group([layer]), None)
            for layer in unseen:
                self._group(Group([layer]), self._statistics(layer, settle=True))
            peers.reshard()
            for keep in self.delayed:
                keep()
        order = {layer.name: place for place, layer in enumerate(self.selected.layers)}
        self.report.layers.sort(key=lambda row: order[row.name])
        if self.home.away:
            self._memory(block=self.home.most)
        self._memory(peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if torch.cuda.is_available():
            self._memory(peak_gpu=torch.cuda.max_memory_allocated())
        for memory in peers.gather(self.report.memory):
            self._memory(**memory)
        tell_starved(self.report)

    def _walk(self, plan: Plan) -> None:
        # Inputs of the dense model need it dense to the end, unless one chain is all there is: its blocks
        # are left behind one by one.
        one_chain = len(plan.stages) == 1 and isinstance(plan.stages[0], Chain)
        self.delay = self.settings.sequential == "off" and not one_chain
        for stage in plan.stages:
            if isinstance(stage, Loose):
                self._one_by_one(stage.groups, self._whole)
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
        with self.home.outside(), self.home.there(chain.blocks[0]):
            chain.capture(self.model, self.batches)
        self._memory(activations=sum(t.nbytes for t in chain.hidden if t is not None))
        for index, groups in enumerate(chain.groups[: last + 1]):
            with self.home.there(chain.blocks[index]):
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
        """Prunes group after group; the groups that experts have in the same place at once."""
        together: dict[object, list[Group]] = {}
        for group in groups:
            together.setdefault(group.key, []).append(group)
        for alike in together.values():
            waiting = [group for group in alike if not self._done(group)]
            measured = dict(zip(waiting, self._measure(waiting, forward) if waiting else (), strict=True))
            for group in alike:
                self._group(group, measured.pop(group, None))

    def _all_at_once(self, groups: Sequence[Group], measured: Sequence[Statistics]) -> None:
        for k, group in enumerate(groups):
            self._group(group, measured[k] if measured else None)

    def _done(self, group: Group) -> bool:
        return all(layer in self.kept for layer in group.layers)

    def _statistics(self, layer: Layer, settle: bool = False) -> Statistics:
        method, device = PRUNING_METHODS[self.settings.method], self.home.device_of(layer)
        found = Statistics(layer, method, self.settings.exact_error, self.peers, device)
        if settle:
            found.settle()
        return found

    def _measure(
        self, groups: Sequence[Group], forward: Callable[[int], Any], stop: bool = True
    ) -> list[Statistics]:
        """Statistics of groups of layers, from a pass over all batches; a pass may stop at the last one."""
        measured = {group.layers[0]: self._statistics(group.layers[0]) for group in groups}
        early = stop and len(groups) == 1 and groups[0].once and not self.peers.sharded
        stacks: dict[nn.Module, list[Layer]] = {}
        real: list[Tensor | None] = [None]

        def halt() -> None:
            if early:
                raise Stop

        def calls(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            return routed(stacks[module][0].groups, args, kwargs, self.settings.all_experts, real[0])

        with ExitStack() as hooks:
            for layer, statistics in measured.items():
                if layer.is_stack:
                    stacks.setdefault(layer.module, []).append(layer)
                else:
                    hook = _measuring(statistics, halt)
                    hooks.callback(layer.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            tell = watched(
                stacks, lambda layer, expert, x: measured[layer].add_expert(expert, x), calls, halt
            )
            hooks.enter_context(tell)
            self._memory(statistics=sum(found.nbytes() for found in measured.values()))
            for batch in range(len(self.batches)):
                if self.check is not None:
                    self.check()
                real[0] = real_positions(self.model, self.batches[batch])
                for found in measured.values():
                    found.real = real[0]
                    found.muted = batch >= self.counted
                with suppress(Stop):
                    forward(batch)
        with self.peers.agreed():  # before sums spread what one of them has
            for layer, found in measured.items():
                found.check(layer.name)
        for layer, found in measured.items():
            found.reduce(self.peers)
            found.check(layer.name)
            if _is_expert(layer):
                found.settle()
        return list(measured.values())

    def _group(self, group: Group, measured: Statistics | None) -> None:
        """Prunes the layers of a group, or takes them from the store."""
        prepared = cache(partial(self._prepare, measured))  # by the first layer that is not in the store
        self.peers.reshard()
        left = [layer for layer in group.layers if layer not in self.kept]
        solved = self._deal(left, measured, prepared) if self.peers.count > 1 else {}
        for layer in group.layers:
            if self.check is not None:
                self.check()
            if layer in self.kept:
                weight, mask, report = self.kept.load(layer, self.home.device_of(layer))
                self.report.resumed += 1
            else:
                if self.peers.count > 1:
                    rank, found = solved.pop(layer)
                    found = told(self.peers, layer, found, rank, self.home.device_of(layer))
                else:
                    found = self._one(layer, measured, prepared)
                weight, mask, report = found
                self.kept.save(layer, found)
            self.masks.add(layer.weight_name, mask)
            self.pruned[layer] = self.selected.layers[layer]
            self.report.layers.append(report)
            if self.delay:
                self.delayed.append(self.home.keep_later(layer, weight))
            else:
                self.home.keep(layer, weight)
            error = "" if report.relative_error is None else f"error {report.relative_error:.3g}, "
            self.bar.set_description_str(layer.name, refresh=False)
            self.bar.set_postfix_str(f"{error}gap {report.gap:.1e}", refresh=False)
            self.bar.update(report.weights)

    def _deal(
        self, layers: Sequence[Layer], measured: Statistics | None, prepared: Callable[..., LayerPruner]
    ) -> dict[Layer, tuple[int, Solved | None]]:
        """Who solves which layer of a group, and what came of it here."""
        ranks: dict[Layer, int] = {}
        gathered: dict[Layer, Tensor] = {}
        for layer in layers:
            ranks[layer] = self.turn % self.peers.count
            self.turn += 1
            whole = self.peers.whole(layer.weight) if self.peers.sharded else None
            if whole is not None and ranks[layer] == self.peers.rank:
                gathered[layer] = whole
        solved: dict[Layer, Solved] = {}
        with self.peers.agreed():
            for layer, rank in ranks.items():
                if rank == self.peers.rank:
                    solved[layer] = self._one(layer, measured, prepared, gathered.pop(layer, None))
        return {layer: (rank, solved.get(layer)) for layer, rank in ranks.items()}

    def _one(
        self,
        layer: Layer,
        measured: Statistics | None,
        prepared: Callable[..., LayerPruner],
        whole: Tensor | None = None,
    ) -> Solved:
        """Solves a layer, whose ``whole`` weight may have been gathered."""
        with self.home.there(layer.module):
            weight = self.peers.whole(layer.weight) if whole is None else whole
            return self._layer(layer, weight, measured, prepared)

    def _prepare(self, measured: Statistics | None, expert: int | None = None) -> LayerPruner:
        """What prunes the layers of a group, or one expert, by the method of the run."""
        method = PRUNING_METHODS[self.settings.method]
        options = {name: getattr(self.settings, name) for name in method.options}
        return method.prepare(None if measured is None else measured.needed(expert), **options)

    def _layer(
        self,
        layer: Layer,
        whole: Tensor,
        measured: Statistics | None,
        prepared: Callable[..., LayerPruner],
    ) -> Solved:
        """New weight and mask of one layer, both in the weight's shape, as ``whole``, its weight, is."""
        start = time.perf_counter()
        pattern = self.selected.layers[layer]
        rule = MaskRule(pattern, self.settings.transposable, self.settings.mask_method, self.settings.backend)
        with torch.autocast(layer.weight.device.type, enabled=False):
            try:
                weight, mask, lost, all_of_it = self._solve(layer, whole, measured, prepared, rule)
            except NMSolveError as problem:
                raise NMSolveError(f"{layer.name}: {problem}") from None
        tally = rule.tally
        tokens = measured.tokens if measured is not None else [0]
        by_expert = measured is not None and _is_expert(layer)
        report = LayerReport(
            name=layer.name,
            shape=tuple(layer.weight.shape),
            dtype=str(layer.weight.dtype).removeprefix("torch."),
            pattern=str(pattern),
            weights=layer.weight.numel(),
            kept=int(mask.sum()),
            tokens=sum(tokens) if layer.is_stack else tokens[0],
            relative_error=None if measured is None else max(0.0, lost / all_of_it) if all_of_it > 0 else 0.0,
            retained=tally.retained,
            score=tally.score,
            objective=tally.objective,
            bound=tally.bound,
            gap=tally.gap,
            max_gap=tally.max_gap,
            seconds=time.perf_counter() - start,
            mask_seconds=tally.seconds,
            mask_solves=tally.solves,
            error_tokens=0 if measured is None else measured.error_tokens(),
            expert_tokens=list(tokens[: layer.groups]) if by_expert else None,
        )
        return weight, mask, report

    def _solve(
        self,
        layer: Layer,
        whole: Tensor,
        measured: Statistics | None,
        prepared: Callable[..., LayerPruner],
        rule: MaskRule,
    ) -> tuple[Tensor, Tensor, float, float]:
        """New weight and mask, and the squared outputs that are lost, and that there were.

        Experts are solved one after the other, so that one of them is what there must be memory for.
        """
        allowed = self.allowed.get(layer)
        keep = None if allowed is None else layer.matrices(allowed.to(layer.weight.device))
        before = layer.matrices(whole)
        if not layer.is_stack:
            dense = before.to(work_dtype(layer.weight))
            pruned, mask = prepared()(dense, rule, layer.positions, keep)
            weight = layer.from_matrices(pruned).to(layer.weight.dtype)
            return weight, layer.from_matrices(mask), *_losses(dense, layer.matrices(weight), measured, None)
        weights, masks = torch.empty_like(before), torch.empty_like(before, dtype=torch.bool)
        rows = layer.matrix_shape[0]
        sums = torch.zeros(2, dtype=torch.float64)
        for expert in range(layer.groups):
            which = slice(expert, expert + 1)
            dense = before[which].to(work_dtype(layer.weight))
            prune = self._prepare(measured, expert)
            for part in range(0, dense.shape[1], rows):
                of_part = which, slice(part, part + rows)
                given = None if keep is None else keep[of_part]
                found = prune(dense[:, of_part[1]], rule, layer.positions, given)
                weights[of_part], masks[of_part] = found.weight.to(weights.dtype), found.mask
            sums += torch.tensor(_losses(dense, weights[which], measured, expert), dtype=torch.float64)
        lost, all_of_it = sums.tolist()
        return layer.from_matrices(weights), layer.from_matrices(masks), lost, all_of_it

    def _memory(self, **sizes: int) -> None:
        for name, size in sizes.items():
            self.report.memory[name] = max(size, self.report.memory.get(name, 0))


def _container(layer: Layer) -> str | None:
    """The name of what holds an expert that is a module."""
    return None if layer.expert_of is None else layer.expert_of[0]


def _is_expert(layer: Layer) -> bool:
    return layer.is_stack or layer.expert_of is not None


def _measuring(statistics: Statistics, halt: Callable[[], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        statistics.add(input_of(args, kwargs).detach())
        halt()

    return hook


def _losses(
    dense: Tensor, pruned: Tensor, measured: Statistics | None, expert: int | None
) -> tuple[float, float]:
    """``||(W - W') X||^2`` and ``||W X||^2``."""
    if measured is None:
        return 0.0, 0.0
    return measured.loss(dense - pruned.to(dense.dtype), expert), measured.loss(dense, expert)
