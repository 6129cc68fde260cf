"""Which pruning methods there are, and what each needs.

:data:`PRUNING_METHODS` is the one table: the command line's choices, the checks of arguments and the pruning
itself read it, so that a method is a function of its layers and a row here. Nothing here imports torch before
there is a layer to prune.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

from nmsolve.errors import NMSolveError

if TYPE_CHECKING:
    from torch import Tensor

    from nmsolve.prune.layerwise.problem import Pruned
    from nmsolve.prune.rule import MaskRule

__all__ = [
    "OFFLOADS",
    "PRUNING_METHODS",
    "SEQUENTIAL",
    "LayerPruner",
    "PruningMethod",
    "check_offload",
    "check_pruning_method",
    "check_sequential",
]

SEQUENTIAL = ("layer", "block", "off")
"""What is pruned before a layer's inputs are measured: the earlier layers, the earlier blocks, nothing."""

OFFLOADS = ("cpu", "disk")
"""Where the weights of all blocks but one can be."""


class LayerPruner(Protocol):
    """Prunes the layers that see the same inputs, one after the other."""

    def __call__(self, dense: Tensor, rule: MaskRule, positions: int, allowed: Tensor | None) -> Pruned:
        """Weight and mask ``(groups, out, positions * in)`` for a dense weight of that shape.

        ``allowed`` is an earlier mask, or None: what is False there is pruned as well.
        """


@dataclass(frozen=True)
class PruningMethod:
    """A row of the table.

    Attributes
    ----------
    name : str
        What users write.
    prepare : callable
        ``prepare(hessian, **options)`` is the :class:`LayerPruner` of the layers whose inputs have the
        Hessian ``(groups, in, in)``; of its diagonal ``(groups, in)`` alone where the row says so; of None
        where it needs no calibration.
    needs_calibration : bool
        Whether it needs the Hessian, or its diagonal.
    updates_weights : bool
        Whether the weights that stay change; then the scores depend on the masks of the columns before.
    diagonal : bool
        Whether it needs only the diagonal of the Hessian: as many numbers as inputs, not their square.
    options : tuple of str
        Arguments of :func:`nmsolve.prune.prune_model` that are for this method.
    iterations : int, optional
        How many it makes at most if none are given, where that is one of its options.
    """

    name: str
    prepare: Callable[..., LayerPruner]
    needs_calibration: bool
    updates_weights: bool
    diagonal: bool = False
    options: tuple[str, ...] = ()
    iterations: int | None = None


def _alps(hessian: Tensor, *, damping: float, iterations: int) -> LayerPruner:
    from nmsolve.prune.layerwise.alps import alps, alps_system
    from nmsolve.prune.layerwise.pruners import SystemPruner

    systems = [alps_system(matrix, damping) for matrix in hessian]
    return SystemPruner(partial(alps, iterations=iterations), systems)


def _sparsegpt(hessian: Tensor, *, damping: float) -> LayerPruner:
    from nmsolve.prune.layerwise.pruners import SystemPruner
    from nmsolve.prune.layerwise.sparsegpt import sparsegpt, sparsegpt_factor

    return SystemPruner(sparsegpt, [sparsegpt_factor(matrix, damping) for matrix in hessian])


def _frank_wolfe(hessian: Tensor, *, iterations: int) -> LayerPruner:
    from nmsolve.prune.layerwise.frank_wolfe import frank_wolfe
    from nmsolve.prune.layerwise.pruners import SystemPruner

    return SystemPruner(partial(frank_wolfe, iterations=iterations), list(hessian))


def _wanda(diagonal: Tensor) -> LayerPruner:
    from nmsolve.prune.layerwise.pruners import ScorePruner, input_norms
    from nmsolve.prune.layerwise.scores import wanda_scores

    return ScorePruner(partial(wanda_scores, norms=input_norms(diagonal)))


def _ria(diagonal: Tensor) -> LayerPruner:
    from nmsolve.prune.layerwise.pruners import ScorePruner, input_norms
    from nmsolve.prune.layerwise.scores import ria_scores

    return ScorePruner(partial(ria_scores, norms=input_norms(diagonal)))


def _magnitude(hessian: Tensor | None) -> LayerPruner:
    from nmsolve.prune.layerwise.pruners import ScorePruner
    from nmsolve.prune.layerwise.scores import magnitude_scores

    return ScorePruner(magnitude_scores)


_ROWS = (
    PruningMethod(
        "alps",
        _alps,
        needs_calibration=True,
        updates_weights=True,
        options=("damping", "iterations"),
        iterations=300,
    ),
    PruningMethod(
        "sparsegpt", _sparsegpt, needs_calibration=True, updates_weights=True, options=("damping",)
    ),
    PruningMethod(
        "frank-wolfe",
        _frank_wolfe,
        needs_calibration=True,
        updates_weights=False,
        options=("iterations",),
        iterations=40,
    ),
    PruningMethod("wanda", _wanda, needs_calibration=True, updates_weights=False, diagonal=True),
    PruningMethod("ria", _ria, needs_calibration=True, updates_weights=False, diagonal=True),
    PruningMethod("magnitude", _magnitude, needs_calibration=False, updates_weights=False),
)

PRUNING_METHODS: Mapping[str, PruningMethod] = {row.name: row for row in _ROWS}
"""Every method by its name; the first one is the default."""


def check_pruning_method(method: str) -> PruningMethod:
    """The row of ``method``.

    Raises
    ------
    NMSolveError
        If there is none.
    """
    if method not in PRUNING_METHODS:
        raise NMSolveError(f"method: expected one of {', '.join(PRUNING_METHODS)}, got {method!r}")
    return PRUNING_METHODS[method]


def check_sequential(sequential: str) -> None:
    """Raise unless ``sequential`` is one of :data:`SEQUENTIAL`."""
    if sequential not in SEQUENTIAL:
        raise NMSolveError(f"sequential: expected one of {', '.join(SEQUENTIAL)}, got {sequential!r}")


def check_offload(offload: object) -> None:
    """Raise unless ``offload`` is one of :data:`OFFLOADS` or None."""
    if offload is not None and offload not in OFFLOADS:
        raise NMSolveError(f"offload: expected one of {', '.join(OFFLOADS)}, got {offload!r}")
