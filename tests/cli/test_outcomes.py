"""Exit codes, messages and names from files: the same for every command."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from checkpoints import llama
from mask_command import exit_code, one_error
from permutable import build
from safetensors.torch import load_file, save_file

from nmsolve.cli import COMMANDS
from nmsolve.cli.command import FAILED, USAGE, Command, Parser, run
from nmsolve.errors import NMSolveError, WorkFailed

FORGED = "fc\nnmsolve: all is well\x1b[2K\u202e.weight"


def spoil(folder, value=float("nan")):
    """Makes one weight of a checkpoint folder of transformers not finite."""
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def models(tmp_path):
    pytest.importorskip("transformers")
    build("llama").float().save_pretrained(tmp_path / "model")
    spoil(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["mask", "--pattern", "2:4", "--backend", "torch"],
        ["mask", "--pattern", "2:4", "--backend", "torch", "--transposable"],
        ["permute", "--pattern", "2:4"],
        ["permute", "--pattern", "2:4", "--transposable"],
        ["prune", "--pattern", "2:4", "--method", "magnitude", "--no-picture", "--backend", "torch"],
    ],
)
def test_weights_that_are_not_finite(arguments, models, capsys):
    command, *options = arguments
    code = exit_code([command, str(models / "model"), "--out", str(models / "out"), "--quiet", *options])
    assert code == FAILED == 1
    message = one_error(capsys)
    assert "model.layers.1.mlp.down_proj.weight" in message
    assert "expected finite values" in message
    if command == "mask":
        assert message.endswith("the first nan at (3, 5)\n"), "the place in the tensor, as it is stored"
    assert [path.name for path in models.iterdir()] == ["model"]


@pytest.mark.parametrize("command", ["mask", "permute", "prune"])
def test_outputs_are_checked_alike(command, models, capsys):
    given = [command, str(models / "model"), "--pattern", "2:4"]
    if command == "prune":
        given += ["--method", "magnitude"]
    (models / "taken").mkdir()
    (models / "alias").symlink_to(models / "model")
    for out, extra, message in (
        ("model", ["--overwrite"], "is the input itself"),
        ("alias", ["--overwrite"], "is the input itself"),
        ("model/new", [], "expected a path outside"),
        ("absent/new", [], "does not exist"),
        ("taken", [], "exists; --overwrite replaces it"),
        ("taken", ["--overwrite"], "nmsolve did not write it (there is no nmsolve_report.json)"),
    ):
        assert exit_code([*given, "--out", str(models / out), *extra]) == USAGE == 2
        error = one_error(capsys)
        assert error.startswith("nmsolve: error: --out: ")
        assert message in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mask", "{}", "--pattern", "5:4", "--out", "x"], "--pattern: n: expected 0 <= n <= m=4"),
        (["permute", "{}", "--pattern", "2-4", "--out", "x"], "--pattern: expected 'N:M'"),
        (["prune", "{}", "--pattern", "mlp.*=2-4", "--out", "x"], "--pattern: expected 'N:M'"),
        (["bench", "--pattern", "2-4"], "--pattern: expected 'N:M'"),
        (["mask", "{}", "--pattern", "2:4", "--out", "x", "--device", "tpu"], "--device: expected cpu"),
        (["prune", "{}", "--pattern", "2:4", "--out", "x", "--device", "tpu"], "--device: expected cpu"),
        (["eval-ppl", "{}", "--text", "t", "--device", "tpu"], "--device: expected cpu"),
        (["bench", "--device", "tpu"], "--device: expected cpu"),
        (["permute", "{}", "--pattern", "2:4", "--out", "x", "--passes", "0"], "--passes: expected at least"),
        (
            ["prune", "{}", "--pattern", "2:4", "--out", "x", "--sequence-length", "0"],
            "--calibration: needed",
        ),
    ],
)
def test_arguments_have_the_names_of_their_options(arguments, message, models, capsys):
    given = [argument.format(models / "model") for argument in arguments]
    assert exit_code(given) == USAGE
    assert one_error(capsys).startswith(f"nmsolve: error: {message}")


def test_names_from_files_do_not_reach_the_terminal_raw(tmp_path, capsys):
    source = tmp_path / "model.safetensors"
    save_file({FORGED: torch.randn(16, 16)}, source)
    assert exit_code(["mask", str(source), "--pattern", "8:16", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) == 3
    assert r"fc\nnmsolve: all is well\x1b[2K\u202e.weight" in shown

    out = tmp_path / "sparse.safetensors"
    given = ["mask", str(source), "--pattern", "8:16", "--out", str(out), "--backend", "torch"]
    assert exit_code(given) == 0
    assert all(c.isprintable() or c in "\r\n" for c in capsys.readouterr().err), "the progress bar"
    report = (tmp_path / "sparse.report.json").read_text(encoding="utf-8")
    assert all(c.isprintable() or c == "\n" for c in report)
    assert json.loads(report)["tensors"][0]["name"] == FORGED

    save_file({FORGED: torch.full((16, 16), torch.nan)}, source)
    assert exit_code([*given, "--overwrite", "--quiet"]) == FAILED
    assert r"fc\nnmsolve: all is well" in one_error(capsys)


def test_names_of_a_model_do_not_reach_the_terminal_raw(tmp_path, capsys):
    pytest.importorskip("transformers")
    tiny_models.make("llama").save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    save_file({**state, FORGED: torch.ones(3)}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    given = ["prune", str(tmp_path / "model"), "--pattern", "2:4", "--method", "magnitude", "--no-picture"]
    assert exit_code([*given, "--out", str(tmp_path / "out"), "--backend", "torch", "--quiet"]) == 0
    lines = capsys.readouterr().err.splitlines()  # other libraries may warn when they are first imported
    assert all(line.isprintable() for line in lines)
    (warning,) = [line for line in lines if line.startswith("nmsolve")]
    assert warning.startswith("nmsolve: warning: 1 tensor in ")
    assert r"fc\nnmsolve: all is well\x1b[2K\u202e.weight" in warning


def test_a_masked_file_by_another_name_is_still_the_input(tmp_path, capsys):
    """Hard links, and orders that would be written over the weights that they were found for."""
    source, link = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(llama(), source)
    link.hardlink_to(source)
    for command in ("mask", "permute"):
        given = [command, str(source), "--pattern", "2:4", "--overwrite", "--out", str(link)]
        assert exit_code(given) == USAGE
        assert "is the input itself" in one_error(capsys)
    orders = tmp_path / "x.permutations.safetensors"
    orders.hardlink_to(source)
    given = [
        "permute",
        str(orders),
        "--pattern",
        "2:4",
        "--overwrite",
        "--out",
        str(tmp_path / "x.safetensors"),
    ]
    assert exit_code(given) == USAGE
    assert "would replace the input with x.permutations.safetensors" in one_error(capsys)


def test_names_may_be_as_long_as_someone_likes(tmp_path, capsys):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc": "k" * 100_000}}))
    assert exit_code(["mask", str(tmp_path), "--pattern", "2:4", "--out", str(tmp_path / "o")]) == USAGE
    error = one_error(capsys)
    assert len(error) < 2000
    assert "expected names of .safetensors files" in error


def test_a_terminal_without_the_letters_of_a_name(tmp_path):
    save_file({"größe.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "nmsolve.cli", "mask", "m.safetensors", "--pattern", "2:4", "--dry-run"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, cwd=tmp_path, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe.weight" in done.stdout


@pytest.mark.parametrize("command", ["mask", "prune", "permute", "eval-ppl"])
def test_a_line_at_the_start_where_there_will_be_a_progress_bar(command, tmp_path, capsys, monkeypatch):
    """Before what takes long: the input is not even looked for."""
    given = [command, str(tmp_path / "ab\nsent"), "--device", "cpu"]
    if command == "permute":
        given = given[:2]
    if command != "eval-ppl":
        given += ["--pattern", "2:4", "--out", str(tmp_path / "out")]
    given += ["--method", "magnitude"] if command == "prune" else []
    given += ["--text", str(tmp_path)] if command == "eval-ppl" else []
    assert exit_code(given) == USAGE
    one_error(capsys)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert exit_code(given) == USAGE
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"nmsolve: {command} {tmp_path}/ab\\nsent: reading it"
    assert second.startswith("nmsolve: error: ")
    assert exit_code([*given, "--quiet"]) == USAGE
    one_error(capsys)


def test_one_is_not_many_and_zeros_are_told(tmp_path, capsys):
    weight = torch.randn(16, 32)
    save_file({"fc.weight": weight}, tmp_path / "a.safetensors")
    save_file({"fc.weight": weight, "norm.weight": torch.ones(4)}, tmp_path / "b.safetensors")

    def said(source: str, out: str, pattern: str) -> str:
        given = ["mask", str(tmp_path / source), "--pattern", pattern, "--out", str(tmp_path / out)]
        assert exit_code([*given, "--backend", "torch"]) == 0
        return capsys.readouterr().out

    dense = said("b.safetensors", "c.safetensors", "2:16")
    assert "2:16: 1 tensor, 512 weights\n" in dense
    assert "1 tensor stays dense\n" in dense
    assert "zero" not in dense.replace(str(tmp_path), "")
    sparse = said("c.safetensors", "d.safetensors", "2:4")
    assert "50.00% of the weights keep" in sparse
    left = load_file(tmp_path / "d.safetensors")["fc.weight"].count_nonzero().item() / 512
    assert f"87.50% of these weights were zero before: {left:.2%} are not zero now\n" in sparse
    assert "0 tensors stay dense\n" in said("a.safetensors", "e.safetensors", "2:4")
    assert exit_code(["mask", str(tmp_path / "a.safetensors"), "--pattern", "2:4", "--dry-run"]) == 0
    assert "1 of 1 tensor would be masked, 512 weights\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (NMSolveError("some_number: expected 1"), 2, "error: --some-number: expected 1"),
        (NMSolveError("other: needs some_number=True"), 2, "error: other: needs --some-number"),
        (WorkFailed("weights: not finite"), 1, "error: weights: not finite"),
        (KeyboardInterrupt(), 130, "error: interrupted; nothing was written"),
        (KeyboardInterrupt("it goes on"), 130, "error: interrupted; it goes on"),
        (OSError(28, "No space left on device", "x\ny"), 1, r"error: No space left on device: x\ny"),
        (RuntimeError("two\n  lines"), 1, "error: RuntimeError: two lines"),
    ],
)
def test_outcomes(raised, code, said, capsys):
    def work(args):
        raise raised

    command = Command("x", "", "", "", lambda parser: None, work)
    parser = Parser()
    parser.add_argument("--some-number", type=int)
    parser.add_argument("--traceback", action="store_true")
    assert run(command, parser, parser.parse_args([])) == code
    assert capsys.readouterr().err == f"nmsolve: {said}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_no_command_holds_work(command):
    """A command parses and prints: it opens and writes nothing, and computes with no tensor."""
    module = sys.modules[command.run.__module__]
    assert module.__name__ == f"nmsolve.cli.{command.name.replace('-', '_')}"
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    calls = {
        ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    assert not calls & {
        "open",
        "write_text",
        "write_bytes",
        "writing",
        "replacing",
        "Staging",
        "mkdir",
        "rmtree",
    }
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for a in node.names}
    assert not imported & {"StreamWriter", "Staging", "Tensor", "safe_open"}


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--version"], 0, ""),
        (["info"], 0, ""),
        (
            ["mask", "m.safetensors", "--pattern", "2:4", "--out", "s.safetensors", "--backend", "torch"],
            0,
            "",
        ),
        (
            ["bench", "--tune"],
            2,
            "nmsolve: error: --out: expected a file to write to: there is no home folder",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_without_a_home(arguments, code, said, tmp_path):
    """Neither HOME nor an entry for the user: containers are run so."""
    save_file({"fc.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    unknown = """
import os, pwd, sys
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from nmsolve.cli import main
sys.exit(main(sys.argv[1:]))
"""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", unknown, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert said in done.stderr
