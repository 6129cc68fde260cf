"""Running ``nmsolve mask`` in tests, and recomputing from the files what a run claims.

Modules that want the fixtures name this one in ``pytest_plugins``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoints import METADATA, llama
from oracles import blocks_of, min_cost_flow
from safetensors.torch import save_file

from nmsolve import check_mask
from nmsolve.cli import main

__all__ = ["contents", "exit_code", "mask", "names", "one_error", "optimum", "verify"]


def mask(source: Path, out: Path, *options: str, pattern: str = "8:16", backend: str = "torch") -> int:
    return main(
        ["mask", str(source), "--pattern", pattern, "--backend", backend, "--out", str(out), *options]
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an output; the report without times and its own name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "nmsolve_report.json":
            report = json.loads(path.read_text())
            del report["output"]
            for row in [report["totals"], *report["tensors"]]:
                row.pop("seconds")
                row.pop("seconds_solving", None)
            found[path.name] = json.dumps(report).encode()
        elif path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small model in one file."""
    path = tmp_path / "in" / "model.safetensors"
    path.parent.mkdir()
    save_file(llama(), path, metadata=METADATA)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a masked file goes: in an empty folder."""
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
        assert row["zeros_before"] == int((dense == 0).sum())
        assert row["nonzero"] == int((sparse != 0).sum())
        assert row["score"] == pytest.approx(dense.double().abs().sum().item(), rel=1e-12)
        assert row["objective"] == pytest.approx(sparse.double().abs().sum().item(), rel=1e-12)
        assert row["retained"] == pytest.approx(row["objective"] / row["score"], rel=1e-12)
        assert row["gap"] == pytest.approx((row["bound"] - row["objective"]) / row["objective"], abs=1e-15)
        assert row["bound"] >= row["objective"] * (1 - 1e-12)
        assert row["seconds"] > 0
    totals = report["totals"]
    assert totals["tensors_masked"] == len(masks)
    assert totals["tensors_skipped"] == len(before) - len(masks)
    for key in ("weights", "kept", "zeros_before", "nonzero", "score", "objective", "bound"):
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


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as exited:
        return int(exited.code or 0)
