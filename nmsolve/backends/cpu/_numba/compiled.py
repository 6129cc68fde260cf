"""How functions are compiled: those that Python calls without the interpreter's lock, and cached on disk.

Numba caches a function for as long as its own source file stays as it is. Ours consist of functions from
several files, which are compiled into them: the cache also goes by what all of these contain, so that an
update never runs machine code of the version before. Where no folder can be written, every process compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

from nmsolve.backends import ascent_schedule

__all__ = ["compiled", "inner"]

# Decorator for a function that only compiled ones call: without what Python would call it by, it compiles
# faster. Takes njit's options.
inner: Any = partial(njit, no_cpython_wrapper=True, no_cfunc_wrapper=True)


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


def compiled(function: Callable[..., Any], *, fastmath: bool | set[str] = False) -> Any:
    """Decorator for a function that Python calls with arrays, addresses and numbers."""
    dispatcher: Any = njit(nogil=True, fastmath=fastmath)(function)
    # Numba has no folder that it could write to (neither beside the package nor the user's).
    with contextlib.suppress(RuntimeError):
        dispatcher._cache = _Cache(function)
    return dispatcher
