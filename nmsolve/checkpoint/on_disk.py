"""Masks a checkpoint on disk: what ``nmsolve mask`` does, with the same arguments.

torch is imported once it is certain that there is work for it, or to ask the model that config.json names.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nmsolve.backends.devices import check_device, chosen_device
from nmsolve.backends.dispatch import AUTO, check_backend, check_mask_method, select
from nmsolve.checkpoint.format import Checkpoint, open_checkpoint, output_names
from nmsolve.checkpoint.output import check_output, publish
from nmsolve.checkpoint.selection import Selection, select_tensors
from nmsolve.errors import NMSolveError, begun, printable
from nmsolve.files import Interrupts, Staging, check_space
from nmsolve.pattern import NMPattern, PatternLike

if TYPE_CHECKING:
    from nmsolve.checkpoint.report import Report

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
    progress : bool, optional
        Whether to show a progress bar; by default on a terminal.
    interrupts : Interrupts, optional
        Signals to be obeyed between pieces of work, and held back while the output is put in place.

    Returns
    -------
    Report
        What was masked and how well, what was left dense and why; also written beside the weights.

    Raises
    ------
    NMSolveError
        If an argument or the input is not as described, before any work.
    WorkFailed
        If a weight is not finite, for one.
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
    if not isinstance(certificate, bool):
        raise NMSolveError(f"certificate: expected True or False, got {certificate!r}")
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
    found, target, selection = prepared.checkpoint, prepared.out, prepared.selection
    assert target is not None

    from tqdm import tqdm

    from nmsolve.checkpoint.masking import MaskSettings, bytes_needed, write_masked
    from nmsolve.checkpoint.report import Report, SkippedTensor

    device = chosen_device(device)
    select(backend, device, pattern.m)
    check_space(target.parent, bytes_needed(found, selection))
    settings = MaskSettings(pattern, transposable, method or "exact", backend, device, certificate)
    report = Report(
        input=os.fspath(checkpoint),
        output=os.fspath(out),
        settings={
            "pattern": str(pattern),
            "transposable": transposable,
            "method": settings.method if transposable else "ordinary",
            "backend": backend,
            "device": device,
            "certificate": certificate,
            "include": list(include),
            "exclude": list(exclude),
            "input_first": list(input_first),
            "input_last": list(input_last),
            "chosen_by": selection.chosen_by,
        },
        skipped=[
            SkippedTensor(entry.name, shard.path.name, entry.shape, entry.dtype, reason)
            for shard, entry, reason in selection.skipped
        ],
        files_left_out=[path.as_posix() for path in found.left_out],
    )
    interrupts = interrupts or Interrupts()
    total = sum(entry.nbytes for _, entry in found.entries())
    disable = None if progress is None else not progress
    with (
        begun(),
        Staging(target) as staging,
        tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=disable) as bar,
    ):

        def step(done: int, name: str) -> None:
            interrupts.check()
            bar.set_description_str(printable(name), refresh=False)
            bar.update(done)

        write_masked(found, selection, settings, report, staging.path, target, step)
        publish(found, staging, output_names, overwrite, interrupts)
    return report
