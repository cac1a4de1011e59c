"""Per-rank FSDP checkpoints that are not as they should be: each refused before anything is written, in words."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from nbmerge import (
    AmbiguousCheckpointError,
    CheckpointError,
    CorruptFileError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_config
from tests.support.pickles import STATE_DICT, Call, dtensor, shard, tensor, write_archive
from tests.support.results import bits, bits_of
from tests.support.worlds import (
    rank_file,
    row_shards,
    write_mesh_world,
    write_ranks,
    write_sharded_tensor_world,
)


def nested(depth: int) -> object:
    """((((2,),),),)."""
    return b"raw:" + pickle.BININT1 + b"\2" + pickle.TUPLE1 * depth


TENSORS = {"layer.weight": torch.randn(7, 3), "layer.bias": torch.randn(5)}


def rewrite(directory: Path, world_size: int, rank: int, change) -> None:
    """Saves a rank's file again after `change` has changed its state dict of plain tensors."""
    path = rank_file(directory, world_size, rank)
    state = torch.load(path)
    change(state)
    torch.save(state, path)


class TestFilesOfTheRanks:
    def test_every_missing_rank_is_named(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (4,))
        rank_file(tmp_path, 4, 1).unlink()
        rank_file(tmp_path, 4, 3).unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 ranks of 4 are missing", "rank_1.pt", "model_world_size_4_rank_3.pt", "fix:", "copy")
        assert "rank_2.pt" not in message

    def test_one_missing_rank_is_told_in_the_singular(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        rank_file(tmp_path, 2, 0).unlink()
        assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), "1 rank of 2 is missing", "rank_0")

    def test_many_missing_ranks_are_counted(self, tmp_path: Path):
        torch.save(TENSORS, rank_file(tmp_path, 256, 0))
        assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), "255 ranks of 256", "and 252 more")

    def test_two_world_sizes_in_one_directory(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        write_mesh_world(tmp_path, TENSORS, (4,))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 files of world size 2", "4 files of world size 4", str(tmp_path), "fix:", "move")

    def test_a_rank_beyond_the_world_size(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        shutil.copy(rank_file(tmp_path, 2, 0), rank_file(tmp_path, 2, 2))
        assert_says(
            refusal(InconsistentCheckpointError, open_checkpoint, tmp_path), "world size 2", "rank_2.pt", "fix:"
        )

    def test_another_spelling_of_a_rank_does_not_take_its_place(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        shutil.copy(rank_file(tmp_path, 2, 0), tmp_path / "model_world_size_2_rank_01.pt")
        assert bits_of(open_checkpoint(tmp_path)["layer.weight"].expr) == bits(TENSORS["layer.weight"])

    @pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
    def test_a_file_cut_short_is_named(self, tmp_path: Path, keep: float):
        write_mesh_world(tmp_path, TENSORS, (2,))
        path = rank_file(tmp_path, 2, 1)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
        message = refusal(UnsupportedCheckpointError if keep == 1 else CorruptFileError, open_checkpoint, tmp_path)
        assert_says(message, path.name, "where:", "why:", "fix:", "copy it again")

    def test_a_directory_in_the_place_of_a_file(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        rank_file(tmp_path, 2, 1).unlink()
        rank_file(tmp_path, 2, 1).mkdir()
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "1 rank of 2 is missing", "rank_1.pt")

    def test_a_file_that_holds_no_state_dict(self, tmp_path: Path):
        torch.save([torch.ones(2)], rank_file(tmp_path, 1, 0))
        assert_says(refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path), "list", "state dict", "rank_0.pt")


class TestFsdpConfig:
    def test_another_world_size(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        (tmp_path / "fsdp_config.json").write_text('{"FSDP_version": 2, "world_size": 8}')
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "fsdp_config.json says world size 8, the files say 2", str(tmp_path), "fix:")

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"2"', b'{"FSDP_version": "two"}'])
    def test_what_is_no_config_is_named(self, tmp_path: Path, content: bytes):
        write_mesh_world(tmp_path, TENSORS, (2,))
        (tmp_path / "fsdp_config.json").write_bytes(content)
        assert_says(
            refusal(CheckpointError, open_checkpoint, tmp_path), "fsdp_config.json", "where:", "fix:", "delete it"
        )

    def test_a_config_that_says_nothing_is_no_fault(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        (tmp_path / "fsdp_config.json").write_text("{}")
        assert len(open_checkpoint(tmp_path)) == 2


class TestRanksThatDisagree:
    """Every fault of every tensor is in the one message."""

    def test_on_the_names(self, tmp_path: Path):
        write_ranks(tmp_path, row_shards(TENSORS, 3))
        rewrite(tmp_path, 3, 1, lambda state: state.pop("layer.bias"))
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "layer.bias is missing from 1 of 3 ranks", "rank 1", "fix:")

    def test_on_the_dtype(self, tmp_path: Path):
        write_ranks(tmp_path, row_shards(TENSORS, 3))
        rewrite(tmp_path, 3, 2, lambda state: state.update({"layer.bias": state["layer.bias"].bfloat16()}))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "disagree on the dtype of layer.bias", "float32 and bfloat16", "rank 0, 1; rank 2", "fix:")

    def test_on_the_global_shape(self, tmp_path: Path):
        write_mesh_world(tmp_path / "a", TENSORS, (2,))
        write_mesh_world(tmp_path / "b", {**TENSORS, "layer.bias": torch.randn(6)}, (2,))
        shutil.copy(rank_file(tmp_path / "b", 2, 1), rank_file(tmp_path / "a", 2, 1))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path / "a")
        assert_says(message, "disagree on the shape of layer.bias: (5,) and (6,)", "rank 0; rank 1", "not of one save")

    def test_on_the_placement(self, tmp_path: Path):
        from torch.distributed.tensor import Replicate

        write_mesh_world(tmp_path / "a", TENSORS, (2,))
        write_mesh_world(tmp_path / "b", TENSORS, (2,), place=lambda *_: [Replicate()])
        shutil.copy(rank_file(tmp_path / "b", 2, 1), rank_file(tmp_path / "a", 2, 1))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path / "a")
        assert_says(
            message, "placement of layer.weight", "Shard(0) on (2,)", "Replicate on (2,)", "placement of layer.bias"
        )

    def test_on_what_a_tensor_is(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        torch.save(TENSORS, rank_file(tmp_path, 2, 1))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 problems", "kind of layer.weight: DTensor and plain tensor")

    def test_a_file_that_is_a_copy_of_another_rank(self, tmp_path: Path):
        write_mesh_world(tmp_path, TENSORS, (2,))
        shutil.copy(rank_file(tmp_path, 2, 0), rank_file(tmp_path, 2, 1))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "layer.weight: ranks 0 and 1 both stand at [0] of the mesh", "rank_1.pt", "a copy", "fix:")

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_file_of_sharded_tensors_that_is_a_copy_of_another_rank(self, tmp_path: Path):
        write_sharded_tensor_world(tmp_path, TENSORS, 2)
        shutil.copy(rank_file(tmp_path, 2, 0), rank_file(tmp_path, 2, 1))
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(
            message, "the pieces of layer.weight do not make up [7, 3]", "9 of 21 elements lie in no piece", "fix:"
        )

    def test_a_piece_of_another_size_than_its_placement_gives(self, tmp_path: Path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        from tests.support.worlds import rank_of

        for rank, rows in enumerate((4, 2)):
            with rank_of(rank, 2):
                mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
                piece = DTensor.from_local(torch.ones(rows, 3), mesh, [Shard(0)], shape=(7, 3), stride=(3, 1))
                torch.save({"w": piece}, rank_file(tmp_path, 2, rank))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(
            message,
            "w: rank 1 holds [2, 3] where its placements put [3, 3]",
            "global shape [7, 3], mesh (2,), at (1,)",
            "Shard(0)",
            "--mesh_shape and --placements",
        )

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_sharded_tensor_of_which_a_rank_is_not_of_this_save(self, tmp_path: Path):
        write_sharded_tensor_world(tmp_path / "a", {"w": torch.randn(9, 2)}, 3)
        write_sharded_tensor_world(tmp_path / "b", {"w": torch.randn(6, 2)}, 3)
        shutil.copy(rank_file(tmp_path / "b", 3, 1), rank_file(tmp_path / "a", 3, 1))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path / "a")
        assert_says(message, "disagree on the shape of w: (9, 2) and (6, 2)", "rank 0, 2; rank 1")

    def test_partial_sums_are_no_parameters(self, tmp_path: Path):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Partial

        from tests.support.worlds import rank_of

        for rank in range(2):
            with rank_of(rank, 2):
                mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
                torch.save({"w": DTensor.from_local(torch.ones(3), mesh, [Partial()])}, rank_file(tmp_path, 2, rank))
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "partial sums", "w in", "rank_0.pt", "redistribute")


class TestPlainTensorsWithoutEvidence:
    def test_equal_shapes_without_a_config_are_ambiguous_and_the_ways_out_are_named(self, tmp_path: Path):
        write_ranks(tmp_path, [TENSORS, TENSORS], version=None)
        message = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
        assert_says(
            message, "layer.weight", "layer.bias", "[7, 3] on each of 2 ranks", "copies or row shards",
            "--hf_model_config_path", "--mesh_shape", "--placements",
        )  # fmt: skip

    def test_a_name_that_the_config_does_not_know_stays_ambiguous(self, tmp_path: Path):
        state = {**memory_state("llama"), "extra.weight": torch.ones(4, 2)}
        write_ranks(tmp_path, [state, state])
        write_config(tmp_path / "huggingface", "llama")
        message = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "1 problem", "extra.weight", "copies or row shards")
        assert "there is no config" not in message, "there is one; it does not know the name"

    def test_a_shape_that_fits_neither_copies_nor_rows(self, tmp_path: Path):
        state = memory_state("llama")
        state["lm_head.weight"] = state["lm_head.weight"][:11]
        write_ranks(tmp_path, [state, state])
        write_config(tmp_path / "huggingface", "llama")
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "lm_head.weight: the ranks hold [11, 16] on each of 2 ranks", "demands [37, 16]", "fix:")

    def test_columns_that_differ_are_neither(self, tmp_path: Path):
        write_ranks(tmp_path, [{"w": torch.ones(3, 2)}, {"w": torch.ones(3, 4)}])
        message = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "[3, 2] (rank 0)", "[3, 4] (rank 1)", "--placements")


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.flat_param", "model.layers.0._flat_param", "flat_param_3"])
def test_flat_parameters_are_refused_with_the_setting_that_would_have_helped(tmp_path: Path, name: str):
    write_ranks(tmp_path, [{name: torch.ones(12)}, {name: torch.ones(12)}], version=1)
    message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
    assert_says(
        message, "1 flat parameter", name, "LOCAL_STATE_DICT", "without the names and shapes", "SHARDED_STATE_DICT"
    )


NONSENSE: dict[str, dict[str, object]] = {
    "no local tensor": {"local": None},
    "a local tensor that is none": {"local": "w"},
    "another local shape": {"local": tensor(shape=(3,))},
    "a dimension below 0": {"placements": (shard(-1),)},
    "a dimension that is not there": {"placements": (shard(1),)},
    "a dimension that is no number": {"placements": (shard("x"),)},
    "a dimension that is nothing": {"placements": (shard(None),)},
    "no placements": {"placements": ()},
    "more placements than mesh dimensions": {"placements": (shard(0), shard(0))},
    "placements that are none": {"placements": ("Shard(0)",)},
    "placements that are no list": {"placements": 3},
    "an empty mesh dimension": {"mesh_shape": (0,)},
    "a mesh dimension below 0": {"mesh_shape": (-1,)},
    "no mesh": {"mesh_shape": None},
    "a mesh that is none": {"mesh": 3},
    "mesh dimensions in themselves": {"mesh_shape": (nested(3000),)},
    "a coordinate beyond the mesh": {"coordinate": (1,)},
    "a coordinate below 0": {"coordinate": (-1,)},
    "a coordinate of another rank": {"coordinate": (0, 0)},
    "no coordinate": {"coordinate": None},
    "names that are none": {"names": 3},
    "more names than mesh dimensions": {"names": ("a", "b")},
    "a shape below 0": {"shape": (-4,)},
    "a shape that is no number": {"shape": ("x",)},
    "a shape of no dimension": {"shape": ()},
    "a huge shape": {"shape": (2**70,)},
    "an order that is none": {"shard_order": 3},
    "an order of another mesh": {"shard_order": (Call(STATE_DICT),)},
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_a_dtensor_whose_placement_makes_no_sense_is_told(tmp_path: Path, kind: str):
    given = dict(NONSENSE[kind])
    local = given.pop("local", tensor())
    path = write_archive(rank_file(tmp_path, 1, 0), {"layer.weight": dtensor(local, **given)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert_says(str(caught.value), "layer.weight", str(path.parent))


def test_a_dtensor_that_is_as_torch_writes_it_is_read(tmp_path: Path):
    write_archive(rank_file(tmp_path, 1, 0), {"w": dtensor(tensor())})
    assert bits_of(open_checkpoint(tmp_path)["w"].expr) == bits(torch.zeros(4))


HOSTILE = (
    "../../etc/passwd",
    "<img src=x onerror=alert(1)>",
    "two\nlines",
    "tab\tand\x1b[31mred",
    "n" * 100_000,
    "__metadata__",
    "",
    "weight\x00",
    "имя.вес",
)


@pytest.mark.parametrize("name", HOSTILE, ids=[f"{name[:12]!r}" for name in HOSTILE])
def test_a_hostile_name_is_a_name_and_nothing_else(tmp_path: Path, name: str):
    directory = write_mesh_world(tmp_path / "ckpt", {name: TENSORS["layer.weight"]}, (2,))
    before = sorted(tmp_path.rglob("*"))
    ckpt = open_checkpoint(directory)
    assert bits_of(ckpt[name].expr) == bits(TENSORS["layer.weight"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", HOSTILE, ids=[f"{name[:12]!r}" for name in HOSTILE])
def test_a_hostile_name_in_an_error_stays_short_and_on_its_line(tmp_path: Path, name: str):
    write_ranks(tmp_path, [{name: torch.ones(3)}, {name: torch.ones(3)}])
    message = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
    assert len(message) < 3_000
    assert "\x1b" not in message and "\x00" not in message
    assert not any(line.startswith("lines") for line in message.splitlines())


def test_a_thousand_faults_make_a_message_that_can_be_read(tmp_path: Path):
    state = {f"layers.{i}.weight": torch.ones(2) for i in range(1000)}
    write_ranks(tmp_path, [state, state])
    message = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
    assert_says(message, "1,000 problems", "and 997 more like these")
    assert len(message.splitlines()) < 10


def test_the_message_of_a_fault_carries_json_of_no_config_into_no_traceback(tmp_path: Path):
    write_mesh_world(tmp_path, TENSORS, (2,))
    (tmp_path / "huggingface").mkdir()
    (tmp_path / "huggingface" / "config.json").write_text(json.dumps([1]))
    assert len(open_checkpoint(tmp_path)) == 2  # the config is asked only where bytes don't decide


def test_the_lost_last_file_of_accelerates_is_named(tmp_path: Path):
    """The names do not say how many ranks there are; the tensors' meshes do."""
    write_mesh_world(tmp_path, {"model.norm.weight": torch.arange(12.0)}, (3,))
    for rank in range(2):
        rank_file(tmp_path, 3, rank).rename(tmp_path / f"pytorch_model_fsdp_0_rank{rank}.bin")
    rank_file(tmp_path, 3, 2).unlink()
    (tmp_path / "fsdp_config.json").unlink()
    said = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "1 rank of 3 is missing", "pytorch_model_fsdp_0_rank2.bin")
