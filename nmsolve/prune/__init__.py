"""Pruning models to N:M: scores, SparseGPT, ALPS, and the walk through a whole model."""

from nmsolve.prune.alps import alps
from nmsolve.prune.calibration import make_batches
from nmsolve.prune.finetune import FixedMasks, to_semi_structured
from nmsolve.prune.model import PruneResult, prune_model
from nmsolve.prune.perplexity import perplexity
from nmsolve.prune.problem import Pruned
from nmsolve.prune.report import PruneReport
from nmsolve.prune.rule import MaskRule
from nmsolve.prune.scores import magnitude_scores, ria_scores, wanda_scores
from nmsolve.prune.sparsegpt import sparsegpt

__all__ = [
    "FixedMasks",
    "MaskRule",
    "PruneReport",
    "PruneResult",
    "Pruned",
    "alps",
    "magnitude_scores",
    "make_batches",
    "perplexity",
    "prune_model",
    "ria_scores",
    "sparsegpt",
    "to_semi_structured",
    "wanda_scores",
]
