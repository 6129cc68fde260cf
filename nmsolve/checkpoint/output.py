"""Where a changed checkpoint goes: a file with others beside it for a file, a folder for a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from nmsolve.checkpoint.format import REPORT_NAME, SUFFIX, Checkpoint
from nmsolve.files import Interrupts, Staging, check_out
from nmsolve.unfinished import Unfinished

__all__ = ["check_output", "publish"]

Names = Callable[[Path], Sequence[str]]
"""From the file to write to the names of all that is written for it, the weights last."""


def check_output(
    checkpoint: Checkpoint, out: str | os.PathLike[str] | None, overwrite: bool, names: Names
) -> Path | None:
    """The resolved ``out``, None if there is none.

    Raises
    ------
    NMSolveError
        If it will not do, see :func:`nmsolve.files.check_out`.
    """
    if out is None:
        return None
    if checkpoint.is_folder:
        return check_out(Path(out), overwrite, source=checkpoint.root, mark=REPORT_NAME)
    return check_out(Path(out), overwrite, source=checkpoint.root, suffixes=(SUFFIX,), beside=names)


def publish(
    checkpoint: Checkpoint,
    staging: Staging | Unfinished,
    names: Names,
    overwrite: bool,
    interrupts: Interrupts,
) -> None:
    """Puts what was staged in place, once begun without interruption."""
    interrupts.hold()
    if checkpoint.is_folder:
        staging.publish_folder(replace=overwrite)
    else:
        staging.publish_files(names(staging.out), replace=overwrite)
