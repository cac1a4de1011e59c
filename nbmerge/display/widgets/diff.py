"""`ModelDiff.explore()`: choose layer and module, see the histogram of their updates move, and the largest updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets
from markupsafe import escape

from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.rolling import kind_order, main_stack
from nbmerge.comparing.sentence import percent
from nbmerge.comparing.statistics import Statistics, combined
from nbmerge.display import words
from nbmerge.display.diff_views import diff_alerts, measures, number, tensor_diff_view
from nbmerge.display.fit import fit
from nbmerge.display.heat import share_cell
from nbmerge.display.html import render_html
from nbmerge.display.model import Cell, Column, Section, View
from nbmerge.display.sparklines import magnitude_line
from nbmerge.display.widgets.explorer import Explorer, bar, html, labelled
from nbmerge.display.widgets.filters import filter_input, matcher
from nbmerge.display.widgets.histograms import update_sections
from nbmerge.display.widgets.keys import keyed
from nbmerge.display.widgets.table import Picker, sized
from nbmerge.errors import plural

_ALL = ("*", None)  # every layer
_EVERY = "*"  # every kind of module
_TOGETHER = ""  # the row of all tensors together
_COLUMNS = (Column("tensor", code=True), Column("changed", number=True), Column("relative L2", number=True),
            Column("|Δ|"))  # fmt: skip


class DiffExplorer(Explorer):
    """The updates of a part of a model: of a layer, a kind of module, or one tensor. Reads no tensor data.

    layer, module, name: the inputs; picker: the tensors of the part, those that changed most first.
    """

    def __init__(self, diff: ModelDiff) -> None:
        self.diff = diff
        moved = diff.largest_updates(len(diff.changed))
        self._tensors = [*moved, *(one for one in diff.tensors.values() if not one.changed)]
        self._part: list[TensorDiff] = []
        self._together = Statistics()
        self.name = filter_input()
        layers = list(_layers(diff))
        self.layer = labelled(widgets.SelectionSlider, "Layer", options=layers, readout=False, layout=sized("420px"))
        self.at = html(width="80px")  # the readout; that of the slider itself is a stop for Tab that does nothing
        kinds = sorted(diff.by_kind, key=kind_order)
        options = [("all modules", _EVERY), *((words.elide(kind, 60), kind) for kind in kinds)]
        self.module = labelled(widgets.Dropdown, "Module", options=options, layout=sized("320px"))
        self.detail = html()
        self.detail.add_class("nbm-side")
        self.picker = Picker(_COLUMNS, self._cells, self._on_choice, self.name, len(diff.tensors) + 1)
        head = View("Model diff", words.elide(diff.sentence, 2 * words.PROSE_LIMIT), alerts=tuple(diff_alerts(diff)))
        choices = (keyed(self.layer, "layer", self.name, upward=1), keyed(self.module, "module", self.name))
        layer, module = choices
        inputs = bar(layer, self.at, module, self.name, self.picker.arrows.field)
        super().__init__([html(render_html(fit(head))), inputs, self.picker.widget, self.detail])
        for one in (self.layer, self.module, self.name):
            one.observe(self._on_part, "value")
        self._on_part()

    def view(self) -> View:
        """The histograms of what is chosen, and the largest updates of the part."""
        near = self._near()
        rest = ".largest_updates(count)"
        table = replace(self.picker.table(), rows_are="rows", rest=rest)
        updates = Section("Largest updates", self._where(), tables=(table,), opened=True)
        chosen = Section("Chosen", near.sentence, facts=near.facts, opened=True)
        return View(
            "Model diff explorer",
            words.elide(self.diff.sentence, 2 * words.PROSE_LIMIT),
            alerts=(*diff_alerts(self.diff), *near.alerts),
            sections=(chosen, *near.sections, updates),
        )

    def _on_part(self, _: object = None) -> None:
        layer, kind = self.layer.value, self.module.value
        self.at.value = str(escape(self.layer.label))
        self._part = [
            one
            for one in self._tensors
            if layer in (_ALL, (one.place.stack, one.place.layer)) and kind in (_EVERY, one.place.kind)
        ]
        if self.name.value:
            like = matcher(self.name.value)
            self._part = [one for one in self._part if like(one.name.casefold())]
            self._together = combined(one.statistics for one in self._part)
        else:
            self._together = self._rolled(layer, kind)
        self.picker.show([_TOGETHER, *(one.name for one in self._part)])

    def _rolled(self, layer: tuple[str, int | None], kind: str) -> Statistics:
        if layer == _ALL:
            return self.diff.statistics if kind == _EVERY else self.diff.by_kind[kind]
        return self.diff.by_layer[layer] if kind == _EVERY else combined(one.statistics for one in self._part)

    def _cells(self, name: str) -> Sequence[Cell]:
        found = self._together if name == _TOGETHER else self.diff[name].statistics
        count = f"{len(self._part):,} " if len(self._part) > 1 else ""
        label = f"all {count}together" if name == _TOGETHER else words.elide(name, 72)
        return (Cell(label), share_cell(found), Cell(number(found.relative_l2)), Cell(magnitude_line(found.magnitudes)))

    def _where(self) -> str:
        parts = [_layer_label(self.layer.value)] + [self.module.value] * (self.module.value != _EVERY)
        parts += [f"like {self.name.value}"] * bool(self.name.value)
        return words.elide(f"{', '.join(parts)}: {plural(len(self._part), 'tensor')}", words.PROSE_LIMIT)

    def _near(self) -> View:
        """What is chosen, from near, with bins that are the same for every part of the model."""
        name = self.picker.key
        if name:
            tensor = self.diff[name]
            sections = tuple(update_sections(tensor.statistics, self.diff.statistics))
            return replace(tensor_diff_view(tensor), sections=sections)
        if not self._part:
            return View("Updates", f"{self._where()}; choose another layer or module")
        found = self._together
        return View(
            "Updates",
            f"{self._where()}, {percent(found.share)} of the elements changed",
            facts=tuple(measures(found)),
            sections=tuple(update_sections(found, self.diff.statistics)),
        )

    def _on_choice(self) -> None:
        self.detail.value = render_html(fit(self._near()))
        self._follow()


def _layers(diff: ModelDiff) -> Iterator[tuple[str, Any]]:
    """All, then the layers of the largest stack, of the others, and what is in no layer."""
    yield "all", _ALL
    main = main_stack(diff.by_place)
    layers = sorted(
        ((stack, layer) for stack, layer in diff.by_layer if layer is not None), key=lambda one: (one[0] != main, one)
    )
    for stack, layer in layers:
        yield (f"{layer}" if stack == main else words.elide(f"{stack}.{layer}", 40)), (stack, layer)
    if ("", None) in diff.by_layer:
        yield "outside", ("", None)


def _layer_label(layer: tuple[str, int | None]) -> str:
    if layer == _ALL:
        return "all layers"
    return "outside of layers" if layer[1] is None else words.elide(f"{layer[0]}.{layer[1]}")
