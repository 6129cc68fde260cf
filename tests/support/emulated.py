"""Tests of compiled kernels, run in children: in the process of a default run they are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(capability: int, *arguments: str, cache: Path, timeout: float) -> str:
    """What pytest printed with these arguments on ``sm_<capability>``; a test that fails is an error."""
    pytest.importorskip("numpy", minversion="2.0", reason="the emulator promotes integers as NumPy 2 does")
    environment = os.environ | {"NMSOLVE_PTX_SM": str(capability), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    child = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert child.returncode == 0, f"{child.stdout[-8000:]}\n{child.stderr[-4000:]}"
    return child.stdout
