"""Transposable N:M masks for llmcompressor: modifiers for the recipe of ``oneshot``.

Importing this module also registers them, so that recipes in YAML know their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import cast

import torch
from torch import Tensor, distributed, nn

from nmsolve.errors import NMSolveError
from nmsolve.integrations.client import importing
from nmsolve.integrations.weights import sparsegpt_weight, weight_mask
from nmsolve.pattern import NMPattern
from nmsolve.prune.layerwise.scores import wanda_scores
from nmsolve.prune.rule import MaskRule

with importing("llmcompressor"):
    from compressed_tensors.distributed import greedy_bin_packing, is_distributed
    from compressed_tensors.offload import align_module_device, get_execution_device, update_offload_parameter
    from compressed_tensors.offload.cache import DistributedCPUCache, DistributedDiskCache
    from llmcompressor.modifiers import ModifierFactory
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_base import SparsityModifierBase
    from llmcompressor.utils.metric_logging import CompressionLogger
    from loguru import logger
    from pydantic import PrivateAttr, model_validator

__all__ = ["TransposableSparseGPTModifier", "TransposableWandaModifier"]


class _Transposable(SparsityModifierBase):
    """What both modifiers share: the pattern, and the walk over the calibrated modules."""

    sparsity: float | None = None
    mask_structure: str
    mask_method: str = "exact"
    backend: str = "auto"

    _num_samples: dict[nn.Module, int] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> _Transposable:
        rule = self._rule()
        share = rule.pattern.pruned / rule.pattern.m
        if self.sparsity is not None and self.sparsity != share:
            raise NMSolveError(
                f"sparsity: mask_structure {self.mask_structure!r} prunes {rule.pattern.pruned} of "
                f"{rule.pattern.m}, expected {share} or nothing, got {self.sparsity}"
            )
        if self.sparsity_profile is not None:
            raise NMSolveError("sparsity_profile: N:M has the same sparsity everywhere, expected None")
        return self

    def _split_mask_structure(self, mask_structure: str) -> tuple[int, int]:
        try:
            return super()._split_mask_structure(mask_structure)
        except ValueError:
            raise NMSolveError(
                f"mask_structure: expected 'N:M' with N pruned of M, such as '16:32', got {mask_structure!r}"
            ) from None

    def _rule(self) -> MaskRule:
        pattern = NMPattern.from_pruned(*self._split_mask_structure(self.mask_structure))
        return MaskRule(pattern, True, self.mask_method, self.backend)

    @property
    def _statistics(self) -> dict[nn.Module, Tensor]:
        """What was gathered for each module that inputs reached: a mean over the samples of this process."""
        raise NotImplementedError

    def _pruned(self, module: nn.Module, statistic: Tensor, rule: MaskRule) -> Tensor:
        raise NotImplementedError

    def compress_modules(self) -> None:
        if not is_distributed():
            self._compress(list(self._num_samples))
            return
        mine, owners = self._pooled()
        rank = distributed.get_rank()
        failure: Exception | None = None
        try:
            self._compress(mine)
        except Exception as error:  # the others must not wait for it
            failure = error
        messages: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(messages, failure and f"rank {rank}: {failure}")
        if failure is not None:
            raise failure
        for message in filter(None, messages):
            raise NMSolveError(message)
        for module, owner in owners.items():
            _broadcast_weight(module, owner)

    def _compress(self, modules: Iterable[nn.Module]) -> None:
        for module in modules:
            name = self._module_names[module].removesuffix(".")
            rule = self._rule()
            with torch.no_grad(), align_module_device(module), CompressionLogger(module):
                try:
                    weight = self._pruned(module, self._statistics.pop(module), rule)
                except NMSolveError as error:
                    raise NMSolveError(f"{name}: {error}") from None
            update_offload_parameter(module, "weight", weight)
            del self._num_samples[module]
            logger.info(f"{name}: kept {rule.tally.retained:.2%} of the score, gap {rule.tally.gap:.1e}")

    def _pooled(self) -> tuple[list[nn.Module], dict[nn.Module, int]]:
        """The modules that this rank has to prune, with statistics over all ranks; owners of what is dealt.

        Ranks agree on the modules by name: an expert may have been reached, or be there, on one alone.
        What all of them hold is dealt by size and will be broadcast; what some hold each of these prunes.
        """
        modules = {name: module for module, name in self._module_names.items()}
        held = {
            name: (self._num_samples.get(module, 0), module.weight.shape[1])
            for name, module in modules.items()
        }
        by_rank: list[dict[str, tuple[int, int]]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(by_rank, held)
        columns: dict[str, int] = {}
        totals: dict[str, int] = {}
        for name, (samples, width) in chain.from_iterable(found.items() for found in by_rank):
            columns[name] = width
            totals[name] = totals.get(name, 0) + samples
        reached = [name for name, total in totals.items() if total]
        common = [name for name in reached if all(name in found for found in by_rank)]
        _, _, owners = greedy_bin_packing(common, len(by_rank), columns.__getitem__)
        device = get_execution_device(next(iter(modules.values()))) if modules else torch.device("cpu")
        mine = []
        for name in reached:
            module = modules.get(name)
            own = held[name][0] if name in held else 0
            if module is not None and own:
                del self._num_samples[module]
                statistic = self._statistics.pop(module).to(device).mul_(own / totals[name])
            else:
                statistic = self._nothing(columns[name], device)
            if name in owners:
                distributed.reduce(statistic, owners[name])
            else:
                distributed.all_reduce(statistic)
            if module is not None and owners.get(name, distributed.get_rank()) == distributed.get_rank():
                self._statistics[module], self._num_samples[module] = statistic, totals[name]
                mine.append(module)
        return mine, {modules[name]: owner for name, owner in owners.items()}

    def _nothing(self, columns: int, device: torch.device) -> Tensor:
        """The statistic of no samples."""
        raise NotImplementedError


def _broadcast_weight(module: nn.Module, owner: int) -> None:
    """The weight that its owner has pruned, on all ranks: also what they hold of it on their devices."""
    weight: Tensor = module.weight.data  # type: ignore[assignment]
    distributed.broadcast(weight, owner)
    shared = isinstance(module._parameters, DistributedCPUCache | DistributedDiskCache)
    if distributed.get_rank() != owner and not shared:
        update_offload_parameter(module, "weight", weight)


class TransposableWandaModifier(_Transposable, WandaPruningModifier):
    """``WandaPruningModifier`` with optimal transposable masks.

    Parameters
    ----------
    mask_structure : str
        ``"N:M"`` as llmcompressor counts: N of M are **pruned** in every row and column of each M x M block.
    sparsity : float, optional
        N / M, if given.
    mask_method, backend : str
        As in :func:`nmsolve.transposable_mask`.
    targets, ignore, ...
        As in ``WandaPruningModifier``.

    Raises
    ------
    pydantic.ValidationError
        If an argument is not as described.

    Examples
    --------
    >>> modifier = TransposableWandaModifier(mask_structure="24:32", ignore=["re:.*lm_head"])
    """

    @property
    def _statistics(self) -> dict[nn.Module, Tensor]:
        return cast("dict[nn.Module, Tensor]", self._row_scalars)

    def _nothing(self, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(columns, device=device)

    def _pruned(self, module: nn.Module, statistic: Tensor, rule: MaskRule) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        norms = statistic.sqrt().view(1, *weight.shape[1:])
        return weight * weight_mask(wanda_scores(weight, norms), rule)


class TransposableSparseGPTModifier(_Transposable, SparseGPTModifier):
    """``SparseGPTModifier`` with optimal transposable masks.

    Parameters
    ----------
    mask_structure, sparsity, mask_method, backend
        As in :class:`TransposableWandaModifier`.
    dampening_frac, preserve_sparsity_mask, offload_hessians, targets, ignore, ...
        As in ``SparseGPTModifier``; ``block_size`` has no influence.

    Raises
    ------
    pydantic.ValidationError
        If an argument is not as described.

    Examples
    --------
    >>> modifier = TransposableSparseGPTModifier(mask_structure="16:32", ignore=["re:.*lm_head"])
    """

    @property
    def _statistics(self) -> dict[nn.Module, Tensor]:
        return cast("dict[nn.Module, Tensor]", self._hessians)

    def _nothing(self, columns: int, device: torch.device) -> Tensor:
        return torch.zeros(columns, columns, device=device)

    def _pruned(self, module: nn.Module, statistic: Tensor, rule: MaskRule) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        hessian = statistic.to(weight.device)
        allowed = weight != 0 if self.preserve_sparsity_mask else None
        damping = cast("float", self.dampening_frac)
        pruned = sparsegpt_weight(weight, hessian, rule, damping=damping, allowed=allowed)
        return pruned.weight.to(weight.dtype)


for _modifier in (TransposableWandaModifier, TransposableSparseGPTModifier):
    ModifierFactory.register(_modifier.__name__, _modifier)
