"""Processes that share work: here threads that share a store, as processes do with torchrun's."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from nmsolve import NMSolveError
from nmsolve.errors import WorkFailed
from nmsolve.ranks import ALONE, Ranks, joined, started


def stores(kind: str, count: int, folder: Path) -> list[distributed.Store]:
    """One for each rank."""
    if kind == "file":
        return [distributed.FileStore(str(folder / "store"), count) for _ in range(count)]
    first = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    others = [
        distributed.TCPStore("localhost", first.port, is_master=False, wait_for_workers=False)
        for _ in range(count - 1)
    ]
    return [first, *others]


@pytest.fixture(params=["tcp", "file"])
def together(request, tmp_path):
    """Calls a function as several ranks do; what each returned or raised."""

    def run(count: int, act: Callable[[Ranks], Any]) -> list[Any]:
        def as_rank(rank: int, store: distributed.Store) -> Any:
            ranks = Ranks(rank, count, rank, store)
            try:
                with ranks.agreed():
                    return act(ranks)
            except BaseException as error:
                return error
            finally:
                ranks.leave()

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(as_rank, range(count), stores(request.param, count, tmp_path)))

    return run


def told(outcomes: list[Any]) -> list[tuple[type, str]]:
    return [(type(error), str(error)) for error in outcomes]


def test_what_ranks_tell_each_other(together):
    called = []

    def act(ranks: Ranks) -> Any:
        value = ranks.first(lambda: called.append(ranks.rank) or {"value": [ranks.rank, None, "ä"]})
        everyone = ranks.gather(ranks.rank**2)
        ranks.add("bytes", 10 + ranks.rank)
        ranks.gather(None)
        return value, everyone, ranks.add("bytes", 0), ranks.gather("last")

    assert together(3, act) == [({"value": [0, None, "ä"]}, [0, 1, 4], 33, ["last"] * 3)] * 3
    assert called == [0]


def test_a_fault_that_the_first_finds_is_everyones(together):
    def act(ranks: Ranks) -> None:
        def check() -> None:
            raise NMSolveError("out: no")

        ranks.first(check)

    assert told(together(3, act)) == [(NMSolveError, "out: no")] * 3


def test_a_failure_of_one_ends_all_and_names_it(together):
    """The others wait for what the failed rank never gives, or look around between pieces of work."""

    def act(ranks: Ranks) -> None:
        with ranks.named():
            if ranks.rank == 1:
                error = OSError(28, "No space left on device", "/disk/file")
                error.left_behind = "there is more"  # type: ignore[attr-defined]
                raise error
            while ranks.rank == 2:
                ranks.check()
                time.sleep(0.01)
            ranks.gather("done")

    first, own, third = together(3, act)
    assert isinstance(own, OSError)
    assert own.of_rank == "rank 1 of 3"
    for error in (first, third):
        assert isinstance(error, WorkFailed)
        assert str(error) == "rank 1 of 3: No space left on device: /disk/file"
        assert error.left_behind == "there is more"


@pytest.mark.parametrize("error", [NMSolveError("device: cuda is not here"), KeyboardInterrupt("kept")])
def test_a_failure_keeps_its_kind(together, error):
    def act(ranks: Ranks) -> None:
        with ranks.named():
            if ranks.rank == 1:
                raise error
            ranks.gather(None)

    first, own = together(2, act)
    assert own is error
    assert type(first) is type(error)
    name = "rank 1 of 2: " if isinstance(error, NMSolveError) else ""
    assert str(first) == f"{name}{error}"


def test_of_several_failures_the_first_counts(together):
    def act(ranks: Ranks) -> None:
        with ranks.agreed(), ranks.named():
            raise RuntimeError(f"I am {ranks.rank}")

    outcomes = together(4, act)
    own = [rank for rank, error in enumerate(outcomes) if type(error) is RuntimeError]
    assert len(own) == 1
    text = f"rank {own[0]} of 4: RuntimeError: I am {own[0]}"
    assert [str(error) for error in outcomes if type(error) is WorkFailed] == [text] * 3


def test_one_rank_speaks_for_all(together):
    said = []

    def act(ranks: Ranks) -> int:
        ranks.once(lambda: (time.sleep(0.1), said.append(ranks.rank)))
        return len(said)

    assert together(4, act) == [1] * 4


def test_those_whom_nobody_answers_end(tmp_path, monkeypatch):
    """Of two ranks one has died without a word."""
    monkeypatch.setattr("nmsolve.ranks._FAREWELL", 0.1)
    ranks = Ranks(0, 2, 0, stores("tcp", 2, tmp_path)[0])
    with pytest.raises(RuntimeError, match="own"), ranks.agreed():
        raise RuntimeError("own")
    ranks.leave()


def test_a_rank_without_a_sign_of_life_is_given_up(tmp_path, monkeypatch):
    """One that works for long is not, though others wait for it."""
    monkeypatch.setattr("nmsolve.ranks._FAREWELL", 0.1)
    monkeypatch.setattr("nmsolve.ranks._BEAT", 0.05)
    monkeypatch.setattr("nmsolve.ranks._SILENCE", 2)
    first, second = stores("tcp", 2, tmp_path)
    waiting, working = Ranks(0, 2, 0, first), Ranks(1, 2, 1, second)

    def work() -> None:
        with working.alive():
            time.sleep(3)
            working.gather("done")

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        assert waiting.gather("first") == ["first", "done"]
        done.result()
    with pytest.raises(WorkFailed, match="rank 1 of 2 has given no sign of life"), waiting.agreed():
        waiting.gather("second")


def test_a_store_that_is_gone(tmp_path):
    server, client = stores("tcp", 2, tmp_path)
    ranks, said = Ranks(1, 2, 1, client), []
    ranks.check()
    del server
    with pytest.raises(WorkFailed, match="the other ranks cannot be reached"), ranks.agreed():
        ranks.gather(None)
    ranks.once(lambda: said.append("still said"))
    ranks.leave()
    assert said == ["still said"]


def test_alone(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # not torchrun's: others use this variable, too
    assert started() == (0, 1, 0)
    with joined() as ranks, ranks.agreed(), ranks.named():
        assert ranks is ALONE
        assert (ranks.first(lambda: (1, 2)), ranks.gather("x"), ranks.add("n", 3)) == ((1, 2), ["x"], 3)
        ranks.check()
    with pytest.raises(KeyError), ALONE.agreed():
        raise KeyError
    with ALONE.collectives():
        assert not distributed.is_initialized()


# Without torchrun; tests/cli/test_mask_ranks.py is about torchrun's ranks.
GROUP = """
import sys
import torch
from torch import distributed
from nmsolve.ranks import joined

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
for turn in range(2):  # what was said before is not heard again
    with joined() as ranks, ranks.agreed(), ranks.collectives():
        values = torch.tensor([ranks.rank + 1])
        distributed.all_reduce(values)
        assert ranks.gather([turn, ranks.rank]) == [[turn, 0], [turn, 1]], turn
        assert int(values) == 3
assert distributed.is_initialized()
"""


def test_joining_a_group_of_torch_distributed(tmp_path):
    commands = [[sys.executable, "-c", GROUP, str(rank), str(tmp_path)] for rank in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error


@pytest.fixture
def unconnected(monkeypatch):
    """Ranks that are never connected: gloo waits for a rank that has died."""
    ended = threading.Event()
    monkeypatch.setattr(distributed, "init_process_group", lambda *args, **options: ended.wait(60))
    yield
    ended.set()


def test_what_a_rank_fails_with_ends_those_that_wait_to_be_connected(together, unconnected):
    def act(ranks: Ranks) -> None:
        if ranks.rank == 1:
            ranks.gather(None)
            raise WorkFailed("no memory")
        with ranks.collectives():
            pass

    assert told(together(3, act)) == [(WorkFailed, "no memory")] * 3


def test_connecting_has_an_end(together, unconnected, monkeypatch):
    monkeypatch.setattr("nmsolve.ranks._CONNECTING", timedelta(seconds=0.5))

    def act(ranks: Ranks) -> None:
        with ranks.collectives():
            pass

    message = "not all of 2 ranks were connected within 0.5 s"
    assert told(together(2, act)) == [(WorkFailed, message)] * 2
