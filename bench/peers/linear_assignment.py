"""Masks with n = 1 as linear assignments: SciPy, and the package torch-linear-assignment.

SciPy: Crouse: On implementing 2D rectangular assignment algorithms, IEEE Transactions on Aerospace and
Electronic Systems 52(4), 2016. torch-linear-assignment (PyPI) solves batches on CUDA devices; on a CPU it
calls SciPy for one matrix after another, so there it stands for what its users get, not for another
algorithm.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def scipy_assignment(blocks: np.ndarray) -> np.ndarray:
    """int64 ``(B, m)``: the column of each row, of ``(B, m, m)`` scores."""
    return np.stack([linear_sum_assignment(block, maximize=True)[1] for block in blocks])


def torch_assignment(blocks: Tensor) -> Tensor:
    """int64 ``(B, m)``: the column of each row, of ``(B, m, m)`` scores."""
    from torch_linear_assignment import batch_linear_assignment

    return batch_linear_assignment(-blocks)


def as_masks(columns: Tensor) -> Tensor:
    """bool ``(B, m, m)`` of int64 ``(B, m)``."""
    return torch.nn.functional.one_hot(columns, columns.shape[1]).bool()
