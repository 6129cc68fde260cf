"""What the solvers return: masks, duals and the certificate that joins them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nmsolve.pattern import NMPattern

__all__ = ["BlockResult", "BlockSolution"]


class BlockResult(NamedTuple):
    """A backend's answer for ``(batch, rows, cols)`` scores tiled into ``(batch, GR, GC)`` blocks."""

    mask: Tensor
    row_duals: Tensor | None = None
    col_duals: Tensor | None = None
    objective: Tensor | None = None
    bound: Tensor | None = None
