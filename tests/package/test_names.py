"""What documents, docstrings and comments name is there, so that a move leaves no dead names.

The changelog is left out; it names what was.
"""

from __future__ import annotations

import importlib
import io
import re
import tokenize
from pathlib import Path

import pytest

from nmsolve.integrations.client import MissingClientError

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("nmsolve", "kernels", "bench", "tests", "docs")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(TOPS)}|\.ci)/[\w./*-]*[\w*]")
SHORT = re.compile(r"`((?:[\w-]+/)*[\w-]+\.(?:py|csv))`")
BENCHMARK = re.compile(r"(?:python bench|\$\(BENCH\)) ([a-z]\w*)")
TARGET = re.compile(r"(?:`|^\$ )make ([a-z][\w-]*)", re.M)
DOTTED = re.compile(r"(?<![\w./])nmsolve(?:\.[A-Za-z]\w*)+")


def dead_paths(text: str) -> set[str]:
    """What looks like a file or a folder of the repository, and is none."""
    return {path for path in PATH.findall(text) if not any(ROOT.glob(path))}


def dead_short_names(text: str) -> set[str]:
    """Files in backticks that are neither in the root nor in nmsolve, and no file's name alone."""
    files = {file.name for top in TOPS for file in (ROOT / top).rglob("*.*")}
    return {
        name
        for name in SHORT.findall(text)
        if not (name in files or (ROOT / name).exists() or (ROOT / "nmsolve" / name).exists())
    }


def dead_dotted_names(text: str) -> set[str]:
    """What looks like a module or an attribute of nmsolve, and is none."""
    return {name for name in set(DOTTED.findall(text)) if not resolves(name)}


def resolves(name: str) -> bool:
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except MissingClientError:
            return True
        except ModuleNotFoundError:
            continue
        for attribute in parts[k:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def dead_commands(text: str) -> set[str]:
    """Benchmarks that ``python bench`` does not know, and targets that the Makefile does not have."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    known = {file.stem for file in (ROOT / "bench").glob("*.py")}
    known |= {file.parent.name for file in (ROOT / "bench").glob("*/__main__.py")}
    return (set(BENCHMARK.findall(text)) - known) | (set(TARGET.findall(text)) - set(targets))


def prose(file: Path) -> str:
    """A source; of tests only comments and long strings, for their code makes up names."""
    text = file.read_text(encoding="utf-8")
    if ROOT / "tests" not in file.parents:
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    long = ('"""', "'''")
    return "\n".join(
        token.string
        for token in tokens
        if token.type == tokenize.COMMENT
        or (token.type == tokenize.STRING and token.string.lstrip("rbf").startswith(long))
    )


def test_dead_names_are_found():
    assert dead_paths("see tests/no_such_file.py, `bench/common.py` and /usr/bench/none.py") == {
        "tests/no_such_file.py"
    }
    assert dead_paths("kernels/none/, nmsolve/ops/masks.py, docs/*.md, docs/none*.md.") == {
        "kernels/none",
        "docs/none*.md",
    }
    assert dead_short_names("`none.py`, `nm.py`, `ops/masks.py`, `ops/none.py`") == {"none.py", "ops/none.py"}
    assert dead_dotted_names("nmsolve.sinkhorn(x), `nmsolve.reference`, nmsolve.ops.masks.none") == {
        "nmsolve.ops.masks.none",
        "nmsolve.reference",
    }
    assert dead_commands(
        "`make test` or `make tea`, python bench tables, python bench tales, $(BENCH) none"
    ) == {
        "none",
        "tales",
        "tea",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents(document):
    text = document.read_text(encoding="utf-8")
    assert not dead_paths(text) | dead_short_names(text) | dead_dotted_names(text) | dead_commands(text)


@pytest.mark.parametrize("top", TOPS)
def test_sources(top):
    dead = {}
    for file in sorted((ROOT / top).rglob("*.py")):
        if file != Path(__file__):
            text = prose(file)
            dead[file] = dead_paths(text) | dead_dotted_names(text) | dead_commands(text)
    assert not {str(file.relative_to(ROOT)): names for file, names in dead.items() if names}


@pytest.mark.parametrize("name", ["Makefile", "pyproject.toml", ".ci/run", ".ci/constraints.txt"])
def test_files_of_the_build(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert not dead_paths(text) | dead_commands(text)


def test_every_page_is_in_an_index():
    """docs/README.md lists every page but those that docs/integrations/README.md lists."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").as_posix()
        if name != "README.md" and (page.parent.name != "integrations" or page.name == "README.md"):
            assert f"]({name})" in index, name
