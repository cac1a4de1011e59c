"""torch.save files, read lazily and without running anything of them."""

from __future__ import annotations

import copyreg
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge import CheckpointError, CorruptFileError, UnsafePickleError, UnsupportedCheckpointError
from nbmerge.dtypes import BY_NAME, DType
from nbmerge.expressions import Stored
from nbmerge.loaders.unpickle import load_torch_file
from tests.support import examples
from tests.support.messages import assert_says, refusal
from tests.support.pickles import (
    STATE_DICT,
    Call,
    Global,
    StorageOf,
    pickle_of,
    pickled,
    sparse_file,
    storage,
    tensor,
    with_pickle,
    write_archive,
)
from tests.support.results import bits, bits_of, open_files
from tests.support.worlds import rank_file, write_mesh_world, write_ranks, write_sharded_tensor_world


def tensors() -> dict[str, torch.Tensor]:
    """Everything that a state dict's tensors can be."""
    base = torch.randn(6, 8)
    module = torch.nn.BatchNorm1d(3)
    return {
        "whole": base,
        "rows": base[2:4],
        "columns": base[:, 1:5],
        "steps": base[::2, ::3],
        "transposed": base.T,
        "repeated": base[:1].expand(4, 8),
        "padded": torch.randn(65, 18)[:62],
        "empty": torch.empty(0, 18),
        "empty in a storage": torch.randn(36)[:0].reshape(0, 18),
        "scalar": torch.tensor(1.5),
        "ones": torch.randn(1, 1, 5),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "buffer": module.num_batches_tracked,
        "running_mean": module.running_mean,
        **{
            f"of {name}": torch.arange(24, dtype=torch.uint8).view(getattr(torch, name))
            for name in BY_NAME
            if hasattr(torch, name)
        },
        "flags": torch.tensor([True, False, True]),
    }  # fmt: skip


class TestRealFiles:
    def test_every_tensor_is_a_byte_range_that_holds_its_bits(self, tmp_path: Path):
        want = tensors()
        torch.save(want, tmp_path / "f.pt")
        got = load_torch_file(tmp_path / "f.pt")
        assert all(isinstance(value, Stored) for value in got.values())
        assert {name: bits_of(value) for name, value in got.items()} == {name: bits(t) for name, t in want.items()}

    def test_tensors_that_share_a_storage_share_its_bytes(self, tmp_path: Path):
        base = torch.randn(4, 4)
        torch.save({"a": base, "b": base, "c": base[1]}, tmp_path / "f.pt")
        got = load_torch_file(tmp_path / "f.pt")
        assert got["a"] == got["b"]
        assert got["c"].offset == got["a"].offset + 16

    def test_a_state_dict_keeps_its_order_and_its_metadata(self, tmp_path: Path):
        module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        state = module.state_dict()
        assert hasattr(state, "_metadata")
        torch.save(state, tmp_path / "f.pt")
        got = load_torch_file(tmp_path / "f.pt")
        assert list(got) == list(state)
        assert {name: bits_of(value) for name, value in got.items()} == {name: bits(t) for name, t in state.items()}

    def test_what_lies_beside_tensors_is_carried_along(self, tmp_path: Path):
        other = {"step": 7, "lr": [1e-3, None], "name": "é", "shape": torch.Size([2, 3]), "dtype": torch.bfloat16,
                 "device": torch.device("cpu"), "nested": OrderedDict(a=(1, True))}  # fmt: skip
        torch.save(other, tmp_path / "f.pt")
        got = load_torch_file(tmp_path / "f.pt")
        assert got["step"] == 7 and got["lr"] == [1e-3, None] and got["name"] == "é"
        assert got["shape"] == (2, 3) and got["dtype"] is BY_NAME["bfloat16"] and got["nested"] == {"a": (1, True)}

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_any_protocol_of_pickle_is_read(self, tmp_path: Path, protocol: int):
        torch.save({"w": torch.arange(3.0)}, tmp_path / "f.pt", pickle_protocol=protocol)
        assert bits_of(load_torch_file(tmp_path / "f.pt")["w"]) == bits(torch.arange(3.0))

    def test_a_tensor_of_a_device_that_is_not_here_is_read(self, tmp_path: Path):
        here = write_archive(tmp_path / "cpu.pt", {"w": tensor()})
        assert torch.load(here)["w"].tolist() == [0.0] * 4  # what is crafted here is what torch writes
        there = tmp_path / "npu.pt"
        kept = StorageOf("storage", Global("torch", "FloatStorage"), "0", "npu:3", 4)
        write_archive(there, {"w": tensor(kept)})
        assert bits_of(load_torch_file(there)["w"]) == bits(torch.zeros(4))


class TestLaziness:
    def test_a_tensor_of_a_terabyte_is_indexed_in_no_time(self, tmp_path: Path):
        path = sparse_file(tmp_path / "f.pt", 10**12 // 4)
        assert path.stat().st_size > 10**12
        assert load_torch_file(path)["w"].nbytes == 10**12

    def test_only_the_directory_and_the_pickle_are_read(self, tmp_path: Path):
        """Counted by the kernel: bytes that this thread read, of a checkpoint of 64 MiB."""
        write_ranks(tmp_path, [{"w": torch.zeros(2**24)}])
        nbmerge.open_checkpoint(tmp_path)  # everything imported, everything cached

        def bytes_read() -> int:
            lines = Path("/proc/self/io").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("rchar")).split()[1])

        before = bytes_read()
        ckpt = nbmerge.open_checkpoint(tmp_path)
        assert ckpt["w"].nbytes == 2**26
        assert bytes_read() - before < 2**18


# Hostile files. Each would leave a trace if anything of it ran.


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def hostile(trace: Path) -> dict[str, tuple[object, str]]:
    touch = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w')"
    return {
        "os.system": (Call(Global("os", "system"), touch), "os.system"),
        "posix.system": (Call(Global("posix", "system"), touch), "posix.system"),
        "eval": (Call(Global("builtins", "eval"), code), "builtins.eval"),
        "exec by Python 2's name": (Call(Global("__builtin__", "exec"), code), "__builtin__.exec"),
        "open": (Call(Global("builtins", "open"), str(trace), "w"), "builtins.open"),
        "Path.touch": (Call(Global("pathlib", "Path.touch"), str(trace)), "pathlib.Path.touch"),
        "subprocess": (Call(Global("subprocess", "Popen"), ("touch", str(trace))), "subprocess.Popen"),
        "torch.load": (Call(Global("torch", "load"), str(trace)), "torch.load"),
        "a Python storage": (Call(Global("torch.storage", "_load_from_bytes"), b"x"), "torch.storage._load_from_bytes"),
        "torch.jit": (Call(Global("torch.jit.unsupported_tensor_ops", "execWrapper"), code), "execWrapper"),
        "numpy": (Call(Global("numpy.testing._private.utils", "runstring"), code, {}), "runstring"),
        "a dotted name": (Call(Global("torch", "serialization.os.system"), touch), "torch.serialization.os.system"),
        "a parent package": (Global("torch.distributed.tensor", "DTensor.__init__"), "DTensor.__init__"),
        "import": (Call(Global("builtins", "__import__"), "antigravity"), "__import__"),
        "our own engine": (Call(Global("nbmerge.engine.publish", "write_synced"), trace, b""), "write_synced"),
        "shutil": (Call(Global("shutil", "rmtree"), str(trace.parent)), "shutil.rmtree"),
    }


KINDS = list(hostile(Path("/x")))


class TestHostileGlobals:
    @pytest.mark.parametrize("kind", KINDS)
    def test_is_refused_before_it_runs_and_named_with_its_file(self, tmp_path: Path, trace: Path, kind: str):
        value, name = hostile(trace)[kind]
        path = write_archive(tmp_path / "f.pt", {"w": tensor(), "payload": value})
        message = refusal(UnsafePickleError, load_torch_file, path)
        assert_says(message, name, str(path), "not on the allow-list", "nothing of it was run", "trust_pickle=True")
        assert not trace.exists()

    def test_is_refused_where_it_stands_first_or_is_never_used(self, tmp_path: Path, trace: Path):
        for data in (hostile(trace)["os.system"][0], {"w": tensor(), "unused": Global("os", "system")}):
            path = write_archive(tmp_path / "f.pt", data)
            assert_says(refusal(UnsafePickleError, load_torch_file, path), "os.system")
        assert not trace.exists()

    def test_is_refused_in_a_checkpoint_that_is_merged(self, tmp_path: Path, trace: Path):
        ckpt = write_ranks(tmp_path / "ckpt", [{"w": torch.ones(2)}] * 2)
        write_archive(rank_file(ckpt, 2, 1), {"w": tensor(), "payload": hostile(trace)["os.system"][0]})
        message = refusal(UnsafePickleError, nbmerge.merge, ckpt, tmp_path / "out")
        assert_says(message, "os.system", "rank_1.pt", "--trust_pickle")
        assert not trace.exists() and not (tmp_path / "out").exists()

    @pytest.mark.parametrize("opcode", ["EXT1", "EXT2", "EXT4"])
    def test_the_extension_registry_is_no_way_round(self, tmp_path: Path, trace: Path, opcode: str):
        code = {"EXT1": 0x7F, "EXT2": 0x7F01, "EXT4": 0x7F0001}[opcode]
        size = int(opcode[3:])
        call = getattr(pickle, opcode) + code.to_bytes(size, "little")
        argument = f"touch {trace}".encode()
        raw = b"raw:" + call + b"X" + len(argument).to_bytes(4, "little") + argument + b"\x85R"
        copyreg.add_extension("os", "system", code)
        try:
            path = write_archive(tmp_path / "f.pt", {"payload": raw})
            assert_says(refusal(UnsafePickleError, load_torch_file, path), "os.system")
        finally:
            copyreg.remove_extension("os", "system", code)
        assert_says(refusal(CorruptFileError, load_torch_file, path), "unregistered extension code")
        assert not trace.exists()

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (Global("torch", "float32"), "__class__"), (Global("torch", "Size"), "__init_subclass__"),
            (STATE_DICT, "fromkeys"), (Global("torch", "device"), "__call__"),
            (Global("torch.distributed.tensor", "DTensor"), "__setstate__"),
            (Global("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"), "__subclasses__"),
        ],
        ids=str,
    )  # fmt: skip
    def test_getattr_reaches_nothing_but_what_sharded_tensors_name(self, tmp_path: Path, owner: Global, name: str):
        path = write_archive(tmp_path / "f.pt", {"x": Call(Global("builtins", "getattr"), owner, name)})
        message = refusal(CorruptFileError, load_torch_file, path)
        assert_says(message, f"{name!r}) is not on the allow-list", str(path))


BUILD_TARGETS = {
    "a class": Global("torch.distributed.tensor", "DTensor"),
    "a dict class": STATE_DICT,
    "a tuple class": Global("torch", "Size"),
    "a function": Global("torch._utils", "_rebuild_tensor_v2"),
    "getattr": Global("builtins", "getattr"),
    "an element type": Global("torch", "float16"),
    "a storage's type": Global("torch", "HalfStorage"),
    "a storage": storage(),
    "a tensor": tensor(),
}
BUILD_STATES = {
    "slots": (None, {"_function": STATE_DICT, "args": (), "name": "bfloat16", "file": "/etc/passwd", "offset": 0}),
    "a dict": {"__call__": STATE_DICT, "name": "bfloat16", "file": "/etc/passwd"},
    "a list": ["/etc/passwd", 0, (4,), (1,), None],
    "a tuple": ("bfloat16", "BF16", 2, True),
}


class TestBuild:
    """BUILD sets attributes of whatever lies on the stack: nothing that outlives the pickle may change."""

    @pytest.mark.parametrize("target", BUILD_TARGETS)
    @pytest.mark.parametrize("state", BUILD_STATES)
    def test_changes_nothing_of_ours(self, tmp_path: Path, target: str, state: str):
        everything = (BY_NAME.copy(), repr(BY_NAME["float16"]))
        raw = pickled(BUILD_TARGETS[target])[2:-1] + pickled(BUILD_STATES[state])[2:-1] + pickle.BUILD
        path = write_archive(tmp_path / "f.pt", {"x": b"raw:" + raw})
        message = refusal(CorruptFileError, load_torch_file, path)
        assert_says(message, str(path))
        assert (BY_NAME, repr(BY_NAME["float16"])) == everything
        clean = write_archive(tmp_path / "clean.pt", {"w": tensor()})
        assert load_torch_file(clean)["w"].file == str(clean)

    def test_element_types_and_tensors_can_still_be_sent_to_another_process(self, tmp_path: Path):
        dtype = BY_NAME["bfloat16"]
        assert pickle.loads(pickle.dumps(dtype)) is dtype  # noqa: S301
        stored = load_torch_file(write_archive(tmp_path / "f.pt", {"w": tensor()}))["w"]
        sent = pickle.loads(pickle.dumps(stored))  # noqa: S301
        assert (sent.file, sent.offset, sent.shape, sent.strides, sent.dtype) == (
            stored.file, stored.offset, stored.shape, stored.strides, stored.dtype,
        )  # fmt: skip
        with pytest.raises(AttributeError):
            DType.__setattr__(dtype, "name", "x")


class TestTensorsThatReachOutside:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"shape": (5,)}, {"offset": 1}, {"offset": -1}, {"stride": (2,)}, {"shape": (2, 2), "stride": (3, 1)},
            {"shape": (-1,)}, {"stride": (-1,)}, {"offset": 2**62}, {"shape": (2**62,)},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_tensor_outside_its_storage(self, tmp_path: Path, wrong: dict[str, object]):
        path = write_archive(tmp_path / "f.pt", {"w": tensor(**wrong)})
        message = refusal(CorruptFileError, load_torch_file, path)
        assert_says(message, "reaches outside its storage of 16 bytes", str(path), "fix:")

    def test_an_empty_tensor_is_nowhere(self, tmp_path: Path):
        """torch keeps the offset at which it was cut, past the storage's end, too."""
        path = write_archive(tmp_path / "f.pt", {"w": tensor(offset=5, shape=(0,))})
        assert load_torch_file(path)["w"].shape == (0,)

    def test_a_record_outside_the_file(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor()}, {"0": bytes(16)})
        data = bytearray(path.read_bytes())
        entry = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 46
        for at in (entry + 20, entry + 24):  # both sizes in the directory
            data[at : at + 4] = (10**6).to_bytes(4, "little")
        path.write_bytes(data)
        assert_says(refusal(CorruptFileError, load_torch_file, path), "archive/data/0 would end at byte", str(path))

    @pytest.mark.parametrize(
        "pid",
        [
            (), "storage", ("storage",), ("module", None, None, None, None), ("storage", "FloatStorage", "0", "cpu", 4),
            ("storage", Global("torch", "Size"), "0", "cpu", 4), ("storage", None, "0", "cpu", 4),
        ],
        ids=lambda pid: str(pid)[:40],
    )  # fmt: skip
    def test_a_persistent_id_of_another_form(self, tmp_path: Path, pid: object):
        of = StorageOf(*pid) if isinstance(pid, tuple) else b"raw:" + pickled(pid)[2:-1] + pickle.BINPERSID
        path = write_archive(tmp_path / "f.pt", {"w": tensor(of)})
        assert_says(refusal(CorruptFileError, load_torch_file, path), str(path))

    def test_a_storage_that_the_archive_does_not_hold(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor(storage("../data.pkl"))})
        assert_says(refusal(CorruptFileError, load_torch_file, path), "'../data.pkl'", "does not hold", str(path))

    def test_a_tensor_that_is_made_of_no_storage(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor("0")})
        assert_says(refusal(CorruptFileError, load_torch_file, path), "without a storage", str(path))


class TestTrustedPickles:
    def test_an_unknown_harmless_global_is_let_through(self, tmp_path: Path):
        import fractions

        state = {"w": torch.ones(2), "half": fractions.Fraction(1, 2)}
        ckpt = write_ranks(tmp_path, [state])
        assert_says(refusal(UnsafePickleError, nbmerge.open_checkpoint, ckpt), "fractions.Fraction")
        opened = nbmerge.open_checkpoint(ckpt, trust_pickle=True)
        assert bits_of(opened["w"].expr) == bits(torch.ones(2))
        assert opened.notes == ("1 entry without a tensor left alone: half",)

    def test_tensors_stay_lazy(self, tmp_path: Path):
        path = sparse_file(tmp_path / "f.pt", 10**12 // 4)
        assert load_torch_file(path, trust_pickle=True)["w"].nbytes == 10**12

    def test_a_global_that_does_not_exist_is_told(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"x": Global("no_such_module", "Thing")})
        assert_says(refusal(CorruptFileError, load_torch_file, path, trust_pickle=True), "no_such_module", str(path))


class TestFilesThatAreNoneOfTorchSave:
    def test_compressed_storages(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor()}, compression=zipfile.ZIP_DEFLATED)
        message = refusal(UnsupportedCheckpointError, load_torch_file, path)
        assert_says(message, "data.pkl is compressed", str(path), "fix:")

    def test_big_endian_numbers(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor()}, byteorder=b"big")
        assert_says(refusal(UnsupportedCheckpointError, load_torch_file, path), "big-endian", str(path), "fix:")

    def test_no_byte_order_means_little_endian(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor()}, byteorder=None)
        assert load_torch_file(path)["w"].nbytes == 16

    def test_the_format_before_torch_1_6(self, tmp_path: Path):
        torch.save({"w": torch.ones(2)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
        message = refusal(UnsupportedCheckpointError, load_torch_file, tmp_path / "f.pt")
        assert_says(message, "no zip archive", "_use_new_zipfile_serialization=False", str(tmp_path / "f.pt"), "fix:")

    def test_an_empty_file(self, tmp_path: Path):
        (tmp_path / "f.pt").touch()
        assert_says(refusal(CorruptFileError, load_torch_file, tmp_path / "f.pt"), "0 bytes", str(tmp_path / "f.pt"))

    def test_an_archive_without_a_pickle(self, tmp_path: Path):
        path = write_archive(tmp_path / "f.pt", {"w": tensor()}, pickle_name="other.pkl")
        assert_says(refusal(CorruptFileError, load_torch_file, path), "data.pkl", str(path))

    def test_a_safetensors_file_of_another_name(self, tmp_path: Path):
        from safetensors.torch import save_file

        save_file({"w": torch.ones(2)}, tmp_path / "f.pt")
        assert_says(refusal(UnsupportedCheckpointError, load_torch_file, tmp_path / "f.pt"), "no zip archive")

    def test_an_empty_archive(self, tmp_path: Path):
        zipfile.ZipFile(tmp_path / "f.pt", "w").close()
        assert_says(refusal(CorruptFileError, load_torch_file, tmp_path / "f.pt"), "data.pkl")

    @pytest.mark.parametrize("data", [b"", b".", b"\x80\x02", b"\x80\x63N.", b"garbage", b"\x80\x02}q\x00"])
    def test_a_pickle_that_is_none(self, tmp_path: Path, data: bytes):
        path = write_archive(tmp_path / "f.pt", data)
        assert_says(refusal(CorruptFileError, load_torch_file, path), "the pickle cannot be read", str(path), "fix:")


# Damage at random: always one of our errors, or an index that is right.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("whole") / "f.pt"
    torch.save({"a": torch.randn(3, 5), "b": torch.randn(2).bfloat16(), "c": torch.tensor(1)}, path)
    return path.with_name("damaged.pt"), path.read_bytes()


def test_a_file_cut_at_any_byte_is_told_and_never_read(whole: tuple[Path, bytes]):
    path, data = whole
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises((CorruptFileError, UnsupportedCheckpointError)) as caught:
            load_torch_file(path)
        assert str(path) in str(caught.value)


@examples(400)
@given(data=st.data())
def test_a_file_with_a_changed_byte_is_told_or_read(whole: tuple[Path, bytes], data: st.DataObject):
    path, original = whole
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    opens_or_tells(path)


def opens_or_tells(path: Path) -> None:
    try:
        load_torch_file(path)
    except (CheckpointError, UnsafePickleError) as error:
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, bytes]]:
    """Checkpoints of a DTensor and of a ShardedTensor, each with the pickle of its rank 1."""
    found = []
    for write in (lambda d: write_mesh_world(d, {"w": torch.ones(5, 2)}, (2,)), lambda d: write_sharded_tensor_world(
        d, {"w": torch.ones(5, 2)}, 2
    )):  # fmt: skip
        directory = write(tmp_path_factory.mktemp("sharded"))
        found.append((directory, pickle_of(rank_file(directory, 2, 1))))
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@examples(400)
@given(data=st.data())
def test_a_pickle_with_changed_bytes_makes_a_checkpoint_or_a_message(
    sharded: list[tuple[Path, bytes]], data: st.DataObject
):
    """Its checksum is made right again: what is damaged is what the stand-ins are told."""
    directory, original = data.draw(st.sampled_from(sharded), label="checkpoint")
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with_pickle(rank_file(directory, 2, 1), bytes(damaged))
    try:
        nbmerge.open_checkpoint(directory)
    except (CheckpointError, UnsafePickleError) as error:
        assert str(directory) in str(error)


def test_files_are_closed(tmp_path: Path):
    torch.save({"w": torch.ones(3)}, tmp_path / "f.pt")
    before = open_files()
    load_torch_file(tmp_path / "f.pt")
    write_archive(tmp_path / "g.pt", {"x": Global("os", "system")})
    refusal(UnsafePickleError, load_torch_file, tmp_path / "g.pt")
    assert open_files() == before
