"""Writes the tables of README.md and docs/ from the result files.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``; nothing else is touched. With --check
nothing is written, and the exit code is 1 if a document does not say what the results say. The modules beside
this one make the tables: each has a dictionary ``TABLES`` of names and functions.

    python bench tables
    python bench tables --check
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable

from common import ROOT

import tables
from nmsolve.files import write_text

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- /table -->)", re.S)


def all_tables() -> dict[str, Callable[[], str]]:
    found: dict[str, Callable[[], str]] = {}
    for module in pkgutil.iter_modules(tables.__path__):
        if module.name not in ("__main__", "columns"):
            found |= importlib.import_module(f"tables.{module.name}").TABLES
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    arguments = parser.parse_args()
    made = all_tables()
    stale = []
    for document in DOCUMENTS:
        before = document.read_text(encoding="utf-8")
        after = MARKED.sub(lambda found: f"{found[1]}{made[found[2]]()}\n{found[3]}", before)
        if after != before:
            stale.append(document.relative_to(ROOT))
            if not arguments.check:
                write_text(document, after)
    for document in stale:
        print(
            f"{document}: {'differs from bench/results; run make tables' if arguments.check else 'updated'}"
        )
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
