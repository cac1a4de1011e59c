"""`Checkpoint.explore()`: filter and sort its parameters, choose a tensor, see its shard map and its statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as widgets

from nbmerge.display import words
from nbmerge.display.fit import fit
from nbmerge.display.html import render_html
from nbmerge.display.meshes import placement_in_words
from nbmerge.display.model import Cell, Column, Section, View
from nbmerge.display.tensor_views import tensor_view
from nbmerge.display.widgets.explorer import Explorer, bar, html, labelled
from nbmerge.display.widgets.filters import filter_input, matcher
from nbmerge.display.widgets.keys import keyed
from nbmerge.display.widgets.statistics import StatisticsPanel
from nbmerge.display.widgets.table import Picker, sized
from nbmerge.errors import plural
from nbmerge.layout import Checkpoint, MeshAxis

_ANY = ""  # in a dropdown: whatever it is
_NAME, _PLACEMENT = 56, 36  # characters that are shown in the table
_COLUMNS = (
    Column("parameter", code=True), Column("shape"), Column("dtype"), Column("placement"),
    Column("bytes", number=True), Column("share", number=True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Row:
    """What is filtered and sorted. folded: the name without upper case."""

    name: str
    folded: str
    dtype: str
    placement: str
    nbytes: int


_ORDERS: Mapping[str, Callable[[_Row], Any] | None] = {
    "as stored": None,
    "name": lambda row: row.name,
    "largest first": lambda row: -row.nbytes,
    "smallest first": lambda row: row.nbytes,
    "dtype": lambda row: row.dtype,
    "placement": lambda row: row.placement,
}


class CheckpointExplorer(Explorer):
    """The parameters of a checkpoint in pages of 50, and one of them from near. Reads a tensor when asked to.

    name, dtype, placement, order: the inputs; picker: the table; statistics: the panel below.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._rows = list(_rows(checkpoint))
        self._total = sum(row.nbytes for row in self._rows)
        self._found: list[_Row] = []
        self.name = filter_input()
        self.dtype = _choice("dtype", (row.dtype for row in self._rows), "150px")
        self.placement = _choice("placement", (row.placement for row in self._rows), "250px")
        self.order = labelled(widgets.Dropdown, "Sort", options=list(_ORDERS), layout=sized("160px"))
        self.said, self.detail = html(), html()
        self.statistics = StatisticsPanel(self._follow)
        self.picker = Picker(_COLUMNS, self._cells, self._on_choice, self.name, len(self._rows))
        choices = {"dtype": self.dtype, "placement": self.placement, "sort": self.order}
        keyed_choices = (keyed(one, what, self.name) for what, one in choices.items())
        inputs = bar(self.name, self.picker.arrows.field, *keyed_choices)
        super().__init__([inputs, self.said, self.picker.widget, self.detail, self.statistics.widget])
        for one in (self.name, *choices.values()):
            one.observe(self._on_filter, "value")
        self._on_filter()

    def view(self) -> View:
        """The page of the table, and the chosen tensor with what is known of its elements."""
        table = replace(self.picker.table(), rows_are="tensors", rest=".tensors")
        found = self.statistics.view
        sections = [Section("Parameters", self._sentence(), tables=(table,), opened=True)]
        if self.picker.key is not None:
            near = tensor_view(self.checkpoint[self.picker.key])
            sections.append(Section("Chosen tensor", near.sentence, facts=near.facts))
            sections += near.sections
        if found:
            tables = tuple(table for section in found.sections for table in section.tables)
            sections.append(Section(found.title, found.sentence, tables=tables, opened=True))
        where = words.elide(str(self.checkpoint.path), 2 * words.NAME_LIMIT)
        alerts = found.alerts if found else ()
        return View("Checkpoint explorer", where, alerts=alerts, sections=tuple(sections))

    def _on_filter(self, _: object = None) -> None:
        dtype, placement = self.dtype.value, self.placement.value
        found = [row for row in self._rows if dtype in (_ANY, row.dtype) and placement in (_ANY, row.placement)]
        if self.name.value:
            like = matcher(self.name.value)
            found = [row for row in found if like(row.folded)]
        if order := _ORDERS[self.order.value]:
            found.sort(key=order)
        self._found = found
        self.said.value = render_html(View("Parameters", self._sentence()))
        self.picker.show([row.name for row in found])

    def _sentence(self) -> str:
        size = words.byte_size(sum(row.nbytes for row in self._found))
        return f"{len(self._found):,} of {plural(len(self._rows), 'tensor')}, {size}"

    def _cells(self, name: str) -> Sequence[Cell]:
        tensor = self.checkpoint[name]
        return (
            Cell(words.elide(name, _NAME)),
            Cell(words.shape_of(tensor.shape)),
            Cell(str(tensor.dtype)),
            Cell(words.elide(placement_in_words(tensor, self.checkpoint), _PLACEMENT)),
            Cell(words.byte_size(tensor.nbytes)),
            Cell(words.percent(tensor.nbytes, self._total), bar=tensor.nbytes / (self._total or 1)),
        )

    def _on_choice(self) -> None:
        key = self.picker.key
        tensor = None if key is None else self.checkpoint[key]
        nothing = View("Parameters", "no tensor is like this; clear the filter to see all of them")
        self.detail.value = render_html(fit(tensor_view(tensor)) if tensor else nothing)
        self.statistics.show(tensor)
        self._follow()


def _rows(checkpoint: Checkpoint) -> Iterator[_Row]:
    """A row for each tensor. A model may have 90,000, but few placements and few dtypes."""
    placements: dict[tuple[MeshAxis, ...], str] = {}
    for name, tensor in checkpoint.tensors.items():
        dtype, mesh = tensor.dtype, tensor.mesh
        placement = placements.get(mesh) if mesh else placement_in_words(tensor, checkpoint)
        if placement is None:
            placement = placements[mesh] = placement_in_words(tensor, checkpoint)
        yield _Row(name, name.casefold(), str(dtype), placement, math.prod(tensor.shape) * dtype.itemsize)


def _choice(what: str, values: Iterable[str], width: str) -> Any:
    """A dropdown of the values that occur, the most frequent ones first."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    found = sorted(counts, key=lambda value: -counts[value])
    options = [(f"any {what}", _ANY), *((words.elide(value, 60), value) for value in found)]
    return labelled(widgets.Dropdown, what.capitalize() if what != "dtype" else what, options=options,
                    layout=sized(width))  # fmt: skip
