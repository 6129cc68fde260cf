"""The command ``nmsolve``, from its arguments to the files on disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from checkpoints import METADATA, llama, save_sharded
from oracles import blocks_of, min_cost_flow
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import nmsolve
import nmsolve.masking
from nmsolve import BackendError, check_mask, load_masks
from nmsolve.checkpoint import StreamWriter
from nmsolve.cli import main


def mask(source: Path, out: Path, *options: str, pattern: str = "8:16", backend: str = "torch") -> int:
    return main(
        ["mask", str(source), "--pattern", pattern, "--backend", backend, "--out", str(out), *options]
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "model.safetensors"
    path.parent.mkdir()
    save_file(llama(), path, metadata=METADATA)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "sparse.safetensors"


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The message, once it is certain that it is one line on stderr and all there is."""
    captured = capsys.readouterr()
    assert re.fullmatch(r"nmsolve: error: [^\n]+\n", captured.err), captured.err
    assert captured.out == ""
    return captured.err


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def matrices(tensor: torch.Tensor) -> torch.Tensor:
    """A weight (out, in, kernel...) as matrices (positions, out, in)."""
    return tensor.flatten(2).permute(2, 0, 1) if tensor.ndim > 3 else tensor


def verify(before, after, masks, report, *, transposable: bool, pattern: str = "8:16") -> None:
    """Recomputes from the files what a run claims."""
    n, m = map(int, pattern.split(":"))
    rows = {row["name"]: row for row in report["tensors"]}
    assert masks.keys() == rows.keys()
    assert rows.keys() | {row["name"] for row in report["skipped"]} == before.keys() == after.keys()
    for name, dense in before.items():
        sparse = after[name]
        assert (sparse.dtype, sparse.shape) == (dense.dtype, dense.shape)
        if name not in masks:
            assert torch.equal(sparse, dense)
            continue
        keep, row = masks[name], rows[name]
        assert keep.shape == dense.shape
        assert torch.equal(sparse, torch.where(keep, dense, 0))
        check_mask(matrices(keep), n, m, transposable=transposable)
        assert row["shape"] == list(dense.shape)
        assert row["weights"] == dense.numel()
        assert row["kept"] == int(keep.sum())
        assert row["score"] == pytest.approx(dense.double().abs().sum().item(), rel=1e-12)
        assert row["objective"] == pytest.approx(sparse.double().abs().sum().item(), rel=1e-12)
        assert row["retained"] == pytest.approx(row["objective"] / row["score"], rel=1e-12)
        assert row["gap"] == pytest.approx((row["bound"] - row["objective"]) / row["objective"], abs=1e-15)
        assert row["bound"] >= row["objective"] * (1 - 1e-12)
        assert row["seconds"] > 0
    totals = report["totals"]
    assert totals["tensors_masked"] == len(masks)
    assert totals["tensors_skipped"] == len(before) - len(masks)
    for key in ("weights", "kept", "score", "objective", "bound"):
        assert totals[key] == pytest.approx(sum(row[key] for row in report["tensors"]), rel=1e-12)
    assert totals["retained"] == pytest.approx(totals["objective"] / totals["score"], rel=1e-12)
    assert totals["gap"] == pytest.approx(totals["bound"] / totals["objective"] - 1, abs=1e-12)
    assert totals["max_gap"] == max(row["max_gap"] for row in report["tensors"])


def optimum(dense: torch.Tensor, pattern: str) -> float:
    """The largest kept magnitude, by min-cost flow."""
    n, m = map(int, pattern.split(":"))
    parts = matrices(dense.abs())
    return sum(
        min_cost_flow(block, n)
        for part in parts.reshape(-1, *parts.shape[-2:])
        for *_, block in blocks_of(part, m)
    )


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
    assert report["versions"]["torch"] == torch.__version__
    assert (report["input"], report["output"]) == (str(file), str(out))
    assert report["settings"] == {
        "pattern": "8:16",
        "transposable": True,
        "method": "greedy",
        "backend": "torch",
        "device": "cpu",
        "include": ["*q_proj*", "*norm*"],
        "exclude": ["*.1.*"],
        "input_first": [],
    }
    assert [row["name"] for row in report["tensors"]] == ["model.layers.0.self_attn.q_proj.weight"]
    reasons = {row["name"]: row["reason"] for row in report["skipped"]}
    assert reasons["model.embed_tokens.weight"] == "matches no --include"
    assert reasons["model.norm.weight"] == "1-D, not a matrix"
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == "matches --exclude '*.1.*'"


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
        monkeypatch.setitem(nmsolve.masking.SLABS, "torch", elements)
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
    runs = nmsolve.dispatch.backend_reasons("cpu")["cpu"] is None
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


def test_an_output_that_appears_meanwhile_is_not_replaced(file, out, capsys, monkeypatch):
    finish = nmsolve.masking.MaskedTensor.finish
    monkeypatch.setattr(
        nmsolve.masking.MaskedTensor, "finish", lambda *args: (out.write_text("mine"), finish(*args))
    )
    assert mask(file, out) == 1
    assert "appeared while the work went on" in one_error(capsys)
    assert names(out.parent) == [out.name]
    assert out.read_text() == "mine"


@pytest.mark.parametrize("pattern", ["0:4", "4:4"])
def test_nothing_or_everything_kept(tmp_path, out, pattern):
    save_file({"fc.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, "--transposable", pattern=pattern) == 0
    kept = load_masks(out.with_name("sparse.masks.safetensors"))["fc.weight"]
    assert int(kept.sum()) == (64 if pattern == "4:4" else 0)


# ---- what is refused, before any work -------------------------------------------------------------------


FILE, FOLDER, NEW = "in/model.safetensors", "sharded", "new.safetensors"
OVER = ["--overwrite"]

# input, output, more options, what the error line says
REFUSED = {
    "pattern words": (FILE, NEW, ["--pattern", "half"], "--pattern: .*expected 'N:M'.*'half'"),
    "pattern order": (FILE, NEW, ["--pattern", "16:8"], "--pattern: .*0 <= n <= m=8.*got 16"),
    "unknown option": (FILE, NEW, ["--fast"], "unrecognized arguments: --fast"),
    "shortened option": (FILE, NEW, ["--trans"], "unrecognized arguments: --trans"),
    "method": (FILE, NEW, ["--method", "exact"], "--method: 'exact' needs --transposable"),
    "unknown method": (FILE, NEW, ["--method", "best"], "--method: invalid choice: 'best'"),
    "unknown backend": (FILE, NEW, ["--backend", "gpu"], "--backend: invalid choice: 'gpu'"),
    "include": (FILE, NEW, ["--include", "fc*"], r"--include: 'fc\*' matches none of the 20 tensors"),
    "exclude": (FILE, NEW, ["--exclude", "fc*"], r"--exclude: 'fc\*' matches none"),
    "all excluded": (FILE, NEW, ["--exclude", "*"], "nothing to mask"),
    "device": (FILE, NEW, ["--device", "gpu"], "--device: expected cpu, cuda or cuda:N, got 'gpu'"),
    "no such gpu": (FILE, NEW, ["--device", "cuda:99"], "--device: cuda:99 is not here"),
    "no input": ("absent", NEW, [], "absent: no such file"),
    "not safetensors": ("notes.txt", NEW, [], "notes.txt: expected a .safetensors file"),
    "pickle": ("model.bin", NEW, [], "model.bin: .*a pickle, which can run code"),
    "empty folder": ("empty", NEW, [], "found none in this folder"),
    "out is in": (FILE, FILE, OVER, "is the input itself"),
    "out is a link to in": (FILE, "link.safetensors", OVER, "is the input itself"),
    "masks are in": ("x.masks.safetensors", "x.safetensors", OVER, "would replace the input"),
    "folder is in": (FOLDER, FOLDER + "/", OVER, "is the input itself"),
    "out inside in": (FOLDER, FOLDER + "/new", [], "expected a path outside"),
    "in inside out": (FOLDER, "", OVER, "expected a path outside"),
    "no parent": (FILE, "no/x.safetensors", [], "no does not exist"),
    "suffix": (FILE, "x", [], "ends in .safetensors"),
    "file exists": (FILE, "taken.safetensors", [], "taken.report.json exists; --overwrite"),
    "out is a folder": (FILE, "folder.safetensors", OVER, "it is not a file"),
    "folder exists": (FOLDER, "empty", [], "exists; --overwrite"),
    "folder of others": (FOLDER, "empty", OVER, "nmsolve did not write it"),
}


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as exited:
        return int(exited.code or 0)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, file, capsys):
    for name in ("notes.txt", "model.bin", "taken.report.json"):
        (tmp_path / name).write_text("not weights")
    for name in ("empty", "folder.safetensors"):
        (tmp_path / name).mkdir()
    save_sharded(tmp_path / "sharded", llama())
    (tmp_path / "link.safetensors").symlink_to(file)
    shutil.copy(file, tmp_path / "x.masks.safetensors")
    before = sorted(tmp_path.rglob("*"))
    source, target, options, message = REFUSED[case]
    arguments = ["mask", f"{tmp_path}/{source}", "--pattern", "8:16", "--out", f"{tmp_path}/{target}"]
    assert exit_code(arguments + options) == 2
    assert re.search(message, one_error(capsys))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"required: COMMAND \(see nmsolve --help\)"),
        (["msak"], "invalid choice: 'msak'"),
        (["mask", "x.safetensors", "--out", "y"], r"required: --pattern \(see nmsolve mask --help\)"),
        (["mask", "x.safetensors", "--pattern", "8:16"], "--out: expected a path"),
        (["info", "--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_what_is_not_a_command(arguments, message, capsys):
    assert exit_code(arguments) == 2
    assert re.search(message, one_error(capsys))


def test_a_backend_that_cannot_run_is_refused(file, out, capsys, monkeypatch):
    def backend_name(backend, device, m):
        raise BackendError(f"backend: {backend!r} cannot run on {device}: there is no GPU")

    monkeypatch.setattr("nmsolve.dispatch.backend_name", backend_name)
    assert mask(file, out, backend="triton") == 2
    assert "backend: 'triton' cannot run on cpu: there is no GPU" in one_error(capsys)
    assert names(out.parent) == []


def test_too_little_disk_space_is_refused(file, out, capsys, monkeypatch):
    usage = shutil.disk_usage(out.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert mask(file, out) == 2
    assert re.search(r"--out: [\d,]+ bytes are needed in .*, 1,000 are free", one_error(capsys))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused(file, out, capsys):
    out.parent.chmod(0o500)
    assert mask(file, out) == 2
    assert "no permission to write" in one_error(capsys)


def test_overwriting(file, out, tmp_path):
    assert mask(file, out) == 0
    assert mask(file, out, pattern="4:8") == 2
    assert mask(file, out, "--overwrite", pattern="4:8") == 0
    assert json.loads(out.with_name("sparse.report.json").read_text())["settings"]["pattern"] == "4:8"
    assert len(names(out.parent)) == 3

    save_sharded(tmp_path / "sharded", llama())
    assert mask(tmp_path / "sharded", tmp_path / "new") == 0
    (tmp_path / "new" / "notes.txt").touch()
    assert mask(tmp_path / "sharded", tmp_path / "new", "--overwrite", pattern="4:8") == 0
    assert not (tmp_path / "new" / "notes.txt").exists()
    assert json.loads((tmp_path / "new/nmsolve_report.json").read_text())["settings"]["pattern"] == "4:8"


# ---- failing and being stopped halfway ------------------------------------------------------------------


def test_weights_that_are_not_finite(tmp_path, out, capsys):
    state = llama(torch.float32)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, "--transposable") == 1
    assert re.search(r"model\.layers\.1\.mlp\.up_proj\.weight, weights 0 to 2559: .*1 NaN", one_error(capsys))
    assert names(out.parent) == []


def test_a_solver_that_breaks_halfway(tmp_path, capsys, monkeypatch):
    save_sharded(tmp_path / "in", llama())
    solve, calls = nmsolve.masking.transposable_mask, []

    def broken(*args, **options):
        calls.append(names(tmp_path))
        if len(calls) == 10:
            raise RuntimeError("a device\nfell over")
        return solve(*args, **options)

    monkeypatch.setattr("nmsolve.masking.transposable_mask", broken)
    assert mask(tmp_path / "in", tmp_path / "out", "--transposable") == 1
    assert one_error(capsys) == "nmsolve: error: RuntimeError: a device fell over\n"
    assert len(calls[-1]) == 2
    assert names(tmp_path) == ["in"]
    calls.clear()
    assert mask(tmp_path / "in", tmp_path / "out", "--transposable", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_disk_that_is_full_halfway(file, out, capsys, monkeypatch):
    write, written = StreamWriter.write, []

    def full(self, data):
        written.append(len(data))
        if sum(written) > 15_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        write(self, data)

    monkeypatch.setattr(StreamWriter, "write", full)
    assert mask(file, out, "--transposable") == 1
    assert "No space left on device" in one_error(capsys)
    assert names(out.parent) == []


def test_a_limit_on_the_size_of_files(file, out):
    """The operating system refuses a write in the middle of the weights."""
    code = f"""
import resource, sys
from nmsolve.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(["mask", {str(file)!r}, "--pattern", "8:16", "--backend", "torch", "--out", {str(out)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"nmsolve: error: File too large.*\n", done.stderr)
    assert names(out.parent) == []


# Runs the command line, but says "working" and waits once some masks are solved.
STALLED = """
import sys, time
import nmsolve.masking
from nmsolve.cli import main

solve, calls = nmsolve.masking.transposable_mask, []

def stall(*args, **options):
    calls.append(None)
    if len(calls) == 9:
        print("working", flush=True)
        time.sleep(60)
    return solve(*args, **options)

nmsolve.masking.transposable_mask = stall
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        ("file", signal.SIGINT),
        ("file", signal.SIGKILL),
        ("folder", signal.SIGTERM),
        ("folder", signal.SIGHUP),
        ("folder", signal.SIGKILL),
    ],
)
def test_being_stopped_leaves_nothing_half_written(tmp_path, file, kind, number):
    source, out = file, tmp_path / "out" / "sparse.safetensors"
    out.parent.mkdir()
    if kind == "folder":
        source, out = tmp_path / "sharded", out.with_name("sparse")
        save_sharded(source, llama())
    arguments = [
        "mask",
        str(source),
        "--pattern",
        "8:16",
        "--transposable",
        "--backend",
        "torch",
        "--out",
        str(out),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", STALLED, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        (staging,) = out.parent.iterdir()
        assert staging.name.startswith(f".{out.name}.nmsolve-")
        assert any(path.stat().st_size > 1000 for path in staging.rglob("*.safetensors"))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    if number == signal.SIGKILL:
        assert names(out.parent) == [staging.name]
    else:
        assert process.returncode == 130
        assert (stdout, stderr) == ("", "nmsolve: error: interrupted; nothing was written\n")
        assert names(out.parent) == []
    assert main([*arguments, "--quiet"]) == 0
    assert not staging.exists()
    assert len(names(out.parent)) == (1 if kind == "folder" else 3)


# ---- memory ----------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Six tensors of 64 MB: the peak stays within three times one of them, whatever the backend."""
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
    assert 0 < grown[0] < 3 * size, grown
    assert grown[1] < 3 * size, grown


# ---- help, version, info, progress -----------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["mask", "--help"], ["info", "--help"]])
def test_help_teaches(arguments, capsys):
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0
    said = capsys.readouterr().out
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"^  {code} +[a-z]", said, re.M)
    if arguments[0] != "--help":
        assert f"nmsolve {arguments[0]} " in said.partition("examples:")[2]
    assert max(map(len, said.splitlines())) <= 110


def test_the_examples_of_the_help_parse(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_sharded(tmp_path / "Llama-3.2-1B", llama())
    save_file(llama(), tmp_path / "model.safetensors")
    with pytest.raises(SystemExit):
        main(["mask", "--help"])
    examples = re.findall(r"^  nmsolve (mask .*)$", capsys.readouterr().out, re.M)
    assert len(examples) == 3
    for example in examples:
        assert main([argument.strip("'") for argument in example.split()] + ["--backend", "torch"]) == 0


def test_version(capsys):
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"nmsolve {nmsolve.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["mask", "--help"], ["mask", "absent", "--pattern", "8:16", "--out", "x"]]
)
def test_quick_answers_do_not_wait_for_torch(arguments):
    code = """
import sys
from nmsolve.cli import main
try:
    main(sys.argv[1:])
finally:
    slow = {"torch", "triton", "numba", "numpy"} & sys.modules.keys()
    print("imported:", *slow)
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("imported:\n")


def test_importing_nmsolve_does_not_import_the_command_line():
    code = "import sys, nmsolve; nmsolve.transposable_mask; print('nmsolve.cli' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_info(capsys):
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert f"nmsolve {nmsolve.__version__}" in said
    assert torch.__version__ in said
    for name, reason in nmsolve.dispatch.backend_reasons("cpu").items():
        assert re.search(
            rf"^  {name} +{re.escape('cannot run: ' + reason) if reason else 'can run'}", said, re.M
        )
    assert said.count("auto takes it") == 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nmsolve"] == nmsolve.__version__
    assert found["versions"].keys() == {"python", "torch", "triton", "numba", "numpy", "safetensors"}
    cpu = found["devices"][0]
    assert cpu["name"] == "cpu"
    assert cpu["backends"] == nmsolve.dispatch.backend_reasons("cpu")
    assert cpu["auto"] == ("cpu" if cpu["backends"]["cpu"] is None else "torch")


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
        assert b"model.layers.1.mlp.down_proj.weight" in shown
        assert b"100%" in shown
