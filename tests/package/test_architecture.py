"""docs/architecture.md says what is so: the tree, the arrows, and what to touch, done in miniature."""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

import common
import pytest
import tables.__main__ as tables
import torch
from tables import columns

import nmsolve
from nmsolve import cli
from nmsolve.backends.dispatch import BACKENDS, Backend
from nmsolve.cli.command import FAILED, USAGE, Command, exit_codes
from nmsolve.errors import WorkFailed

ROOT = Path(__file__).resolve().parents[2]
HELD = runpy.run_path(str(Path(__file__).with_name("test_imports.py")))
CORE, LAYERS = HELD["CORE"], HELD["LAYERS"]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


# --- the tree and the arrows --------------------------------------------------------------------------------


def tree() -> list[Path]:
    """The paths of the tree; a line further in lies in the line above it that is further out."""
    block = re.search(r"^## The tree\n+```\n(.*?)^```", PAGE, re.M | re.S)
    assert block
    found: list[Path] = []
    above: list[tuple[int, Path]] = []
    for line in block[1].splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [(depth, path) for depth, path in above if depth < indent]
        path = (above[-1][1] if above else Path()) / name
        found.append(path)
        above.append((indent, path))
    return found


def test_the_tree_is_there():
    for path in tree():
        assert (ROOT / path).exists(), path


def test_the_tree_is_whole():
    shown = set(tree())
    for top in ("kernels", "nmsolve", "bench", "tests", "docs"):
        assert Path(top) in shown
    for path in (ROOT / "nmsolve").iterdir():
        if path.suffix == ".py" or (path.is_dir() and any(path.glob("*.py"))):
            assert path.relative_to(ROOT) in shown or path.name == "__init__.py", path
    for name in BACKENDS:
        assert Path("nmsolve", "backends", name) in shown


def test_the_arrows_are_those_that_are_held_to():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) ?\|$", PAGE, re.M)
    page = {}
    for folder, below in rows:
        names = set(re.findall(r"\w+", below))
        page[folder] = names - {"core"} | (set(CORE) if "core" in names else set())
    assert page == LAYERS
    assert list(page) == list(LAYERS)
    said = re.search(r"^The core is (.*?)\.", PAGE, re.M)
    assert said
    assert re.findall(r"\w+", said[1].replace(" and ", " ").replace("`", "")) == list(CORE)


# --- what to touch ------------------------------------------------------------------------------------------


SECTIONS = dict(re.findall(r"^### (Add .*?)\n(.*?)(?=^#|\Z)", PAGE, re.M | re.S))


def test_there_is_a_list_for_everything():
    assert list(SECTIONS) == [
        "Add a kernel",
        "Add a backend",
        "Add a score or a pruning method",
        "Add a client",
        "Add a command",
        "Add a benchmark",
    ]


@pytest.mark.parametrize("title", SECTIONS)
def test_the_words_to_follow_are_in_every_file(title):
    follow = re.search(r"^Follow (.*)\.$", SECTIONS[title], re.M)
    assert follow
    words = re.findall(r"`(.*?)`", follow[1])
    files = [
        path
        for step in re.findall(r"^\d\. (.*?):", SECTIONS[title], re.M)
        for path in re.findall(r"`(.*?)`", step)
    ]
    assert len(files) >= 4
    for path in files:
        text = path + (ROOT / path).read_text(encoding="utf-8")
        assert any(word in text for word in words), path


def test_a_backend_is_a_folder_and_a_row(monkeypatch, tmp_path):
    folder = tmp_path / "abacus"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for module in ("masks", "permutations"):
        text = f"from nmsolve.backends.torch import {module}\nasked = []\n"
        text += f"def __getattr__(name):\n    asked.append(name)\n    return getattr({module}, name)\n"
        (folder / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    row = Backend("abacus", "abacus", preferred_on=("cpu",), needs="torch", remedy="pip install torch")
    monkeypatch.setitem(BACKENDS, "abacus", row)
    scores = torch.rand(2, 12, 16, generator=torch.Generator().manual_seed(0))
    for solve in (
        lambda backend: nmsolve.transposable_mask(scores, 2, 4, backend=backend),
        lambda backend: nmsolve.transposable_mask(scores, 2, 4, method="tsenor", backend=backend),
        lambda backend: nmsolve.nm_mask(scores, 2, 4, backend=backend),
        lambda backend: nmsolve.assignment(scores[:, :, :12], backend=backend),
        lambda backend: nmsolve.sinkhorn(scores, backend=backend),
    ):
        assert torch.equal(solve("abacus"), solve("torch"))
    assert {"exact", "tsenor", "ordinary"} <= set(row.masks.asked)
    assert {"assignment", "sinkhorn_forward"} <= set(row.permutations.asked)


def test_a_command_is_a_file_and_a_row(monkeypatch, capsys):
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--out", required=True)

    def run(args: argparse.Namespace) -> None:
        if args.out == "wrong":
            raise nmsolve.NMSolveError("out: expected another path, got 'wrong'")
        if args.out == "late":
            raise WorkFailed("the disk is full")
        print(f"hello {args.out}")

    row = Command("greet", "say hello", "Says hello.", f"examples:\n\n{exit_codes()}", add_options, run)
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, row))
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "nmsolve greet" in capsys.readouterr().out
    assert cli.main(["greet", "--out", "there"]) == 0
    assert capsys.readouterr().out == "hello there\n"
    assert cli.main(["greet", "--out", "wrong"]) == USAGE
    assert capsys.readouterr().err == "nmsolve: error: --out: expected another path, got 'wrong'\n"
    assert cli.main(["greet", "--out", "late"]) == FAILED


def test_a_benchmark_is_a_result_and_a_table(monkeypatch, tmp_path):
    common.write_csv(tmp_path / "greetings.csv", [{"who": "me", "seconds": 0.5}])
    monkeypatch.setattr(columns, "RESULTS", tmp_path)

    def greetings() -> str:
        cells = [columns.left("who"), columns.right("seconds", columns.number("seconds"))]
        return columns.listing("greetings.csv", columns.results("greetings.csv"), cells)

    page = tmp_path / "page.md"
    text = "before\n\n<!-- table: greetings -->\n<!-- /table -->\n\nafter\n"
    page.write_text(text)
    monkeypatch.setattr(tables, "all_tables", lambda: {"greetings": greetings})
    monkeypatch.setattr(tables, "DOCUMENTS", (page,))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 1
    assert page.read_text() == text
    monkeypatch.setattr(sys, "argv", ["tables"])
    assert tables.main() == 0
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    assert tables.main() == 0
    shown = page.read_text()
    assert shown.startswith("before\n\n<!-- table: greetings -->\n| who | seconds |\n")
    assert "| me | 0.5 |" in shown
    assert f"torch {torch.__version__.partition('+')[0]}" in shown
    assert shown.endswith("<!-- /table -->\n\nafter\n")
