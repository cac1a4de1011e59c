"""A directory for what the tests of a process make once, which goes when the run is over.

Workers of pytest-xdist end without Python's own clean-up, so the process that started them removes it for all.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

_NAME = "NBMERGE_TESTS_SCRATCH"


def new_directory(name: str) -> Path:
    """A new directory whose name begins so."""
    if _NAME not in os.environ:
        os.environ[_NAME] = tempfile.mkdtemp(prefix="nbmerge-tests-")  # workers inherit it
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=os.environ[_NAME]))


def remove() -> None:
    """Removes all of them."""
    shutil.rmtree(os.environ[_NAME], ignore_errors=True)
