"""Cost table of the Triton kernels without a GPU: registers, spills, instructions by phase, lower bounds.

Compiles every shipped configuration (cases.py), assigns the machine code to the loops of the source
(source_regions.py) and multiplies with how often a program enters each, which Triton's interpreter counts on
random scores (trips.py). Writes kernel_trips.csv (the counts), kernel_costs.csv and kernel_phases.csv to
bench/results; what is selected is only printed, or written to another folder, or in place of its rows.
docs/internals/kernel-costs.md explains the columns.

    python bench kernel_costs                                           # everything; writes
    python bench kernel_costs --kernels exact --targets sm_90 --dtypes float32 --count
    python bench kernel_costs --kernels exact --sizes 16 --targets sm_90 --candidates
    python bench kernel_costs --kernels nm --counted --replace          # with the counts that are there
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, read_csv, replace_rows, table, write_csv

from kernel_costs import offline, sass
from kernel_costs.cases import COMPARED, KERNELS, Case, cases, shipped
from kernel_costs.costs import CONFIGURATION, COSTS, PHASES, TRIPS, Cost, cost
from kernel_costs.trips import count_all, trips_of


def compile_cases(chosen: list[Case], processes: int) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Every case with its result; what is the same is compiled once."""
    jobs = {repr(case.job()): case.job() for case in chosen}
    users: dict[str, list[Case]] = defaultdict(list)
    for case in chosen:
        users[repr(case.job())].append(case)
    for key, result in zip(jobs, offline.compile_all(jobs.values(), processes=processes), strict=True):
        yield from ((case, result) for case in users[key])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, metavar="KERNEL", help=", ".join(KERNELS))
    parser.add_argument("--sizes", nargs="+", type=int, metavar="M")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), metavar="DTYPE")
    parser.add_argument("--targets", nargs="+", choices=offline.TARGETS, metavar="TARGET")
    parser.add_argument("--candidates", action="store_true", help="other tiles too (they are always counted)")
    parser.add_argument("--count", action="store_true", help="count anew, not only from kernel_trips.csv")
    parser.add_argument("--counted", action="store_true", help="never count, take what kernel_trips.csv has")
    parser.add_argument("--phases", action="store_true", help="print the phases as well")
    parser.add_argument("--distribution", default="normal", choices=("normal", "student_t"))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write what was selected there")
    parser.add_argument("--replace", action="store_true", help="write what was selected in place of its rows")
    parser.add_argument("--programs", type=int, default=16, help="to count, of each tile (16)")
    parser.add_argument("--processes", type=int, default=2, help="that compile and count side by side (2)")
    arguments = parser.parse_args()
    selection = (arguments.kernels, arguments.sizes, arguments.dtypes, arguments.targets)
    whole = not (
        any(selection) or arguments.candidates or arguments.count or arguments.out or arguments.replace
    )
    if whole:
        compared = cases(COMPARED, None, ("float32",), ("sm_90",), True)
        chosen = shipped() + [case for case in compared if not case.shipped]
    else:
        dtypes = arguments.dtypes or ("float32", "bfloat16")
        targets = arguments.targets or offline.TARGETS
        kernels = arguments.kernels or KERNELS
        chosen = [*cases(kernels, arguments.sizes, dtypes, targets, arguments.candidates)]

    counted: list[Mapping[str, Any]] = []
    if (arguments.count or whole or arguments.candidates) and not arguments.counted:
        counted = [
            *count_all(
                (
                    (KERNELS[case.kernel].trips, case.m, case.tile[2] if case.tile else None)
                    for case in chosen
                    if KERNELS[case.kernel].trips
                ),
                arguments.programs,
                arguments.processes,
            )
        ]
    folder = RESULTS if whole else arguments.out
    if folder and counted:
        write_csv(folder / TRIPS.name, counted, "triton")
    if arguments.counted or not (arguments.count or whole):
        counted = [*read_csv(TRIPS), *counted]
    trips = trips_of(counted, arguments.distribution)

    costs: dict[Case, Cost] = {}
    faults = 0
    for case, result in compile_cases(chosen, arguments.processes):
        try:
            if "error" in result:
                raise ValueError(f"{case}: {result['error']}")
            done = cost(case, result, trips)
        except ValueError as error:
            print(error, file=sys.stderr)
            faults += case.shipped
            continue
        costs[case] = done
        print(line(done.row), flush=True)
        if arguments.phases and done.phases:
            show = [["phase", "entries", "instructions", "share", *sass.KINDS]]
            show += [
                [p["phase"], f"{p['entries_per_program']:.2f}", str(p["instructions_per_entry"]),
                 f"{p['share']:.1%}", *(str(p[kind]) for kind in sass.KINDS)] for p in done.phases
            ]  # fmt: skip
            print(table(show, "lrrr" + "r" * len(sass.KINDS)))
    if folder and not faults:
        in_order = [costs[case] for case in chosen if case in costs]
        write_csv(folder / COSTS.name, [done.row for done in in_order], "triton")
        write_csv(folder / PHASES.name, [phase for done in in_order for phase in done.phases], "triton")
    if arguments.replace and not faults:
        replace([*costs.values()])
    return 1 if faults else 0


def replace(costs: list[Cost]) -> None:
    """Write rows in place of those that are there of the same configurations, and no others."""
    there = {configuration(row) for row in read_csv(COSTS)}
    costs = [done for done in costs if configuration(done.row) in there]
    anew = {configuration(done.row) for done in costs}
    rows = [done.row for done in costs]
    phases = [phase for done in costs for phase in done.phases]
    for file, lines in ((COSTS, rows), (PHASES, phases)):
        replace_rows(file, lines, lambda row: configuration(row) in anew)


def configuration(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells configurations apart in either file."""
    return tuple(str(row[name]) for name in CONFIGURATION)


def line(row: Mapping[str, Any]) -> str:
    """One configuration on one line."""
    tile = f"{row['rows_in']}x{row['cols_in']} {row['blocks']} blocks {row['warps']} warps"
    head = f"{row['kernel']:<22} {row['m']:>3} {row['dtype']:<8} {row['target']:<7} {tile:<24}"
    head += f" {row['registers']:>3} registers {row['spills']} spills {row['shared_bytes']:>5} B shared"
    if row["predicted_ms_8192"] == "":
        return head
    return head + (
        f" {row['occupancy']:6.1%} {row['instructions_per_block']:9.1f} instructions/block"
        f" {row['predicted_ms_8192']:7.3f} ms ({row['bound']}), floor {row['floor_ms_8192']:.3f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
