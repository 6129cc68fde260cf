"""The exact kernel for many matrices in one launch.

Every region of blocks (the full blocks of a matrix, its right edge, its bottom edge) has its own programs,
one region's after the other's, and a row of a table in device memory that says where it lies. A program finds
its region by bisection over the regions' first programs; then everything about it is a scalar, as in a launch
of its own. Blocks of one program therefore never belong to different matrices: that leaves fewer than
``BLOCKS`` lanes idle per region and costs the search no register, where a pointer, three strides and the
sizes for each block would cost many.
"""

import triton
import triton.language as tl
from nmsolve.kernels._tile import Matrix, Part, Region, TileLayout
from nmsolve.kernels.exact import Outputs, solve_blocks, store_blocks
from nmsolve.kernels.exhaustive import exhaust_blocks

FIELDS = tl.constexpr(19)
"""Numbers of a row of the table: the region's first program; the addresses of scores, mask, row duals, column
duals, objective and bound (the last four 0 without a solution); then what :func:`exact_kernel` is given from
``rows`` to ``grid_cols``."""


@triton.jit
def region_of(table_ptr, regions, program):
    """The last of the regions whose first program is not behind ``program``."""
    low = 0
    beyond = regions
    while beyond - low > 1:
        middle = (low + beyond) // 2
        behind = tl.load(table_ptr + middle * FIELDS) > program
        beyond = tl.where(behind, middle, beyond)
        low = tl.where(behind, low, middle)
    return low


@triton.jit
def pointer(field_ptr, ELEMENT: tl.constexpr):
    """The address in a field of the table, as a pointer to elements."""
    return tl.load(field_ptr).to(tl.pointer_type(ELEMENT))


@triton.jit
def described(row_ptr, BLOCKS: tl.constexpr):
    """The :class:`Part` that a row of the table describes."""
    matrix = Matrix(
        tl.load(row_ptr + 7), tl.load(row_ptr + 8), tl.load(row_ptr + 9), tl.load(row_ptr + 10),
        tl.load(row_ptr + 11), tl.load(row_ptr + 12),
    )  # fmt: skip
    region = Region(
        tl.load(row_ptr + 13), tl.load(row_ptr + 14), tl.load(row_ptr + 15), tl.load(row_ptr + 16)
    )
    grid = tl.load(row_ptr + 17), tl.load(row_ptr + 18)
    return Part(matrix, region, grid, 0 - tl.load(row_ptr) * BLOCKS)


@triton.jit(do_not_specialize=["n", "m", "regions", "unit"])
def grouped_kernel(
    table_ptr,  # (regions, FIELDS) int64, contiguous
    regions,
    n,
    m,
    unit,  # 1
    ELEMENT: tl.constexpr,  # of the scores
    ROWS_IN: tl.constexpr,
    COLS_IN: tl.constexpr,
    ROWS_OUT: tl.constexpr,
    COLS_OUT: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
    SLACK: tl.constexpr,
    PACKED: tl.constexpr,
    SOLUTION: tl.constexpr,
    SCHEDULE: tl.constexpr,
):
    """One program: ``BLOCKS`` blocks of one region. ``grid = (sum of ceil(blocks / BLOCKS),)``."""
    row = region_of(table_ptr, regions, tl.program_id(0)) * FIELDS
    part = described(table_ptr + row, BLOCKS)
    LAYOUT: tl.constexpr = TileLayout(ROWS_IN, COLS_IN, ROWS_OUT, COLS_OUT, BLOCKS, PADDED, SLACK, PACKED)
    scores_ptr = pointer(table_ptr + row + 1, ELEMENT)
    found = solve_blocks(scores_ptr, None, n, m, part, LAYOUT, False, SCHEDULE)

    # The row is read again (adding what is left, which is 0), so that during the search only its number
    # occupies a register.
    row_ptr = table_ptr + (row + tl.max(found.spent))
    part = described(row_ptr, BLOCKS)
    row_duals_ptr = None
    col_duals_ptr = None
    objective_ptr = None
    bound_ptr = None
    if SOLUTION:
        DUAL: tl.constexpr = tl.float64 if tl.float64 == ELEMENT else tl.float32
        row_duals_ptr = pointer(row_ptr + 3, DUAL)
        col_duals_ptr = pointer(row_ptr + 4, DUAL)
        objective_ptr = pointer(row_ptr + 5, tl.float64)
        bound_ptr = pointer(row_ptr + 6, tl.float64)
    scores_ptr = pointer(row_ptr + 1, ELEMENT)
    mask_ptr = pointer(row_ptr + 2, tl.int32 if PACKED else tl.uint8)
    outputs = Outputs(mask_ptr, row_duals_ptr, col_duals_ptr, objective_ptr, bound_ptr, unit)
    store_blocks(scores_ptr, outputs, found, n, m, part, LAYOUT, SOLUTION)


@triton.jit(do_not_specialize=["regions"])
def grouped_exhaustive_kernel(
    table_ptr,  # (regions, FIELDS) int64, contiguous
    regions,
    ELEMENT: tl.constexpr,  # of the scores
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """The exhaustive kernel for many matrices, as :func:`grouped_kernel` is the exact one."""
    row_ptr = table_ptr + region_of(table_ptr, regions, tl.program_id(0)) * FIELDS
    part = described(row_ptr, BLOCKS)
    scores_ptr = pointer(row_ptr + 1, ELEMENT)
    mask_ptr = pointer(row_ptr + 2, tl.int32 if PACKED else tl.uint8)
    exhaust_blocks(scores_ptr, mask_ptr, part.matrix, part.region, part.shift, N, BLOCKS, PACKED)
