"""Bytes of tensors from and to safetensors files, without any tensor but the current one in memory.

Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from nmsolve.errors import WorkFailed

if TYPE_CHECKING:
    from nmsolve.checkpoint.format import Entry

__all__ = ["COPY_BYTES", "PlacedWriter", "StreamWriter", "pieces", "read_into", "telling"]

COPY_BYTES = 4 << 20
"""What is read or written at once."""


class StreamWriter:
    """Writes one safetensors file from front to back and makes sure that it is complete and on disk.

    ``with StreamWriter(path, header, data_bytes) as out: out.write(...)``. A block that ends without an error
    has written exactly ``data_bytes`` bytes after the header, and the file is synced; anything else raises.
    """

    def __init__(self, path: Path, header: bytes, data_bytes: int, mode: int = 0o666) -> None:
        self.path = path
        self._expected = len(header) + data_bytes
        self._written = 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=0)
        self.write(header)

    def __enter__(self) -> StreamWriter:
        return self

    def write(self, data: bytes | memoryview) -> None:
        """Appends ``data``, all of it: an unbuffered write may take only a part."""
        view = _flat(data)
        while view.nbytes:
            count = self._file.write(view[:COPY_BYTES])
            self._written += count
            view = view[count:]

    def copy(self, source: BinaryIO, entry: Entry) -> Iterator[int]:
        """Appends the bytes of ``entry`` from ``source`` as they are; yields the size of each piece."""
        for piece in pieces(source, entry):
            self.write(piece)
            yield len(piece)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._written != self._expected:
                    raise WorkFailed(
                        f"{self.path.name}: {self._written} bytes came where {self._expected} were expected: "
                        "the input is no regular file, or changed while it was read"
                    )
                os.fsync(self._file.fileno())


class PlacedWriter:
    """Writes tensors at their places in a safetensors file, which other processes may fill at the same time.

    The file gets its header and its full size at once, if it has not; whoever writes it writes the same.
    """

    def __init__(self, path: Path, header: bytes, nbytes: int) -> None:
        self.path = path
        # For writing alone: NFS then sends the bytes that were written, and not the pages around them.
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=0)
        try:
            if os.fstat(descriptor).st_size != nbytes:
                self._file.truncate(nbytes)
            self.write(0, header)
        except OSError as error:
            self.close()
            raise OSError(error.errno, error.strerror, str(path)) from None

    def write(self, position: int, data: bytes | memoryview) -> int:
        """Writes all of ``data`` from ``position`` on, and returns the position behind it."""
        view = _flat(data)
        self._file.seek(position)
        while view.nbytes:
            count = self._file.write(view[:COPY_BYTES])
            position += count
            view = view[count:]
        return position

    def sync(self) -> None:
        """Makes sure that what was written is on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; more than once does no harm."""
        self._file.close()


def pieces(source: BinaryIO, entry: Entry) -> Iterator[bytes]:
    """The bytes of ``entry`` as they are, a few megabytes at a time."""
    source.seek(entry.start)
    left = entry.nbytes
    while left:
        piece = source.read(min(COPY_BYTES, left))
        if not piece:
            raise OSError(f"{entry.name}: the input file ended {left} bytes early")
        left -= len(piece)
        yield piece


def read_into(source: BinaryIO, position: int, buffer: memoryview) -> None:
    """Fills ``buffer`` with the bytes of ``source`` from ``position`` on."""
    source.seek(position)
    view = _flat(buffer)
    while view.nbytes:
        count = source.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"the input file ended {view.nbytes} bytes early")
        view = view[count:]


@contextmanager
def telling(name: str, path: Path) -> Iterator[None]:
    """What the operating system refuses, with the tensor that it was about.

    Raises
    ------
    WorkFailed
        For any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise WorkFailed(f"{name}: {error.strerror or error}: {path}") from error


def _flat(data: bytes | memoryview) -> memoryview:
    """``data`` as a run of bytes; memoryview refuses to cast what is empty."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")
