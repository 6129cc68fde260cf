"""Slabs: where they lie, and threads that read and solve them."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nmsolve.checkpoint.slabs as slabs
from nmsolve import NMPattern, NMSolveError, transposable_mask
from nmsolve.backends.dispatch import BACKENDS
from nmsolve.checkpoint.format import open_checkpoint
from nmsolve.checkpoint.overlap import ahead
from nmsolve.checkpoint.selection import Selected, select_tensors
from nmsolve.checkpoint.slabs import MaskSettings, SlabSolver, slabs_of
from nmsolve.errors import WorkFailed


def chosen(folder: Path, weights: dict[str, torch.Tensor]) -> list[Selected]:
    save_file(weights, folder / "m.safetensors")
    checkpoint = open_checkpoint(folder / "m.safetensors")
    return list(select_tensors(checkpoint, NMPattern(2, 4), transposable=True, include=["*"]).masked)


def settings(backend: str) -> MaskSettings:
    return MaskSettings(NMPattern(2, 4), True, "exact", backend, "cpu")


@pytest.mark.parametrize("elements", [1, 64, 100, 1000, 10**6])
def test_slabs_are_every_weight_once_in_order(tmp_path: Path, elements: int) -> None:
    weights = {"fc.weight": torch.randn(37, 21), "experts.weight": torch.randn(5, 9, 11)}
    for item in chosen(tmp_path, weights):
        weight, solver = weights[item.entry.name], SlabSolver(settings("torch"), BACKENDS["torch"])
        first, parts = 0, []
        for slab in slabs_of(item, 4, elements):
            assert slab.first == first
            first += math.prod(slab.shape)
            parts.append(solver(slab))
        assert first == weight.numel()
        keep = torch.cat([part.keep.flatten() for part in parts]).view(weight.shape)
        assert torch.equal(keep, transposable_mask(weight.abs(), "2:4"))
        masked = torch.cat([part.weights.flatten() for part in parts]).view(weight.shape)
        assert torch.equal(masked, weight * keep)
        assert sum(part.figures.kept for part in parts) == int(keep.sum())


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("threads", [1, 3])
def test_slabs_side_by_side_where_a_backend_gains_by_it(tmp_path, monkeypatch, backend, threads) -> None:
    """Otherwise one at a time, and the next ones are read meanwhile."""
    if not BACKENDS[backend].is_installed():
        pytest.skip(f"{backend} is not installed")
    (item,) = chosen(tmp_path, {"fc.weight": torch.randn(64, 64)})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    solver = SlabSolver(settings(backend), BACKENDS[backend])
    solve, lock, inside, most = slabs._solve, threading.Lock(), [0], [0]
    several = backend == "cpu" and threads > 1
    together = threading.Barrier(threads)

    def counted(*args):
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        if several:
            together.wait(60)
        try:
            return solve(*args)
        finally:
            with lock:
                inside[0] -= 1

    monkeypatch.setattr(slabs, "_solve", counted)
    wanted = list(slabs_of(item, 4, 300))
    count = len(wanted) // threads * threads
    found = list(ahead(((lambda slab=slab: solver(slab)) for slab in wanted[:count]), solver.threads))
    assert len(found) == count
    assert most[0] == (threads if several else 1)


def test_who_is_stopped_does_not_begin(tmp_path: Path) -> None:
    (item,) = chosen(tmp_path, {"fc.weight": torch.randn(64, 64)})
    solver = SlabSolver(settings("torch"), BACKENDS["torch"])
    solver.stop()
    with pytest.raises(WorkFailed, match=r"fc\.weight: the work was stopped"):
        solver(next(slabs_of(item, 4, 300)))


def test_what_is_not_finite_is_named_by_its_place_in_the_tensor(tmp_path: Path) -> None:
    weight = torch.randn(64, 64)
    weight[41, 7] = torch.inf
    (item,) = chosen(tmp_path, {"fc.weight": weight})
    solver = SlabSolver(settings("torch"), BACKENDS["torch"])
    parts = ahead(((lambda slab=slab: solver(slab)) for slab in slabs_of(item, 4, 512)), 2)
    for _ in range(5):
        next(parts)
    with pytest.raises(NMSolveError, match=r"weights 2560 to 3071: .*1 NaN or infinite.*inf at \(41, 7\)"):
        next(parts)
