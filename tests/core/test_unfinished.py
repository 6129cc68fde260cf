"""The hidden folder of unfinished work, shared by processes of which one publishes and removes it."""

from __future__ import annotations

import shutil
from pathlib import Path

from nmsolve.unfinished import Unfinished


def test_a_folder_that_goes_while_it_is_looked_into_keeps_nothing(tmp_path, monkeypatch):
    with Unfinished(tmp_path / "out", "key", shared=True) as unfinished:
        unfinished.finish("first", "done")
        assert unfinished.keeps()
        unfinished.release()
        shutil.rmtree(unfinished.path)
        # Whoever asks first whether it is there is told so, and it is gone when the names are read.
        monkeypatch.setattr(Path, "is_dir", lambda path: True)
        assert not unfinished.keeps()
    assert list(tmp_path.iterdir()) == []


def test_what_is_finished_stays_and_an_empty_folder_goes(tmp_path):
    with Unfinished(tmp_path / "out", "key"):
        pass
    assert list(tmp_path.iterdir()) == []
    with Unfinished(tmp_path / "out", "key") as unfinished:
        unfinished.finish("first", "done")
    with Unfinished(tmp_path / "out", "key") as again:
        assert again.finished("first") == "done"
        again.forget("first")
    assert list(tmp_path.iterdir()) == []
