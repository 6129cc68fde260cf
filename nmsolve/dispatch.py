"""Which backend runs a tensor, and why another cannot.

A backend is a module with the four functions ``exact``, ``greedy``, ``tsenor`` and ``ordinary`` on
``(batch, rows, cols)`` scores, and ``why_not(device)``. It is imported when it is first needed, so that
``import nmsolve`` needs neither triton nor numba. One that can solve many matrices at once also has
``exact_group`` (:class:`GroupBackend`).
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from nmsolve.errors import BackendError, NMSolveError
from nmsolve.pattern import NMPattern
from nmsolve.solution import BlockResult

__all__ = [
    "BACKENDS",
    "Backend",
    "GroupBackend",
    "backend_name",
    "backend_reasons",
    "check_backend",
    "select",
]

BACKENDS = ("triton", "cpu", "torch")

_MODULES = {"triton": "nmsolve.gpu", "cpu": "nmsolve.cpu", "torch": "nmsolve.reference"}
_NEEDS = {
    "triton": ("triton", "pip install triton (Linux only)"),
    "cpu": ("numba", "pip install 'nmsolve[cpu]'"),
}

# The largest block that the Triton kernels hold in registers.
TRITON_MAX_M = 64


class Backend(Protocol):
    """What a backend module offers; scores are ``(batch, rows, cols)``, finite, with any strides."""

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run tensors on ``device``, or None."""

    def exact(
        self, scores: Tensor, pattern: NMPattern, *, warm: tuple[Tensor, Tensor] | None, want_solution: bool
    ) -> BlockResult:
        """Optimal transposable masks."""

    def greedy(self, scores: Tensor, pattern: NMPattern) -> Tensor:
        """Transposable masks by descending score."""

    def tsenor(self, scores: Tensor, pattern: NMPattern, *, iterations: int, tau: float) -> Tensor:
        """Transposable masks by entropic transport."""

    def ordinary(self, scores: Tensor, pattern: NMPattern) -> Tensor:
        """N:M masks along the last dimension."""


@runtime_checkable
class GroupBackend(Backend, Protocol):
    """A backend that solves matrices of different sizes at once."""

    def exact_group(
        self, scores: list[Tensor], pattern: NMPattern, *, warm: None, want_solution: bool
    ) -> list[BlockResult]:
        """What ``exact`` returns for each of the tensors, in their order.

        They are ``(batch, rows, cols)``, finite and not empty, of any sizes and strides, but of one dtype
        and on one device. The masks and duals are those of ``exact`` bit for bit.
        """


def _reason(name: str, device: torch.device) -> str | None:
    if name in _NEEDS:
        package, remedy = _NEEDS[name]
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: {remedy}"
    return _load(name).why_not(device)


def _load(name: str) -> Backend:
    return cast(Backend, importlib.import_module(_MODULES[name]))


def backend_reasons(device: torch.device | str) -> dict[str, str | None]:
    """For each backend, None if it can run tensors on ``device``, else why not.

    Examples
    --------
    >>> backend_reasons("cpu")["torch"] is None
    True
    """
    return {name: _reason(name, torch.device(device)) for name in BACKENDS}


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` is a name that :func:`select` knows."""
    if backend != "auto" and backend not in BACKENDS:
        raise NMSolveError(f"backend: expected 'auto' or one of {', '.join(BACKENDS)}, got {backend!r}")


def backend_name(backend: str, device: torch.device | str, m: int) -> str:
    """The name of the backend that runs blocks of size ``m`` on ``device``.

    ``"auto"`` takes triton on a GPU (blocks up to 64; larger ones take torch), the Numba backend on a CPU
    where numba is installed, and torch otherwise. A backend asked for by name runs or raises.

    Raises
    ------
    NMSolveError
        If the name is unknown.
    BackendError
        If a backend asked for by name cannot run, with the reason.

    Examples
    --------
    >>> backend_name("torch", "cpu", 16)
    'torch'
    """
    check_backend(backend)
    device = torch.device(device)
    if backend == "auto":
        first = "cpu" if device.type == "cpu" else "triton"
        fits = first == "cpu" or m <= TRITON_MAX_M
        return first if fits and _reason(first, device) is None else "torch"
    reason = _reason(backend, device)
    if reason is None and backend == "triton" and m > TRITON_MAX_M:
        reason = f"blocks of m={m} do not fit its registers (at most {TRITON_MAX_M}); use backend='torch'"
    if reason is not None:
        raise BackendError(f"backend: {backend!r} cannot run on {device}: {reason}")
    return backend


def select(backend: str, device: torch.device, m: int) -> Backend:
    """The backend that :func:`backend_name` names, imported; raises as it does."""
    return _load(backend_name(backend, device, m))
