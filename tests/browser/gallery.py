"""One of every kind of object that a notebook shows, and hostile twins of them."""

from __future__ import annotations

from pathlib import Path

import nbformat

from nbmerge.display.html import render_html
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.dtypes import BY_NAME
from nbmerge.explainer import explain
from nbmerge.loaders import LOADERS
from nbmerge.mergers import FSDPModelMerger, ModelMergerConfig
from nbmerge.tensor_stats import TensorStats
from nbmerge.validator import Validator
from tests.display.objects import checkpoint
from tests.display.test_diff_views import SHOWN as DIFFS
from tests.display.test_rendering import _ALL as MERGES
from tests.display.test_validation_views import _LOST, made, result
from tests.export.test_push_views import _REPORT as PUSHED

_STATS = TensorStats("w", (4,), BY_NAME["float32"], 4, 0, 0, 1, 1, -4.0, 1.5, -0.4, 2.1, {0: 2, 2: 1})


def every_object() -> dict[str, object]:
    """By what it is."""
    merger = FSDPModelMerger(ModelMergerConfig(local_dir="run/<img src=x onerror=alert(1)>", target_dir="out"))
    merger.checkpoint = checkpoint()
    return {
        **MERGES,
        **{f"diff {name}": shown for name, shown in DIFFS.items()},
        "explanation": explain(got=(3600, 18), expected=(3584, 18), ranks=24),
        "validation": made(result("source", *_LOST), result("running", ran=False, said="too big")),
        "validator": Validator("merged"),
        "loader": LOADERS[0],
        "merger": merger,
        "statistics": _STATS,
        "push": PUSHED,
    }


def write_gallery(path: Path) -> int:
    """A notebook with every object as it was shown when the notebook was saved. Returns the number of cells."""
    cells = []
    for name, shown in every_object().items():
        view = view_of(shown)
        data = {"text/plain": render_text(view), "text/html": render_html(view)}
        output = nbformat.v4.new_output("execute_result", data, execution_count=1)
        cells.append(nbformat.v4.new_code_cell(f"# {name}", execution_count=1, outputs=[output]))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    return len(cells)


KERNEL = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}  # without it JupyterLab asks for a kernel in a dialog
