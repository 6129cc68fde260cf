"""DTensors and FSDP2 in real processes (gloo on the CPU); the cases are in spread.py."""

from __future__ import annotations

import itertools

import pytest
import spread
import torch
import torch.multiprocessing
from gloo import Outcomes, outcomes
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nmsolve.ops.distributed import Span, _split

LIMIT_S = 300
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(spread.work, 2, tmp_path_factory.mktemp("two"), spread.CASES[2], LIMIT_S)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return outcomes(spread.work, 4, tmp_path_factory.mktemp("four"), spread.CASES[4], LIMIT_S)


@pytest.mark.parametrize("case", spread.CASES[2])
def test_two_processes(two: Outcomes, case: str) -> None:
    assert two[case] == dict.fromkeys(range(2))


@pytest.mark.parametrize("case", spread.CASES[4])
def test_four_processes(four: Outcomes, case: str) -> None:
    assert four[case] == dict.fromkeys(range(4))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("factor", [1, *([2, 3] if VERSION >= (2, 10) else [])])
def test_shards_are_those_of_torch(count: int, factor: int) -> None:
    placement = Shard(0) if factor == 1 else _StridedShard(0, split_factor=factor)
    for spans in ([(0, 7)], [(0, 30)], [(4, 8), (12, 16)], [(0, 1), (2, 3), (5, 24)]):
        held = torch.tensor([i for start, stop in spans for i in range(start, stop)])
        parts, _ = placement._split_tensor(held, count, with_padding=False, contiguous=False)
        assert [indices(part) for part in _split(spans, count, factor)] == [part.tolist() for part in parts]


def indices(spans: list[Span]) -> list[int]:
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans)), "spans that touch are one span"
    return [i for start, stop in spans for i in range(start, stop)]
