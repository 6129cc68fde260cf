"""What else there is, on the same GPU: published algorithms in PyTorch, PyTorch's own kernels, SciPy's loop.

Writes peers.csv. ``loss`` is what is kept below the bound that float64 duals prove, relative to it, over all
blocks that a contender solved; ``lines_short`` the share of rows and columns that hold fewer than n. Ours are
the public functions with all their checks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peers.patterns_2_4 import best_pattern
from peers.permllm_sinkhorn import permllm_sinkhorn
from peers.sinkhorn_loop import sinkhorn_loop
from peers.tsenor import tsenor
from peers.two_approximation import two_approximation
from torch import Tensor

import nmsolve
from gpu_day import clock
from gpu_day.cases import normal
from gpu_day.setting import Setting, Sheet
from nmsolve.pattern import NMPattern
from nmsolve.solution import dual_bound, kept_score

COLUMNS = (
    "problem", "peer", "n", "m", "dtype", "blocks", *clock.COLUMNS, "us_per_block", "loss", "lines_short",
    "wrong",
)  # fmt: skip
TEMPERATURE, ITERATIONS = 0.1, 20
OF_SCIPY = 256
"""Matrices that SciPy's loop solves."""


class Contender(NamedTuple):
    """``call`` gives masks of ``blocks``, or what ``kept`` makes the kept score and short lines of."""

    problem: str
    peer: str
    n: int
    m: int
    blocks: Tensor
    call: Callable[[], Any]
    judge: Callable[[Any], tuple[float | str, float | str]]

    @property
    def key(self) -> tuple[object, ...]:
        return self.problem, self.peer, self.n, self.m, str(self.blocks.dtype).removeprefix("torch.")


def cut(matrix: Tensor, m: int) -> Tensor:
    """The blocks of a matrix, ``(B, m, m)``."""
    blocks = matrix.unflatten(1, (-1, m)).unflatten(0, (-1, m)).transpose(1, 2)
    return blocks.flatten(0, 1).contiguous()


def bound_of(scores: Tensor, n: int, m: int) -> float:
    """No transposable mask of the matrix keeps more: by duals, in float64, in PyTorch."""
    solution = nmsolve.transposable_mask(scores, n, m, return_solution=True, backend=BACKEND)
    wide = scores.double()
    return float(dual_bound(wide, solution.row_duals, solution.col_duals, NMPattern(n, m)).sum())


BACKEND = "triton"


def mask_contenders(setting: Setting, side: int, n: int, m: int) -> Iterator[Contender]:
    matrix = normal(setting, (side, side), torch.float32, m)
    blocks = cut(matrix, m)
    bound = bound_of(matrix, n, m)

    def judge(masks: Tensor) -> tuple[float, float]:
        masks = cut(masks, m) if masks.ndim == 2 else masks
        lines = torch.cat([masks.sum(1), masks.sum(2)])
        if (lines > n).any():
            raise RuntimeError(f"a line holds {int(lines.max())}, expected at most {n}")
        kept = float((blocks.double() * masks).sum())
        return 1 - kept / bound, float((lines < n).double().mean())

    def contender(peer: str, call: Callable[[], Any]) -> Contender:
        return Contender("mask", peer, n, m, blocks, call, judge)

    for method in ("exact", "greedy", "tsenor"):
        options = dict(setting.tsenor) if method == "tsenor" else {}
        yield contender(
            f"nmsolve {method}",
            lambda method=method, options=options: nmsolve.transposable_mask(  # type: ignore[misc]
                matrix, n, m, method=method, backend=BACKEND, **options
            ),
        )
    if (n, m) == (2, 4):
        yield contender("all 90 patterns", lambda: best_pattern(blocks))
    yield contender("2-approximation", lambda: two_approximation(blocks, n))
    yield contender("TSENOR without local search", lambda: tsenor(blocks, n, False))
    yield contender("TSENOR", lambda: tsenor(blocks, n))


def tile_contenders(setting: Setting, side: int) -> Iterator[Contender]:
    """PyTorch's kernel takes half types only, and packs what it keeps."""
    matrix = normal(setting, (side, side), torch.bfloat16, 4)
    blocks = cut(matrix, 4)
    bound = bound_of(matrix, 2, 4)

    def of_mask(mask: Tensor) -> tuple[float, float]:
        return 1 - float(kept_score(matrix, mask, NMPattern(2, 4))[0].sum()) / bound, 0.0

    def call() -> Tensor:
        return nmsolve.transposable_mask(matrix, 2, 4, backend=BACKEND)

    yield Contender("mask", "nmsolve exact", 2, 4, blocks, call, of_mask)
    if setting.device.type == "cuda":
        from peers.torch_sparse_tile import packed_tiles

        def of_packed(packed: tuple[Tensor, ...]) -> tuple[float, str]:
            return 1 - float(packed[0].double().sum()) / bound, ""

        yield Contender("mask", "torch.sparse tile", 2, 4, blocks, lambda: packed_tiles(matrix), of_packed)


def assignment_contenders(setting: Setting, side: int, m: int) -> Iterator[Contender]:
    scores = normal(setting, (side * side // m**2, m, m), torch.float32, m)
    few = scores[:OF_SCIPY]

    def judge(columns: Tensor) -> tuple[float, float]:
        blocks = scores[: len(columns)].double()
        bound = nmsolve.assignment(blocks.float(), return_solution=True, backend=BACKEND).bound.sum()
        kept = blocks.gather(2, columns.to(blocks.device).long().unsqueeze(2)).sum()
        return float(1 - kept / bound), 0.0

    yield Contender(
        "assignment", "nmsolve", 1, m, scores, lambda: nmsolve.assignment(scores, backend=BACKEND), judge
    )
    if importlib.util.find_spec("scipy") is not None:
        from peers.linear_assignment import scipy_assignment

        def loop() -> Tensor:
            return torch.from_numpy(scipy_assignment(few.cpu().numpy()))

        yield Contender("assignment", "SciPy, one by one, copied to the host", 1, m, few, loop, judge)
    if importlib.util.find_spec("torch_linear_assignment") is not None:
        from peers.linear_assignment import torch_assignment

        yield Contender(
            "assignment", "torch-linear-assignment", 1, m, few, lambda: torch_assignment(few), judge
        )


def sinkhorn_contenders(setting: Setting, side: int, m: int) -> Iterator[Contender]:
    """Forward and backward; ``loss`` is how far the gradient is from the loop's in float64, relative."""
    logits = normal(setting, (side * side // m**2, m, m), torch.float32, m)
    pull = normal(setting, tuple(logits.shape), torch.float32, m + 1)

    def gradient(plan: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
        source = x.detach().requires_grad_(True)
        (found,) = torch.autograd.grad((plan(source) * weight).sum(), source)
        return found

    def judge(found: Tensor) -> tuple[float, str]:
        few = slice(0, 64)
        wide = gradient(lambda x: sinkhorn_loop(x, TEMPERATURE, ITERATIONS), logits[few].double(), pull[few])
        return float((found[few] - wide).abs().max() / wide.abs().max()), ""

    plans = {
        "nmsolve": lambda x: nmsolve.sinkhorn(x, TEMPERATURE, ITERATIONS, backend=BACKEND),
        "loop in PyTorch, log domain": lambda x: sinkhorn_loop(x, TEMPERATURE, ITERATIONS),
        "loop in PyTorch, as PermLLM has it": lambda x: permllm_sinkhorn(x, TEMPERATURE, ITERATIONS),
    }
    for peer, plan in plans.items():
        yield Contender(
            "sinkhorn",
            peer,
            0,
            m,
            logits,
            lambda plan=plan: gradient(plan, logits, pull),
            judge,  # type: ignore[misc]
        )


def groups(setting: Setting) -> Iterator[Callable[[], Iterator[Contender]]]:
    """Contenders that share their inputs, made when their turn comes; the most important first."""
    side = setting.side // 2
    half = setting.side // 4 if not setting.rehearsal else side
    for m in setting.sizes[:4]:
        yield lambda m=m: mask_contenders(setting, side, m // 2, m)  # type: ignore[misc]
    yield lambda: tile_contenders(setting, side)
    for m in setting.sizes[2:] or setting.sizes[-1:]:
        yield lambda m=m: assignment_contenders(setting, half, m)  # type: ignore[misc]
    for m in setting.sinkhorn_sizes[2:] or setting.sinkhorn_sizes[:1]:
        yield lambda m=m: sinkhorn_contenders(setting, half, m)  # type: ignore[misc]


def run(setting: Setting) -> tuple[bool, str]:
    sheet = Sheet(setting, "peers.csv", COLUMNS, 5)
    late = 0
    broken = []
    for group in groups(setting):
        try:
            late += not _run_group(setting, sheet, group)
        except Exception as error:  # not of one contender: of what they all start from
            broken.append(f"{type(error).__name__}: {error}"[:300])
            print(f"a group: {broken[-1]}")
    wrong = [f"{row['peer']} {row['n']}:{row['m']}" for row in sheet if row["wrong"]] + broken
    line = f"{sum(not row['wrong'] for row in sheet)} timed, wrong: {'; '.join(wrong) or 'none'}"
    return not late and not broken, f"{line}; {late} groups without time"


def _run_group(setting: Setting, sheet: Sheet, group: Callable[[], Iterator[Contender]]) -> bool:
    """Whether there was time for all of it."""
    if setting.left < 3:
        return False
    for contender in group():
        if contender.key in sheet:
            continue
        if setting.left < 2:
            return False
        row: dict[str, Any] = dict(zip(COLUMNS, (*contender.key, len(contender.blocks)), strict=False))
        try:
            row["loss"], row["lines_short"] = contender.judge(contender.call())
            times = clock.timed(setting, [contender.call], 0.5)
            row |= times.columns() | {"us_per_block": 1e3 * times.median / len(contender.blocks)}
        except Exception as error:
            row["wrong"] = f"{type(error).__name__}: {error}"[:500]
        sheet.add(**row)
        said = row.get("wrong") or f"{row['us_per_block']:.4g} us a block, loss {row['loss']:.2g}"
        print(f"{contender.problem}, {contender.peer}, {contender.n}:{contender.m}: {said}", flush=True)
    return True
