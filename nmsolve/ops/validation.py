"""Validation of the public functions' arguments: one clear error, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from nmsolve.backends.dispatch import MASK_METHODS, SCORE_DTYPES, check_mask_method
from nmsolve.blocks import demand, grid_of, split_blocks
from nmsolve.errors import NMSolveError
from nmsolve.ops.distributed import Sharding, is_dtensor
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockSolution

__all__ = [
    "WarmStart",
    "all_finite",
    "check_all_finite",
    "check_dim",
    "check_duals",
    "check_finite",
    "check_finite_duals",
    "check_flag",
    "check_numbers",
    "check_scores",
    "describe",
    "dual_pair",
    "mask_violation",
    "tsenor_options",
]

_DTYPES = tuple(getattr(torch, name) for name in SCORE_DTYPES)
_TSENOR_ITERATIONS = 300
_TSENOR_TAU = 150.0

# Elements looked at together by the check for finite scores: few enough that torch does not wake its threads,
# which takes longer than the check on a busy machine and hangs in a forked process.
_CHUNK = 1 << 15

WarmStart = BlockSolution | tuple[Tensor, Tensor]


def describe(value: object) -> str:
    """A value as messages name it: dtype and shape of a tensor, value and type of anything else."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{value!r} ({type(value).__name__})"


def check_scores(scores: object, rank: int = 2, name: str = "scores") -> None:
    if not isinstance(scores, Tensor):
        raise NMSolveError(f"{name}: expected a torch.Tensor, got {type(scores).__name__}")
    if scores.layout != torch.strided or scores.device.type == "meta":
        raise NMSolveError(
            f"{name}: expected a dense tensor with data, got {scores.layout} on device {scores.device}"
        )
    if scores.dtype not in _DTYPES:
        raise NMSolveError(f"{name}: expected dtype {', '.join(SCORE_DTYPES)}, got {describe(scores)}")
    if scores.ndim < rank:
        shape = "(..., rows, cols)" if rank == 2 else "at least one dimension"
        raise NMSolveError(f"{name}: expected {shape}, got {describe(scores)}")


def check_numbers(scores: Sequence[Tensor]) -> list[tuple[float, float]]:
    """The smallest and the largest score of each tensor, inf and -inf if there is none; raises if any is NaN.

    Tensors on a GPU are waited for once, not one by one.
    """
    names = [f"scores[{i}]" for i in range(len(scores))] if len(scores) > 1 else ["scores"]
    found: dict[int, tuple[float, float]] = {}
    for device in {tensor.device for tensor in scores if tensor.device.type != "cpu"}:
        here = [i for i, tensor in enumerate(scores) if tensor.device == device and tensor.numel()]
        found |= zip(here, _extremes([scores[i] for i in here]), strict=True)
    ends = []
    for i, (tensor, name) in enumerate(zip(scores, names, strict=True)):
        low, high = _ends(tensor) if tensor.device.type == "cpu" else found.get(i, (math.inf, -math.inf))
        if math.isnan(low):
            _raise_wrong(tensor, name, torch.isnan, "numbers", "NaN")
        ends.append((low, high))
    return ends


def _extremes(tensors: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(smallest, largest) of tensors on one device, none of them empty, read back at once."""
    if not tensors:
        return []
    ends = [torch.stack(tensor.detach().aminmax()).double() for tensor in tensors]
    return [(low, high) for low, high in torch.stack(ends).tolist()]


def check_all_finite(scores: Sequence[Tensor]) -> None:
    """Raise if any score of any tensor is NaN or infinite; the message says which tensor."""
    for i, (tensor, (low, high)) in enumerate(zip(scores, check_numbers(scores), strict=True)):
        if tensor.numel() and not (math.isfinite(low) and math.isfinite(high)):
            check_finite(tensor, f"scores[{i}]" if len(scores) > 1 else "scores")


def _ends(scores: Tensor) -> tuple[float, float]:
    """The smallest and the largest score (inf and -inf if there is none); both NaN if there is one.

    On the CPU it works in pieces, so that no temporary of the matrix's size is made.
    """
    smallest, largest = math.inf, -math.inf
    in_memory_order = sorted(range(scores.ndim), key=scores.stride, reverse=True)
    ordered = scores.detach().permute(in_memory_order)
    for _, piece in _pieces(ordered, _CHUNK if scores.device.type == "cpu" else scores.numel()):
        low, high = (float(end) for end in piece.aminmax())
        if math.isnan(low):
            return low, low
        smallest, largest = min(smallest, low), max(largest, high)
    return smallest, largest


def check_finite(scores: Tensor, name: str = "scores") -> None:
    """Raise if any score is NaN or infinite."""
    low, high = _ends(scores)
    if scores.numel() and not (math.isfinite(low) and math.isfinite(high)):
        _raise_wrong(scores, name, lambda piece: ~torch.isfinite(piece), "finite values", "NaN or infinite")


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; wakes none of torch's threads, and waits once for a GPU."""
    if values.numel() == 0:
        return True
    ends = _ends(values) if values.device.type == "cpu" else torch.stack(values.aminmax()).tolist()
    return all(map(math.isfinite, ends))


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


def _raise_wrong(
    scores: Tensor, name: str, is_wrong: Callable[[Tensor], Tensor], expected: str, got: str
) -> NoReturn:
    count, first = 0, None
    for origin, piece in _pieces(scores, _CHUNK):
        bad = is_wrong(piece)
        found = int(bad.sum())
        if found and first is None:
            inside = bad.nonzero()[0].tolist()
            lead = len(origin) - len(inside)
            first = (*origin[:lead], *(o + i for o, i in zip(origin[lead:], inside, strict=True)))
        count += found
    assert first is not None
    raise NMSolveError(
        f"{name}: expected {expected}, got {count} {got} of {scores.numel()}, "
        f"the first {float(scores[first])} at {first}"
    )


def tsenor_options(method: str, iterations: int | None, tau: float | None) -> tuple[int, float]:
    check_mask_method(method)
    for name, value in (("iterations", iterations), ("tau", tau)):
        if value is not None and name not in MASK_METHODS[method]:
            raise NMSolveError(f"{name}: an option of method 'tsenor', got {value!r} with method {method!r}")
    if iterations is None:
        iterations = _TSENOR_ITERATIONS
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise NMSolveError(f"iterations: expected an integer of at least 1, got {iterations!r}")
    if tau is None:
        tau = _TSENOR_TAU
    if not isinstance(tau, (int, float)) or not 0 < tau < math.inf:
        raise NMSolveError(f"tau: expected a positive finite number, got {tau!r}")
    return iterations, float(tau)


def check_flag(name: str, value: object) -> None:
    """Raise unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise NMSolveError(f"{name}: expected True or False, got {describe(value)}")


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


def check_duals(
    warm_start: WarmStart, scores: Tensor, pattern: NMPattern, sharding: Sharding | None
) -> tuple[Tensor, Tensor]:
    grid = grid_of(scores, pattern)
    shape = (*scores.shape[:-2], grid.block_rows, grid.block_cols, pattern.m)
    u, v = dual_pair(warm_start)
    for name, duals in (("row_duals", u), ("col_duals", v)):
        if duals.shape != shape or duals.device != scores.device or duals.dtype not in _DTYPES:
            raise NMSolveError(
                f"warm_start: expected {name} of shape {shape} on {scores.device}, "
                f"got {describe(duals)} on {duals.device}"
            )
        own = (duals.device_mesh, tuple(duals.placements)) if is_dtensor(duals) else None
        if own != (sharding and (sharding.mesh, sharding.placements)):
            raise NMSolveError(
                f"warm_start: expected {name} to be spread like the scores "
                f"({sharding or 'not a DTensor'}), got {own or 'not a DTensor'}"
            )
    return u, v


def check_finite_duals(duals: Sequence[Tensor]) -> None:
    """Raise unless ``(row_duals, col_duals)`` are finite."""
    for name, values in zip(("row_duals", "col_duals"), duals, strict=False):
        if not torch.isfinite(values).all():
            raise NMSolveError(f"warm_start: expected finite {name}, got NaN or infinite ones")


def check_dim(dim: object, tensor: Tensor) -> int:
    """``dim``, counted from the last dimension (-1)."""
    if not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
        raise NMSolveError(f"dim: expected an integer in [-{tensor.ndim}, {tensor.ndim}), got {dim!r}")
    return dim % tensor.ndim - tensor.ndim


def mask_violation(mask: Tensor, pattern: NMPattern, dim: int | None) -> str | None:
    """The first line of a bool mask that does not hold what it should, in words; None if there is none.

    Groups lie along ``dim``; with None, the mask is transposable.
    """
    return _blocks_violation(mask, pattern) if dim is None else _groups_violation(mask, pattern, dim)


def _groups_violation(mask: Tensor, pattern: NMPattern, dim: int) -> str | None:
    lines = mask.movedim(dim, -1)
    size = lines.shape[-1]
    full = size // pattern.m * pattern.m
    for start, stop, width in ((0, full, pattern.m), (full, size, size - full)):
        if stop == start:
            continue
        held = lines[..., start:stop].unflatten(-1, (-1, width)).sum(-1, dtype=torch.int32)
        count = min(pattern.n, width)
        wrong = (held != count).nonzero()
        if len(wrong):
            *line, group = at = wrong[0].tolist()
            return (
                f"line {tuple(line)}, group {start // pattern.m + group} along dim {dim} keeps "
                f"{int(held[tuple(at)])} of {width} entries, expected {count} (pattern {pattern})"
            )
    return None


def _blocks_violation(mask: Tensor, pattern: NMPattern) -> str | None:
    """Counts of every block's rows and columns, region by region of equal block shape."""
    for rows, cols, r, c in grid_of(mask, pattern).regions():
        blocks = split_blocks(mask[..., rows, cols], r, c)
        need = demand(r, c, pattern.n)
        origin = (rows.start // pattern.m, cols.start // pattern.m)
        for name, dim, count, at_most in (
            ("row", -1, need.row, r > c),
            ("column", -2, need.col, r < c),
        ):
            held = blocks.sum(dim, dtype=torch.int32)
            wrong = held > count if at_most else held != count
            if wrong.any():
                *batch, i, j, line = at = wrong.nonzero()[0].tolist()
                block = (*batch, origin[0] + i, origin[1] + j)
                return (
                    f"block {block}, {name} {line} keeps {int(held[tuple(at)])} of {blocks.shape[dim]} "
                    f"entries, expected {'at most ' if at_most else ''}{count} (pattern {pattern})"
                )
    return None
