"""The reader of machine code, and its assignment to the loops and branches of the source."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from kernel_costs import sass, source_regions

LISTING = """
\t.section\t.text.kernel,"ax",@progbits
kernel:
.text.kernel:
\t//## File "/somewhere/k.py", line 3
        /*0000*/                   S2R R0, SR_TID.X ;
\t//## File "/somewhere/k.py", line 5
.L_x_0:
        /*0010*/                   FADD R1, R1, R0 ;
        /*0020*/                   BRA.DIV UR7, `(.L_x_9) ;
\t//## File "/somewhere/k.py", line 7
.L_x_1:
        /*0030*/                   SHFL.BFLY PT, R2, R1, 0x1, 0x1f ;
        /*0040*/              @!P1 FMNMX R2, R2, R1, PT ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
\t//## File "/somewhere/k.py", line 8
        /*0060*/               @P2 BRA `(.L_x_2) ;
\t//## File "/somewhere/k.py", line 9
        /*0070*/                   MUFU.RCP R3, R2 ;
        /*0080*/                   IMAD R3, R3, R3, RZ ;
\t//## File "/somewhere/k.py", line 10
.L_x_2:
        /*0090*/                   LOP3.LUT R1, R1, R3, RZ, 0xc0, !PT ;
        /*00a0*/                   BRA P3, `(.L_x_0) ;
\t//## File "/somewhere/k.py", line 11
        /*00b0*/                   STG.E desc[UR4][R4.64], R1 ;
        /*00c0*/                   EXIT ;
.L_x_9:
        /*00d0*/                   FADD R1, R1, R1 ;
        /*00e0*/                   BRA `(.L_x_1) ;
.L_x_10:
        /*00f0*/                   BRA `(.L_x_10) ;
"""

SOURCE = """
@triton.jit
def kernel(x_ptr, n):
    x = tl.load(x_ptr)
    while x < n:
        x += 1
        while tl.max(x) > 0:
            x = other(x)
        if x > 0:
            x = 1 / x
        x &= 3
    tl.store(x_ptr, x)


@triton.jit
def other(x):
    return x
"""


@pytest.fixture
def sources(tmp_path: Path) -> source_regions.Sources:
    file = tmp_path / "k.py"
    file.write_text(SOURCE.removeprefix("\n"))
    return source_regions.Sources([file], "kernel")


def test_instructions_have_labels_and_lines_resolved() -> None:
    code = sass.parse(LISTING)
    assert [line.address for line in code] == list(range(0, 0x100, 16))
    assert (code[5].opcode, code[5].predicate, code[5].target) == ("BRA", "@P0", 0x30)
    assert code[3].source == ("/somewhere/k.py", 7)
    assert [code[k].name for k in (3, 4, 7, 9)] == ["SHFL", "FMNMX", "MUFU", "LOP3"]


def test_loops_are_nested_and_slow_paths_are_left_out() -> None:
    code = sass.parse(LISTING)
    blocks = sass.basic_blocks(code)
    outer, inner = sass.natural_loops(blocks)
    assert (outer.parent, inner.parent) == (None, 0)
    assert inner.body < outer.body
    assert [blocks[b].first for b in sorted(inner.body)] == [3]
    executed = {k for b in sass.reachable(blocks) for k in range(blocks[b].first, blocks[b].last)}
    assert executed == set(range(13)), "what only a diverged warp or nobody reaches is not executed"


def test_instructions_are_counted_by_kind_and_by_unit() -> None:
    counts = sass.count(sass.parse(LISTING)[:13])
    assert counts["kinds"] == {
        "integer": 3, "float": 2, "shuffle": 1, "special": 1, "global": 1, "control": 5,
    }  # fmt: skip
    assert counts["pipes"]["fma_heavy"] == counts["pipes"]["minmax"] == counts["pipes"]["memory"] == 1


def test_pairs_of_float16_have_units_of_their_own() -> None:
    for opcode, unit in (("HADD2.F32", "half"), ("HFMA2.SAT", "half"), ("HFMA2.MMA.SAT", "half_mma")):
        line = sass.Instruction(0, "", opcode, "", None, ("", 0))
        assert (sass.pipe(line), sass.kind(line)) == (unit, "float")


def test_machine_code_is_assigned_to_the_loops_of_the_source(sources: source_regions.Sources) -> None:
    found = source_regions.phases(sass.parse(LISTING), sources)
    sizes = {name: sum(counts["kinds"].values()) for name, counts in found.items()}
    assert sizes == {"kernel": 3, "kernel.while1": 5, "kernel.while1.while1": 3, "kernel.while1.if1": 2}


def test_a_call_of_a_label_leaves_a_loop(sources: source_regions.Sources) -> None:
    """As compiled for sm_80; calls of subroutines come back."""
    leave = """        /*00a0*/              @!P3 CALL.REL.NOINC `(.L_x_3) ;
        /*00a4*/                   BRA `(.L_x_0) ;
.L_x_3:
"""
    branch = "        /*00a0*/                   BRA P3, `(.L_x_0) ;\n"
    assert branch in LISTING
    expected = source_regions.phases(sass.parse(LISTING), sources)
    found = source_regions.phases(sass.parse(LISTING.replace(branch, leave)), sources)
    assert found.keys() == expected.keys()
    for region, counts in found.items():
        kinds, before = dict(counts["kinds"]), dict(expected[region]["kinds"])
        assert kinds.pop("control", 0) - before.pop("control", 0) in (0, 1)
        assert kinds == before


DIVISIONS = """\t//## File "/somewhere/k.py", line 3
        /*0000*/               @P0 BRA `(.L_slow) ;
        /*0010*/                   MUFU.RCP R3, R2 ;
        /*0020*/                   IMAD R3, R3, R3, RZ ;
        /*0030*/                   BRA `(.L_join) ;
.L_slow:
        /*0040*/                   MOV R6, 0x60 ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
.L_join:
        /*0060*/                   FADD R1, R1, R3 ;
\t//## File "/somewhere/k.py", line 5
.L_loop:
        /*0070*/                   FADD R1, R1, R0 ;
        /*0080*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*0090*/               @P1 BRA `(.L_loop) ;
\t//## File "/somewhere/k.py", line 11
        /*00a0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*00b0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ;
        /*00c0*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_s64:
        /*00d0*/                   MUFU.RCP R3, R2 ;
        /*00e0*/                   RET.REL.NODEC R6 `(kernel) ;
"""


def test_a_subroutine_is_executed_where_it_is_called(sources: source_regions.Sources) -> None:
    """But not in the way that a division takes with large numbers, beside which there is another."""
    found = source_regions.phases(sass.parse(DIVISIONS), sources)
    sizes = {name: sum(counts["kinds"].values()) for name, counts in found.items()}
    assert sizes == {"kernel": 4 + 1 + 3 + 2 * 2, "kernel.while1": 3 + 2}
    assert found["kernel"]["kinds"]["special"] == 1 + 2
    assert found["kernel.while1"]["kinds"]["special"] == 1


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [
        ("        /*0020*/                   IMAD R3, R3, R3, RZ ;\n", "", 2 + 2 - 1),  # no longer than it
        ("MOV R6, 0x60", "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", 2 + 2 * 2),
        ("BRA `(.L_join)", "EXIT", 2 + 2),
    ],
)
def test_a_call_without_a_longer_way_beside_it_counts(
    sources: source_regions.Sources, before: str, after: str, more: int
) -> None:
    assert before in DIVISIONS
    found = source_regions.phases(sass.parse(DIVISIONS.replace(before, after)), sources)
    assert sum(found["kernel"]["kinds"].values()) == 12 + more


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("        /*00e0*/                   RET.REL.NODEC R6 `(kernel) ;\n", ""),
        ("RET.REL.NODEC R6 `(kernel)", "EXIT"),
        ("/*00d0*/                   MUFU.RCP R3, R2", "/*00d0*/               @P1 BRA `(.L_join)"),
        (
            "/*00a0*/                   CALL.REL.NOINC `($__internal_0",
            "/*00a0*/          CALL.REL.NOINC `($other",
        ),
    ],
)
def test_a_subroutine_that_cannot_be_followed_is_an_error(
    sources: source_regions.Sources, before: str, after: str
) -> None:
    assert before in DIVISIONS
    with pytest.raises(ValueError, match="no straight subroutine"):
        source_regions.phases(sass.parse(DIVISIONS.replace(before, after)), sources)


def test_a_block_of_no_region_is_an_error(
    sources: source_regions.Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sass.straight_runs
    monkeypatch.setattr(sass, "straight_runs", lambda blocks: runs(blocks)[:-1])
    with pytest.raises(ValueError, match="the blocks at 0xb0 are of no region"):
        source_regions.phases(sass.parse(LISTING), sources)


def test_a_branch_in_several_pieces_is_one(sources: source_regions.Sources) -> None:
    """What the branch begins with is moved into it from the loop, and a shuffle cuts it in two."""
    moved = """\t//## File "/somewhere/k.py", line 6
        /*0061*/                   IMAD R4, R3, R3, RZ ;
        /*0062*/                   IMAD R5, R3, R3, RZ ;
\t//## File "/somewhere/k.py", line 9
        /*0063*/                   BRA.DIV UR7, `(.L_x_9) ;
"""
    line_9 = '\t//## File "/somewhere/k.py", line 9\n'
    code = sass.parse(LISTING.replace(line_9, moved))
    blocks = sass.basic_blocks(code)
    branch = next(run for run in sass.straight_runs(blocks) if code[blocks[run[0]].first].address == 0x61)
    assert [blocks[b].last - blocks[b].first for b in branch] == [3, 2]
    found = source_regions.phases(code, sources)
    sizes = {name: sum(counts["kinds"].values()) for name, counts in found.items()}
    assert sizes == {"kernel": 3, "kernel.while1": 5, "kernel.while1.while1": 3, "kernel.while1.if1": 5}


def test_what_is_moved_out_of_a_loop_is_not_of_its_branches(sources: source_regions.Sources) -> None:
    """Addresses that a branch in the loop needs, worked out before it: once, however often it is taken."""
    line_5 = '\t//## File "/somewhere/k.py", line 5\n'
    assert LISTING.count(line_5) == 1
    moved = line_5.replace("line 5", "line 9") + "".join(
        f"        /*{k:04x}*/                   IMAD R{k}, R3, R3, RZ ;\n" for k in range(1, 6)
    )
    found = source_regions.phases(sass.parse(LISTING.replace(line_5, moved + line_5)), sources)
    sizes = {name: sum(counts["kinds"].values()) for name, counts in found.items()}
    assert sizes == {"kernel": 8, "kernel.while1": 5, "kernel.while1.while1": 3, "kernel.while1.if1": 2}


def test_a_loop_that_the_source_does_not_have_is_an_error(sources: source_regions.Sources) -> None:
    with pytest.raises(ValueError, match="none of the source's"):
        source_regions.phases(sass.parse(LISTING.replace("line 7", "line 3")), sources)


def test_a_loop_that_is_there_twice_is_an_error(sources: source_regions.Sources) -> None:
    loop = (
        '\t//## File "k.py", line 5\n.L_{0}:\n'
        "  /*00{0}0*/  FADD R1, R1, R0 ;\n  /*00{0}8*/  @P0 BRA `(.L_{0}) ;\n"
    )
    once = loop.format(1) + "  /*0090*/  EXIT ;\n"
    assert sum(source_regions.phases(sass.parse(once), sources)["kernel.while1"]["kinds"].values()) == 2
    with pytest.raises(ValueError, match="twice"):
        source_regions.phases(sass.parse(loop.format(1) + loop.format(2) + "  /*0090*/  EXIT ;\n"), sources)


def test_a_loop_whose_first_turn_is_before_it_makes_one_less(sources: source_regions.Sources) -> None:
    turn = '\t//## File "k.py", line 5\n{0}  /*00{1}0*/  FADD R1, R1, R0 ;\n  /*00{1}8*/  {2} ;\n'
    first = turn.format("", 0, "FADD R1, R1, R1")
    loop = turn.format(".L_1:\n", 1, "@P0 BRA `(.L_1)")
    end = '\t//## File "k.py", line 11\n  /*0090*/  EXIT ;\n'
    assert source_regions.phases(sass.parse(first + loop + end), sources)["kernel.while1"]["peeled"]
    moved = first.partition("  /*0008*/")[0]  # of two instructions one
    assert not source_regions.phases(sass.parse(moved + loop + end), sources)["kernel.while1"]["peeled"]
    # All but what lanes exchange may have been moved.
    exchange = "SHFL.BFLY PT, R2, R1, 0x1, 0x1f"
    loop = loop.replace("FADD R1, R1, R0", exchange)
    assert not source_regions.phases(sass.parse(first + loop + end), sources)["kernel.while1"]["peeled"]
    first = first.replace("FADD R1, R1, R0", exchange)
    assert source_regions.phases(sass.parse(first + loop + end), sources)["kernel.while1"]["peeled"]


def test_a_loop_around_another_is_not_the_inner_one_of_the_source(sources: source_regions.Sources) -> None:
    """Though most of what it holds besides comes from there, such as that loop's first turn."""
    line_7 = '\t//## File "/somewhere/k.py", line 7\n'
    first = line_7 + "".join(
        f"        /*{k:04x}*/                   FADD R{k}, R3, R3 ;\n" for k in range(0x21, 0x2A)
    )
    found = source_regions.phases(sass.parse(LISTING.replace(line_7, first + line_7)), sources)
    sizes = {name: sum(counts["kinds"].values()) for name, counts in found.items()}
    assert sizes == {"kernel": 3, "kernel.while1": 14, "kernel.while1.while1": 3, "kernel.while1.if1": 2}


COUNTED = """@triton.jit
def kernel(x_ptr):
    x = tl.load(x_ptr)
    for k in range(16):
        x += k
        if x > 3:
            x = 1 / x
    tl.store(x_ptr, x)
"""
TURN = """\t//## File "k.py", line 5
        /*00{0}1*/                   FADD R1, R1, R0 ;
        /*00{0}2*/               @P1 BRA `(.L_no{0}) ;
\t//## File "k.py", line 7
        /*00{0}3*/                   MUFU.RCP R1, R1 ;
\t//## File "k.py", line 4
.L_no{0}:
        /*00{0}4*/                   {1} ;
"""


def counted_loop(*adds: str) -> list[sass.Instruction]:
    """A loop that is written out so many times."""
    turns = "".join(TURN.format(k, add) for k, add in enumerate(adds, 1))
    end = "        /*0081*/                @P0 BRA `(.L_0) ;\n        /*0091*/                   EXIT ;\n"
    return sass.parse(f".L_0:\n{turns}{end}")


@pytest.fixture
def counted(tmp_path: Path) -> source_regions.Sources:
    (tmp_path / "k.py").write_text(COUNTED)
    return source_regions.Sources([tmp_path / "k.py"], "kernel")


@pytest.mark.parametrize(
    ("adds", "turns"),
    [
        (["VIADD R4, R4, 0x1"], 1),
        (["IADD3 R4, R4, -0x1, RZ"], 1),
        (["UIADD3 UR4, UPT, UPT, UR7, 0x1, URZ", "UIADD3 UR7, UPT, UPT, UR7, 0x2, URZ"], 2),
        (["VIADD R5, R4, 0x1", "VIADD R5, R4, 0x2", "VIADD R4, R4, 0x3"], 3),
        (["IADD3 R4, R4, 0xfffffffe, RZ", "FADD R1, R1, R0"], 2),
        (["IMAD.IADD R4, R4, 0x1, R5"], 1),
    ],
)
def test_a_loop_makes_as_many_turns_at_a_time_as_its_counter_says(
    counted: source_regions.Sources, adds: list[str], turns: int
) -> None:
    found = source_regions.phases(counted_loop(*adds), counted)
    assert {name: counts["turns"] for name, counts in found.items()} == {
        "kernel": 1,
        "kernel.for1": turns,
        "kernel.for1.if1": turns,
    }


def test_the_line_of_a_for_is_no_turn(counted: source_regions.Sources) -> None:
    """What the loop takes in may be said to come from there."""
    line_4, line_5 = (f'\t//## File "k.py", line {line}\n' for line in (4, 5))
    before = "".join(
        f"        /*{k:04x}*/                   SHFL.BFLY PT, R2, R1, 0x1, 0x1f ;\n" for k in range(1, 9)
    )
    loop = TURN.format(1, "VIADD R4, R4, 0x1")
    end = "        /*0081*/                @P0 BRA `(.L_0) ;\n        /*0091*/                   EXIT ;\n"
    for line, peeled in ((line_4, False), (line_5, True)):
        found = source_regions.phases(sass.parse(f"{line}{before}.L_0:\n{loop}{end}"), counted)
        assert found["kernel.for1"]["peeled"] == peeled


def test_a_counter_that_cannot_be_followed_is_an_error(counted: source_regions.Sources) -> None:
    for adds in (["VIADD R5, R4, 0x1", "VIADD R6, R4, 0x2"], ["VIADD R4, R4, 0x1", "VIADD R5, R5, 0x2"]):
        with pytest.raises(ValueError, match=r"kernel.for1 adds .* to its counter"):
            source_regions.phases(counted_loop(*adds), counted)


# --- regions of the source ----------------------------------------------------------------------------------


def test_regions_are_loops_and_branches_by_their_path() -> None:
    found = {region.name: region for region in source_regions.read(SOURCE)}
    assert set(found) == {"kernel", "kernel.while1", "kernel.while1.while1", "kernel.while1.if1", "other"}
    assert found["kernel.while1.while1"].calls == ("other",)
    static = SOURCE.replace("while x < n", "for k in tl.static_range(4)")
    assert "kernel.for1" not in {region.name for region in source_regions.read(static)}


def test_a_helper_belongs_to_the_one_place_that_calls_it(sources: source_regions.Sources) -> None:
    assert sources.chain("other") == ("other", "kernel.while1.while1", "kernel.while1", "kernel")
    assert sources.at("elsewhere/k.py", 7) == "kernel.while1.while1"
    assert sources.at("elsewhere/k.py", 16) == "other"
    assert sources.at("unknown.py", 7) is None


@triton.jit
def _halve(x):
    if tl.max(x) > 4:
        x -= 4
    return x // 2


@triton.jit
def _halving_kernel(x_ptr, y_ptr):
    x = tl.load(x_ptr + tl.program_id(0))
    steps = 0
    while x > 0:
        x = _halve(x)
        steps += 1
    for _ in range(2):
        steps += 0
    tl.store(y_ptr + tl.program_id(0), steps)


def test_entries_of_regions_are_counted_in_the_interpreter() -> None:
    sources = source_regions.Sources([Path(__file__)], "_halving_kernel")
    x, y = torch.tensor([0, 1, 7, 8]), torch.zeros(4, dtype=torch.long)
    with source_regions.counting(sources) as entered:
        _halving_kernel[(4,)](x, y)
    assert y.tolist() == [0, 1, 2, 3]  # 7 -> 3 // 2, 8 -> 4 // 2 -> 2 // 2
    assert entered == {
        "_halving_kernel": 4,
        "_halving_kernel.while1": 6,
        "_halving_kernel.for1": 8,
        "_halve": 6,
        "_halve.if1": 2,
    }
    _halving_kernel[(4,)](x, y)
    assert entered["_halving_kernel"] == 4
