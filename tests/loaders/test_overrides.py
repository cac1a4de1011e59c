"""What the user says about mesh and placements, where the files don't say or say it wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import InconsistentCheckpointError, OptionError, open_checkpoint
from nbmerge.geometry import REPLICATE, Placement
from nbmerge.options import parse_names, parse_shape
from nbmerge.overrides import read_placements
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_config
from tests.support.results import assert_same, bits, bits_of, receipt_of, saved_bits
from tests.support.worlds import row_shards, write_mesh_world, write_ranks, write_sharded_tensor_world

WHOLE = {"a.weight": torch.randn(7, 4), "b.weight": torch.randn(3, 6), "norm": torch.randn(5)}


def columns(tensor: torch.Tensor, parts: int) -> list[torch.Tensor]:
    return [part.clone() for part in tensor.chunk(parts, dim=1)]


def two_by_two(directory: Path) -> Path:
    """`a` in rows by the first mesh dimension, in columns by the second; `b` in columns; `norm` not."""

    def rank(row: int, column: int) -> dict[str, torch.Tensor]:
        return {
            "a.weight": columns(WHOLE["a.weight"].chunk(2)[row], 2)[column],
            "b.weight": columns(WHOLE["b.weight"], 2)[column],
            "norm": WHOLE["norm"].clone(),
        }

    return write_ranks(directory, [rank(row, column) for row in range(2) for column in range(2)])


PLACEMENTS = {"a.*": ["Shard(0)", "Shard(1)"], "b.*": ["Replicate", "Shard(dim=1)"], "*": ["Replicate()", "Replicate"]}


@pytest.mark.parametrize("mesh_shape", ["2,2", "2x2", "(2, 2)", "[2 2]", (2, 2), [2, 2]], ids=str)
def test_a_mesh_and_placements_that_the_user_gives_decide(tmp_path: Path, mesh_shape: str | tuple[int, int]):
    ckpt = open_checkpoint(two_by_two(tmp_path), mesh_shape=mesh_shape, placements=PLACEMENTS)
    assert {name: bits_of(ckpt[name].expr) for name in WHOLE} == {name: bits(tensor) for name, tensor in WHOLE.items()}
    assert ckpt["b.weight"].placement == "Replicate×2 · Shard(1)×2"


def test_placements_may_come_from_a_json_file(tmp_path: Path):
    path = tmp_path / "placements.json"
    path.write_text(json.dumps(PLACEMENTS))
    ckpt = open_checkpoint(two_by_two(tmp_path / "ckpt"), mesh_shape="2,2", placements=path, mesh_dim_names="dp, tp")
    assert bits_of(ckpt["a.weight"].expr) == bits(WHOLE["a.weight"])
    assert [axis.name for axis in ckpt.mesh] == ["dp", "tp"]


def test_the_first_pattern_that_fits_a_name_holds(tmp_path: Path):
    ckpt = open_checkpoint(
        write_ranks(tmp_path, [{"norm": WHOLE["norm"]}] * 2),
        mesh_shape=2, placements={"norm": "Replicate", "*": "Shard(0)"},
    )  # fmt: skip
    assert bits_of(ckpt["norm"].expr) == bits(WHOLE["norm"])


def test_the_other_pieces_stay_as_their_files_say(tmp_path: Path):
    write_mesh_world(tmp_path, WHOLE, (2,))
    ckpt = open_checkpoint(tmp_path, mesh_shape="2", placements={"norm": ["Shard(0)"]})
    assert {name: bits_of(ckpt[name].expr) for name in WHOLE} == {name: bits(tensor) for name, tensor in WHOLE.items()}


def test_wrong_placements_are_refused_by_the_pieces(tmp_path: Path):
    write_mesh_world(tmp_path, WHOLE, (2,))
    message = refusal(
        InconsistentCheckpointError, open_checkpoint, tmp_path, mesh_shape="2", placements={"*": "Shard(1)"}
    )
    assert_says(message, "a.weight: rank 0 holds [4, 4] where its placements put [7, 2]", "--placements")


def test_a_dimension_that_the_tensor_does_not_have(tmp_path: Path):
    write_ranks(tmp_path, [{"norm": WHOLE["norm"], "scale": torch.tensor(2.0)}] * 2)
    for placements, name in (({"*": "Shard(0)"}, "scale"), ({"norm": "Shard(1)", "*": "Replicate"}, "norm")):
        message = refusal(OptionError, open_checkpoint, tmp_path, mesh_shape="2", placements=placements)
        assert_says(message, "Shard(", name, "--placements")


def test_a_scalar_beside_row_shards_is_given_its_own_pattern(tmp_path: Path):
    states = [{**state, "scale": torch.tensor(2.0)} for state in row_shards({"norm": WHOLE["norm"]}, 2)]
    placements = {"scale": "Replicate", "*": "Shard(0)"}
    ckpt = open_checkpoint(write_ranks(tmp_path, states), mesh_shape="2", placements=placements)
    assert bits_of(ckpt["norm"].expr) == bits(WHOLE["norm"])
    assert bits_of(ckpt["scale"].expr) == bits(torch.tensor(2.0))


def test_plan_and_receipt_record_the_override(tmp_path: Path):
    state = memory_state("llama")
    write_ranks(tmp_path / "ckpt", row_shards(state, 2))
    write_config(tmp_path / "ckpt" / "huggingface", "llama")
    given = {"mesh_shape": "2", "mesh_dim_names": "dp", "placements": {"*": ["Shard(0)"]}}
    plan = nbmerge.plan_merge(tmp_path / "ckpt", **given)
    said = {"mesh_dim_names": ["dp"], "mesh_shape": [2], "placements": {"*": ["Shard(0)"]}}
    assert plan.checkpoint.overrides == said
    nbmerge.merge(plan, tmp_path / "out")
    assert receipt_of(tmp_path / "out")["source"]["overrides"] == said
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out2", **given)
    assert receipt_of(tmp_path / "out2")["options"] == given
    assert_same(saved_bits(tmp_path / "out2"), {name: bits(tensor) for name, tensor in state.items()})


class TestRefusedOptions:
    @pytest.fixture
    def ckpt(self, tmp_path: Path) -> Path:
        return write_mesh_world(tmp_path, WHOLE, (2,))

    def test_a_mesh_of_another_size(self, ckpt: Path):
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2,2")
        assert_says(message, "(2, 2) has 4 ranks, the checkpoint has 2", "fix:")

    def test_placements_without_a_mesh(self, ckpt: Path):
        message = refusal(OptionError, open_checkpoint, ckpt, placements={"*": ["Shard(0)"]})
        assert_says(message, "--placements needs --mesh_shape", "--mesh_shape 2")

    def test_a_mesh_without_placements(self, ckpt: Path):
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2")
        assert_says(message, "--mesh_shape needs --placements", "fix:")
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_dim_names="a")
        assert_says(message, "--mesh_dim_names needs --mesh_shape")

    def test_a_pattern_that_decides_on_nothing(self, ckpt: Path):
        for placements in ({"a.wieght": "Shard(0)"}, {"*": "Shard(0)", "norm": "Replicate"}):
            message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements=placements)
            assert_says(message, repr(list(placements)[-1]), "decides on no tensor", "the general ones last")

    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_a_tensor_whose_file_says_of_each_piece_where_it_lies(self, tmp_path: Path):
        ckpt = write_sharded_tensor_world(tmp_path / "sharded", WHOLE, 2)
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements={"a*": "Shard(0)"})
        assert_says(message, "--placements names a.weight, a ShardedTensor", "fix:")

    def test_as_many_names_as_dimensions(self, ckpt: Path):
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", mesh_dim_names="a,b")
        assert_says(message, "2 --mesh_dim_names for a mesh of 1 dimensions")

    def test_as_many_placements_as_dimensions(self, ckpt: Path):
        placements = {"*": ["Shard(0)", "Replicate"]}
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements=placements)
        assert_says(message, "2 placements for '*'", "the mesh has 1 dimension", "fix:")

    @pytest.mark.parametrize("text", ["Shard", "Shard(-1)", "shard(0)", "Partial()", "Shard(0, 2)", 0, None])
    def test_what_is_no_placement(self, ckpt: Path, text: object):
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements={"*": [text]})
        assert_says(message, repr(text), "is no placement", "Replicate, Shard(0)")

    @pytest.mark.parametrize("value", [3, None, {"a": 1}])
    def test_placements_that_are_no_list(self, ckpt: Path, value: object):
        message = refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements={"*": value})
        assert_says(message, "placement", "Shard(0)")

    @pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
    def test_a_file_that_holds_none(self, ckpt: Path, tmp_path: Path, content: bytes):
        path = tmp_path / "placements.json"
        path.write_bytes(content)
        assert_says(refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements=path), "placements", "fix:")

    def test_a_file_that_is_not_there(self, ckpt: Path, tmp_path: Path):
        path = tmp_path / "none.json"
        assert_says(refusal(OptionError, open_checkpoint, ckpt, mesh_shape="2", placements=path), str(path), "fix:")

    @pytest.mark.parametrize("text", ["", "a,b", "0,2", "-1,2", "2.0", "²", ()])
    def test_what_is_no_mesh_shape(self, text: str):
        assert_says(refusal(OptionError, parse_shape, text), "is no mesh shape", "fix:")

    @pytest.mark.parametrize("text", ["", " , ", "()"])
    def test_what_names_no_mesh_dimension(self, text: str):
        assert_says(refusal(OptionError, parse_names, text), "names no mesh dimension", "fix:")


@pytest.mark.parametrize(
    ("text", "placement"),
    [
        ("Replicate", REPLICATE), ("Replicate()", REPLICATE), ("Shard(0)", Placement("shard", 0)),
        (" Shard( dim = 3 ) ", Placement("shard", 3)), ("_StridedShard(1, sf=2)", Placement("shard", 1, 2)),
        ("StridedShard(dim=0, split_factor=4)", Placement("shard", 0, 4)),
    ],
)  # fmt: skip
def test_placements_are_written_as_torch_shows_them(text: str, placement: Placement):
    assert read_placements({"*": text}) == {"*": (placement,)}


@pytest.mark.parametrize("placement", [REPLICATE, Placement("shard", 2), Placement("shard", 1, 2)], ids=str)
def test_a_placement_is_read_back_as_it_is_shown(placement: Placement):
    assert read_placements({"*": [str(placement)]}) == {"*": (placement,)}


@pytest.mark.parametrize("text", ["ddp,fsdp", "('ddp', 'fsdp')", '["ddp", "fsdp"]', ("ddp", "fsdp")], ids=str)
def test_names_of_mesh_dimensions_are_written_as_torch_shows_them(text: str | tuple[str, str]):
    assert parse_names(text) == ("ddp", "fsdp")
