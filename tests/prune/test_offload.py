"""Weights on the host or in the checkpoint's files: the same result in less memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import species
import tiny_models
import torch
import zoo
from pruning import QUICK, mlp
from safetensors.torch import load_file, save_file

import nmsolve
from nmsolve import NMSolveError
from nmsolve.prune import prune_checkpoint, prune_model
from nmsolve.prune.methods import OFFLOADS, PRUNING_METHODS
from nmsolve.prune.pretrained import load_model, open_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

DISK = {**QUICK, "picture": False, "device": "cpu"}


def make(kind: str) -> torch.nn.Module:
    return tiny_models.mixtral() if kind == "mixtral" else tiny_models.make(kind)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    save_file({"tokens": tiny_models.tokens(4)}, tmp_path / "tokens.safetensors")
    return tmp_path / "tokens.safetensors"


def written(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}: {name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("kind", "method", "options"),
    [
        ("llama", "sparsegpt", {}),
        ("gpt2", "wanda", {"sequential": "off"}),
        ("mixtral", "wanda", {"sequential": "block", "dtype": "bfloat16"}),
        *(pytest.param("llama", method, {"transposable": True}, marks=slow) for method in PRUNING_METHODS),
        *(
            pytest.param(kind, "sparsegpt", {"sequential": sequential}, marks=slow)
            for kind in ("qwen2", "opt", "gpt2", "bert", "mixtral")
            for sequential in ("layer", "block", "off")
        ),
        pytest.param("mixtral", "ria", {"all_experts": True, "exact_error": True}, marks=slow),
        pytest.param("llama", "alps", {"dtype": "float16", "sequential": "off"}, marks=slow),
        pytest.param("vit", "sparsegpt", {}, marks=slow),
    ],
)
def test_the_result_is_the_same_bit_by_bit(kind, method, options, tokens, tmp_path):
    make(kind).save_pretrained(tmp_path / "in", max_shard_size="50KB")
    if kind == "vit":
        save_file({"images": torch.randn(4, 3, 16, 16)}, tokens)
    if method in ("alps", "frank-wolfe"):
        options = {**options, "iterations": 12}
    found = {}
    for offload in (None, *OFFLOADS):
        result = prune_checkpoint(
            tmp_path / "in", tmp_path / f"{offload}", "4:8", calibration=tokens, method=method,
            offload=offload, **options, **DISK,
        )  # fmt: skip
        found[offload] = written(tmp_path / f"{offload}")
        masks = nmsolve.load_masks(tmp_path / f"{offload}")
        assert all(torch.equal(masks[name], result.masks[name]) for name in masks)
        memory = result.report.memory
        assert ("block" in memory) == (offload is not None)
        assert memory.get("block", 0) < memory["model"]
    assert found[None]
    assert all(same(found[offload], found[None]) for offload in OFFLOADS)
    assert not same(found[None], written(tmp_path / "in"))


def test_without_calibration_and_within_earlier_masks(tmp_path):
    tiny_models.make("llama").save_pretrained(tmp_path / "in")
    options = {"method": "magnitude", **DISK}
    prune_checkpoint(tmp_path / "in", tmp_path / "earlier", "6:8", **options)
    earlier = {**options, "initial_masks": tmp_path / "earlier"}
    for offload in (None, *OFFLOADS):
        prune_checkpoint(tmp_path / "in", tmp_path / f"{offload}", "4:8", offload=offload, **earlier)
    assert same(written(tmp_path / "disk"), written(tmp_path / "None"))
    assert same(written(tmp_path / "cpu"), written(tmp_path / "None"))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("disk", None),
        (None, "disk"),
        pytest.param("cpu", "disk", marks=slow),
        pytest.param("disk", "cpu", marks=slow),
    ],
)
def test_a_run_goes_on_with_the_weights_elsewhere(first, then, tokens, tmp_path, monkeypatch):
    from nmsolve.prune import run

    tiny_models.make("llama").save_pretrained(tmp_path / "in")
    options = {"method": "sparsegpt", "calibration": tokens, **DISK}
    prune_checkpoint(tmp_path / "in", tmp_path / "undisturbed", "4:8", **options)
    calls = []

    def interrupted(self, *arguments, whole=run.Run._layer):
        calls.append(arguments)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_layer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(tmp_path / "in", tmp_path / "out", "4:8", offload=first, **options)
    result = prune_checkpoint(tmp_path / "in", tmp_path / "out", "4:8", offload=then, **options)
    assert result.report.resumed == 8
    assert same(written(tmp_path / "out"), written(tmp_path / "undisturbed"))


# --- from Python --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", ["layer", "block", "off"])
def test_a_model_on_the_host(sequential):
    data = torch.randn(8, 16)
    model, offloaded = mlp(), mlp()
    parameters = list(offloaded.parameters())
    options = {"method": "sparsegpt", "sequential": sequential, **QUICK}
    expected = prune_model(model, data, "4:8", **options)
    given = prune_model(offloaded, data, "4:8", offload="cpu", device="cpu", **options)
    assert all(a is b for a, b in zip(offloaded.parameters(), parameters, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(torch.equal(given.masks[name], mask) for name, mask in expected.masks.items())
    assert given.report.memory["block"] < given.report.memory["model"]
    assert not any("forward" in module.__dict__ for module in offloaded.modules())


def test_what_lies_outside_of_lists_and_what_is_shared():
    """A chain inside, a layer before it, one after it, and one that two modules share."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.before, self.after = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
            self.blocks = torch.nn.ModuleList(
                [torch.nn.Sequential(torch.nn.Linear(16, 16)) for _ in range(3)]
            )
            self.blocks[2][0].weight = self.blocks[0][0].weight
            self.register_buffer("scale", torch.tensor(0.5))

        def forward(self, x):
            x = self.before(x)
            for block in self.blocks:
                x = torch.relu(block(x)) * self.scale
            return self.after(x)

    model, offloaded = Net(), Net()
    options, data = {"method": "sparsegpt", **QUICK}, torch.randn(40, 16)
    prune_model(model, data, "4:8", **options)
    prune_model(offloaded, data, "4:8", offload="cpu", device="cpu", **options)
    others = offloaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, others[name]), name
    assert offloaded.blocks[2][0].weight is offloaded.blocks[0][0].weight


def test_a_run_that_fails_gives_the_weights_back():
    model = mlp()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(NMSolveError, match="cannot be called on the first batch"):
        prune_model(model, torch.randn(8, 15), "4:8", method="wanda", offload="cpu", **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "gpu"}, "offload: expected one of cpu, disk, got 'gpu'"),
        ({"offload": "disk"}, "offload: 'disk' is for a checkpoint"),
        ({"device": "cpu"}, "device: only with offload"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(NMSolveError, match=message):
        prune_model(mlp(), torch.randn(8, 16), "4:8", method="wanda", **options, **QUICK)


def test_a_model_that_accelerate_has_offloaded_in_part_is_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    for offload in (None, "cpu"):
        model = tiny_models.make("llama")
        where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        before = {name: p.clone() for name, p in model.named_parameters() if not p.is_meta}
        with pytest.raises(NMSolveError, match=r"9 of its parameters are offloaded \(model\.layers\.1\."):
            prune_model(model, tiny_models.tokens(), "4:8", method="wanda", offload=offload, **QUICK)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


# --- reading ------------------------------------------------------------------------------------------------

FEW = ("bart", "mixtral", "dbrx", "marian", "gptj")


@pytest.mark.parametrize(
    "dtype", [None, pytest.param("bfloat16", marks=slow), pytest.param("float16", marks=slow)]
)
@pytest.mark.parametrize("name", [x if x in FEW else pytest.param(x, marks=slow) for x in species.ZOO])
def test_weights_are_read_as_transformers_loads_them(name, dtype, tmp_path):
    zoo.build(name).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype)
    built, weights = open_model(tmp_path, dtype)
    assert all(p.is_meta for name, p in built.named_parameters() if name in weights)
    state, others = model.state_dict(), built.state_dict()
    read = weights.read([name for name in state if name in weights])
    assert [(name, x.dtype) for name, x in state.items()] == [(name, x.dtype) for name, x in others.items()]
    for name, value in state.items():
        torch.testing.assert_close(read.get(name, others[name]), value, rtol=0, atol=0, equal_nan=True)
    buffers, there = dict(model.named_buffers()), dict(built.named_buffers())
    assert buffers.keys() == there.keys()
    for name, value in buffers.items():
        torch.testing.assert_close(there[name], value, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_that_lacks_a_tensor(tmp_path):
    tiny_models.make("llama").save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    # Copies: the tensors of a file that is written to must not lie in it.
    state = {name: tensor.clone() for name, tensor in load_file(file).items()}
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, {"format": "pt"})
    arguments, options = (tmp_path / "in", tmp_path / "out", "4:8"), {"method": "magnitude", **DISK}
    for offload in (None, "disk"):
        with pytest.raises(NMSolveError, match=r"needs model.layers.1.mlp.up_proj.weight, which is not"):
            prune_checkpoint(*arguments, offload=offload, **options)
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(32, 32)
    save_file(state, file, {"format": "pt"})
    for offload in (None, "disk"):
        with pytest.raises(NMSolveError, match=r"up_proj.weight has another shape than in"):
            prune_checkpoint(*arguments, offload=offload, **options)


# --- memory -------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import torch
import transformers
from nmsolve.prune import prune_checkpoint
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, dtype = sys.argv[1], sys.argv[2] or None
options = dict(calibration=f"{folder}/tokens.safetensors", method="sparsegpt", offload="disk", picture=False,
               progress=False, device="cpu", dtype=dtype)
prune_checkpoint(f"{folder}/small", f"{folder}/out", "2:4", **options)
before = peak()
result = prune_checkpoint(f"{folder}/big", f"{folder}/out", "2:4", overwrite=True, **options)
memory = result.report.memory
print(peak() - before, *(memory[name] for name in ("model", "block", "activations", "statistics")))
"""


@slow
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
def test_the_disk_takes_the_memory_of_a_block(dtype, tokens, tmp_path):
    """24 blocks, 289 MiB in all."""
    for name, size, blocks in (("small", 64, 2), ("big", 512, 24)):
        config = transformers.LlamaConfig(
            vocab_size=tiny_models.VOCABULARY,
            hidden_size=size,
            intermediate_size=3 * size,
            num_hidden_layers=blocks,
            num_attention_heads=8,
            num_key_value_heads=4,
            bos_token_id=0,
            eos_token_id=1,
        )
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name, max_shard_size="100MB")
        stored = sum(p.nbytes for p in model.parameters())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), dtype], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    above, model_bytes, block, activations, statistics = map(int, done.stdout.split())
    assert stored > 280 * 2**20
    assert above < stored / 3
    assert model_bytes * (2 if dtype else 1) >= stored
    masks = stored // 32
    assert above < 2 * block + 4 * statistics + activations + masks + 48 * 2**20
