"""What is shown of Megatron checkpoints: the mesh, which rank holds what, and no claim that the files do not make."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from nbmerge.display.html import render_html
from nbmerge.display.model import Section, Table, View
from nbmerge.display.shards import cut_of
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.layout import SourceFile

from .megatron_objects import pieces, rank_files, torch_dist, zarr
from .objects import checkpoint


def _section(view: View, title: str) -> Section:
    return next(section for section in view.sections if section.title == title)


def _titles(table: Table) -> list[str]:
    return [column.title for column in table.columns]


def _rows(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def _facts(view: View) -> dict[str, str]:
    return {fact.label: fact.value for fact in view.facts}


def test_the_mesh_is_told_as_tp_pp_ep() -> None:
    assert "written by 8 ranks on a mesh tp=2 × pp=2 × ep=2: " in view_of(rank_files()).sentence


def test_expert_ranks_inside_the_others_are_not_multiplied_with_them() -> None:
    assert "written by 4 ranks on a mesh tp=2 × pp=2, experts over ep=2: " in view_of(torch_dist()).sentence


def test_what_is_stored_once_has_no_copies_and_no_empty_ranks() -> None:
    section = _section(view_of(torch_dist()), "Shard layout")
    (table,) = section.tables
    assert _titles(table) == [
        "on tp=2", "on pp=2", "on ep=2", "tensors", "even", "uneven", "whole", "pieces", "bytes", "share",
    ]  # fmt: skip
    assert [row[:8] for row in _rows(table)] == [
        ["Shard(1)", "Shard(0)", "not cut", "2", "2", "·", "·", "8 to 16"],
        ["Shard(0)", "not cut", "not cut", "1", "1", "·", "·", "2"],
        ["not cut", "Shard(0)", "Shard(1)", "1", "1", "·", "·", "16"],
        ["not cut", "not cut", "not cut", "1", "·", "·", "1", "1"],
    ]
    assert "how many ranks held it is not in the files" in section.notes[0]


def test_rank_files_tell_copies_stages_and_where_an_expert_is() -> None:
    (table,) = _section(view_of(rank_files()), "Shard layout").tables
    assert _titles(table)[:3] == ["on tp=2", "on pp=2", "on ep=2"]
    assert sorted(row[:9] for row in _rows(table)) == [
        ["Replicate", "on 1 stage", "Replicate", "2", "·", "·", "·", "2", "4"],
        ["Shard(0)", "on 1 stage", "Replicate", "2", "2", "·", "·", "·", "2"],
        ["Shard(0)", "on 1 stage", "on 1 rank", "4", "4", "·", "·", "·", "1"],
    ]


def test_each_rank_is_listed_with_its_layers_and_experts() -> None:
    section = _section(view_of(torch_dist()), "Ranks")
    assert section.summary == "what each of 4 ranks wrote"
    assert [row[:5] for row in _rows(section.tables[0])] == [
        ["0", "0..1", "0..1", "word_embeddings", "11"],
        ["1", "0..1", "2..3", "word_embeddings", "11"],
        ["2", "2..3", "0..1", "final_layernorm", "11"],
        ["3", "2..3", "2..3", "·", "10"],
    ]
    section = _section(view_of(rank_files()), "Ranks")
    assert section.summary == "what each of 8 ranks holds"
    assert _rows(section.tables[0])[6][:4] == ["6 (mp_rank_00_006)", "1", "1", "·"]


def test_zarr_says_nothing_of_ranks() -> None:
    source = zarr()
    assert not [section for section in view_of(source).sections if section.title == "Ranks"]
    (tensor,) = source.tensors.values()
    (table,) = view_of(tensor).sections[0].tables
    assert _titles(table) == ["box", "shape", "bytes", "share", "file", "at byte"]
    assert _rows(table)[1][4] == "decoder.layers.self_attention.linear_proj.weight/0.0.1"


def test_a_stacked_tensor_says_how_many_pieces_a_rank_has_along_each_axis() -> None:
    view = view_of(torch_dist()["decoder.layers.mlp.linear_fc1.weight"])
    facts = _facts(view)
    assert facts["on pp=2"] == facts["on tp=2"].replace("Shard(1)", "Shard(0)") == "Shard(0): 4 pieces, 2 on each rank"
    assert facts["stored"] == "in 16 even pieces, once; how many ranks held it is not in the files"
    (table,) = view.sections[0].tables
    assert _titles(table) == ["box", "shape", "bytes", "share", "written by rank", "file", "at byte"]
    assert _rows(table)[9] == ["[2:3, 8:16, 0:8]", "[1, 8, 8]", "128 B", "6.2%", "3", "__3_0.distcp", "64"]


def test_what_is_stored_in_one_piece_is_not_called_replicated_or_whole_on_a_rank() -> None:
    facts = _facts(view_of(torch_dist()["decoder.final_layernorm.weight"]))
    assert facts["placement"] == "not cut"
    assert facts["stored"] == "in one piece, once; how many ranks held it is not in the files"


def test_pieces_of_a_rank_file_name_the_directory_that_says_whose_it_is() -> None:
    view = view_of(rank_files()["decoder.layers.1.self_attention.linear_qkv.weight"])
    assert _facts(view)["cut"] == "into 2 even pieces, each on 2 ranks"
    (table,) = view.sections[0].tables
    assert _titles(table)[4:7] == ["rank", "copies on ranks", "file"]
    assert _rows(table)[1][4:7] == ["5", "7", "mp_rank_00_005/model_optim_rng.pt"]


def test_a_rank_that_holds_two_pieces_leaves_another_empty() -> None:
    halves = pieces("w", (8, 2), (2, 1), {"tp": 0}, {0: [1], 1: [1]}, file="/run/rank_{rank}.pt")
    assert cut_of(halves).in_words == "into 2 pieces; 1 rank holds nothing of it"


def test_layers_and_grouped_experts_share_a_row() -> None:
    (table,) = _section(view_of(rank_files()), "Parameters").tables
    assert [row[0] for row in _rows(table)] == [
        "decoder.layers.{0..1}",
        "self_attention.linear_qkv.weight",
        "pre_mlp_layernorm.weight",
        "mlp.experts.linear_fc1.weight{0..1}",
    ]
    assert _rows(table)[3][1:5] == ["4", "[12, 8]", "bfloat16", "etp:Shard(0)"]


def test_files_are_named_below_the_checkpoint() -> None:
    inside = SourceFile(rank_files().path / "iter_0000010/mp_rank_00/model_optim_rng.pt", 5, 0, "weights")
    (table,) = _section(view_of(replace(rank_files(), files=(inside,))), "Files").tables
    assert _rows(table)[0][-1] == "iter_0000010/mp_rank_00/model_optim_rng.pt"


def test_notes_are_shown() -> None:
    assert _section(view_of(torch_dist()), "Notes").notes == torch_dist().notes


@pytest.mark.parametrize("stacked", [True, False])
def test_a_large_index_stays_small_and_quick(stacked: bool) -> None:
    layers, experts, ranks = 48, 128, 64
    names = ["decoder.layers.mlp.experts.experts.linear_fc{}.weight"] if stacked else [
        f"decoder.layers.{layer}.mlp.experts.linear_fc{{}}.weight{expert}"
        for layer in range(layers) for expert in range(experts)
    ]  # fmt: skip
    shape, grid = ((layers, experts, 2, 2), (layers, experts, 2, 1)) if stacked else ((2, 2), (2, 1))
    held = [
        pieces(name.format(n), shape, grid, {"tp": len(shape) - 2},
               {i: [(i + number) % ranks] for i in range(2 * layers * experts if stacked else 2)})
        for number, name in enumerate(names) for n in (1, 2)
    ]  # fmt: skip
    source = checkpoint(*held, backend="megatron", names="megatron", mesh=(), world_size=ranks)
    start = time.perf_counter()
    view = view_of(source)
    assert len(render_html(view).encode()) <= 30_000
    assert time.perf_counter() - start < 5.0
    assert "… 48 of 64 ranks not shown" in render_text(view)
    assert len(_section(view, "Parameters").tables[0].rows) == 3  # a module and its two
