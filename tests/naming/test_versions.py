"""Which transformers made a checkpoint or its config, and what is told where the installed one is too old."""

from __future__ import annotations

import json

import pytest

from nbmerge import ConfigError
from nbmerge.errors import Problem
from nbmerge.explaining.candidates import Mismatch
from nbmerge.naming import meta, versions
from nbmerge.naming.published import HUB, Named
from nbmerge.naming.versions import explained, later_config, numbers, refuse_too_old
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, published_state, write_config, write_model_world
from tests.support.results import assert_same, bits_of_all, receipt_of, saved_bits

OLD, NEW = "4.57.1", "5.24.0"
STRAY = Problem("no rule takes model.layers.0.mlp.experts.gate_up_proj of shape [5, 20, 18]")
OTHER = Problem("gate has shape [5, 18]")
ROUTER = Mismatch((5, 18), (128, 18), "model.layers.0.mlp.gate.weight")
LATER = "config.json was written by transformers 5.24.0; 4.57.1 is installed"
NAMES = ("lm_head.weight", "_fsdp_wrapped_module.model.layers.0.mlp.experts.gate_up_proj")


@pytest.mark.parametrize(
    ("text", "expected"), [("5.24.0", (5, 24, 0)), ("4.57.0.dev0", (4, 57, 0)), ("main", ()), (None, ()), (5, ())]
)
def test_a_version_is_read_as_numbers(text: object, expected: tuple[int, ...]):
    assert numbers(text) == expected


def named(*problems: Problem, expected: str = "model.norm.weight", mismatches: tuple[Mismatch, ...] = ()) -> Named:
    return Named({}, {expected: (3,)}, HUB, problems=problems, mismatches=mismatches)


class TestFusedExperts:
    def test_of_a_class_that_has_them_one_by_one_are_the_only_reason_that_is_told(self):
        found = named(STRAY, OTHER, expected="model.layers.0.mlp.experts.0.up_proj.weight", mismatches=(ROUTER,))
        found = explained(found, {}, NAMES, OLD)
        (told,) = found.problems
        assert found.mismatches == ()
        assert_says(
            "\n".join(told.lines()), "in-memory names of transformers 5",
            "model.layers.0.mlp.experts.gate_up_proj for one", "4.57.1 is installed", "pip install 'transformers>=5'",
        )  # fmt: skip

    def test_of_a_class_without_experts_may_be_those_of_another_model(self):
        """GPT-OSS and Llama 4 hold their experts in one tensor under transformers 4 already."""
        reason, *rest = explained(named(STRAY), {}, NAMES, OLD).problems
        assert "in-memory names of transformers 5" in reason.what
        assert rest == [STRAY]

    def test_that_the_class_of_transformers_4_has_too_are_no_reason(self):
        found = named(Problem("no rule takes model.norm.bias of shape [3]"))
        assert explained(found, {}, NAMES, OLD) is found

    def test_are_no_matter_under_transformers_5(self):
        found = named(STRAY)
        assert explained(found, {"transformers_version": "5.0.0"}, NAMES, NEW) is found


class TestLaterConfig:
    def test_is_told_beside_what_else_is_wrong(self):
        reason, *rest = explained(named(OTHER), {"transformers_version": NEW}, (), OLD).problems
        assert (reason.what, rest) == (LATER, [OTHER])

    @pytest.mark.parametrize("inside", ["", "text_config"])
    def test_whose_size_the_installed_class_does_not_read_is_told_alone(self, inside: str):
        sizes = {"experts_of_a_layer": 5, "num_hidden_layers": 2}
        config = {"model_type": "gemma3", "transformers_version": NEW} | ({inside: sizes} if inside else sizes)
        found = explained(named(OTHER, mismatches=(ROUTER,)), config, (), OLD)
        (told,) = found.problems
        assert (told.what, found.mismatches) == (LATER, ())
        assert (
            told.where
            == "config.json: experts_of_a_layer 5, which the tensors have and transformers 4.57.1 does not read"
        )

    @pytest.mark.parametrize(
        ("kind", "wrong"),
        [("qwen3", ROUTER), ("of no class", ROUTER), ("gemma3", Mismatch((18, 7), (18, 8), "model.norm.weight"))],
    )
    def test_whose_sizes_do_not_explain_every_shape_does_not_stand_alone(self, kind: str, wrong: Mismatch):
        config = {"model_type": kind, "transformers_version": NEW, "num_hidden_layers": 5, "head_dim": 5, "window": 9}
        found = named(OTHER, mismatches=(ROUTER, wrong))
        assert len(explained(found, config, (), OLD).problems) == 2

    def test_is_no_problem_where_nothing_is_wrong(self):
        found = named()
        assert explained(found, {"transformers_version": NEW}, NAMES, OLD) is found

    @pytest.mark.parametrize("written", ["4.57.6", "4.30.0", None, "unknown"])
    def test_is_one_of_a_later_major_version(self, written: str | None):
        assert later_config({"transformers_version": written}, OLD) is None

    def test_that_makes_no_model_says_which_version_would(self, tmp_path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(versions, "version", lambda package: OLD)
        write_config(tmp_path, "llama", num_hidden_layers="many", transformers_version=NEW)
        message = refusal(ConfigError, meta.model_facts, meta.ModelDirectory(tmp_path))
        assert_says(message, "written by transformers 5.24.0; 4.57.1 is installed", "pip install 'transformers>=5'")


def test_a_transformers_that_is_too_old_is_refused():
    refuse_too_old(OLD)
    refuse_too_old(NEW)
    message = refusal(ConfigError, refuse_too_old, "4.51.3")
    assert_says(message, "transformers 4.51.3 is installed", "4.57 or newer", "pip install 'transformers>=4.57'")


def test_shards_of_transformers_4_are_merged_under_any(tmp_path):
    """Experts one by one, as transformers 4 has them in memory, are those that are published."""
    import nbmerge

    state = published_state("qwen3_moe")
    plan = nbmerge.plan_merge(write_model_world(tmp_path / "ckpt", "qwen3_moe", state=state))
    assert plan.problems == ()
    assert set(plan.expected) == set(state)
    assert plan.dialect == ("hub" if HAS_CONVERSIONS else "transformers")


def test_a_class_that_stands_in_text_config_alone_is_found_and_written_where_it_belongs(tmp_path):
    """transformers 4.57 saves Qwen2.5-VL's config so."""
    import nbmerge

    write_model_world(tmp_path / "ckpt", "qwen2_5_vl")
    config = json.loads((path := tmp_path / "ckpt" / "huggingface" / "config.json").read_text())
    names = config.pop("architectures")
    config["text_config"]["architectures"] = names
    path.write_text(json.dumps(config))
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(published_state("qwen2_5_vl")))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == names
    assert receipt_of(tmp_path / "out")["config_edits"]["architectures"]
    assert nbmerge.validate(tmp_path / "out", checkpoint=tmp_path / "ckpt").ok
