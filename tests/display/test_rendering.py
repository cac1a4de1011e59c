"""What holds of every view, as text and as HTML."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from inspect import isabstract

import pytest

import nbmerge
from nbmerge.display.html import render_html
from nbmerge.display.model import Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.errors import Problem
from nbmerge.layout import LazyTensor
from nbmerge.shown import Displayed
from tests.support.sanitizer import sanitized

from .objects import SHARD, checkpoint, plan, tensor
from .registry import every_object

ALL = every_object()
every_display = pytest.mark.parametrize("shown", ALL.values(), ids=ALL.keys())


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))


def _html(shown: Displayed) -> str:
    html = shown._repr_html_()
    assert html is not None
    return html


def _kinds(of: type) -> Iterator[type]:
    for kind in of.__subclasses__():
        yield kind
        yield from _kinds(kind)


def test_the_list_of_displays_has_one_of_every_class_that_has_any() -> None:
    for module in pkgutil.walk_packages(nbmerge.__path__, "nbmerge."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    displayed = {kind for kind in _kinds(Displayed) if kind.__module__.startswith("nbmerge.") and not isabstract(kind)}
    assert len(displayed) > 20
    assert displayed - {type(shown) for shown in ALL.values()} == set()


@every_display
def test_every_number_of_the_text_is_left_of_the_html_by_jupyterlabs_allow_list(shown: Displayed) -> None:
    left = sanitized(_html(shown))
    assert _numbers(left.text) == _numbers(repr(shown))
    assert left.dropped == ["<style>"]


@every_display
def test_html_takes_at_most_30_kb(shown: Displayed) -> None:
    assert len(_html(shown).encode()) <= 30_000


@every_display
def test_text_fits_a_terminal_and_has_no_escape_codes(shown: Displayed) -> None:
    lines = repr(shown).split("\n")
    assert all(line.isprintable() and line == line.rstrip() for line in lines)
    # A word that nothing may break, such as a path or a hostile name, stays whole and can be copied.
    assert [line for line in lines if len(line) > 110 and max(map(len, line.split())) < 60] == []


@every_display
def test_the_first_line_says_what_it_is_and_the_text_and_the_html_are_one_view(shown: Displayed) -> None:
    view = shown.view()
    assert repr(shown).startswith(f"{view.title}: ")
    assert (repr(shown), _html(shown)) == (render_text(view), render_html(view))


@pytest.mark.parametrize("shown", [one for name, one in ALL.items() if name.startswith("hostile")])
def test_hostile_names_are_escaped_and_made_visible(shown: Displayed) -> None:
    html = _html(shown)
    body = html.partition("</style>")[2]
    for bad in ("<img", "<script", "<svg", "</style", "\x1b", "\u202e"):
        assert bad not in body
    assert "&lt;img src=x" in body


def test_a_checkpoint_of_thousands_of_different_tensors_is_cut_and_says_so() -> None:
    held = [tensor(f"module_{'<&>' * 30}{i:x}.weight", (i + 1, 2), {"fsdp": (4, SHARD)}) for i in range(3000)]
    view = view_of(checkpoint(*held))
    (table,) = next(part.tables for part in view.sections if part.title == "Parameters")
    assert len(table.rows) + table.hidden == 3000
    assert len(render_html(view).encode()) <= 30_000
    assert table.cut in render_text(view)
    assert table.cut.startswith("… 2,9") and "of 3,000 rows" in table.cut


def test_many_long_problems_are_cut_and_their_number_is_said() -> None:
    problems = tuple(Problem("'" * 900, "'" * 900, "'" * 900, f"{'&' * 900}{i}") for i in range(30))
    view = view_of(plan(problems=problems))
    assert len(render_html(view).encode()) <= 30_000
    assert view.alerts[-1].what.endswith("more not shown")


def test_numbers_are_aligned_to_the_right_and_cells_have_a_scope() -> None:
    table = Table((Column("name"), Column("count", number=True)), ((Cell("a"), Cell("7", bar=0.25)),))
    html = render_html(View("T", "s", sections=(Section("S", tables=(table,)),)))
    assert '<th scope="col" align="right" width="80">count</th>' in html
    assert '<th scope="row" align="left"' in html
    assert "linear-gradient(90deg,rgba(76,139,245,.35) 25%,transparent 25%)" in html


def test_a_word_says_what_a_colour_says() -> None:
    view = View("T", "s", alerts=(Alert("problem", "p"), Alert("attention", "a")))
    assert "✗ Problem:" in render_html(view) and "▲ Attention:" in render_html(view)
    assert "✗ problem: p" in render_text(view) and "! attention: a" in render_text(view)


def test_a_wide_table_is_folded_without_cutting_a_number() -> None:
    cell = Cell("layers.{0..1234567}.with.a.name." * 4 + "1,234,567")
    table = Table((Column("name"), Column("other"), Column("n", number=True)), ((cell, cell, Cell("12,345")),))
    text = render_text(View("T", "s", facts=(Fact("a", "b"),), sections=(Section("S", tables=(table,)),)))
    assert set(_numbers(text)) == {"0", "1234567", "1,234,567", "12,345"}
    assert max(len(line) for line in text.split("\n")) <= 110


def test_a_view_that_fails_leaves_the_cell_alive() -> None:
    class Broken(LazyTensor):
        @property
        def placement(self) -> str:
            raise RuntimeError("broken")

        mesh = property(lambda self: 1 / 0)  # type: ignore[assignment]

    shown = object.__new__(Broken)
    assert repr(shown).startswith("<")
    assert shown._repr_html_() is None


def test_a_view_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was opened")

    shown = replace(checkpoint(), problems=())
    view_of(shown)  # imports happen here
    for name in ("builtins.open", "os.open", "io.open"):
        monkeypatch.setattr(name, refuse)
    view_of(shown)
    view_of(plan(shown))


def test_showing_needs_no_torch_and_the_engine_needs_no_display() -> None:
    code = """
import sys
import nbmerge, nbmerge.planning, nbmerge.merging, nbmerge.naming.published, nbmerge.engine.execute
assert not [m for m in sys.modules if m.startswith("nbmerge.display.") and not m.endswith("progress")], "display"
import nbmerge.display.views, nbmerge.display.html, nbmerge.display.text
bad = {"torch", "transformers", "matplotlib", "IPython", "ipywidgets"} & set(sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-c", code], check=True)
