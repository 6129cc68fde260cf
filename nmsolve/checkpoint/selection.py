"""Which tensors of a checkpoint get a mask, and how each is seen as a batch of matrices.

Nothing here reads weights or imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nmsolve.checkpoint.format import Checkpoint, Entry, Shard
from nmsolve.errors import NMSolveError
from nmsolve.pattern import NMPattern

__all__ = ["DENSE_BY_DEFAULT", "DTYPES", "MatrixLayout", "Selected", "Selection", "select_tensors"]

# safetensors' spelling of the dtypes that the solvers take, and torch's.
DTYPES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

DEFAULT_INCLUDE = "*.weight"

# What stays dense unless --include asks for it: embeddings and heads, where a lost weight hurts a token and
# not a channel, norms, and the routers of mixtures of experts.
DENSE_BY_DEFAULT: Mapping[str, tuple[str, ...]] = {
    "embedding": ("*embed*", "*wte.*", "*wpe.*", "shared.weight", "*relative_attention_bias*"),
    "language-model head": ("*lm_head*", "output.weight"),
    "norm": ("*norm*", "*Norm*"),
    "router": ("*router*", "*.gate.weight"),
}

# Model types whose linear layers are stored (in, out), the other way round (transformers' Conv1D).
INPUT_FIRST: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"),
    ("*c_attn.weight", "*q_attn.weight", "*c_proj.weight", "*c_fc.weight"),
)


@dataclass(frozen=True)
class MatrixLayout:
    """A tensor as ``batch`` matrices ``(rows, cols)`` for each of ``positions`` kernel positions.

    In memory its axes are ``(batch, rows, cols, positions)``. ``kind`` is "linear" (2-D), "stack" (3-D, one
    matrix for each expert) or "convolution" (out, in, kernel positions). ``input_dim`` is the axis of the
    matrices along which the weights of one output lie: 1, or 0 where they are stored (in, out).
    """

    kind: str
    batch: int
    rows: int
    cols: int
    positions: int
    input_dim: int

    @classmethod
    def of(cls, shape: Sequence[int], input_first: bool = False) -> MatrixLayout:
        """The layout of a tensor of two or more dimensions.

        A 3-D weight is a 1-D convolution ``(out, in, kernel)`` if its last dimension is smaller than its
        first, as kernels are, and a stack ``(experts, rows, cols)`` if not.
        """
        input_dim = 0 if input_first else 1
        if len(shape) == 2:
            return cls("linear", 1, shape[0], shape[1], 1, input_dim)
        if len(shape) == 3 and shape[2] >= shape[0]:
            return cls("stack", shape[0], shape[1], shape[2], 1, input_dim)
        return cls("convolution", 1, shape[0], shape[1], math.prod(shape[2:]), input_dim)


@dataclass(frozen=True)
class Selected:
    """A tensor to be masked."""

    shard: Shard
    entry: Entry
    layout: MatrixLayout


@dataclass(frozen=True)
class Selection:
    """What to mask, and the rest with the reason why not, both in the order of the files."""

    masked: tuple[Selected, ...]
    skipped: tuple[tuple[Shard, Entry, str], ...]


def select_tensors(
    checkpoint: Checkpoint,
    pattern: NMPattern,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_first: Sequence[str] = (),
) -> Selection:
    """Decides for every tensor whether it is masked.

    By default the weights (``*.weight``) of linear and convolution layers are, without what
    ``DENSE_BY_DEFAULT`` names and without matrices smaller than one block. ``include`` replaces that choice:
    whatever its globs match is masked if it has two dimensions and a dtype that can be. ``exclude`` takes
    away from either.

    Raises
    ------
    NMSolveError
        If a glob matches no tensor, or no tensor is left to mask.
    """
    names = [entry.name for _, entry in checkpoint.entries()]
    for option, globs in (("include", include), ("exclude", exclude), ("input_first", input_first)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise NMSolveError(
                    f"{option}: {glob!r} matches none of the {len(names)} tensors in {checkpoint.root}"
                )
    stored_input_first = (*input_first, *INPUT_FIRST.get(_model_type(checkpoint), ()))
    masked: list[Selected] = []
    skipped: list[tuple[Shard, Entry, str]] = []
    for shard, entry in checkpoint.entries():
        reason = _why_not(entry, pattern, include, exclude)
        if reason is None:
            layout = MatrixLayout.of(entry.shape, _match(entry.name, stored_input_first) is not None)
            masked.append(Selected(shard, entry, layout))
        else:
            skipped.append((shard, entry, reason))
    if not masked:
        reasons = sorted({reason for _, _, reason in skipped})
        raise NMSolveError(
            f"{checkpoint.root}: nothing to mask: each of its {len(names)} tensors is left out"
            + (f" ({'; '.join(reasons[:4])})" if reasons else "")
        )
    return Selection(tuple(masked), tuple(skipped))


def _why_not(entry: Entry, pattern: NMPattern, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a tensor stays dense, or None if it is to be masked."""
    excluded = _match(entry.name, exclude)
    if excluded is not None:
        return f"excluded by {excluded!r}"
    if include and _match(entry.name, include) is None:
        return "not included"
    if entry.dtype not in DTYPES:
        return f"dtype {entry.dtype} is not one of {', '.join(DTYPES)}"
    if len(entry.shape) < 2:
        return f"{len(entry.shape)}-D, not a matrix"
    if entry.size == 0:
        return "empty"
    if include:
        return None
    if _match(entry.name, [DEFAULT_INCLUDE]) is None:
        return f"name does not match {DEFAULT_INCLUDE!r}"
    for what, globs in DENSE_BY_DEFAULT.items():
        glob = _match(entry.name, globs)
        if glob is not None:
            return f"{what} (name matches {glob!r})"
    layout = MatrixLayout.of(entry.shape)
    if min(layout.rows, layout.cols) < pattern.m:
        return f"{layout.rows} x {layout.cols} matrices are smaller than one block of {pattern.m}"
    return None


def _match(name: str, globs: Sequence[str]) -> str | None:
    """The first glob that matches ``name``."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)


def _model_type(checkpoint: Checkpoint) -> str:
    """``model_type`` of the folder's config.json, or an empty string."""
    try:
        config = json.loads((checkpoint.root / "config.json").read_bytes())
        return str(config.get("model_type", ""))
    except (OSError, ValueError, AttributeError):
        return ""
