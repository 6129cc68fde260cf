"""The operators under PyTorch's compilers and transforms, and the grouped solve."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export

import nmsolve
from nmsolve import BlockSolution, NMPattern, NMSolveError
from nmsolve.backends.torch import masks as reference
from nmsolve.ops import mask_operators, validation
from nmsolve.solution import BlockResult

FIELDS = ("mask", "row_duals", "col_duals", "objective", "bound", "scale", "resolved")
OPTIONS = (2, 4, "exact", "torch", 300, 150.0, False)

INPUTS = {
    "plain": lambda: torch.randn(8, 12),
    "transposed": lambda: torch.randn(12, 8).T,
    "sliced": lambda: torch.randn(20, 30)[1::2, 3:24:3],
    "repeated": lambda: torch.rand(1, 8).expand(8, 8),
    "bfloat16": lambda: torch.randn(8, 8).bfloat16(),
    "float16_partial": lambda: torch.randn(5, 7).half(),
    "float64": lambda: torch.randn(9, 4).double(),
    "batches": lambda: torch.randn(2, 3, 7, 9),
    "batches_apart": lambda: torch.randn(3, 2, 8, 4).transpose(0, 1),
    "no_rows": lambda: torch.empty(0, 8),
    "no_batch": lambda: torch.empty(0, 8, 8),
    "no_columns_in_batches": lambda: torch.empty(2, 8, 0),
    "gradient": lambda: torch.randn(8, 8, requires_grad=True),
}


def mask_of(scores: Tensor, n: int = 2, m: int = 4) -> Tensor:
    return nmsolve.transposable_mask(scores, n, m, backend="torch")


def solution_of(scores: Tensor) -> BlockSolution:
    return nmsolve.transposable_mask(scores, 2, 4, backend="torch", return_solution=True)


def lines_of(scores: Tensor, dim: int = -1) -> Tensor:
    return nmsolve.nm_mask(scores, 2, 4, dim=dim, backend="torch")


def compiled(function: Callable, dynamic: bool | None = None, backend: str = "aot_eager") -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def assert_same(found: BlockSolution, expected: BlockSolution) -> None:
    for name in FIELDS:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


# --- operators ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INPUTS)
def test_opcheck(name: str) -> None:
    scores = INPUTS[name]()
    solution = solution_of(scores)
    torch.library.opcheck(mask_operators.transposable_mask, (scores, None, None, *OPTIONS))
    torch.library.opcheck(
        mask_operators.transposable_solution, (scores, solution.row_duals, solution.col_duals, *OPTIONS)
    )
    for dim in (-1, -2):
        torch.library.opcheck(mask_operators.nm_mask, (scores, 2, 4, dim, "torch", False))


@pytest.mark.parametrize(
    "operator", [mask_operators.transposable_masks, mask_operators.transposable_solutions]
)
def test_opcheck_of_groups(operator: Callable) -> None:
    names = ("transposed", "bfloat16", "float64", "batches_apart", "no_rows", "gradient")
    torch.library.opcheck(operator, ([INPUTS[name]() for name in names], *OPTIONS))


@pytest.mark.parametrize("name", INPUTS)
def test_fake_outputs_are_laid_out_like_real_ones(name: str) -> None:
    scores = INPUTS[name]()
    real = [mask_of(scores), *(getattr(solution_of(scores), field) for field in FIELDS)]
    real += [lines_of(scores), lines_of(scores, -2)]
    with FakeTensorMode() as mode:
        fake_scores = mode.from_tensor(scores)
        fake = [mask_of(fake_scores), *(getattr(solution_of(fake_scores), field) for field in FIELDS)]
        fake += [lines_of(fake_scores), lines_of(fake_scores, -2)]
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)
        assert not a.requires_grad
        assert not b.requires_grad


@pytest.mark.parametrize("method", ["greedy", "tsenor"])
def test_the_solution_of_an_approximate_mask(method: str) -> None:
    scores = torch.randn(2, 8, 8)
    torch.library.opcheck(
        mask_operators.transposable_solution, (scores, None, None, 2, 4, method, "torch", 5, 9.0, False)
    )


def test_meta_tensors_have_shapes_but_no_masks() -> None:
    scores = torch.empty(3, 10, 8, device="meta", dtype=torch.bfloat16)
    assert mask_operators.transposable_mask(scores, None, None, *OPTIONS).shape == scores.shape
    solution = mask_operators.transposable_solution(scores, None, None, *OPTIONS)
    assert [tuple(tensor.shape) for tensor in solution] == mask_operators.solution_shapes(scores.shape, 4)
    assert all(tensor.device.type == "meta" for tensor in solution)
    assert mask_operators.nm_mask(scores, 2, 4, -2, "torch", False).stride() == (80, 1, 10)
    with pytest.raises(NMSolveError, match="dense tensor with data"):
        mask_of(scores)


def test_modes() -> None:
    scores = torch.randn(10, 12)
    expected = solution_of(scores)
    with torch.no_grad():
        assert_same(solution_of(scores), expected)
    with torch.inference_mode():
        assert_same(solution_of(scores), expected)
        assert mask_of(scores.clone()).is_inference()
    wants_gradient = scores.clone().requires_grad_()
    for duals in ((None, None), (expected.row_duals.requires_grad_(), expected.col_duals)):
        outputs = mask_operators.transposable_solution(wants_gradient, *duals, *OPTIONS)
        assert not any(output.requires_grad for output in outputs)


def test_operators_need_no_backend_to_be_imported() -> None:
    script = (
        "import sys, torch, nmsolve, nmsolve.ops\n"
        "nmsolve.transposable_mask, torch.ops.nmsolve.nm_mask\n"
        "heavy = {'triton', 'numba', 'torch._dynamo', 'torch.distributed.tensor'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- torch.compile ------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer that masks its weight anew in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        mask = nmsolve.transposable_mask(weight.abs(), 2, 4, backend="torch")
        return nn.functional.linear(x, weight * mask * lines_of(weight, 0), self.linear.bias)


def check_layer(backend: str, dynamic: bool) -> None:
    layer = Layer()
    step = compiled(layer, dynamic, backend)
    for batch in (5, 9):
        x = torch.randn(batch, 24)
        gradients = []
        for forward in (step, layer):
            layer.zero_grad()
            output = forward(x)
            output.square().sum().backward()
            gradients.append((output, layer.linear.weight.grad))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layer_and_its_gradient(dynamic: bool) -> None:
    check_layer("aot_eager", dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_layer_with_inductor(dynamic: bool) -> None:
    check_layer("inductor", dynamic)


def test_inductor_without_generated_kernels() -> None:
    """Calls the operators from inductor's code, which asserts the strides that the fake ones promised."""
    scores = torch.randn(2, 10, 12)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        solution = solution_of(x)
        return (*(getattr(solution, name) for name in FIELDS), lines_of(x), lines_of(x, 1))

    for found, expected in zip(compiled(call, backend="inductor")(scores), call(scores), strict=True):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_solutions(dynamic: bool) -> None:
    scores = torch.randn(2, 10, 24)
    expected = solution_of(scores)
    assert_same(compiled(solution_of, dynamic)(scores), expected)

    def again(x: Tensor, start: BlockSolution | tuple[Tensor, Tensor]) -> BlockSolution:
        return nmsolve.transposable_mask(x, 2, 4, backend="torch", return_solution=True, warm_start=start)

    for start in (expected, (expected.row_duals, expected.col_duals)):
        assert_same(compiled(again, dynamic)(scores, start), again(scores, start))

    def worst(x: Tensor) -> Tensor:
        return solution_of(x).gap.max()

    assert float(compiled(worst, dynamic)(scores)) == expected.max_gap

    def of_blocks(x: Tensor) -> BlockSolution:
        return nmsolve.solve_blocks(x, 2, backend="torch")

    blocks = torch.randn(5, 4, 4)
    assert_same(compiled(of_blocks, dynamic)(blocks), of_blocks(blocks))

    def of_group(x: Tensor, y: Tensor) -> list[BlockSolution]:
        return nmsolve.transposable_masks([x, y], 2, 4, backend="torch", return_solution=True)

    for found, wanted in zip(
        compiled(of_group, dynamic)(scores, blocks), of_group(scores, blocks), strict=True
    ):
        assert_same(found, wanted)


def test_one_graph_for_all_shapes() -> None:
    shapes = ((8, 8), (12, 20), (7, 9), (30, 5), (64, 64))
    graphs = CompileCounter()
    torch._dynamo.reset()
    mask = torch.compile(mask_of, fullgraph=True, dynamic=True, backend=graphs)
    for shape in shapes:
        scores = torch.randn(shape)
        assert torch.equal(mask(scores), mask_of(scores))
    assert graphs.frame_count <= 2  # square scores share a symbol


def test_what_python_runs_is_not_traced() -> None:
    """A function that the compiler leaves to Python calls the operators there, unseen."""

    def left_to_python(x: Tensor) -> list[Tensor]:
        masks = []
        for n in (1, 2):
            try:
                torch._dynamo.graph_break()
                masks.append(mask_operators.transposable_mask(x, None, None, n, *OPTIONS[1:]))
            finally:
                pass
        return masks

    torch._dynamo.reset()
    mask_of(torch.randn(4, 4))
    counters = torch._dynamo.utils.counters
    counters.clear()
    call = torch.compile(left_to_python, backend="eager")
    for rows in (8, 12):
        scores = torch.randn(rows, 8)
        for found, expected in zip(call(scores), left_to_python(scores), strict=True):
            assert torch.equal(found, expected)
    assert not [reason for reason in counters["graph_break"] if "nmsolve" in reason or "disable" in reason]


def test_a_graph_per_pattern() -> None:
    scores = torch.randn(9, 16)
    mask = compiled(mask_of)
    for n, m in ((1, 4), (2, 4), (3, 4), (2, 8), (0, 3)):
        assert torch.equal(mask(scores, n, m), mask_of(scores, n, m))


def test_the_first_use_may_be_inside_a_compiled_function() -> None:
    script = (
        "import torch, nmsolve\n"
        "mask = lambda x: nmsolve.nm_mask(x, 2, 4, backend='torch')\n"
        "f = torch.compile(mask, fullgraph=True, backend='eager')\n"
        "assert f(torch.rand(4, 4)).sum() == 8\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: mask_of(x[0]),
            r"scores: expected \(..., rows, cols\), got float32 tensor of shape \(8,\)",
        ),
        (lambda x: mask_of(x.int()), r"scores: expected dtype .* got int32"),
        (lambda x: mask_of(x, 5, 4), r"n: expected 0 <= n <= m=4 .* got 5"),
        (lambda x: nmsolve.transposable_mask(x, 2, 4, method="best"), r"method: expected one of exact"),
        (lambda x: nmsolve.transposable_mask(x, 2, 4, backend="cuda"), r"backend: expected 'auto' or one of"),
        (lambda x: nmsolve.transposable_mask(x, 2, 4, tau=1.0), r"tau: an option of method 'tsenor'"),
        (lambda x: nmsolve.transposable_mask(x, 2, 4, warm_start=(x, x)), r"row_duals of shape \(2, 2, 4\)"),
        (lambda x: nmsolve.nm_mask(x, 2, 4, dim=2), r"dim: expected an integer in \[-2, 2\), got 2"),
        (lambda x: nmsolve.transposable_masks([x, x[0]], 2, 4), r"scores\[1\]: expected"),
    ],
)
def test_static_errors_come_at_trace_time(call: Callable[[Tensor], object], message: str) -> None:
    scores = torch.ones(8, 8)
    with pytest.raises(NMSolveError, match=message):
        call(scores)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        torch.compile(call, fullgraph=True, backend="eager")(scores)
    with pytest.raises(NMSolveError, match=message):
        torch.compile(call, backend="eager")(scores)


def test_bad_values_are_found_when_the_graph_runs() -> None:
    scores = torch.zeros(8, 8)
    mask = compiled(mask_of)
    mask(scores)
    scores[3, 4] = float("nan")
    with pytest.raises(NMSolveError, match=r"got 1 NaN of 64, the first nan at \(3, 4\)"):
        mask(scores)

    def from_duals(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return nmsolve.transposable_mask(x, 2, 4, backend="torch", warm_start=(u, v))

    good, bad = torch.zeros(2, 2, 4), torch.full((2, 2, 4), float("inf"))
    with pytest.raises(NMSolveError, match="warm_start: expected finite col_duals"):
        compiled(from_duals)(torch.ones(8, 8), good, bad)


# --- torch.export -------------------------------------------------------------------------------------------


class Masks(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, BlockSolution, Tensor]:
        return mask_of(x), solution_of(x), lines_of(x, 0)


def test_export() -> None:
    scores = torch.randn(16, 24)
    sizes = {"x": {0: Dim("rows", min=5), 1: Dim("columns", min=5)}}
    file = io.BytesIO()
    torch.export.save(export(Masks(), (scores,), dynamic_shapes=sizes), file)
    file.seek(0)
    model = torch.export.load(file).module()
    for shape in ((16, 24), (13, 9)):
        scores = torch.randn(shape)
        mask, solution, lines = model(scores)
        assert torch.equal(mask, mask_of(scores))
        assert torch.equal(lines, lines_of(scores, 0))
        assert_same(solution, solution_of(scores))


# --- torch.func ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_is_a_leading_dimension(dim: int) -> None:
    scores = torch.randn(3, 10, 12)
    moved = scores.movedim(0, dim)
    assert torch.equal(torch.vmap(mask_of, dim)(moved), mask_of(scores))
    assert_same(torch.vmap(solution_of, dim)(moved), solution_of(scores))
    assert torch.equal(torch.vmap(lines_of, dim)(moved), lines_of(scores))
    assert torch.equal(torch.vmap(lambda x: lines_of(x, 0), dim)(moved), lines_of(scores, 1))
    if dim < 2:
        assert torch.equal(torch.vmap(lines_of, dim)(moved[..., 0]), lines_of(scores[..., 0]))


def test_vmap_over_some_arguments() -> None:
    scores = torch.randn(3, 10, 12)
    expected = solution_of(scores)

    def again(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return nmsolve.transposable_mask(x, 2, 4, backend="torch", warm_start=(u, v))

    duals = (expected.row_duals.movedim(0, -1), expected.col_duals)
    assert torch.equal(torch.vmap(again, (0, -1, 0))(scores, *duals), expected.mask)
    one = torch.vmap(again, (None, 0, 0))(scores[0], expected.row_duals, expected.col_duals)
    assert torch.equal(one, expected.mask[0].expand_as(one))

    def pair(x: Tensor, y: Tensor) -> list[Tensor]:
        return nmsolve.transposable_masks([x, y], 2, 4, backend="torch")

    first, second = torch.vmap(pair, (0, None))(scores, scores[1])
    assert torch.equal(first, expected.mask)
    assert torch.equal(second, expected.mask[1].expand_as(second))


def test_gradients_of_masked_weights() -> None:
    weights = torch.randn(3, 8, 8)

    def loss(weight: Tensor) -> Tensor:
        return (weight * mask_of(weight)).square().sum() / 2

    assert torch.equal(torch.func.grad(loss)(weights[0]), weights[0] * mask_of(weights[0]))
    each = torch.vmap(torch.func.grad(loss))(weights)
    assert torch.equal(each, weights * mask_of(weights))
    assert torch.equal(compiled(torch.vmap(torch.func.grad(loss)))(weights), each)


# --- groups -------------------------------------------------------------------------------------------------


def group() -> list[Tensor]:
    return [INPUTS[name]().detach() for name in INPUTS]


@pytest.mark.parametrize(
    ("method", "backend"), [("exact", "torch"), ("exact", "auto"), ("greedy", "torch"), ("tsenor", "torch")]
)
def test_a_group_is_solved_like_its_members(method: str, backend: str) -> None:
    scores = group()[:: 1 if method == "exact" else 3]
    options = {"method": method, "backend": backend}
    solutions = nmsolve.transposable_masks(tuple(scores), 2, 4, return_solution=True, **options)
    masks = nmsolve.transposable_masks(scores, 2, 4, **options)
    assert isinstance(masks, list)
    for mask, found, matrix in zip(masks, solutions, scores, strict=True):
        expected = nmsolve.transposable_mask(matrix, 2, 4, return_solution=True, **options)
        assert torch.equal(mask, expected.mask)
        assert_same(found, expected)
    assert nmsolve.transposable_masks([], 2, 4, **options) == []


class Together:
    """The torch backend with ``exact_group``, as a row and its module; remembers what each call was given."""

    masks_float64 = True

    def __init__(self) -> None:
        self.masks = self
        self.calls: list[list[tuple[tuple[int, ...], torch.dtype]]] = []

    def __getattr__(self, name: str) -> object:
        return getattr(reference, name)

    def exact_group(
        self, scores: Sequence[Tensor], pattern: NMPattern, *, warm: None, want_solution: bool
    ) -> list[BlockResult]:
        assert warm is None
        self.calls.append([(tuple(matrices.shape), matrices.dtype) for matrices in scores])
        return [reference.exact(matrices, pattern, want_solution=want_solution) for matrices in scores]


def test_a_backend_that_takes_groups_is_called_once_per_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = group()
    expected = nmsolve.transposable_masks(scores, 2, 4, backend="torch", return_solution=True)
    backend = Together()
    monkeypatch.setattr(mask_operators, "select", lambda *_: backend)
    masks = nmsolve.transposable_masks(scores, 2, 4)
    calls = {call[0][1]: [shape for shape, _ in call] for call in backend.calls}
    assert len(backend.calls) == len(calls) == 4
    assert all(len({dtype for _, dtype in call}) == 1 for call in backend.calls)
    assert calls[torch.float64] == [(1, 9, 4)]
    assert calls[torch.float32] == [
        (1, 8, 12), (1, 8, 12), (1, 10, 7), (1, 8, 8), (6, 7, 9), (3, 8, 4), (3, 8, 4), (1, 8, 8)
    ]  # fmt: skip
    solutions = nmsolve.transposable_masks(scores, 2, 4, return_solution=True)
    for mask, found, wanted in zip(masks, solutions, expected, strict=True):
        assert torch.equal(mask, wanted.mask)
        assert_same(found, wanted)
    backend.calls.clear()
    mask_of(scores[0])
    assert not backend.calls, "one matrix is no group"
    mask_of(INPUTS["batches_apart"]())
    assert len(backend.calls) == 1, "leading dimensions that do not join are one"


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            torch.ones(4, 4),
            r"scores: expected a list or tuple of tensors, got float32 tensor of shape \(4, 4\)",
        ),
        ([torch.ones(4, 4), None], r"scores\[1\]: expected a torch.Tensor, got NoneType"),
        ([torch.ones(4, 4), torch.ones(4)], r"scores\[1\]: expected \(..., rows, cols\)"),
        ([torch.ones(4, 4), torch.ones(4, 4).int()], r"scores\[1\]: expected dtype .* got int32"),
        (
            [torch.ones(4, 4), torch.ones(2, 4), torch.tensor([[1.0, float("nan")]])],
            r"scores\[2\]: expected numbers, got 1 NaN of 2, the first nan at \(0, 1\)",
        ),
    ],
)
def test_a_group_is_checked_before_any_work(
    scores: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work before the checks")

    monkeypatch.setattr(reference, "exact", never)
    with pytest.raises(NMSolveError, match=message):
        nmsolve.transposable_masks(scores, 2, 4, backend="torch")  # type: ignore[call-overload]


def test_extremes_of_many_tensors_are_read_back_at_once() -> None:
    tensors = [
        torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16),
        torch.tensor([3.0, math.inf]),
        torch.ones(2, 2).double(),
    ]
    assert validation._extremes(tensors) == [(-2.0, 1.0), (3.0, math.inf), (1.0, 1.0)]
    low, high = validation._extremes([torch.tensor([1.0, math.nan])])[0]
    assert math.isnan(low)
    assert math.isnan(high)


def test_which_of_many_tensors_has_a_nan() -> None:
    with pytest.raises(NMSolveError, match=r"scores\[1\]"):
        validation.check_numbers([torch.ones(4, 4), torch.full((4, 4), math.nan)])
    ends = [(1.0, 1.0), (math.inf, -math.inf)]
    assert validation.check_numbers([torch.ones(4, 4), torch.empty(0, 4)]) == ends
