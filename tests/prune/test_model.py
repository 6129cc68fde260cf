"""Transformer models: every layer N:M, calibrated on what comes before it, loadable, reported."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext

import pytest
import tiny_models
import torch
import torch.nn.utils.prune
from pruning import inputs_of, mlp, prune, weights
from safetensors.torch import load_file

import nmsolve
from nmsolve.checkpoint.mask_files import load_masks
from nmsolve.prune import magnitude_scores, ria_scores, wanda_scores
from nmsolve.prune.calibration import call_model, make_batches
from nmsolve.prune.layers import find_layers
from nmsolve.prune.walk import Chain, make_plan, quiet_model

pytest.importorskip("transformers")


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
    masks, stored = load_masks(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert len(masks) == LAYERS[kind]
    assert all(torch.equal(stored[name] != 0, mask) for name, mask in masks.items()), "names of the file"


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


@pytest.mark.parametrize("calls", [None, 1, 20])
def test_a_model_is_left_as_it_was_found(calls):
    """After a whole run, and after one that an exception has ended."""
    model = tiny_models.make("llama", attention_dropout=0.5).train()
    model.config.use_cache = True
    left, state = calls, torch.get_rng_state()

    def check():
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) if calls else nullcontext():
        prune(model, tiny_models.tokens(), check=check)
    assert all(module.training for module in model.modules())
    assert model.config.use_cache
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("compiled", ["model", "warm", "blocks"])
def test_a_compiled_model_is_pruned_as_it_is_written(compiled):
    plain, model = tiny_models.make("llama"), tiny_models.make("llama")
    data = tiny_models.tokens()
    expected = prune(plain, data)
    given = model
    if compiled == "blocks":
        for block in model.model.layers:
            block.compile(backend="eager")
    else:
        given = torch.compile(model, backend="eager")
    if compiled != "model":
        given(data[:1])
    counted = dict(torch._dynamo.utils.counters["frames"])
    result = prune(given, data)
    assert dict(torch._dynamo.utils.counters["frames"]) == counted  # nothing was compiled again, with hooks
    assert list(result.masks) == list(expected.masks)
    for name, mask in result.masks.items():
        assert torch.equal(mask, expected.masks[name]), name
        assert torch.equal(model.state_dict()[name] != 0, mask)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_autocast_does_not_reach_the_arithmetic(method):
    """The first layer's input is the data itself: its statistics do not depend on the forward pass."""
    data = torch.randn(40, 16)
    expected, found = mlp(depth=1), mlp(depth=1)
    prune(expected, data, "2:4", method=method)
    with torch.autocast("cpu", torch.bfloat16):
        prune(found, data, "2:4", method=method)
    assert torch.equal(found[0].weight, expected[0].weight)


def test_padding_does_not_count():
    """Two sequences padded to one length give the same masks as each by itself."""
    short, long = tiny_models.tokens(2, 24)
    alone = [short[None, :9], long[None]]
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, 9:] = 0
    padded = [{"input_ids": torch.stack([short, long]), "attention_mask": mask}]
    for kind in ("llama", "bert"):
        expected, found = tiny_models.make(kind), tiny_models.make(kind)
        one, other = prune(expected, alone), prune(found, padded)
        assert {row.tokens for row in other.report.layers} == {33}
        for a, b in zip(one.report.layers, other.report.layers, strict=True):
            assert b.relative_error == pytest.approx(a.relative_error, rel=1e-2)
        differing = [(one.masks[name] != other.masks[name]).float().mean() for name in one.masks]
        assert max(differing) < 0.02


def test_experts_may_stay_dense_and_globs_name_them():
    pytest.importorskip("transformers")
    model = tiny_models.mixtral(intermediate_size=64, num_hidden_layers=1)
    if not any(name.endswith("experts.gate_up_proj") for name, _ in model.named_parameters()):
        pytest.skip("this transformers keeps the experts in layers of their own")
    result = prune(model, tiny_models.tokens(), dense="experts.*")
    assert {name.split(".")[-2] for name in result.masks} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert result.report.skipped["model.layers.0.mlp.experts.gate_up_proj"] == "named in dense"
    totals = result.report.totals()
    assert totals["parameters"] == sum(p.numel() for p in model.parameters()) > 5 * totals["weights"]
    named = prune(model, tiny_models.tokens(12, 64), {"experts.down_proj": "2:4"})
    assert list(named.masks) == ["model.layers.0.mlp.experts.down_proj"]


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


def test_saving_again_leaves_no_earlier_masks(tmp_path):
    for pattern in ("4:8", "2:4"):
        model = tiny_models.make("llama")
        result = prune(model, tiny_models.tokens(), pattern)
        result.save(model, tmp_path, picture=False)
    assert [file.name for file in (tmp_path / "masks").iterdir()] == ["2of4.masks.safetensors"]
    masks = load_masks(tmp_path)
    assert all(torch.equal(mask, result.masks[name]) for name, mask in masks.items())


def test_what_has_no_save_pretrained_says_so(tmp_path):
    model = mlp()
    result = prune(model, torch.randn(8, 16), "2:4")
    with pytest.raises(nmsolve.NMSolveError, match="expected a transformers model, got Sequential"):
        result.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
