"""docs/examples/sparse_language_model.py, with tiny sizes."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nmsolve

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "examples" / "sparse_language_model.py"
TINY = ("--width", "32", "--blocks", "1", "--batch", "2", "--steps", "12", "--refresh", "4")


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("sparse_language_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, monkeypatch, capsys):
    """Exit code, standard output and standard error of the example with these arguments."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "300")  # by which tqdm of old cuts its line
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *TINY, *map(str, arguments)])
        code = example.main()
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("ordinary", [False, True])
def test_the_saved_model_is_sparse_and_has_learnt(run, tmp_path, ordinary):
    code, out, err = run("--pattern", "8:16", *["--ordinary"] * ordinary, "--out", tmp_path)
    assert code == 0
    weights = load_file(tmp_path / "model.safetensors")
    masks = nmsolve.load_masks(tmp_path / "model.masks.safetensors")
    assert len(masks) == 7
    for name, mask in masks.items():
        nmsolve.check_mask(mask, 8, 16, transposable=not ordinary)
        assert not weights[name][~mask].any()
        assert weights[name][mask].count_nonzero() > 0.99 * mask.sum()
    if ordinary:
        with pytest.raises(nmsolve.NMSolveError):
            [nmsolve.check_mask(mask, 8, 16) for mask in masks.values()]
    assert float(re.search(r"held-out loss (\S+) nats", out)[1]) < math.log(256) - 0.1
    assert {"loss", "held-out loss", "kept share", "flips per step"} <= set(
        re.findall(r"([a-z][a-z -]+) [0-9.]", err)
    )
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_it_printed_is_the_saved_models_loss(example, run, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(
        bytes(torch.randint(97, 105, (8000,), generator=torch.Generator().manual_seed(0)).tolist())
    )
    _, first, _ = run("--text", text, "--refresh", 40, "--out", tmp_path / "model")  # never refreshed
    _, second, _ = run("--text", text, "--refresh", 40, "--out", tmp_path / "model")
    assert first == second
    model = example.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    loss = example.held_out_loss(model, example.read(text)[1])
    assert f"held-out loss {loss:.4f} " in first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--text", "missing.txt"), "missing.txt"),
        (("--text", "short.txt"), "at least 2560 bytes to learn from, got 5"),
        (("--refresh", "0"), "refresh: expected"),
        (("--pattern", "5:4"), "5"),
        (("--gradient", "sr-ste", "--decay", "0"), "decay"),
        (("--pattern", "32:64"), "no layer to prune"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_nothing(run, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("short")
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


@pytest.mark.parametrize(
    "arguments", [("--steps", "0"), ("--width", "33"), ("--rate", "nan"), ("--batch", "-1")]
)
def test_wrong_sizes_are_wrong_usage(run, arguments):
    with pytest.raises(SystemExit) as ended:
        run(*arguments)
    assert ended.value.code == 2
