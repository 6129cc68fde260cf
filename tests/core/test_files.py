"""Output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal

import pytest

from nmsolve.files import Interrupts, Staging


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


def test_an_interrupt_that_was_swallowed_is_not_lost():
    with Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.hold()


def test_the_last_step_is_completed():
    with Interrupts() as interrupts:
        interrupts.hold()
        signal.raise_signal(signal.SIGINT)
        interrupts.check()
