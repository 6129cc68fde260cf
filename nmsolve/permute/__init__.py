"""Channel permutation: orders of a layer's channels under which an N:M mask keeps more.

Search for orders (:func:`ria_permutation`, :func:`swap_search`, :func:`stripe_search`,
:func:`transposable_permutation`), learn them (:func:`learn_permutation`), find out what a model allows
(:func:`find_couplings`), and apply them without changing the dense model (:func:`apply_permutations`).
"""

from nmsolve.permute.apply import (
    Applied,
    PermutedLinear,
    apply_permutations,
    load_permutations,
    load_permuted,
    save_permutations,
)
from nmsolve.permute.calibration import calibration_scores
from nmsolve.permute.couplings import Coupling, find_couplings
from nmsolve.permute.heuristics import (
    deal_columns,
    retained_score,
    ria_permutation,
    stripe_search,
    swap_search,
)
from nmsolve.permute.learned import LearnedPermutations, learn_permutation
from nmsolve.permute.module import LearnableChannelPermutation
from nmsolve.permute.norm import PermutedRMSNorm
from nmsolve.permute.transposable import TransposablePermutation, transposable_permutation

__all__ = [
    "Applied",
    "Coupling",
    "LearnableChannelPermutation",
    "LearnedPermutations",
    "PermutedLinear",
    "PermutedRMSNorm",
    "TransposablePermutation",
    "apply_permutations",
    "calibration_scores",
    "deal_columns",
    "find_couplings",
    "learn_permutation",
    "load_permutations",
    "load_permuted",
    "retained_score",
    "ria_permutation",
    "save_permutations",
    "stripe_search",
    "swap_search",
    "transposable_permutation",
]
