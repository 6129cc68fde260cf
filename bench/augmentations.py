"""How much work any block can make: writes bench/results/augmentations.csv.

For each backend, pattern and kind of block the mean and the largest number of augmenting paths that are
searched per block, and of sweeps (a row and a column reduction each) of those searches, beside the bounds of
docs/internals/solver.md: no block needs more than ``M max(N, M - N)`` paths, no search more than ``M + 1``
sweeps. The kinds are the weights of SmolLM2-135M (where the package that ships them is installed), the
distributions of the other benchmarks, and adversarial blocks.

The Numba backend reports paths only. The Triton kernel runs in the interpreter and on few blocks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor

PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32), (1, 16), (15, 16))


# --- blocks -------------------------------------------------------------------------------------------------


def _lines(m: int) -> tuple[Tensor, Tensor]:
    return torch.arange(m)[:, None].float(), torch.arange(m)[None].float()


def _permuted(blocks: Tensor, g: torch.Generator) -> Tensor:
    """Every block's rows and columns in an order of its own."""
    rows, cols = (torch.rand(blocks.shape[:2], generator=g).argsort(1) for _ in range(2))
    blocks = blocks.gather(1, rows[:, :, None].expand_as(blocks))
    return blocks.gather(2, cols[:, None].expand_as(blocks))


def _noise(count: int, m: int, g: torch.Generator) -> Tensor:
    return torch.rand(count, m, m, generator=g)


def _scaled_line(count: int, m: int, g: torch.Generator, dim: int, factor: float) -> Tensor:
    blocks = _noise(count, m, g)
    blocks.select(dim, m // 2).mul_(factor)
    return blocks


def _diagonal_blocks(count: int, m: int, g: torch.Generator) -> Tensor:
    i, j = _lines(m)
    size = max(2, m // 3)  # does not divide m, so that the blocks and N disagree
    return (i // size == j // size).float() + 1e-3 * _noise(count, m, g)


ADVERSARIAL: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "near_ties": lambda count, m, g: 1 + 2e-7 * (_noise(count, m, g) - 0.5),
    "two_values": lambda count, m, g: (_noise(count, m, g) > 0.5).float(),
    "products": lambda count, m, g: ((_lines(m)[0] + 1) * (_lines(m)[1] + 1)).expand(count, m, m),
    "rank_one": lambda count, m, g: (
        torch.rand(count, m, 1, generator=g).exp() * torch.rand(count, 1, m, generator=g).exp()
    ),
    "geometric": lambda count, m, g: (0.5 ** ((_lines(m)[0] * m + _lines(m)[1]) * 60 / m**2)).expand(
        count, m, m
    ),
    "powers_of_two": lambda count, m, g: (2.0 ** (_lines(m)[0] + _lines(m)[1])).expand(count, m, m),
    "triangle": lambda count, m, g: (_lines(m)[0] >= _lines(m)[1]).float().expand(count, m, m),
    "block_diagonal": _diagonal_blocks,
    "one_row": lambda count, m, g: _scaled_line(count, m, g, 1, 1e6),
    "one_column": lambda count, m, g: _scaled_line(count, m, g, 2, 1e6),
    "minus_one_row": lambda count, m, g: _scaled_line(count, m, g, 1, -1e6),
}
"""Kind -> blocks ``(count, m, m)`` made to be hard for the ascent, the search or floating point."""


def adversarial(kind: str, count: int, m: int, seed: int = 0) -> Tensor:
    """Blocks of a kind, rows and columns of each in a random order."""
    g = torch.Generator().manual_seed(seed)
    return _permuted(ADVERSARIAL[kind](count, m, g).contiguous(), g)


@cache
def _layers() -> list[Tensor]:
    import smollm2

    return [weight for _, weight in smollm2.linears()]


def real_weights(count: int, m: int) -> Tensor:
    """Absolute weights of blocks from all over SmolLM2-135M."""
    layers = _layers()
    g = torch.Generator().manual_seed(0)
    blocks = []
    for k in torch.randint(len(layers), (count,), generator=g).tolist():
        rows, cols = layers[k].shape
        i, j = (int(torch.randint(size // m, (), generator=g)) * m for size in (rows, cols))
        blocks.append(layers[k][i : i + m, j : j + m])
    return torch.stack(blocks).abs()


# --- counting -----------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What one block took."""

    paths: int
    sweeps: int | None


def paths_bound(rows: int, cols: int, n: int) -> int:
    """The most augmenting paths that a block can need (docs/internals/solver.md)."""
    rows, cols = min(rows, cols), max(rows, cols)
    return rows * max(n, rows - n) if rows == cols else cols * max(n, rows)


def sweeps_bound(rows: int, cols: int) -> int:
    """The most sweeps that one search can take."""
    return max(rows, cols) + 1


def count_cpu(blocks: Tensor, n: int) -> Iterator[Work]:
    """One block at a time, so that the kernel's count is a block's."""
    from nmsolve.backends import ascent_schedule
    from nmsolve.backends.cpu import masks as cpu

    reals, ints = cpu._work_arrays(blocks)
    m = max(blocks.shape[1:])
    mask = torch.empty(blocks.shape, dtype=torch.bool)
    for k in range(len(blocks)):
        for region in cpu._regions(blocks[k : k + 1], mask[k : k + 1], m, m):
            upright, _ = cpu._upright(region)
            request = cpu.Request(n, m, ascent_schedule.SWEEPS, 0, 0)
            yield Work(cpu.solve_exact(upright, request, None, reals, ints, 0, 1), None)


def count_torch(blocks: Tensor, n: int) -> Iterator[Work]:
    """Rounds whose search had something left to do after the flips of tight entries."""
    from nmsolve.backends.torch import masks as reference

    once, searches = reference._augment_once, []

    def counting(a: Tensor, x: Tensor, u: Tensor, v: Tensor, short: Tensor, over: Tensor, slack: bool) -> int:
        needed = bool(short.any() or over.any())
        sweeps = once(a, x, u, v, short, over, slack)
        if needed:
            searches.append(sweeps)
        return sweeps

    with _replaced(reference, "_augment_once", counting):
        for block in blocks:
            searches.clear()
            a, _ = reference.normalise(block[None])
            reference.solve(a if a.shape[1] <= a.shape[2] else a.mT, n, None)
            yield Work(len(searches), sum(searches))


def count_triton(blocks: Tensor, n: int) -> Iterator[Work]:
    """Calls of the kernel's functions by the interpreter, one block at a time."""
    from nmsolve.kernels import paths

    from nmsolve.backends.triton import masks as gpu
    from nmsolve.pattern import NMPattern

    calls = {"to_arcs": 0, "shortest_to_cols": 0}

    def counting(name: str) -> Callable[..., object]:
        function = getattr(paths, name)

        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    pattern = NMPattern(n, max(blocks.shape[1:]))
    with (
        _replaced(paths, "to_arcs", counting("to_arcs")),  # made at the start and after every search
        _replaced(paths, "shortest_to_cols", counting("shortest_to_cols")),  # one per sweep
    ):
        for block in blocks:
            calls.update(dict.fromkeys(calls, 0))
            gpu.exact(block[None], pattern, want_solution=True)  # 4 x 4 masks alone need no path
            yield Work(calls["to_arcs"] - 1, calls["shortest_to_cols"])


@contextmanager
def _replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


COUNTERS: dict[str, Callable[[Tensor, int], Iterator[Work]]] = {
    "cpu": count_cpu,
    "torch": count_torch,
    "triton": count_triton,
}


# --- the table ----------------------------------------------------------------------------------------------


def kinds() -> dict[str, Callable[[int, int], Tensor]]:
    """Kind -> blocks of a count and size; the real weights first."""
    found: dict[str, Callable[[int, int], Tensor]] = {"smollm2": real_weights}
    for name in common.DISTRIBUTIONS:
        found[name] = lambda count, m, name=name: common.scores(name, (count, m, m), seed=m)
    for name in ADVERSARIAL:
        found[name] = lambda count, m, name=name: adversarial(name, count, m, seed=m)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", type=int, default=2000, help="blocks for the Numba backend")
    parser.add_argument("--torch", type=int, default=100, help="blocks for the torch backend")
    parser.add_argument("--triton", type=int, default=2, help="blocks for the interpreted Triton kernel")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "augmentations.csv")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    torch.set_num_threads(1)
    rows = []
    for kind, make in kinds().items():
        for n, m in PATTERNS:
            for backend, counter in COUNTERS.items():
                count = getattr(arguments, backend)
                try:
                    blocks = make(count, m)
                except ModuleNotFoundError as error:
                    print(f"{kind}: left out: {error}")
                    break
                work = list(counter(blocks, n))
                sweeps = [one.sweeps for one in work if one.sweeps is not None]
                rows.append(
                    {
                        "kind": kind,
                        "pattern": f"{n}:{m}",
                        "backend": backend,
                        "blocks": count,
                        "paths_mean": f"{sum(one.paths for one in work) / count:.3f}",
                        "paths_most": max(one.paths for one in work),
                        "paths_bound": paths_bound(m, m, n),
                        "sweeps_mean": f"{sum(sweeps) / count:.3f}" if sweeps else "",
                        "sweeps_most": max(sweeps) if sweeps else "",
                        "sweeps_bound_per_path": sweeps_bound(m, m),
                    }
                )
                print(*rows[-1].values(), sep="\t", flush=True)
    common.write_csv(arguments.out, rows, "triton")


if __name__ == "__main__":
    main()
