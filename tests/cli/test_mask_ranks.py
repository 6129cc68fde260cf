"""``nmsolve mask`` by several ranks of torchrun: the bytes of one process, and one outcome for all.

Ranks are forked from a process that runs support/mask_spread.py, which has the cases; with torchrun itself,
which takes long to start, where a test is slow.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import llama, save_sharded
from mask_command import contents
from mask_spread import SETTINGS

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.mark.parametrize("what", [["cases", 0, 1], pytest.param([*range(2, 22)], marks=pytest.mark.slow)])
def test_ranks(tmp_path, what):
    """Cases, and seeds of runs of which one rank is killed at a random moment."""
    command = [sys.executable, str(SUPPORT / "mask_spread.py"), str(tmp_path), *map(str, what)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= len(what)
    failed = {name: problem for name, problem in found.items() if problem is not None}
    assert not failed, "\n".join(f"{name}\n{problem}" for name, problem in failed.items())


# ---- torchrun itself ------------------------------------------------------------------------------------


def torchrun(count: int, arguments: list[str], code: str = "") -> subprocess.Popen:
    """``code`` runs in each rank before the command."""
    file = Path(arguments[-1]).parent / "ranks.py"
    file.write_text(
        f"import sys\nimport nmsolve.checkpoint.units\nnmsolve.checkpoint.units.UNIT_BYTES = 6000\n{code}\n"
        "from nmsolve.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), str(file)]
    return subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SLOW = """
import time
import nmsolve.checkpoint.slabs
solve = nmsolve.checkpoint.slabs.transposable_mask
def solve_slowly(*args, **options):
    time.sleep(0.3)
    return solve(*args, **options)
nmsolve.checkpoint.slabs.transposable_mask = solve_slowly
"""


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun(tmp_path):
    save_sharded(tmp_path / "in", llama())
    made = []
    for count in (1, 2, 4):
        out = tmp_path / f"by{count}"
        process = torchrun(count, ["mask", str(tmp_path / "in"), *SETTINGS, "--out", str(out)])
        told, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert told.count("14 tensors") == 1
        made.append(contents(out))
    assert made[0] == made[1] == made[2]
    process = torchrun(2, ["mask", str(tmp_path / "in"), *SETTINGS, "--out", str(out)])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert errors.count("nmsolve: error: --out: ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["by1", "by2", "by4", "in", "ranks.py"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["a rank", "torchrun", "torchrun by Ctrl-C", "torchrun by SIGKILL"])
def test_torchrun_ends(tmp_path, whom):
    """In the middle of the work; a run with another number of ranks goes on."""
    save_sharded(tmp_path / "in", llama())
    out = tmp_path / "out"
    arguments = ["mask", str(tmp_path / "in"), *SETTINGS, "--out", str(out)]
    process = torchrun(3, arguments, SLOW)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.unfinished-*/finished/[!.]*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    ranks = children(process.pid)
    assert len(ranks) == 3
    if whom == "a rank":
        os.kill(random.choice(ranks), signal.SIGKILL)
    else:
        numbers = {"torchrun": signal.SIGTERM, "torchrun by Ctrl-C": signal.SIGINT}
        process.send_signal(numbers.get(whom, signal.SIGKILL))
    began = time.monotonic()
    told, errors = process.communicate(timeout=300)  # until all ranks have closed their ends of the pipe, too
    assert time.monotonic() - began < 60  # far below the silence after which a rank is given up
    assert process.returncode != 0
    assert told == ""
    if whom != "torchrun by SIGKILL":
        assert errors.count("nmsolve: error: interrupted; what is finished is in") == 1, errors
    assert not out.exists()
    assert list(tmp_path.glob(".out.unfinished-*/finished/[!.]*"))
    assert torchrun(2, arguments).wait(timeout=300) == 0
    whole = ["mask", str(tmp_path / "in"), *SETTINGS, "--out", str(tmp_path / "whole")]
    assert torchrun(1, whole).wait(timeout=300) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
