"""DTensors and FSDP2 in real processes (gloo on the CPU); the cases are in spread.py."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import spread
import torch
import torch.multiprocessing
from gloo import outcomes
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import _StridedShard

from nmsolve.ops.distributed import Span, _split

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes(tmp_path: Path, processes: int) -> None:
    """One test for all cases, which share processes."""
    cases = spread.CASES[processes]
    found = outcomes(spread.work, processes, tmp_path, cases)
    assert found.keys() == cases.keys()
    fine = dict.fromkeys(range(processes))
    assert {case: said for case, said in found.items() if said != fine} == {}


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
