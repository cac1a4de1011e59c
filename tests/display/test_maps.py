"""Drawings of which rank holds which box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from nbmerge.display.maps import mesh_map, ranks_in_words, shard_map
from nbmerge.display.model import Grid, Section, View
from nbmerge.display.text import render_text
from nbmerge.geometry import Box, Placement
from nbmerge.layout import Chunk, MeshAxis

from .megatron_objects import pieces
from .objects import COLUMNS, REPLICATE, SHARD, checkpoint, stored, tensor


def _drawn(grid: Grid | None) -> list[list[str]]:
    assert grid is not None
    return [[patch.text for patch in row] for row in grid.patches]


def test_rows_cut_over_two_axes_are_drawn_as_they_lie() -> None:
    grid = shard_map(tensor("w", (9, 6), {"fsdp": (2, SHARD), "tp": (2, COLUMNS)}))
    assert _drawn(grid) == [["rank 0", "rank 1"], ["rank 2", "rank 3"]]
    assert grid is not None
    assert (grid.row_heads, grid.column_heads) == (("0:5", "5:9"), ("0:3", "3:6"))
    assert grid.sizes == (1.0, 0.8)


def test_copies_are_in_one_patch_and_empty_ranks_in_a_note() -> None:
    grid = shard_map(tensor("w", (2, 6), {"ddp": (2, REPLICATE), "fsdp": (3, SHARD)}))
    assert _drawn(grid) == [["ranks 0, 3"], ["ranks 1, 4"]]
    assert grid is not None
    assert grid.notes == ("ranks 2, 5: empty, nothing of it",)


@pytest.mark.parametrize(("shape", "mesh"), [((4,), {"fsdp": (4, REPLICATE)}), ((), {"fsdp": (4, REPLICATE)})])
def test_what_is_whole_is_one_patch(shape: tuple[int, ...], mesh: Mapping[str, tuple[int, Placement]]) -> None:
    grid = shard_map(tensor("w", shape, mesh))
    assert _drawn(grid) == [["ranks 0..3"]]
    assert grid is not None and grid.corner == ""


def test_columns_lie_across() -> None:
    assert _drawn(shard_map(tensor("w", (4, 6), {"tp": (3, COLUMNS)}))) == [["rank 0", "rank 1", "rank 2"]]


def test_of_many_pieces_both_ends_are_drawn_and_their_number_is_said() -> None:
    grid = shard_map(tensor("w", (640, 6), {"fsdp": (64, SHARD)}))
    texts = [row[0] for row in _drawn(grid)]
    assert texts == ["rank 0", "rank 1", "rank 2", "rank 3", "⋯", "rank 61", "rank 62", "rank 63"]
    assert grid is not None
    assert grid.row_heads[3:6] == ("30:40", "⋯", "610:620")
    assert grid.notes == ("dim 0 is in 64 pieces; the first 4 and the last 3 are drawn",)


def test_of_three_cut_dimensions_the_last_two_are_drawn() -> None:
    grid = shard_map(pieces("w", (6, 4, 4), (3, 2, 2), {}, {n: [n] for n in range(12)}))
    assert _drawn(grid) == [["rank 0", "rank 1"], ["rank 2", "rank 3"]]
    assert grid is not None
    assert grid.corner == "dim 1 ↓  dim 2 →"
    assert grid.notes[0] == "dim 0 is in 3 pieces; 0:2 is drawn"


def test_boxes_that_make_no_grid_are_not_drawn() -> None:
    boxes = [Box((0, 0), (3, 2)), Box((0, 2), (1, 2)), Box((1, 2), (2, 2))]
    chunks = tuple(Chunk(box, stored(rank, box.shape), rank) for rank, box in enumerate(boxes))
    whole = tensor("w", (3, 4))
    assert shard_map(replace(whole, chunks=chunks)) is None
    assert shard_map(replace(whole, chunks=())) is None


def test_a_mesh_is_drawn_with_its_ranks_row_by_row() -> None:
    mesh = tuple(MeshAxis(name, size, "Shard(0)") for name, size in (("ddp", 2), ("fsdp", 2), ("tp", 2)))
    grid = mesh_map(checkpoint(mesh=mesh, world_size=8))
    assert _drawn(grid) == [["rank 0", "rank 1"], ["rank 2", "rank 3"], ["rank 4", "rank 5"], ["rank 6", "rank 7"]]
    assert grid is not None
    assert (grid.corner, grid.row_heads[2]) == ("ddp · fsdp ↓  tp →", "1 · 0")
    assert mesh_map(checkpoint(mesh=mesh, world_size=4)) is None
    assert mesh_map(checkpoint(mesh=mesh[:1], world_size=2)) is None


def test_a_large_mesh_is_drawn_by_its_ends() -> None:
    mesh = (MeshAxis("fsdp", 128, "Shard(0)"), MeshAxis("tp", 8, "Shard(1)"))
    grid = mesh_map(checkpoint(mesh=mesh, world_size=1024))
    assert _drawn(grid)[-1][-1] == "rank 1,023"
    assert grid is not None
    assert grid.notes == ("128 rows; the first 4 and the last 3 are drawn",)


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0, 1"),
        (range(8), "ranks 0..7"),
        ([0, 2, 4], "ranks 0..4 step 2"),
        ([0, 1, 5, 6, 9, 11], "ranks 0, 1, 5, 6 and 2 more"),
    ],
)
def test_ranks_in_words(ranks: Sequence[int], said: str) -> None:
    assert ranks_in_words(ranks) == said


def test_the_text_draws_lines_around_the_patches() -> None:
    grid = shard_map(tensor("w", (9, 6), {"fsdp": (2, SHARD), "tp": (2, COLUMNS)}), "w [9, 6]")
    assert grid is not None
    drawn = render_text(View("V", "s", sections=(Section("Map", grids=(grid,)),))).splitlines()[3:]
    assert drawn == [
        "  w [9, 6]",
        "         0:3      3:6      dim 0 ↓  dim 1 →",
        "      ┌────────┬────────┐",
        "  0:5 │ rank 0 │ rank 1 │",
        "  5:9 │ rank 2 │ rank 3 │",
        "      └────────┴────────┘",
    ]
