"""Loops and branches of the kernels' sources, and the machine code that belongs to each.

A *region* is a function, or the body of a loop or of an ``if`` in it, named by its path:
``augment.while1.if1`` is the first ``if`` of the first ``while`` of ``augment``. :func:`counting` counts how
often the interpreter enters each; :func:`phases` tells which instructions are executed once per entry.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kernel_costs import sass

LOOPS = (ast.For, ast.While)
_ENTER = "__enter_region"
_STAY = ("SHFL", "LDG", "STG", "LDS", "STS", "BAR", "shfl", "ld", "st", "bar")
"""Instructions of SASS and PTX that are seldom moved out of a loop."""
_COPIES = ("MOV", "UMOV", "CS2R", "mov")
"""Those that bring a loop its first values, zeros among them, in the lines of the loop."""


class SourceRegion(NamedTuple):
    """Lines ``first`` to ``last`` of a file.

    ``calls`` are the functions called there, not further inside. ``by_ones`` tells of a loop that it counts
    its turns.
    """

    name: str
    parent: str | None
    first: int
    last: int
    loop: bool
    calls: tuple[str, ...]
    by_ones: bool


def _bodies(statement: ast.stmt) -> Iterator[tuple[str, list[ast.stmt]]]:
    """The bodies that a statement executes as often as is decided at run time.

    Not those of ``static_range``, of which the machine code holds a copy for each turn.
    """
    if isinstance(statement, ast.For) and "static_range" in ast.unparse(statement.iter):
        return
    if isinstance(statement, LOOPS):
        yield type(statement).__name__.lower(), statement.body
    elif isinstance(statement, ast.If):
        yield "if", statement.body
        if statement.orelse:
            yield "else", statement.orelse


def _walk(
    function: str, body: list[ast.stmt]
) -> Iterator[tuple[str, str | None, list[ast.stmt], ast.stmt | None]]:
    """(name, parent, body, the loop if it is one) of a function and all regions in it."""
    yield function, None, body, None
    todo = [(function, body)]
    while todo:
        parent, statements = todo.pop(0)
        seen: Counter[str] = Counter()
        for statement in statements:
            for kind, inner in _bodies(statement):
                seen[kind] += 1
                name = f"{parent}.{kind}{seen[kind]}"
                yield name, parent, inner, statement if isinstance(statement, LOOPS) else None
                todo.append((name, inner))


def _calls(body: list[ast.stmt]) -> tuple[str, ...]:
    """Names called in a body but not in its loops and branches (their conditions count)."""
    todo: list[ast.AST] = list(body)
    names = []
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names.append(node.func.id)
        if isinstance(node, ast.stmt):
            inner = {id(line) for _, lines in _bodies(node) for line in lines}
            todo += [child for child in ast.iter_child_nodes(node) if id(child) not in inner]
        else:
            todo += ast.iter_child_nodes(node)
    return tuple(names)


def _by_ones(loop: ast.stmt | None) -> bool:
    """Whether it is ``for ... in range(stop)``."""
    over = loop.iter if isinstance(loop, ast.For) else None
    return isinstance(over, ast.Call) and ast.unparse(over.func) == "range" and len(over.args) == 1


def read(source: str) -> list[SourceRegion]:
    """All regions of a file."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            for name, parent, body, loop in _walk(node.name, node.body):
                last = max(getattr(line, "end_lineno", 0) or 0 for line in body)
                first = (loop or body[0]).lineno
                calls, by_ones = _calls(body), _by_ones(loop)
                found.append(SourceRegion(name, parent, first, last, loop is not None, calls, by_ones))
    return found


class Sources:
    """The regions of some kernel files, and from where the functions in them are called."""

    def __init__(self, files: Iterable[Path], entry: str) -> None:
        self.entry = entry
        self.regions: dict[str, SourceRegion] = {}
        self._of_file: dict[str, list[SourceRegion]] = {}
        for file in files:
            regions = read(file.read_text(encoding="utf-8"))
            self._of_file[file.name] = regions
            self.regions.update({region.name: region for region in regions})
        self._callers: dict[str, set[str]] = defaultdict(set)
        todo, seen = [entry], {entry}
        while todo:
            function = todo.pop()
            for region in self.regions.values():
                if region.name.partition(".")[0] == function:
                    for callee in set(region.calls) & set(self.regions):
                        self._callers[callee].add(region.name)
                        if callee not in seen:
                            seen.add(callee)
                            todo.append(callee)

    def at(self, file: str, line: int) -> str | None:
        """The innermost region that holds a line."""
        inside = [r for r in self._of_file.get(Path(file).name, ()) if r.first <= line <= r.last]
        return min(inside, key=lambda r: r.last - r.first).name if inside else None

    def chain(self, name: str) -> tuple[str, ...] | None:
        """The region and all around it up to the kernel, through the one place that calls each function.

        None for a function that is called from more than one place, as most helpers are.
        """
        path = []
        here: str | None = name
        while here is not None:
            path.append(here)
            region = self.regions[here]
            if region.parent is not None:
                here = region.parent
            elif here == self.entry:
                return tuple(path)
            else:
                places = self._callers.get(here, set())
                if len(places) != 1:
                    return None
                (here,) = places
        return None

    def depth(self, loop: str) -> int:
        """How many loops lie one in the other, from this one on."""
        chains = [chain for name in self.regions if (chain := self.chain(name)) and loop in chain]
        return max(
            sum(self.regions[name].loop for name in chain[: chain.index(loop) + 1]) for chain in chains
        )


def phases(code: list[sass.Instruction], sources: Sources) -> dict[str, dict[str, Any]]:
    """Instructions by region: those executed once for so many ``turns`` of it, and whether it is ``peeled``.

    A subroutine is executed where it is called, so its instructions are of the region there.

    Raises ValueError where loops of the machine code are not those of the source, and where a block is of no
    region.
    """
    blocks = sass.basic_blocks(code)
    loops = sass.natural_loops(blocks)
    innermost = sass.innermost(loops)
    region_of = regions_of_loops(code, blocks, loops, sources)
    lines: dict[str, list[sass.Instruction]] = defaultdict(list)
    left = sass.reachable(blocks) - sass.slow_divisions(code, blocks)
    for run in sass.straight_runs(blocks):
        name = region_of_run(code, [blocks[b] for b in run], region_of[innermost.get(run[0])], sources)
        for b in left.intersection(run):
            left.remove(b)
            for line in code[blocks[b].first : blocks[b].last]:
                lines[name] += [line, *(sass.subroutine(code, line) if sass.returns(line) else ())]
    if left:
        where = ", ".join(f"{code[blocks[b].first].address:#x}" for b in sorted(left))
        raise ValueError(f"the blocks at {where} are of no region")
    turns = turns_of_loops(code, blocks, loops, region_of, sources)
    peeled = peeled_loops(code, blocks, loops, region_of, sources, turns)
    return {
        name: sass.count(found) | {"peeled": name in peeled, "turns": turns.get(_loop_of(name, sources), 1)}
        for name, found in lines.items()
    }


def _loop_of(name: str, sources: Sources) -> str:
    """The loop that is a region or is around it; the kernel if none is."""
    chain = sources.chain(name) or ()
    return next((here for here in chain if sources.regions[here].loop), sources.entry)


def turns_of_loops(
    code: list[sass.Instruction],
    blocks: list[sass.Block],
    loops: list[sass.Loop],
    region_of: Mapping[int | None, str],
    sources: Sources,
) -> dict[str, int]:
    """Loops of which the machine code makes several turns at a time, and how many.

    By that number it adds to the counter, where a turn of the source adds 1. Raises ValueError where numbers
    are added in the line of a loop, but none to what becomes the counter of the next turn.
    """
    turns = {}
    for k, loop in enumerate(loops):
        region = sources.regions[region_of[k]]
        if not region.by_ones:
            continue
        lines = [line for b in loop.body for line in code[blocks[b].first : blocks[b].last]]
        here = [x for x in lines if x.source[1] == region.first and sources.at(*x.source) == region.name]
        added = [found for line in here if (found := sass.added(line)) is not None]
        steps = {number for number, again in added if again}
        if len(steps) > 1 or (not steps and len({number for number, _ in added}) > 1):
            raise ValueError(f"{region.name} adds {sorted(added)} to its counter: unrolled?")
        if steps - {1}:
            turns[region.name] = steps.pop()
    return turns


def peeled_loops(
    code: list[sass.Instruction],
    blocks: list[sass.Block],
    loops: list[sass.Loop],
    region_of: Mapping[int | None, str],
    sources: Sources,
    turns: Mapping[str, int],
) -> set[str]:
    """The loops whose first turn the compiler has put before the loop, so that it makes one less.

    Of these over half of a turn is there twice, also of what lanes exchange, loads and stores; of others no
    more than what was moved out of them, which may be much, but seldom the latter. Copies are no work, and
    the line of a ``for`` is no part of a turn: tiles that the loop takes in may be said to come from there.

    What functions do that are called from elsewhere, too, cannot be told apart. A loop of which that is more
    than three quarters counts as one that is there once.
    """
    innermost = sass.innermost(loops)
    inside: Counter[tuple[str, bool]] = Counter()
    before: Counter[tuple[str, bool]] = Counter()
    whole: Counter[str] = Counter()
    loop_around = {region_of[k]: region_of[loop.parent] for k, loop in enumerate(loops)}
    for b in sass.reachable(blocks):
        here = region_of[innermost.get(b)]
        for line in code[blocks[b].first : blocks[b].last]:
            if line.name.startswith(_COPIES):
                continue
            whole[here] += 1
            region = sources.at(*line.source)
            for name in (sources.chain(region) if region else None) or ():
                key = name, line.name.startswith(_STAY)
                inside[key] += name == here
                header = name == region and ".for" in name and line.source[1] == sources.regions[name].first
                before[key] += loop_around.get(name) == here and not header
    return {
        name
        for name in loop_around
        if 4 * (inside[name, True] + inside[name, False]) >= whole[name]
        and 2 * turns.get(name, 1) * before[name, True] >= inside[name, True]
        and 2 * turns.get(name, 1) * (before[name, True] + before[name, False])
        > inside[name, True] + inside[name, False]
    }


def regions_of_loops(
    code: list[sass.Instruction], blocks: list[sass.Block], loops: list[sass.Loop], sources: Sources
) -> dict[int | None, str]:
    """Number of a loop of the code (None: outside of all) -> its region.

    A loop of the code belongs to the loop of the source that most of its instructions come from, of those
    that hold as many loops; the compiler may have moved some of them in or out, such as the first turn of an
    inner loop. Raises ValueError where the two do not nest alike or a loop is there twice (unrolled with a
    remainder).
    """
    innermost = sass.innermost(loops)
    depths = [1] * len(loops)
    for k in reversed(range(len(loops))):  # inner ones come last
        if (parent := loops[k].parent) is not None:
            depths[parent] = max(depths[parent], depths[k] + 1)
    depth_of = {
        name: sources.depth(name)
        for name, region in sources.regions.items()
        if region.loop and sources.chain(name)
    }
    region_of: dict[int | None, str] = {None: sources.entry}
    for k, loop in enumerate(loops):
        tally: Counter[str] = Counter()
        for b in loop.body:
            if innermost[b] == k:
                for chain, n in _chains(code, blocks[b], sources, copies=False).items():
                    holding = (name for name in chain if depth_of.get(name, 0) >= depths[k])
                    tally[next(holding, sources.entry)] += n
        around = region_of[loop.parent]
        candidates = [
            (n, name) for name, n in tally.items() if name != around and around in (sources.chain(name) or ())
        ]
        if not candidates:
            raise ValueError(
                f"the loop at {code[blocks[loop.head].first].address:#x} is none of the source's inside "
                f"{around}: its lines are of {dict(tally)}"
            )
        name = max(candidates)[1]
        if name in region_of.values():
            raise ValueError(f"{name} is there twice: unrolled with a remainder?")
        region_of[k] = name
    return region_of


def region_of_run(code: list[sass.Instruction], run: list[sass.Block], around: str, sources: Sources) -> str:
    """The region that most instructions of a run are of: the loop ``around`` it, or an ``if`` in that."""
    tally = tally_of_run(code, run, around, sources)
    return max(tally, key=lambda name: (tally[name], name)) if tally else around


def tally_of_run(
    code: list[sass.Instruction], run: list[sass.Block], around: str, sources: Sources
) -> Counter[str]:
    """How many instructions of a run are of the loop ``around`` it, and of each ``if`` in that.

    What the compiler has moved out of an inner loop is of what is around that loop, also if it comes from a
    branch in the loop.
    """
    tally: Counter[str] = Counter()
    for block in run:
        for chain, n in _chains(code, block, sources).items():
            inside = reversed(chain[: chain.index(around)]) if around in chain else ()
            outside_loops = itertools.takewhile(lambda name: not sources.regions[name].loop, inside)
            branches = [name for name in outside_loops if _branch(sources.regions[name])]
            tally[branches[-1] if branches else around] += n
    return tally


def _chains(
    code: list[sass.Instruction], block: sass.Block, sources: Sources, *, copies: bool = True
) -> Counter[tuple[str, ...]]:
    """How many instructions of a block come from where; all, or those that are no copies."""
    found: Counter[tuple[str, ...]] = Counter()
    for line in code[block.first : block.last]:
        if not copies and line.name.startswith(_COPIES):
            continue
        region = sources.at(*line.source)
        if chain := sources.chain(region) if region else None:
            found[chain] += 1
    return found


def _branch(region: SourceRegion) -> bool:
    return region.parent is not None and not region.loop


@contextlib.contextmanager
def counting(sources: Sources) -> Iterator[Counter[str]]:
    """Count entries of all regions while the interpreter runs; its functions are instrumented for good."""
    from triton.runtime import interpreter

    entered: Counter[str] = Counter()
    original = interpreter.FunctionRewriter._transform_ast

    def transform(self: Any, source: str) -> Any:
        tree = original(self, source)
        function = tree.body[0]
        if function.name in sources.regions:
            for name, _, body, _ in list(_walk(function.name, function.body)):
                enter = ast.Expr(ast.Call(ast.Name(_ENTER, ast.Load()), [ast.Constant(name)], []))
                body.insert(0, ast.fix_missing_locations(ast.copy_location(enter, body[0])))
        return tree

    def enter(name: str) -> None:
        entered[name] += 1

    setattr(builtins, _ENTER, enter)
    interpreter.FunctionRewriter._transform_ast = transform
    interpreter.InterpretedFunction.rewritten_fn.clear()
    try:
        yield entered
    finally:
        interpreter.FunctionRewriter._transform_ast = original
        interpreter.InterpretedFunction.rewritten_fn.clear()
        delattr(builtins, _ENTER)
