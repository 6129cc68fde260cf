"""The launch table: rows for each compiler, of tiles that the kernels can run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from common import ROOT
from kernel_costs import offline
from nmsolve.kernels import _launch

from nmsolve.backends.triton import launch_table

NEWEST = _launch.rows_of("3.9.0")


def test_a_newer_compiler_than_any_takes_the_newest_rows() -> None:
    for release in ("3.9.1", "3.10.0", "4.0.0", "12.34.5+git0123abc"):
        assert _launch.rows_of(release) == NEWEST


@pytest.mark.parametrize(
    ("releases", "sizes"), [(("3.5.0", "3.5.1+cu128", "3.6.0"), {8}), (("3.7.0", "3.7.1", "3.8.0+git"), {16})]
)
def test_an_older_compiler_has_rows_of_its_own(releases: tuple[str, ...], sizes: set[int]) -> None:
    for release in releases:
        different = {
            (kernel, now.size)
            for kernel in _launch.KERNELS
            for now, then in zip(NEWEST[kernel], _launch.rows_of(release)[kernel], strict=True)
            if now != then
        }
        assert different == {("tsenor", size) for size in sizes}


@pytest.mark.parametrize("release", ["3.5.0", "3.6.0", "3.7.1", "3.9.0"])
def test_every_row_is_one_that_the_kernels_can_run(release: str) -> None:
    for kernel, entries in _launch.rows_of(release).items():
        assert tuple(entry.size for entry in entries) == _launch.SIZES
        for entry in entries:
            assert launch_table.check_entry(kernel, tuple(entry)) == tuple(entry)


def test_the_compiler_that_is_there_decides() -> None:
    """In a process of its own, with Triton's version in disguise."""
    script = (
        "import triton; triton.__version__ = '3.6.0'\n"
        "from nmsolve.backends.triton import masks as gpu\n"
        "print(gpu.shipped_tile('tsenor', 8) == gpu.shipped_tile('dykstra', 8))"
    )
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "True"


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
def test_the_tile_of_older_compilers_compiles_with_this_one(target: str) -> None:
    tile = tuple(_launch.rows_of("3.6.0")["tsenor"][1][1:])
    (result,) = offline.compile_all(offline.jobs_of("dykstra", 8, target, tile=tile))
    assert result.get("spills") == 0, result
