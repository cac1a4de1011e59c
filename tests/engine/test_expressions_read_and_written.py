"""Random expressions, evaluated three ways that must agree bit for bit: torch, `read`, and a written file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from nbmerge import expressions as ex
from nbmerge.dtypes import BY_NAME
from nbmerge.engine import copy, lower
from nbmerge.engine.comparison import first_difference
from nbmerge.engine.lower import blocks, pieces, tiles
from nbmerge.engine.read import read
from nbmerge.engine.safetensors_file import lay_out, read_header
from nbmerge.engine.sources import LocalFiles
from nbmerge.expressions import Expr, Stored
from nbmerge.geometry import Box, contiguous_strides, runs_of_box, tiling_faults, unravel
from tests.support import examples
from tests.support.library import SAVED_AND_LOADED
from tests.support.results import bits
from tests.support.trees import DTYPES, Forest, as_values, data_of, shapes


@st.composite
def forests(draw: st.DrawFn, path: Path, count: int = 1):
    """Trees of any shapes and dtypes, with their file written."""
    forest = Forest(path, draw)
    trees = [forest.tree(draw(shapes()), BY_NAME[draw(st.sampled_from(DTYPES))]) for _ in range(count)]
    forest.write()
    return trees


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forest") / "leaves.bin"


@pytest.fixture(scope="module", autouse=True, params=[(8 * 2**20, 64), (12, 1)], ids=["", "small tiles"])
def _limits(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of it as it is, and with limits that make the small tensors of this module tiles and reshapes in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "TILE_BYTES", request.param[0])
        patch.setattr(lower, "_FEW_PIECES", request.param[1])
        yield


def region_of(data: st.DataObject, shape: tuple[int, ...]) -> Box:
    starts = [data.draw(st.integers(0, size)) for size in shape]
    return Box(
        tuple(starts), tuple(data.draw(st.integers(0, size - start)) for start, size in zip(starts, shape, strict=True))
    )


def write(named: dict[str, Expr], target: Path, buffer_bytes: int, *, batch: bool = False) -> None:
    """A safetensors file of the expressions, through the jobs that a merge carries out."""
    file = lay_out(target.name, named)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        os.ftruncate(fd, file.size)
        copy.write_all(fd, memoryview(file.header), 0)
        with LocalFiles() as sources:
            jobs = (
                job
                for tensor in file.tensors
                for job in copy.jobs_of(tensor.expr, len(file.header) + tensor.offset, buffer_bytes)
            )
            for job in copy.batched(jobs) if batch else jobs:
                copy.carry_out(job, fd, sources)
    finally:
        os.close(fd)


@examples(250)
@given(data=st.data())
def test_any_region_reads_as_torch_makes_it(path: Path, data: st.DataObject):
    ((expr, want),) = data.draw(forests(path))
    assert expr.shape == tuple(want.shape)
    with LocalFiles() as sources:
        for _ in range(3):
            region = region_of(data, expr.shape)
            got = read(expr, region, sources)
            part = want[(*(slice(a, b) for a, b in zip(region.offset, region.stop, strict=True)), ...)]
            assert got.shape == region.shape
            assert got.tobytes() == data_of(part)


@examples(120)
@given(data=st.data())
def test_a_written_file_holds_what_torch_makes(path: Path, data: st.DataObject):
    trees = data.draw(forests(path, count=3))
    target = path.with_name("written.safetensors")
    write({f"t{i}": expr for i, (expr, _) in enumerate(trees)}, target, data.draw(st.sampled_from([1, 7, 24, 2**20])))
    entries = read_header(target)
    raw = target.read_bytes()
    for i, (expr, want) in enumerate(trees):
        entry = entries[f"t{i}"]
        assert (entry.dtype, entry.shape) == (expr.dtype, expr.shape)
        assert raw[entry.offset : entry.offset + entry.nbytes] == data_of(want)
    if not {expr.dtype.name for expr, _ in trees} <= set(SAVED_AND_LOADED):
        return
    theirs = load_file(target)
    for i, (expr, want) in enumerate(trees):
        assert bits(theirs[f"t{i}"]) == bits(as_values(want, expr.dtype))


@examples(60)
@given(data=st.data())
def test_batched_jobs_write_the_same_as_single_ones(path: Path, data: st.DataObject):
    trees = data.draw(forests(path, count=2))
    named = {f"t{i}": expr for i, (expr, _) in enumerate(trees)}
    one, other = path.with_name("one.safetensors"), path.with_name("other.safetensors")
    write(named, one, 2**20)
    write(named, other, 16, batch=True)
    assert one.read_bytes() == other.read_bytes()


@examples(60)
@given(data=st.data())
def test_the_pieces_of_an_expression_tile_it(path: Path, data: st.DataObject):
    ((expr, _),) = data.draw(forests(path))
    region = region_of(data, expr.shape)
    found = pieces(expr, region)
    assert all(piece.leaf.shape == piece.box.shape for piece in found)
    assert tiling_faults(region.shape, [piece.box.relative_to(region.offset) for piece in found]) == []


@examples(80)
@given(data=st.data())
def test_a_flipped_bit_is_found_where_it_is(path: Path, data: st.DataObject):
    ((expr, want),) = data.draw(forests(path))
    block = data.draw(st.sampled_from([1, 16, 2**20]))
    flat = data_of(want)
    copied = path.with_name("copied.bin")
    same = Stored(str(copied), 0, expr.shape, contiguous_strides(expr.shape), expr.dtype)
    with LocalFiles() as sources:
        copied.write_bytes(flat)
        assert first_difference(expr, same, block, sources) is None
    if not flat:
        return
    at = data.draw(st.integers(0, len(flat) - 1))
    changed = bytearray(flat)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    copied.write_bytes(changed)
    with LocalFiles() as sources:
        found = first_difference(expr, same, block, sources)
    flat_index = at // expr.dtype.itemsize
    assert found == unravel(flat_index, expr.shape)


@given(shape=shapes(high=6), itemsize=st.sampled_from([1, 2, 4, 8]), limit=st.integers(1, 200))
def test_blocks_tile_a_tensor_in_order_each_one_run_and_none_above_the_limit(shape, itemsize: int, limit: int):
    found = list(blocks(shape, itemsize, limit))
    assert tiling_faults(shape, found) == []
    runs = [list(runs_of_box(shape, box)) for box in found]
    assert all(len(run) == 1 for run in runs)
    assert [run[0] for run in runs] == sorted(run[0] for run in runs)
    assert all(box.numel * itemsize <= max(limit, itemsize) for box in found)


@given(shape=shapes(high=9), itemsize=st.sampled_from([1, 2, 4, 8]), limit=st.integers(1, 200), data=st.data())
def test_tiles_tile_a_tensor_none_above_the_limit(shape, itemsize: int, limit: int, data: st.DataObject):
    if shape:
        found = list(tiles(shape, itemsize, limit, data.draw(st.integers(0, len(shape) - 1))))
        assert tiling_faults(shape, found) == []
        assert all(box.numel * itemsize <= max(limit, itemsize) for box in found)


class TestSubstitute:
    """A naming rule over Inputs is the same views over the real tensors."""

    @examples(60)
    @given(data=st.data())
    def test_reads_as_the_rule_over_the_tensor(self, path: Path, data: st.DataObject):
        forest = Forest(path, data.draw)
        shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
        source, want = forest.tree(shape, BY_NAME["bfloat16"], 2)
        forest.write()
        given_name = ex.Input("w", shape, BY_NAME["float32"])
        rule = ex.permute(ex.select(given_name, 0, shape[0] - 1), (1, 0))
        made = ex.substitute(rule, {"w": source})
        assert ex.input_names(rule) == ["w"] and ex.input_names(made) == []
        with LocalFiles() as sources:
            got = read(made, Box.whole(made.shape), sources)
        assert got.tobytes() == data_of(want[-1].permute(1, 0))

    def test_leaves_what_it_has_no_tensor_for(self):
        rule = ex.select(ex.Input("w", (2, 3), BY_NAME["float32"]), 0, 1)
        assert ex.substitute(rule, {"v": rule}) is rule


class TestViewsOfStoredTensors:
    """Views that are taken of what a tensor is made of read as views of the tensor."""

    @examples(60)
    @given(data=st.data())
    def test_rows_are_those_of_the_tensor_and_stack_to_it_again(self, path: Path, data: st.DataObject):
        forest = Forest(path, data.draw)
        shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
        expr, want = forest.tree(shape, BY_NAME["bfloat16"], 2)
        forest.write()
        rows = ex.rows_of(expr)
        assert [row.shape for row in rows] == [shape[1:]] * shape[0]
        with LocalFiles() as sources:
            for row, real in zip(rows, want, strict=True):
                assert read(row, Box.whole(row.shape), sources).tobytes() == data_of(real)
            again = ex.stack(rows)
            assert read(again, Box.whole(shape), sources).tobytes() == data_of(want)

    def test_a_paste_of_single_rows_gives_them_up_without_its_other_parts(self):
        stored = [ex.Stored("f", 16 * row, (1, 4), (4, 1), BY_NAME["float32"]) for row in range(3)]
        rows = ex.rows_of(ex.Paste((3, 4), BY_NAME["float32"], tuple(((i, 0), part) for i, part in enumerate(stored))))
        assert rows == [ex.Stored("f", 16 * row, (4,), (1,), BY_NAME["float32"]) for row in range(3)]

    def test_a_slice_of_a_paste_is_the_parts_that_it_touches(self):
        halves = [ex.Stored("f", 48 * half, (3, 4), (4, 1), BY_NAME["float32"]) for half in range(2)]
        assert ex.narrow(ex.cat(halves, 0), 0, 3, 3) == halves[1]
        both = ex.narrow(ex.cat(halves, 0), 0, 2, 2)
        assert [part.shape for _, part in both.parts] == [(1, 4), (1, 4)]  # type: ignore[attr-defined]


class TestBuilders:
    source = ex.Input("w", (4, 6), BY_NAME["float32"])

    def test_do_nothing_where_nothing_changes(self):
        assert ex.reshape(self.source, (4, 6)) is self.source
        assert ex.permute(self.source, (0, 1)) is self.source
        assert ex.slice_of(self.source, Box.whole((4, 6))) is self.source
        assert ex.cat([self.source], 0) is self.source

    def test_fold_what_follows_itself(self):
        assert ex.narrow(ex.narrow(self.source, 0, 1, 3), 0, 1, 1) == ex.Slice(self.source, Box((2, 0), (1, 6)))
        assert ex.reshape(ex.reshape(self.source, (24,)), (2, 12)) == ex.Reshape(self.source, (2, 12))

    def test_refuse_a_reshape_to_another_size(self):
        with pytest.raises(ValueError, match=r"\[4, 6\] cannot be reshaped to \[5, 5\]"):
            ex.reshape(self.source, (5, 5))

    def test_know_a_copy_from_a_computation(self):
        assert ex.is_copy(ex.Fill(0, (2,), BY_NAME["float32"]))
        assert not ex.is_copy(
            ex.cat([ex.Fill(0, (2,), BY_NAME["float32"]), ex.Cast(self.source, BY_NAME["bfloat16"])], 0)
        )
