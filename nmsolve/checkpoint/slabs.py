"""Slabs of a checkpoint: whole block rows of a tensor, each read, solved and masked by itself, in any thread.

A block's mask does not depend on what is solved with it, so that slabs do not show in the result.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nmsolve.backends.dispatch import Backend
from nmsolve.checkpoint.report import Figures
from nmsolve.checkpoint.selection import DTYPES, MatrixLayout, Selected
from nmsolve.checkpoint.streams import read_into, telling
from nmsolve.errors import NMSolveError, WorkFailed
from nmsolve.ops.masks import nm_mask, transposable_mask
from nmsolve.ops.validation import check_finite
from nmsolve.pattern import NMPattern

__all__ = ["MaskSettings", "MaskedSlab", "Slab", "SlabSolver", "bytes_of", "slabs_of"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 15


@dataclass(frozen=True)
class MaskSettings:
    """How masks are solved."""

    pattern: NMPattern
    transposable: bool
    method: str
    backend: str
    device: str
    certificate: bool = True
    """Whether transposable masks are proven to be within a bound; ordinary ones are the best in any case."""


class Slab(NamedTuple):
    """A slab of ``shape`` (batch, rows, cols, positions), whose first weight is ``first`` of its tensor."""

    item: Selected
    first: int
    shape: tuple[int, int, int, int]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return getattr(torch, DTYPES[self.item.entry.dtype])

    @property
    def position(self) -> int:
        """Its first byte in its file."""
        return self.item.entry.start + self.first * self.dtype.itemsize


class MaskedSlab(NamedTuple):
    """A slab's masked weights and its mask, both in the slab's shape on the CPU, and what to report.

    ``seconds`` were spent on the mask and the figures; another slab may have been solved at the same time.
    """

    weights: Tensor
    keep: Tensor
    figures: Figures
    seconds: float


def slabs_of(item: Selected, m: int, elements: int) -> Iterator[Slab]:
    """Consecutive slabs of about ``elements`` weights at most.

    A slab is several whole matrices, or whole block rows of one.
    """
    first = 0
    for shape in _shapes(item.layout, m, elements):
        yield Slab(item, first, shape)
        first += math.prod(shape)


def _shapes(layout: MatrixLayout, m: int, elements: int) -> Iterator[tuple[int, int, int, int]]:
    matrix = layout.rows * layout.cols * layout.positions
    if matrix <= elements:
        step = elements // matrix
        for b in range(0, layout.batch, step):
            yield min(step, layout.batch - b), layout.rows, layout.cols, layout.positions
        return
    step = max(1, elements // (layout.cols * layout.positions * m)) * m
    for _ in range(layout.batch):
        for r in range(0, layout.rows, step):
            yield 1, min(step, layout.rows - r), layout.cols, layout.positions


class SlabSolver:
    """Reads and masks slabs, in as many threads as are worth it.

    One thread reads while another one solves; where a backend gains by it, both solve: what one does alone,
    such as the sums of a report, then keeps no core waiting.
    """

    def __init__(self, settings: MaskSettings, backend: Backend) -> None:
        self._settings = settings
        together = backend.solves_several and torch.get_num_threads() > 1
        self._turn = nullcontext() if together else threading.Lock()
        self.threads = min(torch.get_num_threads(), 4) if together else 2
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Slabs that nobody has begun to solve will not be: waiting for the threads takes one at most."""
        self._stopped.set()

    def __call__(self, slab: Slab) -> MaskedSlab:
        """The slab, read and masked.

        Raises
        ------
        WorkFailed
            If the file cannot be read, or the work was stopped.
        NMSolveError
            If weights are not finite; it names them.
        """
        weights = self._read(slab)
        with self._turn:
            if self._stopped.is_set():
                raise WorkFailed(f"{slab.item.entry.name}: the work was stopped")
            started = time.perf_counter()
            try:
                keep, figures = _solve(weights, slab.item.layout, self._settings)
            except NMSolveError as error:
                entry, last = slab.item.entry, slab.first + weights.numel() - 1
                raise NMSolveError(
                    f"{entry.name}, weights {slab.first} to {last}: "
                    f"{_not_finite(weights, slab.first, entry.shape) or error}"
                ) from None
            seconds = time.perf_counter() - started
        _drop(weights, keep)
        nonzero = figures.kept if figures.zeros_before == 0 else int(torch.count_nonzero(weights))
        return MaskedSlab(weights, keep, figures._replace(nonzero=nonzero), seconds)

    @staticmethod
    def _read(slab: Slab) -> Tensor:
        weights = torch.empty(slab.shape, dtype=slab.dtype)
        path = slab.item.shard.path
        with telling(slab.item.entry.name, path), path.open("rb") as source:
            read_into(source, slab.position, bytes_of(weights))
        return weights


def bytes_of(weights: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return weights.view(-1).view(torch.uint8).numpy().data


def _solve(weights: Tensor, layout: MatrixLayout, settings: MaskSettings) -> tuple[Tensor, Figures]:
    """The mask of a slab, contiguous on the CPU in the slab's shape, and its figures but ``nonzero``."""
    n, m = settings.pattern.n, settings.pattern.m
    scores = _magnitudes(weights, settings.device)
    score = _sum(scores)
    if not math.isfinite(score):
        check_finite(scores)  # an infinite weight is no wish to keep it
    matrices = scores.permute(0, 3, 1, 2)
    bound, gap = None, 0.0
    if settings.transposable and settings.certificate:
        solution = transposable_mask(
            matrices, n, m, method=settings.method, backend=settings.backend, return_solution=True
        )
        mask = solution.mask
        objective, bound, gap = solution.total_objective, solution.total_bound, solution.max_gap
    elif settings.transposable:
        mask = transposable_mask(matrices, n, m, method=settings.method, backend=settings.backend)
    else:
        mask = nm_mask(matrices, n, m, dim=layout.input_dim - 2, backend=settings.backend)
    keep = mask.permute(0, 2, 3, 1).cpu().contiguous()
    zeros = _zeros(scores)
    if not (settings.transposable and settings.certificate):
        host = scores.cpu()
        _drop(host, keep)
        objective = _sum(host)
        bound = None if settings.transposable else objective
    kept = int(np.count_nonzero(keep.numpy()))
    return keep, Figures(kept, zeros, 0, score, objective, bound, gap)


def _not_finite(weights: Tensor, first: int, shape: tuple[int, ...]) -> str:
    """What is wrong with the weights of a slab, at which indices of their tensor; empty if they are finite.

    ``first`` is the place of the slab's first weight in its tensor.
    """
    weights = weights.view(-1)
    wrong = (~torch.isfinite(weights)).nonzero().flatten()
    if len(wrong) == 0:
        return ""
    at = tuple(int(index) for index in np.unravel_index(first + int(wrong[0]), shape))
    return (
        f"expected finite values, got {len(wrong)} NaN or infinite of {len(weights)}, the first "
        f"{float(weights[wrong[0]])} at {at}"
    )


def _drop(slab: Tensor, keep: Tensor) -> None:
    """Sets what is not kept to +0.0, both contiguous on the CPU, as a product of integers: no temporary."""
    bits = slab.view(_INTEGERS[slab.element_size()]).numpy()
    np.multiply(bits, keep.numpy(), out=bits)


def _magnitudes(slab: Tensor, device: str) -> Tensor:
    """The absolute weights of a contiguous slab, on the device.

    On the CPU their bits without the sign. NumPy takes them with this thread alone: those of torch wait for
    the next work at full speed, on the cores that the solver's threads are about to take.
    """
    if device != "cpu":
        return slab.to(device).abs()
    bits = slab.view(_INTEGERS[slab.element_size()]).numpy()
    return torch.from_numpy(bits & np.iinfo(bits.dtype).max).view(slab.dtype)


def _zeros(magnitudes: Tensor) -> int:
    """How many of contiguous magnitudes are 0; on the CPU by their bits, which NumPy is fastest with."""
    if magnitudes.device.type == "cpu":
        bits = magnitudes.view(_INTEGERS[magnitudes.element_size()])
        return magnitudes.numel() - int(np.count_nonzero(bits.numpy()))
    return magnitudes.numel() - int(torch.count_nonzero(magnitudes))


def _sum(scores: Tensor) -> float:
    """Sum of contiguous scores in float64.

    On the CPU torch widens the whole of what it sums, so it gets pieces that fit the cache and that one
    thread sums: waking the others costs more.
    """
    pieces = scores.view(-1).split(_PIECE if scores.device.type == "cpu" else scores.numel())
    return sum(float(piece.sum(dtype=torch.float64)) for piece in pieces)
