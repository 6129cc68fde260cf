"""Many matrices in one launch, under the interpreter: bit for bit what each of them gets alone."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor

import nmsolve
from nmsolve.pattern import NMPattern

gpu = pytest.importorskip("nmsolve.backends.triton.masks")

from triton.runtime.errors import InterpreterError  # noqa: E402


def matrices(m: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """With and without edges, one block, part of a block, odd strides, batches that fill several programs."""

    def sample(*shape: int) -> Tensor:
        return oracles.sample("student_t", shape, seed=sum(shape), dtype=dtype)

    return [
        sample(1, 2 * m, 3 * m),
        sample(2, 2 * m + 1, m).transpose(1, 2),
        sample(1, m, m),
        sample(3, 2 * m, 2 * m + m // 2 + 1),
        sample(1, 1, m - 1),
        sample(4, m + 2, 7)[::2, 1:, ::3],
        sample(9, m, 2 * m).transpose(0, 1),
        sample(1, 1, 2 * m).expand(2, m, 2 * m),
    ]


def assert_like_alone(
    scores: list[Tensor], pattern: NMPattern, results: list[Any], want_solution: bool
) -> None:
    assert len(results) == len(scores)
    for matrix, result in zip(scores, results, strict=True):
        alone = gpu.exact(matrix, pattern, want_solution=want_solution)
        for mine, theirs in zip(result, alone, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))


@pytest.mark.parametrize("want_solution", [False, True])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (2, 6), (4, 8)])
def test_like_each_alone(n: int, m: int, want_solution: bool) -> None:
    scores, pattern = matrices(m), NMPattern(n, m)
    results = gpu.exact_group(scores, pattern, want_solution=want_solution)
    assert_like_alone(scores, pattern, results, want_solution)


def test_larger_tiles() -> None:
    scores = [oracles.sample("normal", shape, seed=1) for shape in ((1, 16, 80), (1, 32, 16), (1, 5, 17))]
    pattern = NMPattern(8, 16)
    assert_like_alone(scores, pattern, gpu.exact_group(scores, pattern, want_solution=True), True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    scores, pattern = matrices(4, dtype), NMPattern(2, 4)
    assert_like_alone(scores, pattern, gpu.exact_group(scores, pattern, want_solution=True), True)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_every_program_finds_its_matrix(count: int) -> None:
    """Matrices of 1, 2 or 3 programs each, the last of them partly empty."""
    scores = [oracles.sample("normal", (1, 4, 4 * (1 + 37 * k % 80)), seed=k) for k in range(count)]
    pattern = NMPattern(2, 4)
    for want_solution in (False, True):
        results = gpu.exact_group(scores, pattern, want_solution=want_solution)
        assert_like_alone(scores, pattern, results, want_solution)


@pytest.mark.parametrize(
    ("shapes", "launches"),
    [
        ([(1, 8, 8), (2, 4, 12)], {(False, True): 2}),
        ([(1, 9, 8), (1, 8, 8), (1, 3, 3)], {(False, True): 2, (True, False): 2}),
        ([(1, 9, 9), (1, 8, 8)], {(False, False): 1, (False, True): 1, (True, False): 2}),
    ],
)
def test_launches(
    shapes: list[tuple[int, ...]], launches: dict[tuple[bool, bool], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """(partial blocks, 4 divides the width) of each launch, and its number of regions."""
    kernel, seen = gpu.grouped_kernel, {}

    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(**arguments: Any) -> None:
                kind = arguments["SLACK"], arguments["PACKED"]
                assert kind not in seen
                seen[kind] = arguments["regions"]
                kernel[grid](**arguments)

            return launch

    monkeypatch.setattr(gpu, "grouped_kernel", Counting())
    gpu.exact_group([torch.rand(shape) for shape in shapes], NMPattern(2, 4), want_solution=True)
    assert seen == launches


def test_every_output_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        if tensor.dtype == torch.bool:
            tensor.view(torch.uint8).fill_(0xAA)
        else:
            tensor.fill_(float("nan"))
        return tensor

    scores = matrices(4)
    monkeypatch.setattr(torch, "empty", poisoned)
    for result in gpu.exact_group(scores, NMPattern(2, 4), want_solution=True):
        assert result.mask.view(torch.uint8).max() <= 1
        assert not any(output.isnan().any() for output in result[1:])


@pytest.mark.parametrize("field", [1, 2, 3, 5])
def test_a_wrong_address_is_noticed(field: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the checks of this file rest on: the tensors behind the table are guarded like arguments."""
    make = gpu._table

    def displaced(*args: Any) -> tuple[Tensor, int]:
        table, programs = make(*args)
        table[1, field] += 1 << 20
        return table, programs

    monkeypatch.setattr(gpu, "_table", displaced)
    with pytest.raises(InterpreterError, match="out of bounds"):
        gpu.exact_group([torch.rand(1, 8, 8), torch.rand(1, 8, 8)], NMPattern(2, 4), want_solution=True)


def test_the_public_function_takes_any_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a dtype together, in their order; leading dimensions; nothing; none with no elements."""
    group, sizes = gpu.exact_group, []

    def counting(scores: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        assert len({matrix.dtype for matrix in scores}) == 1
        sizes.append(len(scores))
        return group(scores, *args, **kwargs)

    monkeypatch.setattr(gpu, "exact_group", counting)
    single, half = torch.float32, torch.bfloat16
    scores = [
        oracles.sample("normal", shape, seed=k, dtype=dtype)
        for k, (shape, dtype) in enumerate(
            [((8, 12), single), ((2, 3, 5, 8), half), ((0, 8), single), ((7, 9), single), ((4, 4), half)]
        )
    ]
    scores.append(oracles.sample("normal", (2, 6, 4, 8), seed=9).transpose(0, 1)[:, :, :, 1:])
    solutions = nmsolve.transposable_masks(scores, 2, 4, backend="triton", return_solution=True)
    assert sorted(sizes) == [2, 2 + len(scores[-1])]  # the last one's leading dimensions do not join
    for matrix, solution in zip(scores, solutions, strict=True):
        alone = nmsolve.transposable_mask(matrix, 2, 4, backend="triton", return_solution=True)
        for name in ("mask", "row_duals", "col_duals", "objective", "bound", "scale"):
            assert torch.equal(getattr(solution, name), getattr(alone, name)), name
    assert nmsolve.transposable_masks([], 2, 4, backend="triton") == []
    (mask,) = nmsolve.transposable_masks(scores[:1], 2, 4, backend="triton")
    assert torch.equal(mask, solutions[0].mask)
