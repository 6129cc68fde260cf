"""Output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
from pathlib import Path

import pytest

from nmsolve import files
from nmsolve.errors import NMSolveError, WorkFailed, begun, printable
from nmsolve.files import Interrupts, Staging, check_out


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_when_it_is_published(tmp_path):
    with Staging(tmp_path / "out") as staging:
        (staging.path / "a").write_text("a")
        assert names(tmp_path) == [staging.path.name]
        assert staging.path.name.startswith(".out.nmsolve-")
        staging.publish_folder()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["a"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_published_folder_replaces_another(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with Staging(tmp_path / "out") as staging:
        (staging.path / "new").touch()
        with pytest.raises(FileExistsError, match="appeared while the work went on"):
            staging.publish_folder()
        staging.publish_folder(replace=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_a_failed_replacement_restores_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    rename = os.rename
    with monkeypatch.context() as patch, Staging(tmp_path / "out") as staging:

        def fail(source, target):
            if source == staging.path:
                raise OSError("no")
            rename(source, target)

        patch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="no"):
            staging.publish_folder(replace=True)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_files_appear_together(tmp_path):
    (tmp_path / "b").write_text("old")
    with Staging(tmp_path / "b") as staging:
        (staging.path / "a").write_text("a")
        (staging.path / "b").write_text("b")
        with pytest.raises(FileExistsError):
            staging.publish_files(["a", "b"])
        assert names(tmp_path) == [staging.path.name, "b"]
        staging.publish_files(["a", "b"], replace=True)
    assert names(tmp_path) == ["a", "b"]
    assert (tmp_path / "b").read_text() == "b"


def test_files_that_were_moved_are_taken_back_when_one_cannot_be(tmp_path):
    with Staging(tmp_path / "b") as staging:
        (staging.path / "a").write_text("a")
        with pytest.raises(FileNotFoundError):
            staging.publish_files(["a", "b"])
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_stays_after_an_error(tmp_path, error):
    with pytest.raises(error), Staging(tmp_path / "out") as staging:  # noqa: PT012
        (staging.path / "masks").mkdir()
        (staging.path / "masks" / "a").touch()
        raise error
    assert names(tmp_path) == []


def test_the_next_run_clears_what_a_killed_one_left(tmp_path):
    stale, running, other = (
        tmp_path / f".{name}" for name in ("out.nmsolve-1", "out.nmsolve-2", "x.nmsolve-3")
    )
    for folder in (stale, running, other):
        folder.mkdir()
        (folder / "part").touch()
    lock = os.open(running, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with Staging(tmp_path / "out"):
            pass
    finally:
        os.close(lock)
    assert names(tmp_path) == [running.name, other.name]


def test_a_running_one_is_locked(tmp_path):
    with Staging(tmp_path / "o[u]t*") as first:
        with Staging(tmp_path / "o[u]t*") as second:
            assert first.path.exists()
            assert first.path != second.path
        assert first.path.exists()


@pytest.fixture
def obeyed():
    """Signals are obeyed here, also where the whole suite ignores them: in a background job, under nohup."""
    before = [signal.getsignal(number) for number in Interrupts.SIGNALS]
    for number in Interrupts.SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in zip(Interrupts.SIGNALS, before, strict=True):
        signal.signal(number, handler)


def test_signals_that_are_ignored_stay_so(obeyed):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGHUP)
        interrupts.check()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.usefixtures("obeyed")
@pytest.mark.parametrize("number", Interrupts.SIGNALS)
def test_one_interrupt_and_the_handlers_are_put_back(number):
    before = [signal.getsignal(n) for n in Interrupts.SIGNALS]
    with pytest.raises(KeyboardInterrupt), Interrupts():
        signal.raise_signal(number)
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert [signal.getsignal(n) for n in Interrupts.SIGNALS] == before


@pytest.mark.usefixtures("obeyed")
def test_an_interrupt_that_was_swallowed_is_not_lost():
    with Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.hold()


@pytest.mark.usefixtures("obeyed")
def test_the_last_step_is_completed():
    with Interrupts() as interrupts:
        interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        interrupts.check()


def test_a_new_folder_that_another_run_removes_is_made_again(tmp_path, monkeypatch):
    """Between making a folder and locking it, another run may take it for one that was left behind."""
    held, calls = files.locked, []

    def robbed(folder):
        calls.append(folder)
        if len(calls) == 1:
            folder.rmdir()
        return held(folder)

    monkeypatch.setattr(files, "locked", robbed)
    with Staging(tmp_path / "out") as staging:
        assert staging.path == calls[1] != calls[0]
        assert names(tmp_path) == [staging.path.name]


# --- one file -----------------------------------------------------------------------------------------------


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a.json"
    with files.writing(path) as file:
        file.write(b"first")
        (partial,) = tmp_path.iterdir()
        assert files.is_partial(partial, path)
        assert not path.exists()
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    files.write_text(path, "zweitens: ä")
    assert path.read_text(encoding="utf-8") == "zweitens: ä"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), files.writing(path) as file:  # noqa: PT012
        file.write(b"ne")
        raise error
    assert names(tmp_path) == ["a"]
    assert path.read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with files.writing(path) as first, files.writing(path) as second:
        first.write(b"1" * 100)
        second.write(b"22")
    assert path.read_bytes() == b"1" * 100
    assert names(tmp_path) == ["a"]


# --- where a command may write ------------------------------------------------------------------------------


def refusal(*args, **options) -> str:
    with pytest.raises(NMSolveError) as error:
        check_out(*args, **options)
    return str(error.value)


def test_outputs_that_will_do(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mark").touch()
    (tmp_path / "old.csv").touch()
    (tmp_path / "link").symlink_to("new")
    source = tmp_path / "in"
    assert check_out(tmp_path / "new", False, source=source, mark="mark") == tmp_path / "new"
    assert check_out(tmp_path / "link", False, source=source, mark="mark") == tmp_path / "new"
    assert check_out(tmp_path / "ours", True, source=source, mark="mark") == tmp_path / "ours"
    assert check_out(tmp_path / "old.csv", True, suffixes=(".csv", ".json")) == tmp_path / "old.csv"


def test_outputs_that_would_take_something_with_them(tmp_path):
    source = tmp_path / "model"
    source.mkdir()
    (tmp_path / "alias").symlink_to(source)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "file").touch()
    assert refusal(source, True, source=source, mark="m") == f"out: {source} is the input itself"
    assert "is the input itself" in refusal(tmp_path / "alias", True, source=source, mark="m")
    assert "expected a path outside" in refusal(source / "x", True, source=source, mark="m")
    assert "expected a path outside" in refusal(tmp_path, True, source=source, mark="m")
    assert "nmsolve did not write it (there is no m)" in refusal(tmp_path / "theirs", True, mark="m")
    assert "exists; overwrite=True replaces it" in refusal(tmp_path / "theirs", False, mark="m")
    assert "exists; overwrite=True replaces it" in refusal(tmp_path / "file", False)
    assert "exists; it is a folder" in refusal(tmp_path / "theirs", True)
    assert "does not exist" in refusal(tmp_path / "no" / "x", False)
    assert "ends in .csv or .json, got x.txt" in refusal(Path("x.txt"), False, suffixes=(".csv", ".json"))


def test_two_names_of_one_file_are_one_file(tmp_path):
    source, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    source.write_text("weights")
    link.hardlink_to(source)
    assert "is the input itself" in refusal(link, True, source=source)
    (tmp_path / "out.orders").hardlink_to(source)
    message = refusal(
        tmp_path / "out", True, source=source, beside=lambda out: [f"{out.name}.orders", out.name]
    )
    assert message == f"out: {tmp_path / 'out'} would replace the input with out.orders"


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nnmsolve: done", "\u202egnp.exe", "tab\t", "\udc80", "\x00"])
def test_what_is_not_printable_is_escaped_in_every_message(text):
    message = str(NMSolveError(f"names: no mask for {text!s}"))
    assert message.isprintable()
    assert printable(message) == message, "escaping twice changes nothing"
    assert printable("größe 大きさ") == "größe 大きさ"


def test_work_that_has_begun_fails():
    with pytest.raises(WorkFailed, match=r"^scores: no$"), begun():
        raise NMSolveError("scores: no")
    with pytest.raises(WorkFailed, match=r"^weights: no$"), begun():
        raise WorkFailed("weights: no")
    with pytest.raises(OSError, match="disk"), begun():
        raise OSError("disk")
