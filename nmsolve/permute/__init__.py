"""Channel permutation: orders of a layer's channels under which an N:M mask keeps more.

Search for orders (:func:`ria_permutation`, :func:`swap_search`, :func:`stripe_search`,
:func:`transposable_permutation`, :func:`hierarchical_permutation`), learn them (:func:`learn_permutation`),
find out what a model allows (:func:`find_couplings`), and apply them without changing the dense model
(:func:`apply_permutations`).

The names below are loaded from their modules when they are first used, as those of nmsolve itself are. No
module of this folder may have the name of one of them: once imported it would stand in its place.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nmsolve.permute.apply import (
        Applied,
        PermutedLinear,
        apply_permutations,
        load_permutations,
        load_permuted,
        save_permutations,
    )
    from nmsolve.permute.calibration import calibration_scores
    from nmsolve.permute.couplings import Coupling
    from nmsolve.permute.heuristics import deal_columns, ria_permutation
    from nmsolve.permute.hierarchical import HierarchicalPermutation, hierarchical_permutation
    from nmsolve.permute.learned import LearnedPermutations, learn_permutation
    from nmsolve.permute.model_couplings import find_couplings
    from nmsolve.permute.module import LearnableChannelPermutation
    from nmsolve.permute.norm import PermutedRMSNorm
    from nmsolve.permute.on_disk import permute_checkpoint
    from nmsolve.permute.orders import retained_score
    from nmsolve.permute.swaps import stripe_search, swap_search
    from nmsolve.permute.transposable import TransposablePermutation, transposable_permutation

__all__ = [
    "Applied",
    "Coupling",
    "HierarchicalPermutation",
    "LearnableChannelPermutation",
    "LearnedPermutations",
    "PermutedLinear",
    "PermutedRMSNorm",
    "TransposablePermutation",
    "apply_permutations",
    "calibration_scores",
    "deal_columns",
    "find_couplings",
    "hierarchical_permutation",
    "learn_permutation",
    "load_permutations",
    "load_permuted",
    "permute_checkpoint",
    "retained_score",
    "ria_permutation",
    "save_permutations",
    "stripe_search",
    "swap_search",
    "transposable_permutation",
]

_MODULES = {
    "nmsolve.permute.apply": (
        "Applied",
        "PermutedLinear",
        "apply_permutations",
        "load_permutations",
        "load_permuted",
        "save_permutations",
    ),
    "nmsolve.permute.calibration": ("calibration_scores",),
    "nmsolve.permute.couplings": ("Coupling",),
    "nmsolve.permute.heuristics": ("deal_columns", "ria_permutation"),
    "nmsolve.permute.hierarchical": ("HierarchicalPermutation", "hierarchical_permutation"),
    "nmsolve.permute.learned": ("LearnedPermutations", "learn_permutation"),
    "nmsolve.permute.module": ("LearnableChannelPermutation",),
    "nmsolve.permute.model_couplings": ("find_couplings",),
    "nmsolve.permute.norm": ("PermutedRMSNorm",),
    "nmsolve.permute.on_disk": ("permute_checkpoint",),
    "nmsolve.permute.orders": ("retained_score",),
    "nmsolve.permute.swaps": ("stripe_search", "swap_search"),
    "nmsolve.permute.transposable": ("TransposablePermutation", "transposable_permutation"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
