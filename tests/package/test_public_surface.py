"""What users write does not break: names, signatures, operators, commands and options of an earlier commit.

public_surface.json holds what there was; more may be added, nothing may go.
"""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest
import torch

import nmsolve.ops  # noqa: F401  registers the operators
from nmsolve.cli import COMMANDS, main
from nmsolve.cli.command import Parser
from nmsolve.integrations.client import MissingClientError

SURFACE = json.loads(Path(__file__).with_name("public_surface.json").read_text(encoding="utf-8"))


def imported(module: str):
    try:
        return importlib.import_module(module)
    except MissingClientError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("module", SURFACE["names"])
def test_names(module):
    found = imported(module)
    for name in SURFACE["names"][module]:
        assert name in found.__all__
        assert name in dir(found)
        assert getattr(found, name) is not None


@pytest.mark.parametrize("name", SURFACE["signatures"])
def test_signatures(name):
    """The arguments that there were are there, in their order."""
    module, _, function = name.rpartition(".")
    have = list(inspect.signature(getattr(imported(module), function)).parameters)
    kept = [parameter for parameter in have if parameter in SURFACE["signatures"][name]]
    assert kept == SURFACE["signatures"][name]


@pytest.mark.parametrize("schema", SURFACE["operators"])
def test_operators(schema):
    name = schema.partition("(")[0].removeprefix("nmsolve::")
    assert str(getattr(torch.ops.nmsolve, name).default._schema) == schema


@pytest.mark.parametrize("name", SURFACE["commands"])
def test_commands_and_options(name):
    (command,) = [command for command in COMMANDS if command.name == name]
    parser = Parser()
    parser.add_argument("--traceback", action="store_true")
    command.add_options(parser)
    said = parser.format_help()
    for option in SURFACE["commands"][name]:
        if option.startswith("-"):
            assert (
                f"{option} " in said or f"{option}\n" in said or f"{option}," in said or f"{option}]" in said
            )


@pytest.mark.parametrize("name", SURFACE["commands"])
def test_every_command_helps_itself(name, capsys):
    with pytest.raises(SystemExit) as exited:
        main([name, "--help"])
    assert exited.value.code == 0
    said = capsys.readouterr().out
    assert f"nmsolve {name} " in said.partition("examples:")[2]
    assert "exit codes:" in said
