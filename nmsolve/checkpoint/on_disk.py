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
from nmsolve.backends.dispatch import AUTO, check_backend, check_mask_method
from nmsolve.checkpoint.format import Checkpoint, open_checkpoint, output_names
from nmsolve.checkpoint.job import Job, Work, mask_together
from nmsolve.checkpoint.output import check_output
from nmsolve.checkpoint.selection import Selection, select_tensors
from nmsolve.checkpoint.units import check_part
from nmsolve.errors import NMSolveError
from nmsolve.files import Interrupts
from nmsolve.pattern import NMPattern, PatternLike
from nmsolve.ranks import ALONE, Ranks

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
    part: tuple[int, int] | None = None,
    merge: bool = False,
    ranks: Ranks | None = None,
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
    ranks : Ranks, optional
        The processes that share the work, from :func:`nmsolve.ranks.joined`: each makes the same call. By
        default this process does all, whatever others do. Each rank of a host takes a GPU of its own, unless
        ``device`` has a number.
    progress : bool, optional
        Whether to show a progress bar; by default on a terminal.
    interrupts : Interrupts, optional
        Signals to be obeyed between pieces of work, and held back while the output is put in place.

    Returns
    -------
    Report
        What was masked and how well, what was left dense and why; also written beside the weights. With
        ``part``, and on other ranks than the first, only what this process masked.

    Raises
    ------
    NMSolveError
        If an argument or the input is not as described, before any work.
    WorkFailed
        If a weight is not finite, for one. What is finished stays in ``.OUT.unfinished-...`` beside ``out``,
        and the same call goes on there, with as many ranks or others. What one rank fails with, all raise.
    OSError
        If reading or writing fails.

    Examples
    --------
    >>> report = mask_checkpoint("model.safetensors", "sparse.safetensors", "2:4")      # doctest: +SKIP
    >>> report.totals()["retained"]                                                     # doctest: +SKIP
    0.75
    """
    ranks = ALONE if ranks is None else ranks

    def begin() -> Job:
        check_backend(backend)
        for name, value in (("certificate", certificate), ("merge", merge)):
            if not isinstance(value, bool):
                raise NMSolveError(f"{name}: expected True or False, got {value!r}")
        _check_shares(check_part(part), merge, ranks)
        arguments = {
            "include": list(include),
            "exclude": list(exclude),
            "input_first": list(input_first),
            "input_last": list(input_last),
        }
        prepared = prepare(
            checkpoint,
            out,
            NMPattern.of(pattern),
            transposable=transposable,
            method=method,
            device=device,
            overwrite=overwrite,
            **arguments,
        )
        from nmsolve.checkpoint.slabs import MaskSettings

        chosen = chosen_device(device, ranks.local if ranks.count > 1 else None)
        settings = MaskSettings(
            NMPattern.of(pattern), transposable, method or "exact", backend, chosen, certificate
        )
        names = os.fspath(checkpoint), os.fspath(out), device or chosen.partition(":")[0]
        return Job(prepared, settings, arguments, names, overwrite)

    work = Work(progress, interrupts or Interrupts(), ranks)
    with ranks.agreed():
        if part is None and not merge:
            return mask_together(begin, work)
        job = begin()
        return job.merge(work) if part is None else job.mask_part(part, work)


def _check_shares(part: tuple[int, int] | None, merge: bool, ranks: Ranks) -> None:
    if merge and part is not None:
        raise NMSolveError("merge: expected without part, once all parts are done")
    if ranks.count > 1 and (merge or part is not None):
        name = "merge" if merge else "part"
        raise NMSolveError(f"{name}: not for {ranks.count} ranks, which share the whole work by themselves")
