"""``python -m nmsolve.cli``."""

import sys

from nmsolve.cli import main

if __name__ == "__main__":
    sys.exit(main())
