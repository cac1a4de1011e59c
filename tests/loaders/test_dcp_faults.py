"""A distributed checkpoint that is damaged or contradicts itself is refused in words, and nothing is written."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

import nbmerge
from nbmerge import (
    CorruptFileError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NotACheckpointError,
    PlanError,
    open_checkpoint,
)
from nbmerge.geometry import Box
from tests.support.megatron import saved, write_torch_dist
from tests.support.megatron_forms import optimizer_beside
from tests.support.megatron_runs import TWO_BY_TWO, edit_metadata, llama, saved_beside, write_run
from tests.support.messages import assert_says, refusal
from tests.support.models import published_state, write_config
from tests.support.results import assert_same, bits_of_all, content_of, saved_bits

DOWN = "decoder.layers.mlp.linear_fc2.weight"  # of two layers on two ranks each: four chunks [1, 16, 12]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A checkpoint in verl's layout, with the optimizer beside the weights."""
    tensors = llama()
    return write_run(
        tmp_path / "actor", tensors={**tensors, **optimizer_beside(tensors)}, pieces=saved_beside(TWO_BY_TWO)
    )


def refused(error: type[BaseException], directory: Path, **options: Any) -> str:
    """The message with which a merge is refused, after which nothing is beside the checkpoint that was not before."""
    before = content_of(directory.parent)
    message = refusal(error, nbmerge.merge, directory, directory.parent / "out", progress=False, **options)
    assert content_of(directory.parent) == before
    assert not (directory.parent / "out").exists()
    return message


def index_of(directory: Path) -> dcp.Metadata:
    """What torch reads of `.metadata`."""
    from torch.distributed.checkpoint import FileSystemReader

    return FileSystemReader(directory / "dist_ckpt").read_metadata()


def place(directory: Path, name: str, at: tuple[int, ...]) -> tuple[Path, int, int]:
    """File, offset and length of a chunk."""
    info = index_of(directory).storage_data[dcp.MetadataIndex(name, at)]
    return directory / "dist_ckpt" / info.relative_path, info.offset, info.length


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(data)


def test_the_checkpoint_that_the_tests_damage_is_merged(directory: Path):
    nbmerge.merge(directory, directory.parent / "out", progress=False)
    assert_same(saved_bits(directory.parent / "out"), bits_of_all(published_state("llama")))


class TestFiles:
    def test_those_that_are_missing_are_all_named(self, directory: Path):
        for name in ("__0_1.distcp", "__3_0.distcp"):
            (directory / "dist_ckpt" / name).unlink()
        message = refused(IncompleteCheckpointError, directory)
        assert_says(message, "2 files of 8 are missing", str(directory / "dist_ckpt"), "__0_1.distcp, __3_0.distcp",
                    "each node saves to its own disk", "fix:", "copy")  # fmt: skip

    def test_one_that_is_missing(self, directory: Path):
        (directory / "dist_ckpt" / "__2_0.distcp").unlink()
        assert_says(refused(IncompleteCheckpointError, directory), "1 file of 8 is missing", "__2_0.distcp")

    def test_a_directory_in_the_place_of_a_file(self, directory: Path):
        path = directory / "dist_ckpt" / "__2_0.distcp"
        path.unlink()
        path.mkdir()
        assert_says(refused(IncompleteCheckpointError, directory), "1 file of 8 is missing", "__2_0.distcp")

    @pytest.mark.parametrize("cut", [1, 100, 3000, None])
    def test_one_that_is_cut_short(self, tmp_path: Path, cut: int | None):
        directory = write_run(tmp_path / "actor")
        path = directory / "dist_ckpt" / "__1_1.distcp"
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[: 0 if cut is None else -cut])
        held = f"{0 if cut is None else size - cut:,}"
        message = refused(CorruptFileError, directory)
        assert_says(message, "1 file cut short", f"__1_1.distcp has {held} bytes", f"end at byte {size:,}", str(path),
                    "the copy or the save did not finish", "fix:", "copy it again")  # fmt: skip

    def test_all_that_are_cut_short_are_told(self, tmp_path: Path):
        directory = write_run(tmp_path / "actor")
        for path in (directory / "dist_ckpt").glob("*.distcp"):
            path.write_bytes(b"")
        assert_says(refused(CorruptFileError, directory), "8 files cut short", "and 5 more like these")

    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
    def test_one_that_changes_between_plan_and_merge(self, directory: Path, name: str):
        plan = nbmerge.plan_merge(directory)
        path = directory / "dist_ckpt" / name
        path.write_bytes(path.read_bytes())
        target = directory.parent / "out"
        message = refusal(InconsistentCheckpointError, nbmerge.merge, plan, target)
        assert_says(message, "changed since it was opened", name, str(directory), "fix:")
        assert sorted(directory.parent.iterdir()) == [directory]

    def test_one_that_goes_between_plan_and_merge(self, directory: Path):
        plan = nbmerge.plan_merge(directory)
        (directory / "dist_ckpt" / "__3_1.distcp").unlink()
        message = refusal(InconsistentCheckpointError, nbmerge.merge, plan, directory.parent / "out")
        assert_says(message, "changed since it was opened", "__3_1.distcp")
        assert sorted(directory.parent.iterdir()) == [directory]


class TestChunks:
    @pytest.mark.parametrize("data", [b"\x00", b"\xff", b"garbage ", b"PK\x03\x04", b"\x80\x02K\x01."])
    def test_one_that_is_overwritten(self, directory: Path, data: bytes):
        path, offset, length = place(directory, DOWN, (1, 0, 12))
        overwrite(path, offset, (data * length)[:length])
        message = refused(CorruptFileError, directory)
        assert_says(
            message, f"{DOWN} at [1, 0, 12]", "1 chunk cannot be read", str(path), "why:", "fix:", "copy it again"
        )

    def test_one_whose_directory_is_overwritten(self, directory: Path):
        """Chunks of one form are read by the first of them; the directory at an archive's end is for that one."""
        for at in ((0, 0, 0), (0, 0, 12), (1, 0, 0), (1, 0, 12)):
            path, offset, length = place(directory, DOWN, at)
            overwrite(path, offset + length - 22, bytes(22))
        message = refused(CorruptFileError, directory)
        assert_says(message, f"{DOWN} at [0, 0, 0]", "cut short or damaged", "fix:")

    @pytest.mark.parametrize("field", [26, 28])  # lengths of the name and of what follows it, zip specification 4.3.7
    @pytest.mark.parametrize("change", [1, 2, 64, 0xFF])
    def test_one_whose_header_would_shift_the_tensor(self, tmp_path: Path, field: int, change: int):
        directory = write_run(tmp_path / "actor", tensors={DOWN: torch.randn(2, 16, 24)}, version="0.19")
        for at in ((0, 0, 0), (0, 0, 12), (1, 0, 0), (1, 0, 12)):
            path, offset, length = place(directory, DOWN, at)
            data = path.read_bytes()
            header = data.rindex(b"PK\x03\x04", offset, data.index(b"archive/data/0", offset, offset + length))
            overwrite(path, header + field, bytes([data[header + field] ^ change]))
        assert_says(refused(CorruptFileError, directory), DOWN, "archive/data/0", "cut short or damaged", "fix:")

    def test_one_of_another_shape_than_the_index_says(self, directory: Path):
        path, offset, length = place(directory, DOWN, (0, 0, 12))
        overwrite(path, offset, saved(torch.zeros(1, 12, 16)))
        message = refused(CorruptFileError, directory)
        words = f"{DOWN} at [0, 0, 12] is float32 [1, 12, 16] in its file, and float32 [1, 16, 12] in .metadata"
        assert_says(message, words, str(path), "not of one save", "fix:")
        assert length == len(saved(torch.zeros(1, 12, 16)))

    def test_one_of_another_dtype_than_the_index_says(self, directory: Path):
        def changed(made: dcp.Metadata) -> None:
            made.state_dict_metadata[DOWN].properties.dtype = torch.bfloat16

        edit_metadata(directory / "dist_ckpt", changed)
        message = refused(CorruptFileError, directory)
        assert_says(message, "4 chunks cannot be read", "is float32 [1, 16, 12] in its file, and bfloat16", "fix:")

    @pytest.mark.parametrize("value", [[torch.zeros(3)], {"w": torch.zeros(3)}, 3, None, torch.zeros(())], ids=repr)
    def test_one_that_is_no_tensor(self, tmp_path: Path, value: Any):
        name = "decoder.layers.0.w"
        directory = tmp_path / "dist_ckpt"
        write_torch_dist(directory, {name: torch.zeros(3)})
        (directory / "__0_0.distcp").write_bytes(saved(value))
        edit_metadata(directory, partial(set_place, name=name, offset=0, length=len(saved(value))))
        message = refusal(CorruptFileError, open_checkpoint, directory)
        assert_says(message, f"{name} at [0]", "not of one save", "fix:")

    def test_one_that_is_larger_than_its_bytes(self, tmp_path: Path):
        """A tensor may repeat its bytes by strides of 0; what is claimed of an index must be there."""
        name, huge = "decoder.layers.0.w", torch.zeros(1).expand(2**40)
        directory = write_torch_dist(tmp_path / "dist_ckpt", {name: torch.zeros(1)})
        (directory / "__0_0.distcp").write_bytes(saved(huge))

        def changed(made: dcp.Metadata) -> None:
            set_place(made, name=name, offset=0, length=len(saved(huge)))
            about = made.state_dict_metadata[name]
            about.size, about.chunks[0].sizes = torch.Size([2**40]), torch.Size([2**40])

        edit_metadata(directory, changed)
        message = refusal(CorruptFileError, open_checkpoint, directory)
        assert_says(message, name, "1099511627776", "fix:")


def set_place(made: dcp.Metadata, *, name: str, **values: Any) -> None:
    """Changes where the index says that a tensor's only chunk is."""
    (info,) = [info for key, info in made.storage_data.items() if key.fqn == name]
    for field, value in values.items():
        setattr(info, field, value)


class TestIndex:
    @pytest.mark.parametrize("keep", [0, 1, 2, 20, 0.3, 0.9, -1])
    def test_one_that_is_cut_short(self, directory: Path, keep: float):
        path = directory / "dist_ckpt" / ".metadata"
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        message = refused(CorruptFileError, directory)
        assert_says(message, "the pickle cannot be read", str(path), "why:", "fix:", "copy the file again")

    def test_one_that_is_missing(self, directory: Path):
        (directory / "dist_ckpt" / ".metadata").unlink()
        message = refused(NotACheckpointError, directory)
        assert_says(message, "no .metadata", str(directory / "dist_ckpt"), "begins with a dot", "fix:", "an older step")

    def test_one_that_is_missing_without_metadata_json(self, directory: Path):
        for name in (".metadata", "metadata.json"):
            (directory / "dist_ckpt" / name).unlink()
        assert_says(refused(NotACheckpointError, directory), "no .metadata", "fix:")

    def test_a_directory_in_its_place(self, directory: Path):
        (directory / "dist_ckpt" / ".metadata").unlink()
        (directory / "dist_ckpt" / ".metadata").mkdir()
        assert_says(refused(NotACheckpointError, directory), "no .metadata")

    @pytest.mark.parametrize(
        "file",
        [
            "../../etc/passwd",
            "/etc/passwd",
            "../other/__0_0.distcp",
            "sub/__0_0.distcp",
            "..",
            ".",
            "",
            "./__0_0.distcp",
        ],
    )
    def test_a_file_outside_the_directory(self, directory: Path, file: str):
        edit_metadata(
            directory / "dist_ckpt", partial(set_place, name="decoder.final_layernorm.weight", relative_path=file)
        )
        message = refused(nbmerge.UnsafePickleError, directory)
        assert_says(message, "files outside the checkpoint", file, str(directory), "could read any file", "fix:")

    @pytest.mark.parametrize(
        "file", ["__9_0.distcp", "n" * 300, "a\x00b", "\ud800", "<b>\n\x1b[31m", "__" + "9" * 5000 + "_0.distcp"]
    )
    def test_a_file_that_cannot_be(self, directory: Path, file: str):
        edit_metadata(
            directory / "dist_ckpt", partial(set_place, name="decoder.final_layernorm.weight", relative_path=file)
        )
        message = refused(IncompleteCheckpointError, directory)
        assert_says(message, "1 file of", "is missing", "fix:")
        assert "\x1b" not in message and len(message) < 2000

    @pytest.mark.parametrize("values", [{"offset": 2**62}, {"offset": 2**62, "length": 2**62}, {"offset": 10**9}])
    def test_bytes_beyond_the_file(self, directory: Path, values: dict[str, int]):
        name = "decoder.final_layernorm.weight"
        edit_metadata(directory / "dist_ckpt", partial(set_place, name=name, **values))
        assert_says(refused(CorruptFileError, directory), "1 file cut short", "chunks of it end at byte", "fix:")

    def test_no_bytes(self, directory: Path):
        name = "decoder.final_layernorm.weight"
        edit_metadata(directory / "dist_ckpt", partial(set_place, name=name, length=0))
        assert_says(refused(CorruptFileError, directory), f"{name} at [0]", "it has 0 bytes", "fix:")

    @pytest.mark.parametrize(
        "values",
        [
            {"offset": -1}, {"length": -(2**40)}, {"offset": None}, {"length": "7"}, {"offset": 2**70}, {"length": 1.5},
            {"offset": True}, {"relative_path": None}, {"relative_path": b"__0_0.distcp"},
        ],
    )  # fmt: skip
    def test_numbers_that_are_none(self, directory: Path, values: dict[str, Any]):
        edit_metadata(directory / "dist_ckpt", partial(set_place, name="decoder.final_layernorm.weight", **values))
        message = refused(CorruptFileError, directory)
        assert_says(message, "the index is not as torch writes it", ".metadata", "why:", "fix:")

    def test_two_chunks_in_one_place(self, directory: Path):
        name = "decoder.layers.mlp.linear_fc1.layer_norm_weight"

        def changed(made: dcp.Metadata) -> None:
            first, second = (made.storage_data[dcp.MetadataIndex(name, at)] for at in ((0, 0), (1, 0)))
            second.relative_path, second.offset = first.relative_path, first.offset

        edit_metadata(directory / "dist_ckpt", changed)
        message = refused(InconsistentCheckpointError, directory)
        assert_says(message, name, "belongs to both", ".metadata", "each chunk has bytes of its own", "fix:")

    def test_a_weight_in_the_place_of_optimizer_state(self, directory: Path):
        def changed(made: dcp.Metadata) -> None:
            at = (0, 0, 12)
            weight = made.storage_data[dcp.MetadataIndex(DOWN, at)]
            other = made.storage_data[dcp.MetadataIndex(f"optimizer.state.exp_avg.{DOWN}", at)]
            weight.relative_path, weight.offset = other.relative_path, other.offset

        edit_metadata(directory / "dist_ckpt", changed)
        assert_says(refused(InconsistentCheckpointError, directory), DOWN, "exp_avg", "belongs to both")


class TestTensorsThatAreNotWhole:
    def changed(self, directory: Path, change: Callable[[Any], object]) -> None:
        edit_metadata(directory / "dist_ckpt", lambda made: change(made.state_dict_metadata[DOWN]))

    def test_a_chunk_that_is_not_listed(self, directory: Path):
        self.changed(directory, lambda about: about.chunks.pop())
        message = refused(IncompleteCheckpointError, directory)
        assert_says(message, DOWN, "192 of 768 elements lie in no piece", "fix:")

    def test_all_chunks_missing(self, directory: Path):
        self.changed(directory, lambda about: about.chunks.clear())
        assert_says(refused(CorruptFileError, directory), f"{DOWN} has no chunks", ".metadata")

    def test_a_larger_tensor_than_its_chunks(self, directory: Path):
        self.changed(directory, lambda about: setattr(about, "size", torch.Size([2, 17, 24])))
        assert_says(
            refused(IncompleteCheckpointError, directory), DOWN, "do not make up [2, 17, 24]", "48 of 816 elements"
        )

    def test_a_huge_tensor(self, directory: Path):
        self.changed(directory, lambda about: setattr(about, "size", torch.Size([2**50, 16, 24])))
        assert_says(refused(IncompleteCheckpointError, directory), DOWN, "elements lie in no piece")

    def test_a_smaller_tensor_than_its_chunks(self, directory: Path):
        self.changed(directory, lambda about: setattr(about, "size", torch.Size([2, 16, 23])))
        assert_says(refused(IncompleteCheckpointError, directory), DOWN, "[1:2, 0:16, 12:24] lies outside [2, 16, 23]")

    def test_chunks_that_overlap(self, tmp_path: Path):
        name, tensor = "decoder.layers.0.w", torch.randn(6, 2)
        boxes = [(0, Box((0, 0), (4, 2))), (1, Box((2, 0), (4, 2)))]
        directory = write_torch_dist(tmp_path, {name: tensor}, {name: boxes})
        message = refusal(IncompleteCheckpointError, open_checkpoint, directory)
        assert_says(message, name, "overlap", "[2:4, 0:2]", "fix:")

    def test_chunks_of_another_number_of_dimensions(self, directory: Path):
        self.changed(directory, lambda about: setattr(about, "size", torch.Size([768])))
        assert_says(refused(CorruptFileError, directory), DOWN, "1 dimensions, and a chunk of it 3")

    def test_a_chunk_that_has_no_bytes(self, directory: Path):
        def changed(made: dcp.Metadata) -> None:
            del made.storage_data[dcp.MetadataIndex(DOWN, (0, 0, 12))]

        edit_metadata(directory / "dist_ckpt", changed)
        message = refused(CorruptFileError, directory)
        assert_says(message, f"no bytes are named for the chunk of {DOWN} at [0, 0, 12]")

    def test_a_hundred_faults_make_a_message_that_can_be_read(self, tmp_path: Path):
        tensors = {f"decoder.layers.{n}.w": torch.randn(2) for n in range(100)}
        directory = write_torch_dist(tmp_path, tensors)
        edit_metadata(
            directory, lambda made: [setattr(a, "size", torch.Size([3])) for a in made.state_dict_metadata.values()]
        )
        message = refusal(IncompleteCheckpointError, open_checkpoint, directory)
        assert_says(message, "100 tensors not whole", "and 97 more like these")


class TestAnotherModel:
    def test_a_config_of_another_size(self, directory: Path):
        shutil.rmtree(directory / "huggingface")
        write_config(directory / "huggingface", "llama", hidden_size=32)
        assert_says(refused(PlanError, directory), "fix:")

    def test_a_config_of_another_depth(self, directory: Path):
        write_config(directory / "huggingface", "llama", num_hidden_layers=3)
        assert_says(refused(PlanError, directory), "fix:")

    def test_a_config_of_another_family(self, directory: Path, tmp_path: Path):
        config = write_config(tmp_path / "another" / "config", "deepseek_v3")
        (tmp_path / "actor" / "x").mkdir()
        assert_says(refused(PlanError, directory, hf_model_config_path=str(config)), "fix:")

    def test_a_config_of_mixtral(self, directory: Path, tmp_path: Path):
        config = write_config(tmp_path / "another" / "config", "mixtral")
        assert_says(refused(PlanError, directory, hf_model_config_path=str(config)), "fix:")


HOSTILE_NAMES = (
    "../x",
    "<img src=x onerror=alert(1)>",
    "two\nlines",
    "weight\x00",
    "lone \ud800",
    "\x1b[31mred",
    "n" * 100_000,
    "",
)


class TestHostileNames:
    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=[f"{name[:9]!a}" for name in HOSTILE_NAMES])
    def test_of_tensors_beside_the_models(self, directory: Path, name: str):
        tensors = {**llama(), name: torch.ones(3)}
        write_torch_dist(directory / "dist_ckpt", tensors)
        for other in (directory / "dist_ckpt").glob("__[123]*"):
            other.unlink()
        checkpoint = open_checkpoint(directory)
        assert name in checkpoint.tensors
        assert "\x1b" not in repr(checkpoint) and "\x00" not in repr(checkpoint)
        html = checkpoint._repr_html_()
        assert "<img" not in html
        message = refused(PlanError, directory)
        assert len(message) < 3000 and "\x1b" not in message and "\x00" not in message
        message.encode()

    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=[f"{name[:9]!a}" for name in HOSTILE_NAMES])
    def test_in_errors(self, tmp_path: Path, name: str):
        directory = write_torch_dist(tmp_path / "dist_ckpt", {name: torch.ones(3)})
        edit_metadata(directory, lambda made: setattr(made.state_dict_metadata[name], "size", torch.Size([4])))
        message = refusal(IncompleteCheckpointError, open_checkpoint, directory)
        assert len(message) < 3000 and "\x1b" not in message and "\x00" not in message
        assert not any(line.startswith("lines") for line in message.splitlines())
        message.encode()

    def test_of_experts_and_layers_without_end(self, directory: Path):
        tensors = {**llama(), "decoder.layers." + "9" * 5000 + ".mlp.linear_fc1.weight": torch.ones(3)}
        write_torch_dist(directory / "dist_ckpt", tensors)
        assert_says(refused(PlanError, directory), "fix:")


def test_arguments_that_are_not_plain_do_no_harm(directory: Path):
    (directory / "transformer_config.json").unlink()
    arguments = argparse.Namespace(tensor_model_parallel_size=[2], pipeline_model_parallel_size="<b>")
    torch.save({"args": arguments}, directory / "dist_ckpt" / "common.pt")
    assert open_checkpoint(directory).mesh == ()
