"""Runs that were killed or failed go on; memory does not grow with the depth."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.utils.prune
from pruning import QUICK, mlp, prune
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve.prune import prune_model

pytest.importorskip("transformers")


VICTIM = """
import os, signal, sys
import torch
import tiny_models
from nmsolve.prune import prune_model
torch.set_num_threads(1)
calls = int(sys.argv[2])
def check():
    global calls
    calls -= 1
    if calls == 0:
        os.kill(os.getpid(), signal.SIGKILL)
prune_model(tiny_models.make("llama"), tiny_models.tokens(), "4:8", method=sys.argv[3],
            sequential=sys.argv[4], iterations=20, resume=sys.argv[1], backend="torch", check=check)
"""


@pytest.mark.parametrize(
    ("method", "sequential", "calls"),
    [("alps", "layer", 44), ("sparsegpt", "block", 21), ("wanda", "off", 21)],
)
def test_a_killed_run_goes_on(method, sequential, calls, tmp_path):
    options = {"method": method, "sequential": sequential, "iterations": 20}
    data = tiny_models.tokens()
    folder = tmp_path / "layers"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, str(folder), str(calls), method, sequential],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -9, done.stderr
    finished = len(list((folder / "layers").glob("*.safetensors")))
    assert 7 < finished < 14

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        undisturbed, resumed = tiny_models.make("llama"), tiny_models.make("llama")
        expected = prune(undisturbed, data, **options)
        result = prune(resumed, data, resume=folder, **options)
        assert result.report.resumed == finished
        for name, value in undisturbed.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name
        assert all(torch.equal(mask, result.masks[name]) for name, mask in expected.masks.items())
        for a, b in zip(expected.report.layers, result.report.layers, strict=True):
            assert (a.name, a.relative_error, a.retained) == (b.name, b.relative_error, b.retained)

        once_more = tiny_models.make("llama")
        assert prune(once_more, data, resume=folder, **options).report.resumed == 14
        assert torch.equal(once_more.lm_head.weight, resumed.lm_head.weight)
    finally:
        torch.set_num_threads(threads)


def test_layers_of_another_run_are_refused(tmp_path):
    data = torch.randn(8, 16)
    prune(mlp(), data, "2:4", resume=tmp_path / "a")
    for changes, what in (
        ({"pattern": "1:4"}, "pattern"),
        ({"method": "ria"}, "method"),
        ({"calibration": data + 1}, "calibration"),
        ({"transposable": False}, "transposable"),
    ):
        given = {"calibration": data, "pattern": "2:4", "method": "wanda", **changes}
        with pytest.raises(nmsolve.NMSolveError, match=f"holds layers of another run: {what} was"):
            prune_model(mlp(), resume=tmp_path / "a", **QUICK, **given)
    other = mlp()
    other[0].weight.data += 1
    with pytest.raises(nmsolve.NMSolveError, match="model was"):
        prune(other, data, "2:4", resume=tmp_path / "a")
    other = mlp()
    other[4].bias.data += 1
    with pytest.raises(nmsolve.NMSolveError, match="model was"):
        prune(other, data, "2:4", resume=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(nmsolve.NMSolveError, match="is not empty"):
        prune(mlp(), data, "2:4", resume=tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["file"]


def test_a_run_that_finished_no_layer_leaves_nothing(tmp_path):
    with pytest.raises(nmsolve.NMSolveError, match="cannot be called on the first batch, float32"):
        prune(mlp(), torch.randn(8, 15), "2:4", resume=tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "left", [".run.json.1b2c3d4e.partial", "run.json", "layers/.0.safetensors.1b2c3d4e.partial"]
)
def test_a_run_killed_before_its_first_layer_does_not_hinder_the_next(left, tmp_path):
    folder = tmp_path / "a"
    (folder / left).parent.mkdir(parents=True)
    (folder / left).write_text("{}")
    if left.startswith("layers"):
        (folder / "run.json").write_text('{"method": "ria"}')
    assert len(prune(mlp(), torch.randn(8, 16), "2:4", resume=folder).masks) == 3


def test_a_system_without_locks_resumes_too(tmp_path, monkeypatch):
    monkeypatch.setattr("nmsolve.files.fcntl", None)
    model, data = mlp(), torch.randn(8, 16)
    finished = prune(model, data, "2:4", resume=tmp_path / "a").masks
    assert prune(mlp(), data, "2:4", resume=tmp_path / "a").report.resumed == len(finished) == 3


def test_a_folder_serves_one_run_at_a_time(tmp_path):
    data = torch.randn(8, 16)

    def check():
        with pytest.raises(nmsolve.NMSolveError, match="is in use by another run"):
            prune(mlp(), data, "2:4", resume=tmp_path / "a")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        prune(mlp(), data, "2:4", resume=tmp_path / "a", check=check)
    prune(mlp(), data, "2:4", resume=tmp_path / "a")


@pytest.mark.parametrize(
    "wrong",
    [
        {"expert_tokens": 3},
        {"expert_tokens": [1, "2"]},
        {"tokens": "8"},
        {"gap": [0.0]},
        {"shape": ["8", 16]},
    ],
)
def test_a_layer_whose_report_is_of_other_types(wrong, tmp_path):
    data = torch.randn(8, 16)
    prune(mlp(), data, "2:4", resume=tmp_path / "a")
    file = sorted((tmp_path / "a/layers").iterdir())[0]
    with safe_open(file, framework="pt") as opened:
        report = json.loads(opened.metadata()["report"]) | wrong
    save_file(load_file(file), file, {"report": json.dumps(report)})
    with pytest.raises(
        nmsolve.NMSolveError, match="expected a finished layer of this run, got something else"
    ):
        prune(mlp(), data, "2:4", resume=tmp_path / "a")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(nmsolve.NMSolveError, match=r"resume: .*file: "):
        prune(mlp(), torch.randn(8, 16), "2:4", resume=tmp_path / "file")


# --- memory -------------------------------------------------------------------------------------------------


WIDTH, DEPTH, SAMPLES, BATCH = 256, 12, 32768, 256
MEMORY = f"""
import resource
import torch
from torch import nn
from nmsolve.prune import prune_model
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def model(depth):
    return nn.Sequential(*[nn.Linear({WIDTH}, {WIDTH}) for _ in range(depth)])
options = dict(pattern="2:4", transposable=False, method="sparsegpt", backend="torch", progress=False)
prune_model(model(2), torch.randn(512, {WIDTH}), batch_size={BATCH}, **options)
big = model({DEPTH})
data = torch.randn({SAMPLES}, {WIDTH})
before = peak()
prune_model(big, data, batch_size={BATCH}, samples={SAMPLES}, **options)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_depth(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    activations, hessian, batch = (4 * WIDTH * count for count in (SAMPLES, WIDTH, BATCH))
    # One block's inputs, the Hessian and its factors, a layer's working copies; all inputs would be 0.4 GB.
    limit = activations + 12 * hessian + 8 * batch + 32 * 2**20
    assert limit < DEPTH * activations / 4
    assert int(done.stdout) < limit
