"""Tests see the installed package, not the folder they are started in.

``python -m pytest`` puts the current folder on the path, where ``kernels/`` would be found under that bare
name: transformers looks for a package of this name and would import it.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
