"""Pickles of a distributed checkpoint that were made to harm: nothing of them runs, and nothing of ours is changed."""

from __future__ import annotations

import copy
import os
import pickle
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge import CorruptFileError, IncompleteCheckpointError, UnsafePickleError, open_checkpoint
from nbmerge.dtypes import BY_NAME
from nbmerge.loaders import standins
from nbmerge.loaders.dcp import metadata as dcp_metadata
from nbmerge.loaders.opcodes import refuse_excess
from tests.support.megatron import write_torch_dist
from tests.support.megatron_runs import (
    edit_metadata,
    index_of,
    llama,
    made,
    stored_at,
    tensor_entry,
    torch_class,
    write_run,
)
from tests.support.messages import assert_says, refusal
from tests.support.pickles import STATE_DICT, Call, Global, StorageOf, pickled, storage, tensor, write_archive
from tests.support.processes import python
from tests.support.results import assert_same, bits_of, bits_of_all, content_of

MARK = "/tmp/nbmerge-hostile-pickle-ran"
COMMAND = f"touch {MARK}"


def one_tensor(place: tuple[Call, Call] | None = None, **entry: Any) -> Call:
    """An index of one tensor, `w`."""
    return index_of({"w": tensor_entry(**entry)}, dict([place or stored_at()]))


HOSTILE = {
    "os.system": Call(Global("os", "system"), COMMAND),
    "posix.system": Call(Global("posix", "system"), COMMAND),
    "eval": Call(Global("builtins", "eval"), f"open({MARK!r}, 'w')"),
    "exec": Call(Global("__builtin__", "exec"), f"open({MARK!r}, 'w')"),
    "import": Call(Global("builtins", "__import__"), "antigravity"),
    "subprocess": Call(Global("subprocess", "Popen"), COMMAND),
    "functools.partial": Call(Global("functools", "partial"), COMMAND),
    "operator.attrgetter": Call(Global("operator", "attrgetter"), "system"),
    "a dotted name": Global("torch", "os.system"),
    "a method of a class that is let through": Call(Global("torch", "Size.__class__"), "x"),
    "a module beside torch's": Call(Global("torch.distributed.checkpoint.metadata", "os.system"), COMMAND),
    "torch.load": Call(Global("torch", "load"), MARK),
    "a loader of numpy": Call(Global("numpy", "load"), MARK),
}
TRICKS = {
    "getattr of what is let through": Call(Global("builtins", "getattr"), torch_class("Metadata"), "__class__"),
    "getattr of a module": Call(Global("builtins", "getattr"), Global("torch", "Size"), "__subclasses__"),
    "BUILD of a class": Call(Global("torch", "Size"), state={"__reduce__": 1}),
    "an index that is a list": [],
    "an index that is nothing": None,
    "an index that is a chunk": made("ChunkStorageMetadata"),
    "an index of nothing": made("Metadata"),
    "an index of a plan": Call(torch_class("SavePlan", "planner")),
    "entries that are a list": made("Metadata", state_dict_metadata=[], storage_data={}),
    "entries that are a plan": made("Metadata", state_dict_metadata=Call(torch_class("SavePlan", "planner"))),
    "storage that is a list": index_of({"w": tensor_entry()}, []),
    "storage without a key": index_of({"w": tensor_entry()}, {3: stored_at()[1]}),
    "storage without a place": index_of({"w": tensor_entry()}, {stored_at()[0]: 3}),
    "a name that is a number": index_of({3: tensor_entry()}, dict([stored_at()])),
    "a key of no text": one_tensor(place=stored_at(name=3)),
    "a shape of texts": one_tensor(shape=("4",)),
    "a shape that is a number": one_tensor(shape=4),
    "a shape below 0": one_tensor(shape=(-4,)),
    "a shape without end": one_tensor(shape=(2**70,)),
    "a number without end": one_tensor(place=stored_at(offset=1 << 40_000)),
    "a shape in itself": one_tensor(shape=b"raw:" + b"K\x02" + b"\x85" * 100_000),
    "offsets below 0": one_tensor(offsets=(-1,), place=stored_at(at=(-1,))),
    "a chunk of no shape": one_tensor(sizes=None),
    "chunks that are a number": one_tensor(chunks=3),
    "chunks that are nothing": one_tensor(chunks=None),
    "a dtype that is a text": one_tensor(dtype="float32"),
    "a dtype that is changed": one_tensor(dtype=Call(Global("torch", "Size"), state={})),
    "properties that are nothing": one_tensor(properties=None),
    "one chunk in two places": index_of({"w": tensor_entry()}, dict([stored_at(), stored_at(offset=7)])),
    "a persistent id": StorageOf("storage", Global("torch", "FloatStorage"), "0", "cpu", 4),
    "an element type that BUILD changes": b"raw:ctorch\nfloat32\n}U\x08itemsizeK\x01sb",
    "a function that BUILD changes": b"raw:ctorch.serialization\n_get_layout\n}U\x09_functionK\x01sb",
    "a class that BUILD changes": b"raw:ctorch.distributed.checkpoint.metadata\nMetadata\n}U\x04keptK\x01sb",
    "slots that BUILD changes": b"raw:ctorch.distributed.checkpoint.metadata\nMetadata\n)RN}U\x0aattributesK\x01s\x86b",
    "a call of a call": Call(Call(Global("builtins", "getattr"), Global("torch", "device"), "__call__")),
    "a memo without end": b"raw:Nr\xff\xff\xff\xff",
    "a memo without end, as text": b"raw:Np99999999999\n",
    "a text without end": b"raw:\x8d" + (1 << 40).to_bytes(8, "little") + b"x",
    "bytes without end": b"raw:\x8e" + (1 << 40).to_bytes(8, "little") + b"x",
    "an array without end": b"raw:\x96" + (1 << 40).to_bytes(8, "little") + b"x",
    "a number's digits without end": b"raw:I" + b"9" * 50_000 + b"\n",
    "a registered extension": b"raw:\x82\x01",
}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_run(tmp_path / "actor", "megatron_lm")


@pytest.fixture(autouse=True)
def nothing_ran():
    """Nothing was run, and no table of ours was changed."""
    before = [copy.copy(table) for table in (standins.TABLE, dcp_metadata._ALLOWED, BY_NAME)]
    kept = dcp_metadata._Metadata.kept
    yield
    assert not Path(MARK).exists()
    assert before == [standins.TABLE, dcp_metadata._ALLOWED, BY_NAME]
    assert dcp_metadata._Metadata.kept is kept
    assert (BY_NAME["float32"].itemsize, BY_NAME["float32"].name) == (4, "float32")


def refused(error: type[BaseException], directory: Path, **options: Any) -> str:
    """The message with which a merge is refused, after which nothing is there that was not before."""
    before = content_of(directory.parent)
    message = refusal(error, nbmerge.merge, directory, directory.parent / "out", progress=False, **options)
    assert content_of(directory.parent) == before
    assert len(message) < 3000
    return message


def noted(directory: Path, **options: Any) -> str:
    """What is noted of a common file that is not read, without which the weights are there all the same."""
    checkpoint = open_checkpoint(directory, **options)
    assert sorted(checkpoint) == sorted(llama())
    assert checkpoint.stated.values == {}
    assert_says(checkpoint.notes[0], "common.pt", "was not compared with config.json")
    assert len(checkpoint.notes[0]) < 3000
    return checkpoint.notes[0]


def write_index(directory: Path, obj: Any) -> None:
    (directory / "iter_0000010" / ".metadata").write_bytes(pickled(obj))


class TestNamesOutsideTheList:
    @pytest.mark.parametrize("what", HOSTILE)
    def test_in_the_index(self, directory: Path, what: str):
        hostile = HOSTILE[what]
        write_index(directory, {"w": hostile})
        name = (hostile.function if isinstance(hostile, Call) else hostile).name
        message = refused(UnsafePickleError, directory)
        assert_says(message, name, ".metadata", "nothing of it was run", "allow-list", "fix:", "--trust_pickle")

    @pytest.mark.parametrize("what", HOSTILE)
    def test_in_the_common_file(self, directory: Path, what: str):
        write_archive(directory / "iter_0000010" / "common.pt", {"args": HOSTILE[what]})
        assert_says(noted(directory), "the pickle names", "nothing of it was run")

    @pytest.mark.parametrize("what", HOSTILE)
    def test_in_a_chunk(self, tmp_path: Path, what: str):
        directory, name = tmp_path / "actor" / "dist_ckpt", "decoder.layers.0.w"
        write_torch_dist(directory, {name: torch.zeros(4)})
        path = write_archive(directory / "__0_0.distcp", HOSTILE[what])
        place = stored_at(name, length=path.stat().st_size)
        (directory / ".metadata").write_bytes(pickled(index_of({name: tensor_entry()}, dict([place]))))
        assert_says(refused(UnsafePickleError, directory.parent), "__0_0.distcp", "nothing of it was run", "fix:")

    @pytest.mark.parametrize("key", ["common_state/shard_0_1", "args"])
    @pytest.mark.parametrize("what", HOSTILE)
    def test_in_the_common_state_of_the_index(self, tmp_path: Path, what: str, key: str):
        archive = write_archive(tmp_path / "o.pt", [{"args": HOSTILE[what]}]).read_bytes()
        tensors, objects = llama(), {key: (0, archive)}
        directory = write_torch_dist(tmp_path / "dist_ckpt", tensors, version="0.19", objects=objects)
        if key == "args":
            edit_metadata(directory, lambda index: index.state_dict_metadata.pop("common_state/shard_0_1"))
        checkpoint = open_checkpoint(directory)
        assert_same({n: bits_of(t.expr) for n, t in checkpoint.tensors.items()}, bits_of_all(tensors))
        assert_says(checkpoint.notes[0], key, "nothing of it was run", "was not compared with config.json")

    @pytest.mark.parametrize(
        ("file", "offset", "length"), [("../x.distcp", 0, 9), ("gone.distcp", 0, 9), ("__0_0.distcp", 1 << 50, 9),
                                       ("__0_0.distcp", 0, 1 << 50), ("__0_0.distcp", 3, 70)]
    )  # fmt: skip
    def test_a_common_state_that_is_nowhere(self, tmp_path: Path, file: str, offset: int, length: int):
        directory = write_torch_dist(tmp_path / "dist_ckpt", llama(), version="0.19")

        def elsewhere(index: Any) -> None:
            (key,) = (key for key in index.storage_data if key.fqn.startswith("common_state"))
            index.storage_data[key] = replace(index.storage_data[key], relative_path=file, offset=offset, length=length)

        edit_metadata(directory, elsewhere)
        assert_says(open_checkpoint(directory).notes[0], "common_state", "was not compared with config.json")

    def test_in_an_object_that_is_left_alone(self, tmp_path: Path):
        tensors = llama()
        directory = write_torch_dist(
            tmp_path, tensors, objects={"x._extra_state/shard_0_1": (0, pickle.dumps(os.system))}
        )
        assert_same({n: bits_of(t.expr) for n, t in open_checkpoint(directory).tensors.items()}, bits_of_all(tensors))

    def test_the_names_of_torch_dist_are_for_the_index_alone(self, directory: Path):
        write_archive(directory / "iter_0000010" / "common.pt", {"args": torch_class("Metadata")})
        assert_says(noted(directory), "torch.distributed.checkpoint.metadata.Metadata")


class TestTricks:
    @pytest.mark.parametrize("what", TRICKS)
    def test_in_the_index(self, directory: Path, what: str):
        started = time.monotonic()
        write_index(directory, TRICKS[what])
        message = refused(CorruptFileError, directory)
        assert_says(message, ".metadata", "why:", "fix:", "copy")
        assert time.monotonic() - started < 10

    @pytest.mark.parametrize("what", [what for what in TRICKS if isinstance(TRICKS[what], bytes)])
    def test_in_the_common_file(self, directory: Path, what: str):
        write_archive(directory / "iter_0000010" / "common.pt", {"args": TRICKS[what]})
        is_named = "getattr" in what or "Metadata" in str(TRICKS[what])
        assert_says(noted(directory), "cannot be read", "nothing of it was run" if is_named else "pickle")

    def test_what_is_shared_over_and_over_is_not_shown(self, directory: Path):
        """2**60 entries when written out, of sixty small tuples."""
        nested = b"raw:N" + b"2\x86" * 60
        for obj in (one_tensor(shape=nested), StorageOf(nested)):
            write_index(directory, obj)
            assert len(refused(CorruptFileError, directory)) < 1000

    def test_an_index_whose_objects_are_all_inert(self, directory: Path):
        """Attributes that it sets on stand-ins stay data: an object's `__class__` and `get` are its class's."""
        extra = {"__class__": 1, "get": 2, "kept": 3, "attributes": {"size": (9,)}}
        place = stored_at("decoder.layers.0.w", file="none.distcp")
        write_index(directory, index_of({"decoder.layers.0.w": tensor_entry(**extra)}, dict([place])))
        assert_says(refused(IncompleteCheckpointError, directory), "none.distcp", "is missing")

    @pytest.mark.parametrize(
        ("shape", "stride"),
        [
            ((2**62,), (1,)),
            ((2**62,), (0,)),
            ((2**40,), (0,)),
            ((4,), (-1,)),
            ((-4,), (1,)),
            ((4,), (2**62,)),
            ((5,), (1,)),
        ],
    )
    def test_a_chunk_that_reaches_outside_its_bytes(self, tmp_path: Path, shape: Any, stride: Any):
        directory, name = tmp_path / "actor" / "dist_ckpt", "decoder.layers.0.w"
        write_torch_dist(directory, {name: torch.zeros(4)})
        path = write_archive(directory / "__0_0.distcp", tensor(shape=shape, stride=stride))
        said = tensor_entry(shape=shape, sizes=shape) if shape[0] > 0 else tensor_entry()
        place = stored_at(name, length=path.stat().st_size)
        (directory / ".metadata").write_bytes(pickled(index_of({name: said}, dict([place]))))
        assert_says(refused(CorruptFileError, directory.parent), f"{name} at [0]", "fix:")

    @pytest.mark.parametrize(
        "chunk",
        [
            Call(STATE_DICT), {"w": tensor()}, [tensor()], storage(), tensor(storage("1")),
            tensor(storage(kind="HalfStorage")),
            tensor(shape=(2, 2), stride=(2, 1)), tensor(shape=None), tensor(of=3), Global("torch", "float32"),
        ],
        ids=range(10),
    )  # fmt: skip
    def test_a_chunk_that_is_another_thing(self, tmp_path: Path, chunk: Any):
        directory, name = tmp_path / "actor" / "dist_ckpt", "decoder.layers.0.w"
        write_torch_dist(directory, {name: torch.zeros(4)})
        path = write_archive(directory / "__0_0.distcp", chunk)
        place = stored_at(name, length=path.stat().st_size)
        (directory / ".metadata").write_bytes(pickled(index_of({name: tensor_entry()}, dict([place]))))
        assert_says(refused(CorruptFileError, directory.parent), f"{name} at [0]", "__0_0.distcp", "fix:")

    def test_a_chunk_that_is_compressed(self, tmp_path: Path):
        directory, name = tmp_path / "actor" / "dist_ckpt", "decoder.layers.0.w"
        write_torch_dist(directory, {name: torch.zeros(4)})
        path = write_archive(directory / "__0_0.distcp", tensor(), compression=zipfile.ZIP_DEFLATED)
        place = stored_at(name, length=path.stat().st_size)
        (directory / ".metadata").write_bytes(pickled(index_of({name: tensor_entry()}, dict([place]))))
        assert_says(refused(CorruptFileError, directory.parent), "is compressed", "fix:")

    def test_a_chunk_that_is_as_it_should_be(self, tmp_path: Path):
        """Else the tests above would prove nothing."""
        directory, name = tmp_path / "dist_ckpt", "decoder.layers.0.w"
        write_torch_dist(directory, {name: torch.zeros(4)})
        path = write_archive(directory / "__0_0.distcp", tensor())
        place = stored_at(name, length=path.stat().st_size)
        (directory / ".metadata").write_bytes(pickled(index_of({name: tensor_entry()}, dict([place]))))
        assert_same(
            {n: bits_of(t.expr) for n, t in open_checkpoint(directory).tensors.items()},
            bits_of_all({name: torch.zeros(4)}),
        )


class TestTrust:
    """trust_pickle lets a pickle name anything, and run it: in a process of its own."""

    CODE = "import nbmerge, sys; nbmerge.open_checkpoint({!r}, trust_pickle={})"

    def test_a_common_file_that_is_trusted_is_read(self, directory: Path):
        shown = directory / "ran"
        write_archive(
            directory / "iter_0000010" / "common.pt", {"args": None, "x": Call(Global("os", "mkdir"), str(shown))}
        )
        done = python(self.CODE.format(str(directory), False))
        assert done.returncode == 0 and not shown.exists()
        assert_says(noted(directory), "os.mkdir")
        done = python(self.CODE.format(str(directory), True))
        assert done.returncode == 0, done.stderr
        assert shown.is_dir()

    def test_a_class_that_is_not_installed_is_told(self, directory: Path):
        write_archive(directory / "iter_0000010" / "common.pt", {"args": Call(Global("nowhere.at_all", "Thing"))})
        assert_says(noted(directory, trust_pickle=True), "No module named 'nowhere'")

    def test_an_index_that_is_trusted_must_be_one_still(self, directory: Path):
        write_index(directory, Call(Global("fractions", "Fraction"), 1, 2))
        message = refused(CorruptFileError, directory, trust_pickle=True)
        assert_says(message, "it holds a Fraction", ".metadata", "fix:")


class TestOpcodes:
    """What is looked for before a pickle is read, whose answer must be the unpickler's own wherever it is harmless."""

    PATH = Path("f.pt")

    @pytest.mark.parametrize("protocol", range(6))
    def test_pickles_of_every_protocol_pass(self, protocol: int):
        values = {str(n): (n, "x" * n, n << n, float(n), [b"y" * n, None, True], {n}) for n in range(300)}
        refuse_excess(pickle.dumps(values, protocol), self.PATH)

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_more_objects_than_two_bytes_count_pass(self, protocol: int):
        refuse_excess(pickle.dumps([[] for _ in range(70_000)], protocol), self.PATH)

    @pytest.mark.parametrize(
        "put", [b"r\x00\x00\x00\x04", b"r\x01\x00\x01\x00", b"p65537\n", b"p-1\n", b"p\n", b"pten\n"]
    )
    @pytest.mark.parametrize("before", [b"", b"K\x01" * 5000, b"X\xc8\x00\x00\x00" + b"r" * 200, b"ctorch\nSize\n"])
    def test_an_index_beyond_the_pickle_is_refused(self, put: bytes, before: bytes):
        message = refusal(CorruptFileError, refuse_excess, b"\x80\x02" + before + b"N" + put + b".", self.PATH)
        assert_says(message, "more objects than it has bytes", "f.pt", "fix:")

    @pytest.mark.parametrize("data", [b"", b".", b"\xfe", b"N.r\xff\xff\xff\xff", b"ctorch", b"p", b"K\x01"])
    def test_the_rest_is_the_unpicklers(self, data: bytes):
        refuse_excess(data, self.PATH)

    @pytest.mark.parametrize(
        "data", [b"X\x05\x00\x00\x00abc", b"\x8c\x90a", b"B\xff\xff\xff\xffa", b"\x8b\xff\xff\xff\xffa"]
    )
    def test_a_text_beyond_the_end_is_refused(self, data: bytes):
        assert_says(refusal(CorruptFileError, refuse_excess, data, self.PATH), "would end after it", "f.pt", "fix:")
