"""The processes that share a piece of work: those that torchrun started, or this one alone.

What they tell each other goes, as JSON, through the store that torchrun offers. Who waits there looks around:
a signal ends the wait, and so does what another rank failed with. Collectives on tensors, which hear of
neither, are made only for those who ask for them (:meth:`Ranks.collectives`).
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from nmsolve.errors import NMSolveError, WorkFailed, one_line

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["ALONE", "Ranks", "joined", "started"]

# Seconds: between looks while waiting, the first and the longest; and for the last words of ranks that end.
_LOOK, _LONGEST_LOOK = 0.002, 0.1
_FAREWELL = 5.0

# Seconds between signs of life, and without any until a rank that others wait for is given up. torchrun ends
# those on its host when one has died, but not those on others.
_BEAT, _SILENCE = 5.0, 120.0

_CONNECTING = datetime.timedelta(seconds=15)


class Ranks:
    """One of the processes that share a piece of work; all of them make the same calls in the same order.

    Attributes
    ----------
    rank, count : int
        Which of how many processes this is.
    local : int
        Which of those on this host.
    """

    def __init__(self, rank: int = 0, count: int = 1, local: int = 0, store: Store | None = None) -> None:
        assert count == 1 or store is not None
        self.rank, self.count, self.local = rank, count, local
        self._store = store
        self._steps = 0
        self._ended_by: BaseException | None = None

    @property
    def name(self) -> str:
        """For messages: ``rank 1 of 4``."""
        return f"rank {self.rank} of {self.count}"

    # --- what all hear --------------------------------------------------------------------------------------

    def first(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns on rank 0, to all; the others do not call it. It is what JSON makes of it."""
        if self.count == 1:
            return work()
        step = self._next()
        if self.rank == 0:
            text = json.dumps(work())
            with self._reached() as store:
                store.set(step, text)
            return json.loads(text)
        return self._heard(step, 0)

    def gather(self, value: Any, waiting: Callable[[], object] | None = None) -> list[Any]:
        """What each rank gives, by rank, once all have; it is what JSON makes of it.

        ``waiting`` is called now and then until then.
        """
        if self.count == 1:
            return [value]
        step = self._next()
        with self._reached() as store:
            store.set(f"{step}/{self.rank}", json.dumps(value))
        return [self._heard(f"{step}/{rank}", rank, waiting) for rank in range(self.count)]

    def add(self, name: str, amount: int) -> int:
        """Adds to a number that all ranks add to, and returns it; waits for no one."""
        if self.count == 1:
            return amount
        with self._reached() as store:
            return store.add(f"sum/{name}", amount)

    def _next(self) -> str:
        self._steps += 1
        return f"step/{self._steps}"

    def _heard(self, key: str, rank: int, waiting: Callable[[], object] | None = None) -> Any:
        """What another rank put there; waits for it."""
        pause = _LOOK
        beats, last = -1, time.monotonic()
        with self._reached() as store:
            while not store.check([key]):
                self.check()
                if waiting is not None:
                    waiting()
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_LOOK)
                if (now := store.add(f"beats/{rank}", 0)) != beats:
                    beats, last = now, time.monotonic()
                elif time.monotonic() > last + _SILENCE:
                    raise _lost(f"rank {rank} of {self.count} has given no sign of life for {_SILENCE:.0f} s")
            return json.loads(store.get(key))

    def _shared(self) -> Store:
        assert self._store is not None
        return self._store

    @contextmanager
    def _reached(self) -> Iterator[Store]:
        """The store, for calls that fail where it is gone."""
        import torch.distributed as dist

        try:
            yield self._shared()
        except dist.DistError as error:
            raise _lost("the other ranks cannot be reached any more") from error

    # --- failing together -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises what another rank failed with, if one has (see :meth:`agreed`)."""
        if self.count == 1:
            return
        with self._reached() as store:
            if store.check(["failed"]):
                raise self._what_failed()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What ends the block on one rank ends it on all, as soon as they look around.

        The first failure counts: every rank raises it, NMSolveError where it is the fault of an argument,
        KeyboardInterrupt for a signal, else WorkFailed; the rank that failed raises its own exception.
        """
        try:
            yield
        except BaseException as error:
            if self._store is None or self._ended_by is not None:
                raise
            self._ended_by = error
            first = self._tell(error)
            if first is not None:
                self._ended_by = first
                raise first from error
            raise

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors of the block are those of this rank: messages that others hear name it."""
        try:
            yield
        except Exception as error:
            if self.count > 1 and not hasattr(error, "of_rank"):
                error.of_rank = self.name  # type: ignore[attr-defined]
            raise

    def _tell(self, error: BaseException) -> BaseException | None:
        """Tells the others; what one of them has told before, if one has."""
        store, left = self._shared(), getattr(error, "left_behind", None)
        with suppress(RuntimeError):  # the store is gone, and with it the others
            if store.add("failures", 1) == 1:
                store.set("failed", json.dumps([_kind(error), _text(error), left]))
            elif self._wait_a_little(lambda: store.check(["failed"])):
                return self._what_failed()
        return None

    def _what_failed(self) -> BaseException:
        kind, text, left = json.loads(self._shared().get("failed"))
        error: BaseException = _KINDS[kind](*[text] if text else [])
        error.of_rank = None  # type: ignore[attr-defined]  # the text has its name
        error.left_behind = left  # type: ignore[attr-defined]
        return error

    def once(self, act: Callable[[], None]) -> None:
        """One rank, the first to come here, calls ``act``; the others wait for it a few seconds at most.

        To be called once, and for the last words: of ranks that failed, some may not come.
        """
        if self._store is None:
            act()
            return
        try:
            mine = self._store.add("once", 1) == 1
        except RuntimeError:
            mine = True
        if mine:
            act()
            with suppress(RuntimeError):
                self._store.set("once/done", "")
        else:
            self._wait_a_little(lambda: self._shared().check(["once/done"]))

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Gives signs of life in the block, from a thread; without them those who wait give this rank up."""
        ended = threading.Event()

        def beat() -> None:
            with suppress(RuntimeError):  # the store is gone
                while not ended.is_set():
                    self._shared().add(f"beats/{self.rank}", 1)
                    ended.wait(_BEAT)

        thread = threading.Thread(target=beat, name="nmsolve-alive", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(_FAREWELL)

    # --- tensors --------------------------------------------------------------------------------------------

    @contextmanager
    def collectives(
        self, backend: str = "gloo", timeout: datetime.timedelta = datetime.timedelta(minutes=30)
    ) -> Iterator[None]:
        """A process group of torch.distributed for the block, if there is none yet.

        ``timeout`` is that of its collectives. Where a rank dies before all are connected, the others end
        as they do wherever they wait, and after 15 s at the latest.
        """
        import torch.distributed as dist

        if self._store is None or dist.is_initialized():
            yield
            return
        self.gather(None)
        self._connect(backend)
        try:
            # Public since PyTorch 2.15.
            set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
            set_timeout(timeout)
            yield
        finally:
            dist.destroy_process_group()

    def _connect(self, backend: str) -> None:
        """Makes the group of all ranks, in a thread and with a connection to the store of its own.

        Who waits there, in C++, hears neither of signals nor of ranks that failed; where a rank dies once it
        has told its address, gloo waits for five times the timeout.
        """
        import torch.distributed as dist

        with self._reached() as shared:
            clone: Store = shared.clone()  # type: ignore[attr-defined]
        store = dist.PrefixStore("collectives", clone)
        store.set_timeout(_CONNECTING)  # of what gloo asks for without a limit
        problems: list[BaseException] = []

        def connect() -> None:
            try:
                dist.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.count, timeout=_CONNECTING
                )
            except BaseException as error:
                problems.append(error)

        thread = threading.Thread(target=connect, name="nmsolve-connect", daemon=True)
        thread.start()
        limit = _CONNECTING.total_seconds()
        end = time.monotonic() + limit
        while thread.is_alive():
            thread.join(_LONGEST_LOOK)
            self.check()
            if time.monotonic() > end:
                raise _lost(f"not all of {self.count} ranks were connected within {limit:g} s")
        for error in problems:
            if not isinstance(error, RuntimeError):
                raise error
            raise _lost(f"the other ranks cannot be reached: {one_line(error)}") from error

    # --- the end --------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """The end of the common work: no rank takes the store, or the whole run, from others too early."""
        if self._store is None or isinstance(self._ended_by, KeyboardInterrupt):
            return
        try:
            self._store.add("left", 1)
        except RuntimeError:
            return
        if self.rank == 0 or self._ended_by is not None:
            self._wait_a_little(lambda: self._shared().add("left", 0) >= self.count)

    def _wait_a_little(self, done: Callable[[], bool]) -> bool:
        """Whether it is so within some seconds."""
        end = time.monotonic() + _FAREWELL
        with suppress(RuntimeError):
            while not done():
                if time.monotonic() > end:
                    return False
                time.sleep(0.02)
        return True


ALONE = Ranks()
"""This process without others."""

_KINDS: dict[str, type[BaseException]] = {
    "argument": NMSolveError,
    "failed": WorkFailed,
    "interrupted": KeyboardInterrupt,
}


def _kind(error: BaseException) -> str:
    if isinstance(error, NMSolveError):
        return "failed" if isinstance(error, WorkFailed) else "argument"
    return "failed" if isinstance(error, Exception) else "interrupted"


def _text(error: BaseException) -> str:
    if not isinstance(error, Exception):
        return str(error.args[0]) if error.args else ""
    if isinstance(error, NMSolveError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {one_line(error)}"
    rank = getattr(error, "of_rank", None)
    return f"{rank}: {text}" if rank else text


def _lost(text: str) -> WorkFailed:
    """Others are gone; this is no error of the rank that finds it."""
    error = WorkFailed(text)
    error.of_rank = None  # type: ignore[attr-defined]
    return error


def started() -> tuple[int, int, int]:
    """The rank of this process, how many torchrun started, and its number among those on this host."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, 0
    rank, local = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    return rank, int(os.environ.get("WORLD_SIZE", "1")), local


_joins = 0


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the other processes that torchrun started, or those of torch.distributed's group if there is one.

    All of them have to. Alone, nothing is joined, and torch is not imported.

    Examples
    --------
    >>> with joined() as ranks:
    ...     ranks.count, ranks.gather("word")
    (1, ['word'])
    """
    global _joins
    rank, count, local = started()
    if _grouped():
        import torch.distributed as dist

        rank, count = dist.get_rank(), dist.get_world_size()
        local = dist.get_node_local_rank(fallback_rank=rank)
        store = dist.distributed_c10d._get_default_store()
    elif count > 1:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        store, rank, count = next(rendezvous("env://"))
    if count == 1:
        yield ALONE
        return
    _joins += 1
    ranks = Ranks(rank, count, local, dist.PrefixStore(f"nmsolve/{_joins}", store))
    try:
        with ranks.alive():
            yield ranks
    finally:
        ranks.leave()


def _grouped() -> bool:
    """Whether this process is in a group of torch.distributed."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()
