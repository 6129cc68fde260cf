"""Output that appears whole or not at all, and signals that end a run tidily."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from nmsolve.errors import NMSolveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Interrupts", "Staging", "check_outside", "check_replaceable", "lock"]


def check_outside(out: Path, source: Path) -> Path:
    """The resolved ``--out``, once it is certain that it can be made and has nothing to do with the input."""
    target, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if target == origin:
        raise NMSolveError(f"--out: {out} is the input itself")
    if origin in target.parents or target in origin.parents:
        raise NMSolveError(f"--out: expected a path outside {source}, got {out}")
    if not target.parent.is_dir():
        raise NMSolveError(f"--out: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise NMSolveError(f"--out: no permission to write in {target.parent}")
    return target


def check_replaceable(out: Path, overwrite: bool, mark: Path) -> None:
    """Raise if ``out`` is there, unless it may be overwritten and ``mark`` shows that nmsolve wrote it."""
    if not out.exists():
        return
    if not overwrite:
        raise NMSolveError(f"--out: {out} exists; --overwrite replaces it")
    if not mark.exists():
        raise NMSolveError(
            f"--out: {out} exists and nmsolve did not write it (there is no {mark.name}); "
            "remove it yourself or choose another name"
        )


class Staging:
    """A hidden folder beside ``out``: everything is written there, then moved into place by renaming.

    ``with Staging(out) as staging:`` makes ``.<name of out>.nmsolve-<random>``; leaving the block removes
    whatever was not published. A run that was killed cannot do that, so each staging folder is locked while
    its process lives, and the next run for the same ``out`` removes those whose lock is free.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._prefix = f".{out.name}.nmsolve-"
        self.path = out.with_name(self._prefix + secrets.token_hex(4))
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        for stale in sorted(self.out.parent.glob(f"{_literal(self._prefix)}*")):
            held = _lock(stale)
            if held is not None:
                shutil.rmtree(stale, ignore_errors=True)
                os.close(held)
        try:
            self.path.mkdir()
            self._lock = _lock(self.path)
        except BaseException:
            self._discard()
            raise
        return self

    def publish_folder(self, replace: bool = False) -> None:
        """Renames the staging folder itself to ``out``; one that is there is replaced if allowed."""
        _refuse_existing([] if replace else [self.out])
        _sync_tree(self.path)
        token = self.path.name.removeprefix(self._prefix)
        replaced = self.out.with_name(f".{self.out.name}.replaced-{token}") if self.out.exists() else None
        if replaced is not None:
            os.rename(self.out, replaced)
        try:
            os.rename(self.path, self.out)
        except BaseException:
            if replaced is not None:
                os.rename(replaced, self.out)
            raise
        _sync_folder(self.out.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)

    def publish_files(self, names: Sequence[str], replace: bool = False) -> None:
        """Renames files of the staging folder into the folder of ``out``, in the order given."""
        _refuse_existing([] if replace else [self.out.with_name(name) for name in names])
        moved: list[tuple[Path, bool]] = []
        try:
            for name in names:
                target = self.out.with_name(name)
                moved.append((target, target.exists()))
                os.replace(self.path / name, target)
        except BaseException:
            for target, existed in moved:
                if not existed:
                    target.unlink(missing_ok=True)
            raise
        _sync_folder(self.out.parent)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class Interrupts:
    """Turns the first SIGINT, SIGTERM or SIGHUP into one KeyboardInterrupt, and ignores those that follow.

    An exception that a signal handler raises can be lost, for instance inside a callback or a destructor;
    :meth:`check`, called between pieces of work, raises it again. :meth:`hold` is for the last step, which is
    to be completed once begun.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._received = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal came."""
        if self._received:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """From here on signals are ignored; raises KeyboardInterrupt if one came before."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        self.check()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        for other in self._previous:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(errno.EEXIST, "appeared while the work went on", str(path))


def _lock(folder: Path) -> int | None:
    """A locked descriptor of ``folder``, or None if another process holds it or the folder is gone.

    Where the file system has no locks, a folder cannot be told stale and is left alone.
    """
    try:
        return lock(folder)
    except OSError:
        return None


def _literal(text: str) -> str:
    """``text`` as a glob that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for folder, _, _ in os.walk(root):
        _sync_folder(Path(folder))


def lock(folder: Path) -> int | None:
    """A locked descriptor of ``folder``; closing it, or the end of the process, frees the folder.

    None where the file system or this system has no such locks.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    OSError
        If it is no folder that can be read.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor
