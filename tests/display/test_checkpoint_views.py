from __future__ import annotations

from dataclasses import replace

import pytest

from nbmerge.display.html import render_html
from nbmerge.display.model import PROBLEM, Section, Table, View
from nbmerge.display.shards import cut_of
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.dtypes import BY_NAME
from nbmerge.errors import Problem
from nbmerge.expressions import Cast, Paste
from nbmerge.geometry import Box
from nbmerge.layout import Chunk, LazyTensor, MeshAxis
from nbmerge.loaders import LOADERS

from .objects import COLUMNS, REPLICATE, SHARD, checkpoint, stored, tensor


def _section(view: View, title: str) -> Section:
    return next(section for section in view.sections if section.title == title)


def _rows(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_the_sentence_says_layout_ranks_mesh_size_and_dtype() -> None:
    assert view_of(checkpoint()).sentence == (
        "FSDP2, a file for each rank, written by 8 ranks on a mesh fsdp=4 × tp=2: "
        "14 tensors, 5,828 parameters, 11.7 kB, bfloat16"
    )


def test_several_dtypes_are_told_with_their_shares() -> None:
    view = view_of(checkpoint(tensor("a", (30,)), tensor("b", (5,), dtype="float32")))
    assert view.sentence.endswith("bfloat16 (75.0%), float32 (25.0%)")


def test_the_shard_layout_counts_even_uneven_empty_and_copies() -> None:
    mesh, part = {"fsdp": (4, SHARD), "tp": (2, COLUMNS)}, {"fsdp": (4, SHARD)}
    held = (
        tensor("even", (8, 4), mesh),
        tensor("uneven", (7, 4), mesh),
        tensor("empty", (5, 4), mesh),
        tensor("part.even", (8,), part),
        tensor("everywhere", (3,), {"fsdp": (4, REPLICATE), "tp": (2, REPLICATE)}),
    )
    table = _section(view_of(checkpoint(*held)), "Shard layout").tables[0]
    assert [column.title for column in table.columns] == [
        "on fsdp=4", "on tp=2", "tensors", "even", "uneven", "empty", "whole", "copies", "bytes", "share",
    ]  # fmt: skip
    assert [row[:8] for row in _rows(table)] == [
        ["Shard(0)", "Shard(1)", "3", "1", "1", "1", "·", "1"],
        ["Shard(0)", "not on it", "1", "1", "·", "·", "·", "1"],
        ["Replicate", "Replicate", "1", "·", "·", "·", "1", "8"],
    ]


def test_a_rank_that_left_its_empty_piece_out_still_counts_as_empty() -> None:
    full = tensor("a", (3,), {"ranks": (4, SHARD)})
    without = replace(full, chunks=tuple(chunk for chunk in full.chunks if chunk.box.numel))
    assert cut_of(full).in_words == cut_of(without).in_words == "into 3 pieces; 1 rank holds nothing of it"


def test_repeated_layers_share_a_row_with_their_bytes_added() -> None:
    table = _section(view_of(checkpoint()), "Parameters").tables[0]
    assert _rows(table)[4] == [
        "weight", "4", "[16, 18]", "bfloat16", "Shard(0)×4 · Shard(1)×2", "2.30 kB", "19.8%"
    ]  # fmt: skip
    assert sum(cell.bar or 0.0 for row in table.rows for cell in row) == pytest.approx(1.0)


def test_modules_stand_over_their_parts_with_the_sums() -> None:
    table = _section(view_of(checkpoint()), "Parameters").tables[0]
    tree = [(row[0].indent, row[0].text, row[1].text, row[5].text) for row in table.rows]
    assert tree == [
        (0, "model", "14", "11.7 kB"),
        (1, "embed_tokens.weight", "1", "9.25 kB"),
        (1, "layers.{0..3}", "12", "2.37 kB"),
        (2, "self_attn.q_proj", "8", "2.34 kB"),
        (3, "weight", "4", "2.30 kB"),
        (3, "bias", "4", "40 B"),
        (2, "norm.weight", "4", "24 B"),
        (1, "norm.weight", "1", "36 B"),
    ]
    assert "    layers.{0..3} " in render_text(view_of(checkpoint()))


def test_the_largest_tensor_of_each_placement_is_drawn() -> None:
    mesh, embedding, *_, norm = _section(view_of(checkpoint()), "Shard map").grids
    assert mesh.title == "Device mesh fsdp=4 × tp=2"
    assert embedding.title == "Shard(0), Shard(1) (uneven): model.embed_tokens.weight [257, 18]"
    assert norm.title == "Shard(0), not on it (uneven): model.norm.weight [18]"


def test_files_are_listed_by_role_weights_first() -> None:
    rows = _rows(_section(view_of(checkpoint()), "Files").tables[0])
    assert rows[0] == ["weights", "8", "283 kB", "35.4 kB", "35.4 kB", "model_0.pt"]
    assert rows[1][:3] == ["optimizer", "1", "777 kB"]


def test_problems_come_first_with_where_why_and_fix() -> None:
    problem = Problem("rank 3 differs", where="model_3.pt", why="two runs were mixed", fix="copy again")
    (alert,) = view_of(checkpoint(problems=(problem,))).alerts
    assert (alert.kind, alert.what) == (PROBLEM, "rank 3 differs")
    assert alert.details == (("where", "model_3.pt"), ("why", "two runs were mixed"), ("fix", "copy again"))


def test_many_problems_are_cut_and_their_number_is_said() -> None:
    alerts = view_of(checkpoint(problems=tuple(Problem(f"p{i}") for i in range(1234)))).alerts
    assert len(alerts) == 11
    assert alerts[-1].what == "1,224 more problems; all are in .problems"


def test_notes_and_overrides_are_shown() -> None:
    section = _section(view_of(checkpoint(overrides={"mesh_shape": [4, 2]})), "Notes")
    assert section.notes == ("8 optimizer files left alone",)
    assert [(fact.label, fact.value) for fact in section.facts] == [("mesh_shape", "[4, 2]")]


def test_a_checkpoint_without_a_config_says_what_a_merge_needs() -> None:
    facts = {fact.label: fact.value for fact in view_of(checkpoint(config_dir=None)).facts}
    assert facts["config"] == "none found; a merge needs --hf_model_config_path"


def test_a_lazy_tensor_maps_boxes_to_ranks_and_files() -> None:
    view = view_of(tensor("w", (5, 6), {"ddp": (2, REPLICATE), "fsdp": (2, SHARD)}, "float32"))
    assert view.sentence == "w is [5, 6] float32, 120 B, in 2 stored pieces"
    assert ("cut", "into 2 uneven pieces, each on 2 ranks") in [(fact.label, fact.value) for fact in view.facts]
    assert _rows(view.sections[0].tables[0]) == [
        ["[0:3, 0:6]", "[3, 6]", "72 B", "60.0%", "0", "2", "model_world_size_8_rank_0.pt", "64"],
        ["[3:5, 0:6]", "[2, 6]", "48 B", "40.0%", "1", "3", "model_world_size_8_rank_1.pt", "128"],
    ]


def test_a_tensor_of_many_pieces_is_cut_and_says_so() -> None:
    table = view_of(tensor("w", (512,), {"fsdp": (512, SHARD)})).sections[0].tables[0]
    assert len(table.rows) + table.hidden == 512
    assert table.cut == "… 480 of 512 boxes not shown; all are in .chunks"


def test_shares_are_of_elements_whatever_the_stored_dtype() -> None:
    plain = tensor("w", (4, 6), {"dp": (2, SHARD)})
    widened = replace(plain, expr=Cast(plain.expr, BY_NAME["float32"]))
    rows = _rows(_section(view_of(widened), "Shard map").tables[0])
    assert [row[3] for row in rows] == ["50.0%", "50.0%"]


def test_ranks_that_hold_runs_of_rows_are_even_by_their_elements() -> None:
    def flat(*boxes: tuple[int, Box]) -> LazyTensor:
        chunks = tuple(Chunk(box, stored(rank, box.shape), rank) for rank, box in boxes)
        parts = tuple((chunk.box.offset, chunk.stored) for chunk in chunks)
        return LazyTensor("w", Paste((3, 4), chunks[0].stored.dtype, parts), chunks, (MeshAxis("dp", 2, "Flat"),))

    even = flat((0, Box((0, 0), (1, 4))), (0, Box((1, 0), (1, 2))), (1, Box((1, 2), (1, 2))), (1, Box((2, 0), (1, 4))))
    assert (cut_of(even).kind, cut_of(even).in_words) == ("even", "into 4 boxes on 2 ranks, as many elements on each")
    uneven = flat((0, Box((0, 0), (1, 4))), (0, Box((1, 0), (1, 4))), (1, Box((2, 0), (1, 4))))
    assert cut_of(uneven).in_words == "into 3 boxes on 2 ranks, not as many elements on each"


def test_files_that_say_no_rank_show_none() -> None:
    whole = replace(tensor("w", (4, 6)), ranked=False)
    (table,) = _section(view_of(whole), "Shard map").tables
    assert "rank" not in [column.title for column in table.columns]
    assert "rank 0" not in render_text(view_of(whole))


def test_pieces_are_counted_alike_where_some_ranks_hold_nothing() -> None:
    shown = view_of(tensor("w", (6,), {"fsdp": (4, SHARD), "tp": (2, SHARD)}))
    filled = sum(1 for row in _rows(_section(shown, "Shard map").tables[0]) if row[2] != "empty")
    assert shown.sentence.endswith(f"in {filled} stored pieces")
    assert {fact.label: fact.value for fact in shown.facts}["on tp=2"] == str(SHARD)


def test_some_axes_are_no_mesh_of_all_ranks() -> None:
    held = tensor("w", (4, 6), {"tp": (2, SHARD)})
    assert "written by 2 ranks on a mesh tp=2" in view_of(checkpoint(held, world_size=2)).sentence
    assert "written by 4 ranks with tp=2" in view_of(checkpoint(held, world_size=4)).sentence


def test_of_a_long_tree_the_deepest_and_smallest_rows_go_first() -> None:
    parts = [tensor(f"model.layers.0.{'abcdefgh'[n % 8]}{n}.weight", (n + 1, 600)) for n in range(90)]
    shown = view_of(checkpoint(*parts, tensor("lm_head.weight", (2, 2))))
    table = _section(shown, "Parameters").tables[0]
    names = [row[0] for row in _rows(table)]
    assert table.hidden > 0 and "lm_head.weight" in names and any("89" in name for name in names)
    assert not any(name.endswith("a0.weight") for name in names)
    assert len(render_html(shown)) > 27_000


def test_a_slice_says_what_it_is_made_of() -> None:
    view = view_of(tensor("w", (8, 2), {"fsdp": (2, SHARD)}).slice(Box((0, 0), (5, 2))))
    assert view.sentence == "w[0:5, 0:2] is [5, 2] bfloat16, 20 B, in 2 stored pieces"
    assert view.sections[0].summary == "an expression of 1 paste, 2 stored"


def test_a_loader_says_what_it_recognises() -> None:
    assert "model_world_size_N_rank_R.pt" in view_of(LOADERS[0]).sentence


def test_an_object_without_a_view_is_refused() -> None:
    with pytest.raises(TypeError, match="no view of a int"):
        view_of(3)
