"""Text for calibration and evaluation: tokenizers, the BOS token, and texts that are too short."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from mask_command import one_error
from safetensors.torch import save_file

from nmsolve import NMSolveError
from nmsolve.cli import main
from nmsolve.errors import NMSolveWarning
from nmsolve.prune import evaluate_checkpoint, make_batches, perplexity, prune_checkpoint

transformers = pytest.importorskip("transformers")
BOS = 0
QUICK = {"backend": "torch", "progress": False, "picture": False}


class Words:
    """Numbers in the text are the tokens; a BOS token comes first."""

    bos_token_id = BOS
    unk_token_id = 1

    def __call__(self, text):
        return {"input_ids": [BOS, *map(int, text.split())]}


class Bare(Words):
    """Has no BOS token."""

    bos_token_id = None

    def __call__(self, text):
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(2, 60))))
    return path


def save_tokenizer(folder, bos=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": BOS, "<unk>": 1} | {str(k): k for k in range(2, tiny_models.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>"
    )
    made.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    tiny_models.make("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


# ---- BOS -------------------------------------------------------------------------------------------------


def test_every_window_begins_as_the_tokenizer_begins_a_text(text):
    options = {"samples": 8, "sequence_length": 8, "batch_size": 8}
    (batch,) = make_batches(text, tokenizer=Words(), **options)
    assert batch.shape == (8, 8)
    assert (batch[:, 0] == BOS).all()
    assert torch.equal(batch[:, 1:].flatten(), torch.arange(2, 58))
    (batch,) = make_batches(text, tokenizer=Words(), bos=False, **options | {"samples": 7})
    assert torch.equal(batch.flatten(), torch.arange(2, 58))
    (batch,) = make_batches(text, tokenizer=Bare(), **options | {"samples": 7})
    assert torch.equal(batch.flatten(), torch.arange(2, 58))


def test_bos_that_cannot_be_had(text):
    with pytest.raises(NMSolveError, match="bos: the tokenizer has no BOS token"):
        make_batches(text, tokenizer=Bare(), bos=True)
    with pytest.raises(NMSolveError, match="bos: expected a text file to calibrate on"):
        make_batches(torch.arange(99), sequence_length=9, bos=True)
    save_file({"tokens": torch.arange(99)}, text.with_name("tokens.safetensors"))
    with pytest.raises(NMSolveError, match="bos: expected text, got tokens in"):
        make_batches(text.with_name("tokens.safetensors"), bos=True)
    with pytest.raises(NMSolveError, match="sequence_length: expected at least 2 with a BOS token, got 1"):
        make_batches(text, tokenizer=Words(), sequence_length=1)


def test_perplexity_with_bos(folder, text, capsys):
    model, ids = tiny_models.make("llama"), torch.arange(2, 60)
    windows = torch.cat([torch.zeros(8, 1, dtype=torch.int64), ids[:56].view(8, 7)], dim=1)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss
    found = perplexity(model, ids, window=8, bos=BOS)
    assert found.perplexity == pytest.approx(loss.exp().item(), rel=1e-5)
    assert (found.windows, found.window, found.bos) == (8, 8, True)
    assert evaluate_checkpoint(folder, text, window=8, progress=False) == found
    without = evaluate_checkpoint(folder, text, window=8, bos=False, progress=False)
    assert without == perplexity(model, ids, window=8)
    assert without.perplexity != found.perplexity

    arguments = ["eval-ppl", str(folder), "--text", str(text), "--window", "8", "--quiet"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith("(8 windows of 8 tokens, begun with BOS)\n")
    assert main([*arguments, "--no-bos"]) == 0
    assert capsys.readouterr().out.endswith("(7 windows of 8 tokens)\n")
    save_tokenizer(folder, bos=False)
    assert main([*arguments, "--bos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bos"] is True


def test_pruning_says_whether_sequences_began_with_bos(folder, text, tmp_path, capsys):
    arguments = ["prune", str(folder), "--pattern", "4:8", "--method", "wanda", "--calibration", str(text)]
    arguments += ["--sequence-length", "8", "--samples", "4", "--backend", "torch", "--no-picture"]
    assert main([*arguments, "--out", str(tmp_path / "with")]) == 0
    assert "calibrated on 32 tokens, each sequence begun with BOS\n" in capsys.readouterr().out
    assert main([*arguments, "--out", str(tmp_path / "without"), "--no-bos"]) == 0
    assert "calibrated on 32 tokens\n" in capsys.readouterr().out
    reports = [json.loads((tmp_path / n / "nmsolve_report.json").read_text()) for n in ("with", "without")]
    assert [report["settings"]["bos"] for report in reports] == [True, False]
    errors = [[row["relative_error"] for row in report["layers"]] for report in reports]
    assert errors[0] != errors[1]


# ---- tokenizers ------------------------------------------------------------------------------------------


def test_tokenizers_are_loaded_for_text_alone(folder, text, tmp_path, monkeypatch):
    (folder / "tokenizer.json").write_text("{")
    prune_checkpoint(folder, tmp_path / "one", "4:8", method="magnitude", **QUICK)
    save_file({"tokens": tiny_models.tokens(8)}, tmp_path / "tokens.safetensors")
    options = {"method": "wanda", "calibration": tmp_path / "tokens.safetensors", "samples": 4, **QUICK}
    prune_checkpoint(folder, tmp_path / "two", "4:8", **options)
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "{"
    with pytest.raises(NMSolveError, match=r"tokenizer.json: the tokenizer cannot be loaded: .*or give"):
        prune_checkpoint(folder, tmp_path / "three", "4:8", **options | {"calibration": text})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\0\1"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text('{"model": 3}'), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "cannot be loaded"),
        (
            lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
            "no tokenizer to read text with: there is no tokenizer.json; copy it there, or give tokens",
        ),
    ],
    ids=["bytes", "no model", "a list", "none"],
)
def test_tokenizers_that_do_not_load_are_told_in_a_line(folder, text, capsys, spoil, message):
    spoil(folder)
    assert main(["eval-ppl", str(folder), "--text", str(text), "--window", "8"]) == 2
    error = one_error(capsys)
    assert message in error
    assert str(folder) in error


def test_texts_that_the_tokenizer_does_not_know(text):
    text.write_text("1 " * 30 + "5 " * 9)
    with pytest.warns(NMSolveWarning, match="30 of 39 tokens are unknown to the tokenizer"):
        make_batches(text, tokenizer=Bare(), samples=4, sequence_length=8)
    text.write_text("word")
    with pytest.raises(NMSolveError, match="the tokenizer turns 4 characters into no tokens"):
        make_batches(text, tokenizer=lambda text: {"input_ids": []})


def test_texts_that_are_short(text):
    with pytest.warns(NMSolveWarning, match="58 tokens give 7 sequences of 8, 9 were asked for"):
        make_batches(text, tokenizer=Bare(), samples=9, sequence_length=8)
    with pytest.raises(NMSolveError, match="calibration: 58 tokens do not fill one sequence of 2,048; give"):
        make_batches(text, tokenizer=Bare())
