"""The times of the folders count every test once, whichever process ran it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

FILES = {
    "tests/test_top.py": "def test_top(): pass\n",
    "tests/near/test_a.py": "import pytest\n@pytest.mark.parametrize('k', range(5))\ndef test(k): pass\n",
    "tests/near/deeper/test_b.py": "def test_deeper(): assert False\n",
    "tests/far/test_c.py": "import pytest\n@pytest.fixture\ndef broken(): 1 / 0\n"
    "def test_error(broken): pass\ndef test_skipped(): pytest.skip()\n",
}


def test_tests_are_counted_in_their_folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {Path(__file__).parent}\naddopts = --import-mode=importlib\n"
    )
    (tmp_path / "tests" / "conftest.py").write_text("from folder_times import pytest_terminal_summary\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2"],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    found = re.findall(r"^(\S+) +(\d+) tests +\d+\.\d s$", done.stdout, re.M)
    assert {folder: int(count) for folder, count in found} == {".": 1, "near": 6, "far": 2}, done.stdout
