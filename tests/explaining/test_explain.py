"""`explain` on checkpoints, plans, directories, errors and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge.errors import ConfigError, NotACheckpointError, OptionError, PlanError
from nbmerge.explainer import explain, parse_dims
from nbmerge.explaining.candidates import Strength
from nbmerge.explaining.explanation import Explanation
from tests.support.megatron_models import megatron_state, write_megatron
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_config, write_model_world
from tests.support.processes import python


def config(directory: Path, family: str, **changes) -> Path:
    return write_config(directory / "config", family, **changes)


class TestACheckpointUnderABrokenConfig:
    """Every one is explained by what was changed, in `explain` and in the plan's own error."""

    @pytest.mark.parametrize(
        ("changes", "pattern", "words"),
        [
            ({"intermediate_size": 48}, "a size of the config", "intermediate_size is 24 in the checkpoint"),
            ({"vocab_size": 41}, "vocabulary resized", "37 = 41 - 4"),
            ({"vocab_size": 64}, "vocabulary padded", "64 = 64 · ⌈37/64⌉"),
            ({"num_key_value_heads": 1}, "other key-value heads", "2 key-value heads of 4, config.json says 1"),
            ({"num_key_value_heads": 4}, "other key-value heads", "2 key-value heads of 4, config.json says 4"),
        ],
    )  # fmt: skip
    def test_is_explained(self, tmp_path: Path, changes, pattern: str, words: str):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        where = config(tmp_path, "llama", **changes)
        explanation = explain(tmp_path / "ckpt", hf_model_config_path=where)
        assert explanation.best.pattern == pattern
        assert_says(explanation.sentence, words)
        plan = nbmerge.plan_merge(tmp_path / "ckpt", hf_model_config_path=where)
        assert_says(refusal(PlanError, plan.raise_if_problems), words, "fix:")
        assert explain(plan).subjects == explanation.subjects

    @pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
    def test_of_megatron_is_explained_as_well(self, tmp_path: Path, family: str):
        write_megatron(tmp_path / "ckpt", megatron_state(family), family, hidden_size=32)
        explanation = explain(tmp_path / "ckpt")
        assert_says(explanation.sentence, "config.json is of another size", "hidden_size 16", "hidden_size 32")
        assert all(subject.kind == "mismatch" for subject in explanation.subjects)

    def test_of_other_key_value_heads_of_megatron(self, tmp_path: Path):
        write_megatron(tmp_path / "ckpt", megatron_state("llama"), "llama", num_key_value_heads=1)
        explanation = explain(tmp_path / "ckpt")
        assert explanation.best.evidence[0] == "32 = (4 + 2 · 2) · 4"
        assert_says(refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out"),
                    "not of one model: 32 = (4 + 2 · 2) · 4: the checkpoint has 2 key-value heads of 4")  # fmt: skip

    def test_of_another_family_is_told_first_and_once(self, tmp_path: Path):
        write_megatron(tmp_path / "ckpt", megatron_state("qwen3_moe"), "llama")
        message = refusal(PlanError, nbmerge.merge, tmp_path / "ckpt", tmp_path / "out")
        first = message.splitlines()[1]
        assert_says(first, "another family", "query and key norms and routed experts", "those of Qwen3-MoE")
        assert message.count("another family") == 1
        explanation = explain(tmp_path / "ckpt")
        assert_says(explanation.diagnosis, "Qwen3-MoE")
        assert explanation.best.pattern in ("a size of the config", "another family")

    def test_tensors_of_all_layers_are_told_once(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        where = config(tmp_path, "llama", intermediate_size=48)
        plan = nbmerge.plan_merge(tmp_path / "ckpt", hf_model_config_path=where)
        assert len(plan.problems) == 3
        assert all("… and 1 more like it" in problem.what for problem in plan.problems)
        assert len(plan.mismatches) == 6
        assert [len(subject.names) for subject in explain(plan).subjects] == [2, 2, 2]

    def test_placements_that_are_recorded_speak_against_shards(self, tmp_path: Path):
        """24 of 48 rows on 2 ranks look like one of two shards; the DTensors say that they are all rows."""
        write_model_world(tmp_path / "ckpt", "llama", 2)
        (subject, *_) = explain(
            tmp_path / "ckpt", hf_model_config_path=config(tmp_path, "llama", intermediate_size=48)
        ).subjects
        shard = next(each for each in subject.candidates if each.pattern == "one shard")
        assert shard.strength is Strength.WEAK
        assert not subject.is_ambiguous


class TestOneTensor:
    def test_that_fits_is_said_to_and_how_it_is_sharded(self, tmp_path: Path):
        write_model_world(tmp_path, "llama", 2)
        explanation = explain(tmp_path, "model.embed_tokens.weight")
        assert explanation.sentence == (
            "fits: model.embed_tokens.weight has shape [37, 16], Shard(0)×2 in 2 stored pieces of [19, 16], [18, 16]"
        )
        assert explanation.best is None

    def test_by_its_published_name_is_said_where_it_comes_from(self, tmp_path: Path):
        write_megatron(tmp_path, megatron_state("llama"), "llama")
        explanation = explain(tmp_path, "model.layers.1.self_attn.k_proj.weight")
        assert_says(explanation.sentence, "fits", "[8, 16]", "decoder.layers.1.self_attention.linear_qkv.weight")

    def test_needs_no_config_to_be_found(self, tmp_path: Path):
        write_model_world(tmp_path, "llama", 2)
        (tmp_path / "huggingface" / "config.json").unlink()
        assert_says(explain(tmp_path, "model.norm.weight").sentence, "fits", "Shard(0)×2")
        refusal(ConfigError, explain, tmp_path)

    def test_that_does_not_fit_is_explained_alone(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        where = config(tmp_path, "llama", vocab_size=41)
        explanation = explain(tmp_path / "ckpt", "lm_head.weight", hf_model_config_path=where)
        assert [subject.name for subject in explanation.subjects] == ["lm_head.weight"]

    def test_of_an_error(self):
        said = "".join(
            f"size mismatch for {name}: copying a param with shape torch.Size([8]) from checkpoint, "
            "the shape in current model is torch.Size([4])."
            for name in ("a.0.bias", "a.1.bias")
        )
        assert explain(RuntimeError(said), "a.1.bias").subjects[0].names == ("a.1.bias",)
        assert_says(refusal(OptionError, explain, RuntimeError(said), "a.2.bias"), "a.1.bias")

    def test_that_is_unknown_is_told_with_the_near_ones(self, tmp_path: Path):
        write_model_world(tmp_path, "llama", 2)
        assert_says(refusal(OptionError, explain, tmp_path, "model.nrm.weight"), "model.norm.weight")


class TestErrors:
    def test_of_a_plan_are_explained(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        where = config(tmp_path, "llama", vocab_size=41)
        with pytest.raises(PlanError) as caught:
            nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", hf_model_config_path=where)
        explanation = explain(caught.value)
        assert explanation.best.pattern == "vocabulary resized"
        assert [subject.name for subject in explanation.subjects] == ["model.embed_tokens.weight", "lm_head.weight"]

    def test_about_no_shape_keep_their_problems(self, tmp_path: Path):
        with pytest.raises(NotACheckpointError) as caught:
            nbmerge.open_checkpoint(tmp_path / "none")
        explanation = explain(caught.value)
        assert explanation.subjects == ()
        assert_says(explanation.sentence, "no shape or name is wrong", "no such directory")

    def test_a_path_that_is_not_there_is_no_message(self, tmp_path: Path):
        refusal(NotACheckpointError, explain, str(tmp_path / "none"))

    def test_one_rank_of_eight_is_no_other_model(self):
        """All rows are an eighth; the sizes differ too, and the number of ranks explains all of them."""
        state = {name: tensor[: max(tensor.shape[0] // 2, 1)] for name, tensor in memory_state("llama").items()
                 if tensor.dim() and tensor.shape[0] % 2 == 0}  # fmt: skip
        from tests.support.models import tiny_model

        with pytest.raises(RuntimeError) as caught:
            tiny_model("llama").load_state_dict(state, strict=False)
        explanation = explain(caught.value)
        assert explanation.diagnosis == ""
        assert explanation.best.pattern == "one shard"
        assert explanation.best.counts == (2,)

    def test_another_size_is_told_from_a_loading_error(self):
        from tests.support.models import tiny_model

        state = {name: torch.zeros(tuple(30 if size == 24 else 20 if size == 16 else size for size in tensor.shape))
                 for name, tensor in memory_state("llama").items()}  # fmt: skip
        with pytest.raises(RuntimeError) as caught:
            tiny_model("llama").load_state_dict(state)
        assert_says(explain(caught.value).diagnosis, "another size", "hidden_size 20", "hidden_size 16")


class TestShapes:
    @pytest.mark.parametrize(
        ("text", "dims"),
        [(3600, (3600,)), ("3600", (3600,)), ("62,18", (62, 18)), ("62x18", (62, 18)), ("[62, 18]", (62, 18)),
         ([62], (62,)),
         ("torch.Size([62, 18])", (62, 18)), ("(62,)", (62,)), ("[]", ()), ((), ()), (torch.Size([3, 4]), (3, 4))],
    )  # fmt: skip
    def test_are_read(self, text, dims):
        assert parse_dims(text) == dims

    @pytest.mark.parametrize("text", ["a", "3,b", (1, "x"), (None,), -1, (3, -2), 1.5])
    def test_that_are_none_are_told(self, text):
        assert_says(refusal(OptionError, parse_dims, text), "no shape")

    def test_that_are_equal_fit(self):
        assert_says(explain(got=4, expected=4).sentence, "fits")

    def test_with_a_config_use_its_sizes(self, tmp_path: Path):
        where = config(tmp_path, "llama")
        explanation = explain(got="16,16", expected="8,16", name="layers.0.self_attn.k_proj.weight", config=where)
        assert explanation.best.pattern == "query and key-value sizes exchanged"

    @pytest.mark.parametrize(
        "asked",
        [{"got": 3}, {"expected": 3}, {}, {"subject": "x", "got": 1, "expected": 2},
         {"got": 1, "expected": 2, "ranks": 0},
         {"subject": 3}],
    )  # fmt: skip
    def test_or_other_questions_without_an_answer_are_told(self, asked):
        assert_says(refusal(OptionError, explain, **asked), "fix:")


class TestDirectories:
    def test_of_hugging_face_files_that_fit(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        report = nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        assert explain(tmp_path / "out").mismatches == ()
        assert explain(report).mismatches == ()
        assert_says(explain(tmp_path / "out", "model.norm.weight").sentence, "fits")

    def test_without_a_config(self, tmp_path: Path):
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
        refusal(ConfigError, explain, tmp_path)


@pytest.mark.parametrize("module", ["table", "diagnosis", "messages", "subjects", "explanation"])
def test_patterns_import_no_torch_and_no_display(module: str):
    done = python(
        f"import nbmerge.explaining.{module}, sys\n"
        "print([m for m in ('torch', 'transformers', 'nbmerge.display', 'IPython') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_an_explanation_of_nothing_says_so():
    assert_says(Explanation("x", checked=3).sentence, "every tensor fits", "3 tensors")
