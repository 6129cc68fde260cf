"""Runs a benchmark by its name, from any folder: ``python bench speed_cpu``, ``python bench tables --check``.

Without a name it lists what there is. Each script and each folder with a ``__main__.py`` answers one
question; Python puts bench/ on the path, so that they find what they share. From a plain checkout nmsolve is
found beside bench/.
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import plain_checkout

BENCH = Path(__file__).resolve().parent


def questions() -> dict[str, str]:
    """Name -> the first line of its docstring, for all that can be run."""
    files = {file.stem: file for file in BENCH.glob("*.py") if file.name != "__main__.py"}
    files |= {file.parent.name: file for file in BENCH.glob("*/__main__.py")}
    found = {}
    for name, file in sorted(files.items()):
        source = file.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in source:
            found[name] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> int:
    found = questions()
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in found:
        lines = [f"{known:<16} {question}" for known, question in found.items()]
        print("usage: python bench NAME ...", *lines, sep="\n", file=sys.stderr if name else sys.stdout)
        return 2 if name else 0
    del sys.argv[0]
    plain_checkout.arrange()
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
