"""The order in which blocks are executed: threads that stand further back in it go first.

Those that left a loop, or a branch, wait where it ends for those that are still inside, as a warp does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable


def execution_order(successors: list[list[int]]) -> list[int]:
    """A topological order of the blocks in which those of a loop stand together, before what follows it."""
    order: list[int] = []

    def visit(members: set[int], entry: int, head: int | None) -> None:
        """Append ``members``; edges back to ``head``, the first block of their loop, do not count."""

        def after(block: int) -> list[int]:
            return [to for to in successors[block] if to in members and to != head]

        for component in reversed(_components(members, entry, after)):
            if len(component) == 1:
                order.append(component[0])
                continue
            inside = set(component)
            entered = [to for block in members - inside for to in successors[block] if to in inside]
            first = entry if entry in inside else min(entered or component)
            visit(inside, first, first)

    visit(set(range(len(successors))), 0, None)
    return order


def _components(members: Iterable[int], entry: int, after: Callable[[int], list[int]]) -> list[list[int]]:
    """Strongly connected components, those that follow first (Tarjan's algorithm, without recursion)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    components: list[list[int]] = []
    for root in (entry, *sorted(members)):
        if root in number:
            continue
        number[root] = low[root] = len(number)
        stack.append(root)
        work = [(root, iter(after(root)))]
        while work:
            block, rest = work[-1]
            for to in rest:
                if to not in number:
                    number[to] = low[to] = len(number)
                    stack.append(to)
                    work.append((to, iter(after(to))))
                    break
                if to in stack:
                    low[block] = min(low[block], number[to])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[block])
                if low[block] == number[block]:
                    at = stack.index(block)
                    components.append(stack[at:])
                    del stack[at:]
    return components
