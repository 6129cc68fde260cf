"""A hidden folder in which long work goes on, by one process after another or by several at once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from nmsolve.errors import NMSolveError
from nmsolve.files import locked, publish_files, publish_folder, remove_free, write_text

__all__ = ["Unfinished"]


class Unfinished:
    """A hidden folder beside ``out`` in which later runs go on: its name follows from what is made.

    ``with Unfinished(out, key) as unfinished:`` makes ``.<name of out>.unfinished-<key>``, or finds it.
    ``result`` in it is what will be published; :meth:`finish` notes what is complete in it, with a text each.
    Leaving the block after publishing removes the folder, and those of ``out`` that nobody holds; otherwise
    it stays if anything is finished.

    Parameters
    ----------
    out : Path
        The file or folder to be made.
    key : str
        Tells one piece of work from another: input and settings.
    shared : bool
        Whether several processes may be at work in it.

    Raises
    ------
    NMSolveError
        On entering, if another process is at work in it.
    """

    def __init__(self, out: Path, key: str, *, shared: bool = False) -> None:
        self.out = out
        self._prefix = f".{out.name}.unfinished-"
        self.path = out.with_name(self._prefix + key)
        self.result = self.path / "result"
        self._notes = self.path / "finished"
        self._shared = shared
        self._lock = ExitStack()
        self._published = False

    def __enter__(self) -> Unfinished:
        self._hold(self._shared)
        return self

    def share(self) -> None:
        """Lets others in that hold the folder ``shared``, once this process had it alone."""
        self.release()
        self._hold(shared=True)

    def alone(self) -> None:
        """Takes the folder back from those that it was shared with.

        Raises
        ------
        NMSolveError
            If one of them is still at work in it.
        """
        self.release()
        self._hold(shared=False)

    def release(self) -> None:
        """Lets go of the folder; what is in it stays."""
        self._lock.close()

    def _hold(self, shared: bool) -> None:
        while not self._held(shared):  # another run has removed it since
            pass
        for folder in (self.result, self._notes):
            folder.mkdir(exist_ok=True)

    def _held(self, shared: bool) -> bool:
        """Makes and locks the folder; whether it is still there then."""
        self.path.mkdir(exist_ok=True)
        try:
            self._lock.enter_context(locked(self.path, shared=shared))
        except BlockingIOError:
            raise NMSolveError(f"out: another process is at work in {self.path}") from None
        except FileNotFoundError:
            return False
        if not self.path.exists():
            self._lock.close()
            return False
        return True

    def finish(self, name: str, text: str) -> None:
        """Notes that something is complete and on disk."""
        write_text(self._notes / name, text)

    def finished(self, name: str) -> str | None:
        """What was noted, None if nothing was."""
        try:
            return (self._notes / name).read_text("utf-8")
        except FileNotFoundError:
            return None

    def forget(self, name: str) -> None:
        """Takes a note back."""
        (self._notes / name).unlink(missing_ok=True)

    def keeps(self) -> bool:
        """Whether anything is finished."""
        try:
            return any(not path.name.startswith(".") for path in self._notes.iterdir())
        except FileNotFoundError:  # one of those that it was shared with has published, and removed it
            return False

    def taken(self) -> int:
        """Bytes on disk of what will be published."""
        files = (path.stat() for path in self.result.rglob("*") if path.is_file())
        return sum(getattr(stat, "st_blocks", 0) * 512 for stat in files)

    def publish_folder(self, replace: bool = False) -> None:
        """Renames ``result`` to ``out``; one that is there is replaced if allowed."""
        publish_folder(self.result, self.out, replace)
        self._published = True

    def publish_files(self, names: Sequence[str], replace: bool = False) -> None:
        """Renames files of ``result`` into the folder of ``out``, in the order given."""
        publish_files(self.result, self.out, names, replace)
        self._published = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._published:
            shutil.rmtree(self.path, ignore_errors=True)
            self._lock.close()
            remove_free(self.out, self._prefix)
            return
        empty = not self.keeps()
        self._lock.close()
        if empty:
            with suppress(OSError), locked(self.path) as held:  # others may be at work in it
                if held and not self.keeps():
                    shutil.rmtree(self.path, ignore_errors=True)
