"""Work shared out over threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

__all__ = ["share_out"]

# Entries that one call of a kernel takes at a time: enough to hide the call, few enough to share out evenly.
_SHARE = 1 << 17


def share_out(kernel: Callable[[int, int], object], count: int, entries: int, threads: int) -> None:
    """Run ``kernel(first, last)`` over ``count`` problems of ``entries`` entries each.

    Threads take shares as they get free. What a problem's result is depends on nothing but the problem, so
    that it is the same for any number of threads.
    """
    share = max(1, _SHARE // max(1, entries))
    shares = -(-count // share)
    turns = itertools.count()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while (turn := next(turns)) < shares:
                kernel(turn * share, min(count, (turn + 1) * share))
        except BaseException as error:
            failures.append(error)

    helpers = [threading.Thread(target=work) for _ in range(min(threads, shares) - 1)]
    for helper in helpers:
        helper.start()
    work()
    for helper in helpers:
        helper.join()
    if failures:
        raise failures[0]
