"""Output that appears whole or not at all, folders that one process holds, and signals that end a run tidily;
and input that may be anything.

Everything that nmsolve writes goes through here. A file is written under a hidden name beside its own
(:func:`writing`, :func:`replacing`), several files or a folder in a hidden folder (:class:`Staging`); when
they are complete and on disk they are renamed. nmsolve/unfinished.py is for long work, which later runs go on
with.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, BinaryIO

from nmsolve.errors import NMSolveError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "Interrupts",
    "Staging",
    "check_out",
    "check_space",
    "is_partial",
    "is_regular",
    "locked",
    "publish_files",
    "publish_folder",
    "read_json",
    "remove_free",
    "replacing",
    "write_bytes",
    "write_text",
    "writing",
]


# --- what is read -------------------------------------------------------------------------------------------

_MOST_JSON = 100_000_000  # bytes, as many as a safetensors header may have


def is_regular(path: Path) -> bool:
    """Whether ``path`` is a file that ends, links followed: pipes and devices may not; no name is too odd."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or that the file system cannot spell
        return False


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises
    ------
    OSError
        If it is no regular file or cannot be read.
    ValueError
        If it is not JSON, or larger than any that is meant to be read.
    """
    if not is_regular(path):
        raise OSError(errno.EINVAL, "no regular file" if os.path.lexists(path) else "no such file", str(path))
    with path.open("rb") as file:
        data = file.read(_MOST_JSON + 1)
    if len(data) > _MOST_JSON:
        raise ValueError(f"over {_MOST_JSON:,} bytes")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("too deeply nested") from None


# --- one file -----------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside ``path``; what was written there takes its place when the block ends.

    After an error nothing is left. A process that is killed leaves what :func:`is_partial` recognises.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file to be written that takes the place of ``path``, whole, when the block ends without an error."""
    with replacing(path) as partial, partial.open("xb") as file:
        yield file
        file.flush()


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``path`` whole or not at all."""
    with writing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write ``path`` in UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def is_partial(path: Path, of: Path) -> bool:
    """Whether ``path`` is what a killed process left of ``of``."""
    return path.name.startswith(f".{of.name}.") and path.name.endswith(_PARTIAL)


_PARTIAL = ".partial"


def _sync(path: Path) -> None:
    """Makes sure that a file's contents, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- where a command may write ------------------------------------------------------------------------------


def check_out(
    out: Path,
    overwrite: bool,
    *,
    source: Path | None = None,
    mark: str | None = None,
    suffixes: Sequence[str] = (),
    beside: Callable[[Path], Sequence[str]] | None = None,
) -> Path:
    """The resolved ``out``, once it is certain that it can be made and that nothing else falls with it.

    Parameters
    ----------
    out : Path
        A folder to be made if there is a ``mark``, a file if there is none.
    overwrite : bool
        Whether what is there may be replaced: a file, or a folder with the ``mark`` in it, by which nmsolve
        knows its own.
    source : Path, optional
        The input, which lies neither in ``out`` nor around it.
    suffixes : sequence of str
        What the name of a file ends in.
    beside : callable, optional
        From the resolved file to the names of all that is written, itself included, in the same folder.

    Raises
    ------
    NMSolveError
        If ``out`` will not do.
    """
    target = Path(os.path.realpath(out))
    if source is not None:
        _check_apart(out, target, source)
    if mark is None and suffixes and target.suffix not in suffixes:
        raise NMSolveError(f"out: expected a name that ends in {' or '.join(suffixes)}, got {out}")
    if not target.parent.is_dir():
        raise NMSolveError(f"out: the folder {target.parent} does not exist")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise NMSolveError(f"out: no permission to write in {target.parent}")
    if mark is not None:
        _check_replaceable_folder(target, overwrite, mark)
        return target
    for name in [target.name] if beside is None else beside(target):
        path = target.with_name(name)
        if source is not None and _is_same(path, source):
            raise NMSolveError(f"out: {out} would replace the input with {name}")
        if path.exists() and not (overwrite and path.is_file()):
            kind = "a folder" if path.is_dir() else "not a file"
            raise NMSolveError(
                f"out: {path} exists; {'overwrite=True replaces it' if path.is_file() else f'it is {kind}'}"
            )
    return target


def _check_apart(out: Path, target: Path, source: Path) -> None:
    """Links, and mounts of one folder at two places, are seen through."""
    origin = Path(os.path.realpath(source))
    if target == origin or _is_same(target, origin):
        raise NMSolveError(f"out: {out} is the input itself")
    inside = any(_is_same(parent, origin) for parent in target.parents)
    if inside or any(_is_same(parent, target) for parent in origin.parents):
        raise NMSolveError(f"out: expected a path outside {source}, got {out}")


def _check_replaceable_folder(target: Path, overwrite: bool, mark: str) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise NMSolveError(f"out: {target} exists; overwrite=True replaces it")
    if not (target / mark).exists():
        raise NMSolveError(
            f"out: {target} exists and nmsolve did not write it (there is no {mark}); "
            "remove it yourself or choose another name"
        )


def _is_same(a: Path, b: Path) -> bool:
    with suppress(OSError):
        return os.path.samefile(a, b)
    return False


def check_space(folder: Path, needed: int) -> None:
    """Raise unless ``needed`` bytes are free in ``folder``."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise NMSolveError(f"out: {needed:,} bytes are needed in {folder}, {free:,} are free")


# --- folders ------------------------------------------------------------------------------------------------


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Holds ``folder`` for this process; the end of the block, or of the process, frees it.

    Several processes may hold it ``shared``. Yields False where the file system or this system has no such
    locks.

    Raises
    ------
    BlockingIOError
        If another process holds it.
    OSError
        If it is no folder that can be read.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


class Staging:
    """A hidden folder beside ``out``: everything is written there, then moved into place by renaming.

    ``with Staging(out) as staging:`` makes ``.<name of out>.nmsolve-<random>``; leaving the block removes
    whatever was not published. A run that was killed cannot do that, so each staging folder is locked while
    its process lives, and the next run for the same ``out`` removes those whose lock is free.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._prefix = f".{out.name}.nmsolve-"
        self.path = self._fresh()
        self._held = ExitStack()

    def __enter__(self) -> Staging:
        remove_free(self.out, self._prefix)
        try:
            while not self._made():  # another run has taken the new folder for a stale one
                self.path = self._fresh()
        except BaseException:
            self._discard()
            raise
        return self

    def _fresh(self) -> Path:
        return self.out.with_name(self._prefix + secrets.token_hex(4))

    def _made(self) -> bool:
        """Makes and locks the folder; whether it is still there then."""
        self.path.mkdir()
        try:
            self._held.enter_context(locked(self.path))
        except (BlockingIOError, FileNotFoundError):
            return False
        return self.path.exists()

    def publish_folder(self, replace: bool = False) -> None:
        """Renames the staging folder itself to ``out``; one that is there is replaced if allowed."""
        publish_folder(self.path, self.out, replace)

    def publish_files(self, names: Sequence[str], replace: bool = False) -> None:
        """Renames files of the staging folder into the folder of ``out``, in the order given."""
        publish_files(self.path, self.out, names, replace)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()


def remove_free(out: Path, prefix: str) -> None:
    """Removes the hidden folders of ``out`` that no process holds."""
    for stale in sorted(out.parent.glob(f"{_literal(prefix)}*")):
        with suppress(OSError), locked(stale) as held:  # one without locks cannot be told stale
            if held:
                shutil.rmtree(stale, ignore_errors=True)


def publish_folder(folder: Path, out: Path, replace: bool) -> None:
    """Renames ``folder`` to ``out``; one that is there is replaced if allowed."""
    _refuse_existing([] if replace else [out])
    _sync_tree(folder)
    token = secrets.token_hex(4)
    replaced = out.with_name(f".{out.name}.replaced-{token}") if out.exists() else None
    if replaced is not None:
        os.rename(out, replaced)
    try:
        os.rename(folder, out)
    except BaseException:
        if replaced is not None:
            os.rename(replaced, out)
        raise
    _sync(out.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def publish_files(folder: Path, out: Path, names: Sequence[str], replace: bool) -> None:
    """Renames files of ``folder`` into the folder of ``out``, in the order given; all or none that is new."""
    _refuse_existing([] if replace else [out.with_name(name) for name in names])
    moved: list[tuple[Path, bool]] = []
    try:
        for name in names:
            target = out.with_name(name)
            moved.append((target, target.exists()))
            os.replace(folder / name, target)
    except BaseException:
        for target, existed in moved:
            if not existed:
                target.unlink(missing_ok=True)
        raise
    _sync(out.parent)


def _refuse_existing(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.exists():
            raise FileExistsError(errno.EEXIST, "appeared while the work went on", str(path))


def _literal(text: str) -> str:
    """``text`` as a glob that matches only itself."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _sync_tree(root: Path) -> None:
    """Every folder's names; files are synced by those who write them."""
    for folder, _, _ in os.walk(root):
        _sync(Path(folder))


# --- signals ------------------------------------------------------------------------------------------------


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
