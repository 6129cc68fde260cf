"""What transformers 4.57 saved, masked and pruned here, is loaded by both versions alike."""

from __future__ import annotations

import old_transformers
import pytest
import species
import torch
from old_transformers import TOKENS, VALUE
from safetensors.torch import load_file

from nmsolve.checkpoint import mask_checkpoint
from nmsolve.prune import prune_checkpoint

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    if transformers.__version__.startswith("4."):
        pytest.skip(f"transformers {transformers.__version__} is itself of the older kind")
    packages = tmp_path_factory.mktemp("packages")
    problem = old_transformers.install(packages)
    if problem:
        pytest.skip(f"transformers 4.57 cannot be installed: {problem.splitlines()[-1]}")
    worker = old_transformers.Worker(packages)
    assert worker.version.startswith("4.57")
    yield worker
    worker.close()


@pytest.mark.parametrize("name", species.ZOO)
def test_both_versions_read_the_outputs(name, worker, tmp_path):
    source = tmp_path / "in"
    made = worker.ask({"do": "make", "name": name, "folder": str(source)})
    if "error" in made:
        pytest.skip(f"transformers {worker.version} does not build it: {made['error'][:200]}")
    try:
        old_transformers.load(str(source))
    except (AssertionError, ValueError, TypeError) as error:
        pytest.skip(f"transformers {transformers.__version__} does not load it: {str(error)[:200]}")
    options = {"backend": "torch", "device": "cpu", "progress": False}
    mask_checkpoint(source, tmp_path / "masked", "4:8", **options)
    prune_checkpoint(source, tmp_path / "pruned", "4:8", method="magnitude", picture=False, **options)

    def seen(folder: str) -> dict[str, torch.Tensor]:
        """Weights as the older version holds them, and what both versions compute with them."""
        there, here = tmp_path / f"{folder}.there", tmp_path / f"{folder}.here"
        asked = {"name": name, "folder": str(tmp_path / folder)}
        answer = worker.ask({"do": "run", **asked, "out": str(there)})
        assert answer == old_transformers.run(**asked, out=str(here)) == {"tokens": TOKENS}
        held = load_file(there)
        held["here"] = load_file(here)[VALUE]
        return held

    dense = seen("in")
    agree = alike(dense["here"], dense[VALUE])
    for folder in ("masked", "pruned"):
        for path in source.rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                assert (tmp_path / folder / path.relative_to(source)).read_bytes() == path.read_bytes(), path
        sparse = seen(folder)
        assert sparse.keys() == dense.keys()
        changed = 0
        for weight in dense.keys() - {VALUE, "here"}:
            same = (sparse[weight] == dense[weight]) | (sparse[weight] == 0)
            assert same.all(), weight
            changed += not torch.equal(sparse[weight], dense[weight])
        assert changed
        assert not alike(sparse[VALUE], dense[VALUE])
        assert alike(sparse["here"], sparse[VALUE]) or not agree


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
