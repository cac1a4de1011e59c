"""Headers that are written and read, and how tensors are dealt to files: as the libraries of the field do it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from nbmerge import CorruptFileError
from nbmerge.dtypes import BY_CODE, BY_NAME, parse_dtype
from nbmerge.engine.safetensors_file import deal, index_json, lay_out, read_header
from nbmerge.expressions import Expr, Fill
from tests.support import examples
from tests.support.library import SAVED, SAVED_AND_LOADED
from tests.support.messages import assert_says, refusal
from tests.support.results import bits


def zeros(shape: tuple[int, ...], dtype: str = "float32") -> Expr:
    return Fill(0, shape, BY_NAME[dtype])


def written(path: Path, named: dict[str, Expr]) -> Path:
    """A file of zeros."""
    file = lay_out(path.name, named)
    path.write_bytes(file.header + bytes(file.data_bytes))
    return path


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@examples(80)
@given(named=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(SAVED_AND_LOADED)), max_size=6))
def test_the_safetensors_library_reads_what_is_laid_out(tmp_path_factory: pytest.TempPathFactory, named):
    path = tmp_path_factory.mktemp("laid") / "model.safetensors"
    written(path, {name: zeros(shape, dtype) for name, (shape, dtype) in named.items()})
    loaded = load_file(path)
    assert {name: bits(tensor) for name, tensor in loaded.items()} == {
        name: bits(torch.zeros(shape, dtype=getattr(torch, dtype))) for name, (shape, dtype) in named.items()
    }
    assert {name: (entry.dtype.name, entry.shape) for name, entry in read_header(path).items()} == {
        name: (dtype, shape) for name, (shape, dtype) in named.items()
    }


def test_every_element_type_is_known_to_the_library_under_the_same_code(tmp_path: Path):
    for dtype in map(BY_NAME.__getitem__, SAVED):
        path = tmp_path / "one.safetensors"
        save_file(
            {"t": torch.zeros(2, dtype=torch.uint8).repeat(dtype.itemsize).view(getattr(torch, dtype.name))}, path
        )
        assert read_header(path)["t"].dtype == dtype
        assert BY_CODE[dtype.code] == dtype == parse_dtype(f"torch.{dtype.name}") == parse_dtype(dtype.code)
        assert getattr(torch, dtype.name).itemsize == dtype.itemsize
        assert getattr(torch, dtype.name).is_floating_point == dtype.is_floating


def test_an_element_type_that_is_not_stored_is_named_with_those_that_are():
    with pytest.raises(KeyError, match="'quint8' is no element type that safetensors stores; known: float64, float32"):
        parse_dtype("quint8")


@given(named=st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(list(BY_NAME))), max_size=8))
def test_data_begins_at_a_multiple_of_8_and_every_tensor_at_a_multiple_of_its_element(named):
    file = lay_out("f", {name: zeros(shape, dtype) for name, (shape, dtype) in named.items()})
    assert len(file.header) % 8 == 0
    assert all((len(file.header) + t.offset) % t.expr.dtype.itemsize == 0 for t in file.tensors)
    ends = [0, *(t.offset + t.nbytes for t in file.tensors)]
    assert [t.offset for t in file.tensors] == ends[:-1] and ends[-1] == file.data_bytes


@given(
    named=st.dictionaries(st.text("abc.é", min_size=1, max_size=5), st.sampled_from(["float32", "bfloat16", "bool"]))
)
def test_tensors_lie_in_the_order_of_the_safetensors_library(named):
    theirs = save({name: torch.zeros(3, dtype=getattr(torch, dtype)) for name, dtype in named.items()})
    header = json.loads(theirs[8 : 8 + int.from_bytes(theirs[:8], "little")])
    order = sorted(header, key=lambda name: header[name]["data_offsets"])
    ours = lay_out("f", {name: zeros((3,), dtype) for name, dtype in named.items()})
    widths = [tensor.expr.dtype.itemsize for tensor in ours.tensors]
    assert widths == sorted(widths, reverse=True)
    if len(set(named.values())) <= 1:  # between types of the same width the library has an order of its own
        assert [tensor.name for tensor in ours.tensors] == order


def test_the_header_says_pytorch():
    file = lay_out("f", {"w": zeros((1,))})
    assert json.loads(file.header[8:])["__metadata__"] == {"format": "pt"}


@examples(150)
@given(sizes=st.lists(st.integers(1, 40), max_size=30), limit=st.integers(1, 100))
def test_tensors_are_dealt_as_huggingface_hub_deals_them(sizes: list[int], limit: int):
    from huggingface_hub import split_torch_state_dict_into_shards

    state = {f"t{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate(sizes)}
    theirs = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=limit
    )
    files = deal({name: zeros(tuple(t.shape), "uint8") for name, t in state.items()}, limit)
    assert {file.name: sorted(t.name for t in file.tensors) for file in files} == {
        name: sorted(tensors) for name, tensors in theirs.filename_to_tensors.items()
    } or not sizes
    if theirs.is_sharded:
        content = json.loads(index_json(files))
        assert content["weight_map"] == theirs.tensor_to_filename
        assert content["metadata"]["total_size"] == theirs.metadata["total_size"] == sum(sizes)
        assert content["metadata"]["total_parameters"] == sum(sizes)


def test_no_tensors_are_one_file():
    assert [file.name for file in deal({}, 10)] == ["model.safetensors"]


class TestAFileThatIsNotWhole:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return written(tmp_path / "model.safetensors", {"w": zeros((4, 3)), "b": zeros((2,), "bfloat16")})

    def test_is_refused_wherever_it_is_cut(self, path: Path):
        data = path.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            assert_says(refusal(CorruptFileError, read_header, path), str(path), "fix:")

    def test_is_refused_with_bytes_after_its_end(self, path: Path):
        path.write_bytes(path.read_bytes() + b"\0")
        message = refusal(CorruptFileError, read_header, path)
        assert_says(message, "bytes that belong to no tensor", f"{path.stat().st_size:,} bytes")

    def test_is_refused_with_a_hole_between_tensors(self, path: Path):
        assert_says(self.with_header(path, lambda h: h["b"].update(data_offsets=[50, 54])), "where:", "fix:")

    def test_is_refused_where_tensors_overlap(self, path: Path):
        assert_says(self.with_header(path, lambda h: h["w"].update(data_offsets=[4, 52])), "where:", "fix:")

    def test_is_refused_where_a_shape_does_not_fit_its_bytes(self, path: Path):
        message = self.with_header(path, lambda h: h["w"].update(shape=[5, 3]))
        assert_says(message, "'w'", "where:")

    @pytest.mark.parametrize(
        "entry",
        [
            None,
            [],
            "x",
            {},
            {"dtype": "F32", "shape": [4, 3]},
            {"dtype": "F77", "shape": [4, 3], "data_offsets": [0, 48]},
            {"dtype": "F32", "shape": 12, "data_offsets": [0, 48]},
            {"dtype": "F32", "shape": [4, 3], "data_offsets": [0]},
            {"dtype": "F32", "shape": [4, 3], "data_offsets": ["0", "48"]},
            {"dtype": "F32", "shape": ["4", 3], "data_offsets": [0, 48]},
            {"dtype": "F32", "shape": [-4, -3], "data_offsets": [0, 48]},
        ],
        ids=str,
    )
    def test_is_refused_with_an_entry_that_is_none(self, path: Path, entry: object):
        assert_says(self.with_header(path, lambda h: h.update(w=entry)), str(path), "fix:")

    @pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b"\xff\xff", b"[" * 5000])
    def test_is_refused_with_a_header_that_is_no_object(self, path: Path, text: bytes):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        assert_says(refusal(CorruptFileError, read_header, path), str(path), "fix:")

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 200])
    def test_is_refused_with_an_overlong_header_before_that_is_read(self, path: Path, length: int):
        data = path.read_bytes()
        path.write_bytes(length.to_bytes(8, "little") + data[8:])
        assert_says(
            refusal(CorruptFileError, read_header, path), f"a header of {length:,} bytes in a file of {len(data):,}"
        )

    @staticmethod
    def with_header(path: Path, change) -> str:
        """The refusal of the file with its header changed."""
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
        return refusal(CorruptFileError, read_header, path)
