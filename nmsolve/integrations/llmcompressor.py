"""Transposable N:M masks for llmcompressor: modifiers for the recipe of ``oneshot``.

Importing this module also registers them, so that recipes in YAML know their names.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from nmsolve.errors import NMSolveError
from nmsolve.integrations.client import importing
from nmsolve.integrations.weights import sparsegpt_weight, weight_mask
from nmsolve.pattern import NMPattern
from nmsolve.prune.layerwise.scores import wanda_scores
from nmsolve.prune.rule import MaskRule

with importing("llmcompressor"):
    from compressed_tensors.utils import align_module_device, update_offload_parameter
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

    def compress_modules(self) -> None:
        for module in list(self._num_samples):
            name = self._module_names[module].removesuffix(".")
            rule = self._rule()
            with torch.no_grad(), align_module_device(module), CompressionLogger(module):
                try:
                    weight = self._pruned(module, rule)
                except NMSolveError as error:
                    raise NMSolveError(f"{name}: {error}") from None
            update_offload_parameter(module, "weight", weight)
            del self._num_samples[module]
            logger.info(f"{name}: kept {rule.tally.retained:.2%} of the score, gap {rule.tally.gap:.1e}")

    def _pruned(self, module: nn.Module, rule: MaskRule) -> Tensor:
        raise NotImplementedError


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

    def _pruned(self, module: nn.Module, rule: MaskRule) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        norms = self._row_scalars.pop(module).sqrt().view(1, *weight.shape[1:])
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

    def _pruned(self, module: nn.Module, rule: MaskRule) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        hessian = self._hessians.pop(module).to(weight.device)
        allowed = weight != 0 if self.preserve_sparsity_mask else None
        damping = cast("float", self.dampening_frac)
        pruned = sparsegpt_weight(weight, hessian, rule, damping=damping, allowed=allowed)
        return pruned.weight.to(weight.dtype)


for _modifier in (TransposableWandaModifier, TransposableSparseGPTModifier):
    ModifierFactory.register(_modifier.__name__, _modifier)
