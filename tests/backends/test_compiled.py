"""How the CPU backend's code is kept: by all its sources, where only the user can write, and who is told."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("numba")

from nmsolve.backends.cpu import masks as cpu
from nmsolve.backends.cpu import permutations as cpu_permute
from nmsolve.backends.cpu._numba.compiled import _Cache, _own_temporary_folder, _Telling, compiled

COMPILE = """
from numba.core import caching
{prepare}
import torch
from nmsolve import NMPattern
from nmsolve.backends.cpu import masks as cpu
from nmsolve.backends.cpu import permutations as cpu_permute
scores = torch.arange(32.0).view(1, 4, 8)
print(cpu.ordinary(scores, NMPattern(2, 4)).sum().item(), sum(cpu.solve_groups.stats.cache_hits.values()))
"""


NOWHERE = """
caching.CacheImpl._locator_classes = caching.CacheImpl._locator_classes[:1]  # that of NUMBA_CACHE_DIR
"""


def test_cache(tmp_path: Path) -> None:
    """A second process loads what the first compiled, also from a temporary folder; else it compiles."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()

    def run(prepare: str, cache: Path | str = "", terminal: bool = False) -> tuple[str, str]:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "TMPDIR": str(temporary)}
        command = [sys.executable, "-c", COMPILE.format(prepare=prepare)]
        reader, writer = pty.openpty() if terminal else os.pipe()
        done = subprocess.run(command, check=True, stdout=-1, stderr=writer, text=True, env=environment)
        os.close(writer)
        said = b""
        with contextlib.suppress(OSError):  # a terminal that nobody has written to
            said = os.read(reader, 1000)
        os.close(reader)
        return done.stdout.strip(), said.decode()

    assert run("", tmp_path) == ("16 0", "")
    assert run("", tmp_path) == ("16 1", "")
    impatient = "from nmsolve.backends.cpu._numba import compiled; compiled.PATIENCE_S = 0.0"
    code, said = run(NOWHERE + impatient, terminal=True)
    assert (code, said) == ("16 0", "nmsolve: compiling for this processor (once) ...\r\n")
    assert run(NOWHERE) == ("16 1", "")


def test_what_others_can_write_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = Path(_own_temporary_folder())
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _own_temporary_folder() == str(folder)
    folder.chmod(0o770)
    assert _own_temporary_folder() is None
    folder.rename(tmp_path / "other")
    folder.symlink_to(tmp_path / "other")
    assert _own_temporary_folder() is None
    folder.unlink()
    folder.write_text("")
    assert _own_temporary_folder() is None

    monkeypatch.setattr(_Cache, "__init__", mock.Mock(side_effect=RuntimeError("no locator available")))
    kernel = compiled(_twice)
    assert kernel(3) == 6
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    _Telling._tell(kernel)
    assert "(in every process, there being no folder to keep it in)" in terminal.getvalue()


def test_an_edited_callee_is_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    kernel = compiled(_twice)
    assert kernel(3) == 6
    again = compiled(_twice)
    assert again(3) == 6
    assert sum(again.stats.cache_hits.values()) == 1
    monkeypatch.setattr("nmsolve.backends.cpu._numba.compiled._FINGERPRINT", "of other sources")
    other = compiled(_twice)
    assert other(3) == 6
    assert sum(other.stats.cache_hits.values()) == 0


def test_every_kernel_that_python_calls_is_cached_by_all_sources() -> None:
    kernels = (cpu.solve_exact, cpu.solve_greedy, cpu.solve_tsenor, cpu.solve_ordinary, cpu.solve_groups)
    plans = (
        cpu_permute.forward_single,
        cpu_permute.forward_double,
        cpu_permute.backward_single,
        cpu_permute.backward_double,
    )
    for kernel in (*kernels, cpu_permute.solve_assignments, *plans):
        assert isinstance(kernel._cache, _Cache), kernel


def _twice(x: int) -> int:
    return 2 * x
