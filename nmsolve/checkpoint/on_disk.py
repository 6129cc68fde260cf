"""Masks a checkpoint on disk: what ``nmsolve mask`` does, with the same arguments.

torch is imported once it is certain that there is work for it, or to ask the model that config.json names.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nmsolve.about import __version__
from nmsolve.backends.devices import check_device, chosen_device
from nmsolve.backends.dispatch import AUTO, check_backend, check_mask_method, select
from nmsolve.checkpoint.format import Checkpoint, open_checkpoint, output_names
from nmsolve.checkpoint.output import check_output, publish
from nmsolve.checkpoint.selection import Selection, select_tensors
from nmsolve.checkpoint.units import Unit, check_part, deal, input_identity, units_of
from nmsolve.errors import NMSolveError, WorkFailed, begun, printable
from nmsolve.files import Interrupts, Unfinished, check_space
from nmsolve.pattern import NMPattern, PatternLike

if TYPE_CHECKING:
    from nmsolve.checkpoint.masking import MaskSettings, Output
    from nmsolve.checkpoint.report import MaskedTensor, Report

__all__ = ["Prepared", "mask_checkpoint", "prepare"]


@dataclass(frozen=True)
class Prepared:
    """What is certain before any work: the input, the resolved output if there is one, and what is masked."""

    checkpoint: Checkpoint
    out: Path | None
    selection: Selection


def prepare(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    pattern: NMPattern,
    *,
    transposable: bool = False,
    method: str | None = None,
    device: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_first: Sequence[str] = (),
    input_last: Sequence[str] = (),
    overwrite: bool = False,
) -> Prepared:
    """Checks the arguments of :func:`mask_checkpoint` and reads the headers; writes nothing.

    Raises
    ------
    NMSolveError
        If an argument is not as described there.
    """
    if method is not None:
        check_mask_method(method)
        if not transposable:
            raise NMSolveError(
                f"method: {method!r} needs transposable=True; ordinary N:M has only one method"
            )
    check_device(device)
    found = open_checkpoint(Path(checkpoint))
    target = check_output(found, out, overwrite, output_names)
    choice = select_tensors(
        found,
        pattern,
        transposable=transposable,
        include=include,
        exclude=exclude,
        input_first=input_first,
        input_last=input_last,
    )
    return Prepared(found, target, choice)


def mask_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    pattern: PatternLike,
    *,
    transposable: bool = False,
    method: str | None = None,
    backend: str = AUTO,
    device: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    input_first: Sequence[str] = (),
    input_last: Sequence[str] = (),
    overwrite: bool = False,
    certificate: bool = True,
    part: tuple[int, int] | None = None,
    merge: bool = False,
    progress: bool | None = None,
    interrupts: Interrupts | None = None,
) -> Report:
    """Keeps the N largest of every M weights by magnitude and sets the others to zero, with a certificate.

    Parameters
    ----------
    checkpoint : path
        A .safetensors file, or a Hugging Face checkpoint folder, sharded or not. Memory holds a slab of one
        tensor at a time.
    out : path
        A file for a file; masks and report get their names from it. A folder of the same structure for a
        folder, with ``masks/`` and ``nmsolve_report.json`` in it. It appears whole or not at all.
    pattern : str, (int, int) or NMPattern
        ``"8:16"`` keeps 8 of 16.
    transposable : bool
        N:M along rows and columns of every M x M block, or only along the input of each output.
    method : {"exact", "tsenor", "greedy"}, optional
        Solver of transposable masks ("exact").
    backend : {"auto", "triton", "cpu", "torch"}
        See :func:`nmsolve.backends.dispatch.select`.
    device : str, optional
        ``"cpu"``, ``"cuda"`` or ``"cuda:1"``; by default a GPU if there is one.
    include, exclude, input_first, input_last : sequence of str
        Globs of tensors, see :func:`nmsolve.checkpoint.selection.select_tensors`.
    overwrite : bool
        Whether ``out`` may be replaced: a file, or a folder that nmsolve wrote.
    certificate : bool
        Whether the report has a bound that proves how good transposable masks are. Without one they are the
        same masks, sooner, and the report has null in its place.
    part : (int, int), optional
        ``(K, OF)``: only the K-th of OF parts, dealt by size, K from 1 on. What it finishes waits beside
        ``out`` until a run with ``merge`` puts all in place. Parts may run at the same time, on any machine
        that sees the same files.
    merge : bool
        Puts in place what the parts have finished, and computes nothing.
    progress : bool, optional
        Whether to show a progress bar; by default on a terminal.
    interrupts : Interrupts, optional
        Signals to be obeyed between pieces of work, and held back while the output is put in place.

    Returns
    -------
    Report
        What was masked and how well, what was left dense and why; also written beside the weights. With
        ``part``, only what this process masked.

    Raises
    ------
    NMSolveError
        If an argument or the input is not as described, before any work.
    WorkFailed
        If a weight is not finite, for one. What is finished stays in ``.OUT.unfinished-...`` beside ``out``,
        and the same call goes on there.
    OSError
        If reading or writing fails.

    Examples
    --------
    >>> report = mask_checkpoint("model.safetensors", "sparse.safetensors", "2:4")      # doctest: +SKIP
    >>> report.totals()["retained"]                                                     # doctest: +SKIP
    0.75
    """
    pattern = NMPattern.of(pattern)
    check_backend(backend)
    for name, value in (("certificate", certificate), ("merge", merge)):
        if not isinstance(value, bool):
            raise NMSolveError(f"{name}: expected True or False, got {value!r}")
    part = check_part(part)
    if merge and part is not None:
        raise NMSolveError("merge: expected without part, once all parts are done")
    prepared = prepare(
        checkpoint,
        out,
        pattern,
        transposable=transposable,
        method=method,
        device=device,
        include=include,
        exclude=exclude,
        input_first=input_first,
        input_last=input_last,
        overwrite=overwrite,
    )
    from nmsolve.checkpoint.masking import MaskSettings

    chosen = chosen_device(device)
    settings = MaskSettings(pattern, transposable, method or "exact", backend, chosen, certificate)
    globs = {
        "include": list(include),
        "exclude": list(exclude),
        "input_first": list(input_first),
        "input_last": list(input_last),
    }
    job = _Job(prepared, settings, globs, os.fspath(checkpoint), os.fspath(out), overwrite)
    work = _Work(progress, interrupts or Interrupts())
    with job.held(shared=part is not None) as unfinished:
        left = job.left(unfinished)
        if merge:
            job.check_complete(left)
        with _kept(unfinished):
            if part is not None:
                mine = deal(job.units, part[1])[part[0] - 1]
                numbers = {unit.number for unit in left}
                job.mask([unit for unit in mine if unit.number in numbers], unfinished, work)
                return job.report(unfinished, mine)
            job.mask(left, unfinished, work)
            return job.publish(unfinished, work)


@dataclass(frozen=True)
class _Work:
    """How a run shows itself, and what ends it."""

    progress: bool | None
    interrupts: Interrupts


class _Job:
    """The masks of a checkpoint, once it is certain that they can be made: pieces of work, and their end."""

    def __init__(
        self,
        prepared: Prepared,
        settings: MaskSettings,
        globs: dict[str, list[str]],
        source: str,
        out: str,
        overwrite: bool,
    ) -> None:
        assert prepared.out is not None
        self.checkpoint, self.target, self.selection = prepared.checkpoint, prepared.out, prepared.selection
        self.settings, self.overwrite = settings, overwrite
        self.units = units_of(self.checkpoint)
        self._names = source, out
        self._started = time.perf_counter()
        self._identity = input_identity(self.checkpoint)
        chosen = select(settings.backend, settings.device, settings.pattern.m)
        self._settings: dict[str, Any] = {
            "pattern": str(settings.pattern),
            "transposable": settings.transposable,
            "method": settings.method if settings.transposable else "ordinary",
            "backend": settings.backend,
            "device": settings.device,
            "certificate": settings.certificate,
            **globs,
            "chosen_by": self.selection.chosen_by,
        }
        masked = [(item.entry.name, repr(item.layout)) for item in self.selection.masked]
        kind = settings.device.partition(":")[0]
        decides = [__version__, self._identity, {**self._settings, "device": kind}, chosen.name, masked]
        self.key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]

    @contextmanager
    def held(self, *, shared: bool) -> Iterator[Unfinished]:
        """The folder in which the work goes on."""
        from nmsolve.checkpoint.masking import bytes_needed

        with Unfinished(self.target, self.key, shared=shared) as unfinished:
            needed = bytes_needed(self.checkpoint, self.selection) - unfinished.taken()
            check_space(self.target.parent, needed)
            yield unfinished

    def _output(self, unfinished: Unfinished) -> Output:
        from nmsolve.checkpoint.masking import Output

        return Output(self.checkpoint, self.selection, self.settings, unfinished.result, self.target)

    def left(self, unfinished: Unfinished) -> list[Unit]:
        """The units that are not finished. One whose files have gone since is not."""
        output = self._output(unfinished)
        there = {shard.path.name: output.is_there(shard) for shard in self.checkpoint.shards}
        left: list[Unit] = []
        for unit in self.units:
            if not there[unit.shard.path.name]:
                unfinished.forget(_note(unit))
            if unfinished.finished(_note(unit)) is None:
                left.append(unit)
        return left

    def check_complete(self, left: Sequence[Unit]) -> None:
        """Raises if a unit is not finished."""
        if left:
            raise NMSolveError(
                f"merge: {len(left)} of {len(self.units)} pieces for this input and these settings "
                f"are not done, the first is {left[0].name}; the same command without merge=True does them"
            )

    def mask(self, units: Sequence[Unit], unfinished: Unfinished, work: _Work) -> None:
        """Does units."""
        from tqdm import tqdm

        from nmsolve.checkpoint.masking import write_units

        def finished(unit: Unit, rows: Iterable[MaskedTensor]) -> None:
            unfinished.finish(_note(unit), json.dumps([asdict(row) for row in rows]))

        total = sum(unit.nbytes for unit in units)
        disable = None if work.progress is None else not work.progress
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=disable) as bar:

            def step(done: int, name: str) -> None:
                work.interrupts.check()
                bar.set_description_str(printable(name), refresh=False)
                bar.update(done)

            write_units(self._output(unfinished), units, finished, step)

    def report(self, unfinished: Unfinished, units: Iterable[Unit]) -> Report:
        """What was done in these units, and all that is left dense."""
        from nmsolve.checkpoint.report import MaskedTensor, Report, SkippedTensor

        rows = [json.loads(unfinished.finished(_note(unit)) or "[]") for unit in units]
        return Report(
            input=self._names[0],
            output=self._names[1],
            settings=self._settings,
            tensors=[MaskedTensor(**{**row, "shape": tuple(row["shape"])}) for unit in rows for row in unit],
            skipped=[
                SkippedTensor(entry.name, shard.path.name, entry.shape, entry.dtype, reason)
                for shard, entry, reason in self.selection.skipped
            ],
            files_left_out=[path.as_posix() for path in self.checkpoint.left_out],
            seconds=time.perf_counter() - self._started,
        )

    def publish(self, unfinished: Unfinished, work: _Work) -> Report:
        """Adds what is not weights, and puts all in place."""
        if input_identity(self.checkpoint) != self._identity:
            raise WorkFailed(f"{self.checkpoint.root}: the input changed while it was read")
        if self.checkpoint.is_folder:
            for path in self.checkpoint.extras:  # a run that was killed may have left half of one
                (unfinished.result / path).unlink(missing_ok=True)
            self.checkpoint.copy_extras(unfinished.result, lambda name: work.interrupts.check())
        report = self.report(unfinished, self.units)
        report.write(self._output(unfinished).report)
        publish(self.checkpoint, unfinished, output_names, self.overwrite, work.interrupts)
        return report


@contextmanager
def _kept(unfinished: Unfinished) -> Iterator[None]:
    """Work that has begun: what ends it says what is kept."""
    try:
        with begun():
            yield
    except BaseException as error:
        if unfinished.keeps():
            # Errors of any kind keep their type; the command line tells it behind the message.
            error.left_behind = (  # type: ignore[attr-defined]
                f"what is finished is in {unfinished.path}: the same command goes on, or delete that folder"
            )
        raise


def _note(unit: Unit) -> str:
    return f"{unit.number}.json"
