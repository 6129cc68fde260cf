"""``nmsolve prune`` and ``nmsolve eval-ppl`` on a tiny checkpoint folder."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from safetensors.torch import save_file

import nmsolve
from nmsolve.cli import main
from nmsolve.packed import load_masks
from nmsolve.prune import perplexity

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_models.make("llama").save_pretrained(folder)
    words = {f"w{k}": k for k in range(tiny_models.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    text = " ".join(f"w{k}" for k in tiny_models.tokens(20).flatten().tolist())
    (folder.parent / "text.txt").write_text(text)
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def prune(checkpoint, out, *arguments) -> int:
    text = checkpoint.parent / "text.txt"
    return run(
        "prune", checkpoint, "--out", out, "--calibration", text, "--sequence-length", 16, "--samples", 4,
        "--backend", "torch", "--quiet", *arguments,
    )  # fmt: skip


def test_prune_writes_a_model_that_transformers_loads(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert prune(checkpoint, out, "--pattern", "4:8", "--transposable", "--method", "wanda") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(out)
    masks = load_masks(out)
    assert len(masks) == 14
    for name, mask in masks.items():
        nmsolve.check_mask(mask, 4, 8)
        assert torch.equal(model.state_dict()[name] != 0, mask)
    report = json.loads((out / "nmsolve_report.json").read_text())
    assert report["settings"]["calibration_batches"] == 4
    assert (out / "nmsolve_report.png").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_patterns_by_layer(checkpoint, tmp_path):
    out = tmp_path / "out"
    patterns = ["--pattern", "2:4", "--pattern", "mlp.*=4:8", "--pattern", "layers.0.*=dense"]
    assert prune(checkpoint, out, *patterns, "--method", "magnitude", "--no-picture") == 0
    names = load_masks(out).keys()
    assert len(names) == 7
    assert all(name.startswith("model.layers.1.") for name in names)
    assert not (out / "nmsolve_report.png").exists()


def test_the_summary(checkpoint, tmp_path, capsys):
    text = checkpoint.parent / "text.txt"
    arguments = ("--pattern", "2:4", "--transposable", "--method", "wanda", "--calibration", text)
    assert run("prune", checkpoint, "--out", tmp_path / "out", *arguments, "--backend", "torch") == 0
    shown = capsys.readouterr().out
    assert "wanda, 2:4 transposable by exact: 14 layers" in shown
    assert "50.00% of" in shown
    assert "mean relative reconstruction error" in shown


def test_an_interrupted_command_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    from nmsolve.prune import run as pruning

    options = ("--pattern", "2:4", "--method", "wanda")
    assert prune(checkpoint, tmp_path / "whole", *options) == 0
    calls = []

    def interrupted(self, *arguments, whole=pruning.Run._layer):
        if len(calls) == 9:
            raise KeyboardInterrupt
        calls.append(arguments)
        return whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pruning.Run, "_layer", interrupted)
        assert prune(checkpoint, tmp_path / "out", *options) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert prune(checkpoint, tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    assert report["resumed"] == 9
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_initial_masks_from_an_earlier_run(checkpoint, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert prune(checkpoint, first, "--pattern", "6:8", "--method", "magnitude") == 0
    text = ("--calibration", checkpoint.parent / "text.txt")
    options = ("--pattern", "4:8", "--method", "wanda", "--initial-masks", first)
    assert prune(first, second, *options, *text) == 0
    before, after = load_masks(first), load_masks(second)
    assert not any((after[name] & ~before[name]).any() for name in after)


def test_eval_ppl(checkpoint, capsys, tmp_path):
    text = checkpoint.parent / "text.txt"
    assert (
        run("eval-ppl", checkpoint, "--text", text, "--window", 16, "--windows", 3, "--json", "--quiet") == 0
    )
    found = json.loads(capsys.readouterr().out)
    expected = perplexity(tiny_models.make("llama"), tiny_models.tokens(20).flatten(), window=16, windows=3)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert (found["windows"], found["window"]) == (3, 16)
    save_file({"tokens": tiny_models.tokens(20).flatten()}, tmp_path / "tokens.safetensors")
    tokens = tmp_path / "tokens.safetensors"
    assert run("eval-ppl", checkpoint, "--text", tokens, "--window", 16, "--windows", 3, "--quiet") == 0
    assert capsys.readouterr().out.startswith(f"perplexity {found['perplexity']:.4f} (3 windows")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pattern", "2-4"], "--pattern: pattern: expected 'N:M'"),
        (["--pattern", "nothing=2:4"], "'nothing' matches none"),
        (["--pattern", "2:4", "--mask-method", "tsenor"], "--mask-method: 'tsenor' needs --transposable"),
        (
            ["--pattern", "2:4", "--method", "wanda", "--iterations", "5"],
            "--iterations: method 'wanda' has none",
        ),
        (["--pattern", "2:4", "--device", "tpu"], "--device: expected cpu"),
        (["--pattern", "2:4", "--samples", "0"], "samples: expected an integer of at least 1"),
        (["--pattern", "2:4", "--calibration", "missing"], "--calibration: missing is not a file"),
    ],
)
def test_mistakes_are_told_in_a_line_and_nothing_is_written(checkpoint, tmp_path, capsys, arguments, message):
    assert prune(checkpoint, tmp_path / "out", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_in_the_way(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert prune(checkpoint, tmp_path / "out", "--pattern", "2:4") == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert prune(checkpoint, tmp_path / "out", "--pattern", "2:4", "--overwrite") == 2
    assert "nmsolve did not write it" in capsys.readouterr().err
    assert prune(checkpoint, checkpoint / "out", "--pattern", "2:4") == 2
    assert "expected a path outside" in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert run("eval-ppl", tmp_path, "--text", tmp_path / "x") == 2
    assert f"--text: {tmp_path / 'x'} is not a file" in capsys.readouterr().err
    (tmp_path / "x").touch()
    assert run("eval-ppl", tmp_path, "--text", tmp_path / "x") == 2
    assert "expected a checkpoint folder with a config.json" in capsys.readouterr().err
