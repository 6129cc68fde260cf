"""The command ``nmsolve`` itself: help, version, ``nmsolve info``, and what is not a command."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from checkpoints import llama, save_sharded
from mask_command import exit_code, one_error
from safetensors.torch import save_file

import nmsolve
import nmsolve.checkpoint.masking
from nmsolve.cli import main


@pytest.mark.parametrize("arguments", [["--help"], ["mask", "--help"], ["info", "--help"]])
def test_help_teaches(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0
    said = capsys.readouterr().out
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"^  {code} +[a-z]", said, re.M)
    if arguments[0] != "--help":
        assert f"nmsolve {arguments[0]} " in said.partition("examples:")[2]
    assert max(map(len, said.splitlines())) <= 110


def test_the_examples_of_the_help_parse(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("Llama-3.2-1B", "BIG"):
        save_sharded(tmp_path / folder, llama())
    save_file(llama(), tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["mask", "--help"])
    examples = re.findall(r"^  nmsolve (mask .*)$", capsys.readouterr().out, re.M)
    assert len(examples) == 5
    for example in examples:
        for k in range(1, 17) if "--part" in example else [0]:
            arguments = example.replace("3/16", f"{k}/16").split()
            assert main([argument.strip("'") for argument in arguments] + ["--backend", "torch"]) == 0
    assert (tmp_path / "OUT" / "nmsolve_report.json").exists()


def test_version(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"nmsolve {nmsolve.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["mask", "--help"], ["mask", "absent", "--pattern", "8:16", "--out", "x"]]
)
def test_quick_answers_do_not_wait_for_torch(arguments):
    code = """
import sys
from nmsolve.cli import main
try:
    main(sys.argv[1:])
finally:
    slow = {"torch", "triton", "numba", "numpy"} & sys.modules.keys()
    print("imported:", *slow)
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("imported:\n")


def test_importing_nmsolve_does_not_import_the_command_line():
    code = "import sys, nmsolve; nmsolve.transposable_mask; print('nmsolve.cli' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_info(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"nmsolve {nmsolve.__version__}" in said
    assert torch.__version__.partition("+")[0] in said
    for name, reason in nmsolve.backends.dispatch.backend_reasons("cpu").items():
        assert re.search(
            rf"^  {name} +{re.escape('cannot run: ' + reason) if reason else 'can run'}", said, re.M
        )
    assert said.count("auto takes it") == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nmsolve"] == nmsolve.__version__
    assert found["versions"].keys() == {"python", "torch", "triton", "numba", "numpy", "safetensors"}
    cpu = found["devices"][0]
    assert cpu["name"] == "cpu"
    assert cpu["backends"] == nmsolve.backends.dispatch.backend_reasons("cpu")
    assert cpu["auto"] == ("cpu" if cpu["backends"]["cpu"] is None else "torch")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"required: COMMAND \(see nmsolve --help\)"),
        (["msak"], "invalid choice: 'msak'"),
        (["mask", "x.safetensors", "--out", "y"], r"required: --pattern \(see nmsolve mask --help\)"),
        (["mask", "x.safetensors", "--pattern", "8:16"], "--out: expected a path"),
        (["info", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_what_is_not_a_command(arguments, message, capsys):
    assert exit_code(arguments) == 2
    assert re.search(message, one_error(capsys))
