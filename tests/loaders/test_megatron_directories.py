"""Where the weights and the config of a Megatron checkpoint are found, and what is said where they are not."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import (
    AmbiguousCheckpointError,
    CheckpointError,
    ConfigError,
    IncompleteCheckpointError,
    NotACheckpointError,
    OptionError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from tests.support.megatron import write_torch_dist
from tests.support.megatron_forms import megatron_fsdp, optimizer_beside
from tests.support.megatron_models import megatron_state
from tests.support.megatron_objects import rng_states
from tests.support.megatron_ranks import Ranks, gpt, rank_states, write_lm, write_verl
from tests.support.megatron_runs import (
    TWO_BY_TWO,
    llama,
    write_contents,
    write_huggingface,
    write_run,
)
from tests.support.messages import assert_says, refusal
from tests.support.models import published_state, write_config
from tests.support.processes import as_ordinary_user
from tests.support.results import assert_same, bits_of, bits_of_all, saved_bits
from tests.support.worlds import write_ranks

TRACKER = "latest_checkpointed_iteration.txt"


def assert_merges(directory: Path, target: Path, **options: str) -> None:
    nbmerge.merge(directory, target, progress=False, **options)  # type: ignore[arg-type]
    assert_same(saved_bits(target), bits_of_all(published_state("llama")))


def write_optimizer(directory: Path) -> Path:
    """A container of optimizer tensors and random number generators alone."""
    return write_torch_dist(directory, optimizer_beside(llama()), objects=rng_states(TWO_BY_TWO))


class TestDirectoriesOfVerl:
    @pytest.mark.parametrize("layout", ["verl_v1", "verl_v2"])
    def test_of_0_5_to_0_9(self, tmp_path: Path, layout: str):
        directory = write_run(tmp_path / "actor", layout)
        checkpoint = open_checkpoint(directory)
        inside = "model/" if layout == "verl_v2" else ""
        assert checkpoint.path == directory
        assert checkpoint.config_dir == directory / inside / "huggingface"
        assert checkpoint.evidence == (f"{inside}dist_ckpt/.metadata, metadata.json: torch_dist",)
        assert [axis.name for axis in checkpoint.mesh] == ["pp", "tp"]
        assert_merges(directory, tmp_path / "out")

    @pytest.mark.parametrize("config", ["huggingface", "hf_config_and_tokenizer"])
    def test_of_0_3_and_0_4(self, tmp_path: Path, config: str):
        want, ranks = gpt(2), Ranks(stages=[[1, 1]], tp=2)
        write_verl(tmp_path / "model", rank_states(want, ranks))
        write_config(tmp_path / config, "llama")
        checkpoint = open_checkpoint(tmp_path)
        assert_same({name: bits_of(t.expr) for name, t in checkpoint.tensors.items()}, bits_of_all(want))
        assert checkpoint.config_dir == tmp_path / config
        assert checkpoint.evidence == ("model/4 × mp_rank_*",)

    def test_a_container_of_megatron_fsdp(self, tmp_path: Path):
        tensors = megatron_fsdp(megatron_state("llama", spec="local", container="ranks"))
        write_torch_dist(tmp_path / "model" / "dist_ckpt", tensors, version="fsdp_dtensor")
        assert open_checkpoint(tmp_path).layout == "Megatron-FSDP (fsdp_dtensor)"

    @pytest.mark.parametrize("layout", ["verl_v1", "verl_v2"])
    def test_the_weights_directory_alone_finds_the_config_beside_it(self, tmp_path: Path, layout: str):
        write_run(tmp_path / "actor", layout)
        directory = tmp_path / "actor" / ("model/dist_ckpt" if layout == "verl_v2" else "dist_ckpt")
        checkpoint = open_checkpoint(directory)
        assert checkpoint.config_dir == directory.parent / "huggingface"
        assert [axis.name for axis in checkpoint.mesh] == ["pp", "tp"]
        assert_merges(directory, tmp_path / "out")

    def test_model_of_0_9_alone(self, tmp_path: Path):
        write_run(tmp_path / "actor", "verl_v2")
        assert_merges(tmp_path / "actor" / "model", tmp_path / "out")

    def test_from_inside_the_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(write_run(tmp_path / "actor") / "dist_ckpt")
        assert_merges(Path(), tmp_path / "out")
        assert open_checkpoint("../dist_ckpt").config_dir == tmp_path / "actor" / "dist_ckpt" / ".." / "huggingface"

    def test_a_root_with_a_tracker_of_its_own_names_the_steps_below(self, tmp_path: Path):
        for step in (100, 20):
            write_run(tmp_path / f"global_step_{step}" / "actor")
        (tmp_path / TRACKER).write_text("100")
        message = refusal(NotACheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 directories", str(tmp_path / "global_step_100" / "actor"), "global_step_20", "fix:")
        assert "iter_" not in message.replace("iter_NNNNNNN", "")

    def test_a_step_names_the_actor_in_it(self, tmp_path: Path):
        write_run(tmp_path / "actor")
        assert_says(refusal(NotACheckpointError, open_checkpoint, tmp_path), f"pass one of {tmp_path / 'actor'}")


class TestDirectoriesOfMegatronLM:
    @pytest.fixture
    def config(self, tmp_path: Path) -> str:
        return str(write_config(tmp_path / "config", "llama"))

    def test_a_root_with_its_tracker(self, tmp_path: Path, config: str):
        directory = write_run(tmp_path / "run", "megatron_lm")
        checkpoint = open_checkpoint(directory)
        assert checkpoint.evidence == (TRACKER, "iter_0000010/.metadata, metadata.json: torch_dist")
        assert [axis.name for axis in checkpoint.mesh] == ["pp", "tp"]
        assert_merges(directory, tmp_path / "out", hf_model_config_path=config)

    def test_the_tracker_chooses_the_iteration(self, tmp_path: Path):
        directory = write_run(tmp_path / "run", "megatron_lm")
        write_torch_dist(directory / "iter_0000020", {"decoder.layers.0.later": torch.ones(2)})
        assert "decoder.layers.0.later" not in open_checkpoint(directory).tensors
        (directory / TRACKER).write_text("20\n")
        assert list(open_checkpoint(directory).tensors) == ["decoder.layers.0.later"]

    def test_an_iteration_by_itself(self, tmp_path: Path, config: str):
        directory = write_run(tmp_path / "run", "megatron_lm") / "iter_0000010"
        assert_merges(directory, tmp_path / "out", hf_model_config_path=config)

    def test_a_release(self, tmp_path: Path, config: str):
        directory = write_run(tmp_path / "run", "megatron_lm")
        (directory / "iter_0000010").rename(directory / "release")
        (directory / TRACKER).write_text("release")
        assert_merges(directory, tmp_path / "out", hf_model_config_path=config)

    def test_a_config_beside_the_weights(self, tmp_path: Path):
        directory = write_run(tmp_path / "run", "megatron_lm")
        write_config(directory / "iter_0000010", "llama")
        assert open_checkpoint(directory).config_dir == directory / "iter_0000010"
        assert_merges(directory, tmp_path / "out")

    def test_without_a_config_the_option_is_named(self, tmp_path: Path):
        directory = write_run(tmp_path / "run", "megatron_lm")
        message = refusal(ConfigError, nbmerge.merge, directory, tmp_path / "out")
        assert_says(message, "config.json", str(directory), "--hf_model_config_path")
        assert not (tmp_path / "out").exists()

    def test_rank_files_under_a_tracker(self, tmp_path: Path):
        want, ranks = gpt(2), Ranks(stages=[[1, 1]])
        write_lm(tmp_path / "iter_0000010", rank_states(want, ranks))
        (tmp_path / TRACKER).write_text("10")
        assert open_checkpoint(tmp_path).evidence == (TRACKER, "iter_0000010/2 × mp_rank_*")

    @pytest.mark.parametrize("content", ["", "ten", "-1", "10 20", "../../etc", "1" * 5000, "\x00\x1b[31m", "²"])
    def test_a_tracker_that_says_no_iteration(self, tmp_path: Path, content: str):
        directory = write_run(tmp_path / "run", "megatron_lm")
        (directory / TRACKER).write_text(content)
        message = refusal(CheckpointError, open_checkpoint, directory)
        assert_says(message, "which is no iteration", str(directory / TRACKER), "fix:", "iter_NNNNNNN")
        assert len(message) < 1000 and "\x1b" not in message

    @pytest.mark.parametrize("step", ["20", "release", "1" * 60])
    def test_a_tracker_that_names_what_is_not_there(self, tmp_path: Path, step: str):
        directory = write_run(tmp_path / "run", "megatron_lm")
        (directory / TRACKER).write_text(step)
        message = refusal(IncompleteCheckpointError, open_checkpoint, directory)
        assert_says(message, step, "which is not there", str(directory), "pass one that is whole: iter_0000010")

    def test_a_tracker_that_names_an_empty_iteration(self, tmp_path: Path):
        directory = write_run(tmp_path / "run", "megatron_lm")
        shutil.rmtree(directory / "iter_0000010")
        (directory / "iter_0000010").mkdir()
        message = refusal(IncompleteCheckpointError, open_checkpoint, directory)
        assert_says(message, "iter_0000010", "holds no weights", "fix:", "copy it")

    def test_a_tracker_alone(self, tmp_path: Path):
        (tmp_path / TRACKER).write_text("10")
        message = refusal(NotACheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "it holds 1 .txt", "iter_NNNNNNN")

    def test_a_tracker_that_is_a_directory(self, tmp_path: Path):
        directory = write_run(tmp_path / "run", "megatron_lm")
        (directory / TRACKER).unlink()
        (directory / TRACKER).mkdir()
        message = refusal(NotACheckpointError, open_checkpoint, directory)
        assert_says(message, f"pass {directory / 'iter_0000010'}")


class TestContainersAlone:
    def test_with_a_config_that_is_given(self, tmp_path: Path):
        directory = write_torch_dist(tmp_path / "any name", llama())
        config = write_config(tmp_path / "elsewhere" / "config", "llama")
        assert open_checkpoint(directory).config_dir is None
        assert_merges(directory, tmp_path / "out", hf_model_config_path=str(config))

    def test_dist_ckpt_without_config(self, tmp_path: Path):
        directory = write_torch_dist(tmp_path / "dist_ckpt", llama())
        message = refusal(ConfigError, nbmerge.merge, directory, tmp_path / "out")
        assert_says(message, "config.json", str(directory), "--hf_model_config_path")

    def test_torchs_own_checkpoints_are_not_claimed(self, tmp_path: Path):
        tensors = {"model.layers.0.mlp.weight": torch.ones(2), "app.model.norm.weight": torch.ones(3)}
        write_torch_dist(tmp_path / "step", tensors, version="torch")
        assert open_checkpoint(tmp_path / "step").backend == "dcp"

    def test_nor_are_they_in_a_folder_called_model(self, tmp_path: Path):
        write_torch_dist(tmp_path / "model", {"model.norm.weight": torch.ones(3)}, version="torch")
        assert open_checkpoint(tmp_path).backend == "dcp"

    def test_an_index_that_is_damaged_is_claimed_only_where_something_else_says_so(self, tmp_path: Path):
        (tmp_path / ".metadata").write_bytes(b"\x80\x02garbage")
        refusal(NotACheckpointError, open_checkpoint, tmp_path)
        (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
        assert_says(refusal(nbmerge.CorruptFileError, open_checkpoint, tmp_path), "cannot be read", ".metadata", "fix:")

    @pytest.mark.parametrize("content", ["", "[]", "null", '{"sharded_backend": null}', "[" * 100_000])
    def test_a_metadata_json_that_says_nothing(self, tmp_path: Path, content: str):
        write_torch_dist(tmp_path, llama())
        (tmp_path / "metadata.json").write_text(content)
        assert len(open_checkpoint(tmp_path)) == len(llama())

    def test_options_of_fsdp_are_refused(self, tmp_path: Path):
        directory = write_run(tmp_path)
        message = refusal(OptionError, open_checkpoint, directory, mesh_shape="2,2", mesh_dim_names="a,b")
        assert_says(message, "mesh_dim_names", "FSDP", "leave them out")


class TestTwoLayoutsInOneDirectory:
    def test_files_of_fsdp_beside_megatrons(self, tmp_path: Path):
        directory = write_run(tmp_path)
        write_ranks(directory, [{"w": torch.ones(2)}])
        message = refusal(AmbiguousCheckpointError, open_checkpoint, directory)
        assert_says(
            message, "2 layouts", str(directory), "fsdp: 1 × model_world_size_1_rank_*.pt",
            "megatron: dist_ckpt/.metadata", "--backend fsdp or megatron",
        )  # fmt: skip
        assert len(open_checkpoint(directory, "megatron")) == len(llama())
        assert list(open_checkpoint(directory, "fsdp").tensors) == ["w"]

    def test_a_backend_that_finds_nothing_of_megatrons(self, tmp_path: Path):
        write_ranks(tmp_path, [{"w": torch.ones(2)}])
        message = refusal(NotACheckpointError, open_checkpoint, tmp_path, "megatron")
        assert_says(message, "dist_ckpt/, iter_NNNNNNN/ or mp_rank_*/ (megatron)")


class TestNothingToMerge:
    def refused(self, error: type[BaseException], directory: Path) -> str:
        target = directory.parent / "out"
        message = refusal(error, nbmerge.merge, directory, target)
        assert not target.exists()
        return message

    def test_contents_that_are_in_hugging_face_form(self, tmp_path: Path):
        write_contents(tmp_path / "actor", "huggingface")
        folder = write_huggingface(tmp_path / "actor" / "model" / "huggingface")
        write_optimizer(tmp_path / "actor" / "optimizer" / "dist_ckpt")
        message = self.refused(UnsupportedCheckpointError, tmp_path / "actor")
        assert_says(message, "nothing to merge", "ckpt_contents.json says so", f"use {folder} as it is")

    def test_a_container_of_optimizer_state_beside_hugging_face_weights(self, tmp_path: Path):
        write_optimizer(tmp_path / "actor" / "dist_ckpt")
        folder = write_huggingface(tmp_path / "actor" / "huggingface")
        for directory in (tmp_path / "actor", tmp_path / "actor" / "dist_ckpt"):
            message = self.refused(UnsupportedCheckpointError, directory)
            assert_says(message, "nothing to merge", "only optimizer", f"use {folder} as it is")

    def test_a_container_of_optimizer_state_alone(self, tmp_path: Path):
        write_optimizer(tmp_path / "actor" / "dist_ckpt")
        write_config(tmp_path / "actor" / "huggingface", "llama")  # a config, and no weights
        message = self.refused(IncompleteCheckpointError, tmp_path / "actor")
        assert_says(message, "holds no weights", str(tmp_path / "actor" / "dist_ckpt"), "save_contents", "fix:")

    def test_a_container_of_objects_alone(self, tmp_path: Path):
        write_torch_dist(tmp_path / "actor" / "dist_ckpt", {}, objects=rng_states(TWO_BY_TWO))
        assert_says(self.refused(IncompleteCheckpointError, tmp_path / "actor"), "holds no weights")

    @pytest.mark.parametrize("path", ["../../../etc", "/etc", 3, None, "\x00"])
    def test_contents_that_lead_elsewhere(self, tmp_path: Path, path: object):
        directory = write_run(tmp_path / "actor", "verl_v2")
        about = {"contents": {"model": {"format": "huggingface", "path": path}}}
        (directory / "ckpt_contents.json").write_text(json.dumps(about))
        assert_says(self.refused(UnsupportedCheckpointError, directory), "nothing to merge")

    @pytest.mark.parametrize(
        "content", ["[]", "{}", '{"contents": 3}', '{"contents": {"model": []}}', "{" * 9, "[" * 100_000]
    )
    def test_contents_that_say_nothing_are_passed_over(self, tmp_path: Path, content: str):
        directory = write_run(tmp_path / "actor", "verl_v2")
        (directory / "ckpt_contents.json").write_text(content)
        assert_merges(directory, tmp_path / "out")


class TestPermissions:
    """As a user who may not read; root may read everything."""

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        for path in (tmp_path, *tmp_path.parents):
            if path.owner() == "root" and path.name.startswith(("pytest", "popen", "test_")):
                path.chmod(0o755)
        return write_run(tmp_path / "actor")

    @pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "."])
    def test_a_file_that_may_not_be_read_is_named(self, directory: Path, name: str):
        path = directory / "dist_ckpt" / name
        path.chmod(0o000)
        try:
            message = as_ordinary_user(partial(refusal, CheckpointError, open_checkpoint, directory))
        finally:
            path.chmod(0o755)
        assert_says(message, "permission denied", str(path), "fix:")

    def test_a_common_file_that_may_not_be_read_is_noted_as_the_weights_do_not_need_it(self, directory: Path):
        (directory / "transformer_config.json").unlink()
        (directory / "dist_ckpt" / "common.pt").chmod(0o000)
        notes = as_ordinary_user(lambda: open_checkpoint(directory).notes)
        assert_says(notes[0], "permission denied", "common.pt", "was not compared with config.json")
