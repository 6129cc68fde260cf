"""Each variant of each kernel on one small case, beside the float64 oracle: a line of JSON for each.

    TRITON_INTERPRET=1 python tests/emulator/compared_variants.py [VARIANT ...]
    NMSOLVE_PTX_SM=90 python tests/emulator/compared_variants.py [VARIANT ...]

in the interpreter, or executed from PTX. ``outcome`` is "agrees", or what went wrong.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS.parent / "bench")]

import plain_checkout  # noqa: E402
import torch  # noqa: E402

plain_checkout.arrange()
torch.set_num_threads(1)
if capability := os.environ.get("NMSOLVE_PTX_SM"):
    import emulator

    emulator.install(int(capability))
else:
    from kernel_costs import interpreter

    interpreter.install()
    os.environ["NMSOLVE_PTX_SM"] = "0"  # the variants are compared here, not only executed

from emulated_variants import VARIANTS  # noqa: E402


def main() -> None:
    for name in sys.argv[1:] or VARIANTS:
        variant = VARIANTS[name]
        m = 16 if 16 in variant.sizes else variant.sizes[0]
        try:
            _, difference = variant.differ(m, torch.float32)
            allowed = variant.within(torch.float32)
            outcome = "agrees" if difference <= allowed else f"differs by {difference:.2g}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        row = {"variant": name, "kernel": variant.kernel, "m": m, "outcome": outcome}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
