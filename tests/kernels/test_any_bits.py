"""Every kernel ends on any bits: tests/kernels/any_bits.py in children, which are ended if it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import emulated
import pytest

pytest.importorskip("triton")

FILE = "tests/kernels/any_bits.py"


def interpreted(sizes: str, *selected: str, timeout: float) -> str:
    environment = os.environ | {"TRITON_INTERPRET": "1", "NMSOLVE_TEST_SIZES": sizes}
    environment.pop("PYTEST_ADDOPTS", None)
    environment.pop("NMSOLVE_PTX_SM", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *selected,
        FILE,
    ]
    child = subprocess.run(
        command, cwd=emulated.ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert child.returncode == 0, child.stdout[-8000:]
    return child.stdout


def passed(sizes: Sequence[int]) -> str:
    """What pytest prints at the end: seven tests of every size, and strips of groups of three and more."""
    return f"{7 * len(sizes) + sum(m > 2 for m in sizes)} passed"


def test_small_blocks_in_the_interpreter() -> None:
    assert "2 passed" in interpreted("4", "-k", "masks and False or plans", timeout=900)


def test_small_blocks_compiled(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NMSOLVE_TEST_SIZES", "4")
    selected = ("-k", "masks and False or duals and False")
    assert "2 passed" in emulated.run(90, *selected, FILE, cache=tmp_path, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [range(1, 9), (9, 16), (17, 32), (33, 64)], ids=str)
def test_block_sizes_in_the_interpreter(sizes: Sequence[int]) -> None:
    """The smallest and the largest of each tile; up to 32 the others are compiled."""
    assert passed(sizes) in interpreted(" ".join(map(str, sizes)), timeout=3 * 3600)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 33, 8))
def test_block_sizes_compiled(first: int, monkeypatch, tmp_path) -> None:
    """All up to 32; above, a search in a block that has no optimum takes a minute."""
    sizes = range(first, first + 8)
    monkeypatch.setenv("NMSOLVE_TEST_SIZES", " ".join(map(str, sizes)))
    assert passed(sizes) in emulated.run(90, FILE, cache=tmp_path, timeout=3 * 3600)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("sizes", [(3, 8), (9, 16), (17, 32), (33, 64)], ids=str)
def test_the_ends_of_each_tile_compiled(sizes, target: int, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NMSOLVE_TEST_SIZES", " ".join(map(str, sizes)))
    assert passed(sizes) in emulated.run(target, FILE, cache=tmp_path, timeout=3 * 3600)


@pytest.mark.slow
def test_larger_plans_in_the_interpreter() -> None:
    assert "2 passed" in interpreted("100 128", "-k", "plans", timeout=6 * 3600)


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90, 100])
def test_larger_plans_compiled(target: int, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("NMSOLVE_TEST_SIZES", "100 128")
    assert "2 passed" in emulated.run(target, "-k", "plans", FILE, cache=tmp_path, timeout=6 * 3600)
