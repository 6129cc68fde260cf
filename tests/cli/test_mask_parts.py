"""``nmsolve mask`` in pieces: gone on with after a kill, and done in parts; the same bytes in any case."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import re
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from checkpoints import llama, save_sharded
from mask_command import contents, exit_code, mask, names, one_error
from safetensors.torch import save_file

import nmsolve.checkpoint.units
from nmsolve import NMSolveError
from nmsolve.checkpoint.format import open_checkpoint
from nmsolve.checkpoint.report import MaskedTensor
from nmsolve.checkpoint.streams import PlacedWriter
from nmsolve.checkpoint.units import check_part, deal, units_of

pytest_plugins = ("mask_command",)

TRANSPOSABLE = "--transposable"


@pytest.fixture
def sharded(tmp_path: Path, monkeypatch) -> Path:
    """A model in several files, each of several units."""
    monkeypatch.setattr(nmsolve.checkpoint.units, "UNIT_BYTES", 6000)
    save_sharded(tmp_path / "in", llama())
    (tmp_path / "in" / "tokenizer.txt").write_text("words")
    return tmp_path / "in"


def unfinished(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.unfinished-*"))


class Killed(BaseException):
    """Nothing that runs afterwards counts: what was written so far stays as it is."""


def dying(monkeypatch, after: int):
    """Ends the process, as far as files can tell, after some slabs were solved."""
    add, calls = MaskedTensor.add, []

    def add_some(*args):
        calls.append(None)
        if len(calls) > after:
            raise Killed
        add(*args)

    monkeypatch.setattr(MaskedTensor, "add", add_some)
    return calls


def killed(source: Path, out: Path, after: int) -> None:
    """A run that ends so."""
    with pytest.MonkeyPatch.context() as patch:
        dying(patch, after)
        with pytest.raises(Killed):
            mask(source, out, TRANSPOSABLE)


# ---- how the work is cut and dealt ----------------------------------------------------------------------


def test_units_hold_every_tensor_once_and_in_order(sharded):
    checkpoint = open_checkpoint(sharded)
    units = units_of(checkpoint)
    assert len(units) > len(checkpoint.shards) > 1
    assert [unit.number for unit in units] == list(range(len(units)))
    held = [(unit.shard.path.name, entry.name) for unit in units for entry in unit.entries]
    assert held == [(shard.path.name, entry.name) for shard, entry in checkpoint.entries()]


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 100])
def test_dealing(sharded, parts):
    """Every unit once; no part has more than the mean and the largest unit."""
    units = units_of(open_checkpoint(sharded))
    dealt = deal(units, parts)
    assert sorted(unit.number for part in dealt for unit in part) == [unit.number for unit in units]
    sizes = [sum(unit.nbytes for unit in part) for part in dealt]
    assert max(sizes) <= sum(sizes) / parts + max(unit.nbytes for unit in units)
    assert dealt == deal(units, parts)


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, 0), (1,), "1/2", [1, 2], (True, 2), (1.0, 2)])
def test_what_is_no_part(part):
    with pytest.raises(NMSolveError, match=r"part: expected \(K, OF\)"):
        check_part(part)


# ---- going on after a kill ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in range(2, 22))])
def test_a_run_that_was_killed_is_gone_on_with(sharded, tmp_path, seed):
    chance = random.Random(seed)
    assert mask(sharded, tmp_path / "whole", TRANSPOSABLE) == 0
    expected, calls = contents(tmp_path / "whole"), 0
    for _ in range(chance.randint(1, 3)):
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            solved = dying(patch, chance.randint(2, 7))
            mask(sharded, tmp_path / "out", TRANSPOSABLE)
        calls += len(solved)
    if unfinished(tmp_path):  # what a crash may leave of a piece that was under way
        (folder,) = unfinished(tmp_path)
        for note in (folder / "finished").glob("*.json"):
            if chance.random() < 0.3:
                note.unlink()
    parts = chance.randint(1, 3)
    if not (tmp_path / "out").exists():
        for k in chance.sample(range(1, parts + 1), parts):
            assert mask(sharded, tmp_path / "out", TRANSPOSABLE, "--part", f"{k}/{parts}") == 0
        assert mask(sharded, tmp_path / "out", TRANSPOSABLE, "--merge") == 0
    assert contents(tmp_path / "out") == expected
    assert unfinished(tmp_path) == []


def test_what_is_finished_is_not_done_again(sharded, tmp_path, monkeypatch):
    killed(sharded, tmp_path / "out", after=9)
    (folder,) = unfinished(tmp_path)
    assert any((folder / "finished").iterdir())
    calls = dying(monkeypatch, 1000)
    assert mask(sharded, tmp_path / "out", TRANSPOSABLE) == 0
    assert 5 <= len(calls) < 14
    assert unfinished(tmp_path) == []


def test_another_input_or_other_settings_begin_anew(sharded, tmp_path):
    killed(sharded, tmp_path / "out", after=9)
    (first,) = unfinished(tmp_path)
    shard = min(sharded.glob("*.safetensors"))
    os.utime(shard, (1, 1))  # the same header and size; the weights may have changed
    killed(sharded, tmp_path / "out", after=9)
    assert len(unfinished(tmp_path)) == 2
    assert mask(sharded, tmp_path / "out", TRANSPOSABLE, pattern="4:8") == 0
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    assert {row["pattern"] for row in report["tensors"]} == {"4:8"}
    assert unfinished(tmp_path) == []
    assert not first.exists()


def test_files_that_have_gone_are_made_again(sharded, tmp_path):
    """A note about a file is nothing without the file."""
    assert mask(sharded, tmp_path / "whole", TRANSPOSABLE) == 0
    killed(sharded, tmp_path / "out", after=12)
    (folder,) = unfinished(tmp_path)
    min((folder / "result").glob("*.safetensors")).unlink()
    assert mask(sharded, tmp_path / "out", TRANSPOSABLE) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("nth", [5, 10, 15, 20, 25])
def test_a_write_that_fails_once(sharded, tmp_path, monkeypatch, nth):
    """A piece of which one write has failed is not finished, though those behind it succeed."""
    assert mask(sharded, tmp_path / "whole", TRANSPOSABLE) == 0
    write, calls = PlacedWriter.write, []

    def fail_once(self, position, data):
        calls.append(None)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, position, data)

    monkeypatch.setattr(PlacedWriter, "write", fail_once)
    assert mask(sharded, tmp_path / "out", TRANSPOSABLE) == 1
    assert mask(sharded, tmp_path / "out", TRANSPOSABLE) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- parts ----------------------------------------------------------------------------------------------


def test_one_file_in_parts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nmsolve.checkpoint.units, "UNIT_BYTES", 6000)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    save_file(llama(torch.float32), tmp_path / "model.safetensors")
    source, whole, out = (
        tmp_path / name for name in ("model.safetensors", "whole/m.safetensors", "parts/m.safetensors")
    )
    assert mask(source, whole, TRANSPOSABLE) == 0
    capsys.readouterr()
    for k in (3, 1):
        assert mask(source, out, TRANSPOSABLE, "--part", f"{k}/3") == 0
        assert f"part {k} of 3: " in capsys.readouterr().out
        assert names(out.parent) == [path.name for path in unfinished(out.parent)]
    assert mask(source, out, TRANSPOSABLE, "--merge") == 2
    told = one_error(capsys)
    assert re.search(r"--merge: \d+ of \d+ pieces .* are not done, .*model\.safetensors, from \w", told)
    assert "without --merge does them" in told
    assert mask(source, out, TRANSPOSABLE, "--part", "2/3", "--quiet") == 0
    assert mask(source, out, TRANSPOSABLE, "--merge") == 0
    for name in ("m.safetensors", "m.masks.safetensors"):
        assert whole.with_name(name).read_bytes() == out.with_name(name).read_bytes()
    assert names(out.parent) == names(whole.parent)


def test_more_parts_than_work(file, out):
    for k in (1, 2):
        assert mask(file, out, "--part", f"{k}/2") == 0
    assert mask(file, out, "--merge") == 0
    assert len(names(out.parent)) == 3


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/2/3", "-1/2", ""])
def test_parts_that_are_none(file, out, capsys, part):
    assert exit_code(["mask", str(file), "--pattern", "2:4", "--out", str(out), f"--part={part}"]) == 2
    assert "--part: expected K/OF with 1 <= K <= OF" in one_error(capsys)


def test_merging_nothing(file, out, capsys):
    assert mask(file, out, "--merge") == 2
    assert "--merge: 1 of 1 pieces" in one_error(capsys)
    assert mask(file, out, "--merge", "--part", "1/2") == 2
    assert "--merge: expected without part" in one_error(capsys)
    assert names(out.parent) == []


def test_who_may_work_at_the_same_time(sharded, tmp_path, capsys):
    """Parts beside parts; a whole run or a merge alone."""
    out = tmp_path / "out"
    assert mask(sharded, out, "--part", "1/2") == 0
    capsys.readouterr()
    (folder,) = unfinished(tmp_path)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        assert mask(sharded, out, "--part", "2/2", "--quiet") == 0
        assert mask(sharded, out, "--merge") == 2
        assert f"--out: another process is at work in {folder}" in one_error(capsys)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert mask(sharded, out, "--part", "2/2") == 2
        assert "another process is at work" in one_error(capsys)
    finally:
        os.close(descriptor)
    assert mask(sharded, out, "--merge") == 0
