"""From a checkout that is not installed, nmsolve and nmsolve.kernels are found where they lie.

kernels/ stands beside nmsolve/ and becomes ``nmsolve.kernels`` when it is installed. Without an installation
the root of the repository serves as a second folder of the package, and its kernels/ as that module.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def arrange() -> None:
    """Changes nothing where nmsolve is installed. Imports neither torch nor triton."""
    if find_spec("nmsolve") is None:
        sys.path.append(str(ROOT))
    import nmsolve

    if find_spec("nmsolve.kernels") is None and Path(nmsolve.__file__).resolve().parent == ROOT / "nmsolve":
        nmsolve.__path__.append(str(ROOT))
