"""Views of indexes of DeepSeek-V3's size: small, complete in their sums, and cut where they say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nbmerge.shown import Displayed
from tests.support.sanitizer import sanitized

from .large_objects import LARGE, large_diff, large_plan, megatron, published


@pytest.mark.parametrize("made", LARGE)
def test_the_html_of_a_very_large_index_takes_at_most_30_kb(made: Callable[[], Displayed]) -> None:
    html = made()._repr_html_()
    assert html is not None
    assert len(html.encode()) <= 30_000
    assert sanitized(html).dropped == ["<style>"]


def test_ninety_thousand_names_are_a_few_rows_whose_sums_hold_all_of_them() -> None:
    shown = published()
    parameters = next(section for section in shown.view().sections if section.title == "Parameters")
    rows = {row[0].text: row[1].text for row in parameters.tables[0].rows}
    assert len(shown) == 91_991
    assert parameters.summary.startswith("91,991 tensors of 43 kinds")
    assert rows["experts.{0..255}"] == "90,624"
    assert f"{sum(tensor.nbytes for tensor in shown.tensors.values()):,} bytes" in repr(shown)


def test_each_rank_of_a_very_large_index_is_counted_and_the_cut_is_said() -> None:
    shown = repr(megatron())
    assert "what each of 512 ranks wrote" in shown
    assert "… 496 of 512 ranks not shown" in shown


def test_a_plan_of_ninety_thousand_outputs_says_the_bytes_of_each_dtype() -> None:
    facts = {fact.label: fact.value for fact in large_plan().view().facts}
    assert facts["dtype"] == "float8_e4m3fn (98.8%), bfloat16 (1.1%), float32 (<0.1%), as stored"


def test_a_comparison_shows_the_kinds_that_hold_nearly_all_elements() -> None:
    found = large_diff()
    where, kinds = (
        next(section.tables[0] for section in found.view().sections if section.title == title)
        for title in ("Where", "By kind of module")
    )
    heads = [column.title for column in where.columns]
    assert {"experts", "o_proj", "mlp.shared_experts.gate_proj"} <= set(heads)  # `gate_proj` alone would be two
    assert len(heads) == 10 and "smaller kinds not in this table" in where.title
    assert "mlp.experts" in [row[0].text for row in kinds.rows]
    figure = found.plot("heat")
    assert {"mlp.experts", "self_attn.o_proj"} <= {one.get_text() for one in figure.axes[0].get_yticklabels()}
    assert "not drawn: " in figure.get_suptitle() and figure.get_suptitle().endswith("smaller kinds of module")
