"""The report of a pruning run: JSON for programs, a picture for people."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nmsolve.about import __version__, versions
from nmsolve.checkpoint.report import finite
from nmsolve.errors import NMSolveError, NMSolveWarning, counted
from nmsolve.files import replacing, write_text
from nmsolve.solution import relative_gap, retained_share

__all__ = ["LayerReport", "PruneReport", "layer_kinds", "need_matplotlib", "tell_starved"]

FEW_TOKENS = 64
"""Experts that saw fewer are told of."""


@dataclass
class LayerReport:
    """One pruned layer.

    ``relative_error`` is ``||(W - W') X||^2 / ||W X||^2`` over the calibration inputs X of the layer (None
    without calibration), or over ``error_tokens`` of them drawn at random where the method needs no Hessian.
    ``tokens`` is how many inputs it saw, those of all experts together; ``expert_tokens`` has those of each
    expert (None for other layers). ``retained`` is the kept share of the scores the masks were solved for
    (SparseGPT: summed over its slabs; ALPS: of its last iteration; Frank-Wolfe: of the relaxed mask that was
    rounded).
    ``gap`` is how much more (relative) any other mask of the pattern could have kept at most, ``max_gap``
    that of the worst block. ``seconds`` is the time for scores, masks and weights, ``mask_seconds`` the part
    of it spent in ``mask_solves`` calls of the solver.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pattern: str
    weights: int
    kept: int
    tokens: int
    relative_error: float | None
    retained: float
    score: float
    objective: float
    bound: float
    gap: float
    max_gap: float
    seconds: float
    mask_seconds: float
    mask_solves: int
    error_tokens: int = 0
    expert_tokens: list[int] | None = None


@dataclass
class PruneReport:
    """A pruning run.

    ``memory`` is in bytes: ``model`` (its parameters), ``activations`` (the inputs of one block, for all
    batches), ``statistics`` (the largest Hessians held at a time) and ``peak``, the process's peak of
    resident memory, plus ``peak_gpu`` where there is a GPU. ``parameters`` counts those of the whole model,
    ``zeros`` the zeros that were in the pruned weights before, ``skipped`` says what stays dense and why,
    ``resumed`` counts the layers that an earlier run had finished. ``settings`` has the options that were
    used, ``files`` what was read and written.
    """

    settings: Mapping[str, object]
    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    files: Mapping[str, object] = field(default_factory=dict)
    parameters: int = 0
    zeros: int = 0
    resumed: int = 0
    seconds: float = 0.0

    def totals(self) -> dict[str, Any]:
        """Sums over the layers, and ratios of the sums."""
        score, objective, bound = (
            math.fsum(getattr(layer, name) for layer in self.layers)
            for name in ("score", "objective", "bound")
        )
        errors = [layer.relative_error for layer in self.layers if layer.relative_error is not None]
        return {
            "layers": len(self.layers),
            "parameters": self.parameters,
            "weights": sum(layer.weights for layer in self.layers),
            "kept": sum(layer.kept for layer in self.layers),
            "zeros_before": self.zeros,
            "mean_relative_error": math.fsum(errors) / len(errors) if errors else None,
            "mean_retained": math.fsum(layer.retained for layer in self.layers) / max(1, len(self.layers)),
            "retained": retained_share(objective, score),
            "gap": relative_gap(bound - objective, objective),
            "max_gap": max((layer.max_gap for layer in self.layers), default=0.0),
            "layer_seconds": math.fsum(layer.seconds for layer in self.layers),
            "mask_seconds": math.fsum(layer.mask_seconds for layer in self.layers),
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """The report as JSON data; a sum that overflowed becomes null."""
        data = {
            "nmsolve": __version__,
            "versions": versions("transformers"),
            "files": dict(self.files),
            "settings": dict(self.settings),
            "totals": self.totals(),
            "memory": self.memory,
            "resumed": self.resumed,
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": self.skipped,
        }
        return finite(data)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draws error and retained score layer by layer, one line for each kind of layer.

        Raises
        ------
        NMSolveError
            If matplotlib is not installed.
        """
        need_matplotlib()
        from matplotlib.figure import Figure

        panels = [("retained score", "retained", False)]
        if any(layer.relative_error is not None for layer in self.layers):
            panels.insert(0, ("relative reconstruction error", "relative_error", True))
        figure = Figure(figsize=(10, 3.6 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        kinds = layer_kinds([layer.name for layer in self.layers])
        for axis, (title, field_name, logarithmic) in zip(axes, panels, strict=True):
            for number, kind in enumerate(dict.fromkeys(kinds)):
                points = [
                    (place, getattr(layer, field_name))
                    for place, layer in enumerate(self.layers)
                    if kinds[place] == kind
                ]
                xs, ys = zip(*points, strict=True)
                style = (".-", ".--", ".:", ".-.")[number // 10 % 4]  # there are ten colours
                axis.plot(xs, ys, style, label=kind, linewidth=0.8)
            if logarithmic and all(layer.relative_error for layer in self.layers):
                axis.set_yscale("log")
            axis.set_ylabel(title)
            axis.grid(alpha=0.3)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize="small", frameon=False)
        axes[0].set_title(self.title(), loc="left")
        axes[-1].set_xlabel("layer, in the order of the model")
        with replacing(Path(path)) as partial:
            figure.savefig(partial, dpi=120, format="png")

    def title(self) -> str:
        """Method, pattern and kind of mask in a line."""
        settings = self.settings
        pattern = settings.get("pattern")
        if isinstance(pattern, Mapping):
            pattern = ", ".join(f"{glob}={value or 'dense'}" for glob, value in pattern.items())
        kind = f"transposable by {settings['mask_method']}" if settings.get("transposable") else "ordinary"
        return f"{settings.get('method')}, {pattern} {kind}"


def tell_starved(report: PruneReport) -> None:
    """Warns of experts that saw too few tokens to be calibrated on."""
    rows = [row for row in report.layers if row.expert_tokens is not None]
    total = counted(sum(len(row.expert_tokens or ()) for row in rows), "layer")
    for low, high, what in (
        (0, 1, "no token and were pruned by their weights alone"),
        (1, FEW_TOKENS, f"fewer than {FEW_TOKENS} tokens"),
    ):
        found = [row.name for row in rows for tokens in row.expert_tokens or () if low <= tokens < high]
        if found:
            names = found[0] + (", ..." if len(set(found)) > 1 else "")
            warnings.warn(
                f"{len(found):,} of {total} of experts saw {what}: {names}; give more text, or send every "
                "token to every expert (all_experts=True, --all-experts)",
                NMSolveWarning,
                stacklevel=4,
            )


def layer_kinds(names: Sequence[str]) -> list[str]:
    """The kind of each layer: its name without numbers, cut to the end that no other kind has.

    Examples
    --------
    >>> layer_kinds(["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_fc"])
    ['attn.c_proj', 'mlp.c_proj', 'attn.c_proj', 'c_fc']
    """
    paths = []
    for name in names:
        *above, last = name.split(".")
        above = [part.rstrip("0123456789") for part in above]
        paths.append(tuple(part for part in (*above, "" if last.isdigit() else last) if part))
    short = {}
    for path in dict.fromkeys(paths):
        others = [other for other in dict.fromkeys(paths) if other != path]
        size = 1
        while size < len(path) and any(other[-size:] == path[-size:] for other in others):
            size += 1
        short[path] = ".".join(path[-size:]) or "layer"
    return [short[path] for path in paths]


def need_matplotlib() -> None:
    """Raises NMSolveError if pictures cannot be drawn."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise NMSolveError("picture: matplotlib is not installed: pip install matplotlib")
