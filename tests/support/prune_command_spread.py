"""What test_command_ranks.py runs: ``nmsolve prune`` by several ranks, against one process.

    python tests/support/prune_command_spread.py FOLDER [cases] [slow] SEED...

The cases, and for each seed a run of which one rank is killed at a random moment.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import tiny_models
import torch
from forked_ranks import Ended, launch, run_cases
from safetensors.torch import load_file, save_file
from torch import Tensor

import nmsolve
from nmsolve import NMSolveError
from nmsolve.cli import main
from nmsolve.prune.run import Run
from nmsolve.prune.store import LayerStore

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "alps", "frank-wolfe")
LAYERS = 14

CASES: dict[str, Callable[[Path], None]] = {}
SLOW: dict[str, Callable[[Path], None]] = {}


def case(function: Callable[[Path], None]) -> Callable[[Path], None]:
    CASES[function.__name__] = function
    return function


class Place:
    """A model in float64, as the sums of ranks are rounded in another order, and what one process makes."""

    def __init__(self, folder: Path, *options: str, batches: int = 5) -> None:
        self.folder, self.source, self.out = folder, folder / "in", folder / "out"
        (folder / "logs").mkdir(parents=True)
        tiny_models.make("llama").double().save_pretrained(self.source, max_shard_size="80KB")
        save_file({"tokens": tiny_models.tokens(2 * batches)}, folder / "tokens.safetensors")
        self.options = ["--pattern", "4:8", "--batch-size", "2", "--backend", "torch", "--device", "cpu"]
        self.options += ["--calibration", str(folder / "tokens.safetensors"), "--no-picture", *options]

    def arguments(self, out: Path, *options: str) -> list[str]:
        return ["prune", str(self.source), *self.options, "--out", str(out), *options]

    def alone(self) -> Path:
        """What one process makes, once."""
        whole = self.folder / "whole"
        if not whole.exists():
            assert main(self.arguments(whole, "--quiet")) == 0
        return whole

    def prune(self, count: int, *options: str, **hooks: Callable) -> Ended:
        return launch(count, self.arguments(self.out, *options), self.folder / "logs", **hooks)

    def names(self) -> list[str]:
        return sorted({x.name for x in self.folder.iterdir()} - {"in", "logs", "tokens.safetensors", "whole"})

    def finished(self) -> int:
        """How many layers are, of a run that is not."""
        return len(list(self.folder.glob(".out.unfinished/layers/[!.]*")))

    def complete(self, count: int) -> None:
        """Goes on as so many ranks, and finds what one process makes."""
        if count == 0:
            assert main(self.arguments(self.out, "--quiet")) == 0
        else:
            ended = self.prune(count)
            assert ended.codes == [0] * count, ended
        self.compare()

    def compare(self, tolerance: float = 1e-6) -> None:
        whole = self.alone()
        masks, expected = nmsolve.load_masks(self.out), nmsolve.load_masks(whole)
        assert masks.keys() == expected.keys()
        for name, mask in expected.items():
            assert torch.equal(masks[name], mask), name
        weights, wanted = tensors(self.out), tensors(whole)
        assert weights.keys() == wanted.keys()
        for name, weight in wanted.items():
            assert (weights[name] - weight).norm() <= tolerance * weight.norm(), name
        report, other = (json.loads((x / "nmsolve_report.json").read_text()) for x in (self.out, whole))
        assert report["settings"] == other["settings"]
        assert report["skipped"] == other["skipped"]
        for row, model in zip(report["layers"], other["layers"], strict=True):
            for key in ("name", "kept", "tokens", "error_tokens", "expert_tokens"):
                assert row[key] == model[key], key
        for key in ("weights", "kept", "parameters", "zeros_before"):
            assert report["totals"][key] == other["totals"][key], key
        assert self.names() == ["out"]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


def slow(seconds: float) -> Callable[[int], None]:
    """Solving takes longer, so that there is a middle of it."""

    def prepare(rank: int) -> None:
        solve = Run._layer

        def solve_slowly(self, *args):
            time.sleep(seconds)
            return solve(self, *args)

        Run._layer = solve_slowly

    return prepare


# ---- what is done ---------------------------------------------------------------------------------------


def equal(folder: Path, *options: str, counts: tuple[int, ...] = (2,), **settings: object) -> None:
    place = Place(folder, *options, **settings)
    for count in counts:
        ended = place.prune(count)
        assert ended.codes == [0] * count, ended
        assert ended.err == "", ended.err
        assert ended.out.count(" 14 layers") == ended.out.count("wrote ") == 1, ended.out
        place.compare()
        shutil.rmtree(place.out)


@case
def hessians_are_summed(folder: Path) -> None:
    equal(folder, "--method", "sparsegpt", counts=(1, 2, 4))


@case
def weights_on_disk(folder: Path) -> None:
    equal(folder, "--method", "wanda", "--offload", "disk")


def _methods(folder: Path, method: str, transposable: bool) -> None:
    options = ["--method", method, *(["--transposable"] if transposable else [])]
    options += ["--iterations", "12"] if method in ("alps", "frank-wolfe") else []
    equal(folder, *options, counts=(2, 4))


def _elsewhere(folder: Path, sequential: str, offload: str) -> None:
    equal(folder, "--method", "sparsegpt", "--sequential", sequential, "--offload", offload, counts=(2, 3))


for _method in METHODS:
    for _kind in (False, True):
        SLOW[f"{_method}-{_kind}"] = partial(_methods, method=_method, transposable=_kind)
for _sequential in ("layer", "block", "off"):
    for _offload in ("cpu", "disk"):
        SLOW[f"{_sequential}-{_offload}"] = partial(_elsewhere, sequential=_sequential, offload=_offload)


@case
def more_ranks_than_batches(folder: Path) -> None:
    equal(folder, "--method", "sparsegpt", "--transposable", batches=2, counts=(3,))


@case
def without_calibration(folder: Path) -> None:
    place = Place(folder, "--method", "magnitude")
    place.options = [
        x for x in place.options if x != "--calibration" and not x.endswith("tokens.safetensors")
    ]
    assert place.prune(2).codes == [0, 0]
    place.compare()


# ---- what is refused, told once -------------------------------------------------------------------------

REFUSED = {
    "pattern": (["--pattern", "half"], "--pattern: "),
    "method": (["--method", "magnitude", "--damping", "1"], "--damping: method 'magnitude' has none"),
    "dense": (["--dense", "nothing"], "--dense: 'nothing' matches none"),
    "samples": (["--samples", "0"], "--samples: expected an integer of at least 1"),
    "option": (["--offload", "tape"], "argument --offload: invalid choice"),
    "out": ([], "out exists; --overwrite replaces it"),
}


@case
def what_is_refused_is_told_once(folder: Path) -> None:
    place = Place(folder)
    for name, (options, message) in REFUSED.items():
        if name == "out":
            place.out.mkdir()
        ended = place.prune(2, *options)
        assert message in ended.error(), (name, ended)
        assert set(ended.codes) - {-signal.SIGTERM} == {2}, (name, ended)
        assert place.names() == (["out"] if name == "out" else []), name


# ---- failing --------------------------------------------------------------------------------------------


def ends_all(folder: Path, prepare: Callable[[int], None], message: str) -> None:
    """One message, what is finished stays, and as many ranks as one likes go on."""
    place = Place(folder, "--method", "sparsegpt")
    ended = place.prune(2, prepare=prepare)
    assert message in ended.error(), ended
    assert "; finished layers are in " in ended.err
    assert set(ended.codes) - {-signal.SIGTERM} == {1}, ended
    assert ended.seconds < 60
    assert 0 < place.finished() < LAYERS
    place.complete(3)


@case
def a_layer_that_one_rank_cannot_solve(folder: Path) -> None:
    def prepare(rank: int) -> None:
        solve, solved = Run._layer, []

        def fail(self, layer, *args):
            solved.append(layer)
            if rank == 1 and len(solved) == 3:
                raise torch.linalg.LinAlgError("not positive definite")
            return solve(self, layer, *args)

        Run._layer = fail

    ends_all(folder, prepare, "rank 1 of 2: _LinAlgError: not positive definite")


@case
def a_forward_pass_of_one_rank_fails(folder: Path) -> None:
    """Where the others do not wait for it."""

    def prepare(rank: int) -> None:
        measure, count = Run._measure, []

        def fail(self, *args, **options):
            count.append(0)
            if rank == 1 and len(count) == 5:
                raise NMSolveError("no memory")
            return measure(self, *args, **options)

        Run._measure = fail

    ends_all(folder, prepare, "no memory")


@case
def a_full_disk_ends_all(folder: Path) -> None:
    def prepare(rank: int) -> None:
        save, saved = LayerStore.save, []

        def fail(self, *args):
            saved.append(0)
            if len(saved) == 6:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "layers")
            return save(self, *args)

        LayerStore.save = fail

    ends_all(folder, prepare, "rank 0 of 2: No space left on device: layers")


@case
def inputs_that_are_not_finite_on_one_rank(folder: Path) -> None:
    """A token that only its batches have."""
    place = Place(folder, "--method", "wanda")
    state = tensors(place.source)
    tokens = tiny_models.tokens(10)
    tokens[tokens == 7] = 8
    tokens[2, 3] = 7  # of the second batch
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    name = "model.embed_tokens.weight"
    file = next(x for x in place.source.glob("*.safetensors") if name in load_file(x))
    held = load_file(file)
    held[name] = state[name].clone()
    held[name][7] = float("inf")
    save_file(held, file, {"format": "pt"})
    ended = place.prune(2)
    assert "rank 1 of 2: --calibration: the inputs of model.layers.0.self_attn." in ended.error(), ended
    assert set(ended.codes) - {-signal.SIGTERM} == {1}
    assert place.names() == []


@case
def signals_leave_what_is_finished(folder: Path) -> None:
    """torchrun sends one to all ranks; somebody may send one to a single rank."""
    for number, whom in ((signal.SIGINT, [0, 1, 2]), (signal.SIGTERM, [0, 1, 2]), (signal.SIGTERM, [1])):
        place = Place(folder / f"{number}-{len(whom)}", "--method", "wanda")

        def interrupt(pids: list[int], place=place, number=number, whom=whom) -> bool:
            if place.finished() < 3:
                return False
            for k in whom:
                os.kill(pids[k], number)
            return True

        ended = place.prune(3, prepare=slow(0.1), meanwhile=interrupt)
        assert "nmsolve: error: interrupted; finished layers are in" in ended.error()
        assert set(ended.codes) - {-signal.SIGTERM} == {130}, ended
        assert ended.seconds < 60
        place.complete(2)


def a_rank_dies_before_they_are_connected(folder: Path) -> None:
    """The others wait for its address."""

    def prepare(rank: int) -> None:
        if rank == 1:
            torch.distributed.init_process_group = lambda *args, **options: os.kill(
                os.getpid(), signal.SIGKILL
            )

    _dies(folder, prepare)


def a_rank_dies_while_they_are_connected(folder: Path) -> None:
    """The others have its address, and wait for it to answer."""

    class Dying(torch.distributed.Store):
        """Ends the process once it has told something."""

        def __init__(self, store: torch.distributed.Store) -> None:
            super().__init__()
            self._store = store

        def set(self, key, value):
            self._store.set(key, value)
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(rank: int) -> None:
        if rank == 1:
            begin, kept = torch.distributed.init_process_group, []

            def die_soon(*args, store, **options):
                kept.append(Dying(store))
                begin(*args, store=kept[0], **options)

            torch.distributed.init_process_group = die_soon

    _dies(folder, prepare)


def _dies(folder: Path, prepare: Callable[[int], None]) -> None:
    """Rank 1 of 3; the others end, by themselves and soon."""
    place = Place(folder, "--method", "wanda")
    ended = place.prune(3, prepare=prepare)
    assert [code == -signal.SIGKILL for code in ended.codes] == [False, True, False], ended
    assert ended.seconds < 60, ended
    place.complete(2)


for _function in (a_rank_dies_before_they_are_connected, a_rank_dies_while_they_are_connected):
    SLOW[_function.__name__] = _function


def killed(folder: Path, seed: int) -> None:
    """One rank is killed at a random moment; then others go on, or one process."""
    chance = random.Random(seed)
    offload = chance.choice([[], ["--offload", "disk"], ["--offload", "cpu"]])
    sequential = chance.choice(["layer", "block", "off"])
    place = Place(
        folder, "--method", chance.choice(["wanda", "sparsegpt"]), "--sequential", sequential, *offload
    )
    for _ in range(chance.randint(1, 2)):
        count = chance.randint(2, 4)
        victim = chance.randrange(count)
        begun, layers, moment = [], chance.randint(-1, LAYERS - 1), chance.uniform(0.0, 0.4)

        def kill(pids: list[int], begun=begun, layers=layers, moment=moment, victim=victim) -> bool:
            if not begun and (layers < 0 or place.finished() >= layers or place.out.exists()):
                begun.append(time.monotonic())
            if not begun or time.monotonic() < begun[0] + moment:
                return False
            with suppress(ProcessLookupError):  # it was too late
                os.kill(pids[victim], signal.SIGKILL)
            return True

        ended = place.prune(count, prepare=slow(chance.choice([0.0, 0.05])), meanwhile=kill)
        assert ended.seconds < 60, ended
        assert -signal.SIGKILL in ended.codes or ended.codes == [0] * count, ended
        assert ended.err.count("nmsolve: error: ") <= 1, ended.err
        if place.out.exists():  # too late
            break
    if place.out.exists():  # a kill behind the renaming leaves the hidden folder
        shutil.rmtree(folder / ".out.unfinished", ignore_errors=True)
        place.compare()
    else:
        place.complete(chance.randint(0, 4))


def run(folder: Path, *what: str) -> dict[str, str | None]:
    """For each case, and each seed of :func:`killed`, what it raised, or null."""
    todo = dict(CASES if "cases" in what else {}) | dict(SLOW if "slow" in what else {})
    todo |= {name: function for name, function in (CASES | SLOW).items() if name in what}
    for seed in filter(str.isdecimal, what):
        todo[f"killed_{seed}"] = partial(killed, seed=int(seed))
    return run_cases(folder, todo)


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), *sys.argv[2:])))
