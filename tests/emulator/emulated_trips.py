"""How often compiled programs enter the loops of their source: one line of JSON for each.

    NMSOLVE_PTX_SM=90 python tests/emulator/emulated_trips.py < configurations

A configuration is a line of JSON, ``[name of the counts, m, blocks per program, distribution, programs,
digest of PTX]``, as bench/kernel_costs/trips.py counts them in the interpreter: the same launches, on the
same inputs; PTX with this digest is not executed again. Loops of PTX are assigned to those of the source as
the loops of machine code are.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent / "bench")]

import emulator  # noqa: E402
import plain_checkout  # noqa: E402
import torch  # noqa: E402
from emulator.parse import Instruction, Program  # noqa: E402

plain_checkout.arrange()

from kernel_costs import costs, offline, sass, source_regions  # noqa: E402
from kernel_costs.cases import KERNELS  # noqa: E402
from kernel_costs.trips import run_programs  # noqa: E402


def as_sass(program: Program) -> list[sass.Instruction]:
    """Its instructions at addresses 0, 1, …, branches being named as machine code names them."""
    address = {}
    flat: list[tuple[int, Instruction]] = []
    for b, block in enumerate(program.blocks):
        address[b] = len(flat)
        flat += [(b, instruction) for instruction in block]
    code = []
    for k, (b, instruction) in enumerate(flat):
        source = re.match(r"([^:\s]+):(\d+)", instruction.source)
        target = address[program.successors[b][0]] if instruction.name == "bra" else None
        opcode = {"bra": "BRA", "ret": "EXIT"}.get(instruction.name, instruction.opcode)
        # Copies bring a block's values to the next one, wherever that is: they do not tell what is executed.
        line = (source[1], int(source[2])) if source and instruction.name != "mov" else ("", 0)
        code.append(sass.Instruction(k, instruction.predicate or "", opcode, "", target, line))
    return code


def entries(launch: emulator.Launch, sources: source_regions.Sources) -> dict[str, float]:
    """Region of a loop, or of a branch that is one in PTX -> mean entries per program.

    It is entered as often as the block with most of its instructions is executed: others are tests before or
    after it. If most lie in a block of another region, the compiler has merged the two, and nothing is known.
    """
    program = launch.kernel.program
    code = as_sass(program)
    blocks = sass.basic_blocks(code)
    loops = sass.natural_loops(blocks)
    region_of = source_regions.regions_of_loops(code, blocks, loops, sources)
    innermost = sass.innermost(loops)
    times, first = {}, 0
    for b, block in enumerate(program.blocks):
        times[first] = launch.entered[b]
        first += len(block)
    most: dict[str, tuple[int, sass.Block, str]] = {}
    for b in sass.reachable(blocks):
        around = region_of[innermost.get(b)]
        tally = source_regions.tally_of_run(code, [blocks[b]], around, sources)
        holder = source_regions.region_of_run(code, [blocks[b]], around, sources)
        for region, number in tally.items():
            most[region] = max(most.get(region, (0, blocks[b], "")), (number, blocks[b], holder))
    executed = {region: times[block.first] for region, (_, block, holder) in most.items() if region == holder}
    for region in source_regions.peeled_loops(code, blocks, loops, region_of, sources, {}):
        executed[region] += executed[costs.around(region, sources)]  # the first turns
    executed.pop(sources.entry, None)
    warps = launch.ctas * program.threads // 32
    return {region: number / warps for region, number in executed.items()}


def counted(name: str, m: int, blocks: int, distribution: str, programs: int, known: str) -> dict[str, Any]:
    """Mean entries of each loop and branch, of one configuration of kernel_trips.csv."""
    (compiled,) = {row.compiled for row in KERNELS.values() if row.trips == name}
    sources = offline.sources_of(compiled)
    emulator.LAUNCHES.clear()
    emulator.SETTINGS.known = sources.entry, known
    row = {"trips": name, "m": m, "blocks": blocks, "distribution": distribution}
    try:
        _, ran = run_programs(name, m, blocks, distribution, programs)
    except emulator.KnownError:
        return row | {"known": True}
    (launch,) = (run for run in emulator.LAUNCHES if run.kernel.program.name == sources.entry)
    assert launch.ctas == ran
    return row | {"programs": ran, "ptx": launch.kernel.program.digest, "entries": entries(launch, sources)}


def main() -> None:
    torch.set_num_threads(1)
    emulator.install(int(os.environ["NMSOLVE_PTX_SM"]))
    for line in sys.stdin:
        print(json.dumps(counted(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
