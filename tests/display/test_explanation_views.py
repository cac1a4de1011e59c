"""What a notebook shows of an explanation and of a location."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbmerge.display.html import render_html
from nbmerge.display.model import ATTENTION, PROBLEM, View
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem
from nbmerge.explainer import explain
from nbmerge.explaining.candidates import Known, Mismatch
from nbmerge.explaining.explanation import Explanation
from nbmerge.explaining.subjects import subjects_of
from nbmerge.geometry import Box
from nbmerge.tracing import Copy, Location

HOSTILE = '<img src=x onerror="alert(1)">\x1b[2J‮.layers.0.weight'


LOCATION = Location(
    "model.layers.1.self_attn.k_proj.weight", (64, 64), (3, 5), BY_NAME["bfloat16"],
    source="decoder.layers.self_attention.linear_qkv.weight", source_index=(1, 35, 5),
    file=Path("/run/__0_1.distcp"), offset=23_346, nbytes=4, stored_dtype=BY_NAME["float32"], rank=2,
    box=Box((1, 0, 0), (1, 128, 64)), shard_index=(0, 35, 5), copies=(Copy(3, Path("/run/x"), 9),),
    steps=("cast from float32 to bfloat16",),
)  # fmt: skip


def _tables(view: View) -> list[list[list[str]]]:
    return [[[c.text for c in row] for row in table.rows] for section in view.sections for table in section.tables]


def _many(count: int, layers: int = 40) -> Explanation:
    asked = [
        Mismatch((3600 + i, 4), (3584 + i, 4), f"model.layers.{layer}.part{i}.weight")
        for i in range(count)
        for layer in range(layers)
    ]
    return Explanation("/run", subjects_of(asked), ranks=24, checked=len(asked))


class TestAnExplanation:
    def test_puts_both_shapes_one_over_the_other(self):
        view = view_of(explain(got=(3600, 18), expected=(3584, 18), ranks=24))
        assert _tables(view)[0] == [
            ["expected", "3,584", "18", "64,512"],
            ["got", "3,600", "18", "64,800"],
            ["differs", "+16", "", ""],
        ]

    @pytest.mark.parametrize(
        ("got", "expected", "said"),
        [((8,), (1,), "×8"), ((5,), (40,), "÷8"), ((4, 2), (8,), "only in one"), ((0,), (3,), "-3")],
    )
    def test_says_how_the_shapes_differ(self, got, expected, said):
        assert said in _tables(view_of(explain(got=got, expected=expected)))[0][2]

    def test_lists_every_cause_with_strength_arithmetic_and_thread(self):
        causes = _tables(view_of(explain(got=8, expected=1, ranks=8)))[1]
        assert [row[:2] for row in causes] == [
            ["replicated, concatenated", "strong"],
            ["ceil padding", "strong"],
        ]
        assert causes[0][2] == "8 = 8 · 1; 8 ranks wrote the checkpoint"
        assert causes[0][4] == "verl 4671, verl 7610, oumi 2618"

    def test_says_that_it_is_ambiguous_and_what_would_decide(self):
        (alert,) = view_of(explain(got=(1024, 4096), expected=(4096, 1024))).alerts or (None,)
        assert alert is None  # transposed is stronger than four shards of the other dimension
        (alert,) = view_of(explain(got=8, expected=1, ranks=8)).alerts
        assert (alert.kind, alert.details) == (ATTENTION, ())
        view = view_of(explain(got=(0,), expected=(5,)))
        assert view.alerts[0].details[0][1].endswith("ranks=N")

    def test_gives_the_fix_of_each_cause_that_leads(self):
        notes = view_of(explain(got=8, expected=1, ranks=8)).sections[0].notes
        assert len(notes) == 2 and all(note.startswith("Fix, if it is ") for note in notes)
        view = view_of(explain(got=3600, expected=3584, ranks=24))
        assert view.sections[0].notes == ()
        (fix,) = (fact.value for fact in view.facts if fact.label == "fix")
        assert " ".join(render_text(view).split()).count(fix) == 1

    def test_tells_layers_as_one_row(self):
        view = view_of(_many(3))
        assert _tables(view)[0][0][:3] == ["model.layers.{0..39}.part0.weight", "[3584, 4]", "[3600, 4]"]
        assert view.sections[0].summary == "120 tensors"

    def test_of_a_diagnosis_is_a_problem_with_its_fix(self):
        view = view_of(replace(_many(2), diagnosis="config.json is of another size"))
        assert view.alerts[0].kind == PROBLEM
        assert view.sentence == "config.json is of another size"
        assert not any(section.opened for section in view.sections[1:])

    def test_of_other_problems_lists_them(self):
        view = view_of(Explanation("x", problems=(Problem("a rank is missing", fix="copy it"),)))
        assert view.alerts[0].what == "a rank is missing"

    def test_of_a_tensor_that_fits_is_short(self):
        view = view_of(explain(got=4, expected=4))
        assert view.sections == () and view.alerts == ()

    def test_of_a_missing_tensor_shows_one_shape(self):
        known = Known(held={"embed_tokens.weight": (7, 3)})
        subjects = subjects_of([Mismatch(None, (7, 3), "lm_head.weight", known), Mismatch((2,), None, "x.weight")])
        rows = _tables(view_of(Explanation("x", subjects)))[0]
        assert [row[:3] for row in rows] == [["lm_head.weight", "[7, 3]", "·"], ["x.weight", "·", "[2]"]]

    def test_of_an_error_without_shapes(self):
        view = view_of(explain("RuntimeError: zero-dimensional tensor (at position 0) cannot be concatenated"))
        assert "zero-dimensional" in view.sections[0].summary
        assert _tables(view)[0][0][0] == "replicated, concatenated"

    def test_of_very_many_stays_small_and_says_what_is_cut(self):
        explanation = _many(400, layers=2)
        html = render_html(view_of(explanation))
        assert len(html.encode()) <= 30_000
        assert "not shown" in html

    def test_of_a_hostile_name_is_escaped(self):
        explanation = Explanation(HOSTILE, subjects_of([Mismatch((8,), (1,), HOSTILE), Mismatch((3,), None, HOSTILE)]))
        html, text = render_html(view_of(explanation)), render_text(view_of(explanation))
        assert "<img" not in html and "\x1b" not in html + text and "‮" not in html + text

    def test_has_every_number_in_text_and_html(self):
        view = view_of(explain(got=(9216,), expected=(1152,), ranks=8))
        for number in ("9,216", "1,152", "×8", "9216 = 8 · 1152"):
            assert number in render_text(view)
            assert number in render_html(view).replace("\N{NO-BREAK SPACE}", " ")


class TestALocation:
    def test_says_file_byte_rank_and_the_place_in_the_shard(self):
        view = view_of(LOCATION)
        facts = {fact.label: fact.value for fact in view.facts}
        assert view.sentence == (
            "model.layers.1.self_attn.k_proj.weight[3, 5] is at byte 23,346 of __0_1.distcp of rank 2, 4 bytes"
        )
        assert facts["stored as"] == "decoder.layers.self_attention.linear_qkv.weight[1, 35, 5]"
        assert facts["byte"] == "23,346 to 23,349, float32"
        assert facts["in the shard"] == "[0, 35, 5] of [1, 128, 64], which is [1:2, 0:128, 0:64] of the tensor"
        assert facts["copies"] == "on 1 other rank: 3"
        assert facts["on the way"] == "cast from float32 to bfloat16"
        assert view.code[1] == "    file.seek(23346); element = file.read(4)"

    def test_in_no_file_says_why(self):
        view = view_of(
            Location("score.bias", (1,), (0,), BY_NAME["float32"], steps=("averaged",), inputs=("a.weight", "b.weight"))
        )
        assert view.code == ()
        assert {fact.label: fact.value for fact in view.facts}["made from"] == "a.weight, b.weight"

    def test_of_a_hostile_name_is_escaped(self):
        view = view_of(replace(LOCATION, name=HOSTILE, source=HOSTILE, file=Path("/run/\x1b[2J<b>")))
        html, text = render_html(view), render_text(view)
        assert "<img" not in html and "<b>[" not in html and "\x1b" not in html + text
