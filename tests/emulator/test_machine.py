"""What the emulator refuses, each shown by a few lines of PTX, beside lines that it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emulator import Kernel, Launch, PtxError, Settings
from emulator.flow import execution_order
from emulator.parse import Program

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.visible .entry {name}(
	.param .u64 .ptr .global .align 1 {name}_param_0,
	.param .u32 {name}_param_1
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<19>;
	.reg .b64 	%rd<9>;
	.local .align 8 .b8 	__local_depot0[16];
	ld.param.b64 	%rd1, [{name}_param_0];
	ld.param.b32 	%r9, [{name}_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, {threads}, %r1;
	mul.wide.u32 	%rd2, %r3, 4;
	add.s64 	%rd3, %rd1, %rd2;
	shl.b32 	%r4, %r1, 2;
	mov.b32 	%r5, global_smem;
	add.s32 	%r6, %r5, %r4;
"""


def ptx(body: str, threads: int = 32) -> str:
    """A kernel that gets a pointer and a number.

    %rd1 is the pointer, %rd3 the address of the thread's word there, %r6 that of its word in shared memory,
    %r1 its number in the CTA, %r3 that in the grid.
    """
    return HEAD.format(name="kernel", threads=threads) + body + "\n\tret;\n}\n"


def run(body: str, words: int = 64, *, threads: int = 32, ctas: int = 1, **settings: Any) -> np.ndarray:
    """The memory behind the pointer after a launch with 256 bytes of shared memory; first 100, 101, ..."""
    memory = np.arange(100, 100 + words, dtype=np.uint32)
    start = memory.ctypes.data
    ranges = [(start, start + memory.nbytes)]
    Launch(Kernel(ptx(body, threads)), (ctas, 1, 1), [start, 0], ranges, 256, Settings(**settings))
    return memory


# --- what runs ----------------------------------------------------------------------------------------------


def test_every_thread_stores_its_number() -> None:
    assert np.array_equal(run("st.global.b32 [%rd3], %r3;", ctas=2), np.arange(64))


def test_a_loop_ends_for_each_thread_at_its_time() -> None:
    body = """
	mov.b32 %r7, 0;
$again:
	add.s32 %r7, %r7, 3;
	setp.lt.u32 %p1, %r7, %r1;
	@%p1 bra $again;
	st.global.b32 [%rd3], %r7;
"""
    expected = [max(3, -(-t // 3) * 3) for t in range(32)]
    for seed in (None, 1, 2):
        assert run(body, seed=seed)[:32].tolist() == expected


EXCHANGE = """
	st.shared.b32 [%r6], %r1;
	{barrier}
	xor.b32 %r7, %r4, {flip};
	add.s32 %r8, %r5, %r7;
	ld.shared.b32 %r10, [%r8];
	st.global.b32 [%rd3], %r10;
"""


@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_warps_exchange_words_through_shared_memory(space: str) -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;", flip=4 * 33).replace("shared", space)
    for seed in (None, 1, 2, 3):
        assert run(body, threads=64, seed=seed).tolist() == [t ^ 33 for t in range(64)]


def test_a_barrier_of_the_warp_is_enough_within_it() -> None:
    assert run(EXCHANGE.format(barrier="bar.warp.sync -1;", flip=4))[:32].tolist() == [
        t ^ 1 for t in range(32)
    ]


SHUFFLES: dict[str, Callable[[int], int]] = {
    "bfly.b32 %r7, %r1, 5, 31, -1": lambda t: t ^ 5,
    "idx.b32 %r7, %r1, 7, 31, -1": lambda t: 7,
    "up.b32 %r7, %r1, 3, 0, -1": lambda t: t - 3 if t >= 3 else t,
    "down.b32 %r7, %r1, 3, 31, -1": lambda t: t + 3 if t < 29 else t,
}


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_shuffles(shuffle: str) -> None:
    found = run(f"shfl.sync.{shuffle}; st.global.b32 [%rd3], %r7;")
    assert found[:32].tolist() == [SHUFFLES[shuffle](t) for t in range(32)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [("max.s32", 30), ("min.s32", -1), ("add.s32", 464), ("min.u32", 0), ("or.b32", -1), ("xor.b32", -32)],
)
def test_reductions_of_a_warp(how: str, expected: int) -> None:
    """Of -1, 0, 1, ... 30."""
    found = run(f"add.s32 %r7, %r1, -1; redux.sync.{how} %r8, %r7, -1; st.global.b32 [%rd3], %r8;")
    assert (found[:32].view(np.int32) == expected).all()


def test_largest_of_a_warps_floats_and_of_three() -> None:
    """Of 0, 1, ... 31, the last of them NaN; then with 7 and 40."""
    body = """
	cvt.rn.f32.u32 %r7, %r1;
	setp.eq.b32 %p1, %r1, 31;
	selp.b32 %r7, 0f7FFFFFFF, %r7, %p1;
	redux.sync.{how}.f32 %r8, %r7, -1;
	{how}.f32 %r8, %r8, 0f40E00000, {third};
	st.global.b32 [%rd3], %r8;
"""
    for how, third, expected in (
        ("max", "0f42200000", 40),
        ("max", "0f00000000", 30),
        ("min", "0fBF800000", -1),
    ):
        found = run(body.format(how=how, third=third))[:32].view(np.float32)
        assert (found == expected).all()


def test_local_memory_at_an_address_of_32_bits() -> None:
    """As Triton 3.9 writes it: a place in local memory becomes a generic address."""
    body = """
	mov.b32 %r10, __local_depot0;
	cvt.u64.u32 %rd5, %r10;
	cvta.local.u64 %rd5, %rd5;
	st.b32 [%rd5+4], %r1;
	ld.b32 %r11, [%rd5+4];
	st.b32 [%rd3], %r11;
"""
    assert run(body)[:32].tolist() == list(range(32))


def test_the_larger_of_two_and_zero() -> None:
    body = """
	sub.s32 %r10, %r1, 20;
	max.relu.s32 %r11, %r10, -5;
	min.relu.s32 %r12, %r10, 7;
	mad.lo.s32 %r13, %r11, 100, %r12;
	st.global.b32 [%rd3], %r13;
"""
    expected = [100 * max(k - 20, -5, 0) + max(min(k - 20, 7), 0) for k in range(32)]
    assert run(body)[:32].tolist() == expected


def test_local_memory_is_each_threads_own() -> None:
    body = """
	mov.b64 %rd5, __local_depot0;
	st.local.b32 [%rd5 + 8], %r1;
	ld.b32 %r7, [%rd5 + 8];
	st.global.b32 [%rd3], %r7;
"""
    assert run(body)[:32].tolist() == list(range(32))


def test_matrices_come_back_as_they_were_stored() -> None:
    """Rows of 16 bytes: a lane of stmatrix holds two of the eight halves of row lane / 4."""
    body = """
	and.b32 %r7, %r1, 7;
	shl.b32 %r7, %r7, 4;
	add.s32 %r7, %r5, %r7;
	stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r7], {%r1};
	bar.warp.sync -1;
	ld.shared.b32 %r8, [%r6];
	bar.warp.sync -1;
	ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r10}, [%r7];
	add.s32 %r8, %r8, %r10;
	st.global.b32 [%rd3], %r8;
"""
    assert run(body)[:32].tolist() == [2 * t for t in range(32)]


def test_matrices_with_rows_as_columns() -> None:
    """Of what is stored row by row, and of what is stored column by column."""
    body = """
	and.b32 %r7, %r1, 7;
	shl.b32 %r7, %r7, 4;
	add.s32 %r7, %r5, %r7;
	stmatrix.sync.aligned.m8n8.x1{store}.shared.b16 [%r7], {{%r1}};
	bar.warp.sync -1;
	ldmatrix.sync.aligned.m8n8.x1{load}.shared.b16 {{%r10}}, [%r7];
	st.global.b32 [%rd3], %r10;
"""
    # Lane 4 r + c holds columns 2 c and 2 c + 1 of row r, the numbers 4 r + c and 0.
    entry = [[4 * r + c // 2 if c % 2 == 0 else 0 for c in range(8)] for r in range(8)]
    turned = [entry[2 * (t % 4)][t // 4] + (entry[2 * (t % 4) + 1][t // 4] << 16) for t in range(32)]
    assert run(body.format(store="", load=".trans"))[:32].tolist() == turned
    assert run(body.format(store=".trans", load=""))[:32].tolist() == turned
    assert run(body.format(store=".trans", load=".trans"))[:32].tolist() == list(range(32))


COPIED = """
	cp.async.ca.shared.global [%r6 + 0], [%rd3 + 0], 0x4, {read};
	cp.async.commit_group;
	cp.async.ca.shared.global [%r6 + 128], [%rd3 + 0], 0x4;
	cp.async.commit_group;
	cp.async.wait_group {but};
	bar.warp.sync -1;
	xor.b32 %r7, %r6, 4;
	ld.shared.b32 %r8, [%r7 + {offset}];
"""


def test_copies_are_there_once_they_are_waited_for() -> None:
    store = "add.s64 %rd4, %rd3, 128; st.global.b32 [%rd4], %r8;"
    for read, but, offset in ((4, 1, 0), (4, 0, 0), (4, 0, 128)):
        found = run(COPIED.format(read=read, but=but, offset=offset) + store)
        assert found[32:].tolist() == [100 + (t ^ 1) for t in range(32)]
    assert not run(COPIED.format(read=0, but=1, offset=0) + store)[32:].any(), (
        "nothing is read, zeros are written"
    )
    for but in (1, 2):
        with pytest.raises(PtxError, match="shared memory read before it is written"):
            run(COPIED.format(read=4, but=but, offset=128 * (2 - but)) + store)


def test_halves_of_registers() -> None:
    body = """
	mov.b32 %r7, 0x3C004000;
	mov.b32 {{ %rs1, %rs2 }}, %r7;
	{instruction}
	st.global.b32 [%rd3], %r8;
"""
    for instruction, expected in (
        ("add.f16x2 %r8, %r7, %r7;", 0x40004400),
        ("fma.rn.f16x2 %r8, %r7, %r7, %r7;", 0x40004600),
        ("fma.rn.sat.f16x2 %r8, %r7, %r7, %r7;", 0x3C003C00),
        ("neg.f16x2 %r8, %r7;", 0xBC00C000),
        ("add.sat.f16 %rs3, %rs2, %rs2; mov.b32 %r8, { %rs3, %rs1 };", 0x40003C00),
        ("set.eq.f32.f32 %r8, %r7, %r7;", 0x3F800000),
        ("set.lt.f32.f32 %r8, %r7, %r7;", 0),
        ("sub.f16 %rs3, %rs1, %rs2; mov.b32 %r8, { %rs3, %rs1 };", 0x40003C00),
        ("add.rn.f32.f16 %r8, %rs1, 0f3F800000;", 0x40400000),
        ("sub.rn.f32.f16 %r8, %rs2, 0f40000000;", 0xBF800000),
    ):
        assert run(body.format(instruction=instruction))[0] == expected, instruction


def test_registers_nobody_wrote_hold_anything() -> None:
    found = run("st.global.b32 [%rd3], %r17;")
    assert len(set(found[:32].tolist())) > 16


def test_a_product_and_a_sum_are_one_where_the_assembler_may() -> None:
    """x = 1 + 2^-12: x x - (1 + 2^-11) is 2^-24, or 0 where the product is rounded first."""
    body = """
	mov.b32 %r7, 0f3F800800;
	mul.f32 %r8, %r7, %r7;
	{operation} %r10, {terms};
	st.global.b32 [%rd3], %r10;
"""
    for operation, terms, sign in (
        ("add.f32", "%r8, 0fBF801000", 1),
        ("sub.f32", "%r8, 0f3F801000", 1),
        ("sub.f32", "0f3F801000, %r8", -1),
    ):
        for contracted in (False, True):
            kernel = Kernel(ptx(body.format(operation=operation, terms=terms)), contracted=contracted)
            assert kernel.contractions == contracted
            memory = np.zeros(32, np.float32)
            start = memory.ctypes.data
            Launch(kernel, (1, 1, 1), [start, 0], [(start, start + 128)])
            assert (memory == (sign * 2.0**-24 if contracted else 0)).all()
    rounded = body.format(operation="add.rn.f32", terms="%r8, 0fBF801000")
    assert Kernel(ptx(rounded), contracted=True).contractions == 0


# --- what is refused ----------------------------------------------------------------------------------------

REFUSED = {
    "load out of bounds": "ld.global.b32 %r7, [%rd3 + 256];",
    "store out of bounds": "st.global.b32 [%rd3 + -4], %r1;",
    "load misaligned": "ld.global.b32 %r7, [%rd3 + 2];",
    "load misaligned (8 bytes": "ld.global.v2.b32 { %r7, %r8 }, [%rd3];",
    "writes what another thread reads": "ld.global.b32 %r7, [%rd3]; st.global.b32 [%rd3 + 4], %r1;",
    "reads what another thread writes": "st.global.b32 [%rd3], %r1; ld.global.b32 %r7, [%rd3 + 4];",
    "two threads store different values at once": "st.global.b32 [%rd1], %r1;",
    "two threads store different values": "st.global.b32 [%rd3], %r1; st.global.b32 [%rd3 + 4], 7;",
    "shared memory out of bounds": "st.shared.b32 [%r6 + 256], %r1;",
    "shared memory misaligned": "st.shared.b32 [%r6 + 1], %r1;",
    "shared memory read before it is written": "ld.shared.b32 %r7, [%r6];",
    "within a warp: read after write": EXCHANGE.format(barrier="", flip=4),
    "within a warp: write after write": "st.shared.b32 [%r6], %r1; st.shared.b32 [%r6 + 4], 99;",
    "within a warp: write after read": (
        "st.shared.b32 [%r6], 1; bar.warp.sync -1; ld.shared.b32 %r7, [%r5]; st.shared.b32 [%r6], %r1;"
    ),
    "threads store different values at once": "st.shared.b32 [%r5], %r1;",
    "local memory read before it is written": "mov.b64 %rd5, __local_depot0; ld.local.b32 %r7, [%rd5];",
    "local memory out of bounds": "mov.b64 %rd5, __local_depot0; st.local.b32 [%rd5 + 16], %r1;",
    "a warp is not all there": (
        "setp.lt.u32 %p1, %r1, 9;\n@%p1 bra $over;\nshfl.sync.bfly.b32 %r7, %r1, 1, 31, -1;\n$over:\n"
    ),
    "the member mask is not all lanes": "shfl.sync.bfly.b32 %r7, %r1, 1, 31, 65535;",
    "a shuffle within parts of a warp": "shfl.sync.bfly.b32 %r7, %r1, 1, 7175, -1;",
    "distances that differ": "shfl.sync.bfly.b32 %r7, %r1, %r1, 31, -1;",
    "an endless loop": "$again:\nbra.uni $again;",
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message: str) -> None:
    with pytest.raises(PtxError, match=re.escape(message)):
        run(REFUSED[message], most_steps=100)


REFUSED_BETWEEN_WARPS = {
    "between warps: read after write": EXCHANGE.format(barrier="bar.warp.sync -1;", flip=4 * 33),
    "between warps: write after read": (
        "st.shared.b32 [%r6], 1;\nbar.sync 0;\nxor.b32 %r7, %r6, 128;\nld.shared.b32 %r8, [%r7];\n"
        "st.shared.b32 [%r6], %r1;"
    ),
    "between warps: write after write": (
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $over;\nst.shared.b32 [%r6], 1;\n$over:\n"
        "@!%p1 bra $end;\nst.shared.b32 [%r6 + 128], 2;\n$end:\n"
    ),
    "ended that others wait for": "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $end;\nbar.sync 0;\n$end:\n",
    "wait at different barriers": (
        "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $a;\nbar.sync 0;\nbra.uni $end;\n$a:\nbar.sync 0;\n$end:\n"
    ),
    "a warp is not all there": "setp.lt.u32 %p1, %r1, 40;\n@%p1 bra $end;\nbar.sync 0;\n$end:\n",
}  # fmt: skip


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("message", REFUSED_BETWEEN_WARPS)
def test_refused_between_warps(message: str, seed: int | None) -> None:
    """Which of two accesses comes first, and is no race yet, depends on the order of the warps."""
    expected = message if seed is None else message.partition(":")[0]
    with pytest.raises(PtxError, match=re.escape(expected)):
        run(REFUSED_BETWEEN_WARPS[message], threads=64, seed=seed)


def test_races_between_ctas() -> None:
    store = "mul.wide.u32 %rd4, %r1, 4;\nadd.s64 %rd5, %rd1, %rd4;\nst.global.b32 [%rd5], {value};"
    assert run(store.format(value="%r1"), ctas=2)[:32].tolist() == list(range(32))  # one value twice
    with pytest.raises(PtxError, match="two threads store different values"):
        run(store.format(value="%r2"), ctas=2)


def test_the_place_is_told() -> None:
    with pytest.raises(PtxError) as error:
        run("// \n\t.loc\t1 7 5\t// exact.py:7:5\n\tst.global.b32 [%rd3 + 256], %r1;", threads=64)
    message = str(error.value)
    assert "CTA 0 thread 0 (64 threads)" in message
    assert "st.global.b32 [%rd3 + 256], %r1" in message
    assert "exact.py:7:5" in message


UNKNOWN = [
    "nonsense.b32 %r7, %r1;",
    "add.sat.s32 %r7, %r1, %r1;",
    "add.rz.f32 %r7, %r1, %r1;",
    "fma.rz.f32 %r7, %r1, %r1, %r1;",
    "max.NaN.f32 %r7, %r1, %r1;",
    "cvt.rni.s32.f32 %r7, %r1;",
    "cvt.sat.rzi.s8.f32 %r7, %r1;",
    "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
    "shl.s32.wrap %r7, %r1, 3;",
    "ld.volatile.global.b32 %r7, [%rd3];",
    "atom.global.add.u32 %r7, [%rd3], 1;",
    "shfl.bfly.b32 %r7, %r1, 1, 31;",
    "bar.sync 1;",
    "bar.sync 0, 64;",
    "@%p1 bar.sync 0;",
    "mov.u32 %r7, %clock;",
    "mov.u32 %x7, %r1;",
    "add.f32 %rd4, %r1, %r2;",
    "ld.param.b32 %r7, [kernel_param_2];",
    "ld.global.v4.b32 { %r7, %r8 }, [%rd3];",
    "bfe.u32 %r7, %r1;",
    "max.f32 %r7, %r1, %r1, %r1, %r1;",
    "redux.sync.max.abs.f32 %r7, %r1, -1;",
]


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_what_is_not_known_is_an_error(instruction: str) -> None:
    with pytest.raises(PtxError):
        Kernel(ptx(instruction))


# --- control flow -------------------------------------------------------------------------------------------


def test_blocks_and_where_they_lead() -> None:
    body = "$a:\nsetp.eq.b32 %p1, %r1, 0;\n@%p1 bra $c;\n$b:\nadd.s32 %r7, %r1, 1;\nbra.uni $a;\n$c:\n"
    program = Program(ptx(body))
    assert program.successors == [[1], [3, 2], [1], []]
    assert program.parameters == [("u64", "kernel_param_0"), ("u32", "kernel_param_1")]
    assert (program.threads, program.local_bytes, program.registers["rd"]) == (32, 16, 8)


def test_what_follows_a_loop_comes_after_all_of_it() -> None:
    """0 -> 1 <-> 2, 1 -> 5; 2 <-> 3 <-> 4 are loops within that one."""
    order = execution_order([[1], [5, 2], [3, 1], [4], [3, 2], []])
    assert order[:2] == [0, 1]
    assert order[-1] == 5
    assert sorted(order) == list(range(6))
    forward = execution_order([[2, 1], [3], [3], []])
    assert forward[0] == 0
    assert forward[-1] == 3
