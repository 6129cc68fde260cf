"""How the CPU backend's code is kept: by all its sources, where only the user can write, and who is told."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba.core import event
from numba.core.caching import NullCache
from numba.core.errors import TypingError

from nmsolve import NMPattern
from nmsolve.backends.cpu import masks as cpu
from nmsolve.backends.cpu import permutations as cpu_permute
from nmsolve.backends.cpu._numba.compiled import _Around, _Cache, _own_temporary_folder, compiled, inner

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
    _Around._tell(kernel)
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


def test_the_collector_rests_while_a_function_is_compiled() -> None:
    seen = []

    class Looking(event.Listener):
        def on_start(self, event: object) -> None:
            seen.append(gc.isenabled())

        on_end = on_start

    def fails(x: int) -> int:
        return x.nothing

    with event.install_listener("numba:compile", Looking()):
        assert compiled(_twice)(3.5) == 7
        assert seen[0] is False
        assert gc.isenabled()
        with pytest.raises(TypingError):
            compiled(fails)(3)
        assert gc.isenabled()
        gc.disable()
        try:
            assert compiled(_twice)(True) == 2
            assert not gc.isenabled()
        finally:
            gc.enable()


FORKED = """
import gc, os, sys
from numba.core import event
from nmsolve.backends.cpu._numba.compiled import compiled

class Forking(event.Listener):
    def on_start(self, event):
        if os.fork() == 0:
            os._exit(10 + gc.isenabled())
        print(gc.isenabled(), os.waitstatus_to_exitcode(os.wait()[1]))

    def on_end(self, event):
        raise KeyboardInterrupt

try:
    with event.install_listener("numba:compile", Forking()):
        compiled(lambda x: 2 * x)(3)
except KeyboardInterrupt:
    print(gc.isenabled())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_the_collector_works_in_a_fork_and_after_an_interruption(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", FORKED], stdout=-1, text=True, env=environment, check=True)
    assert done.stdout.split() == ["False", "11", "True"]


def test_what_is_inlined_gets_no_machine_code_of_its_own() -> None:
    @inner
    def third(x: float) -> float:
        if x < 0:
            return -third_of_positive(-x)
        return third_of_positive(x)

    @inner
    def third_of_positive(x: float) -> float:
        return np.floor(x) // 3

    def outer(x: float) -> float:
        return third(x) + third_of_positive(9.0)

    kernel = compiled(outer)
    assert kernel(-7.5) == 1
    assert kernel(7.5) == 5
    for function in (third, third_of_positive):
        (made,) = function.overloads.values()
        assert made.library.get_pointer_to_function(made.fndesc.llvm_func_name) == 0
    (made,) = kernel.overloads.values()
    assert made.library.get_pointer_to_function(made.fndesc.llvm_func_name) != 0


def test_a_certificate_is_compiled_where_it_is_wanted() -> None:
    """A mask alone takes less time to compile: a tenth of LLVM's code is the certificate's."""
    sizes = {}
    for want in (False, True):
        kernel = compiled(cpu.solve_exact.py_func)
        kernel._cache = NullCache()
        with mock.patch.object(cpu, "solve_exact", kernel):
            cpu.exact(torch.rand(1, 8, 8), NMPattern(2, 4), want_solution=want)
        (made,) = kernel.overloads.values()
        sizes[want] = len(made.library.get_llvm_str())
    assert sizes[False] < 0.95 * sizes[True]


def _twice(x: int) -> int:
    return 2 * x
