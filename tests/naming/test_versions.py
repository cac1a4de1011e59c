"""Which transformers made a checkpoint or its config, and what is told where the installed one is too old."""

from __future__ import annotations

import pytest

from nbmerge import ConfigError
from nbmerge.errors import Problem
from nbmerge.naming import meta, versions
from nbmerge.naming.versions import later_config, numbers, of_later_transformers, refuse_too_old
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, published_state, write_config, write_model_world

OLD, NEW = "4.57.1", "5.24.0"
STRAY = Problem("no rule takes model.layers.0.mlp.experts.gate_up_proj of shape [5, 20, 18]")
NAMES = ("lm_head.weight", "_fsdp_wrapped_module.model.layers.0.mlp.experts.gate_up_proj")


@pytest.mark.parametrize(
    ("text", "expected"), [("5.24.0", (5, 24, 0)), ("4.57.0.dev0", (4, 57, 0)), ("main", ()), (None, ()), (5, ())]
)
def test_a_version_is_read_as_numbers(text: object, expected: tuple[int, ...]):
    assert numbers(text) == expected


class TestFusedExperts:
    def test_that_transformers_4_cannot_name_are_told_with_the_version_that_can(self):
        (told,) = of_later_transformers({}, NAMES, [STRAY], OLD)
        assert_says(
            "\n".join(told.lines()), "in-memory names of transformers 5",
            "model.layers.0.mlp.experts.gate_up_proj for one", "4.57.1 is installed", "pip install 'transformers>=5'",
        )  # fmt: skip

    def test_that_the_class_of_transformers_4_has_too_are_no_reason(self):
        """GPT-OSS and Llama 4 hold their experts in one tensor under transformers 4 already."""
        assert of_later_transformers({}, NAMES, [Problem("no rule takes model.norm.bias of shape [3]")], OLD) == ()

    def test_are_no_matter_under_transformers_5(self):
        assert of_later_transformers({"transformers_version": "5.0.0"}, NAMES, [STRAY], NEW) == ()


class TestLaterConfig:
    def test_is_told_beside_what_else_is_wrong(self):
        (told,) = of_later_transformers({"transformers_version": NEW}, (), [Problem("gate has shape [5, 18]")], OLD)
        assert told.what == "config.json was written by transformers 5.24.0; 4.57.1 is installed"

    def test_is_no_problem_where_nothing_is_wrong(self):
        assert of_later_transformers({"transformers_version": NEW}, NAMES, [], OLD) == ()

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
