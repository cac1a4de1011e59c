"""Runs tutorials and keeps their outputs: `python notebooks/refresh.py [NOTEBOOK …]`, all of them by default.

Each runs in an empty temporary directory, and the paths below that are written as relative ones: no path of this
machine gets into an output.
"""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
_TIMEOUT = 300  # seconds for one cell


def run(path: Path, directory: Path) -> Any:
    """The notebook as it is after all its cells have run in the directory. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(directory)}},
        record_timing=False,
        coalesce_streams=True,  # else it is chance how many pieces a print comes in
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell["outputs"] = without_paths([one for one in cell["outputs"] if not _is_widget(one)], directory)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}  # not the patch version of whoever ran it last
    notebook.metadata["written_with"] = {package: version(package) for package in ("torch", "transformers")}
    return notebook


def _is_widget(output: Any) -> bool:
    """Whether it is a progress bar: what is left of one in a file is dead, and there or not by chance."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def without_paths(value: Any, directory: Path) -> Any:
    """Outputs in which absolute paths below the directory are relative to it."""
    if isinstance(value, str):
        return value.replace(f"{directory}{os.sep}", "").replace(str(directory), ".")
    if isinstance(value, list):
        return [without_paths(item, directory) for item in value]
    if isinstance(value, dict):
        return nbformat.from_dict({key: without_paths(item, directory) for key, item in value.items()})
    return value


def main(paths: list[str]) -> int:
    for path in [Path(name).resolve() for name in paths] or sorted(HERE.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as directory:
            nbformat.write(run(path, Path(directory).resolve()), path)
        print(path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
