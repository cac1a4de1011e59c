"""What users met, reproduced and explained, by the number of the thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge.errors import IncompleteCheckpointError, InconsistentCheckpointError
from nbmerge.explainer import explain
from nbmerge.explaining.candidates import Known, Mismatch, Strength
from nbmerge.explaining.table import candidates
from tests.explaining.questions import causes, first_ones
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, memory_state, tiny_model, write_config, write_model_world
from tests.support.worlds import write_ranks


def concatenated(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What verl's merger did with every tensor that is no DTensor."""
    return {name: torch.cat([state[name] for state in states], dim=0) for name in states[0]}


def loading_error(state: dict[str, torch.Tensor], family: str = "llama") -> RuntimeError:
    """What torch says on loading the state into the model."""
    with pytest.raises(RuntimeError) as caught:
        tiny_model(family).load_state_dict(state)
    return caught.value


def saved(directory: Path, state: dict[str, torch.Tensor], family: str) -> Path:
    """A Hugging Face directory as another merger would have written it."""
    from safetensors.torch import save_file

    write_config(directory, family)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    return directory


class TestVerl834:
    """3600 where 3584 was expected, 24 ranks: the padding of an uneven shard."""

    def test_is_explained_from_shapes(self):
        explanation = explain(got=(3600,), expected=(3584,), name="model.norm.weight", ranks=24)
        assert not explanation.is_ambiguous
        assert str(explanation.best) == (
            "3600 = 24 · ⌈3584/24⌉: the padding of an uneven shard was not trimmed (24 ranks)"
        )

    def test_is_explained_from_vllms_own_sentence(self):
        said = "AssertionError: Attempted to load weight (torch.Size([3600])) into parameter (torch.Size([3584]))"
        assert explain(said).best.pattern == "ceil padding"
        assert 24 in explain(said).best.counts

    def test_is_narrowed_down_by_a_second_shape(self):
        """18944 is padded to 18960 by 24, and by fewer others: one number must explain both."""
        said = "".join(
            f"size mismatch for {name}: copying a param with shape torch.Size([{got}]) from checkpoint, "
            f"the shape in current model is torch.Size([{expected}]).\n"
            for name, got, expected in (("a.bias", 3600, 3584), ("b.bias", 18960, 18944), ("c.bias", 528, 512))
        )
        explanation = explain(said)
        for subject in explanation.subjects:
            assert subject.best.strength is Strength.STRONG
            assert set(subject.best.counts) == {24, 48}
        assert "explains all 3 shapes" in explanation.best.evidence[-1]

    def test_is_reproduced_in_a_merged_directory(self, tmp_path: Path):
        state = memory_state("qwen2")
        rows = state["model.norm.weight"].shape[0]  # 16 over 3 ranks: 6, 6 and 4, padded to 6
        state["model.norm.weight"] = torch.cat([state["model.norm.weight"], torch.zeros(18 - rows)])
        explanation = explain(saved(tmp_path, state, "qwen2"))
        (subject,) = explanation.subjects
        assert (subject.name, subject.best.pattern) == ("model.norm.weight", "ceil padding")
        assert 3 in subject.best.counts

    def test_is_told_by_the_loader_where_padded_shards_are_plain(self, tmp_path: Path):
        states = [{"model.norm.weight": torch.ones(6)} for _ in range(3)]
        write_ranks(tmp_path, states)
        write_config(tmp_path / "huggingface", "llama")
        message = refusal(InconsistentCheckpointError, nbmerge.open_checkpoint, tmp_path)
        assert_says(
            message, "[6] on each of 3 ranks", "demands [16]", "18 = 3 · ⌈16/3⌉", "not trimmed (3 ranks)", "fix:"
        )


class TestVerl4671:
    """1024 where 128 was expected: a replicated tensor, concatenated once per rank."""

    def test_is_explained_from_shapes(self):
        explanation = explain(got=1024, expected=128, ranks=8)
        assert explanation.best.evidence[0] == "1024 = 8 · 128"
        assert not explanation.is_ambiguous

    def test_is_reproduced_and_explained_from_torchs_error(self):
        state = memory_state("qwen3")
        norms = {name: tensor for name, tensor in state.items() if "q_norm" in name or "k_norm" in name}
        error = loading_error({**state, **concatenated([norms] * 8)}, "qwen3")
        explanation = explain(error)
        assert explanation.best.pattern == "replicated, concatenated"
        assert explanation.best.counts == (8,)

    def test_is_not_done_here(self, tmp_path: Path):
        write_model_world(tmp_path, "qwen3", 4)
        assert explain(tmp_path).mismatches == ()


class TestVerl7610AndOumi2618:
    """Replicated buffers of Gemma-4, concatenated over 8 ranks: [1] → [8], [1152] → [9216], and 0-d ones."""

    def test_of_one_element_is_ambiguous_and_all_causes_are_shown(self):
        explanation = explain(got=8, expected=1, ranks=8, name="model.language_model.layers.0.layer_scalar")
        found = {each.pattern: each for each in explanation.subjects[0].candidates}
        assert explanation.is_ambiguous
        assert {"replicated, concatenated", "ceil padding"} <= set(first_ones(found))
        assert_says(explanation.sentence, "2 causes fit equally well", "8 = 8 · 1", "8 = 8 · ⌈1/8⌉")

    def test_of_1152_is_not(self):
        found = causes((9216,), (1152,), "model.vision_tower.std_scale", 8)
        assert first_ones(found) == ["replicated, concatenated"]

    def test_both_together_are_decided_by_the_second(self):
        said = "".join(
            f"size mismatch for {name}: copying a param with shape torch.Size([{got}]) from checkpoint, "
            f"the shape in current model is torch.Size([{expected}])."
            for name, got, expected in (("layer_scalar", 8, 1), ("std_scale", 9216, 1152))
        )
        explanation = explain(said)
        assert not explanation.is_ambiguous
        assert {subject.best.pattern for subject in explanation.subjects} == {"replicated, concatenated"}

    def test_of_no_dimension_is_reproduced_and_explained(self):
        with pytest.raises(RuntimeError) as caught:
            concatenated([{"layer_scalar": torch.tensor(1.0)}] * 8)
        explanation = explain(caught.value)
        assert explanation.best.pattern == "replicated, concatenated"
        assert_says(explanation.sentence, "zero-dimensional", "every rank holds a copy")

    def test_of_no_dimension_as_a_shape(self):
        assert first_ones(causes((8,), (), "", 8)) == ["replicated, concatenated"]


class TestVerl903:
    """Plain tensors where DTensors were expected: world size 1."""

    def test_is_reproduced_and_explained(self):
        with pytest.raises(AttributeError) as caught:
            torch.zeros(3).device_mesh  # noqa: B018 - as verl's merger asked every tensor
        explanation = explain(caught.value)
        assert explanation.best.pattern == "plain tensors of one rank"
        assert_says(explanation.sentence, "'Tensor' object has no attribute 'device_mesh'", "one GPU")

    def test_is_merged_here(self, tmp_path: Path):
        write_model_world(tmp_path, "qwen2", 1)
        assert explain(tmp_path).sentence.startswith("every tensor fits")


class TestVerl2319:
    """A 235 B model came out far too small: the keys of grouped experts were not mapped, and dropped in silence."""

    def test_is_explained_from_the_name_alone(self):
        name = "model.layers.0.mlp.experts.gate_proj.weight100"
        (found,) = candidates(Mismatch((1536, 4096), None, name))
        assert found.evidence[0] == f"{name} → model.layers.0.mlp.experts.100.gate_proj.weight"

    def test_is_reproduced_and_explained_in_a_directory(self, tmp_path: Path):
        from tests.support.models import published_state

        state = {
            name.replace("experts.2.down_proj.weight", "experts.down_proj.weight2"): tensor
            for name, tensor in published_state("qwen3_moe").items()
        }
        explanation = explain(saved(tmp_path, state, "qwen3_moe"))
        assert {subject.kind for subject in explanation.subjects} == {"renamed"}
        for subject in explanation.subjects:
            assert subject.best.pattern == "grouped expert names"
            assert "the shapes agree" in subject.best.evidence

    def test_is_refused_in_a_plan(self, tmp_path: Path):
        state, grouped = memory_state("qwen3_moe"), "model.layers.0.mlp.experts.down_proj"
        first = state.pop(grouped)[0] if HAS_CONVERSIONS else state.pop(grouped.replace("down", "0.down") + ".weight")
        state[f"{grouped}.weight0"] = first
        write_model_world(tmp_path, "qwen3_moe", state=state)
        message = refusal(nbmerge.PlanError, nbmerge.merge, tmp_path, tmp_path / "out")
        assert_says(message, "no rule takes model.layers.0.mlp.experts.down_proj.weight0")


class TestDeepSpeed1317:
    """consumed 255381772 numels out of 255381776: alignment padding at the end of a flat partition."""

    SAID = "ValueError: consumed 255381772 numels out of 255381776 - something is wrong"

    def test_is_explained_from_its_own_sentence(self):
        explanation = explain(self.SAID, ranks=None)
        assert explanation.best.pattern in ("flat alignment padding", "ceil padding")
        assert "flat alignment padding" in [each.pattern for each in explanation.subjects[0].candidates]

    def test_is_explained_with_the_number_of_ranks_which_the_thread_gives(self):
        explanation = explain(f"{self.SAID}\nDetected checkpoint of type zero stage 2, world_size: 4")
        assert explanation.best.pattern == "flat alignment padding"
        assert explanation.best.evidence[0] == "255381776 = 2·4 · ⌈255381772/(2·4)⌉"
        assert explanation.ranks == 4


class TestDeepSpeed1896:
    """A tied head that is missing, or doubled."""

    WTE, HEAD = "transformer.wte.weight", "lm_head.weight"

    def test_is_explained_where_the_head_is_missing(self):
        known = Known(
            config={"tie_word_embeddings": True}, held={self.WTE: (50257, 768)}, wanted={self.WTE: (50257, 768)}
        )
        (found,) = candidates(Mismatch(None, (50257, 768), self.HEAD, known))
        assert (found.pattern, found.strength) == ("tied head absent", Strength.STRONG)
        assert self.WTE in found.evidence[0]

    def test_is_explained_where_it_is_doubled(self):
        known = Known(config={"tie_word_embeddings": True}, held={self.WTE: (50257, 768)})
        (found,) = candidates(Mismatch((50257, 768), None, self.HEAD, known))
        assert found.pattern == "tied head doubled"

    def test_is_reproduced_and_explained_from_torchs_error(self):
        state = memory_state("qwen2")
        del state["lm_head.weight"]
        assert explain(loading_error(state, "qwen2")).best.pattern == "tied head absent"

    def test_is_told_by_the_plan(self, tmp_path: Path):
        state = memory_state("qwen2")
        del state["lm_head.weight"]
        write_model_world(tmp_path, "qwen2", state=state)
        explanation = explain(nbmerge.plan_merge(tmp_path))
        assert (explanation.subjects[0].name, explanation.best.pattern) == ("lm_head.weight", "tied head absent")


def test_lmms_engine_160_one_shard_of_eight():
    """(640,) where (5120,) was expected: equal shards were taken for copies."""
    assert first_ones(causes((640,), (5120,), "multi_modal_projector.pre_norm.weight", 8)) == ["one shard"]


def test_a_checkpoint_that_is_incomplete_is_told_by_its_own_error(tmp_path: Path):
    write_model_world(tmp_path, "llama", 2)
    (tmp_path / "model_world_size_2_rank_1.pt").unlink()
    with pytest.raises(IncompleteCheckpointError):
        explain(tmp_path)
