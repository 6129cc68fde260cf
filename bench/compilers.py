"""What does each release of Triton make of the kernels? Spills, instructions, results, from 3.4 to 3.9.

Each release's wheel is fetched with pip and unpacked under ``--folder``; nothing is installed. The
interpreters before 3.7 do not take NumPy 2.4, and get an older one in the same way. A row of
bench/results/compilers.csv says of one variant of one kernel

- compiled for a target, whether it compiles, what it spills, its registers and instructions per block;
- interpreted, or emulated for sm_90 from its PTX, whether a small case agrees with the float64 oracle.

A row is written as soon as it is known, and what has a row is not done again, unless ``--anew`` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, read_csv, replace_rows
from kernel_costs import offline
from kernel_costs.cases import KERNELS, Case, cases
from kernel_costs.costs import TRIPS, cost
from kernel_costs.trips import Trips, trips_of

RELEASES = {
    "3.4.0": "2.8",
    "3.5.1": "2.9",
    "3.6.0": "2.10, 2.11",
    "3.7.1": "2.12, 2.13",
    "3.8.0": "2.14",
    "3.9.0": "2.15",
}
"""Releases of Triton, with the PyTorch that brings them."""

REFERENCE = "3.7.1"
"""The release that the tests run with, and that the cost table is of."""

TARGETS = ("sm_90", "sm_80", "sm_100")
ALL_TARGETS = (*offline.TARGETS, *offline.OTHER_TARGETS)
"""What the reference is asked for."""

EXECUTED = {
    "interpreted": {"TRITON_INTERPRET": "1"},
    "emulated": {"NMSOLVE_PTX_SM": "90"},
}
"""How a variant is executed, and the environment that asks for it."""

BEFORE_NUMPY_2_4 = ("3.4.0", "3.5.1", "3.6.0")
OLDER_NUMPY = "2.3.5"
"""What the interpreters of these run with."""

COUNTED = ("registers", "spills", "instructions_per_block")
COMPILERS = "compilers.csv"
KEY = ("triton", "how", "kernel", "m", "target")


def unpacked(release: str, folder: Path, package: str = "triton") -> Path:
    """The folder with this release of a package, fetched if it is not there."""
    there = folder / (release if package == "triton" else f"{package}-{release}")
    if not there.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
            subprocess.run([*command, "--no-deps", "--dest", scratch, f"{package}=={release}"], check=True)
            (wheel,) = Path(scratch).glob(f"{package}-*.whl")
            partial = Path(scratch) / "unpacked"
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(partial)
            for tool in partial.glob("triton/backends/*/bin/*"):
                tool.chmod(0o755)
            partial.rename(there)
    return there


def compiled(
    release: str, triton: Path, chosen: list[Case], trips: Trips, processes: int
) -> Iterator[dict[str, Any]]:
    """A row for each configuration."""
    jobs = [case.job() for case in chosen]
    found = offline.compile_all(jobs, processes=processes, triton=triton)
    for case, result in zip(chosen, found, strict=True):
        row = row_of(release, "compiled", case.kernel, case.m or "", case.target)
        if "error" in result:
            yield row | {"outcome": " ".join(result["error"].split())[-200:]}
            continue
        row |= {"outcome": "compiles", "registers": result["registers"]}
        row["spills"] = result["spills"] or result.get("local", 0)
        if case.target in offline.TARGETS:  # counts of trips are for these
            try:
                row["instructions_per_block"] = cost(case, result, trips).row["instructions_per_block"]
            except ValueError as error:  # the loops are not those of the source
                print(f"{case}: {error}", file=sys.stderr)
        yield row


def executed(
    release: str, packages: Sequence[Path], how: str, variants: list[str]
) -> Iterator[dict[str, Any]]:
    """A row for each variant: whether what it gives with packages from folders is what the oracle does."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NMSOLVE_PTX_SM")}
    script = str(ROOT.joinpath("tests", "emulator", "compared_variants.py"))
    with tempfile.TemporaryDirectory() as cache:
        environment |= EXECUTED[how] | offline.import_first(*packages) | {"TRITON_CACHE_DIR": cache}
        child = subprocess.Popen(
            [sys.executable, script, *variants], stdout=subprocess.PIPE, env=environment, text=True
        )
        target = "sm_90" if how == "emulated" else ""
        with child:
            assert child.stdout is not None
            for line in map(json.loads, child.stdout):
                yield row_of(release, how, line["variant"], line["m"], target) | {"outcome": line["outcome"]}
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)


def row_of(release: str, how: str, kernel: str, m: int | str, target: str) -> dict[str, Any]:
    """A row without its outcome."""
    values = (release, how, kernel, m, target)
    return {**dict(zip(KEY, values, strict=True)), "torch": RELEASES[release], "outcome": ""} | dict.fromkeys(
        COUNTED, ""
    )


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[key]) for key in KEY)


def keep(path: Path, row: dict[str, Any]) -> bool:
    """Put a row where it belongs; whether it tells of no fault."""
    replace_rows(path, [row], lambda old: key_of(old) == key_of(row))
    print(*(str(row[key]) for key in (*KEY, "outcome", *COUNTED)), sep="  ", flush=True)
    return row["outcome"] in ("compiles", "agrees")


def survey(path: Path, release: str, triton: Path, arguments: argparse.Namespace, trips: Trips) -> int:
    """Everything that is asked of one release; how many rows tell of a fault."""
    before = read_csv(path) if path.exists() and not arguments.anew else []
    known = {key_of(row) for row in before}
    faults = 0
    for how in arguments.how:
        if how == "compiled":
            for target in arguments.targets or (ALL_TARGETS if release == REFERENCE else TARGETS):
                chosen = [
                    case
                    for case in cases(arguments.kernels, arguments.sizes, ("float32",), (target,), False)
                    if key_of(row_of(release, how, case.kernel, case.m or "", target)) not in known
                ]
                rows = compiled(release, triton, chosen, trips, arguments.processes)
                faults += sum(not keep(path, row) for row in rows)
        elif not any((key[0], key[1]) == (release, how) for key in known):
            packages = [triton]
            if how == "interpreted" and release in BEFORE_NUMPY_2_4:
                packages.append(unpacked(OLDER_NUMPY, triton.parent, "numpy"))
            faults += sum(not keep(path, row) for row in executed(release, packages, how, []))
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "triton", help="of unpacked wheels")
    parser.add_argument("--releases", nargs="+", choices=RELEASES, default=list(RELEASES), metavar="RELEASE")
    parser.add_argument("--targets", nargs="+", choices=ALL_TARGETS, metavar="TARGET")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="M")
    parser.add_argument("--how", nargs="+", choices=("compiled", *EXECUTED), default=["compiled", *EXECUTED])
    parser.add_argument("--anew", action="store_true", help="do what has a row, too")
    parser.add_argument("--out", type=Path, default=RESULTS / COMPILERS, metavar="FILE")
    parser.add_argument("--processes", type=int, default=2, help="that compile side by side (2)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    trips = trips_of(read_csv(TRIPS))
    faults = 0
    for release in arguments.releases:
        triton = unpacked(release, arguments.folder.resolve())
        faults += survey(arguments.out, release, triton, arguments, trips)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
