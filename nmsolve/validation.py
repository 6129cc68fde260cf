"""Validation of the public functions' arguments: one clear error, before any work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import Tensor

from nmsolve.blocks import grid_of
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockSolution

__all__ = [
    "METHODS",
    "WarmStart",
    "check_duals",
    "check_finite",
    "check_scores",
    "describe",
    "dual_pair",
    "tsenor_options",
]

METHODS = ("exact", "tsenor", "greedy")

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TSENOR_ITERATIONS = 300
_TSENOR_TAU = 150.0

# Elements looked at together by the check for finite scores.
_CHUNK = 1 << 20

WarmStart = BlockSolution | tuple[Tensor, Tensor]


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def check_scores(scores: object, rank: int = 2) -> None:
    if not isinstance(scores, Tensor):
        raise NMSolveError(f"scores: expected a torch.Tensor, got {type(scores).__name__}")
    if scores.layout != torch.strided or scores.device.type == "meta":
        raise NMSolveError(
            f"scores: expected a dense tensor with data, got {scores.layout} on device {scores.device}"
        )
    if scores.dtype not in _DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise NMSolveError(f"scores: expected dtype {expected}, got {describe(scores)}")
    if scores.ndim < rank:
        shape = "(..., rows, cols)" if rank == 2 else "at least one dimension"
        raise NMSolveError(f"scores: expected {shape}, got {describe(scores)}")


def check_finite(scores: Tensor) -> float:
    """The smallest score (inf if there is none); raises if any is NaN or infinite.

    On the CPU it works in pieces, so that no temporary of the matrix's size is made.
    """
    smallest = math.inf
    in_memory_order = sorted(range(scores.ndim), key=scores.stride, reverse=True)
    ordered = scores.detach().permute(in_memory_order)
    for _, piece in _pieces(ordered, _CHUNK if scores.device.type == "cpu" else scores.numel()):
        low, high = (float(end) for end in piece.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            _raise_not_finite(scores)
        smallest = min(smallest, low)
    return smallest


def _pieces(tensor: Tensor, limit: int, at: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Views of about ``limit`` elements that make up the tensor, each with the index of its first element."""
    if tensor.numel() == 0:
        return
    step = max(1, limit // (tensor.numel() // len(tensor)))
    for start in range(0, len(tensor), step):
        if step == 1 and tensor.ndim > 1:
            yield from _pieces(tensor[start], limit, (*at, start))
        else:
            part = tensor[start : start + step]
            yield (*at, start, *[0] * (part.ndim - 1)), part


def _raise_not_finite(scores: Tensor) -> NoReturn:
    count, first = 0, None
    for origin, piece in _pieces(scores, _CHUNK):
        bad = ~torch.isfinite(piece)
        found = int(bad.sum())
        if found and first is None:
            inside = bad.nonzero()[0].tolist()
            lead = len(origin) - len(inside)
            first = (*origin[:lead], *(o + i for o, i in zip(origin[lead:], inside, strict=True)))
        count += found
    assert first is not None
    raise NMSolveError(
        f"scores: expected finite values, got {count} NaN or infinite of {scores.numel()}, "
        f"the first {float(scores[first])} at {first}"
    )


def tsenor_options(method: str, iterations: int | None, tau: float | None) -> tuple[int, float]:
    if method not in METHODS:
        raise NMSolveError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    for name, value in (("iterations", iterations), ("tau", tau)):
        if value is not None and method != "tsenor":
            raise NMSolveError(f"{name}: an option of method 'tsenor', got {value!r} with method {method!r}")
    if iterations is None:
        iterations = _TSENOR_ITERATIONS
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise NMSolveError(f"iterations: expected an integer of at least 1, got {iterations!r}")
    if tau is None:
        tau = _TSENOR_TAU
    if not isinstance(tau, int | float) or not 0 < tau < math.inf:
        raise NMSolveError(f"tau: expected a positive finite number, got {tau!r}")
    return iterations, float(tau)


def dual_pair(warm_start: WarmStart) -> tuple[Tensor, Tensor]:
    if isinstance(warm_start, BlockSolution):
        return warm_start.row_duals, warm_start.col_duals
    if (
        isinstance(warm_start, tuple)
        and len(warm_start) == 2
        and all(isinstance(duals, Tensor) for duals in warm_start)
    ):
        return warm_start
    raise NMSolveError(
        f"warm_start: expected a BlockSolution or (row_duals, col_duals), got {describe(warm_start)}"
    )


def check_duals(warm_start: WarmStart, scores: Tensor, pattern: NMPattern) -> tuple[Tensor, Tensor]:
    grid = grid_of(scores, pattern)
    shape = (*scores.shape[:-2], grid.block_rows, grid.block_cols, pattern.m)
    u, v = dual_pair(warm_start)
    for name, duals in (("row_duals", u), ("col_duals", v)):
        if duals.shape != shape or duals.device != scores.device or duals.dtype not in _DTYPES:
            raise NMSolveError(
                f"warm_start: expected {name} of shape {shape} on {scores.device}, "
                f"got {describe(duals)} on {duals.device}"
            )
        if not torch.isfinite(duals).all():
            raise NMSolveError(f"warm_start: expected finite {name}, got NaN or infinite ones")
    return u.detach(), v.detach()
