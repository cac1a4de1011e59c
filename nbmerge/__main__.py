"""`python -m nbmerge`."""

from __future__ import annotations

import sys

from nbmerge.cli import main

if __name__ == "__main__":
    sys.exit(main())
