"""Variants of kernels executed from PTX, one line of JSON for each as soon as it is known.

    NMSOLVE_PTX_SM=90 python tests/emulator/emulated_rows.py float32 [M ...] [VARIANT ...] < known

``known`` has lines of JSON, ``[variant, m, digest of its PTX]``: what the compiler still writes so is not
executed again. A line of the output is a row of :func:`emulated_variants.measured`, or an error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent / "bench")]

import emulator  # noqa: E402
import plain_checkout  # noqa: E402
import torch  # noqa: E402

plain_checkout.arrange()
emulator.install(int(os.environ["NMSOLVE_PTX_SM"]))
torch.set_num_threads(1)

import emulated_variants  # noqa: E402
from emulated_variants import SIZES, VARIANTS  # noqa: E402


def rows(
    dtype: torch.dtype, chosen: list[int], names: list[str], known: dict[tuple[str, int], str]
) -> Iterator[dict[str, Any]]:
    """Of the variants (all): shipped sizes, in float32 those between them as well, or those ``chosen``."""
    for name, variant in VARIANTS.items():
        if dtype not in variant.dtypes or name not in (names or VARIANTS):
            continue
        for m in variant.sizes:
            if m not in (chosen or (variant.sizes if dtype == torch.float32 else SIZES)):
                continue
            row = {"variant": name, "m": m}
            emulator.SETTINGS.known = variant.kernel, known.get((name, m), "")
            try:
                found = emulated_variants.measured(name, m, dtype)
            except emulator.KnownError:
                yield row | {"known": True}
                continue
            except (emulator.PtxError, AssertionError) as error:
                yield row | {"error": f"{type(error).__name__}: {error}"}
                continue
            if not found["worst_difference"] <= found["allowed_difference"]:
                found["error"] = "differs by {worst_difference}, not {allowed_difference}".format(**found)
            yield found


def main() -> None:
    known = {(name, m): digest for name, m, digest in map(json.loads, sys.stdin)}
    sizes = [int(word) for word in sys.argv[2:] if word.isdecimal()]
    names = [word for word in sys.argv[2:] if not word.isdecimal()]
    for row in rows(getattr(torch, sys.argv[1]), sizes, names, known):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
