"""Runs of SparseTraining that are saved and go on, and what is saved."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sparse_training import GRADIENTS, adamw, batches, layers, network, train
from torch import nn

import nmsolve
from nmsolve.train import SparseTraining


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_resumed_run_goes_on_to_the_bit(gradient):
    options = {"refresh": 3, "gradient": gradient, "decay": 0.01}
    model = network()
    optimizer = adamw(model)
    sparse = SparseTraining(model, **options)
    sparse.attach(optimizer)
    train(model, optimizer, itertools.islice(batches(), 5))  # in the middle between two refreshes
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": sparse.state_dict()}, file)
    rest = train(model, optimizer, itertools.islice(batches(), 5, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    packed = saved["s"]["masks"]["up.weight"]
    assert (packed.dtype, packed.shape) == (torch.uint8, (32, 4))  # 4 of 2:4 in a byte

    again = network(seed=5)
    resumed = adamw(again)
    other = SparseTraining(again, **options)
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    other.load_state_dict(saved["s"])
    other.attach(resumed)
    assert other.metrics().flip_rate is None
    assert train(again, resumed, itertools.islice(batches(), 5, 8)) == rest
    assert (other.step, other.metrics().refreshes) == (sparse.step, sparse.metrics().refreshes)
    for name, mask in sparse.masks.items():
        assert torch.equal(other.masks[name], mask)


def test_checkpoints_of_the_model_load_both_ways():
    model, plain = network(1), network(2)
    SparseTraining(model)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.up.weight, model.up.weight)
    assert (plain.up.weight != 0).all()
    model.load_state_dict(network(3).state_dict())
    assert torch.equal(model.up.weight, network(3).up.weight)


def test_masks_made_before_the_weights_are_loaded_follow_them():
    model = network(1)
    optimizer = adamw(model)
    sparse = SparseTraining(model)
    model.load_state_dict(network(2).state_dict(), assign=True)
    optimizer = adamw(model)
    sparse.attach(optimizer)
    expected = nmsolve.transposable_mask(network(2).up.weight.detach().abs(), 2, 4)
    assert torch.equal(sparse.masks["up.weight"], expected)


def test_a_state_that_does_not_fit_changes_nothing():
    state = SparseTraining(network()).state_dict()
    sparse = SparseTraining(network(1))
    masks = sparse.masks
    other = SparseTraining(network(hidden=16)).state_dict()
    bits = copy.deepcopy(state)
    bits["masks"]["down.weight"][3] = 255
    more = copy.deepcopy(state)
    more["masks"]["else.weight"] = more["masks"]["up.weight"]
    for wrong, message in [
        ({}, r"state: expected what state_dict\(\) returned, got \[\]"),
        (3, "got int"),
        ({**state, "version": 2}, "expected version 1, got 2"),
        ({**state, "masks": other["masks"]}, r"up.weight: expected a packed mask of shape \(32, 4\) uint8"),
        (
            {**state, "settings": {**state["settings"], "gradient": "masked"}},
            "expected gradient='straight-thr",
        ),
        (SparseTraining(network(), "4:8").state_dict(), "state: expected patterns=.*'2:4'.*got .*'4:8'"),
        (bits, "state: down.weight: mask: block .* row 3 keeps 4 of 4"),
        (more, "masks of 2 weights, got others .else.weight"),
    ]:
        with pytest.raises(nmsolve.NMSolveError, match=message):
            sparse.load_state_dict(wrong)
        assert all(torch.equal(mask, masks[name]) for name, mask in sparse.masks.items())
        assert sparse.step == 0


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("options", [{}, {"transposable": False}])
@pytest.mark.parametrize("pattern", ["2:4", "1:3", "4:8", "3:6"])
def test_masks_in_bytes_come_back(kind, options, pattern):
    layer, _ = layers()[kind]
    sparse = SparseTraining(nn.Sequential(layer), {"0": pattern}, backend="torch", **options)
    (mask,), state = sparse.masks.values(), sparse.state_dict()
    (packed,) = state["masks"].values()
    unit = math.gcd(sparse.patterns["0.weight"].m, 8) if mask.ndim == 2 else 8
    if kind == "gpt2" and options:
        unit = 1
    length = math.prod(mask.shape[2:]) if mask.ndim > 2 else mask.shape[1]
    lead = mask.shape[:2] if mask.ndim > 2 else mask.shape[:1]
    assert (packed.dtype, packed.shape) == (torch.uint8, (*lead, -(-length // unit)))
    line = mask[0, 0].flatten() if mask.ndim > 2 else mask[0]
    first = packed[0, 0, 0] if mask.ndim > 2 else packed[0, 0]
    assert int(first) == sum(int(bit) << k for k, bit in enumerate(line[:unit]))
    other, _ = layers()[kind]
    other.weight.data.mul_(-1).add_(torch.randn_like(other.weight))
    resumed = SparseTraining(nn.Sequential(other), {"0": pattern}, backend="torch", **options)
    assert not torch.equal(resumed.masks["0.weight"], mask)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.masks["0.weight"], mask)


SUPPORT = Path(__file__).resolve().parents[1] / "support"


def child(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SUPPORT / "killed_training.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )


def whole_run(steps: int) -> list[str]:
    model = network()
    optimizer = adamw(model)
    SparseTraining(model, refresh=3, decay=0.01, backend="torch").attach(optimizer)
    return [f"{k} {loss.hex()}" for k, loss in enumerate(train(model, optimizer, batches(steps)), 1)]


def test_a_run_that_is_killed_goes_on_to_the_bit(tmp_path):
    expected = whole_run(8)
    for place, step, first in (("refresh", 3, 1), ("step", 4, 3), ("checkpoint", 6, 4)):
        run = child(tmp_path, 8, place, step)
        printed, _ = run.communicate(timeout=300)
        assert run.returncode == -9
        assert printed.splitlines() == expected[first - 1 : step - 1]
    printed, _ = child(tmp_path, 8).communicate(timeout=300)
    assert printed.splitlines() == expected[5:]


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_time_goes_on_to_the_bit(tmp_path):
    steps = 400
    expected = dict(line.split() for line in whole_run(steps))
    generator = random.Random(0)
    reached = 0
    for _ in range(8):
        run = child(tmp_path, steps)
        for line in itertools.islice(run.stdout, generator.randrange(1, 40)):
            step, loss = line.split()
            assert loss == expected[step]
        time.sleep(generator.random() / 50)
        run.kill()
        assert run.wait() in (0, -9)
        for line in run.stdout:  # what it printed before it died
            step, loss = line.split()
            assert loss == expected[step]
        run.stdout.close()
        assert int(step) > reached
        reached = int(step)
    printed, _ = child(tmp_path, steps).communicate(timeout=300)
    rest = dict(line.split() for line in printed.splitlines())
    assert rest == {k: loss for k, loss in expected.items() if int(k) >= min(map(int, rest))}
    assert min(map(int, rest)) <= reached + 2
