"""The pages of docs/integrations and the tutorial, run from top to bottom; missing clients."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nmsolve
from nmsolve.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "integrations").glob("*.md"))
CLIENTS = {
    "llmcompressor.md": "llmcompressor",
    "modelopt.md": "modelopt",
    "lightning.md": "pytorch_lightning",
    "transformers.md": "accelerate",  # Trainer asks for it
}

pytest.importorskip("transformers")


def steps(page: Path) -> list[tuple[str, str]]:
    """``(language, text)`` of every fenced block, in their order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page, monkeypatch, tmp_path):
    if page.name in CLIENTS:
        pytest.importorskip(CLIENTS[page.name])
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    blocks = [text for language, text in steps(page) if language == "python"]
    assert blocks or page.name == "README.md"
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_every_adapter_has_a_page():
    index = (ROOT / "docs" / "integrations" / "README.md").read_text(encoding="utf-8")
    for page in PAGES:
        assert page.name == "README.md" or f"({page.name})" in index
    adapters = {path.stem for path in (ROOT / "nmsolve" / "integrations").glob("[a-z]*.py")}
    named = set(re.findall(r"^\| \[.*?\| `(\w+)\.\w+`", index, re.M))
    assert adapters - {"callbacks", "client", "weights"} == named


def test_the_page_says_which_transformers_llmcompressor_brings():
    pytest.importorskip("llmcompressor")
    (range_,) = [
        line.removeprefix("transformers")
        for line in importlib.metadata.requires("llmcompressor")
        if re.match(r"transformers\b", line)
    ]
    page = (ROOT / "docs" / "integrations" / "llmcompressor.md").read_text(encoding="utf-8")
    low, high = (re.search(rf"{sign}=([\d.]+)", range_)[1] for sign in (">", "<"))
    version = importlib.metadata.version("llmcompressor")
    assert f"version {version} asks for {low} to {high}" in page


def test_tutorial(monkeypatch, tmp_path, capsys):
    """Python and command lines together; the last section, with a real model, is left out."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    perplexities = {}
    for language, text in steps(ROOT / "docs" / "tutorial.md"):
        if "SmolLM2" in text:
            break
        if language == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
            continue
        for line in text.splitlines():
            dollar, command, *arguments = shlex.split(line)
            assert (dollar, command) == ("$", "nmsolve")
            capsys.readouterr()
            assert main([*arguments, "--quiet"]) == 0
            if arguments[0] == "eval-ppl":
                perplexities[arguments[1]] = float(re.search(r"\d+\.\d+", capsys.readouterr().out)[0])
    vocabulary = len(names["words"])
    dense, sparse, tuned = (names[name].perplexity for name in ("dense", "sparse", "tuned"))
    assert dense < sparse < vocabulary
    assert tuned < sparse
    assert perplexities["tiny"] == pytest.approx(dense, rel=1e-3)
    assert dense < perplexities["tiny-alps"] < perplexities["tiny-wanda"]
    assert perplexities["tiny-tuned"] == pytest.approx(tuned, rel=1e-3)
    weights = load_file(tmp_path / "tiny-tuned" / "model.safetensors")
    masks = nmsolve.load_masks(tmp_path / "tiny-tuned")
    assert len(masks) == 14
    for name, mask in masks.items():
        nmsolve.check_mask(mask, 2, 16)
        assert torch.equal(weights[name] != 0, mask)


@pytest.mark.parametrize(
    ("adapter", "hidden", "package"),
    [
        ("modelopt", "modelopt.torch.opt.conversion", "nvidia-modelopt"),
        ("llmcompressor", "compressed_tensors.distributed", "llmcompressor"),
    ],
)
def test_a_missing_client_says_how_to_get_it(adapter, hidden, package, monkeypatch):
    monkeypatch.delitem(sys.modules, f"nmsolve.integrations.{adapter}", raising=False)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(
        nmsolve.NMSolveError, match=f"{package} cannot be imported .*pip install {package}"
    ) as e:
        importlib.import_module(f"nmsolve.integrations.{adapter}")
    assert isinstance(e.value, ModuleNotFoundError)
