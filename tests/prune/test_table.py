"""One table of pruning methods: whoever else needs a method's name or needs reads them there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest
import torch
from pruning import QUICK, mlp, prune, weights

import nmsolve.permute
import nmsolve.prune
from nmsolve.cli.command import Parser
from nmsolve.cli.prune import COMMAND
from nmsolve.prune import prune_checkpoint, prune_model
from nmsolve.prune.layerwise.pruners import ScorePruner
from nmsolve.prune.methods import PRUNING_METHODS, SEQUENTIAL, PruningMethod, check_pruning_method

DATA = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PRUNING_METHODS)
def test_a_row_fits_what_it_names(name):
    row = PRUNING_METHODS[name]
    assert row.name == name
    needs = "diagonal" if row.diagonal else "hessian"
    assert tuple(inspect.signature(row.prepare).parameters) == (needs, *row.options)
    assert set(row.options) <= set(inspect.signature(prune_model).parameters)


def test_the_first_method_is_the_default():
    default = inspect.signature(prune_model).parameters["method"].default
    assert default == next(iter(PRUNING_METHODS))
    assert inspect.signature(prune_model).parameters["sequential"].default == SEQUENTIAL[0]


@pytest.mark.parametrize("name", PRUNING_METHODS)
def test_methods_update_weights_as_they_say(name):
    model = mlp()
    before = weights(model)
    result = prune(model, DATA, "4:8", method=name)
    changed = [
        not torch.equal(model.state_dict()[weight][mask], before[weight][mask])
        for weight, mask in result.masks.items()
    ]
    assert changed == [PRUNING_METHODS[name].updates_weights] * 3


@pytest.mark.parametrize("name", PRUNING_METHODS)
def test_methods_need_calibration_as_they_say(name):
    if PRUNING_METHODS[name].needs_calibration:
        with pytest.raises(nmsolve.NMSolveError, match=f"calibration: needed for method '{name}'"):
            prune(mlp(), None, method=name)
    else:
        assert len(prune(mlp(), None, method=name).masks) == 3


def test_a_method_needs_only_a_row(monkeypatch):
    """Scores that are larger to the right, so that the last of every group stay."""

    def prepare(hessian, *, damping):
        assert hessian is None
        assert damping == 0.5
        return ScorePruner(lambda dense: torch.arange(1.0, dense.shape[2] + 1).expand_as(dense))

    row = PruningMethod(
        "rightmost", prepare, needs_calibration=False, updates_weights=False, options=("damping",)
    )
    monkeypatch.setitem(PRUNING_METHODS, "rightmost", row)
    result = prune(mlp(), None, "2:4", method="rightmost", transposable=False, damping=0.5)
    for mask in result.masks.values():
        assert torch.equal(mask, torch.tensor([False, False, True, True]).repeat(16, 4))
    parser = Parser()
    COMMAND.add_options(parser)
    given = ["model", "--pattern", "2:4", "--out", "out", "--method", "rightmost"]
    assert parser.parse_args(given).method == "rightmost"


def test_a_name_that_is_in_no_row_is_refused_everywhere(tmp_path):
    message = "method: expected one of alps, .*, got 'best'"
    calls = (
        lambda: check_pruning_method("best"),
        lambda: prune_model(mlp(), DATA, "2:4", method="best", **QUICK),
        lambda: prune_checkpoint(tmp_path, tmp_path / "out", "2:4", method="best"),
    )
    for call in calls:
        with pytest.raises(nmsolve.NMSolveError, match=message):
            call()


# --- names that are loaded when they are used ---------------------------------------------------------------


def test_names_and_choices_need_no_torch():
    code = (
        "import sys, nmsolve.permute, nmsolve.prune, nmsolve.prune.methods\n"
        "dir(nmsolve.prune), dir(nmsolve.permute)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", [nmsolve.prune, nmsolve.permute])
def test_no_module_stands_in_the_place_of_a_name(package):
    names = set(package.__all__)
    assert names == set(package._HOMES)
    for module in pkgutil.iter_modules(package.__path__):
        assert module.name not in names
        importlib.import_module(f"{package.__name__}.{module.name}")
    for name in names:
        assert name in dir(package)
        assert getattr(package, name) is getattr(importlib.import_module(package._HOMES[name]), name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
