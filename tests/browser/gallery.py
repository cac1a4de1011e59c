"""A saved notebook with every display."""

from __future__ import annotations

from pathlib import Path

import nbformat

from tests.display.registry import every_object


def write_gallery(path: Path) -> int:
    """A notebook with every object as it was shown when the notebook was saved. Returns the number of cells."""
    cells = []
    for name, shown in every_object().items():
        data = {"text/plain": repr(shown), "text/html": shown._repr_html_()}
        output = nbformat.v4.new_output("execute_result", data, execution_count=1)
        cells.append(nbformat.v4.new_code_cell(f"# {name}", execution_count=1, outputs=[output]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return len(cells)


KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}  # without it JupyterLab asks for a kernel in a dialog
