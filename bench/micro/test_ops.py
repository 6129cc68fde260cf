"""Microbenchmarks of every public operation on every backend that can run here.

    pytest bench/micro --benchmark-json=micro.json

The Triton backend is timed where there is a GPU and left out where there is none (its interpreter is no
GPU). A round on a GPU ends with a synchronisation. The results are checked before they are timed. These
files lie outside ``testpaths``: the test suite does not collect them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nmsolve
from nmsolve.backends.dispatch import BACKENDS, MASK_METHODS, backend_reasons
from nmsolve.checkpoint.mask_files import pack_mask, unpack_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDE = 1024 if DEVICE == "cpu" else 4096
PATTERNS = ((2, 4), (4, 8), (8, 16), (16, 32))
CASES = [(backend, n, m) for backend in BACKENDS for n, m in PATTERNS]


def normal(*shape: int, device: str = DEVICE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def home(backend: str) -> str:
    """The device a backend is timed on; skips the test where it cannot run."""
    device = "cpu" if backend == "cpu" else DEVICE
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("triton: needs a GPU")
    reason = backend_reasons(device)[backend]
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    return device


@pytest.fixture
def timed(benchmark) -> Callable[..., object]:
    """Runs a function once (compiling what is compiled on first use), then times it."""

    def run(function: Callable[[], object], weights: int) -> object:
        def waited() -> object:
            result = function()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            return result

        result = waited()
        benchmark.extra_info.update(device=DEVICE, weights=weights, threads=torch.get_num_threads())
        benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
        return result

    return run


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "n", "m"), CASES)
@pytest.mark.parametrize("method", MASK_METHODS)
def test_transposable_mask(timed, method, backend, n, m):
    side = SIDE if backend != "torch" and method != "tsenor" else SIDE // 4
    scores = normal(side, side, device=home(backend)).abs()
    mask = timed(lambda: nmsolve.transposable_mask(scores, n, m, method=method, backend=backend), side**2)
    nmsolve.check_mask(mask, n, m)


@pytest.mark.parametrize(("backend", "n", "m"), CASES)
def test_transposable_mask_with_certificate(timed, backend, n, m):
    side = SIDE if backend != "torch" else SIDE // 4
    scores = normal(side, side, device=home(backend)).abs()
    solution = timed(
        lambda: nmsolve.transposable_mask(scores, n, m, backend=backend, return_solution=True), side**2
    )
    assert solution.max_gap < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_warm_start(timed, backend):
    side = SIDE if backend != "torch" else SIDE // 4
    scores = normal(side, side, device=home(backend)).abs()
    before = nmsolve.transposable_mask(scores, 8, 16, backend=backend, return_solution=True)
    later = scores + 1e-3 * scores.flip(0)
    mask = timed(lambda: nmsolve.transposable_mask(later, 8, 16, backend=backend, warm_start=before), side**2)
    nmsolve.check_mask(mask, 8, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposable_masks(timed, backend):
    scores = [normal(64 + 16 * k, 256, device=home(backend)).abs() for k in range(16)]
    masks = timed(
        lambda: nmsolve.transposable_masks(scores, 8, 16, backend=backend), sum(map(torch.numel, scores))
    )
    for mask in masks:
        nmsolve.check_mask(mask, 8, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_solve_blocks(timed, backend):
    blocks = normal(256, 16, 16, device=home(backend)).abs()
    assert timed(lambda: nmsolve.solve_blocks(blocks, 8, backend=backend), blocks.numel()).max_gap < 1e-6


@pytest.mark.parametrize(("backend", "n", "m"), CASES)
@pytest.mark.parametrize("dim", [-1, 0])
def test_nm_mask(timed, backend, n, m, dim):
    scores = normal(SIDE, SIDE, device=home(backend)).abs()
    mask = timed(lambda: nmsolve.nm_mask(scores, n, m, dim, backend=backend), SIDE**2)
    nmsolve.check_mask(mask, n, m, transposable=False, dim=dim)


def test_check_mask(timed):
    mask = nmsolve.transposable_mask(normal(SIDE, SIDE).abs(), 8, 16)
    timed(lambda: nmsolve.check_mask(mask, 8, 16), SIDE**2)


def test_certificate(timed):
    """What whoever trusts no solver evaluates: the bound of the duals and the kept score."""
    scores, pattern = normal(SIDE, SIDE).abs(), nmsolve.NMPattern(8, 16)
    solution = nmsolve.transposable_mask(scores, 8, 16, return_solution=True)

    def certify() -> tuple[Tensor, Tensor]:
        bound = nmsolve.dual_bound(scores, solution.row_duals, solution.col_duals, pattern)
        return bound, nmsolve.kept_score(scores, solution.mask, pattern)[0]

    bound, objective = timed(certify, SIDE**2)
    assert ((bound - objective) <= 1e-6 * objective).all()


# --- packed masks -------------------------------------------------------------------------------------------


def test_pack_mask(timed):
    mask = normal(SIDE, SIDE, device="cpu") > 0
    packed = timed(lambda: pack_mask(mask), SIDE**2)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_unpack_mask(timed):
    mask = normal(SIDE, SIDE, device="cpu") > 0
    packed = pack_mask(mask)
    assert torch.equal(timed(lambda: unpack_mask(packed, mask.shape), SIDE**2), mask)


def test_save_and_load_masks(timed, tmp_path):
    mask, file = normal(SIDE, SIDE, device="cpu") > 0, tmp_path / "a.masks.safetensors"

    def round_trip() -> dict[str, Tensor]:
        nmsolve.save_masks(file, {"weight": mask}, "8:16")
        return nmsolve.load_masks(file)

    assert torch.equal(timed(round_trip, SIDE**2)["weight"], mask)


# --- permutations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "m"), [(256, 16), (16, 64)])
def test_sinkhorn_forward(timed, backend, batch, m):
    logits = normal(batch, m, m, device=home(backend))
    plan = timed(lambda: nmsolve.sinkhorn(logits, 0.1, 20, backend=backend), logits.numel())
    assert (plan.sum(1) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "m"), [(256, 16), (16, 64)])
def test_sinkhorn_backward(timed, backend, batch, m):
    logits = normal(batch, m, m, device=home(backend)).requires_grad_(True)
    loss = (
        nmsolve.sinkhorn(logits, 0.1, 20, backend=backend) * normal(batch, m, m, device=home(backend))
    ).sum()
    (gradient,) = timed(lambda: torch.autograd.grad(loss, logits, retain_graph=True), logits.numel())
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "m"), [(256, 16), (16, 64)])
def test_assignment(timed, backend, batch, m):
    scores = normal(batch, m, m, device=home(backend))
    columns = timed(lambda: nmsolve.assignment(scores, backend=backend), scores.numel())
    assert (columns.sort(1).values == torch.arange(m, device=columns.device)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_permute_columns(timed, backend):
    x, order = normal(SIDE, SIDE, device=home(backend)), torch.randperm(SIDE).to(home(backend))
    moved = timed(lambda: nmsolve.permute_columns(x, order, backend=backend), SIDE**2)
    assert torch.equal(moved, x[:, order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm_permute(timed, backend):
    x, order = normal(SIDE, SIDE, device=home(backend)), torch.randperm(SIDE).to(home(backend))
    weight = torch.ones(SIDE, device=x.device)
    moved = timed(lambda: nmsolve.rms_norm_permute(x, weight, order, backend=backend), SIDE**2)
    torch.testing.assert_close(moved, torch.nn.functional.rms_norm(x, (SIDE,), weight, 1e-6)[:, order])
