"""Which backends there are, what each can be asked for, and which one runs a tensor.

:data:`BACKENDS` is the one table: whatever else needs the name of a backend, its limits or the package it
needs reads them here. A backend is a folder with three modules: masks (:class:`MaskSolver`), soft and hard
permutations (:class:`PermutationSolver`) and hierarchical masks (:class:`StripSolver`), imported when they
are first needed, so that ``import nmsolve`` needs neither triton nor numba. Nothing here imports torch before
there is a device to ask about: the command line takes its choices from these tables, too.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from nmsolve.errors import BackendError, NMSolveError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nmsolve.pattern import NMPattern
    from nmsolve.solution import BlockResult

__all__ = [
    "AUTO",
    "BACKENDS",
    "MASK_METHODS",
    "REFERENCE",
    "SCORE_DTYPES",
    "Backend",
    "GroupMaskSolver",
    "MaskSolver",
    "PermutationSolver",
    "StripSolver",
    "backend_reasons",
    "check_backend",
    "check_mask_method",
    "select",
]

AUTO = "auto"

MASK_METHODS: Mapping[str, tuple[str, ...]] = {
    "exact": (),
    "tsenor": ("iterations", "tau"),
    "greedy": (),
}
"""How a transposable mask can be solved, and the options that the method takes. Each is a function of that
name in every backend's module for masks."""

SCORE_DTYPES = ("float64", "float32", "float16", "bfloat16")
"""torch's names of the dtypes of scores that every backend takes."""


class MaskSolver(Protocol):
    """What a backend's module for masks offers; scores are ``(batch, rows, cols)``, finite, any strides."""

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
class GroupMaskSolver(MaskSolver, Protocol):
    """One that solves matrices of different sizes at once."""

    def exact_group(
        self, scores: list[Tensor], pattern: NMPattern, *, warm: None, want_solution: bool
    ) -> list[BlockResult]:
        """What ``exact`` returns for each of the tensors, in their order.

        They are ``(batch, rows, cols)``, finite and not empty, of any sizes and strides, but of one dtype
        and on one device. The masks and duals are those of ``exact`` bit for bit.
        """


class PermutationSolver(Protocol):
    """What a backend's module for permutations offers."""

    def assignment(self, scores: Tensor, want_solution: bool) -> tuple[Tensor, ...]:
        """Columns ``(B, M)`` of the rows; if wanted also duals of both sides, objective, bound and scale."""

    def sinkhorn_forward(
        self,
        logits: Tensor,
        row_marginals: Tensor | None,
        col_marginals: Tensor | None,
        temperature: float,
        iterations: int,
        tolerance: float,
        keep: bool,
    ) -> tuple[Tensor, ...]:
        """Plan, row and column scalings of every iteration, iterations made.

        Marginals are None only where ``sinkhorn_uniform`` says so. All but the plan are for the gradient:
        unless ``keep`` they are empty, or left out. The last is ``(B, 1 + T)`` int32 for T kept iterations:
        how many a block made, and what else the backend's gradient needs to know of each. Scalings are in
        whatever form that takes them.
        """

    def sinkhorn_backward(
        self,
        gradient: Tensor,
        logits: Tensor,
        row_marginals: Tensor | None,
        col_marginals: Tensor | None,
        row_scalings: Tensor,
        col_scalings: Tensor,
        made: Tensor,
        temperature: float,
    ) -> Tensor:
        """Gradient with respect to the logits, in their dtype."""

    def permute_columns(self, x: Tensor, permutation: Tensor) -> Tensor:
        """``x[:, permutation]`` of ``(rows, cols)``, contiguous."""

    def rms_norm_permute(self, x: Tensor, weight: Tensor, permutation: Tensor, eps: float) -> Tensor:
        """``(x / rms(x) * weight)[:, permutation]`` of ``(rows, cols)``, contiguous."""

    def nth_largest(self, columns: Tensor, groups: Tensor, n: int) -> Tensor:
        """The n-th largest of several columns, row by row; see :mod:`nmsolve.backends.shared`."""

    def nth_largest_of(
        self, columns: Tensor, values: Tensor, groups: Tensor, n: int
    ) -> tuple[Tensor, Tensor]:
        """The same, and the value of that entry; see :mod:`nmsolve.backends.shared`."""

    def sum_gains(
        self, thresholds: Tensor, held: Tensor, columns: Tensor, values: Tensor, index: Tensor
    ) -> Tensor:
        """Sums over rows of what columns gain above thresholds; see :mod:`nmsolve.backends.shared`."""

    def sum_maxima(self, thresholds: Tensor, columns: Tensor, index: Tensor) -> Tensor:
        """Sums over rows of maxima of thresholds and columns; see :mod:`nmsolve.backends.shared`."""

    def sum_largest(self, columns: Tensor, members: Tensor, subsets: Tensor, n: int) -> Tensor:
        """What groups of a few columns keep; see :mod:`nmsolve.backends.shared`."""

    def exchange_values(
        self, lines: Tensor, kept: Tensor, groups: Tensor, slot: int, subsets: Tensor, steps: Tensor
    ) -> Tensor:
        """What blocks keep for every choice of a slot's rows; see :mod:`nmsolve.backends.shared`."""

    def sum_best(self, values: Tensor, lines: Tensor, index: Tensor, subsets: Tensor) -> Tensor:
        """Sums over blocks of the best choice for every column; see :mod:`nmsolve.backends.shared`."""


class StripSolver(Protocol):
    """What a backend's module for hierarchical masks offers."""

    def best_columns(self, columns: Tensor, n: int, k: int, limit: int) -> tuple[Tensor, Tensor]:
        """The k columns of float64 ``(B, M, V)`` blocks that keep the most, and a bound on the best.

        See :func:`nmsolve.backends.torch.strips.best_columns`.
        """


@dataclass(frozen=True)
class Backend:
    """A row of the table.

    Attributes
    ----------
    name : str
        What users write.
    folder : str
        The package that has the modules ``masks``, ``permutations`` and ``strips``.
    preferred_on : tuple of str
        Types of devices on which "auto" takes it, if it can run there.
    needs : str, optional
        The package that has to be installed beside torch, and
    remedy : str
        the command that installs it.
    max_m : int, optional
        The largest block, and the largest matrix of an assignment; None if there is no limit.
    max_sinkhorn : int, optional
        The largest number of rows or columns of a plan.
    masks_float64, sinkhorn_float64 : bool
        Whether float64 scores, and float64 logits, are worked on in float64.
    sinkhorn_uniform : bool
        Whether its plans take None for both marginals, as 1 for rows and R / C for columns.
    max_strip, max_kept_columns : int, optional
        The largest block of a hierarchical mask, as rows times columns (or four times the kept columns, if
        that is more) of the next powers of two, and how many columns of it may be kept.
    assignment_finds_infinite : bool
        Whether its assignment puts -1 in front where a matrix is not finite, so that nobody else has to look.
    solves_several : bool
        Whether slabs of a checkpoint are done sooner if several threads of Python solve at the same time.
    slab : int
        Elements of a checkpoint to be read and solved together: enough to keep it busy within its memory.
    """

    name: str
    folder: str
    preferred_on: tuple[str, ...] = ()
    needs: str | None = None
    remedy: str = ""
    max_m: int | None = None
    max_sinkhorn: int | None = None
    masks_float64: bool = True
    sinkhorn_float64: bool = True
    sinkhorn_uniform: bool = False
    max_strip: int | None = None
    max_kept_columns: int | None = None
    assignment_finds_infinite: bool = False
    solves_several: bool = False
    slab: int = 1 << 22

    @property
    def masks(self) -> MaskSolver:
        """Its module for masks, imported."""
        return cast(MaskSolver, importlib.import_module(f"{self.folder}.masks"))

    @cached_property
    def permutations(self) -> PermutationSolver:
        """Its module for permutations, imported."""
        return cast(PermutationSolver, importlib.import_module(f"{self.folder}.permutations"))

    @property
    def strips(self) -> StripSolver:
        """Its module for hierarchical masks, imported."""
        return cast(StripSolver, importlib.import_module(f"{self.folder}.strips"))

    def is_installed(self) -> bool:
        """Whether what it needs is there."""
        return self.needs is None or importlib.util.find_spec(self.needs) is not None

    def why_not(self, device: torch.device) -> str | None:
        """Why it cannot run tensors on ``device``, or None if it can."""
        if not self.is_installed():
            return f"{self.needs} is not installed: {self.remedy}"
        return self._import_error or self.masks.why_not(device)

    @cached_property
    def _import_error(self) -> str | None:
        """Why what it needs is there and cannot be imported, as where NumPy is too new for it."""
        try:
            if self.needs is not None:
                importlib.import_module(self.needs)
        except ImportError as error:
            return f"{self.needs} cannot be imported: {error}"
        return None

    def holds(self, m: int) -> bool:
        """Whether blocks of size ``m`` are small enough for it."""
        return self.max_m is None or m <= self.max_m

    def holds_strip(self, rows: int, cols: int, kept: int) -> bool:
        """Whether blocks of a hierarchical mask are small enough for it."""
        height, width, listed = (1 << (size - 1).bit_length() for size in (rows, cols, kept))
        lanes = height * max(width, 4 * listed)
        small = self.max_strip is None or lanes <= self.max_strip
        return self.holds(cols) and small and (self.max_kept_columns is None or kept <= self.max_kept_columns)


REFERENCE = Backend("torch", "nmsolve.backends.torch", slab=1 << 20)  # works in many times what it solves
"""The one that runs everywhere, whatever the sizes and dtypes."""

_ROWS = (
    Backend(
        "triton",
        "nmsolve.backends.triton",
        preferred_on=("cuda",),
        needs="triton",
        remedy="pip install triton (Linux only)",
        max_m=64,  # what the kernels hold in registers
        max_sinkhorn=128,
        masks_float64=False,
        sinkhorn_float64=False,
        max_strip=1 << 14,
        max_kept_columns=8,
    ),
    Backend(
        "cpu",
        "nmsolve.backends.cpu",
        preferred_on=("cpu",),
        needs="numba",
        remedy="pip install numba",
        sinkhorn_uniform=True,
        assignment_finds_infinite=True,
        solves_several=True,
    ),
    REFERENCE,
)

BACKENDS: Mapping[str, Backend] = {row.name: row for row in _ROWS}
"""Every backend by its name. "auto" takes the first that is preferred on a device and can run there, and the
reference where there is none."""


def backend_reasons(device: torch.device | str) -> dict[str, str | None]:
    """For each backend, None if it can run tensors on ``device``, else why not.

    Examples
    --------
    >>> backend_reasons("cpu")["torch"] is None
    True
    """
    import torch

    return {name: row.why_not(torch.device(device)) for name, row in BACKENDS.items()}


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` is a name that :func:`select` knows."""
    if backend != AUTO and backend not in BACKENDS:
        raise NMSolveError(f"backend: expected '{AUTO}' or one of {', '.join(BACKENDS)}, got {backend!r}")


def check_mask_method(method: str, name: str = "method") -> None:
    """Raise unless ``method`` is a way to solve transposable masks; ``name`` is the argument's."""
    if method not in MASK_METHODS:
        raise NMSolveError(f"{name}: expected one of {', '.join(MASK_METHODS)}, got {method!r}")


def select(backend: str, device: torch.device | str, m: int = 1) -> Backend:
    """The backend that runs blocks of size ``m`` on ``device``.

    ``"auto"`` takes triton on a GPU (blocks up to 64; larger ones take torch), the Numba backend on a CPU
    where numba can be imported and compiles, and torch otherwise. A backend asked for by name runs or raises.

    Raises
    ------
    NMSolveError
        If the name is unknown.
    BackendError
        If a backend asked for by name cannot run, with the reason.

    Examples
    --------
    >>> select("torch", "cpu", 16).name
    'torch'
    """
    import torch

    check_backend(backend)
    device = torch.device(device)
    if backend == AUTO:
        for row in BACKENDS.values():
            if device.type in row.preferred_on and row.holds(m) and row.why_not(device) is None:
                return row
        return REFERENCE
    row = BACKENDS[backend]
    reason = row.why_not(device)
    if reason is None and not row.holds(m):
        reason = f"blocks of m={m} do not fit its registers (at most {row.max_m}); use backend='torch'"
    if reason is not None:
        raise BackendError(f"backend: {backend!r} cannot run on {device}: {reason}")
    return row
