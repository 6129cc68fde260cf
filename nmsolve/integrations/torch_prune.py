"""N:M and transposable N:M masks for torch.nn.utils.prune."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from nmsolve.integrations.weights import weight_mask
from nmsolve.ops.validation import check_scores
from nmsolve.pattern import PatternLike
from nmsolve.prune.layers import Layer
from nmsolve.prune.rule import MaskRule

__all__ = ["NMPruning", "nm_structured"]

Module = TypeVar("Module", bound=nn.Module)


class NMPruning(BasePruningMethod):
    """Keeps the N:M mask with the largest importance scores; see :func:`nm_structured`.

    Parameters
    ----------
    pattern, transposable, method, backend
        As in :class:`nmsolve.prune.MaskRule`, which is the attribute ``rule``: its tally has the retained
        score and the certificate.
    groups : int
        Groups of a convolution; ``apply`` reads them from the module.
    input_first : bool
        Whether the weight is stored ``(in, out)``; ``apply`` knows transformers' Conv1D.

    Examples
    --------
    >>> method = NMPruning.apply(torch.nn.Linear(32, 16), "weight", "4:8")
    >>> method.rule.tally.gap < 1e-6
    True
    """

    # Containers of several methods hand over the whole tensor, not the entries that are left.
    PRUNING_TYPE = "global"

    def __init__(
        self,
        pattern: PatternLike,
        *,
        transposable: bool = True,
        method: str = "exact",
        backend: str = "auto",
        groups: int = 1,
        input_first: bool = False,
    ) -> None:
        self.rule = MaskRule(pattern, transposable, method, backend)  # type: ignore[arg-type]
        self.groups = groups
        self.input_first = input_first

    def compute_mask(self, t: Tensor, default_mask: Tensor) -> Tensor:
        """The mask by the magnitude of ``t``, within ``default_mask`` and of its dtype; 1 = keep."""
        keep = weight_mask(
            t.detach().abs(),
            self.rule,
            groups=self.groups,
            input_first=self.input_first,
            # Within a mask that leaves all of them, lines of blocks at the edge may keep fewer.
            allowed=None if bool(default_mask.all()) else default_mask != 0,
        )
        return keep.to(default_mask.dtype)

    @classmethod
    def apply(  # type: ignore[override]
        cls,
        module: nn.Module,
        name: str,
        pattern: PatternLike,
        *,
        importance_scores: Tensor | None = None,
        **options: Any,
    ) -> BasePruningMethod:
        """Prunes a parameter and adds the hook that keeps it pruned; returns the method."""
        layer = Layer("", module)
        layout = {"groups": layer.groups, "input_first": layer.input_first}
        parameter = getattr(module, name, None)
        if isinstance(parameter, Tensor):
            check_scores(parameter.detach(), rank=0, name=name)
        return super().apply(module, name, pattern, importance_scores=importance_scores, **layout | options)


def nm_structured(
    module: Module,
    name: str,
    pattern: PatternLike,
    *,
    transposable: bool = True,
    importance_scores: Tensor | None = None,
    method: str = "exact",
    backend: str = "auto",
) -> Module:
    """Prunes a parameter to N:M, as ``torch.nn.utils.prune.ln_structured`` does by channels.

    The parameter is replaced by its masked value; ``name + "_orig"`` and the buffer ``name + "_mask"`` are
    added. ``prune.remove`` makes it permanent. A parameter that was pruned before keeps its zeros: the mask
    is the best full N:M mask of what is left, so that lines may keep fewer than N.

    Parameters
    ----------
    module : nn.Module
        Linear layer, transformers' Conv1D or convolution (each kernel position is a matrix).
    name : str
        Name of the parameter, such as ``"weight"``.
    pattern : str, (int, int) or NMPattern
        ``"8:16"`` keeps 8 of 16.
    transposable : bool
        N:M along rows and columns, or along the inputs only.
    importance_scores : Tensor, optional
        In the parameter's shape; their magnitudes decide. The parameter itself by default.
    method, backend
        As in :func:`nmsolve.transposable_mask`.

    Returns
    -------
    nn.Module
        The module, changed in place.

    Raises
    ------
    NMSolveError
        If an argument is not as described or the scores are not finite; the module is left as it was.

    Examples
    --------
    >>> layer = nm_structured(torch.nn.Linear(32, 16), "weight", "4:8")
    >>> nmsolve.check_mask(layer.weight_mask.bool(), 4, 8)
    """
    NMPruning.apply(
        module,
        name,
        pattern,
        importance_scores=importance_scores,
        transposable=transposable,
        method=method,
        backend=backend,
    )
    return module
