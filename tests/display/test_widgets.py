"""Explorers: driven by the traits of their widgets, as a browser drives them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nbmerge
from nbmerge import tensor_stats
from nbmerge.comparing.statistics import Statistics
from nbmerge.display.html import render_html
from nbmerge.display.widgets import explorer_of
from nbmerge.display.widgets.checkpoint import CheckpointExplorer
from nbmerge.display.widgets.diff import DiffExplorer
from nbmerge.display.widgets.histograms import update_sections
from nbmerge.display.widgets.table import PAGE
from nbmerge.engine.events import Advanced
from nbmerge.errors import NotSupportedError
from nbmerge.shown import Explored

from .objects import COLUMNS, REPLICATE, SHARD, checkpoint, tensor
from .test_diff_views import HOSTILE, diff
from .test_diff_views import tensor as tensor_diff

UTC = timezone.utc
LAYERS = ("q_proj.weight", "q_proj.bias", "norm.weight")


def explored(*tensors: Any) -> CheckpointExplorer:
    made = checkpoint(*tensors).explore()
    assert isinstance(made, CheckpointExplorer)
    return made


def updates(*tensors: Any) -> DiffExplorer:
    made = diff(*tensors).explore()
    assert isinstance(made, DiffExplorer)
    return made


def names(explorer: Any) -> list[str]:
    return [label.split(" ")[0] for label in labels(explorer)]


def labels(explorer: Any) -> list[str]:
    return [button.description for button in explorer.picker.rows if not button.disabled]


def press(widget: Any) -> None:
    """A press of a button, as a browser sends it."""
    widget._handle_button_msg(widget, {"event": "click"}, [])


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
    press(shown.picker.rows[2])
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
    assert (names(shown), shown.picker.key, shown.statistics.button.disabled) == ([], None, True)
    assert "no tensor is like this" in text(shown.detail.value)
    shown.name.value = ""
    assert shown.picker.key == "model.embed_tokens.weight"


def test_rows_come_in_pages_however_many_tensors_there_are() -> None:
    shown = explored(*[tensor(f"layers.{number}.weight", (2,)) for number in range(2 * PAGE + 1)])
    picker = shown.picker
    assert len(names(shown)) == PAGE
    assert (picker.back.disabled, picker.ahead.disabled) == (True, False)
    press(picker.ahead)
    assert names(shown)[0] == picker.key == f"layers.{PAGE}.weight"
    picker.number.value = 3
    assert names(shown) == [f"layers.{2 * PAGE}.weight"]
    assert (picker.back.disabled, picker.ahead.disabled) == (False, True)
    assert picker.where.value == f"Row {2 * PAGE + 1} of {2 * PAGE + 1}"
    assert f"layers.{2 * PAGE}.weight is [2]" in text(shown.detail.value)
    shown.name.value = "layers.1.weight"
    assert (picker.number.layout.display, picker.pages) == ("none", 1)


def test_arrow_keys_go_from_row_to_row_and_from_page_to_page() -> None:
    shown = explored(*[tensor(f"layers.{number}.weight", (2,)) for number in range(PAGE + 9)])
    press(shown.picker.rows[PAGE - 2])
    keys = shown.picker.arrows.field
    keys.value -= 1  # Down
    assert (shown.picker.page, shown.picker.key) == (0, f"layers.{PAGE - 1}.weight")
    keys.value -= 2  # a key that is held
    assert (shown.picker.page, shown.picker.key) == (1, f"layers.{PAGE + 1}.weight")
    keys.value += 2  # Up
    assert (shown.picker.page, shown.picker.key) == (0, f"layers.{PAGE - 1}.weight")
    assert [button.description.split()[0] for button in shown.picker.rows if "nbm-on" in button._dom_classes] == [
        f"layers.{PAGE - 1}.weight"
    ]
    keys.value = 12_345  # digits that somebody typed
    assert shown.picker.key == f"layers.{PAGE - 1}.weight"
    for _ in range(PAGE):
        keys.value += 40
    assert shown.picker.key == "layers.0.weight"


def test_arrow_keys_move_a_dropdown_down_and_a_slider_up() -> None:
    import ipywidgets

    shown = updates()
    layer, module = (part for part in shown.widget.children[2].children if isinstance(part, ipywidgets.Box))
    layer.children[-1].value += 2
    assert shown.layer.value == ("model.layers", 1)
    assert shown.at.value == "1"
    module.children[-1].value -= 1
    assert shown.module.index == 1
    module.children[-1].value += 5
    assert shown.module.index == 0


def test_focus_is_asked_for_while_a_click_is_handled_and_not_after_it_has_aged(monkeypatch: pytest.MonkeyPatch) -> None:
    header = {"msg_type": "comm_msg", "date": datetime.now(UTC)}
    shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda: {"header": header}))
    shown = explored()
    asked: list[bool] = []
    monkeypatch.setattr(type(shown.name), "focus", lambda _: asked.append(True))
    press(shown.picker.rows[1])
    assert asked == []  # no kernel
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    press(shown.picker.rows[1])
    assert asked == [True]
    shown.picker.arrows.field.value -= 1
    header["date"] -= timedelta(seconds=5)
    press(shown.picker.rows[1])
    header.update(msg_type="execute_request", date=datetime.now(UTC))
    shown.picker.choose(2)
    assert asked == [True]


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
    press(panel.button)
    panel.wait()
    name = shown.picker.key
    assert name is not None
    found = source[name].stats(progress=False)
    assert found.view().sentence in text(panel.result.value).replace("\xa0", " ")
    assert "Statistics: " in repr(shown)
    assert panel.button.description == "Compute again"
    press(shown.picker.rows[1])
    assert (panel.result.value, panel.button.description) == ("", "Compute statistics")
    press(shown.picker.rows[0])
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
    press(panel.button)
    assert reading.wait(10)
    assert (panel.button.description, panel.said.value) == ("Stop", "reading model.embed_tokens.weight …")
    press(panel.button)  # a double click
    assert not panel._stop.is_set()
    monkeypatch.setattr(statistics, "_DOUBLE_CLICK", 0)
    press(panel.button)
    panel.wait()
    assert (panel.button.description, panel.result.value) == ("Compute statistics", "")


def test_the_engine_stops_when_its_listener_does(ckpt: Path) -> None:
    source = nbmerge.open_checkpoint(ckpt, progress=False)["model.embed_tokens.weight"]

    def stop(_: object) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        tensor_stats.stats_of(source.name, source.expr, listener=stop)


def test_a_failure_to_read_is_told() -> None:
    shown = explored()  # its files do not exist
    press(shown.statistics.button)
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
    assert names(shown)[1:] == ["model.layers.2.self_attn.q_proj.weight"]
    shown.layer.value = ("", None)
    assert "outside of layers, self_attn.q_proj: 0 tensors" in text(shown.detail.value)


def test_a_diff_is_filtered_by_name() -> None:
    shown = updates()
    shown.name.value = "layers.1.*UP_proj"
    assert names(shown)[1:] == ["model.layers.1.mlp.up_proj.weight"]
    assert "all layers, like layers.1.*UP_proj: 1 tensor, 15.6% of the elements changed" in text(shown.detail.value)


def test_the_bins_of_all_parts_are_the_same() -> None:
    shown = updates()
    bins = re.compile(r">(2\S+)\xa0to\xa0(2\S+)<")
    every = bins.findall(shown.detail.value)
    assert len(every) == len(shown.diff.statistics.magnitudes)
    for part in [value for _, value in shown.layer.options][1:]:
        shown.layer.value = part
        assert bins.findall(shown.detail.value) == every


def test_distances_begin_at_the_least_one_and_no_element_is_left_out() -> None:
    far = Statistics(elements=100, changed=10, ulps=(*[0] * 5, 3, *[0] * 26, 7))
    near = Statistics(elements=100, changed=4, ulps=(*[0] * 5, 4))
    (_, far_section), (_, near_section) = (list(update_sections(found, far)) for found in (far, near))
    rows = [[cell.text for cell in row] for row in far_section.tables[0].rows]
    assert rows[0] == ["at most 128", "3", "30.0%"]
    assert rows[1] == ["129–256", "0", "0.0%"]
    assert rows[-1] == ["1,073,741,825–2,147,483,648", "7", "70.0%"]
    assert [[cell.text for cell in row][:2] for row in near_section.tables[0].rows] == [
        ["at most 128", "4"], *[[row[0], "0"] for row in rows[1:]]
    ]  # fmt: skip


def test_the_largest_updates_come_first_and_each_shows_its_histogram() -> None:
    shown = updates(tensor_diff("small", 20), tensor_diff("none", 0), tensor_diff("large", 400))
    assert names(shown) == ["all", "large", "small", "none"]
    press(shown.picker.rows[1])
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

    press(shown.picker.rows[len(labels(shown)) - 1])
    for html in [*raw(shown.widget), shown._repr_html_()]:
        assert "<script" not in html
    assert "&lt;script&gt;" in shown.detail.value
    assert all(label.isprintable() for label in labels(shown))
    assert all(button.tooltip.isprintable() for button in shown.picker.rows)


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
