"""The work of :func:`nmsolve.checkpoint.mask_checkpoint`: in pieces, by one process, by parts or by ranks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nmsolve.about import __version__
from nmsolve.backends.dispatch import select
from nmsolve.checkpoint.format import output_names
from nmsolve.checkpoint.output import publish
from nmsolve.checkpoint.units import Unit, deal, input_identity, units_of
from nmsolve.errors import NMSolveError, WorkFailed, begun, printable
from nmsolve.files import Interrupts, check_space
from nmsolve.ranks import Ranks
from nmsolve.unfinished import Unfinished

if TYPE_CHECKING:
    from tqdm import tqdm

    from nmsolve.checkpoint.masking import Output
    from nmsolve.checkpoint.on_disk import Prepared
    from nmsolve.checkpoint.report import MaskedTensor, Report
    from nmsolve.checkpoint.slabs import MaskSettings

__all__ = ["Job", "Work", "mask_together"]


@dataclass(frozen=True)
class Work:
    """Who does it, how it shows itself, and what ends it."""

    progress: bool | None
    interrupts: Interrupts
    ranks: Ranks


class Job:
    """The masks of a checkpoint, once it is certain that they can be made: pieces of work, and their end."""

    def __init__(
        self,
        prepared: Prepared,
        settings: MaskSettings,
        globs: dict[str, list[str]],
        names: tuple[str, str, str],
        overwrite: bool,
    ) -> None:
        """``names`` are what the user calls the input, the output and the device."""
        assert prepared.out is not None
        self.checkpoint, self.target, self.selection = prepared.checkpoint, prepared.out, prepared.selection
        self.settings, self.overwrite = settings, overwrite
        self.units = units_of(self.checkpoint)
        *self._names, device = names
        self._started = time.perf_counter()
        self._identity = input_identity(self.checkpoint)
        chosen = select(settings.backend, settings.device, settings.pattern.m)
        self._settings: dict[str, Any] = {
            "pattern": str(settings.pattern),
            "transposable": settings.transposable,
            "method": settings.method if settings.transposable else "ordinary",
            "backend": settings.backend,
            "device": device,
            "certificate": settings.certificate,
            **globs,
            "chosen_by": self.selection.chosen_by,
        }
        masked = [(item.entry.name, repr(item.layout)) for item in self.selection.masked]
        kind = settings.device.partition(":")[0]
        decides = [__version__, self._identity, {**self._settings, "device": kind}, chosen.name, masked]
        self.key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:12]

    @contextmanager
    def held(self, *, shared: bool) -> Iterator[Unfinished]:
        """The folder in which the work goes on."""
        from nmsolve.checkpoint.masking import bytes_needed

        with Unfinished(self.target, self.key, shared=shared) as unfinished:
            needed = bytes_needed(self.checkpoint, self.selection) - unfinished.taken()
            check_space(self.target.parent, needed)
            yield unfinished

    def _output(self, unfinished: Unfinished) -> Output:
        from nmsolve.checkpoint.masking import Output

        return Output(self.checkpoint, self.selection, self.settings, unfinished.result, self.target)

    def left(self, unfinished: Unfinished) -> list[Unit]:
        """The units that are not finished. One whose files have gone since is not."""
        output = self._output(unfinished)
        there = {shard.path.name: output.is_there(shard) for shard in self.checkpoint.shards}
        left: list[Unit] = []
        for unit in self.units:
            if not there[unit.shard.path.name]:
                unfinished.forget(_note(unit))
            if unfinished.finished(_note(unit)) is None:
                left.append(unit)
        return left

    def mask(self, units: Sequence[Unit], unfinished: Unfinished, progress: _Progress) -> None:
        """Does units."""
        from nmsolve.checkpoint.masking import write_units

        def finished(unit: Unit, rows: Iterable[MaskedTensor]) -> None:
            unfinished.finish(_note(unit), json.dumps([asdict(row) for row in rows]))

        write_units(self._output(unfinished), units, finished, progress.step)

    def mask_part(self, part: tuple[int, int], work: Work) -> Report:
        """Does the K-th of OF parts; what was done in it."""
        with self.held(shared=True) as unfinished:
            numbers = {unit.number for unit in self.left(unfinished)}
            mine = deal(self.units, part[1])[part[0] - 1]
            with _kept(unfinished):
                left = [unit for unit in mine if unit.number in numbers]
                with _progress(left, work) as progress:
                    self.mask(left, unfinished, progress)
                return self.report(unfinished, mine)

    def merge(self, work: Work) -> Report:
        """Puts in place what the parts have done."""
        with self.held(shared=False) as unfinished:
            left = self.left(unfinished)
            if left:
                raise NMSolveError(
                    f"merge: {len(left)} of {len(self.units)} pieces for this input and these settings "
                    f"are not done, the first is {left[0].name}; "
                    "the same command without merge=True does them"
                )
            with _kept(unfinished):
                return self.publish(unfinished, work)

    def report(self, unfinished: Unfinished, units: Iterable[Unit]) -> Report:
        """What was done in these units, and all that is left dense."""
        from nmsolve.checkpoint.report import MaskedTensor, Report, SkippedTensor

        rows = [json.loads(unfinished.finished(_note(unit)) or "[]") for unit in units]
        return Report(
            input=self._names[0],
            output=self._names[1],
            settings=self._settings,
            tensors=[MaskedTensor(**{**row, "shape": tuple(row["shape"])}) for unit in rows for row in unit],
            skipped=[
                SkippedTensor(entry.name, shard.path.name, entry.shape, entry.dtype, reason)
                for shard, entry, reason in self.selection.skipped
            ],
            files_left_out=[path.as_posix() for path in self.checkpoint.left_out],
            seconds=time.perf_counter() - self._started,
        )

    def check_seen(self, unfinished: Unfinished) -> None:
        """Raises if the pieces of other ranks are not here."""
        left = self.left(unfinished)
        if left:
            raise WorkFailed(
                f"{len(left)} of {len(self.units)} pieces that other ranks have done are not in "
                f"{unfinished.path}, the first is {left[0].name}: all hosts have to see the same files"
            )

    def publish(self, unfinished: Unfinished, work: Work) -> Report:
        """Adds what is not weights, and puts all in place."""
        if input_identity(self.checkpoint) != self._identity:
            raise WorkFailed(f"{self.checkpoint.root}: the input changed while it was read")
        if self.checkpoint.is_folder:
            for path in self.checkpoint.extras:  # a run that was killed may have left half of one
                (unfinished.result / path).unlink(missing_ok=True)
            self.checkpoint.copy_extras(unfinished.result, lambda name: work.interrupts.check())
        report = self.report(unfinished, self.units)
        report.write(self._output(unfinished).report)
        publish(self.checkpoint, unfinished, output_names, self.overwrite, work.interrupts)
        return report


def mask_together(begin: Callable[[], Job], work: Work) -> Report:
    """All of it, by the ranks that there are; what was masked, on other ranks than the first by themselves.

    The first rank checks, tells what is left to do, and puts all in place; each does its share in between.
    """
    ranks = work.ranks
    with ExitStack() as stack:
        job, unfinished, left = (_led if ranks.rank == 0 else _followed)(begin, ranks, stack)
        ranks.gather(None)  # until here nothing was begun
        with ranks.named(), _kept(unfinished):
            mine = deal(left, ranks.count)[ranks.rank]
            with _progress(left, work) as progress:
                job.mask(mine, unfinished, progress)
                report = job.report(unfinished, mine)
                if ranks.rank > 0:
                    unfinished.release()
                ranks.gather(None, progress.look)

            def publish() -> None:
                nonlocal report
                if ranks.count > 1:
                    unfinished.alone()
                    job.check_seen(unfinished)
                report = job.publish(unfinished, work)

            ranks.first(publish)
            return report


_Begun = tuple[Job, Unfinished, list[Unit]]


def _led(begin: Callable[[], Job], ranks: Ranks, stack: ExitStack) -> _Begun:
    job = begin()
    unfinished = stack.enter_context(job.held(shared=False))
    left = job.left(unfinished)
    if ranks.count > 1:
        unfinished.share()
    ranks.first(lambda: [job.key, [unit.number for unit in left]])
    return job, unfinished, left


def _followed(begin: Callable[[], Job], ranks: Ranks, stack: ExitStack) -> _Begun:
    """Begins at the same time; what is wrong everywhere the first rank says."""
    problem: Exception | None = None
    try:
        job = begin()
    except Exception as error:
        problem = error
    key, numbers = ranks.first(lambda: None)
    with ranks.named():
        if problem is not None:
            raise problem
        if job.key != key:
            raise NMSolveError(
                "the input or the backend is not that of rank 0: all hosts have to see the same files, "
                "and to have devices of one kind"
            )
        unfinished = stack.enter_context(job.held(shared=True))
    return job, unfinished, [job.units[number] for number in numbers]


class _Progress:
    """A bar with the bytes that all ranks have done; whoever tells it looks what the others do."""

    def __init__(self, bar: tqdm[Any], work: Work) -> None:
        self._bar, self._work = bar, work
        self._new = self._all = 0
        self._next = 0.0

    def step(self, done: int, name: str) -> None:
        """So many more bytes are done, of a tensor; raises what ends the run."""
        self._work.interrupts.check()
        self._bar.set_description_str(printable(name), refresh=False)
        self._new += done
        if self._work.ranks.count == 1 or time.monotonic() >= self._next:
            self.look()
            self._next = time.monotonic() + _LOOK

    def look(self) -> None:
        """Shows what all have done; raises what another rank failed with."""
        ranks, new, self._new = self._work.ranks, self._new, 0
        ranks.check()
        self._all = ranks.add("bytes", new) if ranks.count > 1 else self._all + new
        self._bar.update(self._all - self._bar.n)


_LOOK = 0.2  # seconds


@contextmanager
def _progress(units: Sequence[Unit], work: Work) -> Iterator[_Progress]:
    """Of the work on these units, shown by the first rank."""
    from tqdm import tqdm

    total = sum(unit.nbytes for unit in units)
    disable = None if work.progress is None else not work.progress
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=disable if work.ranks.rank == 0 else True,
    ) as bar:
        yield _Progress(bar, work)


@contextmanager
def _kept(unfinished: Unfinished) -> Iterator[None]:
    """Work that has begun: what ends it says what is kept."""
    try:
        with begun():
            yield
    except BaseException as error:
        if unfinished.keeps():
            # Errors of any kind keep their type; the command line tells it behind the message.
            error.left_behind = (  # type: ignore[attr-defined]
                f"what is finished is in {unfinished.path}: the same command goes on, or delete that folder"
            )
        raise


def _note(unit: Unit) -> str:
    return f"{unit.number}.json"
