"""Pruning models to N:M: scores, SparseGPT, ALPS, Frank-Wolfe, and the walk through a whole model.

The names below are loaded from their modules when they are first used, as those of nmsolve itself are. No
module of this folder may have the name of one of them: once imported it would stand in its place.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmsolve.prune.calibration import make_batches
    from nmsolve.prune.evaluation import perplexity
    from nmsolve.prune.finetune import FixedMasks, to_semi_structured
    from nmsolve.prune.layerwise.alps import alps
    from nmsolve.prune.layerwise.frank_wolfe import frank_wolfe, layer_error_bound
    from nmsolve.prune.layerwise.problem import Pruned
    from nmsolve.prune.layerwise.scores import magnitude_scores, ria_scores, wanda_scores
    from nmsolve.prune.layerwise.sparsegpt import sparsegpt
    from nmsolve.prune.model import PruneResult, prune_model
    from nmsolve.prune.on_disk import evaluate_checkpoint, prune_checkpoint
    from nmsolve.prune.report import PruneReport
    from nmsolve.prune.rule import MaskRule

__all__ = [
    "FixedMasks",
    "MaskRule",
    "PruneReport",
    "PruneResult",
    "Pruned",
    "alps",
    "evaluate_checkpoint",
    "frank_wolfe",
    "layer_error_bound",
    "magnitude_scores",
    "make_batches",
    "perplexity",
    "prune_checkpoint",
    "prune_model",
    "ria_scores",
    "sparsegpt",
    "to_semi_structured",
    "wanda_scores",
]

_MODULES = {
    "nmsolve.prune.calibration": ("make_batches",),
    "nmsolve.prune.evaluation": ("perplexity",),
    "nmsolve.prune.finetune": ("FixedMasks", "to_semi_structured"),
    "nmsolve.prune.layerwise.alps": ("alps",),
    "nmsolve.prune.layerwise.frank_wolfe": ("frank_wolfe", "layer_error_bound"),
    "nmsolve.prune.layerwise.problem": ("Pruned",),
    "nmsolve.prune.layerwise.scores": ("magnitude_scores", "ria_scores", "wanda_scores"),
    "nmsolve.prune.layerwise.sparsegpt": ("sparsegpt",),
    "nmsolve.prune.model": ("PruneResult", "prune_model"),
    "nmsolve.prune.on_disk": ("evaluate_checkpoint", "prune_checkpoint"),
    "nmsolve.prune.report": ("PruneReport",),
    "nmsolve.prune.rule": ("MaskRule",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
