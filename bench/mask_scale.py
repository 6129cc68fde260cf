"""How long does `nmsolve mask` take on a checkpoint of gigabytes? Beside an earlier commit, and on two ranks.

    python bench mask_scale [--before 146fab8] [--rounds 3] [--more]

Makes a checkpoint of 2.7 GB, random bfloat16 weights in the shapes of Llama 3 8B's layers in six files, and
masks it 8:16 transposable with a certificate: an earlier commit and this checkout, each in one process on two
threads, and this checkout on two ranks of torchrun with a thread each. Each round takes them in turn, every
second one in reverse. Writes bench/results/mask_scale.csv, a row for each run: the time from the start of the
process to its end, processor seconds and peak memory of all its processes. ``--more`` adds rounds to those
that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, ROOT, append_csv, read_csv
from safetensors.torch import save_file

FILE = "mask_scale.csv"
BEFORE, NOW, RANKS = "earlier commit", "one process", "two ranks"
PATTERN = "8:16"
LAYERS, HIDDEN, INNER, KEYS, WORDS = 6, 4096, 14336, 1024, 14000

COMMAND = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from nmsolve.cli import main
sys.exit(main())
"""


class Run(NamedTuple):
    """What a run took: seconds, processor seconds and the memory of all processes at their peaks."""

    seconds: float
    processor_seconds: float
    peak_mb: float


def make_checkpoint(folder: Path) -> float:
    """Weights in the shapes of Llama 3 8B's layers, a layer to a file; the gigabytes."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEYS, HIDDEN),
        "self_attn.v_proj": (KEYS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    }
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    nbytes = 0
    for layer in range(LAYERS):
        wanted = {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
        if layer == 0:
            wanted["model.embed_tokens.weight"] = (WORDS, HIDDEN)
        tensors = {
            name: torch.randn(shape, generator=generator).mul_(0.02).bfloat16()
            for name, shape in wanted.items()
        }
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        file = f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        nbytes += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    return nbytes / 1e9


@contextmanager
def checkout(commit: str, folder: Path) -> Iterator[Path]:
    """A work tree of a commit."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), commit], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def command(contender: str, root: Path, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """What is started, and in which environment."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    if contender == RANKS:
        start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "nmsolve"]
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    else:
        start = ["-c", COMMAND, str(root)]
        environment["OMP_NUM_THREADS"] = "2"
    return [sys.executable, *start, *arguments], environment


def run(contender: str, root: Path, checkpoint: Path, out: Path) -> Run:
    """Masks the checkpoint; OUT is removed."""
    arguments = [
        "mask",
        str(checkpoint),
        "--pattern",
        PATTERN,
        "--transposable",
        "--out",
        str(out),
        "--quiet",
    ]
    started, environment = command(contender, root, arguments)
    os.sync()
    begin = time.perf_counter()
    child = subprocess.Popen(started, env=environment, cwd=root, stdout=subprocess.DEVNULL)
    with watched(child.pid) as peaks:
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, started)
    shutil.rmtree(out)
    return Run(seconds, usage.ru_utime + usage.ru_stime, sum(peaks.values()) / 1e6)


@contextmanager
def watched(pid: int) -> Iterator[dict[int, int]]:
    """Most resident bytes of a process and of all that descend from it, by their numbers."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            for one in family(pid):
                peaks[one] = max(peaks.get(one, 0), high_water(one))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended since
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def high_water(pid: int) -> int:
    """Most resident bytes that a process has had; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", default="146fab8", help="the earlier commit (146fab8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--more", action="store_true", help="add to the rounds that are there")
    arguments = parser.parse_args()
    file = RESULTS / FILE
    if not arguments.more:
        file.unlink(missing_ok=True)
    first = 1 + max((int(row["round"]) for row in read_csv(file)), default=0) if file.exists() else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        size = make_checkpoint(folder / "big")
        with checkout(arguments.before, folder / "before") as before:
            roots = {BEFORE: before, NOW: ROOT, RANKS: ROOT}
            for round_ in range(first, first + arguments.rounds):
                for contender in list(roots)[:: 1 if round_ % 2 else -1]:
                    took = run(contender, roots[contender], folder / "big", folder / "out")
                    of = arguments.before if contender == BEFORE else ""
                    row = {
                        "round": round_,
                        "contender": contender,
                        "before": of,
                        "gb": size,
                        **took._asdict(),
                    }
                    append_csv(file, row)
                    print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
