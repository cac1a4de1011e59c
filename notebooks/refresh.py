"""Runs tutorials and keeps their outputs: `python notebooks/refresh.py [NOTEBOOK …]`, all of them by default.

Each runs in an empty temporary directory, so that no path of this machine gets into an output.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
_TIMEOUT = 300  # seconds for one cell


def run(path: Path, directory: Path) -> Any:
    """The notebook as it is after all its cells have run in the directory. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    client = NotebookClient(
        notebook,
        timeout=_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        record_timing=False,
    )
    client.execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not the patch version of whoever ran it last
    return notebook


def main(paths: list[str]) -> int:
    for path in [Path(name).resolve() for name in paths] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as directory:
            nbformat.write(run(path, Path(directory)), path)
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
