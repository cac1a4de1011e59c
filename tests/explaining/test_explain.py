"""`explain` on checkpoints, plans, directories, errors and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbmerge
from nbmerge.display.views import view_of
from nbmerge.errors import ConfigError, NotACheckpointError, OptionError, PlanError, Problem, VerificationError
from nbmerge.explainer import explain, parse_dims
from nbmerge.explaining.candidates import Strength
from nbmerge.explaining.explanation import Explanation
from tests.support.megatron_models import megatron_state, write_megatron
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_config, write_model_world
from tests.support.processes import python


def config(directory: Path, family: str, **changes) -> Path:
    return write_config(directory / "config", family, **changes)


class TestNamesOfAWrapper:
    """What torch says of names with the prefix of `torch.compile`: each tensor is told once, under both names."""

    @pytest.fixture(scope="class")
    def model(self):
        from tests.support.models import tiny_model

        return tiny_model("llama")

    def refused(self, model, *lost: str) -> RuntimeError:
        state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items() if name not in lost}
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        return caught.value

    def test_are_told_once(self, model):
        explanation = explain(self.refused(model))
        assert {subject.kind for subject in explanation.subjects} == {"renamed"}
        pairs = [pair for subject in explanation.subjects for pair in zip(subject.names, subject.held_as, strict=True)]
        assert sorted(pairs) == sorted((name, f"_orig_mod.{name}") for name in model.state_dict())
        assert not explanation.fits
        assert_says(explanation.sentence, "is missing under this name", "prefix: _orig_mod.", "other tensors below")

    @pytest.mark.parametrize("prefix", ["", "_orig_mod."])
    def test_of_one_tensor_are_its_own(self, model, prefix: str):
        name = f"{prefix}model.layers.1.self_attn.q_proj.weight"
        (subject,) = explain(self.refused(model), name).subjects
        plain = name.removeprefix("_orig_mod.")
        assert (subject.kind, subject.name, subject.names) == ("renamed", plain, (plain,))
        assert subject.held_as == (f"_orig_mod.{plain}",)
        assert subject.best.evidence[0] == f"_orig_mod.{plain} → {plain}"

    @pytest.mark.parametrize("asked", [None, "model.layers.1.mlp.up_proj.weight"])
    def test_are_told_once_in_whatever_order_they_come(self, model, asked: str | None):
        error = self.refused(model)
        head, *parts = str(error).split("\n\t")
        turned = [", ".join(reversed(part.partition(": ")[2].strip(". ").split(", "))) for part in parts]
        text = "\n\t".join([head, f"{parts[0].partition(': ')[0]}: {turned[0]}. ", parts[1]])
        found = explain(text, asked)
        assert {subject.kind for subject in found.subjects} == {"renamed"}
        assert sum(len(subject.names) for subject in found.subjects) == (1 if asked else len(model.state_dict()))

    def test_that_the_model_has_and_the_checkpoint_has_not_are_told_of_the_model(self, model):
        with pytest.raises(RuntimeError) as caught:
            torch.compile(model).load_state_dict(model.state_dict())
        explanation = explain(caught.value)
        assert {subject.kind for subject in explanation.subjects} == {"renamed"}
        assert explanation.checked == len(model.state_dict())
        assert_says(explanation.sentence, "the model is inside a training wrapper", "has model.embed_tokens.weight")
        assert_says(explanation.best.fix, "model._orig_mod")

    def test_of_several_causes_are_a_section_each(self):
        names = [f"layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.gate_proj", "a", "b")]
        held = ["layers.0.self_attn.qkv_proj.weight", "layers.0.mlp.gate_up_proj.weight", "module.layers.0.a.weight",
                "_orig_mod.layers.0.b.weight"]  # fmt: skip
        text = "Error(s) in loading state_dict for X:\n\tMissing key(s) in state_dict: {}. \n\tUnexpected key(s) in " \
               "state_dict: {}. "  # fmt: skip
        quoted = [", ".join(f'"{name}"' for name in each) for each in (names, held)]
        sections = view_of(explain(text.format(*quoted))).sections[1:]
        assert [(section.title, "query" in section.summary, "gate" in section.summary) for section in sections[:2]] == [
            ("layers.0.self_attn.q_proj.weight", True, False), ("layers.0.mlp.gate_proj.weight", False, True)
        ]  # fmt: skip
        prefixes = {section.title: section.summary.rpartition(": ")[2] for section in sections[2:4]}
        assert prefixes == {"layers.0.a.weight": held[2], "layers.0.b.weight": held[3]}

    def test_are_not_paired_where_one_is_lost(self, model):
        lost = "model.layers.1.mlp.up_proj.weight"
        explanation = explain(self.refused(model, lost))
        kinds = {subject.kind for subject in explanation.subjects if "up_proj" in subject.name}
        assert kinds == {"missing", "unexpected"}
        (subject,) = explain(self.refused(model, lost), lost).subjects
        assert (subject.kind, subject.best) == ("missing", None)

    def test_are_a_row_each_and_one_section(self, model):
        view = view_of(explain(self.refused(model)))
        assert [section.title for section in view.sections] == [
            "What does not fit", "model.embed_tokens.weight and 11 more"
        ]  # fmt: skip
        (table,) = view.sections[0].tables
        row = next(row for row in table.rows if "q_proj" in row[0].text)
        assert [cell.text for cell in row] == [
            "model.layers.{0..1}.self_attn.q_proj.weight", "there", "another name", "wrapper prefix (strong)",
            "there as _orig_mod.…",
        ]  # fmt: skip


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
        assert_says(explanation.sentence, "nothing of names or shapes that is known", "no such directory")
        assert not explanation.fits

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


SIZES = (
    "size mismatch for a.weight: copying a param with shape torch.Size([3600]) from checkpoint, the shape in current "
    "model is torch.Size([3584])."
)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raised(make) -> BaseException:
    with pytest.raises(BaseException) as caught:
        make()
    return caught.value


def from_another():
    try:
        raise RuntimeError(SIZES)
    except RuntimeError as error:
        raise ValueError("could not load") from error


def while_handling():
    try:
        raise RuntimeError(SIZES)
    except RuntimeError:
        raise ValueError("could not load")  # noqa: B904 - as a user's handler does


def from_nothing():
    try:
        raise RuntimeError(SIZES)
    except RuntimeError:
        raise ValueError("could not load") from None


def with_a_note() -> BaseException:
    error = ValueError("could not load")
    error.__notes__ = [SIZES]  # add_note of 3.11
    return error


class Group(Exception):
    """As ExceptionGroup of 3.11, and the package of that name."""

    def __init__(self, *exceptions: BaseException) -> None:
        super().__init__("several")
        self.exceptions = exceptions


class TestWhatAnExceptionSays:
    @pytest.mark.parametrize(
        "error",
        [raised(from_another), raised(while_handling), with_a_note(), Group(RuntimeError(SIZES)),
         Group(ValueError("x"), Group(raised(from_another))), Group(with_a_note())],
    )  # fmt: skip
    def test_is_read_in_notes_groups_and_causes(self, error: BaseException):
        (subject,) = explain(error).subjects
        assert (subject.name, subject.got, subject.expected) == ("a.weight", (3600,), (3584,))

    def test_keeps_what_of_a_group_cannot_be_read(self):
        explanation = explain(Group(RuntimeError(SIZES), ValueError("disk full")))
        assert [problem.what for problem in explanation.problems] == ["ValueError: disk full"]
        assert_says(explanation.sentence, "1 problem beside the shapes")

    @pytest.mark.parametrize(
        "error",
        [RuntimeError("CUDA out of memory"), ValueError(), KeyError(3), KeyError("x y"), Mute(), Group(ValueError("x")),
         raised(from_nothing), KeyboardInterrupt()],
    )  # fmt: skip
    def test_that_is_not_known_fits_nothing(self, error: BaseException):
        explanation = explain(error)
        assert explanation.subjects == ()
        assert not explanation.fits
        assert_says(explanation.sentence, "nothing of names or shapes that is known")
        (problem,) = explanation.problems
        assert_says(problem.fix, "a checkpoint", "two shapes", "transformers")
        assert "fits" not in str(explanation).lower()

    def test_of_a_ring_of_causes_ends(self):
        one, other = ValueError("a"), ValueError("b")
        one.__cause__, other.__cause__ = other, one
        assert explain(one).subjects == ()

    def test_of_a_name_that_was_looked_up_does_not_say_where(self):
        explanation = explain(KeyError("model.norm.weight"))
        assert_says(explanation.sentence, "possibly", "does not say which")
        assert_says(explanation.best.fix, "model.norm.weight")

    def test_of_unlike_parts(self):
        error = raised(lambda: torch.cat([torch.zeros(2, 8), torch.zeros(2, 3)]))
        assert_says(explain(error).sentence, "dimension 0", "8 and 3")


class TestWhatAValidationFound:
    @pytest.fixture
    def merged(self, tmp_path: Path) -> Path:
        write_model_world(tmp_path / "ckpt", "llama", 2)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
        return tmp_path / "out"

    def failure(self, directory: Path, **options) -> VerificationError:
        with pytest.raises(VerificationError) as caught:
            nbmerge.validate(directory, progress=False, **options).raise_if_failed()
        return caught.value

    def test_of_shapes_is_explained(self, merged: Path):
        write_config(merged, "llama", vocab_size=41)
        error = self.failure(merged, checks=["structure"])
        for explanation in (explain(error), explain(str(error))):
            assert {subject.name for subject in explanation.mismatches} == {
                "model.embed_tokens.weight",
                "lm_head.weight",
            }
            assert explanation.best.pattern == "vocabulary resized"
            assert explanation.problems == ()

    def test_of_names_is_explained(self, merged: Path):
        state = load_file(merged / "model.safetensors")
        state["module.x.weight"] = state.pop("model.norm.weight")
        save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
        explanation = explain(self.failure(merged, checks=["structure"]))
        assert {(subject.name, subject.kind) for subject in explanation.subjects} == {
            ("model.norm.weight", "missing"), ("module.x.weight", "unexpected")
        }  # fmt: skip
        assert {each.got or each.expected for each in explanation.subjects} == {(16,)}

    def test_against_the_checkpoint_is_explained(self, merged: Path, tmp_path: Path):
        state = load_file(merged / "model.safetensors")
        state["model.norm.weight"] = torch.zeros(18)
        state["extra"], state["lm_head.weight"] = torch.zeros(3), state["lm_head.weight"] + 1
        del state["model.layers.0.input_layernorm.weight"]
        save_file(state, merged / "model.safetensors", metadata={"format": "pt"})
        report = nbmerge.validate(merged, checkpoint=tmp_path / "ckpt", no_run=True, progress=False)
        with pytest.raises(VerificationError) as caught:
            report.raise_if_failed()
        explanation = explain(caught.value)
        kinds = {subject.name: subject.kind for subject in explanation.subjects}
        assert kinds == {
            "model.norm.weight": "mismatch", "extra": "unexpected", "model.layers.0.input_layernorm.weight": "missing"
        }  # fmt: skip
        assert any("lm_head.weight" in problem.what for problem in explanation.problems)
        assert_says(explanation.sentence, "beside the shapes")

    def test_that_is_not_understood_is_not_said_to_be_right(self, merged: Path):
        error = VerificationError("x", problems=[Problem("a.weight holds NaN", "3 elements"), Problem("b", "c")])
        explanation = explain(error)
        assert (explanation.subjects, len(explanation.problems)) == ((), 2)
        assert not explanation.fits
        assert_says(explanation.sentence, "nothing of names or shapes that is known", "holds NaN", "1 of 2 problems")

    def test_of_another_dtype_is_no_other_shape(self):
        problem = Problem(
            "a.weight has another shape or dtype than the reference", "float32 [3] here, bfloat16 [3] there"
        )
        assert explain(VerificationError("x", problems=[problem])).problems == (problem,)


class TestTexts:
    @pytest.mark.parametrize(
        "text",
        ["", "  ", "RuntimeError: something else happened", "x " * 300, "y" * 300, "a\nb", "Error in /a/b: it failed",
         "\0", "~nobody_of_this_name/x y: z"],
    )  # fmt: skip
    def test_that_are_neither_path_nor_message_are_said_to_be(self, text: str, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        message = refusal(OptionError, explain, text)
        assert "neither a path nor a message that is known" in message or "no path" in message
        assert_says(message, "fix:")

    @pytest.mark.parametrize("text", ["none/ckpt", "/none at all", "run 3/actor", "actor"])
    def test_that_are_like_paths_are_told_as_such(self, text: str, tmp_path: Path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        refusal(NotACheckpointError, explain, text)

    @pytest.mark.parametrize("path", [Path("y" * 300), Path("~nobody_of_this_name/x")])
    def test_that_no_file_system_has_are_told(self, path: Path):
        assert_says(refusal(OptionError, explain, path), "no path")

    def test_that_are_too_long_are_read_in_part_and_said_to_be(self):
        explanation = explain(SIZES + " " * 1_000_000)
        assert [subject.name for subject in explanation.subjects] == ["a.weight"]
        (problem,) = explanation.problems
        assert_says(problem.what, f"{len(SIZES):,} characters", "not read")


class TestOptions:
    @pytest.fixture
    def ckpt(self, tmp_path: Path) -> Path:
        return write_model_world(tmp_path / "ckpt", "llama", 2)

    def test_config_is_the_config_of_a_checkpoint(self, ckpt: Path, tmp_path: Path):
        where = config(tmp_path, "llama", vocab_size=41)
        expected = explain(ckpt, hf_model_config_path=where).subjects
        assert expected
        assert explain(ckpt, config=where).subjects == expected
        assert explain(nbmerge.open_checkpoint(ckpt), config=where).subjects == expected
        nbmerge.merge(ckpt, tmp_path / "out")
        assert explain(tmp_path / "out", config=where).subjects[0].got == expected[0].got

    def test_hf_model_config_path_is_the_config_of_a_message(self, tmp_path: Path):
        where = config(tmp_path, "llama")
        said = ("size mismatch for layers.0.self_attn.k_proj.weight: copying a param with shape torch.Size([16, 16]) "
                "from checkpoint, the shape in current model is torch.Size([8, 16]).")  # fmt: skip
        for subject in (said, RuntimeError(said)):
            found = explain(subject, hf_model_config_path=where)
            assert found.best.pattern == "query and key-value sizes exchanged"

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"config": {"vocab_size": 1}}, "mapping"), ({"ranks": 3}, "2 ranks wrote"), ({"ranks": "2"}, "ranks='2'"),
         ({"ranks": 0}, "ranks=0"), ({"ranks": True}, "ranks=True"), ({"name": 5}, "name=5"),
         ({"config": 3}, "config=3"), ({"nope": 1}, "nope"), ({"dtype": "nope"}, "nope"),
         ({"config": "a", "hf_model_config_path": "b"}, "two names")],
    )  # fmt: skip
    def test_that_cannot_be_honoured_are_refused(self, ckpt: Path, options, words: str):
        assert_says(refusal(OptionError, explain, ckpt, **options), words, "fix:")
        assert_says(refusal(OptionError, explain, nbmerge.open_checkpoint(ckpt), **options), words, "fix:")

    def test_cannot_change_a_plan_a_message_or_shapes(self, ckpt: Path, tmp_path: Path):
        where = config(tmp_path, "llama")
        plan = nbmerge.plan_merge(ckpt)
        assert_says(refusal(OptionError, explain, plan, config=where), "cannot change a plan")
        assert_says(refusal(OptionError, explain, plan, ranks=3), "2 ranks wrote")
        assert_says(refusal(OptionError, explain, SIZES, is_value_model=True), "is_value_model", "a message")
        assert_says(refusal(OptionError, explain, RuntimeError(SIZES), backend="fsdp"), "backend", "an error")
        assert_says(refusal(OptionError, explain, got=1, expected=2, dtype="bf16"), "dtype", "two shapes")

    def test_cannot_change_a_directory_unless_it_is_the_models(self, ckpt: Path, tmp_path: Path):
        nbmerge.merge(ckpt, tmp_path / "out")
        assert_says(refusal(OptionError, explain, tmp_path / "out", mesh_shape="2"), "mesh_shape", "directory")
        assert explain(tmp_path / "out", backend="hf").fits
        tied = explain(tmp_path / "out", tie_word_embedding=True)
        assert [subject.name for subject in tied.subjects] in ([], ["lm_head.weight"])

    def test_ranks_decide_where_a_directory_does_not_say_them(self, ckpt: Path, tmp_path: Path):
        nbmerge.merge(ckpt, tmp_path / "out")
        state = load_file(tmp_path / "out" / "model.safetensors")
        state["model.norm.weight"] = torch.zeros(18)
        save_file(state, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        explanation = explain(tmp_path / "out", ranks=3)
        assert (explanation.best.pattern, explanation.best.counts) == ("ceil padding", (3,))
        assert explanation.best.strength is Strength.STRONG
        assert explanation.ranks == 3

    def test_ranks_that_are_the_checkpoints_own_are_taken(self, ckpt: Path):
        assert explain(ckpt, ranks=2).fits


class TestOtherModels:
    def test_an_actor_under_a_critics_config(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        where = config(tmp_path, "llama", architectures=["LlamaForTokenClassification"])
        for explanation in (explain(tmp_path / "ckpt", config=where), explain(tmp_path / "ckpt", is_value_model=True)):
            assert explanation.best.pattern == "another head"
            assert_says(explanation.sentence, "lm_head.weight in the checkpoint, score.weight in the model")

    def test_of_more_layers(self, tmp_path: Path):
        write_model_world(tmp_path / "ckpt", "llama", 2)
        explanation = explain(tmp_path / "ckpt", config=config(tmp_path, "llama", num_hidden_layers=3))
        assert explanation.best.pattern == "another number of layers"
        assert_says(explanation.sentence, "the checkpoint has 2 layers, and the model of config.json 3")
        assert {subject.best.pattern for subject in explanation.subjects} == {"another number of layers"}

    def test_of_more_layers_is_told_from_a_loading_error(self):
        from tests.support.models import tiny_model

        state = {name: tensor for name, tensor in memory_state("llama").items() if ".layers.1." not in name}
        with pytest.raises(RuntimeError) as caught:
            tiny_model("llama").load_state_dict(state)
        explanation = explain(caught.value)
        assert explanation.best.pattern == "another number of layers"
        assert_says(explanation.best.sentence, "the checkpoint ends after 1 layer")
        assert explanation.best.strength is Strength.FAIR


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
    assert Explanation("x", checked=3).fits
    assert_says(Explanation("x").sentence, "nothing of names or shapes")
    assert not Explanation("x").fits
    assert_says(Explanation("x", problems=(Problem("p"),), checked=3).sentence, "p; no known pattern")


def test_a_plan_s_error_is_explained_as_its_checkpoint_is(tmp_path: Path):
    """Not from the error's text, which has one shape where the checkpoint has many."""
    ckpt = write_model_world(tmp_path / "actor", "llama")
    config = write_config(tmp_path / "config", "llama", num_key_value_heads=4)
    with pytest.raises(PlanError) as caught:
        nbmerge.merge(ckpt, tmp_path / "out", hf_model_config_path=config)
    of_the_checkpoint = explain(ckpt, hf_model_config_path=config)
    assert explain(caught.value).mismatches == of_the_checkpoint.mismatches != ()
    assert explain(caught.value).best == of_the_checkpoint.best
