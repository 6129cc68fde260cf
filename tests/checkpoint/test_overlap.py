"""Reading ahead and writing behind: order, limits, and what an error leaves behind."""

from __future__ import annotations

import threading
import time

import pytest

from nmsolve.checkpoint.overlap import Behind, ahead


def test_everything_comes_in_its_order() -> None:
    done: list[int] = []
    with Behind() as behind:
        for k in ahead((lambda k=k: k * k) for k in range(50)):
            behind.call(done.append, k)
    assert done == [k * k for k in range(50)]


def test_only_a_few_pieces_are_under_way() -> None:
    """Memory is bounded however slow the other side is."""
    read = []
    for taken, _ in enumerate(ahead((lambda k=k: read.append(k)) for k in range(20)), 1):
        time.sleep(0.001)
        assert len(read) <= taken + 2
    started, most, lock = [0], [0], threading.Lock()

    def write() -> None:
        time.sleep(0.001)
        with lock:
            started[0] -= 1

    with Behind() as behind:
        for _ in range(20):
            with lock:
                started[0] += 1
            behind.call(write)
            most[0] = max(most[0], started[0])
    assert most[0] <= 2
    assert started[0] == 0


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_keep_the_order(threads: int) -> None:
    """Each task waits until as many as threads are under way; the earlier one is the later one to end."""
    together, begun, taken, most = threading.Barrier(threads), [], [], [0]

    def work(k: int) -> int:
        begun.append(k)
        most[0] = max(most[0], len(begun) - len(taken))
        together.wait(60)
        time.sleep(0.002 * (threads - k % threads))
        return k

    for k in ahead(((lambda k=k: work(k)) for k in range(12)), threads):
        taken.append(k)
    assert taken == list(range(12))
    assert threads <= most[0] <= threads + 1


def test_an_error_comes_out_where_it_is_asked_for() -> None:
    def fail() -> int:
        raise OSError("no space")

    found: list[int] = []
    with pytest.raises(OSError, match="no space"):
        found.extend(ahead([lambda: 1, fail, lambda: 3]))
    assert found == [1]

    done: list[int] = []

    def write_all() -> None:
        with Behind() as behind:
            behind.call(fail)
            for k in range(10):
                behind.call(time.sleep, 0.01)
                behind.call(done.append, k)

    with pytest.raises(OSError, match="no space"):
        write_all()
    assert len(done) < 10


def test_an_error_of_the_caller_stops_what_has_not_begun() -> None:
    begun, end = threading.Event(), []

    def long(behind: Behind) -> None:
        begun.set()
        behind.stopped.wait(60)
        end.append(behind.stopped.is_set())

    def run() -> None:
        with Behind() as behind:
            behind.call(long, behind)
            behind.call(end.append, "not begun")
            begun.wait(60)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert end == [True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nmsolve-")]


def test_a_reader_that_is_left_early_ends() -> None:
    pieces = ahead((lambda k=k: k) for k in range(1000))
    assert next(pieces) == 0
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("nmsolve-ahead")]


def test_what_stands_behind_a_failed_call_is_not_done() -> None:
    """It was handed over before anyone knew of the failure."""
    waiting, done = threading.Event(), []

    def fail() -> None:
        waiting.wait(10)
        raise OSError("no space")

    def run() -> None:
        with Behind() as behind:
            behind.call(fail)
            behind.call(done.append, 1)
            waiting.set()

    with pytest.raises(OSError, match="no space"):
        run()
    assert done == []
