"""DeepSpeed checkpoints that are not as they should be: each refused in words, with all that is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge import (
    AmbiguousCheckpointError,
    CheckpointError,
    CorruptFileError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NotACheckpointError,
    OptionError,
    PlanError,
    UnsafePickleError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.deepspeed import DeepSpeedLoader
from tests.support.deepspeed import Run, deepspeed_classes, run_of, tensors_of, write_deepspeed, write_universal
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state
from tests.support.pickles import Call, Global, write_archive
from tests.support.results import bits, bits_of, saved_bits

MASTERS = tensors_of([(5, 3), (7,), (2, 3, 2)])


def optimizer_file(folder: Path, rank: int) -> Path:
    return folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_file(folder: Path, rank: int | None = None) -> Path:
    return folder / f"{'' if rank is None else f'zero_pp_rank_{rank}_'}mp_rank_00_model_states.pt"


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Saves a file again after `change` has changed its content; of an optimizer's file that of the optimizer."""
    with deepspeed_classes():
        content = torch.load(path, weights_only=False)
        change(content.get("optimizer_state_dict", content))
        torch.save(content, path)


class TestRanks:
    @pytest.mark.parametrize("stage", [1, 2, 3])
    def test_every_missing_rank_is_named(self, tmp_path: Path, stage: int):
        folder = write_deepspeed(tmp_path, Run(MASTERS, stage, 4))
        optimizer_file(folder, 1).unlink()
        optimizer_file(folder, 3).unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 ranks of 4 are missing", optimizer_file(folder, 1).name, optimizer_file(folder, 3).name)
        assert optimizer_file(folder, 2).name not in message

    def test_missing_model_states_of_a_rank(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 3))
        model_file(folder, 2).unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "1 rank of 3 is missing", model_file(folder, 2).name, "fix:", "copy")

    def test_no_optimizer_files_at_all(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 1))
        optimizer_file(folder, 0).unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "no optimizer files", "fp32 masters", "--weights model")
        assert open_checkpoint(tmp_path, weights="model")["model.layers.1.weight"].dtype.name == "bfloat16"

    def test_no_model_states(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        model_file(folder).unlink()
        assert_says(
            refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), "model states", model_file(folder).name
        )

    def test_a_rank_of_a_larger_run_is_left(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 2))
        shutil.copy(optimizer_file(folder, 1), optimizer_file(folder, 2))
        assert_says(refusal(InconsistentCheckpointError, open_checkpoint, tmp_path), "beyond the 2", "rank_2")

    def test_files_of_runs_with_other_numbers_of_ranks(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path / "a", Run(MASTERS, 2, 2))
        other = write_deepspeed(tmp_path / "b", Run(MASTERS, 2, 3))
        shutil.copy(optimizer_file(other, 1), optimizer_file(folder, 1))
        assert_says(refusal(InconsistentCheckpointError, open_checkpoint, tmp_path / "a"), "2 and 3 ranks", "rank_1")

    def test_two_files_of_one_rank(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        shutil.copy(optimizer_file(folder, 0), folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        assert_says(refusal(InconsistentCheckpointError, open_checkpoint, tmp_path), "two optimizer files", "rank_0")

    def test_two_stages_under_one_tag(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path / "a", Run(MASTERS, 3))
        other = write_deepspeed(tmp_path / "b", Run(MASTERS, 2))
        shutil.copy(model_file(other), model_file(folder))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path / "a")
        assert_says(message, "stage 3 and of another stage", model_file(folder).name)

    def test_model_states_of_two_steps(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 3))
        rewrite(model_file(folder, 1), lambda state: state.update(global_steps=9))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "several steps: 3 in", f"9 in {model_file(folder, 1).name}", "fix:")

    def test_model_states_of_another_model(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 3))
        rewrite(model_file(folder, 2), lambda state: state["param_shapes"][0].update({"model.layers.0.weight": [3, 5]}))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, model_file(folder, 2).name, "other parameters or shapes", "fix:")


class TestLengths:
    @pytest.mark.parametrize("by", [-1, 1, 5])
    def test_a_group_that_is_not_used_up_exactly(self, tmp_path: Path, by: int):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 2))

        def change(state: dict[str, Any]) -> None:
            (vector,) = state["single_partition_of_fp32_groups"]
            state["single_partition_of_fp32_groups"] = [torch.zeros(vector.numel() + by)]

        rewrite(optimizer_file(folder, 1), change)
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, f"group 0 has {34 + by}", "3 parameters", "have 34", optimizer_file(folder, 0).name)

    @pytest.mark.parametrize("by", [-1, 1])
    def test_every_rank_whose_parts_are_not_used_up(self, tmp_path: Path, by: int):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 3))

        def change(state: dict[str, Any]) -> None:
            state["fp32_flat_groups"] = [torch.zeros(state["fp32_flat_groups"][0].numel() + by)]

        rewrite(optimizer_file(folder, 0), change)
        rewrite(optimizer_file(folder, 2), change)
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, f"rank 0 has {12 + by}", f"rank 2 has {12 + by}", optimizer_file(folder, 2).name)
        assert "rank 1 has" not in message

    def test_masters_that_were_offloaded_and_not_saved(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 2))
        rewrite(optimizer_file(folder, 1), lambda state: state.update(fp32_flat_groups=[torch.zeros(0)]))
        assert_says(refusal(InconsistentCheckpointError, open_checkpoint, tmp_path), "rank 1 has 0", "offloaded")

    def test_another_number_of_groups(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 2))
        rewrite(model_file(folder), lambda state: state["param_shapes"].append({}))
        assert_says(refusal(InconsistentCheckpointError, open_checkpoint, tmp_path), "1 groups, param_shapes 2")

    def test_another_number_of_alignment_paddings(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 1, alignment=8))
        rewrite(optimizer_file(folder, 0), lambda state: state.update(param_alignment_paddings=[[0, 1]]))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "3 parameters and 2 alignment paddings")

    def test_a_rank_without_its_part_of_a_frozen_parameter(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 2, frozen={"head": torch.ones(3, 2).half()}))
        rewrite(model_file(folder, 1), lambda state: state["frozen_param_fragments"].update(head=torch.ones(2)))
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "1 rank has no part of 3 elements", "head", "[3, 2]", model_file(folder, 1).name)

    def test_older_versions_leave_padding_on_all_but_the_last_rank(self, tmp_path: Path):
        masters = {"w": torch.tensor([1.5])}  # one element on four ranks, two each
        folder = write_deepspeed(tmp_path, Run(masters, 2, 4))
        for rank in range(4):
            values = torch.tensor([[1.5, 0.0], [0.0, 0.0], [0.0, 0.0], []][rank][:2])
            padding = [7 if rank == 3 else 0]
            rewrite(
                optimizer_file(folder, rank),
                lambda state, v=values, p=padding: state.update(single_partition_of_fp32_groups=[v], group_paddings=p),
            )
        assert bits_of(open_checkpoint(tmp_path)["w"].expr) == bits(masters["w"])


class TestTags:
    def test_a_tag_that_is_not_there_and_those_that_are(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS), "global_step9")
        write_deepspeed(tmp_path, Run(MASTERS), "global_step10")
        (tmp_path / "latest").write_text("global_step11")
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "global_step11", "not there", "global_step9, global_step10", "pass the directory")
        assert str(tmp_path / "global_step10") in message

    def test_a_latest_beside_nothing(self, tmp_path: Path):
        (tmp_path / "latest").write_text("global_step3")
        (tmp_path / "global_step3").mkdir()
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "global_step3", "holds no checkpoint", "no other tag")

    def test_several_tags_without_latest(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS), "a", latest=False)
        write_deepspeed(tmp_path, Run(MASTERS), "b", latest=False)
        message = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 tags", "a, b", "latest", str(tmp_path / "b"))

    @pytest.mark.parametrize("text", ["../elsewhere", "/etc", "\x00", "", "\udcff", "x" * 300])
    def test_a_latest_that_names_no_tag_is_not_followed(self, tmp_path: Path, text: str):
        write_deepspeed(tmp_path / "elsewhere", Run(MASTERS), "tag", latest=False)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "latest").write_bytes(text.encode(errors="surrogateescape"))
        assert DeepSpeedLoader().evidence(tmp_path / "run") == ()
        refusal(NotACheckpointError, open_checkpoint, tmp_path / "run")

    def test_the_loader_itself_says_that_nothing_is_there(self, tmp_path: Path):
        message = refusal(NotACheckpointError, DeepSpeedLoader().open, tmp_path, OpenOptions())
        assert_says(message, "no files of DeepSpeed's", "latest")

    def test_a_directory_above_names_the_one_that_is_meant(self, tmp_path: Path):
        write_deepspeed(tmp_path / "out" / "checkpoint-3", Run(MASTERS))
        message = refusal(NotACheckpointError, open_checkpoint, tmp_path / "out")
        assert_says(message, str(tmp_path / "out" / "checkpoint-3"))


class TestFiles:
    def test_a_file_that_is_cut_short(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        path = optimizer_file(folder, 1)
        path.write_bytes(path.read_bytes()[:-100])
        assert_says(refusal(CorruptFileError, open_checkpoint, tmp_path), path.name, "cut short")

    def test_a_pickle_that_would_run_something(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        marker = tmp_path / "it ran"
        write_archive(optimizer_file(folder, 1), {"x": Call(Global("os", "system"), f"touch '{marker}'")})
        assert_says(refusal(UnsafePickleError, open_checkpoint, tmp_path), ".system", optimizer_file(folder, 1).name)
        assert not marker.exists()

    @pytest.mark.parametrize(
        "content",
        [
            [], {}, {"module": 3}, {"module": {}, "param_shapes": 3}, {"module": {}, "param_shapes": [{"w": -1}]},
            {"module": {}, "param_shapes": [{"w": (-1,)}]}, {"module": {}, "buffer_names": 3},
            {"module": {}, "shared_params": []}, {"module": {}, "frozen_param_fragments": {}},
            {"module": {}, "frozen_param_shapes": {}, "frozen_param_fragments": {"w": 3}},
        ],
    )  # fmt: skip
    def test_model_states_of_another_form(self, tmp_path: Path, content: Any):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        torch.save(content, model_file(folder))
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, model_file(folder).name, "fix:")

    @pytest.mark.parametrize(
        "content",
        [
            {}, {"optimizer_state_dict": None}, {"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(2, 2)]}},
            {"optimizer_state_dict": {"fp32_flat_groups": [3]}},
            {"optimizer_state_dict": {"fp32_flat_groups": [], "partition_count": "two"}},
        ],
    )  # fmt: skip
    def test_optimizer_states_of_another_form(self, tmp_path: Path, content: Mapping[str, Any]):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 1))
        torch.save(content, optimizer_file(folder, 0))
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, optimizer_file(folder, 0).name, "not as DeepSpeed writes it")

    def test_a_universal_file_of_another_size(self, tmp_path: Path):
        folder = write_universal(tmp_path, Run(MASTERS, 3))
        for name in ("model.layers.0.weight", "model.layers.1.weight"):
            torch.save(torch.zeros(4), folder / "zero" / name / "fp32.pt")
        message = refusal(InconsistentCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 problems", "4 elements", "[5, 3]", "[7]", "model.layers.1.weight")

    def test_a_universal_file_without_a_parameter(self, tmp_path: Path):
        folder = write_universal(tmp_path, Run(MASTERS, 1))
        torch.save({"param": 3}, folder / "zero" / "model.layers.0.weight" / "fp32.pt")
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "holds a int", "model.layers.0.weight")

    @pytest.mark.parametrize("stage", [1, 3])
    def test_every_universal_file_that_is_missing(self, tmp_path: Path, stage: int):
        folder = write_universal(tmp_path, Run(MASTERS, stage))
        for name in ("model.layers.0.weight", "model.layers.2.weight"):
            shutil.rmtree(folder / "zero" / name)
        message = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 problems", "model.layers.0.weight/fp32.pt", "model.layers.2.weight/fp32.pt")


class TestMastersOfAnotherSave:
    """Files of two runs, or steps, whose shapes are the same: only the values tell."""

    @pytest.fixture
    def config(self, tiny_model_dir) -> Path:
        return tiny_model_dir("qwen2")

    @pytest.mark.parametrize("stage", [1, 2])
    def test_an_optimizer_file_is_held_to_the_model_states(self, tmp_path: Path, stage: int, config: Path):
        model = memory_state("qwen2")
        folder = write_deepspeed(tmp_path / "a", run_of(model, stage=stage, world=3))
        other = write_deepspeed(
            tmp_path / "b", run_of({name: t + 0.5 for name, t in model.items()}, stage=stage, world=3)
        )
        shutil.copy(optimizer_file(other, 1), optimizer_file(folder, 1))
        target, options = tmp_path / "out", {"hf_model_config_path": config}
        message = refusal(PlanError, nbmerge.merge, tmp_path / "a", target, **options)
        assert_says(message, "does not round to the model's bfloat16 weight", str(optimizer_file(folder, 1)),
                    "two saves", "--weights model", "--allow_drift")  # fmt: skip
        assert optimizer_file(folder, 0).name not in message and optimizer_file(folder, 2).name not in message
        nbmerge.merge(tmp_path / "a", tmp_path / "halves", weights="model", **options)
        nbmerge.merge(tmp_path / "a", target, allow_drift=True, **options)
        merged = saved_bits(target)
        assert any(merged[name] != bits(tensor) for name, tensor in model.items() if name in merged)

    def test_a_universal_file_is_held_to_the_parameter_that_it_is_named_after(self, tmp_path: Path, config: Path):
        model = memory_state("qwen2")
        folder = write_universal(tmp_path / "run", run_of(model, stage=1))
        first, second = (folder / "zero" / f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
        shutil.move(first / "fp32.pt", tmp_path / "kept.pt")
        shutil.move(second / "fp32.pt", first / "fp32.pt")
        shutil.move(tmp_path / "kept.pt", second / "fp32.pt")
        message = refusal(PlanError, nbmerge.merge, tmp_path / "run", tmp_path / "out", hf_model_config_path=config)
        assert_says(
            message, "2 problems", "model.layers.0.mlp.up_proj.weight: the master", "universal form", "first at [0, 0]"
        )


class TestForms:
    def test_experts_are_refused_with_their_files(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        torch.save({}, folder / "layer_0_expert_3_mp_rank_00_model_states.pt")
        torch.save({}, folder / "expp_rank_0_mp_rank_00_optim_states.pt")
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 files of expert ranks", "layer_0_expert_3_mp_rank_00", "expp_rank_0", "fix:")

    def test_tensor_parallel_ranks_are_refused(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 2))
        shutil.copy(model_file(folder), folder / "mp_rank_01_model_states.pt")
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 tensor-parallel ranks", "mp_rank_01_model_states.pt", "ds_to_universal")

    def test_so_they_are_at_stage_3(self, tmp_path: Path):
        folder = write_deepspeed(tmp_path, Run(MASTERS, 3))
        shutil.copy(model_file(folder, 0), folder / "zero_pp_rank_0_mp_rank_01_model_states.pt")
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "2 tensor-parallel ranks", "zero_pp_rank_0_mp_rank_01_model_states.pt")

    def test_one_of_several_tensor_parallel_ranks_is_refused_too(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS, 2, model_parallel=4))
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "4 tensor-parallel ranks")

    def test_stage_3_has_no_16_bit_weights(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS, 3))
        message = refusal(OptionError, open_checkpoint, tmp_path, weights="model")
        assert_says(message, "stage 3", "16-bit", "--dtype bfloat16")

    def test_stage_0_has_no_masters_by_name(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS, 0))
        assert_says(refusal(OptionError, open_checkpoint, tmp_path, weights="master"), "stage 0", "leave it out")


class TestPipeline:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        case = Path(__file__).parents[1] / "data" / "deepspeed_pipeline_z1_w4_bf16"
        return Path(shutil.copytree(case / "ckpt", tmp_path / "run"))

    def test_the_layers_need_names(self, run: Path):
        (run / "layer_names.json").unlink()
        message = refusal(UnsupportedCheckpointError, open_checkpoint, run)
        assert_says(message, "5 layers of a PipelineModule", "layer_04 (has weight)", "layer_names.json", "fix:")

    def test_every_layer_without_a_name_is_told(self, run: Path):
        names = json.loads((run / "layer_names.json").read_text())
        del names["layer_01"], names["layer_03"]
        (run / "layer_names.json").write_text(json.dumps(names))
        message = refusal(UnsupportedCheckpointError, open_checkpoint, run)
        assert_says(message, "2 layers", "layer_01 (has self_attn.q_proj.weight", "layer_03")

    @pytest.mark.parametrize("text", ["[]", "{", '{"layer_00": 3}'])
    def test_a_file_of_names_of_another_form(self, run: Path, text: str):
        (run / "layer_names.json").write_text(text)
        assert_says(refusal(CheckpointError, open_checkpoint, run), "layer_names.json", "fix:")

    def test_the_names_may_lie_beside_the_layers(self, run: Path):
        (run / "layer_names.json").rename(run / "global_step3" / "layer_names.json")
        assert "lm_head.weight" in open_checkpoint(run)

    def test_a_layer_without_a_part_of_the_model_keeps_its_own_names(self, run: Path):
        names = {**json.loads((run / "layer_names.json").read_text()), "layer_04": ""}
        (run / "layer_names.json").write_text(json.dumps(names))
        assert "weight" in open_checkpoint(run)

    @pytest.mark.parametrize(
        "name",
        [
            "layer_02-model_states.pt",
            "mp_rank_01_model_states.pt",
            "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt",
        ],
    )
    def test_a_missing_file(self, run: Path, name: str):
        (run / "global_step3" / name).unlink()
        assert_says(refusal(IncompleteCheckpointError, open_checkpoint, run), name, "fix:")

    def test_a_stage_without_optimizer_files(self, run: Path):
        for path in (run / "global_step3").glob("*mp_rank_01_optim_states.pt"):
            path.unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, run)
        assert_says(message, "mp_rank_01_optim_states.pt")
        assert open_checkpoint(run, weights="model")["lm_head.weight"].dtype.name == "bfloat16"

    def test_layers_of_several_tensor_parallel_ranks_are_refused(self, run: Path):
        for rank in (0, 1):
            shutil.copy(run / "global_step3" / "layer_00-model_states.pt",
                        run / "global_step3" / f"layer_00-model_0{rank}-model_states.pt")  # fmt: skip
        assert_says(refusal(UnsupportedCheckpointError, open_checkpoint, run), "2 tensor-parallel ranks")

    def test_a_parameter_outside_of_the_layers_keeps_its_name(self, run: Path):
        def change(state: dict[str, Any]) -> None:
            (group,) = state["param_shapes"]
            state["param_shapes"] = [
                {("scale" if name == "0.weight" else name): shape for name, shape in group.items()}
            ]

        rewrite(run / "global_step3" / "mp_rank_00_model_states.pt", change)
        assert open_checkpoint(run)["scale"].shape == (37, 12)

    def test_both_weights_agree_to_16_bits(self, run: Path):
        masters, model = open_checkpoint(run), open_checkpoint(run, weights="model")
        assert sorted(masters) == sorted(model)
        from nbmerge.dtypes import BY_NAME
        from nbmerge.expressions import cast

        for name, tensor in model.tensors.items():
            assert bits_of(cast(masters[name].expr, BY_NAME["bfloat16"])) == bits_of(tensor.expr), name
