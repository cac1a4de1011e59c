"""Boxes, placements and views against numpy and torch, on random shapes and meshes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from nbmerge.geometry import (
    REPLICATE,
    Box,
    Placement,
    boxes_of_run,
    chunk_bounds,
    contiguous_strides,
    local_box,
    ravel,
    reshape_box,
    runs_of_box,
    shard_order,
    tiling_faults,
    unravel,
    viewed_strides,
)

Shape = tuple[int, ...]


def shapes(low: int = 0, high: int = 5, *, least: int = 0, most: int = 4) -> st.SearchStrategy[Shape]:
    return st.lists(st.integers(low, high), min_size=least, max_size=most).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: Shape) -> Box:
    starts = [draw(st.integers(0, size)) for size in shape]
    return Box(
        tuple(starts), tuple(draw(st.integers(0, size - start)) for start, size in zip(starts, shape, strict=True))
    )


def window(array, box: Box):
    """The part of an array or tensor that the box holds."""
    return array[(*(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True)), ...)]


def numbered(shape: Shape) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def faults_by_painting(shape: Shape, parts: list[Box]) -> bool:
    """Whether the boxes fail to tile the shape, found by counting on every element."""
    count = np.zeros(shape, int)
    for box in parts:
        if any(stop > size for stop, size in zip(box.stop, shape, strict=True)) and box.numel:
            return True
        window(count, box)[...] += 1
    return not (count == 1).all()


class TestBox:
    @given(data=st.data(), shape=shapes())
    def test_intersection_is_what_both_hold(self, data: st.DataObject, shape: Shape):
        a, b = data.draw(boxes(shape)), data.draw(boxes(shape))
        both = np.zeros(shape, int)
        window(both, a)[...] += 1
        window(both, b)[...] += 1
        common = a.intersect(b)
        assert common == b.intersect(a)
        assert (0 if common is None else common.numel) == (both == 2).sum()
        if common is not None:
            assert (window(both, common) == 2).all()

    @given(data=st.data(), shape=shapes())
    def test_moving_there_and_back_changes_nothing(self, data: st.DataObject, shape: Shape):
        box, by = data.draw(boxes(shape)), data.draw(st.tuples(*[st.integers(0, 9) for _ in shape]))
        assert box.shift(by).relative_to(by) == box
        assert box.shift(by).numel == box.numel

    def test_is_written_as_a_slice(self):
        assert str(Box((0, 4), (2, 3))) == "[0:2, 4:7]"
        assert str(Box((), ())) == "[]"


@given(shape=shapes(1))
def test_ravel_and_strides_are_those_of_numpy(shape: Shape):
    array = np.empty(shape, np.uint8)
    assert math.prod(shape) < 2 or [
        stride for stride, size in zip(contiguous_strides(shape), shape, strict=True) if size > 1
    ] == [stride for stride, size in zip(array.strides, shape, strict=True) if size > 1]
    for position in range(min(array.size, 40)):
        index = unravel(position, shape)
        assert index == tuple(map(int, np.unravel_index(position, shape)))
        assert ravel(index, shape) == position


@given(length=st.integers(0, 200), parts=st.integers(1, 20))
def test_chunk_bounds_are_those_of_torch_chunk(length: int, parts: int):
    cut = [chunk.tolist() for chunk in torch.arange(length).chunk(parts)]
    cut += [[]] * (parts - len(cut))
    for index, rows in enumerate(cut):
        start, count = chunk_bounds(length, parts, index)
        assert list(range(start, start + count)) == rows


# Placements


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Shape, Shape, list[Placement], dict[int, list[int]]]:
    """A shape, a mesh, placements, and the order in which the mesh dimensions cut each tensor dimension."""
    shape = draw(shapes(0, 13, least=1, most=3))
    mesh = draw(shapes(1, 4, least=1, most=3))
    one = st.one_of(st.none(), st.integers(0, len(shape) - 1))
    dims = draw(st.lists(one, min_size=len(mesh), max_size=len(mesh)))
    order: dict[int, list[int]] = {}
    for mesh_dim, dim in enumerate(dims):
        if dim is not None:
            order.setdefault(dim, []).append(mesh_dim)
    order = {dim: draw(st.permutations(mesh_dims)) for dim, mesh_dims in order.items()}
    placements = [REPLICATE if dim is None else Placement("shard", dim) for dim in dims]
    for dim, mesh_dims in order.items():
        for position, mesh_dim in enumerate(mesh_dims):
            factor = math.prod(mesh[earlier] for earlier in mesh_dims[:position] if earlier > mesh_dim)
            placements[mesh_dim] = Placement("shard", dim, factor)
    return shape, mesh, placements, order


def cut_by_torch(tensor: torch.Tensor, mesh: Shape, order: dict[int, list[int]], coordinate: Shape) -> torch.Tensor:
    """What is left at a coordinate when torch.chunk cuts the tensor along each mesh dimension in order."""
    for dim, mesh_dims in order.items():
        for mesh_dim in mesh_dims:
            parts = tensor.chunk(mesh[mesh_dim], dim)
            at = coordinate[mesh_dim]
            tensor = parts[at] if at < len(parts) else tensor.narrow(dim, 0, 0)
    return tensor


def coordinates(mesh: Shape) -> list[Shape]:
    return list(itertools.product(*map(range, mesh)))


class TestPlacements:
    @given(layout=layouts())
    @example(layout=((257,), (4, 2), [Placement("shard", 0, 2), Placement("shard", 0)], {0: [1, 0]}))
    def test_each_rank_holds_what_torch_chunk_leaves_it_in_the_order_of_the_cuts(self, layout):
        shape, mesh, placements, order = layout
        tensor = torch.arange(math.prod(shape)).reshape(shape)
        for coordinate in coordinates(mesh):
            box = local_box(shape, placements, mesh, coordinate)
            assert torch.equal(window(tensor, box), cut_by_torch(tensor, mesh, order, coordinate))
            assert box.shape == local_box(shape, placements, mesh, coordinate, order).shape

    @given(layout=layouts())
    def test_the_boxes_of_all_ranks_tile_the_tensor(self, layout):
        shape, mesh, placements, _ = layout
        replicated = [size for size, placement in zip(mesh, placements, strict=True) if placement.kind == "replicate"]
        parts = [local_box(shape, placements, mesh, coordinate) for coordinate in coordinates(mesh)]
        once = list(dict.fromkeys(box for box in parts if box.numel))
        assert tiling_faults(shape, once) == []
        assert not faults_by_painting(shape, once)
        assert sum(box.numel for box in parts) == math.prod(shape) * math.prod(replicated)

    @given(layout=layouts())
    def test_unstrided_placements_are_those_of_torch(self, layout):
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

        shape, mesh, placements, _ = layout
        placements = [REPLICATE if p.kind == "replicate" else Placement("shard", p.dim) for p in placements]
        theirs = [Replicate() if p.kind == "replicate" else Shard(p.dim) for p in placements]
        for coordinate in coordinates(mesh):
            box = local_box(shape, placements, mesh, coordinate)
            local, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), theirs)
            assert box.shape == tuple(local)
            assert not box.numel or box.offset == tuple(offset)

    @given(layout=layouts())
    def test_even_strided_placements_are_those_of_torch(self, layout):
        """Even ones only: for uneven ones torch 2.13 reads placements from left to right, which is wrong."""
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
        from torch.distributed.tensor.placement_types import _StridedShard

        shape, mesh, placements, _ = layout
        shape = tuple(
            size * math.prod(m for m, p in zip(mesh, placements, strict=True) if p.dim == dim)
            for dim, size in enumerate(shape)
        )
        theirs = [
            Replicate() if p.kind == "replicate"
            else Shard(p.dim) if p.split_factor == 1
            else _StridedShard(p.dim, split_factor=p.split_factor)
            for p in placements
        ]  # fmt: skip
        for coordinate in coordinates(mesh):
            box = local_box(shape, placements, mesh, coordinate)
            local, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), theirs)
            assert box.shape == tuple(local)
            assert not box.numel or box.offset == tuple(offset)

    def test_the_pieces_of_257_rows_on_4_by_2_ranks(self):
        """What torch's own full_tensor() relies on: the last data-parallel rank holds 30 and 32 rows."""
        placements = [Placement("shard", 0, 2), Placement("shard", 0)]
        last = [local_box((257, 18), placements, (4, 2), (3, tp)) for tp in range(2)]
        assert [box.shape[0] for box in last] == [30, 32]

    def test_a_split_factor_that_no_order_gives(self):
        with pytest.raises(
            ValueError, match=r"StridedShard\(0, sf=3\) on mesh dimension 0 of a mesh of shape \(2, 2\)"
        ):
            shard_order([Placement("shard", 0, 3), Placement("shard", 0)], (2, 2))

    def test_a_dimension_that_the_tensor_does_not_have(self):
        with pytest.raises(ValueError, match=r"Shard\(2\) of a tensor of shape \(4, 4\)"):
            local_box((4, 4), [Placement("shard", 2)], (2,), (0,))

    def test_are_written_as_torch_writes_them(self):
        every = [REPLICATE, Placement("shard", 1), Placement("shard", 0, 2), Placement("partial")]
        assert list(map(str, every)) == ["Replicate", "Shard(1)", "StridedShard(0, sf=2)", "Partial"]


class TestTilingFaults:
    @given(data=st.data(), shape=shapes(0, 4, most=3))
    def test_are_found_exactly_where_painting_finds_them(self, data: st.DataObject, shape: Shape):
        parts = data.draw(st.lists(boxes(shape), max_size=5))
        assert bool(tiling_faults(shape, parts)) == faults_by_painting(shape, parts)

    @given(layout=layouts(), data=st.data())
    def test_a_piece_taken_away_is_a_gap(self, layout, data: st.DataObject):
        shape, mesh, placements, _ = layout
        parts = {local_box(shape, placements, mesh, coordinate) for coordinate in coordinates(mesh)}
        filled = sorted((box for box in parts if box.numel), key=lambda box: box.offset)
        assume(filled)
        lost = data.draw(st.sampled_from(filled))
        faults = tiling_faults(shape, [box for box in filled if box != lost])
        assert faults == [f"{lost.numel:,} of {math.prod(shape):,} elements lie in no piece"]

    @given(layout=layouts(), data=st.data())
    def test_a_piece_that_is_there_twice_is_an_overlap(self, layout, data: st.DataObject):
        shape, mesh, placements, _ = layout
        parts = {local_box(shape, placements, mesh, coordinate) for coordinate in coordinates(mesh)}
        filled = [box for box in parts if box.numel]
        assume(filled)
        twice = data.draw(st.sampled_from(filled))
        assert tiling_faults(shape, [*filled, twice]) == [f"{twice} and {twice} overlap in {twice}"]

    def test_a_gap_and_an_overlap_of_the_same_size_are_both_told(self):
        """Their sums cancel: 4 elements missing, 4 too many."""
        faults = tiling_faults((8,), [Box((0,), (4,)), Box((0,), (4,))])
        assert faults == ["[0:4] and [0:4] overlap in [0:4]"]

    def test_a_box_outside(self):
        assert tiling_faults((4, 2), [Box((0, 0), (5, 2))]) == ["[0:5, 0:2] lies outside [4, 2]"]
        assert tiling_faults((4,), [Box((-1,), (5,))]) == ["[-1:4] lies outside [4]"]

    def test_a_scalar_is_held_once(self):
        whole = Box((), ())
        assert tiling_faults((), [whole]) == []
        assert tiling_faults((), [whole, whole]) == ["2 pieces of a 0-d tensor"]
        assert tiling_faults((), []) == ["1 of 1 elements lie in no piece"]

    def test_empty_boxes_do_not_count(self):
        assert tiling_faults((2,), [Box((0,), (2,)), Box((1,), (0,)), Box((2,), (0,))]) == []
        assert tiling_faults((0, 3), []) == []


# Runs and views


class TestRuns:
    @given(data=st.data(), shape=shapes())
    def test_the_runs_of_a_box_are_its_elements_in_order(self, data: st.DataObject, shape: Shape):
        box = data.draw(boxes(shape))
        runs = list(runs_of_box(shape, box))
        got = [position for start, length in runs for position in range(start, start + length)]
        assert got == window(numbered(shape), box).reshape(-1).tolist()
        assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs)), "neighbours are one run"

    @given(data=st.data(), shape=shapes())
    def test_the_boxes_of_a_run_are_its_elements_in_order(self, data: st.DataObject, shape: Shape):
        size = math.prod(shape)
        start = data.draw(st.integers(0, size))
        length = data.draw(st.integers(0, size - start))
        found = boxes_of_run(shape, start, length)
        flat = [x for box in found for x in window(numbered(shape), box).reshape(-1).tolist()]
        assert flat == list(range(start, start + length))
        assert len(found) <= max(2 * len(shape) - 1, 1)


@st.composite
def regrouped(draw: st.DrawFn) -> tuple[Shape, Shape]:
    """Two shapes of the same number of elements, with dimensions of size 1 thrown in."""
    factors = draw(st.lists(st.integers(1, 4), max_size=5))

    def shape() -> Shape:
        sizes: list[int] = []
        for factor in draw(st.permutations(factors)) if draw(st.booleans()) else factors:
            if sizes and draw(st.booleans()):
                sizes[-1] *= factor
            else:
                sizes.append(factor)
        for _ in range(draw(st.integers(0, 2))):
            sizes.insert(draw(st.integers(0, len(sizes))), 1)
        return tuple(sizes)

    return shape(), shape()


class TestReshape:
    @given(data=st.data(), both=regrouped())
    @example(data=None, both=((), (1, 1)))
    def test_pairs_of_boxes_hold_the_same_elements(self, data: st.DataObject | None, both: tuple[Shape, Shape]):
        old, new = both
        box = Box.whole(old) if data is None else data.draw(boxes(old))
        a, b = numbered(old), numbered(new)
        painted = np.zeros(old, int)
        for source, target in reshape_box(old, new, box):
            assert window(a, source).reshape(-1).tolist() == window(b, target).reshape(-1).tolist()
            window(painted, source)[...] += 1
        window(painted, box)[...] -= 1
        assert not painted.any(), "every element of the box once, and no other"

    @given(both=regrouped())
    def test_a_whole_tensor_is_as_few_boxes_as_it_has_shared_dimensions(self, both: tuple[Shape, Shape]):
        shape = both[0]
        assert len(list(reshape_box(shape, shape, Box.whole(shape)))) == 1

    def test_a_shard_of_experts_stays_one_box_when_heads_are_regrouped(self):
        """[experts, 4 * 8, hidden] → [experts, 4, 8, hidden]: only the middle is regrouped."""
        pairs = list(reshape_box((6, 32, 5), (6, 4, 8, 5), Box((2, 8, 0), (2, 16, 5))))
        assert pairs == [(Box((2, 8, 0), (2, 16, 5)), Box((2, 1, 0, 0), (2, 2, 8, 5)))]

    @pytest.mark.parametrize(("old", "new"), [((0,), (0, 3)), ((2, 0), (0,)), ((0, 0), (0, 1, 5)), ((3, 0, 2), (0, 7))])
    def test_a_tensor_without_elements_has_no_boxes_to_hold_any(self, old: Shape, new: Shape):
        assert all(not source.numel for source, _ in reshape_box(old, new, Box.whole(old)))


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    """A view of numbered elements: permuted, sliced, expanded or with dimensions of size 1."""
    shape = draw(shapes(1, 4, most=4))
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["permute", "slice", "unsqueeze", "expand", "step"]))
        if kind == "unsqueeze" or not tensor.dim():
            tensor = tensor.unsqueeze(draw(st.integers(0, tensor.dim())))
        elif kind == "permute":
            tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
        elif kind == "expand":
            tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
        else:
            dim = draw(st.integers(0, tensor.dim() - 1))
            start = draw(st.integers(0, tensor.shape[dim] - 1))
            step = 2 if kind == "step" else 1
            tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
    return tensor


class TestViewedStrides:
    @given(tensor=strided(), data=st.data())
    def test_a_view_is_given_where_torch_gives_one_and_holds_the_same_elements(
        self, tensor: torch.Tensor, data: st.DataObject
    ):
        size = tensor.numel()
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        first = data.draw(st.sampled_from(divisors))
        second = data.draw(st.sampled_from([n for n in divisors if (size // first) % n == 0]))
        new = data.draw(
            st.sampled_from(
                [
                    tuple(tensor.shape),
                    (first, size // first),
                    (first, second, size // first // second),
                    (size,),
                    (1, first, 1, size // first),
                ]
            )
        )
        strides = viewed_strides(tuple(tensor.shape), tensor.stride(), new)
        try:
            theirs = tensor.view(new)
        except RuntimeError:
            assert strides is None
            return
        assert strides is not None
        seen = torch.as_strided(tensor, new, strides)
        assert torch.equal(seen, theirs)

    def test_a_tensor_without_elements_can_always_be_seen_so(self):
        assert viewed_strides((2, 0), (5, 1), (0, 7)) == contiguous_strides((0, 7))
