"""N:M and transposable N:M masks for nvidia-modelopt's weight sparsity.

:func:`sparsify` is ``modelopt.torch.sparsity.sparsify`` with other masks: the modes are modelopt's own, so
that ``export``, ``modelopt.torch.opt.save`` and ``restore`` need no nmsolve.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from nmsolve.integrations.client import importing
from nmsolve.integrations.weights import sparsegpt_weight, weight_mask
from nmsolve.pattern import NMPattern
from nmsolve.prune.arguments import check_in_memory
from nmsolve.prune.rule import MaskRule

with importing("nvidia-modelopt"):
    from modelopt.torch.opt.conversion import apply_mode, get_mode
    from modelopt.torch.sparsity.weight_sparsity.magnitude import MagnitudeSearcher
    from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry
    from modelopt.torch.sparsity.weight_sparsity.searcher import BaseSparseSearcher
    from modelopt.torch.sparsity.weight_sparsity.sparsegpt import SparseGPTSearcher

__all__ = ["sparsify"]


_DEFAULTS: dict[str, Any] = {
    "pattern": "2:4",
    "transposable": True,
    "mask_method": "exact",
    "backend": "auto",
}


def _rule(config: dict[str, Any] | None) -> MaskRule:
    options = _DEFAULTS | (config or {})
    pattern = options["pattern"]
    if isinstance(pattern, str):
        pattern = pattern.removesuffix(" sparsity")
    return MaskRule(
        NMPattern.of(pattern), options["transposable"], options["mask_method"], options["backend"]
    )


class _NMSearcher(BaseSparseSearcher):
    """What both searchers share: any pattern instead of 2:4 alone."""

    @property
    def default_search_config(self) -> dict[str, Any]:
        return super().default_search_config | _DEFAULTS

    def sanitize_search_config(self, config: dict[str, Any] | None) -> dict[str, Any]:
        # Not that of BaseSparseSearcher, which refuses everything but 2:4.
        sanitized = super(BaseSparseSearcher, self).sanitize_search_config(config)
        self.rule = _rule(sanitized)
        return sanitized

    def _check_weight_size(self, weight: Tensor, mod_name: str) -> bool:
        m = self.rule.pattern.m
        fits = weight.shape[0] % m == 0 and weight.shape[1] % m == 0
        if not fits:
            warnings.warn(
                f"left dense: {mod_name}, whose size {tuple(weight.shape)} blocks of {m} do not divide",
                stacklevel=2,
            )
        return fits


class _NMMagnitudeSearcher(_NMSearcher, MagnitudeSearcher):
    def _compute_mask(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        return weight_mask(weight.detach().abs(), self.rule, groups=getattr(module, "groups", 1))


class _NMSparseGPTSearcher(_NMSearcher, SparseGPTSearcher):
    def _compute_mask(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        hessian: Tensor = module.hessian  # type: ignore[assignment]
        damping = self.config["hessian_damp"]
        return sparsegpt_weight(weight.detach(), hessian.to(weight.device), self.rule, damping=damping).mask


_SEARCHERS = {MagnitudeSearcher: _NMMagnitudeSearcher, SparseGPTSearcher: _NMSparseGPTSearcher}


def sparsify(model: nn.Module, mode: Any, config: dict[str, Any] | None = None) -> nn.Module:
    """Converts a model to one of modelopt's sparsity modes and sets its masks.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    mode : str or list
        ``"sparse_magnitude"`` or ``"sparsegpt"``, or a list ``[(mode, rules)]``, as modelopt takes it.
    config : dict, optional
        modelopt's options (``data_loader``, ``collect_func``, ``forward_loop``, ``hessian_damp``, ...) and

        - ``pattern``: ``"8:16"`` keeps 8 of 16 (``"8:16 sparsity"`` is the same); 2:4 by default
        - ``transposable``: N:M along rows and columns (the default), or along the inputs only
        - ``mask_method``, ``backend``: as in :func:`nmsolve.transposable_mask`

    Returns
    -------
    nn.Module
        The model; a layer whose size M does not divide stays dense, with a warning.

    Raises
    ------
    NMSolveError
        If an option of nmsolve is not as described; the model is left as it was.

    Examples
    --------
    >>> model = sparsify(torch.nn.Sequential(torch.nn.Linear(32, 16)), "sparse_magnitude", {"pattern": "4:8"})
    Searching for sparse mask and weight update for module 0.
    >>> nmsolve.check_mask(model[0].weight != 0, 4, 8)
    """
    _rule(config)
    check_in_memory(model)
    model = apply_mode(model, mode, registry=SparsityModeRegistry)
    searcher = _SEARCHERS[get_mode(model).search_algorithm]()
    searcher.search(model, {}, (), config)
    return model
