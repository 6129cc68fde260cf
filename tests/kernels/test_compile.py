"""The shipped kernel configurations compile for GPUs that are not here, and their machine code is sound.

What is asked of the machine code: nothing spilled to memory, and no barrier inside a loop where a block of
the mask kernels lies in one warp (M <= 32). What bench/results/kernel_costs.csv lists is compiled by
test_kernel_costs.py; these are the other sizes, dtypes and options. ``-m slow`` compiles them all for every
target.
"""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
from kernel_costs import offline

triton = pytest.importorskip("triton")

SIZES = (4, 8, 16, 32, 64)
SINKHORN_SHAPES = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (1, 3), (33, 20), (20, 33)]
SINKHORN_SHAPES += [(8, 128), (128, 8), (16, 64), (64, 16), (128, 64), (64, 128), (60, 60), (100, 100)]
STRIPS = [
    (1, 8, 4),
    (16, 16, 4),
    (64, 8, 4),
    (64, 16, 4),
    (64, 32, 4),
    (64, 64, 4),
    (64, 64, 8),
    (128, 20, 4),
]
STRIPS += [(256, 64, 4), (256, 64, 8), (1024, 8, 4), (512, 16, 8), (32, 8, 2)]


def shipped(target: str) -> list[dict[str, Any]]:
    """Every configuration in float32, and the ones that differ most in the other dtypes."""
    jobs: list[dict[str, Any]] = []
    for m in SIZES:
        for edge, solution, warm in product((False, True), repeat=3):
            jobs += offline.jobs_of("exact", m, target, edge=edge, solution=solution, warm=warm)
        for edge, transport in product((False, True), repeat=2):
            jobs += offline.jobs_of("dykstra", m, target, edge=edge, transport=transport)
        for dtype in ("float32", "bfloat16", "float64"):
            jobs += offline.jobs_of("nm", m, target, dtype)
            if m <= 32:
                for n in (1, m // 2, m - 1):
                    jobs += offline.jobs_of("nm_groups", m, target, dtype, n=n)
            jobs += offline.jobs_of("exact", m, target, dtype, solution=True)
        jobs += offline.jobs_of("exact", m, target, packed=False)
        jobs += offline.jobs_of("exact", m - 1, target, "float16", solution=True)
        jobs += offline.jobs_of("dykstra", m - 1, target, "bfloat16")
    for rows, cols in SINKHORN_SHAPES:
        for keep, tolerance in product((False, True), repeat=2):
            jobs += offline.jobs_of(
                "sinkhorn_forward", rows, target, cols=cols, keep=keep, tolerance=tolerance
            )
        jobs += offline.jobs_of("sinkhorn_backward", rows, target, cols=cols)
    for norm in (False, True):
        jobs += offline.jobs_of("gather", 0, target, "bfloat16", norm=norm)
    for v, m, k in STRIPS:
        jobs += offline.jobs_of("strips", m, target, v=v, k=k)
    for dtype in ("float32", "float64"):
        for parts in (False, True):
            jobs += offline.jobs_of("maxima", 0, target, dtype, parts=parts)
        jobs += offline.jobs_of("add_parts", 0, target, dtype)
        for m in (2, 3, 4, 8, 16, 32, 33):
            for n in {1, m // 2, m - 1}:
                jobs += offline.jobs_of("nth_largest", m, target, dtype, n=n)
                if m <= 4:
                    jobs += offline.jobs_of("sum_largest", m, target, dtype, n=n)
    return jobs


def selected(target: str) -> list[dict[str, Any]]:
    """What a default run compiles: much of it for one target, each kernel for the others."""
    jobs: list[dict[str, Any]] = []
    if target == "sm_90":
        jobs += offline.jobs_of("exact", 64, target, edge=True, solution=True)
        jobs += offline.jobs_of("dykstra", 64, target)
        jobs += offline.jobs_of("exact", 16, target, "bfloat16", solution=True, warm=True)
        jobs += offline.jobs_of("exact", 16, target, "float64", solution=True)
        jobs += offline.jobs_of("exact", 12, target, "float16", packed=False)
        jobs += offline.jobs_of("dykstra", 24, target, "float64", edge=True, transport=False)
        jobs += offline.jobs_of("nm", 64, target, "float64")
        jobs += offline.jobs_of("nm_groups", 32, target, "float64")
        jobs += offline.jobs_of("sinkhorn_forward", 128, target, cols=8)
        jobs += offline.jobs_of("sinkhorn_forward", 128, target, keep=True, tolerance=True)
        jobs += offline.jobs_of("sinkhorn_backward", 128, target)
        jobs += offline.jobs_of("strips", 64, target, v=256)
        jobs += offline.jobs_of("maxima", 0, target, "float64", parts=False)
        jobs += offline.jobs_of("nth_largest", 33, target, "float64")
        jobs += offline.jobs_of("sum_largest", 3, target, "float64")
    elif target.startswith("sm_"):
        jobs += offline.jobs_of("exact", 16, target)
        jobs += offline.jobs_of("dykstra", 8, target)
        jobs += offline.jobs_of("nm", 16, target)
        jobs += offline.jobs_of("sinkhorn_backward", 20, target, cols=33)
        jobs += offline.jobs_of("strips", 16, target)
        jobs += offline.jobs_of("maxima", 0, target)
    else:
        jobs += offline.jobs_of("exact", 16, target)
        jobs += offline.jobs_of("exact", 4, target, edge=True, solution=True, warm=True)
        jobs += offline.jobs_of("dykstra", 8, target)
        jobs += offline.jobs_of("nm", 4, target)
        jobs += offline.jobs_of("nm_groups", 16, target, "bfloat16")
        jobs += offline.jobs_of("sinkhorn_backward", 64, target)
        jobs += offline.jobs_of("maxima", 0, target)
    return jobs


def known_to_spill(result: dict[str, Any]) -> bool:
    """tsenor of M = 64 may, a few registers, with releases from Triton 3.8 on."""
    newer = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
    tsenor = result["kernel"] == "dykstra" and result["options"].get("transport", True)
    return newer and tsenor and result["m"] == 64 and result["spills"] <= 16


def check(jobs: list[dict[str, Any]]) -> None:
    processes = min(2, os.cpu_count() or 1)
    faults = []
    for result in offline.compile_all(jobs, processes=processes):
        name = " ".join(str(result[key]) for key in ("kernel", "m", "dtype", "options"))
        if "error" in result:
            faults.append(f"{name}: {result['error']}")
            continue
        if (result["spills"] or result.get("local")) and not known_to_spill(result):
            faults.append(f"{name}: {result['spills']} spills with {result['registers']} registers")
        barriers = [loop["BAR"] for loop in result.get("loops", []) if loop.get("BAR")]
        masks = result["kernel"] in ("exact", "dykstra", "nm")
        if barriers and masks and result["m"] <= 32:
            faults.append(f"{name}: barriers in loops {barriers}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("target", offline.TARGETS)
def test_compiles_without_spills(target: str) -> None:
    check(selected(target))


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_configuration_compiles_without_spills(target: str) -> None:
    check(shipped(target))


def test_a_job_that_fails_is_reported_and_the_others_are_done() -> None:
    good = next(offline.jobs_of("nm", 4, "sm_90"))
    bad = good | {"dtype": "complex64"}
    results = list(offline.compile_all([bad, good]))
    assert "error" in results[0]
    assert results[1]["registers"] > 0
    assert any("ISETP" in loop for loop in results[1]["loops"])
