"""The JSON report of ``nmsolve mask``: what was masked, how well, and what was left dense and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nmsolve.about import __version__, versions
from nmsolve.files import write_text
from nmsolve.solution import relative_gap, retained_share

__all__ = ["Figures", "MaskedTensor", "Report", "SkippedTensor", "finite"]


class Figures(NamedTuple):
    """What a part of a tensor adds to its :class:`MaskedTensor`; ``bound`` is None if nothing is proven."""

    kept: int
    zeros_before: int
    nonzero: int
    score: float
    objective: float
    bound: float | None
    max_gap: float


@dataclass
class MaskedTensor:
    """One masked tensor. Scores are the weights' magnitudes, summed in float64.

    ``bound`` is a proven upper bound on the kept score of any mask of the pattern, ``gap`` is
    ``(bound - objective) / objective`` (0 proves optimality), and ``max_gap`` is the largest gap of a block;
    all three are None if no certificate was asked for. ``retained`` is ``objective / score``. ``kept`` counts
    the entries of the mask, ``zeros_before`` the weights that were zero before it, and ``nonzero`` those that
    are not zero behind it.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    pattern: str
    method: str
    backend: str
    weights: int
    kept: int = 0
    zeros_before: int = 0
    nonzero: int = 0
    score: float = 0.0
    objective: float = 0.0
    bound: float | None = None
    gap: float | None = None
    max_gap: float | None = None
    retained: float = 1.0
    seconds: float = 0.0

    def add(self, figures: Figures) -> None:
        """Adds what some of the weights have."""
        self.kept += figures.kept
        self.zeros_before += figures.zeros_before
        self.nonzero += figures.nonzero
        self.score += figures.score
        self.objective += figures.objective
        if figures.bound is not None:
            self.bound = (self.bound or 0.0) + figures.bound
            self.max_gap = max(self.max_gap or 0.0, figures.max_gap)

    def finish(self, seconds: float) -> None:
        """Derives the ratios once the sums are complete."""
        if self.bound is not None:
            self.gap = relative_gap(self.bound - self.objective, self.objective)
        self.retained = retained_share(self.objective, self.score)
        self.seconds = seconds


@dataclass
class SkippedTensor:
    """One tensor that was copied as it is, and why."""

    name: str
    file: str
    shape: tuple[int, ...]
    dtype: str
    reason: str


@dataclass
class Report:
    """Everything that ``nmsolve mask`` has to say about one run."""

    input: str
    output: str | None
    settings: Mapping[str, object]
    tensors: list[MaskedTensor] = field(default_factory=list)
    skipped: list[SkippedTensor] = field(default_factory=list)
    files_left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def totals(self) -> dict[str, Any]:
        """Sums over the masked tensors, and the ratios of the sums."""
        score, objective = (
            sum(getattr(tensor, name) for tensor in self.tensors) for name in ("score", "objective")
        )
        bounds = [tensor.bound for tensor in self.tensors if tensor.bound is not None]
        gaps = [tensor.max_gap for tensor in self.tensors if tensor.max_gap is not None]
        proven = len(bounds) == len(self.tensors)
        return {
            "tensors_masked": len(self.tensors),
            "tensors_skipped": len(self.skipped),
            "weights": sum(tensor.weights for tensor in self.tensors),
            "kept": sum(tensor.kept for tensor in self.tensors),
            "zeros_before": sum(tensor.zeros_before for tensor in self.tensors),
            "nonzero": sum(tensor.nonzero for tensor in self.tensors),
            "score": score,
            "objective": objective,
            "bound": sum(bounds) if proven else None,
            "gap": relative_gap(sum(bounds) - objective, objective) if proven else None,
            "max_gap": max(gaps, default=0.0) if proven else None,
            "retained": retained_share(objective, score),
            "seconds_solving": sum(tensor.seconds for tensor in self.tensors),
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data; a sum that overflowed becomes null."""
        data = {
            "nmsolve": __version__,
            "versions": versions(),
            "input": self.input,
            "output": self.output,
            "settings": dict(self.settings),
            "totals": self.totals(),
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "skipped": [asdict(tensor) for tensor in self.skipped],
            "files_left_out": self.files_left_out,
        }
        return finite(data)

    def write(self, path: Path) -> None:
        """Writes the JSON file, whole or not at all."""
        write_text(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """JSON data with null for numbers that JSON has not: sums that overflowed, and what follows from them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
