"""Reading ahead and writing behind: a thread each, with a few pieces of work under way.

File operations do not hold the interpreter's lock, and so a slab can be read while another one is solved and
a third is written. Work of one kind is done in its order. What fails is raised where the next piece is asked
for or handed over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from types import TracebackType
from typing import Any, TypeVar

__all__ = ["Behind", "ahead"]

_T = TypeVar("_T")

# Pieces that wait to be taken, or to be done, beside the one that is under way.
_DEPTH = 1


def ahead(tasks: Iterable[Callable[[], _T]], threads: int = 1) -> Generator[_T, None, None]:
    """What the tasks return, in their order, while the next ones are done in threads.

    As many as threads are under way or done, and one more.

    Examples
    --------
    >>> list(ahead([lambda: 1, lambda: 2]))
    [1, 2]
    """
    pool = ThreadPoolExecutor(threads, "nmsolve-ahead")
    waiting: deque[Future[_T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class Behind:
    """Calls that are made in a thread, one after the other. Leaving the block waits for them.

    After an error, in a call or in the block, what has not begun is not done; ``stopped`` tells a long call
    that it may end.

    Examples
    --------
    >>> done = []
    >>> with Behind() as behind:
    ...     behind.call(done.append, 1)
    ...     behind.call(done.append, 2)
    >>> done
    [1, 2]
    """

    def __init__(self) -> None:
        self.stopped = Event()
        self._pool = ThreadPoolExecutor(1, "nmsolve-behind")
        self._waiting: deque[Future[Any]] = deque()

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Hand over a call. Raises what an earlier one raised, and waits where many are not done yet."""
        self._waiting.append(self._pool.submit(self._do, function, *arguments))
        while len(self._waiting) > _DEPTH + 1 or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()

    def _do(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Nothing if a call before has failed, or has ended early: this one may build on it."""
        if self.stopped.is_set():
            return
        try:
            function(*arguments)
        except BaseException:
            self.stopped.set()
            raise

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            while self._waiting and error is None:
                self._waiting.popleft().result()
        finally:
            self.stopped.set()
            self._pool.shutdown(cancel_futures=True)
