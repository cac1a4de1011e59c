"""Explorers: driven by the traits of their widgets, as a browser drives them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import nbmerge
from nbmerge import tensor_stats
from nbmerge.display.html import render_html
from nbmerge.display.widgets import explorer_of
from nbmerge.display.widgets.checkpoint import CheckpointExplorer
from nbmerge.display.widgets.diff import DiffExplorer
from nbmerge.display.widgets.table import PAGE
from nbmerge.engine.events import Advanced
from nbmerge.errors import NotSupportedError
from nbmerge.shown import Explored

from .objects import COLUMNS, REPLICATE, SHARD, checkpoint, tensor
from .test_diff_views import HOSTILE, diff
from .test_diff_views import tensor as tensor_diff

LAYERS = ("q_proj.weight", "q_proj.bias", "norm.weight")


def explored(*tensors: Any) -> CheckpointExplorer:
    made = checkpoint(*tensors).explore()
    assert isinstance(made, CheckpointExplorer)
    return made


def updates(*tensors: Any) -> DiffExplorer:
    made = diff(*tensors).explore()
    assert isinstance(made, DiffExplorer)
    return made


def names(explorer: CheckpointExplorer) -> list[str]:
    return [label.split("\xa0")[0] for label in explorer.picker.box._options_labels]


def text(html: str) -> str:
    return re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.DOTALL)


def test_a_filter_takes_words_and_stars() -> None:
    shown = explored()
    shown.name.value = "Q_PROJ layers.2"
    assert names(shown) == [f"model.layers.2.self_attn.{leaf}" for leaf in LAYERS[:2]]
    shown.name.value = "layers.1.*bias"
    assert names(shown) == ["model.layers.1.self_attn.q_proj.bias"]
    assert "1 of 14 tensors, 10 B" in text(shown.said.value)


def test_dtype_and_placement_narrow_the_table() -> None:
    shown = explored(
        tensor("a", (4, 4), {"fsdp": (2, SHARD)}, "float32"),
        tensor("b", (4, 4), {"fsdp": (2, SHARD)}),
        tensor("c", (4, 4), {"fsdp": (2, REPLICATE)}),
    )
    shown.dtype.value = "bfloat16"
    assert names(shown) == ["b", "c"]
    shown.placement.value = "Replicate×2"
    assert names(shown) == ["c"]


def test_rows_are_sorted() -> None:
    shown = explored()
    shown.order.value = "smallest first"
    assert names(shown)[:2] == ["model.layers.0.norm.weight", "model.layers.1.norm.weight"]
    shown.order.value = "largest first"
    assert names(shown)[0] == "model.embed_tokens.weight"


def test_the_chosen_tensor_is_shown_and_stays_chosen_while_it_is_in_the_table() -> None:
    shown = explored()
    shown.picker.box.index = 2
    assert shown.picker.key == "model.layers.0.self_attn.q_proj.bias"
    assert "model.layers.0.self_attn.q_proj.bias is [5] bfloat16" in text(shown.detail.value)
    assert 'class="nbm-map"' in shown.detail.value
    shown.name.value = "bias"
    assert shown.picker.key == "model.layers.0.self_attn.q_proj.bias"
    shown.name.value = "embed"
    assert shown.picker.key == "model.embed_tokens.weight"


def test_where_nothing_is_found_the_explorer_says_so_and_offers_no_reading() -> None:
    shown = explored()
    shown.name.value = "nothing like it"
    assert (names(shown), shown.picker.key, shown.statistics.read.disabled) == ([], None, True)
    assert "no tensor is like this" in text(shown.detail.value)
    shown.name.value = ""
    assert shown.picker.key == "model.embed_tokens.weight"


def test_there_are_at_most_fifty_rows_at_a_time_however_many_tensors_there_are() -> None:
    shown = explored(*[tensor(f"layers.{number}.weight", (2,)) for number in range(2 * PAGE + 1)])
    assert len(names(shown)) == PAGE
    assert shown.picker.back.disabled
    assert not shown.picker.ahead.disabled
    shown.picker.ahead.click()
    shown.picker.ahead.click()
    assert names(shown) == [f"layers.{2 * PAGE}.weight"]
    assert shown.picker.ahead.disabled
    assert shown.picker.where.value == "of 101, page 3 of 3"
    assert "layers.100.weight is [2]" in text(shown.detail.value)


def test_a_row_is_chosen_by_its_number_too() -> None:
    shown = explored(*[tensor(f"layers.{number}.weight", (2,)) for number in range(PAGE + 9)])
    shown.picker.box.index = 4
    assert shown.picker.row.value == 5
    shown.picker.row.value = 6
    assert shown.picker.key == "layers.5.weight"
    shown.picker.row.value = PAGE + 1
    assert (shown.picker.page, shown.picker.key) == (1, f"layers.{PAGE}.weight")
    shown.name.value = "layers.58"
    assert (shown.picker.row.value, shown.picker.row.max, shown.picker.key) == (1, 1, "layers.58.weight")


def test_a_filter_makes_no_widgets() -> None:
    import ipywidgets

    shown = explored()
    made = getattr(ipywidgets.widgets.widget, "_instances", None)
    made = ipywidgets.Widget._active_widgets if made is None else made  # ipywidgets 8.0.0
    before = len(made)
    shown.name.value = "q_proj"
    assert len(made) == before


def test_statistics_are_read_on_a_press_and_kept(ckpt: Path) -> None:
    source = nbmerge.open_checkpoint(ckpt, progress=False)
    shown = explorer_of(source)
    assert isinstance(shown, CheckpointExplorer)
    panel = shown.statistics
    assert "from disk" in panel.said.value
    assert panel.result.value == ""
    panel.read.click()
    panel.wait()
    name = shown.picker.key
    assert name is not None
    found = source[name].stats(progress=False)
    assert found.view().sentence in text(panel.result.value).replace("\xa0", " ")
    assert "Statistics: " in repr(shown)
    assert panel.read.disabled
    shown.picker.box.index = 1
    assert (panel.result.value, panel.read.disabled) == ("", False)
    shown.picker.box.index = 0
    assert panel.result.value != ""


def test_reading_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    from nbmerge.display.widgets import statistics

    reading = threading.Event()

    def endless(*_: Any, listener: Any) -> None:
        while True:
            listener(Advanced(0))
            reading.set()
            time.sleep(0.001)

    monkeypatch.setattr(statistics, "stats_of", endless)
    panel = explored().statistics
    panel.read.click()
    assert reading.wait(10)
    assert (panel.read.disabled, panel.stop.disabled, panel.said.value) == (True, False, "reading …")
    panel.stop.click()
    panel.wait()
    assert (panel.read.disabled, panel.stop.disabled, panel.result.value) == (False, True, "")


def test_the_engine_stops_when_its_listener_does(ckpt: Path) -> None:
    source = nbmerge.open_checkpoint(ckpt, progress=False)["model.embed_tokens.weight"]

    def stop(_: object) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        tensor_stats.stats_of(source.name, source.expr, listener=stop)


def test_a_failure_to_read_is_told() -> None:
    shown = explored()  # its files do not exist
    shown.statistics.read.click()
    shown.statistics.wait()
    assert "the tensor could not be read" in text(shown.statistics.result.value)
    assert "model_world_size_8_rank" in text(shown.statistics.result.value)


def test_layer_and_module_choose_the_part_of_a_diff() -> None:
    shown = updates()
    assert "all layers: " in text(shown.detail.value)
    everything = shown.detail.value
    shown.layer.value = ("model.layers", 2)
    assert shown.detail.value != everything
    shown.module.value = "self_attn.q_proj"
    assert "model.layers.2, self_attn.q_proj: 1 tensor, 10.2% of the elements changed" in text(shown.detail.value)
    assert [label.split("\xa0")[0] for label in shown.picker.box._options_labels][1:] == [
        "model.layers.2.self_attn.q_proj.weight"
    ]
    shown.layer.value = ("", None)
    assert "outside of layers, self_attn.q_proj: 0 tensors" in text(shown.detail.value)


def test_the_bins_of_all_parts_are_the_same() -> None:
    shown = updates()
    bins = re.compile(r">(2\S+)\xa0to\xa0(2\S+)<")
    every = bins.findall(shown.detail.value)
    assert len(every) == len(shown.diff.statistics.magnitudes)
    for part in [value for _, value in shown.layer.options][1:]:
        shown.layer.value = part
        assert bins.findall(shown.detail.value) == every


def test_the_largest_updates_come_first_and_each_shows_its_histogram() -> None:
    shown = updates(tensor_diff("small", 20), tensor_diff("none", 0), tensor_diff("large", 400))
    assert [value for _, value in shown.picker.box.options] == ["", "large", "small", "none"]
    shown.picker.box.index = 1
    assert "78.1% of the elements of large" in text(shown.detail.value)
    assert "large" in repr(shown)


@pytest.mark.parametrize(
    "shown",
    [explored(tensor(HOSTILE, (4, 4), {HOSTILE[:40]: (2, COLUMNS)})), updates(tensor_diff(HOSTILE))],
    ids=["checkpoint", "diff"],
)
def test_hostile_names_are_escaped_wherever_html_is_raw(shown: Any) -> None:
    import ipywidgets

    def raw(widget: Any) -> list[str]:
        inside = [value for child in getattr(widget, "children", ()) for value in raw(child)]
        return [*inside, widget.value] if isinstance(widget, ipywidgets.HTML) else inside

    shown.picker.box.index = len(shown.picker.box.options) - 1
    for html in [*raw(shown.widget), shown._repr_html_()]:
        assert "<script" not in html
    assert "&lt;script&gt;" in shown.detail.value
    assert all(label.isprintable() or "\xa0" in label for label in shown.picker.box._options_labels)
    assert "\x1b" not in "".join(shown.picker.box._options_labels)


def test_a_notebook_gets_the_widget_and_a_twin_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.core import display_functions

    shown_first, updated = [], []

    class Handle:
        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            updated.append(data)

    def display(data: dict[str, Any], *, raw: bool, display_id: bool = False) -> Handle | None:
        assert raw
        shown_first.append(data)
        return Handle() if display_id else None

    monkeypatch.setattr(display_functions, "display", display)
    monkeypatch.setattr("IPython.display.display", display)
    shown = explored()
    shown._ipython_display_()
    live, twin = shown_first
    assert "application/vnd.jupyter.widget-view+json" in live
    assert set(twin) == {"text/html", "text/plain"}
    shown.name.value = "layers.3.norm"
    assert "1 of 14 tensors" in updated[-1]["text/plain"]
    assert "model.layers.3.norm.weight" in updated[-1]["text/html"]
    hidden = re.search(r"<style>\.(nbm-twin-\w+-\d+),", shown.widget.children[0].value)
    assert hidden is not None
    assert f'<div class="{hidden[1]}">' in updated[-1]["text/html"]


def test_the_bundle_has_what_every_notebook_can_show() -> None:
    shown = explored()
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == repr(shown)
    assert bundle["text/html"] == render_html(shown.view())
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.widget.model_id


def test_what_there_is_no_explorer_of_is_an_error() -> None:
    class Other(Explored):
        pass

    with pytest.raises(NotSupportedError, match="Other has no explorer"):
        Other().explore()


def test_without_ipywidgets_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nbmerge.display.widgets")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(NotSupportedError, match="pip install ipywidgets"):
        checkpoint().explore()


def test_ipywidgets_is_imported_by_explore_alone() -> None:
    code = "import nbmerge, nbmerge.display.views, sys; assert 'ipywidgets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
