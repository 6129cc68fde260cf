"""The shipped kernels do not spill and cost no more instructions than bench/results/kernel_costs.csv says.

The model of time is tested too, the reader of machine code in test_machine_code.py. ``-m slow`` compiles the
whole table.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
from common import read_csv
from kernel_costs import cases, costs, model, offline
from kernel_costs.trips import trips_of

GROWTH = 1.1
COMPILER = re.search(r"triton (\d+\.\d+)", read_csv(costs.COSTS)[0]["software"])[1]
of_its_compiler = pytest.mark.skipif(
    not triton.__version__.startswith(f"{COMPILER}."), reason=f"the table is of Triton {COMPILER}"
)
QUICK = [
    *((kernel, m) for kernel in ("exact", "tsenor") for m in (8, 16, 32)),
    ("exact, edge, solution", 16),
    ("exact, exhaustive, many matrices", 4),
    ("greedy", 16),
    ("nm", 8),
    ("sinkhorn, forward", 32),
    ("sinkhorn, training", 16),
    ("sinkhorn, backward", 32),
    ("nth_largest", 4),
    ("sum_largest", 4),
    ("sum_maxima", 0),
    ("add_parts", 0),
    ("permute_columns", 0),
    ("rms_norm_permute", 0),
]
"""What a default run compiles for sm_90 in float32."""


def check(chosen: list[cases.Case]) -> None:
    """Nothing spilled, no barrier in loops where a warp holds blocks, no more instructions than tabled."""
    tabled = {
        tuple(row[key] for key in ("kernel", "m", "dtype", "target")): float(row["instructions_per_block"])
        for row in read_csv(costs.COSTS)
        if row["shipped"] == "1" and row["instructions_per_block"]
    }
    trips = trips_of(read_csv(costs.TRIPS))
    faults = []
    for case, result in zip(chosen, offline.compile_all([case.job() for case in chosen]), strict=True):
        if "error" in result:
            faults.append(f"{case}: {result['error']}")
            continue
        if result["spills"] or result.get("local"):
            faults.append(f"{case}: {result['spills']} spills with {result['registers']} registers")
        if case.kernel.startswith(("exact", "tsenor", "greedy", "assignment")) and case.m <= 32:
            barriers = [loop["BAR"] for loop in result.get("loops", []) if loop.get("BAR")]
            if barriers:
                faults.append(f"{case}: barriers in loops {barriers}")
        if case.target.startswith("sm_"):
            now = costs.cost(case, result, trips).row["instructions_per_block"]
            before = tabled.get((case.kernel, str(case.m or ""), case.dtype, case.target), 0.0)
            if now > GROWTH * before:
                faults.append(f"{case}: {now:.0f} instructions per block, {before:.0f} in the table")
    assert not faults, "\n".join(faults)


@of_its_compiler
def test_shipped_configurations_cost_what_the_table_says() -> None:
    check([cases.Case(kernel, m, "float32", "sm_90", True, None) for kernel, m in QUICK])


@pytest.mark.slow
@of_its_compiler
@pytest.mark.parametrize("target", offline.TARGETS)
def test_every_configuration_costs_what_the_table_says(target: str) -> None:
    check([case for case in cases.shipped() if case.target == target])


def test_nothing_in_the_table_spills() -> None:
    rows = [row for row in read_csv(costs.COSTS) if row["shipped"] == "1"]
    assert {(row["kernel"], row["m"]) for row in rows} == {
        (case.kernel, str(case.m or "")) for case in cases.shipped()
    }
    assert all(row["spills"] == "0" for row in rows)


# --- the model ----------------------------------------------------------------------------------------------

H100 = model.GPUS["sm_90"]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "share"),
    [
        (255, 1, 0, 8 / 64),
        (168, 1, 0, 12 / 64),
        (32, 1, 0, 32 / 64),
        (32, 4, 0, 1.0),
        (64, 4, 32 << 10, 24 / 64),
    ],
)
def test_occupancy(registers: int, warps: int, shared: int, share: float) -> None:
    assert model.occupancy(H100, registers, warps, shared) == share


def test_clocks_of_each_unit() -> None:
    found = model.clocks(H100, {"fma": 8, "fma_heavy": 4, "alu": 6, "minmax": 2, "shuffle": 5, "special": 1})
    assert found == {
        "issue": 6.5,
        "float": 3.0,
        "half": 0.0,
        "integer": 4.0,
        "special": 2.0,
        "exchange": 5.0,
        "double": 0.0,
    }
    assert model.clocks(model.GPUS["sm_80"], {"fma": 8})["float"] == 4.0
    assert model.clocks(model.GPUS["sm_100"], {"minmax": 4})["integer"] == 1.0
    assert model.clocks(model.GPUS["sm_100"], {"fma_packed": 4})["float"] == 2.0
    pairs = {"fma": 8, "half": 4, "half_mma": 4}
    for target, clocks in (("sm_80", 4.0), ("sm_90", 4.0), ("sm_100", 4.0)):
        found = model.clocks(model.GPUS[target], pairs)
        assert (found["float"], found["half"]) == (clocks, 2.0)


def test_prediction_is_the_slowest_of_the_units_and_the_memory() -> None:
    busy = model.predict(H100, {"alu": 1000}, 132 * 1.98e9, 3.35e12)
    assert busy == (pytest.approx(500.0), pytest.approx(1.0), "integer")
    idle = model.predict(H100, {"alu": 1}, 132, 3.35e12)
    assert idle == (pytest.approx(1.0), pytest.approx(1.0), "memory")


def test_a_cost_is_instructions_times_entries() -> None:
    case = cases.Case("tsenor", 16, "float32", "sm_90", True, None)
    phases = {
        "dykstra_kernel": {"kinds": {"float": 100}, "pipes": {"fma": 100}, "peeled": False, "turns": 1},
        "store_mask.if1": {"kinds": {"global": 4}, "pipes": {"memory": 4}, "peeled": False, "turns": 1},
        "dykstra.for1.for1": {
            "kinds": {"float": 30, "shuffle": 2}, "pipes": {"fma": 30, "shuffle": 2}, "peeled": False,
            "turns": 1,
        },
    }  # fmt: skip
    result: dict[str, Any] = {
        "meta": {"BLOCKS": 4, "num_warps": 2}, "registers": 100, "spills": 0, "stack": 0, "shared": 0,
        "phases": phases,
    }  # fmt: skip
    entered = dict.fromkeys(offline.sources_of("dykstra").regions, 1.0)
    trips = {("tsenor", 16, 4): {**entered, "dykstra.for1.for1": 300.0}}
    row, lines = costs.cost(case, result, trips)
    assert row["instructions_per_block"] == (104 + 300 * 32) * 2 / 4
    assert row["float"] == (100 + 300 * 30) * 2 / 4
    assert row["bytes_per_weight"] == 5
    assert row["bound"] == "issue"
    assert row["predicted_ms_8192"] == pytest.approx(
        (104 + 300 * 32) * 2 / 4 * (8192**2 / (4 * 256)) / 132 / 1.98e9 * 1e3
    )
    assert {line["phase"]: line["entries_per_program"] for line in lines} == {
        "dykstra iteration": 300.0, "load, start, store": 1.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="not counted"):
        costs.cost(case, result, {("tsenor", 16, 4): {"dykstra_kernel": 1.0}})
    phases["dykstra.for1.for1"]["peeled"] = True  # one turn less for each refresh
    less, _ = costs.cost(case, result, trips)
    assert less["instructions_per_block"] == (104 + 299 * 32) * 2 / 4
    phases["dykstra.for1.for1"]["turns"] = 13  # of the others at a time
    less, _ = costs.cost(case, result, trips)
    assert less["instructions_per_block"] == (104 + 23 * 32) * 2 / 4


def test_bits_of_bfloat16_are_half_of_those_that_are_counted() -> None:
    phase = {"kinds": {"integer": 10}, "pipes": {"alu": 10}, "peeled": False, "turns": 1}
    result: dict[str, Any] = {
        "meta": {"GROUPS": 32, "num_warps": 1}, "registers": 100, "spills": 0, "stack": 0, "shared": 0,
        "phases": {"nm_kernel.for1": phase},
    }  # fmt: skip
    trips = {("nm", 16, 32): {"nm_kernel.for1": 32.0}}
    for dtype, bits in (("float32", 32), ("bfloat16", 16), ("float32", 32)):
        row, _ = costs.cost(cases.Case("nm", 16, dtype, "sm_90", True, None), result, trips)
        assert row["instructions_per_block"] == bits * 10 / 32


@pytest.mark.parametrize("m", cases.SIZES)
def test_candidates_fill_their_warps(m: int) -> None:
    tiles = cases.candidate_tiles(m)
    assert tiles
    for rows_in, cols_in, blocks, warps in tiles:
        assert (m // rows_in) * (m // cols_in) * blocks == 32 * warps
