"""``nmsolve mask``: what is refused before any work, and what is left when it fails or is stopped."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import llama, save_sharded
from mask_command import exit_code, mask, names, one_error
from safetensors.torch import save_file

import nmsolve
import nmsolve.checkpoint.slabs
from nmsolve import BackendError
from nmsolve.checkpoint.report import MaskedTensor
from nmsolve.checkpoint.streams import PlacedWriter
from nmsolve.cli import main

pytest_plugins = ("mask_command",)


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
    "out is a folder": (FILE, "folder.safetensors", OVER, "it is a folder"),
    "folder exists": (FOLDER, "empty", [], "exists; --overwrite"),
    "folder of others": (FOLDER, "empty", OVER, "nmsolve did not write it"),
}


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


def test_a_backend_that_cannot_run_is_refused(file, out, capsys, monkeypatch):
    def select(backend, device, m):
        raise BackendError(f"backend: {backend!r} cannot run on {device}: there is no GPU")

    monkeypatch.setattr("nmsolve.checkpoint.job.select", select)
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


def test_an_output_that_appears_meanwhile_is_not_replaced(file, out, capsys, monkeypatch):
    finish = MaskedTensor.finish
    monkeypatch.setattr(
        MaskedTensor,
        "finish",
        lambda *args: (out.write_text("mine"), finish(*args)),
    )
    assert mask(file, out) == 1
    assert re.search("appeared while the work went on.*; what is finished is in", one_error(capsys))
    (unfinished,) = out.parent.glob(".*.unfinished-*")
    assert names(out.parent) == [unfinished.name, out.name]
    assert out.read_text() == "mine"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [["--transposable"], []])
def test_weights_that_are_not_finite(value, kind, tmp_path, out, capsys):
    state = llama(torch.float32)
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(state, tmp_path / "m.safetensors")
    assert mask(tmp_path / "m.safetensors", out, *kind) == 1
    assert re.search(r"model\.layers\.1\.mlp\.up_proj\.weight, weights 0 to 2559: .*1 NaN", one_error(capsys))
    assert names(out.parent) == []


def test_a_solver_that_breaks_halfway(tmp_path, capsys, monkeypatch):
    save_sharded(tmp_path / "in", llama())
    solve, calls = nmsolve.checkpoint.slabs.transposable_mask, []

    def broken(*args, **options):
        calls.append(names(tmp_path))
        if len(calls) >= 10:
            raise RuntimeError("a device\nfell over")
        return solve(*args, **options)

    monkeypatch.setattr("nmsolve.checkpoint.slabs.transposable_mask", broken)
    assert mask(tmp_path / "in", tmp_path / "out", "--transposable") == 1
    (unfinished,) = tmp_path.glob(".out.unfinished-*")
    kept = f"what is finished is in {unfinished}: the same command goes on, or delete that folder"
    assert one_error(capsys) == f"nmsolve: error: RuntimeError: a device fell over; {kept}\n"
    assert len(calls[-1]) == 2
    assert names(tmp_path) == [unfinished.name, "in"]
    shutil.rmtree(unfinished)
    calls.clear()
    assert mask(tmp_path / "in", tmp_path / "out", "--transposable", "--traceback") == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_disk_that_is_full_halfway(file, out, capsys, monkeypatch):
    write, written = PlacedWriter.write, []

    def full(self, position, data):
        written.append(len(data))
        if sum(written) > 15_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, position, data)

    monkeypatch.setattr(PlacedWriter, "write", full)
    assert mask(file, out, "--transposable") == 1
    assert re.search(r"error: model\.\S+: No space left on device: \S+\.safetensors", one_error(capsys))
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
    assert re.fullmatch(r"nmsolve: error: model\S+: File too large: .*\n", done.stderr)
    assert names(out.parent) == []


# Runs the command line, but says "working" and waits once some masks are solved. Signals are obeyed, whatever
# the suite itself does with them: in a background job and under nohup it ignores some.
STALLED = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler)
from nmsolve.checkpoint.report import MaskedTensor
from nmsolve.cli import main

add, calls = MaskedTensor.add, []

def stall(*args):
    calls.append(None)
    if len(calls) == 9:
        print("working", flush=True)
        for _ in range(600):  # a signal just before one of these sleeps is heard after it
            time.sleep(0.1)
    add(*args)

MaskedTensor.add = stall
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
        assert staging.name.startswith(f".{out.name}.unfinished-")
        assert any(path.stat().st_size > 1000 for path in staging.rglob("*.safetensors"))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=300)
    assert names(out.parent) == ([staging.name] if kind == "folder" or number == signal.SIGKILL else [])
    if number != signal.SIGKILL:
        kept = f"what is finished is in {staging}: the same command goes on, or delete that folder"
        told = kept if kind == "folder" else "nothing was written"
        assert process.returncode == 130
        assert (stdout, stderr) == ("", f"nmsolve: error: interrupted; {told}\n")
    assert main([*arguments, "--quiet"]) == 0
    assert not staging.exists()
    assert len(names(out.parent)) == (1 if kind == "folder" else 3)
