"""The functions that wrap the rooms, by path, object, magic and command line, on small real checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from nbmerge import NotACheckpointError, OptionError, cli
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, save_tiny_model, write_config, write_model_world
from tests.support.worlds import write_ranks


def changed(by: float) -> dict[str, torch.Tensor]:
    """The tiny Qwen2 after training that moved one element of one matrix."""
    state = memory_state("qwen2", "bfloat16")
    state["model.layers.0.mlp.up_proj.weight"][2, 3] += by
    return state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps, unmerged, beside the model that it started from."""
    save_tiny_model("qwen2", tmp_path / "base model", "bfloat16")
    for step, by in ((20, 2.0), (100, 3.0), (3, 1.0)):
        path = tmp_path / "run" / f"global_step_{step}" / "actor"
        write_model_world(path, "qwen2", dtype="bfloat16", state=changed(by))
    return tmp_path / "run"


class TestDiff:
    def test_takes_directories_checkpoints_plans_and_reports(self, run: Path, tmp_path: Path):
        ckpt = run / "global_step_3" / "actor"
        report = nbmerge.merge(ckpt, tmp_path / "merged")
        sources = (ckpt, nbmerge.open_checkpoint(ckpt), nbmerge.plan_merge(ckpt), report, tmp_path / "merged")
        for source in sources:
            found = nbmerge.diff(tmp_path / "base model", source, progress=False)
            (tensor,) = found.changed
            assert tensor.name == "model.layers.0.mlp.up_proj.weight"
            assert (tensor.changed, tensor.largest_at) == (1, (2, 3))
        assert nbmerge.diff(ckpt, report).is_empty

    def test_what_was_declared_frozen_is_an_alarm(self, run: Path, tmp_path: Path):
        both = tmp_path / "base model", run / "global_step_3" / "actor"
        assert nbmerge.diff(*both, frozen="*.embed_tokens.*").frozen_moved == ()
        moved = nbmerge.diff(*both, frozen=["*.mlp.*"]).frozen_moved
        assert [tensor.name for tensor in moved] == ["model.layers.0.mlp.up_proj.weight"]

    def test_options_and_paths_that_mean_nothing(self, run: Path, tmp_path: Path):
        both = tmp_path / "base model", run / "global_step_3" / "actor"
        assert_says(refusal(OptionError, nbmerge.diff, *both, sample=2), "sample=2", "fix:")
        assert_says(refusal(NotACheckpointError, nbmerge.diff, both[0], tmp_path / "absent"), "no such directory")
        assert_says(refusal(OptionError, nbmerge.diff, both[0], 7), "a int is no model", "fix:")


class TestTrajectory:
    def test_follows_a_run_in_the_order_of_its_steps(self, run: Path):
        found = nbmerge.trajectory(run, progress=False)
        assert [step.diff.b for step in found.steps] == [str(run / f"global_step_{n}" / "actor") for n in (20, 100)]
        assert found.steps[1].cosine == pytest.approx(1.0)

    def test_takes_a_list(self, run: Path, tmp_path: Path):
        found = nbmerge.trajectory([tmp_path / "base model", run / "global_step_100" / "actor"])
        assert len(found.steps) == 1
        assert_says(refusal(NotACheckpointError, nbmerge.trajectory, tmp_path), "0 checkpoints named global_step_N")


class TestExplain:
    def test_two_shapes_a_checkpoint_and_an_error(self, run: Path, tmp_path: Path):
        assert_says(str(nbmerge.explain(got=3600, expected=3584, ranks=24)), "3600 = 24 · ⌈3584/24⌉")
        ckpt = run / "global_step_3" / "actor"
        config = write_config(tmp_path / "config", "qwen2", intermediate_size=48)
        found = nbmerge.explain(ckpt, hf_model_config_path=config)
        assert found.mismatches
        with pytest.raises(nbmerge.PlanError) as error:
            nbmerge.merge(ckpt, tmp_path / "out", hf_model_config_path=config)
        assert nbmerge.explain(error.value).mismatches

    def test_where_an_element_is(self, run: Path):
        at = nbmerge.where(run / "global_step_3" / "actor", "model.layers.0.mlp.up_proj.weight", (20, 3))
        assert at.file is not None and at.rank == 1
        stored = torch.frombuffer(bytearray(at.file.read_bytes()[at.offset : at.offset + 2]), dtype=torch.bfloat16)
        assert stored[0] == memory_state("qwen2", "bfloat16")["model.layers.0.mlp.up_proj.weight"][20, 3]


@pytest.mark.usefixtures("run")
class TestMagics:
    def test_diff(self, shell: InteractiveShell):
        shell.user_ns["ckpt"] = nbmerge.open_checkpoint("run/global_step_3/actor")
        found = shell.run_cell("%diff_ckpt 'base model' $ckpt --frozen '*.mlp.*' '*.self_attn.*'  # what moved?").result
        assert len(found.frozen_moved) == 1

    def test_explain(self, shell: InteractiveShell):
        found = shell.run_cell("%explain_shapes --got 62,18 --expected 65,18").result
        assert found.mismatches
        found = shell.run_cell("%explain_shapes run/global_step_3/actor model.norm.weight").result
        assert found is not None and not found.mismatches
        shell.user_ns["error"] = RuntimeError(
            "size mismatch for lm_head.weight: copying a param with shape torch.Size([3600, 8]) from checkpoint, "
            "the shape in current model is torch.Size([3584, 8])."
        )
        assert shell.run_cell("%explain_shapes $error --ranks 24").result.mismatches

    def test_errors_are_short(self, shell: InteractiveShell):
        result = shell.run_cell("%diff_ckpt 'base model' absent")
        assert isinstance(result.error_in_exec, NotACheckpointError)
        assert len(result.error_in_exec._render_traceback_()) <= 12
        assert isinstance(shell.run_cell("%explain_shapes").error_in_exec, OptionError)


class TestCommandLine:
    def test_diff_exits_with_1_where_something_frozen_moved(self, run: Path, tmp_path: Path, capsys):
        words = ["diff", str(tmp_path / "base model"), str(run / "global_step_3" / "actor")]
        assert cli.main(words) == 0
        assert_says(capsys.readouterr().out, "model.layers.0.mlp.up_proj.weight")
        assert cli.main([*words, "--frozen", "*.mlp.*"]) == 1


def test_options_of_opening_are_in_the_receipt_and_are_taken_again(tmp_path: Path):
    import json

    state = memory_state("qwen2", "bfloat16")
    write_ranks(tmp_path / "ckpt", [dict(state), dict(state)])
    write_config(tmp_path / "ckpt" / "huggingface", "qwen2")
    how = {"mesh_shape": (2,), "mesh_dim_names": ("dp",), "placements": {"*": ["Replicate"]}}
    opened = nbmerge.open_checkpoint(tmp_path / "ckpt", **how)
    report = nbmerge.merge(opened, tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "nbmerge_receipt.json").read_text())["options"]
    assert recorded == {"mesh_shape": "2", "mesh_dim_names": "dp", "placements": {"*": ["Replicate"]}}
    assert nbmerge.validate(tmp_path / "out", checkpoint=tmp_path / "ckpt", no_run=True, progress=False).ok
    assert report.plan.checkpoint.overrides == nbmerge.open_checkpoint(tmp_path / "ckpt", **recorded).overrides
