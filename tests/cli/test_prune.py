"""``nmsolve prune`` and ``nmsolve eval-ppl`` on a tiny checkpoint folder."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve.checkpoint.mask_files import load_masks
from nmsolve.cli import main
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
    (folder / "text.txt").write_text(text)
    return folder


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def prune(checkpoint, out, *arguments) -> int:
    text = checkpoint / "text.txt"
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
    text = checkpoint / "text.txt"
    arguments = ("--pattern", "2:4", "--transposable", "--method", "wanda", "--calibration", text)
    assert run("prune", checkpoint, "--out", tmp_path / "out", *arguments, "--backend", "torch") == 2
    assert "480 tokens do not fill one sequence of 2,048" in capsys.readouterr().err
    arguments += ("--sequence-length", 60)
    assert run("prune", checkpoint, "--out", tmp_path / "out", *arguments, "--backend", "torch") == 0
    shown, told = capsys.readouterr()
    assert "480 tokens give 8 sequences of 60, 128 were asked for" in told
    assert "wanda, 2:4 transposable by exact: 14 layers" in shown
    assert "50.00% of" in shown
    assert "6,304 of the model's 24,736 parameters are in no pruned layer" in shown
    assert "calibrated on 480 tokens" in shown
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
    text = ("--calibration", checkpoint / "text.txt")
    options = ("--pattern", "4:8", "--method", "wanda", "--initial-masks", first)
    assert prune(first, second, *options, *text) == 0
    before, after = load_masks(first), load_masks(second)
    assert not any((after[name] & ~before[name]).any() for name in after)


def test_eval_ppl(checkpoint, capsys, tmp_path):
    text = checkpoint / "text.txt"
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
        (["--pattern", "2-4"], "--pattern: expected 'N:M'"),
        (["--pattern", "nothing=2:4"], "'nothing' matches none"),
        (["--pattern", "2:4", "--mask-method", "tsenor"], "--mask-method: 'tsenor' needs --transposable"),
        (
            ["--pattern", "2:4", "--method", "wanda", "--iterations", "5"],
            "--iterations: method 'wanda' has none",
        ),
        (["--pattern", "2:4", "--device", "tpu"], "--device: expected cpu"),
        (["--pattern", "2:4", "--samples", "0"], "samples: expected an integer of at least 1"),
        (["--pattern", "2:4", "--calibration", __file__ + ".safetensors"], "--calibration: "),
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


def test_overwriting_what_an_earlier_run_wrote(checkpoint, tmp_path):
    out = tmp_path / "out"
    for pattern, *overwrite in (("2:4",), ("4:8", "--overwrite")):
        options = ("--pattern", pattern, "--method", "magnitude", "--no-picture", *overwrite)
        assert prune(checkpoint, out, *options) == 0
    assert [path.name for path in (out / "masks").iterdir()] == ["4of8.masks.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_first_attempt_that_failed_does_not_hinder_the_next(checkpoint, tmp_path, capsys):
    """The last --sequence-length decides; a model with 64 positions cannot take 70 tokens."""
    model = tmp_path / "gpt2"
    shutil.copytree(checkpoint, model)
    tiny_models.make("gpt2").save_pretrained(model)
    options = ("--pattern", "2:4", "--method", "wanda", "--no-picture")
    assert prune(model, tmp_path / "out", *options, "--sequence-length", 70) == 2
    assert "cannot be called on the first batch, int64 (1, 70): IndexError" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2"]
    assert prune(model, tmp_path / "out", *options) == 0


def test_a_failure_on_the_way_keeps_the_finished_layers(checkpoint, tmp_path, capsys):
    def change(state):
        state["model.layers.1.input_layernorm.weight"].fill_(torch.inf)

    model = changed(checkpoint, tmp_path / "model", change)
    assert prune(model, tmp_path / "out", "--pattern", "2:4", "--method", "wanda") == 1
    error = capsys.readouterr().err
    assert "the inputs of model.layers.1.self_attn.q_proj hold NaN" in error
    assert f"finished layers are in {tmp_path / '.out.unfinished'}" in error
    assert len(list((tmp_path / ".out.unfinished" / "layers").iterdir())) == 7
    assert not (tmp_path / "out").exists()


def test_a_half_precision_checkpoint_in_shards(checkpoint, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny_models.make("llama").bfloat16().save_pretrained(model, max_shard_size="20KB")
    assert (model / "model.safetensors.index.json").exists()
    assert prune(model, out, "--pattern", "2:4", "--method", "sparsegpt", "--no-picture") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert again.dtype == torch.bfloat16
    for name, mask in load_masks(out).items():
        assert not again.state_dict()[name][~mask].any()


def test_other_files_of_a_checkpoint_are_copied(checkpoint, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(checkpoint, model)
    (model / "LICENSE").write_text("free")
    (model / "preprocessor_config.json").write_text("{}")
    (model / "nmsolve_report.png").write_text("of an earlier run")
    (model / "pytorch_model.bin").write_text("dense")
    assert prune(model, out, "--pattern", "2:4", "--method", "magnitude", "--no-picture") == 0
    assert (out / "LICENSE").read_text() == "free"
    assert (out / "preprocessor_config.json").exists()
    assert not (out / "nmsolve_report.png").exists()
    assert not (out / "pytorch_model.bin").exists()


def test_images_need_no_tokenizer(tmp_path):
    tiny_models.make("vit").save_pretrained(tmp_path / "vit")
    images = tmp_path / "images.safetensors"
    save_file({"images": torch.randn(6, 3, 16, 16)}, images)
    options = ("--pattern", "4:8", "--method", "wanda", "--batch-size", 2, "--no-picture", "--quiet")
    assert run("prune", tmp_path / "vit", "--out", tmp_path / "out", "--calibration", images, *options) == 0
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    assert report["settings"]["calibration_batches"] == 3
    assert {row["tokens"] for row in report["layers"]} == {6 * 17}  # patches and the class token


def changed(checkpoint, folder, change):
    """A copy of the checkpoint whose weights ``change`` has worked on."""
    shutil.copytree(checkpoint, folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message", "code"),
    [
        (lambda state: state.pop(UP), f"LlamaForCausalLM needs {UP}, which is not there (1 missing)", 2),
        (lambda state: state.update({UP: torch.ones(3, 3)}), f"{UP} has another shape than in", 2),
        (lambda state: state[UP].fill_(torch.nan), f"{UP}: expected finite values, got 2048 NaN", 1),
    ],
    ids=["missing", "shape", "nan"],
)
def test_weights_that_are_wrong(checkpoint, tmp_path, capsys, change, message, code):
    """Not filled with random numbers, as transformers does."""
    model = changed(checkpoint, tmp_path / "model", change)
    assert prune(model, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude") == code
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_are_left_behind_are_told(checkpoint, tmp_path, capsys):
    model = changed(checkpoint, tmp_path / "model", lambda state: state.update(more=torch.ones(3)))
    assert prune(model, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude", "--no-picture") == 0
    assert f"1 tensor in {model} is no part of LlamaForCausalLM: more\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": None}, "expected a config.json that names its architecture"),
        ({"architectures": ["Missing"]}, "has no model Missing"),
        ({"model_type": "missing"}, "the configuration cannot be loaded"),
        ({"model_type": "missing", "auto_map": {"AutoConfig": "a.B"}}, "contains custom code"),
    ],
)
def test_configurations_that_are_wrong(checkpoint, tmp_path, capsys, changes, message):
    model = tmp_path / "model"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))
    assert prune(model, tmp_path / "out", "--pattern", "2:4", "--method", "magnitude") == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""  # no question whether to run code


def test_only_causal_models_have_a_perplexity(checkpoint, tmp_path, capsys):
    model = tmp_path / "bert"
    shutil.copytree(checkpoint, model)
    tiny_models.make("bert").save_pretrained(model)
    assert run("eval-ppl", model, "--text", checkpoint / "text.txt", "--window", 16) == 2
    assert "BertForMaskedLM is no causal language model" in capsys.readouterr().err


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert run("eval-ppl", tmp_path, "--text", tmp_path / "x") == 2
    assert f"--text: {tmp_path / 'x'} is not a file" in capsys.readouterr().err
    (tmp_path / "x").touch()
    assert run("eval-ppl", tmp_path, "--text", tmp_path / "x") == 2
    assert "expected .safetensors weights, found none in this folder" in capsys.readouterr().err
    save_file({"fc.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    assert run("eval-ppl", tmp_path, "--text", tmp_path / "x") == 2
    assert "expected a checkpoint folder with a config.json" in capsys.readouterr().err
