"""Which tensors of a checkpoint get a mask, and how each is seen as a batch of matrices.

Nothing here reads weights. torch is imported where config.json names an architecture that can be asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from nmsolve.checkpoint.architecture import architecture_of
from nmsolve.checkpoint.format import Checkpoint, Entry, Shard
from nmsolve.checkpoint.roles import Role, dense_by_name, stack_axis
from nmsolve.errors import NMSolveError, counted
from nmsolve.pattern import NMPattern

__all__ = ["DTYPES", "MatrixLayout", "Selected", "Selection", "select_tensors"]

# safetensors' spelling of the dtypes that the solvers take, and torch's.
DTYPES: Mapping[str, str] = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}

DEFAULT_INCLUDE = "*.weight"

# Model types whose linear layers are stored (in, out), the other way round (transformers' Conv1D), and what
# they are called. A checkpoint that no model explains is known by its first projection, too: (H, 3 H).
_INPUT_FIRST_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_INPUT_FIRST = ("*.c_attn.weight", "*.q_attn.weight", "*.c_proj.weight", "*.c_fc.weight")


@dataclass(frozen=True)
class MatrixLayout:
    """A tensor as ``batch`` matrices ``(rows, cols)`` for each of ``positions`` kernel positions.

    In memory its axes are ``(batch, rows, cols, positions)``. ``kind`` is "linear" (2-D), "stack" (3-D, one
    matrix for each expert) or "convolution" (out, in, kernel positions; one matrix for each group).
    ``input_dim`` is the axis of the matrices along which the weights of one output lie: 1, or 0 where they
    are stored (in, out).
    """

    kind: str
    batch: int
    rows: int
    cols: int
    positions: int
    input_dim: int

    @classmethod
    def of(
        cls, shape: Sequence[int], input_first: bool = False, kind: str = "", groups: int = 1
    ) -> MatrixLayout:
        """The layout of a tensor of two or more dimensions.

        Where ``kind`` is not known, a 3-D weight is a 1-D convolution ``(out, in, kernel)`` if its last
        dimension is smaller than its first, as kernels are, and a stack ``(experts, rows, cols)`` if not.
        """
        input_dim = 0 if input_first else 1
        if len(shape) == 2:
            return cls("linear", 1, shape[0], shape[1], 1, input_dim)
        if len(shape) == 3 and (kind == "stack" or (not kind and shape[2] >= shape[0])):
            return cls("stack", shape[0], shape[1], shape[2], 1, input_dim)
        return cls("convolution", groups, shape[0] // groups, shape[1], math.prod(shape[2:]), input_dim)


@dataclass(frozen=True)
class Selected:
    """A tensor to be masked; ``why`` says what it is and how that is known."""

    shard: Shard
    entry: Entry
    layout: MatrixLayout
    why: str


@dataclass(frozen=True)
class Selection:
    """What to mask, and the rest with the reason why not, both in the order of the files.

    ``chosen_by`` says what has decided: the modules of a model, or names.
    """

    masked: tuple[Selected, ...]
    skipped: tuple[tuple[Shard, Entry, str], ...]
    chosen_by: str


def select_tensors(
    checkpoint: Checkpoint,
    pattern: NMPattern,
    *,
    transposable: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_first: Sequence[str] = (),
    input_last: Sequence[str] = (),
) -> Selection:
    """Decides for every tensor whether it is masked, and along which axis.

    By default the weights of linear and convolution layers are, without embeddings, heads, routers and
    matrices smaller than one block. The model that config.json names says which those are; without one, names
    do: what ends with ``.weight`` but is not listed in ``DENSE_BY_NAME``. ``include`` replaces that choice:
    whatever its globs match is masked if it has two dimensions and a dtype that can be. ``exclude`` takes
    away from either. ``input_first`` names weights stored ``(in, out)``, ``input_last`` such as are
    ``(out, in)``, where that is not known or known wrongly. A weight whose input is not known stays dense,
    unless ``transposable`` makes the two axes alike.

    Raises
    ------
    NMSolveError
        If a glob matches no tensor, two say the contrary of one, or no tensor is left to mask.
    """
    names = [entry.name for _, entry in checkpoint.entries()]
    given = {"include": include, "exclude": exclude, "input_first": input_first, "input_last": input_last}
    for option, globs in given.items():
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                have = counted(len(names), "tensor")
                raise NMSolveError(f"{option}: {glob!r} matches none of the {have} in {checkpoint.root}")
    both = (name for name in names if _match(name, input_first) and _match(name, input_last))
    for name in both:
        raise NMSolveError(f"input_first: {name} is named by input_last, too")
    chooser = _Chooser(checkpoint, pattern, transposable, given)
    masked: list[Selected] = []
    skipped: list[tuple[Shard, Entry, str]] = []
    for shard, entry in checkpoint.entries():
        chosen = chooser.choose(shard, entry)
        if isinstance(chosen, Selected):
            masked.append(chosen)
        else:
            skipped.append((shard, entry, chosen))
    if not masked:
        reasons = sorted({reason for _, _, reason in skipped})
        raise NMSolveError(
            f"{checkpoint.root}: nothing to mask: {counted(len(names), 'tensor')}, none of which is to be"
            + (f" ({'; '.join(reasons[:4])})" if reasons else "")
        )
    return Selection(tuple(masked), tuple(skipped), chooser.chosen_by)


class _Chooser:
    """What is known of a checkpoint, asked tensor by tensor."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        pattern: NMPattern,
        transposable: bool,
        globs: Mapping[str, Sequence[str]],
    ) -> None:
        self.pattern = pattern
        self.transposable = transposable
        self.globs = globs
        self.architecture = architecture_of(checkpoint)
        self.shapes = {entry.name: entry.shape for _, entry in checkpoint.entries()}
        self.has_conv1d = bool(_INPUT_FIRST_TYPES & self.architecture.types) or any(
            name.endswith("c_attn.weight") and len(shape) == 2 and shape[1] == 3 * shape[0]
            for name, shape in self.shapes.items()
        )
        model, why = self.architecture.model, self.architecture.why
        self.chosen_by = f"modules of {model}" if model else f"names: {why}"

    def choose(self, shard: Shard, entry: Entry) -> Selected | str:
        """What is to be masked, or why a tensor stays dense."""
        include, exclude = self.globs["include"], self.globs["exclude"]
        excluded = _match(entry.name, exclude)
        if excluded is not None:
            return f"excluded by {excluded!r}"
        included = _match(entry.name, include)
        if include and included is None:
            return "not included"
        if entry.dtype not in DTYPES:
            return f"dtype {entry.dtype} is not one of {', '.join(DTYPES)}"
        if len(entry.shape) < 2:
            return f"{len(entry.shape)}-D, not a matrix"
        if entry.size == 0:
            return "empty"
        known = self.architecture.roles.get(entry.name)
        role = known or self._role_by_name(entry)
        if included is None:
            if role.dense is not None:
                return role.dense
            # A layer's weight is one by whatever name.
            if (known is None or role.kind == "stack") and not entry.name.endswith(DEFAULT_INCLUDE[1:]):
                what = " (experts in one tensor)" if role.kind == "stack" else ""
                return f"name does not match {DEFAULT_INCLUDE!r}{what}"
        input_dim = self._input_dim(entry.name, role)
        if input_dim is None and not self.transposable:
            return (
                f"which axis of {role.owner or 'its stack'} is the input is not known "
                "(input_first or input_last says it; transposable masks need neither)"
            )
        layout = MatrixLayout.of(entry.shape, input_dim == 0, role.kind, role.groups)
        if included is None and min(layout.rows, layout.cols) < self.pattern.m:
            return f"{layout.rows} x {layout.cols} matrices are smaller than one block of {self.pattern.m}"
        why = layout.kind if layout.input_dim else f"{layout.kind}, stored (in, out)"
        if included is not None:
            why += f", included by {included!r}"
        elif self.architecture.model:
            why += f", {known.owner}" if known else ", by name: no part of the model"
        return Selected(shard, entry, layout, why)

    def _role_by_name(self, entry: Entry) -> Role:
        """What a tensor is that no model explains."""
        layer = entry.name.removesuffix(".weight")
        dense = dense_by_name(layer) if layer != entry.name else None
        if len(entry.shape) == 3 and layer == entry.name:
            return Role("", dense, "", stack_axis(entry.name, self.shapes))
        conv1d = self.has_conv1d and _match(f".{entry.name}", _INPUT_FIRST) is not None
        return Role("", dense, "", 0 if conv1d else 1)

    def _input_dim(self, name: str, role: Role) -> int | None:
        if _match(name, self.globs["input_first"]) is not None:
            return 0
        return 1 if _match(name, self.globs["input_last"]) is not None else role.input_dim


def _match(name: str, globs: Sequence[str]) -> str | None:
    """The first glob that matches ``name``."""
    return next((glob for glob in globs if fnmatchcase(name, glob)), None)
