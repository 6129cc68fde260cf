"""The API reference is made from the docstrings, and every public name is in it."""

from __future__ import annotations

import html
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nmsolve.integrations.client import MissingClientError

pytest.importorskip("pdoc")

ROOT = Path(__file__).resolve().parents[2]
SURFACE = json.loads(Path(__file__).with_name("public_surface.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, str]:
    """The page of each module, by the module's name."""
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "reference.py", folder], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        ".".join(file.relative_to(folder).with_suffix("").parts): file.read_text(encoding="utf-8")
        for file in folder.rglob("*.html")
    }


def words(text: str) -> str:
    """Letters and digits alone: what is left of a text when markup is taken off."""
    return " ".join(re.findall(r"[A-Za-z0-9]+", text))


def section(page: str, name: str) -> str:
    """What a page says of a name, without markup."""
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.S)
    assert found, name
    return words(html.unescape(re.sub(r"<[^>]*>", "", found[1])))


@pytest.mark.parametrize("module", sorted({*SURFACE["names"], "nmsolve.checkpoint"}))
def test_every_public_name_has_its_docstring(module, pages):
    try:
        found = importlib.import_module(module)
    except MissingClientError as error:
        assert module not in pages
        pytest.skip(str(error))
    for name in found.__all__:
        value = getattr(found, name)
        said = section(pages[module], name)
        if inspect.isclass(value) or inspect.isroutine(value):
            first = re.sub(r":\w+:`[~.]*([^`]*)`", r"\1", inspect.getdoc(value) or "").partition("\n")[0]
            assert words(first), f"{module}.{name} has no docstring"
            assert words(first) in said, f"{module}.{name}"


def test_what_is_inside_the_packages_is_left_out(pages):
    assert not [name for name in pages if ".backends" in name or ".kernels" in name or "._" in name]
    assert not re.search(r'<section id="_[^_]', pages["nmsolve"])


def test_arguments_are_listed(pages):
    said = section(pages["nmsolve"], "transposable_mask")
    for part in ("Parameters", "return_solution", "Returns", "Raises", "NMSolveError", "Examples"):
        assert words(part) in said, part
