"""What do the compiled kernels do, executed without a GPU? Their variants and trips on the emulator of PTX.

For every dtype and target a child (tests/emulator/emulated_rows.py) compiles each variant of each kernel, in
all sizes, executes its PTX and compares the result with the float64 oracle. A row is written as soon as it is
known; when the bench is run again, PTX that has a row is not executed anew. ``--trips`` counts how often the
compiled programs enter the loops of their source, on the inputs of kernel_trips.csv (emulated_trips.py).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, read_csv, replace_rows

TARGETS = (90, 80, 100)
DTYPES = ("float32", "bfloat16", "float16", "float64")
Count = tuple[str, int, int, str]
COUNTS = ("trips", "m", "blocks", "distribution")


def child(script: str, capability: int, arguments: list[str], lines: Iterable[list[Any]]) -> Iterator[Any]:
    """What a script of tests/emulator prints, line by line."""
    environment = os.environ | {"NMSOLVE_PTX_SM": str(capability)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT.joinpath("tests", "emulator", script)), *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
        process.stdin.close()
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


def before(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.exists() else []


def survey(path: Path, capability: int, dtype: str, chosen: list[str], *, anew: bool) -> int:
    """Execute all variants, or the chosen sizes and names, and keep their rows; how many are wrong."""
    here = {"target": f"sm_{capability}", "dtype": dtype}
    known = [
        [row["variant"], int(row["m"]), row["ptx"]]
        for row in before(path)
        if here.items() <= row.items() and not anew
    ]
    faults, seen = 0, set()
    for row in child("emulated_rows.py", capability, [dtype, *chosen], known):
        key = here | {"variant": row["variant"], "m": str(row["m"])}
        seen.add((row["variant"], str(row["m"])))
        if "error" in row:
            faults += 1
            print(f"{', '.join(key.values())}: {row['error']}", file=sys.stderr)
        if not row.get("known"):
            rows = [] if "error" in row else [row]
            replace_rows(path, rows, lambda old, key=key: key.items() <= old.items())
            print(*key.values(), flush=True)
    if not chosen:  # all that are: others are no longer variants
        replace_rows(
            path, [],
            lambda old: here.items() <= old.items() and (old["variant"], old["m"]) not in seen,
        )  # fmt: skip
    return faults


def count(path: Path, capability: int, *, anew: bool) -> None:
    """Count the trips of every configuration of kernel_trips.csv, beside which they stand in the file."""
    here = {"target": f"sm_{capability}"}
    counted: dict[Count, dict[str, str]] = defaultdict(dict)
    programs = {}
    for row in read_csv(RESULTS / "kernel_trips.csv"):
        counted[count_of(row)][row["region"]] = row["entries"]
        programs[count_of(row)] = int(row["programs"])
    known = {count_of(row): row["ptx"] for row in before(path) if here.items() <= row.items() and not anew}
    wanted = [[*key, programs[key], known.get(key, "")] for key in counted]
    for row in child("emulated_trips.py", capability, [], wanted):
        key = count_of(row)
        if not row.get("known"):
            shared = here | dict(zip(COUNTS, key, strict=True))
            shared |= {"programs": row["programs"], "ptx": row["ptx"]}
            rows = [
                shared | {"region": region, "counted": float(counted[key][region]), "executed": executed}
                for region, executed in row["entries"].items()
            ]
            replace_rows(
                path, rows, lambda old, key=key: here.items() <= old.items() and count_of(old) == key
            )
            print(*here.values(), *key, flush=True)
    replace_rows(path, [], lambda old: here.items() <= old.items() and count_of(old) not in counted)


def count_of(row: Mapping[str, Any]) -> Count:
    """What a row of trips counts."""
    return row["trips"], int(row["m"]), int(row["blocks"]), row["distribution"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS, help="compute capabilities")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[], metavar="M", help="of blocks (all)")
    parser.add_argument("--variants", nargs="+", default=[], metavar="VARIANT", help="of kernels (all)")
    parser.add_argument("--trips", action="store_true", help="count trips, of float32, in place of the rest")
    parser.add_argument("--anew", action="store_true", help="execute what has a row, too")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the files are")
    arguments = parser.parse_args()
    chosen = [*map(str, arguments.sizes), *arguments.variants]
    faults = 0
    if arguments.trips:
        for capability in arguments.targets:
            count(arguments.folder / "emulator_trips.csv", capability, anew=arguments.anew)
    else:
        for dtype in arguments.dtypes:
            for capability in arguments.targets:
                path = arguments.folder / "emulator.csv"
                faults += survey(path, capability, dtype, chosen, anew=arguments.anew)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
