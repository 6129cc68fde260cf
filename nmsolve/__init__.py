"""nmsolve: provably optimal N:M and transposable N:M sparsity masks.

The names below are loaded from their modules when they are first used, so that what needs no tensor, such as
``nmsolve --help``, does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from nmsolve.about import __version__
from nmsolve.errors import BackendError, NMSolveError
from nmsolve.pattern import NMPattern, VNMPattern

if TYPE_CHECKING:
    from nmsolve.checkpoint.mask_files import load_masks, save_masks
    from nmsolve.ops.assignment import AssignmentSolution, assignment
    from nmsolve.ops.columns import permute_columns, rms_norm_permute
    from nmsolve.ops.hierarchical import (
        HierarchicalSolution,
        check_hierarchical_mask,
        hierarchical_mask,
    )
    from nmsolve.ops.masks import check_mask, nm_mask, solve_blocks, transposable_mask, transposable_masks
    from nmsolve.ops.sinkhorn import sinkhorn
    from nmsolve.solution import BlockSolution, dual_bound, kept_score

__all__ = [
    "AssignmentSolution",
    "BackendError",
    "BlockSolution",
    "HierarchicalSolution",
    "NMPattern",
    "NMSolveError",
    "VNMPattern",
    "__version__",
    "assignment",
    "check_hierarchical_mask",
    "check_mask",
    "dual_bound",
    "hierarchical_mask",
    "kept_score",
    "load_masks",
    "nm_mask",
    "permute_columns",
    "rms_norm_permute",
    "save_masks",
    "sinkhorn",
    "solve_blocks",
    "transposable_mask",
    "transposable_masks",
]

_MODULES = {
    "nmsolve.ops.assignment": ("AssignmentSolution", "assignment"),
    "nmsolve.ops.columns": ("permute_columns", "rms_norm_permute"),
    "nmsolve.ops.sinkhorn": ("sinkhorn",),
    "nmsolve.ops.hierarchical": ("HierarchicalSolution", "check_hierarchical_mask", "hierarchical_mask"),
    "nmsolve.ops.masks": ("check_mask", "nm_mask", "solve_blocks", "transposable_mask", "transposable_masks"),
    "nmsolve.checkpoint.mask_files": ("load_masks", "save_masks"),
    "nmsolve.solution": ("BlockSolution", "dual_bound", "kept_score"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
