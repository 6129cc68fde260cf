"""bench/scale.py: headers as they are published, and what ranks get of them."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import scale
import torch
from common import RESULTS, read_csv
from scale_headers import MODELS, Input, checkpoint_of

from nmsolve.checkpoint.units import deal
from nmsolve.cli import COMMANDS
from nmsolve.cli.command import Parser

PUBLISHED = {"Llama 405B": (405.85e9, 191), "DeepSeek-V3": (671.0e9, 163)}
TINY = {
    "Llama 405B": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
    "DeepSeek-V3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 4,
        "v_head_dim": 12,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "vocab_size": 64,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_published_ones(name, tmp_path):
    checkpoint = checkpoint_of(MODELS[name], tmp_path)
    parameters, files = PUBLISHED[name]
    assert sum(entry.size for _, entry in checkpoint.entries()) == pytest.approx(parameters, rel=1e-3)
    assert len(checkpoint.shards) == files
    for shard in checkpoint.shards:
        assert shard.nbytes <= MODELS[name].shard_bytes + len(shard.header)
        fields = json.loads(shard.header[8:])
        for entry in shard.entries:
            first, last = fields[entry.name]["data_offsets"]
            assert (entry.start, entry.stop) == (len(shard.header) + first, len(shard.header) + last)
            assert last - first == 2 * math.prod(entry.shape)


@pytest.mark.filterwarnings("ignore:.*layers of experts saw fewer than")
@pytest.mark.parametrize("name", MODELS)
def test_tensors_are_those_that_transformers_saves_and_sums_those_of_prune(name, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5")  # experts are one parameter from 5 on
    from safetensors import safe_open

    from nmsolve.prune import prune_model

    model = MODELS[name]
    config = {**model.config, **TINY[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    made.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert dict(model.tensors(config)) == saved

    blocks = model.blocks(config)
    tokens = torch.randint(0, 64, (2, 16))
    how = {"sequential": "block", "backend": "torch"}
    measured = prune_model(made, tokens, "2:4", method="sparsegpt", **how).report.memory["statistics"]
    assert measured == max(sum(scale.summed(block, diagonal=False)) for block in blocks)
    if name == "Llama 405B":  # elsewhere a sample of each expert is measured as well
        measured = prune_model(made, tokens, "2:4", method="wanda", **how).report.memory["statistics"]
        assert measured == (512 + 1) * sum(scale.summed(blocks[0], diagonal=True))


@pytest.fixture(scope="module", params=MODELS)
def shares(request, tmp_path_factory):
    """Four blocks in their real width."""
    model = MODELS[request.param]
    model = replace(model, config={**model.config, "num_hidden_layers": 4})
    return scale.Shares(checkpoint_of(model, tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.parametrize("ranks", [1, 3, 8, 250])
def test_ranks_share_the_whole(shares, ranks):
    dealt = shares.dealt(ranks)
    whole = shares.of(shares.units)
    assert sum(dealt, scale.Share()) == whole
    assert whole.read == sum(entry.nbytes for unit in shares.units for entry in unit.entries)
    assert whole.written == whole.read + whole.solved // 8
    rates = scale.Rates(read=1e9, write=2e9, solve=1e8)
    found = scale.masking(dealt, rates)
    assert found["largest_over_mean"] >= 1
    assert found["solved_largest_over_mean"] >= 1
    assert found["seconds"] <= found["seconds_in_turn"] <= 3 * found["seconds"]
    assert found["seconds"] >= whole.solved / ranks / rates.solve


def test_dealing_does_not_depend_on_the_order(shares):
    shuffled = random.Random(0).sample(shares.units, len(shares.units))
    assert deal(shuffled, 16) == deal(shares.units, 16)


def test_hosts_are_as_slow_as_their_slowest_part():
    fast, slow = scale.Share(100, 200, 30), scale.Share(100, 200, 90)
    found = scale.masking([fast] * 8 + [slow] * 4, scale.Rates(read=100, write=100, solve=3))
    assert found["read_seconds"] == 8
    assert found["write_seconds"] == 16
    assert found["solve_seconds"] == 30
    assert found["seconds"] == 30  # the second host solves longest
    assert found["seconds_in_turn"] == 4 + 8 + 30
    assert found["solved_largest_over_mean"] == pytest.approx(90 / 50)


def test_sums_and_who_solves():
    block = [Input(10, (6, 1, 1)), Input(20, (8,), groups=3)]
    found = scale.reductions([block, block[:1]], ranks=4, diagonal=False, network=1e3)
    assert found["at_once_gb"] * 1e9 == 4 * 3 * 400
    assert found["block_gb"] * 1e9 == 4 * (100 + 3 * 400)
    assert found["model_gb"] * 1e9 == pytest.approx(4 * (200 + 3 * 400))
    assert found["model_sent_gb"] == pytest.approx(1.5 * found["model_gb"])
    assert found["seconds"] == pytest.approx(1.5 * 4 * 1400 / 1e3)
    assert found["solving_ranks"] == pytest.approx((8 + 8 + 8) / (6 + 8 + 6))
    assert scale.solving_ranks([block], 1) == 1


def test_the_results_have_every_row_and_agree_with_themselves():
    rows = read_csv(RESULTS / scale.FILE)
    cases = [(row["model"], int(row["ranks"]), row["quantities"]) for row in rows]
    quantities = ("mask, CPU", "mask, H100", "prune, Hessians", "prune, diagonals")
    assert cases == [(m, ranks, what) for m in MODELS for ranks in scale.RANKS for what in quantities]
    for row in rows:
        ranks = int(row["ranks"])
        if row["quantities"].startswith("mask"):
            assert float(row["largest_over_mean"]) >= 1
            assert float(row["read_gb"]) * ranks == pytest.approx(float(row["gb"]), rel=1e-4)
            assert float(row["most_read_gb"]) >= float(row["read_gb"])
        else:
            ring = 2 * (ranks - 1) / ranks
            assert float(row["model_sent_gb"]) == pytest.approx(ring * float(row["model_gb"]), rel=1e-4)
    masked = {row["model"]: int(row["masked"]) for row in rows}
    experts = 58 * (3 * 256 + 3)  # of all blocks but three, with the shared one
    assert masked == {"Llama 405B": 126 * 7, "DeepSeek-V3": 61 * 5 + 3 * 3 + experts}


@pytest.mark.parametrize(
    "arguments", [["--ranks", "0"], ["--read", "0"], ["--gpu", "nan"], ["--network", "inf"], ["--cpu", "-1"]]
)
def test_what_is_no_rate_is_wrong_usage(arguments, monkeypatch, tmp_path):
    out = tmp_path / "out.csv"
    monkeypatch.setattr("sys.argv", ["scale", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        scale.main()
    assert ended.value.code == 2
    assert not out.exists()


def test_the_picture_is_drawn_from_the_results(tmp_path):
    plots = pytest.importorskip("plots", exc_type=ImportError)
    plots.scale(read_csv(RESULTS / scale.FILE), tmp_path / "scale.png")
    for file in (tmp_path / "scale.png", Path(plots.ROOT / "docs" / "scale.png")):
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size < 150_000


def test_commands_of_the_page_take_what_torchrun_starts():
    from torch.distributed.run import parse_args

    page = (Path(scale.__file__).parents[1] / "docs" / "scale.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:srun )?torchrun (.* -m nmsolve .*)$", page, re.M)
    assert len(lines) >= 3
    for line in lines:
        started = parse_args(shlex.split(line))
        name, *arguments = started.training_script_args
        (command,) = (known for known in COMMANDS if known.name == name)
        assert (started.module, started.training_script, command.ranks) == (True, "nmsolve", True), line
        parser = Parser()
        command.add_options(parser)
        assert parser.parse_args(arguments).out == Path("OUT")
