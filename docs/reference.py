"""Writes the API reference, pages of HTML made from the docstrings by pdoc: python docs/reference.py FOLDER.

It has what users import: the public names of nmsolve and of the packages below, and the adapters of
nmsolve.integrations whose client is installed. Modules inside these packages may change and are not in it.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from pathlib import Path

import pdoc

import nmsolve.integrations
from nmsolve.integrations.client import MissingClientError

PACKAGES = (
    "nmsolve",
    "nmsolve.checkpoint",
    "nmsolve.prune",
    "nmsolve.train",
    "nmsolve.permute",
    "nmsolve.integrations",
)


def adapters() -> list[str]:
    """The modules of nmsolve.integrations that can be imported here; the others as exceptions, for pdoc."""
    found = []
    for module in pkgutil.iter_modules(nmsolve.integrations.__path__, "nmsolve.integrations."):
        try:
            importlib.import_module(module.name)
        except MissingClientError as error:
            print(f"left out: {module.name}: {error}", file=sys.stderr)
            found.append(f"!{module.name}")
        else:
            found.append(module.name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the pages go")
    folder = parser.parse_args().folder
    pdoc.render.configure(docformat="numpy", footer_text=f"nmsolve {nmsolve.__version__}")
    pdoc.pdoc(*PACKAGES, *adapters(), output_directory=folder)
    print(f"wrote {folder / 'index.html'}")


if __name__ == "__main__":
    main()
