"""Figures: what `.plot()` draws, by looking at the drawn artists."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from nbmerge.comparing.trajectory import Step, Trajectory
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import NotSupportedError, OptionError
from nbmerge.shown import Plotted
from nbmerge.tensor_stats import TensorStats

from .objects import COLUMNS, REPLICATE, SHARD, checkpoint, tensor
from .test_diff_views import diff
from .test_diff_views import tensor as tensor_diff

HOSTILE = "a$\\bad{$ <img> \x1b[31m.weight"
STATS = TensorStats("w", (4,), BY_NAME["float32"], 4, 0, 0, 1, 1, -4.0, 1.5, -0.4, 2.1, {0: 2, 2: 1})


def _texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_boxes_are_drawn_to_scale_each_with_its_ranks() -> None:
    figure = tensor("w", (9, 6), {"fsdp": (2, SHARD), "tp": (2, COLUMNS)}).plot()
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    found = [(box.get_y(), box.get_x(), box.get_height(), box.get_width()) for box in boxes]
    assert found == [(0, 0, 5, 3), (0, 3, 5, 3), (5, 0, 4, 3), (5, 3, 4, 3)]
    assert _texts(figure) == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert len({box.get_facecolor() for box in boxes}) == 4


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5)])
def test_tensors_of_any_number_of_dimensions_are_drawn(shape: tuple[int, ...]) -> None:
    figure = tensor("w", shape, {"ddp": (2, REPLICATE)}).plot()
    assert _texts(figure) == ["ranks 0, 1"]


def test_the_bars_of_sizes_are_the_bytes() -> None:
    axes = checkpoint().plot().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [9252, 2304, 40, 36, 24]
    assert axes.get_yticklabels()[0].get_text() == "model.embed_tokens.weight"


def test_a_histogram_has_the_counts() -> None:
    assert [bar.get_height() for bar in STATS.plot().axes[0].patches] == [2, 0, 1]


def test_a_diff_is_a_heat_map_or_two_histograms() -> None:
    shown = diff()
    assert [len(axes.images) for axes in shown.plot().axes][:1] == [1]
    magnitudes, ulps = shown.plot("histogram").axes
    assert sum(bar.get_height() for bar in magnitudes.patches) == sum(shown.statistics.magnitudes.values())
    assert sum(bar.get_height() for bar in ulps.patches) == sum(shown.statistics.ulps)


def test_steps_are_named_by_what_tells_them_apart() -> None:
    def labels(*paths: str) -> list[str]:
        made = Trajectory("start", tuple(Step(path, diff(), {}) for path in paths)).plot()
        return [tick.get_text() for tick in made.axes[-1].get_xticklabels()]

    assert labels("global_step_1/actor", "global_step_2/actor") == ["global_step_1", "global_step_2"]
    assert labels("global_step_1/actor") == ["global_step_1/actor"]
    assert labels("run/10", "run/20") == ["10", "20"]


def test_a_trajectory_is_three_lines() -> None:
    steps = Trajectory("run/0", (Step("run/10", diff(), {}), Step("run/20", diff(), {})))
    lines = [axes.lines[0] for axes in steps.plot().axes]
    assert list(lines[1].get_ydata()) == [step.diff.statistics.share for step in steps.steps]


@pytest.mark.parametrize(("theme", "ground", "ink"), [("light", "#ffffff", "#000000"), ("dark", "#111111", "#ffffff")])
def test_themes_set_ground_and_ink(theme: str, ground: str, ink: str) -> None:
    figure = STATS.plot(theme=theme)
    assert to_hex(figure.get_facecolor()) == ground
    assert to_hex(figure.axes[0].xaxis.label.get_color()) == ink


@pytest.mark.parametrize(
    "shown",
    [
        tensor(HOSTILE, (4, 4), {"tp": (2, COLUMNS)}),
        checkpoint(tensor(HOSTILE, (4, 4), {"tp": (2, COLUMNS)})),
        replace(STATS, name=HOSTILE),
        tensor_diff(HOSTILE),
        replace(diff(), a=HOSTILE, b=HOSTILE),
    ],
)
def test_hostile_names_are_drawn_as_they_are(shown: Plotted) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, size = shown.plot()._repr_png_()  # type: ignore[attr-defined]
    assert image.startswith(b"\x89PNG") and size["width"] > 300


def test_what_there_is_no_figure_of_is_an_error() -> None:
    with pytest.raises(OptionError, match="no figure 'pie'"):
        STATS.plot("pie")
    with pytest.raises(OptionError, match="theme='blue'"):
        STATS.plot(theme="blue")

    class Other(Plotted):
        pass

    with pytest.raises(NotSupportedError, match="Other has no figure"):
        Other().plot()


def test_matplotlib_is_imported_by_plot_alone() -> None:
    code = "import nbmerge, nbmerge.display.views, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


_CELLS = {
    "shown.plot()": 1,
    "shown.plot();": 1,
    "figure = shown.plot()": 1,
    "figure": 1,  # asked for again
    "display(shown.plot())": 1,
    "figure = shown.plot()\nfigure": 1,
    "shown.plot(); shown.plot();": 2,
    "shown.plot()\nraise KeyError": 1,
    "1": 0,
}


def test_a_notebook_shows_a_figure_once_however_the_cell_ends() -> None:
    """In a real kernel, before and after pyplot and `%matplotlib inline` have taken over the showing of figures."""
    import nbformat
    from nbclient import NotebookClient

    start = "from tests.display.test_figures import STATS as shown"
    inline = "%matplotlib inline\nimport matplotlib.pyplot"
    cells = [start, *_CELLS, inline, *_CELLS]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(made, kernel_name="python3", timeout=120, allow_errors=True).execute()
    images = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in made.cells]
    assert images == [0, *_CELLS.values(), 0, *_CELLS.values()]
