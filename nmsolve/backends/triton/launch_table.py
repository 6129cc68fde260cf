"""Launch tables in files: what ``nmsolve bench --tune`` writes and ``NMSOLVE_LAUNCH_TABLE`` asks for.

A table replaces entries of the one that ships with the Triton kernels (kernels/_launch.py); sizes that it
does not list keep theirs. It is read once, when the Triton backend is first used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nmsolve.errors import NMSolveError
from nmsolve.files import read_json, write_text
from nmsolve.kernels._launch import KERNELS, SIZES

__all__ = [
    "ENVIRONMENT",
    "KERNELS",
    "SIZES",
    "Entry",
    "asked_for",
    "check_entry",
    "default_path",
    "load",
    "save",
]

ENVIRONMENT = "NMSOLVE_LAUNCH_TABLE"
FORMAT = "nmsolve-launch-table"
VERSION = 1

Entry = tuple[int, int, int, int, int]
"""(size, rows_in, cols_in, blocks, warps), see :class:`nmsolve.kernels._launch.Tile`."""


def default_path() -> Path:
    """Where ``nmsolve bench --tune`` writes unless told otherwise.

    Raises
    ------
    NMSolveError
        If there is no home folder, as for a user that the system does not know.
    """
    try:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    except RuntimeError as error:
        raise NMSolveError(f"out: expected a file to write to: there is no home folder ({error})") from None
    return folder / "nmsolve" / "launch_table.json"


def check_entry(kernel: str, entry: object) -> Entry:
    """The entry, once it is certain that the kernel can run it.

    Raises
    ------
    NMSolveError
        If the kernel or the size is unknown, or the tile does not fill its warps' lanes exactly.

    Examples
    --------
    >>> check_entry("exact", [16, 8, 4, 4, 1])
    (16, 8, 4, 4, 1)
    """
    if kernel not in KERNELS:
        raise NMSolveError(f"launch table: expected kernels {', '.join(KERNELS)}, got {kernel!r}")
    if not (
        isinstance(entry, list | tuple)
        and len(entry) == 5
        and all(type(number) is int and number > 0 and number & (number - 1) == 0 for number in entry)
    ):
        raise NMSolveError(
            f"launch table: {kernel}: expected five powers of two (size, rows_in, cols_in, blocks, warps), "
            f"got {entry!r}"
        )
    size, rows_in, cols_in, blocks, warps = entry
    if size not in SIZES:
        raise NMSolveError(f"launch table: {kernel}: expected a size of {SIZES}, got {size}")
    if rows_in > size or not 4 <= cols_in <= size:
        raise NMSolveError(
            f"launch table: {kernel} of size {size}: expected rows_in up to {size} and cols_in of 4 to "
            f"{size}, got {rows_in} and {cols_in}"
        )
    lanes = (size // rows_in) * (size // cols_in) * blocks
    if lanes != 32 * warps:
        raise NMSolveError(
            f"launch table: {kernel} of size {size}: expected blocks that fill {warps} warps = {32 * warps} "
            f"lanes, got {lanes} lanes"
        )
    return size, rows_in, cols_in, blocks, warps


def load(path: Path) -> dict[tuple[str, int], Entry]:
    """Entries of a file by kernel and size.

    Raises
    ------
    NMSolveError
        If there is no such file or it holds no launch table.
    """
    try:
        data = read_json(path)
    except OSError as error:
        raise NMSolveError(f"launch table: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise NMSolveError(f"launch table: {path} is not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("format_version") != VERSION:
        raise NMSolveError(f"launch table: {path} is none: expected format {FORMAT!r}, version {VERSION}")
    tiles = data.get("tiles")
    if not isinstance(tiles, dict) or not all(isinstance(entries, list) for entries in tiles.values()):
        raise NMSolveError(f"launch table: {path}: expected 'tiles' to map each kernel to a list of entries")
    checked = [(kernel, check_entry(kernel, entry)) for kernel, entries in tiles.items() for entry in entries]
    return {(kernel, entry[0]): entry for kernel, entry in checked}


def asked_for() -> dict[tuple[str, int], Entry]:
    """The table that the environment asks for; empty if it asks for none."""
    path = os.environ.get(ENVIRONMENT)
    return load(Path(path)) if path else {}


def save(path: Path, entries: Mapping[tuple[str, int], Entry], measured: Mapping[str, Any]) -> None:
    """Write a table; the file appears whole or not at all. ``measured`` says where, for the reader."""
    tiles: dict[str, list[Entry]] = {kernel: [] for kernel in KERNELS}
    for (kernel, _), entry in sorted(entries.items()):
        tiles[kernel].append(check_entry(kernel, entry))
    data = {"format": FORMAT, "format_version": VERSION, **measured, "tiles": tiles}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(data, indent=2) + "\n")
