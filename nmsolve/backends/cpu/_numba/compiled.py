"""How functions are compiled: those that Python calls without the interpreter's lock, and cached on disk.

Numba caches a function for as long as its own source file stays as it is. Ours consist of functions from
several files, which are compiled into them: the cache also goes by what all of these contain, so that an
update never runs machine code of the version before. Where Numba can write neither beside the package nor in
the user's cache, as in containers, the code is kept in a folder for temporary files that nobody else can
write; where there is none, every process compiles.
"""

from __future__ import annotations

import gc
import hashlib
import os
import stat
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config, event
from numba.core.caching import FunctionCache

from nmsolve.backends import ascent_schedule
from nmsolve.backends.cpu._numba.inlining import InliningCompiler

__all__ = ["compiled", "inner"]

# Decorator for a function that only compiled ones call: without what Python would call it by, it compiles
# faster. Takes njit's options.
inner: Any = partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True, pipeline_class=InliningCompiler)

PATIENCE_S = 2.0
"""From when on somebody who waits at a terminal is told why."""


def _fingerprint() -> str:
    """A digest of the sources that may have been compiled in."""
    digest = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.glob("*.py")), Path(ascent_schedule.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


_FINGERPRINT = _fingerprint()


class _Cache(FunctionCache):
    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _FINGERPRINT)


def _own_temporary_folder() -> str | None:
    """A folder that only this user can write: what is read from a cache is executed."""
    if not hasattr(os, "getuid"):
        return None
    try:
        folder = Path(tempfile.gettempdir(), f"nmsolve-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return str(folder) if own else None


def _cache_of(function: Callable[..., Any]) -> _Cache | None:
    given = config.CACHE_DIR
    try:
        return _Cache(function)
    except RuntimeError:  # Numba has no folder that it could write to
        folder = _own_temporary_folder()
    if folder is None:
        return None
    config.CACHE_DIR = folder
    try:
        return _Cache(function)
    except RuntimeError:
        return None
    finally:
        config.CACHE_DIR = given


class _Around(event.Listener):
    """What is done while one of our functions is compiled.

    The collector of garbage rests: it would look through all objects of the process, over and over. Somebody
    at a terminal is told what takes so long.
    """

    def __init__(self) -> None:
        self.ours: weakref.WeakSet[Any] = weakref.WeakSet()
        self._timers: dict[Any, threading.Timer] = {}
        self._resting_for: Any = None

    def on_start(self, event: Any) -> None:
        dispatcher = event.data["dispatcher"]
        if dispatcher not in self.ours:
            return
        if gc.isenabled():
            gc.disable()
            self._resting_for = dispatcher
        timer = threading.Timer(PATIENCE_S, self._tell, [dispatcher])
        timer.daemon = True
        self._timers[dispatcher] = timer
        timer.start()

    def on_end(self, event: Any) -> None:
        dispatcher = event.data["dispatcher"]
        if self._resting_for is dispatcher:
            self._resting_for = None
            gc.enable()
        timer = self._timers.pop(dispatcher, None)
        if timer is not None:
            timer.cancel()

    def after_fork(self) -> None:
        """Of a process that another thread forked meanwhile: nobody ends there what has begun."""
        if self._resting_for is not None:
            self._resting_for = None
            gc.enable()

    @staticmethod
    def _tell(dispatcher: Any) -> None:
        if sys.stderr is None or not sys.stderr.isatty():
            return
        from tqdm import tqdm

        kept = isinstance(dispatcher._cache, _Cache)
        how_often = "once" if kept else "in every process, there being no folder to keep it in"
        tqdm.write(f"nmsolve: compiling for this processor ({how_often}) ...", file=sys.stderr)


_AROUND = _Around()
event.register("numba:compile", _AROUND)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_AROUND.after_fork)


def compiled(function: Callable[..., Any], *, fastmath: bool | set[str] = False) -> Any:
    """Decorator for a function that Python calls with arrays, addresses and numbers."""
    dispatcher: Any = njit(nogil=True, fastmath=fastmath)(function)
    cache = _cache_of(function)
    if cache is not None:
        dispatcher._cache = cache
    _AROUND.ours.add(dispatcher)
    return dispatcher
