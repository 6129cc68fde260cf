"""Every example that the documents and docstrings show runs, every link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nmsolve
from nmsolve.cli import COMMANDS
from nmsolve.integrations.client import MissingClientError

ROOT = Path(__file__).resolve().parents[2]
# The pages of docs/integrations are run by tests/integrations.
DOCUMENTS = sorted(
    page
    for page in (ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
    if page.parent.name != "integrations"
)


def modules() -> list[str]:
    found = pkgutil.walk_packages(nmsolve.__path__, "nmsolve.")
    return sorted(
        {"nmsolve"} | {module.name for module in found if not module.name.startswith("nmsolve.kernels.")}
    )


@pytest.mark.parametrize("name", modules())
def test_docstrings(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except MissingClientError as error:
        pytest.skip(str(error))
    failed, _ = doctest.testmod(module, extraglobs={"torch": torch, "nmsolve": nmsolve})
    assert failed == 0


def test_every_public_function_has_an_example():
    for name in nmsolve.__all__:
        value = getattr(nmsolve, name)
        if callable(value) and not isinstance(value, type):
            assert ">>>" in (value.__doc__ or ""), name


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


# tests/integrations/test_docs.py runs the tutorial, with its command lines.
@pytest.mark.parametrize(
    "document",
    [path for path in DOCUMENTS if path.name != "tutorial.md"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_python_blocks(document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for block in blocks(document, "python"):
        exec(compile(block, str(document), "exec"), names)
    for block in blocks(document, "pycon"):
        test = doctest.DocTestParser().get_doctest(block, names, document.name, str(document), 0)
        assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose(document)):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def anchors(document: Path) -> set[str]:
    """What a link can point at: headings in small letters, without punctuation, spaces as hyphens."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_into_pages(document):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", prose(document)):
        assert anchor in anchors(document.parent / target if target else document), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_command_lines_use_options_that_exist(document):
    lines = [line for block in blocks(document, "(?:bash|sh|console)") for line in block.splitlines()]
    for line in lines:
        command = re.match(r"\$? ?nmsolve ([\w-]+)(.*)", line)
        if command:
            shown = subprocess.run(
                [Path(sys.executable).parent / "nmsolve", command[1], "--help"],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            for option in re.findall(r"--[\w-]+", command[2]):
                assert option in shown, f"{line}: {option}"


def test_the_page_of_the_command_line_has_every_command():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    lines = "\n".join(block for block in re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S))
    for command in COMMANDS:
        assert f"| `nmsolve {command.name}` |" in page
        assert re.search(rf"^nmsolve {command.name}\b", lines, re.M), command.name


def test_tables_show_what_the_results_say():
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench"), "tables", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
