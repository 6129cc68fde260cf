"""What test_mask_ranks.py runs: ``nmsolve mask`` by several ranks, against one process.

    python tests/support/mask_spread.py FOLDER [cases] SEED...

The cases, and for each seed a run of which one rank is killed at a random moment.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path

import torch
from checkpoints import llama, save_sharded
from forked_ranks import Ended, launch, run_cases
from mask_command import contents
from safetensors.torch import save_file

import nmsolve.checkpoint.masking
import nmsolve.checkpoint.slabs
import nmsolve.checkpoint.units
from nmsolve.checkpoint import mask_checkpoint
from nmsolve.checkpoint.streams import PlacedWriter
from nmsolve.cli import main

SETTINGS = ("--pattern", "8:16", "--transposable", "--backend", "torch")
TENSOR = "model.layers.1.mlp.up_proj.weight"

CASES: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


class Place:
    """A model in several files, each of several pieces, and what one process makes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.source, self.out = folder, folder / "in", folder / "out"
        folder.mkdir(parents=True)
        (folder / "logs").mkdir()
        save_sharded(self.source, llama())
        assert main(["mask", str(self.source), *SETTINGS, "--out", str(folder / "whole"), "--quiet"]) == 0
        self.expected = contents(folder / "whole")
        shutil.rmtree(folder / "whole")

    def mask(self, count: int, *options: str, **hooks: Callable) -> Ended:
        arguments = ["mask", str(self.source), *SETTINGS, "--out", str(self.out), *options]
        return launch(count, arguments, self.folder / "logs", **hooks)

    def names(self) -> list[str]:
        return sorted({path.name for path in self.folder.iterdir()} - {"in", "logs"})

    def notes(self) -> list[str]:
        """The pieces that are finished, of a run that was not."""
        return sorted(path.name for path in self.folder.glob(".out.unfinished-*/finished/[!.]*"))

    def complete(self, count: int) -> None:
        """Goes on as so many ranks, and finds what one process makes."""
        if count == 0:
            assert main(["mask", str(self.source), *SETTINGS, "--out", str(self.out), "--quiet"]) == 0
        else:
            ended = self.mask(count)
            assert ended.codes == [0] * count, ended
        found = contents(self.out)
        assert found.keys() == self.expected.keys()
        for name, data in found.items():
            assert data == self.expected[name], f"{name}\n{data[:3000]}\n{self.expected[name][:3000]}"
        assert self.names() == ["out"]


def slow(seconds: float) -> Callable[[int], None]:
    """Solving takes longer, so that there is a middle of it."""

    def prepare(rank: int) -> None:
        solve = nmsolve.checkpoint.slabs.transposable_mask

        def solve_slowly(*args, **options):
            time.sleep(seconds)
            return solve(*args, **options)

        nmsolve.checkpoint.slabs.transposable_mask = solve_slowly

    return prepare


# ---- what is done ---------------------------------------------------------------------------------------


@case
def ranks_make_what_one_process_makes(folder: Path) -> None:
    place = Place(folder)
    for count in (1, 2, 4, 12):  # at last more than pieces
        ended = place.mask(count)
        assert ended.codes == [0] * count, ended
        assert contents(place.out) == place.expected, count
        assert place.names() == ["out"]
        assert ended.err == "", ended.err
        assert ended.out.count("14 tensors") == ended.out.count("wrote ") == 1, ended.out
        shutil.rmtree(place.out)
    ended = place.mask(2, "--quiet", "--certificate", "off")
    assert (ended.codes, ended.out, ended.err) == ([0, 0], "", "")


@case
def one_file(folder: Path) -> None:
    place = Place(folder)
    save_file(llama(torch.float32), folder / "model.safetensors")
    made = []
    for count in (1, 3):
        out = folder / f"by{count}" / "sparse.safetensors"
        out.parent.mkdir()
        arguments = ["mask", str(folder / "model.safetensors"), *SETTINGS, "--out", str(out), "--quiet"]
        assert launch(count, arguments, folder / "logs").codes == [0] * count
        made.append({p.name: p.read_bytes() for p in out.parent.iterdir() if p.suffix == ".safetensors"})
    assert made[0] == made[1]
    assert len(made[0]) == 2
    assert place.names() == ["by1", "by3", "model.safetensors"]


@case
def odd_files(folder: Path) -> None:
    """One without tensors, one with a single large tensor, one with an empty tensor."""
    place = Place(folder)
    shutil.rmtree(place.source)
    place.source.mkdir()
    torch.manual_seed(0)
    files = [
        {},
        {"fc.weight": torch.randn(2048, 512)},
        {"none.weight": torch.empty(0, 16), "b": torch.ones(3)},
    ]
    names = [f"model-{number}-of-3.safetensors" for number in (1, 2, 3)]
    for name, state in zip(names, files, strict=True):
        save_file(state, place.source / name, {"format": "pt"})
    weight_map = {key: name for name, state in zip(names, files, strict=True) for key in state}
    (place.source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    alone = place.mask(1)
    assert alone.codes == [0], alone
    expected = contents(place.out)
    for count in (2, 5):
        shutil.rmtree(place.out)
        assert place.mask(count).codes == [0] * count
        assert contents(place.out) == expected


@case
def every_rank_does_a_share_of_the_bytes(folder: Path) -> None:
    """No rank does more than the mean and the largest piece."""
    place = Place(folder)

    def count_bytes(rank: int) -> None:
        write = nmsolve.checkpoint.masking.write_units

        def counted(output, units, *rest):
            units = list(units)
            sizes = [unit.nbytes for unit in units]
            (folder / f"share{rank}").write_text(json.dumps(sizes))
            write(output, units, *rest)

        nmsolve.checkpoint.masking.write_units = counted

    assert place.mask(3, prepare=count_bytes).codes == [0, 0, 0]
    shares = [json.loads((folder / f"share{rank}").read_text()) for rank in range(3)]
    whole = sum(tensor.numel() * 2 for tensor in llama().values())
    assert sum(map(sum, shares)) == whole
    assert max(map(sum, shares)) <= whole / 3 + max(map(max, shares))


@case
def a_dry_run_is_printed_once(folder: Path) -> None:
    place = Place(folder)
    ended = place.mask(3, "--dry-run")
    assert ended.codes == [0, 0, 0]
    assert ended.out.count(f"  {TENSOR}  ") == 1
    assert ended.out.count("tensors would be masked") == 1
    assert place.names() == []


# ---- what is refused, told once -------------------------------------------------------------------------

REFUSED = {
    "pattern": (["--pattern", "half"], "--pattern: "),
    "include": (["--include", "nothing*"], "--include: 'nothing*' matches none"),
    "device": (["--device", "cuda:99"], "--device: cuda:99 is not here"),
    "option": (["--bogus"], "unrecognized arguments: --bogus"),
    "part": (["--part", "1/2"], "--part: not for 2 ranks"),
    "merge": (["--merge"], "--merge: not for 2 ranks"),
    "dry run": (["--dry-run", "--exclude", "*"], "nothing to mask"),
    "out": ([], "out exists; --overwrite replaces it"),
}


@case
def what_is_refused_is_told_once(folder: Path) -> None:
    place = Place(folder)
    for name, (options, message) in REFUSED.items():
        if name == "out":
            place.out.mkdir()
        ended = place.mask(2, *options)
        assert message in ended.error(), (name, ended)
        # The one that waits for the other's last words may meet the signal of torchrun.
        assert set(ended.codes) - {-signal.SIGTERM} == {2}, (name, ended)
        assert place.names() == (["out"] if name == "out" else []), name


@case
def a_rank_that_sees_something_else(folder: Path) -> None:
    place = Place(folder)

    def touch(rank: int) -> None:
        if rank == 1:
            nmsolve.checkpoint.job.input_identity = lambda checkpoint: "of another file"

    ended = place.mask(2, prepare=touch)
    assert "rank 1 of 2: the input or the backend is not that of rank 0" in ended.error()
    assert ended.codes == [2, 2]
    assert place.names() == []


@case
def others_are_at_work(folder: Path) -> None:
    place = Place(folder)
    told = io.StringIO()

    def another(pids: list[int]) -> bool:
        if not place.notes():
            return False
        with redirect_stderr(told):
            assert main(["mask", str(place.source), *SETTINGS, "--out", str(place.out), "--quiet"]) == 2
        return True

    ended = place.mask(2, prepare=slow(0.1), meanwhile=another)
    assert "another process is at work in" in told.getvalue()
    assert ended.codes == [0, 0], ended
    assert contents(place.out) == place.expected


# ---- failing --------------------------------------------------------------------------------------------


@case
def weights_that_are_not_finite_end_all(folder: Path) -> None:
    place = Place(folder)
    shutil.rmtree(place.source)
    state = llama()
    state[TENSOR][3, 5] = float("nan")
    save_sharded(place.source, state)
    ended = place.mask(4, prepare=slow(0.02))
    message = ended.error()
    assert "nmsolve: error: rank " in message, ended
    assert f" of 4: {TENSOR}, weights 0 to 2559: expected finite values, got 1 NaN" in message, message
    assert ended.codes == [1] * 4, ended
    assert ended.seconds < 60


@case
def a_full_disk_of_one_rank_ends_all(folder: Path) -> None:
    for number, text in ((errno.ENOSPC, "No space left on device"), (errno.EROFS, "Read-only file system")):
        place = Place(folder / str(number))

        def fill(rank: int, number: int = number) -> None:
            slow(0.03)(rank)
            write, written = PlacedWriter.write, []

            def full(self, position, data):
                written.append(len(data))
                if rank == 1 and sum(written) > 22_000:
                    raise OSError(number, os.strerror(number))
                return write(self, position, data)

            PlacedWriter.write = full

        ended = place.mask(2, prepare=fill)
        assert "nmsolve: error: rank 1 of 2: model." in ended.error(), ended
        assert f"weight: {text}: {place.folder}/.out.unfinished-" in ended.err, ended
        assert "what is finished is in" in ended.err
        assert ended.codes == [1, 1], ended
        assert ended.seconds < 60
        assert 0 < len(place.notes()) < 10
        place.complete(3)


@case
def a_limit_of_the_system_ends_all(folder: Path) -> None:
    """Files may not be as large as they are to be, on one rank."""
    place = Place(folder)

    def limit(rank: int) -> None:
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    ended = place.mask(3, prepare=limit)
    assert "nmsolve: error: rank 1 of 3: model." in ended.error(), ended
    assert f"weight: File too large: {place.folder}/.out.unfinished-" in ended.err, ended
    assert ended.codes == [1] * 3, ended
    assert ended.seconds < 60
    place.complete(2)


@case
def signals_leave_what_is_finished(folder: Path) -> None:
    """torchrun sends one to all ranks; somebody may send one to a single rank."""
    for number, whom in ((signal.SIGINT, slice(None)), (signal.SIGTERM, slice(None)), (signal.SIGTERM, [1])):
        place = Place(folder / f"{number}{isinstance(whom, slice)}")

        def interrupt(pids: list[int], place=place, number=number, whom=whom) -> bool:
            if len(place.notes()) < 3:
                return False
            for pid in pids[whom] if isinstance(whom, slice) else [pids[k] for k in whom]:
                os.kill(pid, number)
            return True

        ended = place.mask(3, prepare=slow(0.1), meanwhile=interrupt)
        assert "nmsolve: error: interrupted; what is finished is in" in ended.error()
        assert ended.codes == [130] * 3, ended
        assert ended.seconds < 60
        place.complete(2)


@case
def python_without_ranks_is_one_process(folder: Path) -> None:
    """Under torchrun, too: what one rank calls alone waits for no other."""
    place = Place(folder)
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "RANK": "0", "LOCAL_RANK": "0"}
    try:
        mask_checkpoint(place.source, place.out, "8:16", transposable=True, backend="torch")
    finally:
        for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
            del os.environ[name]
    assert contents(place.out) == place.expected


def killed(folder: Path, seed: int) -> None:
    """One rank is killed at a random moment, once or more often; then others go on, or one process."""
    chance = random.Random(seed)
    place = Place(folder)
    for _ in range(chance.randint(1, 2)):
        count = chance.randint(2, 4)
        victim = chance.randrange(count)
        begun, pieces, moment = [], chance.randint(-1, 9), chance.uniform(0.0, 0.4)

        def kill(pids: list[int], begun=begun, pieces=pieces, moment=moment, victim=victim) -> bool:
            if not begun and (pieces < 0 or len(place.notes()) >= pieces or place.out.exists()):
                begun.append(time.monotonic())
            if not begun or time.monotonic() < begun[0] + moment:
                return False
            with suppress(ProcessLookupError):  # it was too late
                os.kill(pids[victim], signal.SIGKILL)
            return True

        ended = place.mask(count, prepare=slow(chance.choice([0.0, 0.05])), meanwhile=kill)
        assert ended.seconds < 60, ended
        assert -signal.SIGKILL in ended.codes or ended.codes == [0] * count, ended
        if place.out.exists():  # too late
            break
    if not place.out.exists():
        place.complete(chance.randint(0, 4))
    assert contents(place.out) == place.expected


def run(folder: Path, *what: str) -> dict[str, str | None]:
    """For each case, and each seed of :func:`killed`, what it raised, or null."""
    nmsolve.checkpoint.units.UNIT_BYTES = 6000
    todo = dict(CASES if "cases" in what else {})
    for seed in filter(str.isdecimal, what):
        todo[f"killed_{seed}"] = partial(killed, seed=int(seed))
    return run_cases(folder, todo)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *sys.argv[2:])))
