"""Runs a script of bench/ with the emulator of PTX in place of a GPU: ``python on_emulator.py 90 NAME ...``.

For rehearsals of what is meant for a machine with a GPU. Kernels are compiled for the target and executed on
CPU tensors.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    capability, name, *arguments = sys.argv[1:]
    sys.path[:0] = [str(ROOT / "bench"), str(ROOT.joinpath("tests", "support"))]
    os.environ.pop("TRITON_INTERPRET", None)
    import emulator
    import plain_checkout

    plain_checkout.arrange()
    emulator.install(int(capability))
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
