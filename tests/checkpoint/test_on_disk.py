"""mask_checkpoint: what ``nmsolve mask`` does, called from Python."""

from __future__ import annotations

import json
import signal
import threading

import pytest
import torch
from checkpoints import llama, save_sharded
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve import NMPattern, NMSolveError
from nmsolve.checkpoint import mask_checkpoint
from nmsolve.errors import WorkFailed
from nmsolve.files import Interrupts

QUICK = {"backend": "torch", "progress": False}


@pytest.fixture
def file(tmp_path):
    save_file(llama(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("pattern", ["8:16", NMPattern(8, 16)])
def test_a_file(file, tmp_path, pattern):
    out = tmp_path / "sparse.safetensors"
    report = mask_checkpoint(str(file), str(out), pattern, transposable=True, exclude=["*.0.*"], **QUICK)
    masks = nmsolve.load_masks(tmp_path / "sparse.masks.safetensors")
    assert set(masks) == {tensor.name for tensor in report.tensors}
    for name, mask in masks.items():
        nmsolve.check_mask(mask, 8, 16)
        assert torch.equal(load_file(out)[name], load_file(file)[name] * mask)
    written = json.loads((tmp_path / "sparse.report.json").read_text())
    assert written == json.loads(json.dumps(report.to_json()))
    assert written["settings"]["exclude"] == ["*.0.*"]


def test_a_folder_that_is_replaced(tmp_path):
    save_sharded(tmp_path / "in", llama(), 3)
    for pattern in ("2:4", "8:16"):
        report = mask_checkpoint(tmp_path / "in", tmp_path / "out", pattern, overwrite=True, **QUICK)
        assert report.totals()["kept"] * 2 == report.totals()["weights"]
    with pytest.raises(NMSolveError, match="exists; overwrite=True replaces it"):
        mask_checkpoint(tmp_path / "in", tmp_path / "out", "2:4", **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "half"}, "pattern: expected 'N:M'"),
        ({"method": "greedy"}, "method: 'greedy' needs transposable=True"),
        ({"method": "best", "transposable": True}, "method: expected one of exact, tsenor, greedy"),
        ({"backend": "gpu"}, "backend: expected 'auto' or one of triton, cpu, torch"),
        ({"device": "tpu"}, "device: expected cpu, cuda or cuda:N"),
        ({"include": ["nothing"]}, "include: 'nothing' matches none"),
        ({"out": "sparse.bin"}, r"out: expected a name that ends in \.safetensors"),
    ],
)
def test_mistakes(file, tmp_path, options, message):
    arguments = {"out": "sparse.safetensors", "pattern": "2:4", **QUICK, **options}
    with pytest.raises(NMSolveError, match=message):
        mask_checkpoint(file, tmp_path / arguments.pop("out"), **arguments)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_what_cannot_be_worked_on(tmp_path):
    save_file({"fc.weight": torch.full((32, 32), torch.inf)}, tmp_path / "m.safetensors")
    with pytest.raises(WorkFailed, match=r"fc\.weight, weights 0 to 1023: .*infinite"):
        mask_checkpoint(tmp_path / "m.safetensors", tmp_path / "out.safetensors", "2:4", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_signals_are_the_callers_unless_they_are_handed_over(file, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    mask_checkpoint(file, tmp_path / "a.safetensors", "2:4", **QUICK)
    assert signal.getsignal(signal.SIGTERM) is before
    interrupts = Interrupts()
    interrupts._received = True
    with pytest.raises(KeyboardInterrupt):
        mask_checkpoint(file, tmp_path / "b.safetensors", "2:4", interrupts=interrupts, **QUICK)
    assert not list(tmp_path.glob("*b.safetensors*"))


def test_it_works_in_a_thread(file, tmp_path):
    """Where signals cannot be handled."""
    out = tmp_path / "out.safetensors"

    def work():
        with Interrupts() as interrupts:
            mask_checkpoint(file, out, "2:4", interrupts=interrupts, **QUICK)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert out.exists()
