"""``nmsolve mask``: what it computes, writes and shows."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest
import torch
import tqdm.utils
from checkpoints import METADATA, llama, save_sharded
from mask_command import mask, names, optimum, verify
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nmsolve
import nmsolve.checkpoint.masking
from nmsolve import check_mask, load_masks
from nmsolve.checkpoint import mask_checkpoint
from nmsolve.cli import main

pytest_plugins = ("mask_command",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_file_to_a_file(tmp_path, out, dtype, capsys):
    state = llama(dtype) | {"count": torch.tensor(3), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    save_file(state, tmp_path / "model.safetensors", metadata=METADATA)
    assert mask(tmp_path / "model.safetensors", out, "--transposable") == 0
    assert names(out.parent) == ["sparse.masks.safetensors", "sparse.report.json", "sparse.safetensors"]
    report = json.loads(out.with_name("sparse.report.json").read_text())
    masks = load_masks(out.with_name("sparse.masks.safetensors"))
    after = load_file(out)
    assert torch.equal(state.pop("f8").view(torch.uint8), after.pop("f8").view(torch.uint8))
    report["skipped"] = [row for row in report["skipped"] if row["name"] != "f8"]
    report["totals"]["tensors_skipped"] -= 1
    verify(state, after, masks, report, transposable=True)
    assert len(masks) == 14
    with safe_open(out, framework="pt") as reader:
        assert reader.metadata() == METADATA
    limit = 1e-9 if dtype == torch.float64 else 1e-6
    for row in report["tensors"]:
        assert row["max_gap"] <= limit
        assert row["objective"] == pytest.approx(optimum(state[row["name"]], "8:16"), rel=1e-6)
        assert (row["pattern"], row["method"], row["backend"]) == ("8:16", "exact", "torch")
    said = capsys.readouterr()
    assert "transposable 8:16 by exact: 14 tensors" in said.out
    assert f"{report['totals']['retained']:.2%}" in said.out
    assert said.err == ""


def test_without_a_certificate(file, out, capsys):
    """The same masks and weights; the report claims nothing about the optimum."""
    assert mask(file, out, "--transposable") == 0
    proven = json.loads(out.with_name("sparse.report.json").read_text())
    bare = out.with_name("bare.safetensors")
    capsys.readouterr()
    assert mask(file, bare, "--transposable", "--certificate", "off") == 0
    assert "; no certificate was asked for" in capsys.readouterr().out
    report = json.loads(out.with_name("bare.report.json").read_text())
    assert out.read_bytes() == bare.read_bytes()
    masks = [path.with_name(f"{path.stem}.masks.safetensors").read_bytes() for path in (out, bare)]
    assert masks[0] == masks[1]
    assert (proven["settings"]["certificate"], report["settings"]["certificate"]) == (True, False)
    for row, with_bound in zip(
        [report["totals"], *report["tensors"]], [proven["totals"], *proven["tensors"]], strict=True
    ):
        assert row["bound"] is row["gap"] is row["max_gap"] is None
        assert with_bound["max_gap"] <= 1e-6
        for same in ("score", "kept", "retained", "objective"):
            assert row[same] == pytest.approx(with_bound[same], rel=1e-12)


def test_an_ordinary_mask_is_the_best_without_being_asked(file, out):
    assert mask(file, out, "--certificate", "off") == 0
    totals = json.loads(out.with_name("sparse.report.json").read_text())["totals"]
    assert (totals["gap"], totals["bound"]) == (0, totals["objective"])
    with pytest.raises(nmsolve.NMSolveError, match="certificate: expected True or False, got 'off'"):
        mask_checkpoint(file, out, "2:4", certificate="off", overwrite=True)


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "nmsolve", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["nmsolve", nmsolve.__version__])


def test_the_report_says_what_ran(file, out):
    options = [
        "--transposable",
        "--method",
        "greedy",
        "--include",
        "*q_proj*",
        "--include",
        "*norm*",
        "--exclude",
        "*.1.*",
    ]
    assert mask(file, out, *options, "--device", "cpu", "--quiet") == 0
    report = json.loads(out.with_name("sparse.report.json").read_text())
    assert report["nmsolve"] == nmsolve.__version__
    assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (report["input"], report["output"]) == (str(file), str(out))
    assert report["settings"] == {
        "pattern": "8:16",
        "transposable": True,
        "method": "greedy",
        "backend": "torch",
        "device": "cpu",
        "certificate": True,
        "include": ["*q_proj*", "*norm*"],
        "exclude": ["*.1.*"],
        "input_first": [],
        "input_last": [],
        "chosen_by": "names: there is no config.json",
    }
    assert [row["name"] for row in report["tensors"]] == ["model.layers.0.self_attn.q_proj.weight"]
    reasons = {row["name"]: row["reason"] for row in report["skipped"]}
    assert reasons["model.embed_tokens.weight"] == "not included"
    assert reasons["model.norm.weight"] == "1-D, not a matrix"
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "excluded by '*.1.*'"


@pytest.mark.parametrize("method", ["greedy", "tsenor"])
def test_approximations_come_with_their_distance_from_the_optimum(file, out, method, capsys):
    assert mask(file, out, "--transposable", "--method", method, "--include", "*q_proj*") == 0
    report = json.loads(out.with_name("sparse.report.json").read_text())
    state = load_file(file)
    for row in report["tensors"]:
        assert row["method"] == method
        assert row["bound"] == pytest.approx(optimum(state[row["name"]], "8:16"), rel=1e-6)
        assert row["objective"] < row["bound"]
        assert row["max_gap"] > row["gap"] > 1e-6
    assert f"provably within {report['totals']['gap']:.1e} of the optimum" in capsys.readouterr().out


def test_ordinary_masks_lie_along_the_inputs(tmp_path, out):
    state = {
        "fc.weight": torch.randn(24, 50),
        "conv.weight": torch.randn(20, 18, 3, 3),
        "conv1d.weight": torch.randn(20, 18, 5),
        "experts.weight": torch.randn(3, 8, 24),
        "c_fc.weight": torch.randn(50, 24),
    }
    save_file(state, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, "--input-first", "c_*", pattern="2:4") == 0
    masks = load_masks(out.with_name("sparse.masks.safetensors"))
    after = load_file(out)
    dims = {"fc.weight": 1, "conv.weight": 1, "conv1d.weight": 1, "experts.weight": 2, "c_fc.weight": 0}
    for name, dim in dims.items():
        check_mask(masks[name], 2, 4, transposable=False, dim=dim)
        groups = state[name].abs().movedim(dim, -1)
        groups = torch.nn.functional.pad(groups, (0, -groups.shape[-1] % 4)).unflatten(-1, (-1, 4))
        best = groups.double().topk(2, dim=-1).values.sum()
        assert after[name].double().abs().sum().item() == pytest.approx(best.item(), rel=1e-12)
    report = json.loads(out.with_name("sparse.report.json").read_text())
    assert report["totals"]["gap"] == report["totals"]["max_gap"] == 0
    assert {row["method"] for row in report["tensors"]} == {"ordinary"}
    layouts = {row["name"]: row["layout"] for row in report["tensors"]}
    assert layouts["conv.weight"] == layouts["conv1d.weight"] == "convolution"
    assert layouts["experts.weight"] == "stack"


def test_transposable_masks_of_convolutions_and_stacks(tmp_path, out):
    state = {
        "conv.weight": torch.randn(20, 18, 2, 2).half(),
        "experts.weight": torch.randn(3, 8, 24).bfloat16(),
        "tall.weight": torch.randn(33, 9),
    }
    save_file(state, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, "--transposable", pattern="4:8") == 0
    report = json.loads(out.with_name("sparse.report.json").read_text())
    masks = load_masks(out.with_name("sparse.masks.safetensors"))
    verify(state, load_file(out), masks, report, transposable=True, pattern="4:8")
    for row in report["tensors"]:
        assert row["objective"] == pytest.approx(optimum(state[row["name"]], "4:8"), rel=1e-6)


@pytest.mark.parametrize("transposable", [True, False])
def test_slabs_do_not_show_in_the_result(tmp_path, out, monkeypatch, transposable):
    state = {
        "fc.weight": torch.randn(37, 21),
        "conv.weight": torch.randn(19, 7, 3),
        "experts.weight": torch.randn(5, 9, 11),
        "big_experts.weight": torch.randn(2, 41, 43),
    }
    save_file(state, tmp_path / "m.safetensors")
    options = ["--include", "*", *(["--transposable"] if transposable else [])]
    assert mask(tmp_path / "m.safetensors", out, *options, pattern="2:4") == 0
    expected = {path.name: path.read_bytes() for path in out.parent.glob("*.safetensors")}
    sums = json.loads(out.with_name("sparse.report.json").read_text())["totals"]
    for elements in (1, 100, 250):
        monkeypatch.setattr(nmsolve.backends.dispatch.Backend, "slab", elements)
        assert mask(tmp_path / "m.safetensors", out, *options, "--overwrite", pattern="2:4") == 0
        assert {path.name: path.read_bytes() for path in out.parent.glob("*.safetensors")} == expected
        again = json.loads(out.with_name("sparse.report.json").read_text())["totals"]
        for key in ("kept", "score", "objective", "bound"):
            assert again[key] == pytest.approx(sums[key], rel=1e-12)


def test_a_sharded_folder_to_a_folder(tmp_path, capsys):
    state = llama()
    save_sharded(tmp_path / "in", state, 3)
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"dense")
    (tmp_path / "in" / "run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "in" / "run.sh").chmod(0o755)
    assert mask(tmp_path / "in", tmp_path / "out", "--transposable") == 0
    assert names(tmp_path) == ["in", "out"]
    shards = [f"model-{k:05}-of-00003.safetensors" for k in (1, 2, 3)]
    assert names(tmp_path / "out") == sorted(
        [
            "config.json",
            "masks",
            "model.safetensors.index.json",
            "nmsolve_report.json",
            "run.sh",
            "tokenizer",
            *shards,
        ]
    )
    assert names(tmp_path / "out" / "masks") == [name.replace(".safet", ".masks.safet") for name in shards]
    for copied in ("config.json", "model.safetensors.index.json", "tokenizer/vocab.txt", "run.sh"):
        assert (tmp_path / "out" / copied).read_bytes() == (tmp_path / "in" / copied).read_bytes()
    assert os.access(tmp_path / "out" / "run.sh", os.X_OK)
    after: dict[str, torch.Tensor] = {}
    for name in shards:
        assert (tmp_path / "out" / name).stat().st_size == (tmp_path / "in" / name).stat().st_size
        part = load_file(tmp_path / "out" / name)
        assert list(part) == list(load_file(tmp_path / "in" / name))
        assert (
            part.keys() >= load_masks(tmp_path / "out/masks" / name.replace(".safet", ".masks.safet")).keys()
        )
        after |= part
    report = json.loads((tmp_path / "out" / "nmsolve_report.json").read_text())
    verify(state, after, load_masks(tmp_path / "out"), report, transposable=True)
    assert report["files_left_out"] == ["pytorch_model.bin"]
    assert "not copied, as they hold other weights: pytorch_model.bin" in capsys.readouterr().out


def test_masking_a_masked_folder_again(tmp_path):
    save_sharded(tmp_path / "in", llama())
    assert mask(tmp_path / "in", tmp_path / "once", "--transposable", pattern="12:16") == 0
    assert mask(tmp_path / "once", tmp_path / "twice", "--transposable", "--include", "*_proj*") == 0
    assert json.loads((tmp_path / "twice/nmsolve_report.json").read_text())["settings"]["pattern"] == "8:16"
    assert names(tmp_path / "twice" / "masks") == names(tmp_path / "once" / "masks")


def test_a_shard_without_a_masked_tensor_has_no_masks(tmp_path):
    save_sharded(tmp_path / "in", {"a.norm": torch.ones(4), "fc.weight": torch.randn(16, 16)})
    assert mask(tmp_path / "in", tmp_path / "out") == 0
    assert names(tmp_path / "out" / "masks") == ["model-00002-of-00002.masks.safetensors"]


def test_auto_takes_a_backend_and_says_which(file, out):
    assert mask(file, out, "--transposable", "--device", "cpu", backend="auto") == 0
    report = json.loads(out.with_name("sparse.report.json").read_text())
    runs = nmsolve.backends.dispatch.backend_reasons("cpu")["cpu"] is None
    assert {row["backend"] for row in report["tensors"]} == {"cpu" if runs else "torch"}
    masks = load_masks(out.with_name("sparse.masks.safetensors"))
    verify(load_file(file), load_file(out), masks, report, transposable=True)


def test_zeros_and_ends_of_the_range(tmp_path, out):
    state = {
        "zeros.weight": torch.zeros(16, 16),
        "tiny.weight": torch.full((16, 16), 1e-40),
        "huge.weight": torch.full((16, 16), 3e38),
        "half.weight": torch.full((16, 16), 65504.0).half(),
        "minus.weight": -torch.rand(16, 16),
    }
    save_file(state, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, "--transposable", backend="auto") == 0
    report = json.loads(out.with_name("sparse.report.json").read_text())
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["zeros.weight"]["retained"] == 1
    assert rows["huge.weight"]["retained"] == pytest.approx(0.5)
    assert all(row["kept"] == 128 for row in rows.values())


def test_a_sum_beyond_the_range_is_null_in_the_report(tmp_path, out):
    save_file({"fc.weight": torch.full((32, 16), 1e308, dtype=torch.float64)}, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, pattern="2:4") == 0
    report = json.loads(out.with_name("sparse.report.json").read_text())
    assert report["tensors"][0]["score"] is None
    assert report["tensors"][0]["kept"] == 256


@pytest.mark.parametrize(("pattern", "kept"), [("0:4", 0), ("4:4", 64)])
def test_nothing_or_everything_kept(tmp_path, out, pattern, kept, capsys):
    """Python does as it is told; on the command line it is a mistake."""
    save_file({"fc.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, "--transposable", pattern=pattern) == 2
    assert (
        f"--pattern: {pattern} {'prunes nothing' if kept else 'keeps no weight'}" in capsys.readouterr().err
    )
    mask_checkpoint(
        tmp_path / "m.safetensors", out, pattern, transposable=True, backend="torch", progress=False
    )
    assert int(load_masks(out.with_name("sparse.masks.safetensors"))["fc.weight"].sum()) == kept


def test_dry_run_lists_and_writes_nothing(file, out, capsys):
    assert mask(file, out, "--dry-run", "--exclude", "*.0.*") == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        len([line for line in lines if re.match(r"mask  model\.layers\.1\.\S+ +BF16  \d+x\d+ +linear", line)])
        == 7
    )
    assert any(re.match(r"keep  model\.embed_tokens.weight +BF16  50x32 +embedding", line) for line in lines)
    assert lines[-1] == "7 of 20 tensors would be masked, 10,752 weights"
    assert names(out.parent) == []
    assert main(["mask", str(file), "--pattern", "2:4", "--dry-run"]) == 0


def test_quiet(file, out, capsys):
    assert mask(file, out, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("quiet", [False, True])
def test_the_progress_bar_names_the_tensor(file, out, quiet):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, "-m", "nmsolve.cli", "mask", str(file), "--pattern", "2:4", "--out", str(out)]
    environment = os.environ | {"TQDM_MININTERVAL": "0"}
    options = ["--quiet"] if quiet else []
    done = subprocess.run(
        [*command, "--backend", "torch", *options], stdout=subprocess.DEVNULL, stderr=writer, env=environment
    )
    os.close(writer)
    shown = b""
    try:
        while piece := os.read(reader, 1 << 16):
            shown += piece
    except OSError:  # the terminal is gone once all is read
        pass
    os.close(reader)
    assert done.returncode == 0
    if quiet:
        assert shown == b""
    else:
        assert b"100%" in shown
        # Before 4.66 tqdm does not read the interval above: of a short run it shows the end alone.
        if hasattr(tqdm.utils, "envwrap"):
            assert b"model.layers.1.mlp.down_proj.weight" in shown


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Six tensors of 64 MB: the peak stays within four times one of them, whatever the backend.

    Two to two and a half times on a quiet machine; on a busy one more slabs wait to be written.
    """
    size = 64 << 20
    names = [f"layers.{k}.weight" for k in range(6)]
    fields = {
        name: {"dtype": "F32", "shape": [4096, 4096], "data_offsets": [k * size, (k + 1) * size]}
        for k, name in enumerate(names)
    }
    header = json.dumps(fields).encode()
    generator = torch.Generator().manual_seed(0)
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in names:
            file.write(torch.randn(4096, 4096, generator=generator).numpy().data)
    save_file({"layers.0.weight": torch.randn(64, 64, generator=generator)}, tmp_path / "small.safetensors")
    code = f"""
import re
from pathlib import Path
from nmsolve.cli import main

def peak():  # of this program alone; getrusage begins with the peak of its parent
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

def run(name, *options):
    folder = {str(tmp_path)!r}
    common = ["--pattern", "8:16", "--device", "cpu", "--quiet", "--overwrite"]
    assert main(["mask", folder + "/" + name, "--out", folder + "/out.safetensors", *common, *options]) == 0

for options in (["--transposable"], ["--transposable", "--backend", "torch", "--include", "*.0.*"]):
    run("small.safetensors", *options)
    before = peak()
    run("big.safetensors", *options)
    print(peak() - before)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    grown = [int(line) for line in done.stdout.split()]
    assert len(grown) == 2
    assert 0 < grown[0] < 4 * size, grown
    assert grown[1] < 3 * size, grown
