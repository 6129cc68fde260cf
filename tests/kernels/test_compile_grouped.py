"""The grouped kernels compile for GPUs that are not here, and keep nothing in memory but their matrices."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from kernel_costs import offline

pytest.importorskip("triton")


def check(jobs: list[dict[str, Any]]) -> None:
    faults = []
    for result in offline.compile_all(jobs):
        name = " ".join(str(result[key]) for key in ("m", "target", "dtype", "options"))
        if "error" in result:
            faults.append(f"{name}: {result['error']}")
        elif result["stack"] if "local" not in result else result["spills"] + result["local"]:  # AMD, NVIDIA
            faults.append(f"{name}: spills with {result['registers']} registers")
    assert not faults, "\n".join(faults)


def test_some_configurations() -> None:
    jobs = [*offline.jobs_of("grouped", 16, "sm_90", "bfloat16")]
    jobs += offline.jobs_of("grouped", 32, "sm_90", "float64", edge=True, solution=True)
    jobs += offline.jobs_of("grouped", 16, "gfx942", edge=True, solution=True)
    for target in offline.TARGETS:
        jobs += offline.jobs_of("grouped_exhaustive", 4, target)
    check(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_configuration(target: str) -> None:
    jobs: list[dict[str, Any]] = []
    for m, edge, solution in product((4, 8, 16, 32, 64), (False, True), (False, True)):
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            jobs += offline.jobs_of("grouped", m, target, dtype, edge=edge, solution=solution)
        jobs += offline.jobs_of("grouped", m - 1, target, edge=edge, solution=solution, packed=False)
    for n, packed, dtype in product((1, 2, 3), (False, True), ("float32", "bfloat16", "float64")):
        for kernel in ("exhaustive", "grouped_exhaustive"):
            jobs += offline.jobs_of(kernel, 4, target, dtype, n=n, packed=packed)
    check(jobs)


def test_the_same_floating_point_as_alone() -> None:
    """Loop by loop as many operations, fused or not: the compiler contracts both kernels' code alike."""
    jobs = [next(offline.jobs_of(kernel, 8, "sm_90", solution=True)) for kernel in ("exact", "grouped")]
    counts = [
        [tuple(loop.get(name, 0) for name in ("FFMA", "FADD", "FMUL", "MUFU")) for loop in result["loops"]]
        for result in offline.compile_all(jobs)
    ]
    alone, grouped = ([loop for loop in loops if any(loop)] for loops in counts)
    assert alone
    assert grouped == alone
