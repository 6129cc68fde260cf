"""Does the emulator notice what it should? PTX of our kernels, changed on purpose, one line at a time.

Run with NMSOLVE_PTX_SM, as emulated_variants.py is. A change is noticed if the launch is refused or its
result is another; what survives is listed with the reason why it alters nothing that can be seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import emulator
import oracles
import pytest
import torch
from emulator import driver
from torch import Tensor

import nmsolve
from nmsolve.backends.triton import masks as gpu
from nmsolve.pattern import NMPattern


def exact() -> list[Tensor]:
    """Full blocks of 16, four in each warp: so many that paths go over every column that a lane holds."""
    scores = oracles.sample("normal", (1, 16, 1024), seed=3)
    return list(gpu.exact(scores, NMPattern(8, 16), want_solution=True))


def edge() -> list[Tensor]:
    """Partial blocks."""
    scores = oracles.sample("normal", (1, 15, 30), seed=3)
    return [gpu.exact(scores, NMPattern(8, 16)).mask]


def norm() -> list[Tensor]:
    """Whole rows by four warps, the last of which has lanes left over."""
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1))
    order = torch.arange(999, -1, -1)
    return [nmsolve.rms_norm_permute(x, torch.ones(1000), order, backend="triton")]


def sinkhorn() -> list[Tensor]:
    """Blocks of 64 by two warps, with marginals that differ."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 64, 64, generator=generator)
    rows = 0.5 + torch.rand(2, 64, generator=generator)
    cols = rows.flip(1)
    plan = nmsolve.sinkhorn(logits, 0.4, 4, row_marginals=rows, col_marginals=cols, backend="triton")
    return [plan]


class Mutation(NamedTuple):
    """Of the executed lines that match ``pattern``, the one this far (0 to 1) through becomes ``changed``."""

    what: str
    launch: Callable[[], list[Tensor]]
    pattern: str
    changed: str
    far: float


BARRIER = r"(bar\.sync)\s+0;"
WARP_BARRIER = r"(bar\.warp\.sync)\s+-1;"
BUTTERFLY = r"(shfl\.sync\.bfly\.b32\s+\S+, \S+), (\d+), 31, -1;"
LOAD = r"(ld\.global\.\S+\s+.*\[ %rd\d+) \+ 0 \];"
STORE = r"(st\.global\.\S+\s+\[ %rd\d+) \+ 0 \], (.*);"
WHOLE_STORE = r"(?:@!?%p\d+ )?" + STORE
SHARED_LOAD = r"(ld\.shared\.\S+\s+.*\[\s*%r\d+)(?:\s*\+ 0)?\s*\];"
SHARED_STORE = r"(st\.shared\.\S+\s+\[\s*%r\d+)(?:\s*\+ 0)?\s*\], (.*);"
BRANCH = r"@(%p\d+) bra\s"


def at(
    what: str, launches: list[Callable[[], list[Tensor]]], pattern: str, changed: str, *far: float
) -> list[Mutation]:
    return [Mutation(what, launch, pattern, changed, place) for launch in launches for place in far]


MUTATIONS = [
    *at("barrier out", [norm], BARRIER, "", 0, 0.35, 0.7, 1),
    *at("barrier out", [sinkhorn], BARRIER, "", 0, 0.2, 0.4, 0.6, 0.8, 1),
    *at("barrier out", [exact], BARRIER, "", 0, 1),
    *at("barrier of a warp out", [exact], WARP_BARRIER, "", 0, 0.5, 1),
    *at("other distance", [exact], BUTTERFLY, r"\1, 3, 31, -1;", 0, 0.3, 0.6, 0.9),
    *at("other distance", [norm], BUTTERFLY, r"\1, 5, 31, -1;", 0, 0.5, 1),
    *at("no distance", [sinkhorn], BUTTERFLY, r"\1, 0, 31, -1;", 0.1, 0.5),
    *at("half of the lanes", [exact, norm], BUTTERFLY, r"\1, \2, 31, 65535;", 0.5),
    *at("parts of a warp", [exact, norm], BUTTERFLY, r"\1, \2, 7199, -1;", 0.5),
    *at("predicate dropped", [norm], r"@%p\d+ " + LOAD, r"\1 + 0 ];", 0.22, 0.5, 0.9),
    *at("predicate dropped", [norm, edge], r"@%p\d+ " + STORE, r"\1 + 0 ], \2;", 1),
    *at("predicate dropped", [edge], r"@%p\d+ " + STORE, r"\1 + 0 ], \2;", 0.6),
    *at("predicate turned", [edge], r"@(%p\d+) " + STORE, r"@!\1 \2 + 0 ], \3;", 0, 0.9),
    *at("branch turned", [exact, sinkhorn], BRANCH, r"@!\1 bra ", 0, 0.4, 0.8),
    *at("load beside", [exact], LOAD, r"\1 + 4 ];", 0, 0.5, 0.9),
    *at("load misaligned", [exact, norm], LOAD, r"\1 + 2 ];", 0.1),
    *at("store beside", [exact], STORE, r"\1 + 4 ], \2;", 0, 0.5, 1),
    *at("stored there and beside", [exact], WHOLE_STORE, r"\g<0> \1 + 8 ], \2;", 0, 0.5),
    *at("stored twice", [exact], WHOLE_STORE, r"\g<0> \g<0>", 0, 0.5),
    *at("store out", [exact, edge, norm], WHOLE_STORE, "", 0.5),
    *at("shared load beside", [norm, sinkhorn], SHARED_LOAD, r"\1 + 16 ];", 0),
    *at("shared store beside", [norm, sinkhorn], SHARED_STORE, r"\1 + 16 ], \2;", 0),
    *at("shared store out", [norm, sinkhorn, exact], r"(?:@!?%p\d+ )?" + SHARED_STORE, "", 0, 1),
]

SURVIVE = {
    "other distance-exact-0": "the peak of half a block, rounded up to a power of two, is that of the block",
    "branch turned-exact-0": "chooses between divisions of 32 and of 64 bits, which give the same",
    "branch turned-exact-0.8": "chooses between divisions of 32 and of 64 bits, which give the same",
    "predicate dropped-norm-0.5": "the lanes left over read the row's first entry, and nobody what they read",
    "predicate dropped-norm-0.9": "the lanes left over read the first weight, and nobody what they read",
    "stored twice-exact-0": "one value, stored twice by its thread",
    "stored twice-exact-0.5": "one value, stored twice by its thread",
}
"""Name of a mutation -> why it cannot be seen."""


def changed(mutation: Mutation, text: str, executed: set[str]) -> str:
    """The PTX with the mutation; ``executed`` are its instructions that some warp reached."""
    places = []
    for place in re.finditer(mutation.pattern, text):
        line = text[text.rfind("\n", 0, place.start()) + 1 : text.index("\n", place.end())]
        if line.strip().rstrip(";") in executed:
            places.append(place)
    assert places, mutation
    place = places[round(mutation.far * (len(places) - 1))]
    return text[: place.start()] + place.expand(mutation.changed) + text[place.end() :]


def text_of(launch: emulator.Launch) -> str:
    return next(text for (text, _), kernel in driver._KERNELS.items() if kernel is launch.kernel)


def outcome(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> str:
    """Nothing for a result like that of the PTX as it is, or what is wrong with it."""
    emulator.LAUNCHES.clear()
    expected = mutation.launch()
    (launch,) = emulator.LAUNCHES
    blocks = launch.kernel.program.blocks
    executed = {instruction.text for block in launch.entered for instruction in blocks[block]}
    monkeypatch.setattr(emulator.SETTINGS, "most_steps", 20_000)
    mutated = emulator.Kernel(changed(mutation, text_of(launch), executed))  # an error if it is not PTX
    monkeypatch.setattr(driver, "kernel_of", lambda text: mutated)
    try:
        found = mutation.launch()
    except emulator.PtxError as error:
        return str(error).partition("\n")[0]
    same = all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    return "" if same else "another result"


def name(mutation: Mutation) -> str:
    return f"{mutation.what}-{mutation.launch.__name__}-{mutation.far}"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=name)
def test_a_change_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of the list, and none of the list."""
    assert bool(outcome(mutation, monkeypatch)) != (name(mutation) in SURVIVE)


def test_the_list_is_of_mutations_that_are_there() -> None:
    names = [name(mutation) for mutation in MUTATIONS]
    assert len(set(names)) == len(names)
    assert set(SURVIVE) <= set(names)
    assert len(names) - len(SURVIVE) >= 30
