"""Whole models: every layer N:M, calibrated on what comes before it, resumable, loadable."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

import nmsolve
from nmsolve.packed import load_masks
from nmsolve.prune import magnitude_scores, prune_model, ria_scores, wanda_scores
from nmsolve.prune.calibration import call_model, make_batches
from nmsolve.prune.layers import Layer, find_layers
from nmsolve.prune.walk import Chain, Loose, make_plan, quiet_model

pytest.importorskip("transformers")

QUICK = {"backend": "torch", "progress": False}


def prune(model, data, pattern="4:8", **options):
    return prune_model(model, data, pattern, **{"method": "wanda", **QUICK, **options})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def mlp(width: int = 16, depth: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    steps: list[nn.Module] = []
    for _ in range(depth):
        steps += [nn.Linear(width, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*steps)


# --- architectures ------------------------------------------------------------------------------------------


LAYERS = {"llama": 14, "qwen2": 14, "opt": 14, "gpt2": 8, "bert": 13, "vit": 12, "t5": 32}


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_every_kind_of_model(kind, tmp_path):
    model = tiny_models.make(kind)
    before = weights(model)
    result = prune(model, tiny_models.calibration(kind), "4:8")
    after = model.state_dict()
    assert len(result.masks) == LAYERS[kind]
    for name, mask in result.masks.items():
        nmsolve.check_mask(mask, 4, 8)
        assert torch.equal(after[name] != 0, mask), name
        assert torch.equal(after[name], before[name] * mask)
    pruned = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert pruned == set(result.masks)
    for row in result.report.layers:
        assert 0 < row.relative_error < 0.5
        assert row.tokens > 0
        assert row.gap < 1e-6

    result.save(model, tmp_path / "out", picture=False)
    again = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], value) for name, value in after.items())
    masks = load_masks(tmp_path / "out")
    assert all(torch.equal(masks[name], mask) for name, mask in result.masks.items())


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_transformer_blocks_are_walked_one_by_one(kind):
    model = tiny_models.make(kind)
    (first, *_) = make_batches(tiny_models.calibration(kind))
    layers = [layer for layer in find_layers(model) if min(layer.matrix_shape) >= 8]
    with quiet_model(model):
        plan = make_plan(model, layers, first)
    chains = [stage for stage in plan.stages if isinstance(stage, Chain)]
    assert [len(chain.blocks) for chain in chains] == [2] * (2 if kind == "t5" else 1)
    assert plan.unreached == []
    if kind in ("llama", "qwen2"):
        together = [
            [layer.name.rpartition(".")[2] for layer in group.layers] for group in chains[0].groups[0]
        ]
        assert together == [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
        ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_chain_hands_on_what_the_model_does(kind):
    """The inputs of every block, by the chain, equal those in an ordinary forward pass."""
    model = tiny_models.make(kind)
    batches = make_batches(tiny_models.calibration(kind))
    layers = find_layers(model)
    with quiet_model(model):
        plan = make_plan(model, layers, batches[0])
        for chain in (stage for stage in plan.stages if isinstance(stage, Chain)):
            seen: list[torch.Tensor] = []
            hooks = [
                block.register_forward_pre_hook(
                    lambda _, args, kwargs, seen=seen: seen.append(
                        args[0] if args else kwargs["hidden_states"]
                    ),
                    with_kwargs=True,
                )
                for block in chain.blocks
            ]
            call_model(model, batches[1])
            for hook in hooks:
                hook.remove()
            chain.capture(model, batches)
            for index, expected in enumerate(seen):
                assert torch.equal(chain.hidden[1], expected)
                chain.advance(index, 1)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_dense_by_default():
    model = tiny_models.make("llama")
    skipped = prune(model, tiny_models.tokens()).report.skipped
    assert skipped == {"lm_head": "language-model head"}
    model = tiny_models.make("vit")
    skipped = prune(model, tiny_models.calibration("vit")).report.skipped
    assert set(skipped) == {"vit.embeddings.patch_embeddings.projection", "classifier"}


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_methods_that_update_weights_lose_less(method, kind):
    plain, better = tiny_models.make(kind), tiny_models.make(kind)
    data = tiny_models.calibration(kind)
    wanda = prune(plain, data).report.totals()["mean_relative_error"]
    result = prune(better, data, method=method)
    assert result.report.totals()["mean_relative_error"] < 0.8 * wanda
    for name, mask in result.masks.items():
        nmsolve.check_mask(mask, 4, 8)
        assert (better.state_dict()[name][~mask] == 0).all()


def test_a_bfloat16_model_stays_one():
    model = tiny_models.make("llama").bfloat16()
    result = prune(model, tiny_models.tokens(), method="alps", iterations=10)
    for name, mask in result.masks.items():
        assert model.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(model.state_dict()[name] != 0, mask)


# --- inputs -------------------------------------------------------------------------------------------------


def inputs_of(model, name, batches):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            call_model(model, batch)
    hook.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


@pytest.mark.parametrize("sequential", ["layer", "block", "off"])
@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_a_layer_sees_what_is_pruned_before_it(sequential, method):
    """Masks recomputed from inputs recorded by hand in models that are pruned up to there."""
    dense = tiny_models.make("llama")
    model = copy.deepcopy(dense)
    data = tiny_models.tokens()
    batches = list(data.split(1))
    result = prune(model, data, method=method, sequential=sequential)
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    order = [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]
    replayed = copy.deepcopy(dense)
    for block in range(2):
        at_entry = copy.deepcopy(replayed)
        for group in order:
            source = {"layer": replayed, "block": at_entry, "off": dense}[sequential]
            for name in group:
                full = f"model.layers.{block}.{name}"
                if name in names:
                    x = inputs_of(source, full, batches)
                    weight = dense.get_submodule(full).weight.detach().double()
                    score = wanda_scores if method == "wanda" else ria_scores
                    scores = score(weight, x.norm(dim=0)).float()
                    expected = nmsolve.transposable_mask(scores, 4, 8, backend="torch")
                    found = result.masks[f"{full}.weight"]
                    assert (expected != found).float().mean() < 0.01, full
                    lost = (x @ (weight * ~found).T).square().sum() / (x @ weight.T).square().sum()
                    (row,) = [row for row in result.report.layers if row.name == full]
                    assert row.relative_error == pytest.approx(float(lost), rel=1e-3)
            for name in group:
                full = f"model.layers.{block}.{name}"
                replayed.get_submodule(full).weight.data.mul_(result.masks[f"{full}.weight"])


def test_the_prefix_matters():
    masks = {}
    for sequential in ("layer", "block", "off"):
        model = tiny_models.make("llama")
        masks[sequential] = prune(model, tiny_models.tokens(), sequential=sequential).masks
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(masks["layer"][first], masks["off"][first])
    assert not torch.equal(masks["layer"][last], masks["off"][last])
    assert not torch.equal(masks["layer"][last], masks["block"][last])


def test_off_measures_the_dense_model_in_every_stage():
    """Two chains and loose layers: nothing is pruned before all is measured."""
    a, b = tiny_models.make("t5"), tiny_models.make("t5")
    data = tiny_models.calibration("t5")
    result = prune(a, data, sequential="off")
    name = "decoder.block.1.layer.2.DenseReluDense.wo"
    x = inputs_of(b, name, data)
    weight = b.get_submodule(name).weight.detach()
    expected = nmsolve.transposable_mask((weight.abs() * x.norm(dim=0)).float(), 4, 8, backend="torch")
    assert (result.masks[f"{name}.weight"] != expected).float().mean() < 0.01


def test_magnitude_needs_no_calibration():
    model = tiny_models.make("llama")
    dense = weights(model)
    result = prune(model, None, method="magnitude")
    assert result.report.layers[0].relative_error is None
    for name, mask in result.masks.items():
        expected = nmsolve.transposable_mask(magnitude_scores(dense[name]), 4, 8, backend="torch")
        assert torch.equal(mask, expected)


def test_a_model_is_left_as_it_was_found():
    model = tiny_models.make("llama").train()
    model.config.use_cache = True
    prune(model, tiny_models.tokens())
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# --- any module ---------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Its first layer is in place, and it is no chain: blocks are called twice and skipped over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.unused = nn.Linear(16, 16)

    def forward(self, x):
        for layer in (self.inner[0], self.inner[2], self.inner[0]):
            x = x + torch.relu(layer(x))
        return self.inner[1](x)


def test_any_module_is_walked():
    torch.manual_seed(0)
    model, data = Residual(), torch.randn(40, 16)
    dense = copy.deepcopy(model)
    result = prune(model, data, "2:4", batch_size=8)
    assert sorted(result.masks) == ["inner.0.weight", "inner.1.weight", "inner.2.weight"]
    assert result.report.skipped == {"unused": "not called in the forward pass of the first batch"}
    rows = {row.name: row for row in result.report.layers}
    assert rows["inner.0"].tokens == 80
    x = inputs_of(dense, "inner.0", [data])
    expected = nmsolve.transposable_mask(
        (dense.inner[0].weight.detach().abs() * x.norm(dim=0)).float(), 2, 4, backend="torch"
    )
    assert torch.equal(result.masks["inner.0.weight"], expected)
    halfway = copy.deepcopy(dense)
    halfway.inner[0].weight.data.mul_(expected)
    x = inputs_of(halfway, "inner.2", [data])
    scores = halfway.inner[2].weight.detach().abs() * x.norm(dim=0)
    assert torch.equal(
        result.masks["inner.2.weight"], nmsolve.transposable_mask(scores.float(), 2, 4, backend="torch")
    )


def test_a_sequential_is_a_chain_and_may_work_in_place():
    model, data = mlp(), torch.randn(64, 16)
    with quiet_model(model):
        (stage,) = make_plan(model, find_layers(model), data).stages
    assert isinstance(stage, Chain)
    dense = copy.deepcopy(model)
    result = prune(model, data, "2:4", batch_size=16)
    x = data
    for k in (0, 2, 4):
        scores = dense[k].weight.detach().abs() * x.norm(dim=0)
        expected = nmsolve.transposable_mask(scores, 2, 4, backend="torch")
        assert (result.masks[f"{k}.weight"] != expected).float().mean() < 0.02
        x = torch.relu(model[k](x)).detach()


CONVOLUTIONS = {
    "plain": nn.Conv2d(8, 16, 3, padding=1, stride=2),
    "dilated": nn.Conv2d(8, 16, (3, 2), dilation=2, padding=(1, 2)),
    "grouped": nn.Conv2d(16, 24, 3, groups=2),
    "same": nn.Conv2d(8, 16, (2, 3), padding="same"),
    "circular": nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"),
    "1d": nn.Conv1d(8, 16, 3, padding=1, stride=2),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_inputs_of_a_convolution(kind):
    """The matrices and the inputs of a layer multiply to what the layer computes."""
    module = copy.deepcopy(CONVOLUTIONS[kind]).double()
    layer = Layer("conv", module)
    shape = (2, module.in_channels, *[9, 7][: len(module.kernel_size)])
    x = torch.randn(shape, dtype=torch.float64)
    rows = layer.inputs(x) @ layer.matrices(module.weight).transpose(1, 2)
    expected = module(x) - module.bias.view(-1, *[1] * len(module.kernel_size))
    expected = expected.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    torch.testing.assert_close(rows, expected)
    assert torch.equal(layer.from_matrices(layer.matrices(module.weight)), module.weight)


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "alps"])
@pytest.mark.parametrize("kind", ["plain", "grouped", "1d"])
def test_convolutions_have_a_mask_for_each_kernel_position(kind, method):
    torch.manual_seed(0)
    module = copy.deepcopy(CONVOLUTIONS[kind])
    data = torch.randn(6, module.in_channels, *[9, 9][: len(module.kernel_size)])
    result = prune(nn.Sequential(module), data, "2:4", method=method)
    mask = result.masks["0.weight"]
    assert torch.equal(module.weight != 0, mask)
    for position in mask.flatten(2).unbind(-1):
        for group in position.chunk(module.groups):
            nmsolve.check_mask(group, 2, 4)
    assert 0 < result.report.layers[0].relative_error < 0.5


# --- patterns -----------------------------------------------------------------------------------------------


def test_patterns_by_glob():
    model = tiny_models.make("llama")
    patterns = {"*": "2:4", "mlp.*": "4:8", "model.layers.1.mlp.down_proj": None, "q_proj": "1:4"}
    result = prune(model, tiny_models.tokens(), patterns, transposable=False, dense=["layers.0.*.v_proj"])
    found = {row.name: row.pattern for row in result.report.layers}
    assert found["model.layers.0.self_attn.k_proj"] == "2:4"
    assert found["model.layers.0.self_attn.q_proj"] == "1:4"
    assert found["model.layers.1.mlp.up_proj"] == "4:8"
    assert "model.layers.1.mlp.down_proj" not in found
    assert "model.layers.0.self_attn.v_proj" not in found
    for name, mask in result.masks.items():
        pattern = nmsolve.NMPattern.parse(found[name.removesuffix(".weight")])
        nmsolve.check_mask(mask, pattern.n, pattern.m, transposable=False)


def test_a_head_is_pruned_when_it_is_named():
    model = tiny_models.make("llama")
    result = prune(model, tiny_models.tokens(), {"lm_head": "4:8"})
    assert list(result.masks) == ["lm_head.weight"]


def test_masks_of_several_patterns_are_saved_and_read(tmp_path):
    model = tiny_models.make("llama")
    result = prune(model, tiny_models.tokens(), {"*": "2:4", "mlp.*": "4:8"})
    result.save(model, tmp_path, picture=False)
    assert {file.name for file in (tmp_path / "masks").iterdir()} == {
        "2of4.masks.safetensors",
        "4of8.masks.safetensors",
    }
    assert load_masks(tmp_path).keys() == result.masks.keys()


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt", "alps"])
def test_an_earlier_mask_is_kept(method, tmp_path):
    model = tiny_models.make("gpt2")
    first = prune(model, tiny_models.tokens(), "6:8", method="magnitude", transposable=False)
    first.save(model, tmp_path, picture=False)
    options = {"iterations": 10} if method == "alps" else {}
    result = prune(model, tiny_models.tokens(), "4:8", method=method, initial_masks=tmp_path, **options)
    for name, mask in result.masks.items():
        assert not (mask & ~first.masks[name]).any()
        assert (model.state_dict()[name][~mask] == 0).all()
        for lines in (mask.unflatten(0, (-1, 8)).sum(1), mask.unflatten(1, (-1, 8)).sum(2)):
            assert (lines <= 4).all()


# --- report -------------------------------------------------------------------------------------------------


def test_report_and_picture(tmp_path):
    model = tiny_models.make("llama")
    result = prune(model, tiny_models.tokens(), method="alps", iterations=10)
    result.save(model, tmp_path)
    report = json.loads((tmp_path / "nmsolve_report.json").read_text())
    assert report["totals"]["layers"] == len(report["layers"]) == 14
    assert report["totals"]["kept"] * 2 == report["totals"]["weights"]
    assert report["settings"]["method"] == "alps"
    assert report["settings"]["pattern"] == "4:8"
    assert report["memory"]["model"] == sum(p.numel() * 4 for p in model.parameters())
    assert report["memory"]["activations"] == 6 * 24 * tiny_models.HIDDEN * 4
    assert report["memory"]["statistics"] == tiny_models.INNER**2 * 4
    assert report["memory"]["peak"] > report["memory"]["model"]
    row = report["layers"][0]
    assert row["objective"] <= row["bound"] <= row["score"]
    assert row["mask_seconds"] <= row["seconds"]
    assert (tmp_path / "nmsolve_report.png").read_bytes().startswith(b"\x89PNG")


def test_exact_masks_retain_most():
    """One set of statistics, so the scores are the same: exact >= tsenor and greedy in every layer."""
    rows = {}
    for solver in ("exact", "tsenor", "greedy"):
        model = tiny_models.make("llama")
        result = prune(model, tiny_models.tokens(), mask_method=solver, sequential="off")
        rows[solver] = result.report.layers
    for exact, tsenor, greedy in zip(*rows.values(), strict=True):
        assert exact.retained >= tsenor.retained - 1e-7
        assert exact.retained >= greedy.retained - 1e-7
        assert greedy.gap >= exact.gap - 1e-9


# --- resuming -----------------------------------------------------------------------------------------------


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
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(nmsolve.NMSolveError, match="is not empty"):
        prune(mlp(), data, "2:4", resume=tmp_path / "b")


# --- memory -------------------------------------------------------------------------------------------------


MEMORY = """
import resource
import torch
from torch import nn
from nmsolve.prune import prune_model
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def model(depth):
    return nn.Sequential(*[nn.Linear(512, 512) for _ in range(depth)])
options = dict(pattern="2:4", transposable=False, method="sparsegpt", backend="torch", progress=False)
prune_model(model(2), torch.randn(512, 512), batch_size=256, **options)
big = model(40)
data = torch.randn(16384, 512)
before = peak()
prune_model(big, data, batch_size=256, samples=16384, **options)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_depth(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    activations, hessian, batch = 16384 * 512 * 4, 512 * 512 * 4, 256 * 512 * 4
    # One block's inputs, the Hessian and its factors, a layer's working copies; all inputs would be 1.3 GB.
    assert int(done.stdout) < activations + 12 * hessian + 8 * batch + 32 * 2**20


# --- arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": 3}, "model: expected a torch.nn.Module, got int"),
        ({"method": "best"}, "method: expected one of magnitude"),
        ({"sequential": "no"}, "sequential: expected one of"),
        ({"mask_method": "no"}, "mask_method: expected one of"),
        ({"transposable": False, "mask_method": "greedy"}, "needs transposable=True"),
        ({"pattern": "2/4"}, "pattern: expected 'N:M'"),
        ({"pattern": {}}, "pattern: expected at least one"),
        ({"pattern": {"*": 3}}, "pattern: expected 'N:M' or a mapping"),
        ({"pattern": {"nothing.*": "2:4"}}, "pattern: 'nothing.*' matches none of the model's 3 layers"),
        ({"dense": ["nothing"]}, "dense: 'nothing' matches none"),
        ({"pattern": "32:64"}, "no layer to prune among 3 .*smaller than one block of 64"),
        ({"calibration": None}, "calibration: needed for method 'wanda'"),
        ({"calibration": []}, "calibration: expected at least one batch"),
        ({"calibration": 5}, "calibration: expected a path, a tensor or an iterable of batches, got int"),
        ({"calibration": [5]}, "calibration: expected batches that are tensors"),
        ({"calibration": torch.empty(0, 16)}, "empty tensor"),
        ({"calibration": "missing.txt"}, "missing.txt: expected a text file"),
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"damping": 0.0}, "damping: expected a positive number"),
        ({"iterations": 0}, "iterations: expected an integer"),
        ({"backend": "no"}, "backend: expected"),
        ({"initial_masks": {"x": torch.ones(1, dtype=torch.bool)}}, "initial_masks: 'x' is no weight"),
        ({"initial_masks": {"0.weight": torch.ones(2, 2)}}, "expected a bool tensor of shape"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(changes, message):
    model = mlp()
    before = weights(model)
    given = {"model": model, "calibration": torch.randn(8, 16), "pattern": "2:4", "method": "wanda", **QUICK}
    with pytest.raises(nmsolve.NMSolveError, match=message):
        prune_model(**{**given, **changes})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tokens_that_the_model_does_not_know():
    with pytest.raises(nmsolve.NMSolveError, match="expected tokens from 0 to 95, got 96"):
        prune(tiny_models.make("llama"), torch.full((2, 8), 96))


def test_inputs_that_are_not_finite():
    data = torch.randn(8, 16)
    data[3, 5] = torch.nan
    with pytest.raises(nmsolve.NMSolveError, match="the inputs of 0 hold NaN"):
        prune(mlp(), data, "2:4")


def test_calibration_text_and_tokens(tmp_path):
    def tokenizer(text):
        return {"input_ids": [ord(c) % 96 for c in text]}

    file = tmp_path / "text.txt"
    file.write_text("abcdefghij" * 10)
    batches = make_batches(file, tokenizer=tokenizer, samples=3, sequence_length=8, batch_size=2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 8), (1, 8)]
    again = make_batches(file, tokenizer=tokenizer, samples=3, sequence_length=8, batch_size=2)
    other = make_batches(file, tokenizer=tokenizer, samples=3, sequence_length=8, batch_size=2, seed=1)
    assert torch.equal(batches[0], again[0])
    assert not torch.equal(torch.cat(batches), torch.cat(other))
    with pytest.raises(nmsolve.NMSolveError, match="tokenizer: needed"):
        make_batches(file)
    assert [tuple(b.shape) for b in make_batches(torch.arange(10), sequence_length=99)] == [(1, 10)]
    assert isinstance(make_batches([[torch.ones(1), 2]])[0], tuple)


def test_loose_layers_around_a_chain():
    """OPT's projections stand before and after its blocks; each stage is calibrated in its turn."""
    model = tiny_models.make("opt")
    result = prune(model, tiny_models.tokens(), {"*": "4:8"})
    names = [row.name.rpartition(".")[2] for row in result.report.layers]
    assert "project_in" in names
    with quiet_model(model):
        plan = make_plan(model, [x for x in find_layers(model) if x.name != "lm_head"], tiny_models.tokens())
    assert [type(stage) for stage in plan.stages] == [Loose, Chain, Loose]
