"""Many matrices in one launch or one by one, and solves that a CUDA graph replays. Writes launches.csv.

By the host's clock until the GPU is done, for it is the host's share that a group and a graph save. ``same``
says whether both ways gave the same masks; a graph is replayed on scores that it had not seen when captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import nmsolve
from gpu_day import clock
from gpu_day.cases import normal
from gpu_day.setting import Setting, Sheet
from nmsolve.backends.triton import masks as gpu
from nmsolve.pattern import NMPattern

COLUMNS = (
    "what", "way", "n", "m", "matrices", "rows", "cols", *clock.COLUMNS, "same", "wrong",
)  # fmt: skip
GROUPS = ((8, 1024, 1024), (64, 512, 1024), (256, 768, 256))
GRAPH_SIDE = 1024


class Ways(NamedTuple):
    """Two ways to the same masks: name -> call, and ``prepare`` before they are compared."""

    what: str
    n: int
    m: int
    shape: tuple[int, int, int]
    calls: dict[str, Callable[[], list[Tensor]]]
    fresh: Callable[[int], None]
    """Changes the scores, by a seed."""


def group(setting: Setting, count: int, rows: int, cols: int, n: int, m: int) -> Ways:
    scores = [normal(setting, (rows, cols), torch.float32, k) for k in range(count)]

    def together() -> list[Tensor]:
        return list(nmsolve.transposable_masks(scores, n, m, backend="triton"))

    def one_by_one() -> list[Tensor]:
        return [nmsolve.transposable_mask(matrix, n, m, backend="triton") for matrix in scores]

    def fresh(seed: int) -> None:
        for k, matrix in enumerate(scores):
            matrix.copy_(normal(setting, (rows, cols), torch.float32, 1000 * seed + k))

    return Ways("group", n, m, (count, rows, cols), {"one by one": one_by_one, "one launch": together}, fresh)


class Replay:
    """A CUDA graph of a function's kernels; in a rehearsal the function itself, on the same tensors."""

    def __init__(self, setting: Setting, solve: Callable[[], list[Tensor]]) -> None:
        self.graph: Any = None
        self.solve = solve
        solve()  # compiled before the capture
        if setting.device.type != "cuda":
            self.masks = solve()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            solve()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.masks = solve()

    def __call__(self) -> list[Tensor]:
        if self.graph is not None:
            self.graph.replay()
        else:
            for mask, new in zip(self.masks, self.solve(), strict=True):
                mask.copy_(new)
        return self.masks


def graph(setting: Setting, method: str, side: int, n: int, m: int) -> Ways:
    scores = normal(setting, (1, side, side), torch.float32, m)
    pattern = NMPattern(n, m)

    def solve() -> list[Tensor]:
        if method == "exact":
            return [gpu.exact(scores, pattern).mask]
        if method == "tsenor":
            return [gpu.tsenor(scores, pattern, **setting.tsenor)]
        return [getattr(gpu, method)(scores, pattern)]

    def fresh(seed: int) -> None:
        scores.copy_(normal(setting, (1, side, side), torch.float32, 1000 * seed + m))

    calls: dict[str, Callable[[], list[Tensor]]] = {"eager": solve, "replayed": Replay(setting, solve)}
    return Ways(f"graph, {method}", n, m, (1, side, side), calls, fresh)


def every(setting: Setting) -> Iterator[Callable[[], Ways]]:
    if setting.rehearsal:
        yield lambda: group(setting, 3, 8, 16, 2, 4)
        yield lambda: graph(setting, "exact", 16, 2, 4)
        yield lambda: graph(setting, "ordinary", 16, 2, 4)
        return
    for n, m in ((2, 4), (8, 16), (16, 32)):
        for shape in GROUPS:
            yield lambda shape=shape, n=n, m=m: group(setting, *shape, n, m)  # type: ignore[misc]
        for method in ("exact", "greedy", "tsenor", "ordinary"):
            yield lambda method=method, n=n, m=m: graph(setting, method, GRAPH_SIDE, n, m)  # type: ignore[misc]


def run(setting: Setting) -> tuple[bool, str]:
    sheet = Sheet(setting, "launches.csv", COLUMNS, 7)
    late, order = 0, list(every(setting))
    for make in order:
        if setting.left < 2:
            late += 1
            continue
        compare(setting, sheet, make)
    differ = [f"{row['what']} {row['n']}:{row['m']}" for row in sheet if row["same"] not in ("yes",)]
    line = f"{len(sheet.rows)} rows, not the same: {'; '.join(differ) or 'none'}; {late} pairs without time"
    return not late, line


def compare(setting: Setting, sheet: Sheet, make: Callable[[], Ways]) -> None:
    """Rows of both ways; three times on new scores they have to give the same masks."""
    try:
        ways = make()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[:500]
        sheet.add(what="capture or allocation", way="", n="", m="", matrices="", rows="", cols="", wrong=text)
        print(text)
        return
    size = dict(zip(("matrices", "rows", "cols"), ways.shape, strict=True))
    if all((ways.what, way, ways.n, ways.m, *ways.shape) in sheet for way in ways.calls):
        return
    same = True
    for seed in (1, 2, 3):
        ways.fresh(seed)
        expected, *others = [[mask.clone() for mask in call()] for call in ways.calls.values()]
        for other in others:
            same &= all(map(torch.equal, expected, other))
    for way, call in ways.calls.items():
        times = clock.whole(setting, [call], 0.3)
        sheet.add(
            what=ways.what,
            way=way,
            n=ways.n,
            m=ways.m,
            **size,
            same="yes" if same else "no",
            **times.columns(),
        )
        print(f"{ways.what}, {way}, {ways.n}:{ways.m}, {ways.shape}: {times.median:.4g} ms, same: {same}")
