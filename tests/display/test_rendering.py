"""What holds of every view, as text and as HTML."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from nbmerge.display.html import render_html
from nbmerge.display.model import Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem
from nbmerge.geometry import Box
from nbmerge.layout import Drift, LazyTensor
from nbmerge.naming.notes import Filled, Trim
from nbmerge.plan import CastNote, MergePlan
from nbmerge.report import MergeReport

from .megatron_objects import rank_files, torch_dist, zarr
from .objects import SHARD, checkpoint, plan, report, small_model, tensor

_HOSTILE = "a.<img src=x onerror=alert(1)>.</style><script>alert(2)</script>.\x1b[31m\u202e'\"&.weight"


def _hostile_plan() -> MergePlan:
    source = checkpoint(
        tensor(_HOSTILE, (7, 3), {"</div><svg onload=x>": (4, SHARD)}),
        notes=(_HOSTILE,), overrides={_HOSTILE: _HOSTILE}, layout=_HOSTILE, evidence=(_HOSTILE,),
        problems=(Problem(_HOSTILE, where=_HOSTILE, why=_HOSTILE, fix=_HOSTILE),),
    )  # fmt: skip
    return plan(
        source, model_class=_HOSTILE, problems=source.problems, unloaded=(_HOSTILE,),
        config_edits={_HOSTILE: (_HOSTILE, _HOSTILE)}, drift=(Drift(_HOSTILE, (0, 1), Box((0,), (5,)), (1,)),),
        casts=(CastNote(_HOSTILE, BY_NAME["float32"], BY_NAME["bfloat16"]),), dialect=_HOSTILE, renamed=1,
        trims=(Trim(_HOSTILE, _HOSTILE, 3, 2),), fills=(Filled(_HOSTILE, _HOSTILE, _HOSTILE),),
    )  # fmt: skip


_PLAN = plan(
    drift=(Drift("w", (0, 1), Box((0,), (5,)), (3,)),),
    casts=tuple(CastNote(f"l.{i}.w", BY_NAME["float32"], BY_NAME["bfloat16"]) for i in range(40)),
)
_ALL = {
    "checkpoint": checkpoint(),
    "checkpoint with problems": checkpoint(problems=(Problem("5 of 17 ranks", "here", "2 runs", "copy 3 files"),)),
    "tensor": small_model()[0],
    "tensor of many pieces": tensor("w", (512, 40), {"fsdp": (512, SHARD)}),
    "slice": tensor("w", (8, 2), {"fsdp": (2, SHARD)}).slice(Box((0, 0), (5, 2))),
    "torch_dist checkpoint": torch_dist(),
    "stacked tensor": torch_dist()["decoder.layers.mlp.linear_fc1.weight"],
    "rank files": rank_files(),
    "tensor in rank files": rank_files()["decoder.layers.1.self_attention.linear_qkv.weight"],
    "zarr checkpoint": zarr(),
    "hostile torch_dist checkpoint": replace(
        torch_dist(), tensors={_HOSTILE: replace(torch_dist()["decoder.final_layernorm.weight"], name=_HOSTILE)}
    ),
    "plan": _PLAN,
    "report": report(_PLAN),
    "dry run": report(_PLAN, target=None),
    "hostile checkpoint": _hostile_plan().checkpoint,
    "hostile plan": _hostile_plan(),
    "hostile report": report(_hostile_plan()),
}
every_view = pytest.mark.parametrize("shown", _ALL.values(), ids=_ALL.keys())

# What JupyterLab's sanitizer keeps of what we use (apputils' `Sanitizer`; GitHub also drops `style`).
_TAGS = {"b", "code", "details", "div", "p", "pre", "small", "summary", "table", "tbody", "td", "th", "thead", "tr"}
_ATTRIBUTES = {"align", "class", "open", "scope", "style", "width"}


class _Sanitized(HTMLParser):
    """The text that is left when only the allow-list stays, and whatever was not on it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.refused: list[str] = []
        self.pieces: list[str] = []
        self.stack: list[str] = []
        self.styles = 0
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.stack.append(tag)
        if tag == "style":
            self.styles += 1
            return
        self.refused += [tag] if tag not in _TAGS else []
        self.refused += [name for name, _ in attrs if name not in _ATTRIBUTES]
        self.refused += [
            value or "" for name, value in attrs if name == "style" and re.search(r"var\(|url\(", value or "")
        ]
        self.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        self.pieces.append(" ")

    def handle_data(self, data: str) -> None:
        if self.stack[-1:] != ["style"]:
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def _numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


@every_view
def test_every_number_of_the_text_survives_a_sanitizer_in_the_html(shown: object) -> None:
    view = view_of(shown)
    left = _Sanitized(render_html(view))
    assert _numbers(render_text(view)) - _numbers(left.text) == set()
    assert left.refused == []
    assert left.styles == 1


@every_view
def test_every_number_of_the_html_is_in_the_text(shown: object) -> None:
    view = view_of(shown)
    assert _numbers(_Sanitized(render_html(view)).text) - _numbers(render_text(view)) == set()


@every_view
def test_html_takes_at_most_30_kb(shown: object) -> None:
    assert len(render_html(view_of(shown)).encode()) <= 30_000


@every_view
def test_text_fits_a_terminal_and_has_no_escape_codes(shown: object) -> None:
    lines = render_text(view_of(shown)).split("\n")
    assert all(line.isprintable() and line == line.rstrip() for line in lines)
    # A word that nothing may break, such as a path or a hostile name, stays whole and can be copied.
    assert [line for line in lines if len(line) > 110 and max(map(len, line.split())) < 60] == []


@pytest.mark.parametrize("shown", [one for name, one in _ALL.items() if name.startswith("hostile")])
def test_hostile_names_are_escaped_and_made_visible(shown: object) -> None:
    html = render_html(view_of(shown))
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


def test_a_small_model_is_shown_in_a_few_milliseconds() -> None:
    shown = checkpoint()
    view_of(shown)

    def once() -> float:
        start = time.perf_counter()
        render_html(view_of(shown))
        return time.perf_counter() - start

    assert min(once() for _ in range(7)) < 0.01


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
    assert _numbers(text) == {"0", "1234567", "1,234,567", "12,345"}
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


@every_view
def test_repr_is_the_text_and_repr_html_the_html(shown: LazyTensor | MergeReport) -> None:
    assert repr(shown) == render_text(view_of(shown))
    assert shown._repr_html_() == render_html(view_of(shown))


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
