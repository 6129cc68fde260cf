"""One table for each choice: whoever else needs its entries reads them there, or is held to it here."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch

import nmsolve
from nmsolve.backends.dispatch import (
    AUTO,
    BACKENDS,
    MASK_METHODS,
    SCORE_DTYPES,
    MaskSolver,
    PermutationSolver,
    StripSolver,
)
from nmsolve.checkpoint.selection import DTYPES
from nmsolve.cli import COMMANDS, options
from nmsolve.cli.command import Parser
from nmsolve.timing import TIMED

ROOT = Path(__file__).resolve().parents[2]


def installed(name: str):
    row = BACKENDS[name]
    if not row.is_installed():
        pytest.skip(f"{row.needs} is not installed")
    return row


def offered(protocol: type) -> list[str]:
    return [name for name, value in vars(protocol).items() if inspect.isfunction(value) and name[0] != "_"]


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_offers_everything(name):
    row = installed(name)
    assert row.name == name
    offers = [(row.masks, MaskSolver), (row.permutations, PermutationSolver), (row.strips, StripSolver)]
    for module, protocol in offers:
        for function in offered(protocol):
            want = list(inspect.signature(getattr(protocol, function)).parameters)[1:]
            have = list(inspect.signature(getattr(module, function)).parameters)
            assert have == want, f"{module.__name__}.{function}"


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", MASK_METHODS)
def test_a_mask_method_is_a_function_of_every_backend(name, method):
    function = getattr(installed(name).masks, method)
    assert set(MASK_METHODS[method]) <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", SCORE_DTYPES)
def test_every_backend_takes_every_dtype(name, dtype):
    row = installed(name)
    if row.why_not(torch.device("cpu")) is not None:
        pytest.skip(str(row.why_not(torch.device("cpu"))))
    mask = nmsolve.transposable_mask(torch.rand(4, 4).to(getattr(torch, dtype)), 2, 4, backend=name)
    assert mask.sum() == 8


def test_a_backend_needs_only_a_row(monkeypatch):
    """The reference under another name, preferred on CPUs: public functions and choices follow."""
    row = BACKENDS["torch"].__class__("abacus", "nmsolve.backends.torch", preferred_on=("cpu",), max_m=4)
    monkeypatch.setitem(BACKENDS, "abacus", row)
    scores = torch.rand(8, 8)
    expected = nmsolve.transposable_mask(scores, 2, 4, backend="torch")
    assert torch.equal(nmsolve.transposable_mask(scores, 2, 4, backend="abacus"), expected)
    with pytest.raises(nmsolve.BackendError, match="'abacus' cannot run on cpu: blocks of m=8"):
        nmsolve.transposable_mask(scores, 2, 8, backend="abacus")
    parser = Parser()
    options.add_backend(parser)
    assert parser.parse_args(["--backend", "abacus"]).backend == "abacus"


def test_dtypes_of_checkpoints_are_those_of_scores():
    assert set(DTYPES.values()) == set(SCORE_DTYPES)


def test_choices_of_the_command_line_are_the_tables():
    choices: dict[tuple[str, str], tuple[str, ...]] = {}
    for command in COMMANDS:
        parser = Parser()
        add = parser.add_argument

        def record(*names, _add=add, _command=command.name, **settings):
            if "choices" in settings:
                choices[_command, names[0]] = tuple(settings["choices"])
            return _add(*names, **settings)

        parser.add_argument = record
        command.add_options(parser)
    for name in ("mask", "prune", "bench"):
        assert choices[name, "--backend"] == (AUTO, *BACKENDS)
    assert choices["mask", "--method"] == choices["prune", "--mask-method"] == tuple(MASK_METHODS)
    assert choices["bench", "--method"] == TIMED
    assert choices["bench", "--dtype"] == SCORE_DTYPES


def test_names_of_backends_stand_in_the_table_alone():
    """Nobody compares the name of a backend: what differs between them is a field of their row."""
    for file in (ROOT / "nmsolve").rglob("*.py"):
        if file.name == "dispatch.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                names = [side.value for side in sides if isinstance(side, ast.Constant)]
                assert "triton" not in names, f"{file}:{node.lineno}"
                text = ast.unparse(node)
                assert "__name__" not in text or "Conv1D" in text or "__main__" in text, (
                    f"{file}:{node.lineno}: {text}"
                )
