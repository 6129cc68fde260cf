"""Kernels and variants from their PTX: the smallest size for sm_90; ``-m slow`` runs all."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest

pytest.importorskip("triton")

FILE = "tests/emulator/emulated_variants.py"
TUTORIALS = "tests/emulator/emulated_tutorials.py"
TARGETS = (80, 90, 100)
GROUPS = {
    "exact": [
        "exhaustive-4", "exact-8", "exact, solution-4", "exact, warm-4", "exact, edge-4",
        "exact, edge, solution-4", "assignment-8", "hierarchical-8",
    ],
    "many matrices": [
        "exhaustive, many matrices-4", "exact, many matrices-8", "exact, many matrices, solution-4",
    ],
    "approximate": ["greedy-4", "greedy, edge-4", "tsenor-4", "nm-4", "nm, whole groups-4"],
    "permutations": [
        "sinkhorn, forward-4", "sinkhorn, tolerance-4", "sinkhorn, training-4", "sinkhorn, backward-4",
        "permute_columns-64", "rms_norm_permute-64", "sum_maxima-7", "add_parts-7", "nth_largest-4",
        "sum_largest-4",
    ],
}  # fmt: skip


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all children of the test session keep what they compile."""
    folder = tmp_path_factory.getbasetemp()
    if folder.name.startswith("popen-gw"):
        folder = folder.parent
    return folder / "compiled"


@pytest.mark.parametrize("group", GROUPS)
def test_one_case_of_every_variant(group: str, cache: Path) -> None:
    names = [f"{FILE}::test_variant[{name}-float32]" for name in GROUPS[group]]
    if group == "approximate":  # and kernels that are not ours, in the same child
        names += [
            f"{TUTORIALS}::{name}" for name in ("test_softmax[2-8]", "test_what_it_does_not_know_is_named")
        ]
    assert f"{len(names)} passed" in emulated.run(90, *names, cache=cache, timeout=600)


@pytest.mark.slow
def test_no_variant_is_left_out(cache: Path) -> None:
    found = emulated.run(90, "--collect-only", FILE, cache=cache, timeout=600)
    default = {line.partition("::")[2] for line in found.splitlines() if "::" in line}
    assert default == {f"test_variant[{name}-float32]" for names in GROUPS.values() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "test", ["test_variant", "test_warps_in_random_order", "test_approximate_instructions"]
)
def test_all_variants(test: str, target: int, cache: Path) -> None:
    """All sizes; exact in float16, bfloat16 and float64 at 32 and 64; random order; noise."""
    selected = ("-m", "slow or not slow", "-k", test)
    assert " passed" in emulated.run(target, *selected, FILE, cache=cache, timeout=7200)


@pytest.mark.slow
def test_mutations_are_noticed(cache: Path) -> None:
    assert " passed" in emulated.run(90, "tests/emulator/emulated_mutations.py", cache=cache, timeout=3600)


@pytest.mark.slow
def test_scores_that_are_not_finite(cache: Path) -> None:
    selected = ("-m", "slow", "-k", "public_functions_refuse")
    assert "6 passed" in emulated.run(90, *selected, FILE, cache=cache, timeout=3600)


@pytest.mark.slow
def test_integers_with_a_third_forbidden(cache: Path) -> None:
    """The masks of allowed entries alone: 2:4, 3:8, 8:16, 16:32 in four dtypes."""
    selected = ("-m", "slow or not slow", "-k", "a_third_forbidden and triton")
    name = "tests/ops/test_infinite.py"
    assert "16 passed" in emulated.run(90, *selected, name, cache=cache, timeout=3600)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_that_are_not_ours(target: int, cache: Path) -> None:
    assert "10 passed" in emulated.run(target, TUTORIALS, cache=cache, timeout=3600)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_once(target: int, cache: Path) -> None:
    """As the GPU suite has it."""
    name = "tests/kernels/test_gpu.py"
    found = emulated.run(target, "-m", "gpu", "-k", "every_kernel_once", name, cache=cache, timeout=7200)
    assert "4 passed" in found
