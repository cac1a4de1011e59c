"""Which entries of an index are the model's, and behind which root, by their names and by what a config says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbmerge import AmbiguousCheckpointError
from nbmerge.geometry import Shape
from nbmerge.loaders.dcp.roots import divide, role_of
from tests.support.messages import assert_says, refusal

LLAMA = (
    "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight",
    "model.norm.weight", "lm_head.weight",
)  # fmt: skip
TIED = LLAMA[:-1]
GPT2 = ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.ln_f.weight")
LLAVA = ("vision_tower.layers.0.weight", "language_model.model.norm.weight", "language_model.lm_head.weight")
ADAM = ("optim.state.model.norm.weight.exp_avg", "optim.state.model.norm.weight.step", "optim.param_groups.0.lr")


def behind(root: str, names: tuple[str, ...]) -> list[str]:
    return [root + name for name in names]


def config_of(names: tuple[str, ...]):
    def expected(name: str) -> Shape | None:
        return (1,) if name in names else None

    return expected


@pytest.mark.parametrize("root", ["", "model.", "app.model.", "state_dict.", "module.", "anything.at.all."])
@pytest.mark.parametrize("beside", [(), ADAM, ("lr_scheduler.last_epoch", "dataloader.state", "train_state.step")])
def test_a_root_that_the_head_shows(root: str, beside: tuple[str, ...]):
    found = divide([*behind(root, LLAMA), *beside], None, "here")
    assert found.root == root
    assert list(found.weights) == list(LLAMA)
    assert list(found.weights.values()) == behind(root, LLAMA)
    assert sorted(name for names in found.beside.values() for name in names) == sorted(beside)
    assert found.outside == []


@pytest.mark.parametrize("names", [TIED, GPT2])
@pytest.mark.parametrize("root", ["", "model.", "app.model.", "module."])
def test_a_root_of_names_without_a_head(root: str, names: tuple[str, ...]):
    for beside in ((), behind("app." if root.startswith("app") else "", ADAM)):
        assert divide([*behind(root, names), *beside], None, "here").root == root


def test_a_state_of_no_known_model():
    assert divide(["a.weight", "b"], None, "here").root == ""
    assert (
        divide(["app.model.a.weight", "app.model.b", "app.optim.state.a.weight.exp_avg"], None, "").root == "app.model."
    )
    assert divide(["model.a", "model.b"], None, "here").root == ""  # nothing says that `model` is no part of the names
    assert divide([], None, "here").weights == {}


def test_the_config_decides_where_the_names_do_not():
    names = [*behind("first.", LLAVA), "second.head.weight"]
    found = divide(names, config_of(LLAVA), "here")
    assert found.root == "first."
    assert list(found.weights) == list(LLAVA)
    assert found.outside == ["second.head.weight"]


@pytest.mark.parametrize("config", [None, config_of(LLAVA)])
def test_a_head_inside_the_model_is_no_root(config):
    """An older LLaVA's head stands in its language model, with the vision tower beside that."""
    assert divide(LLAVA, config, "here").root == ""


def test_the_config_is_not_asked_where_the_names_say_enough():
    def unwilling(name: str) -> Shape | None:
        raise AssertionError(f"asked for {name}")

    assert divide(behind("model.", LLAMA), unwilling, "here").root == "model."


def test_a_teacher_beside_the_model():
    names = [*behind("model.", LLAMA), *behind("teacher.", LLAMA)]
    for config in (None, config_of(LLAMA)):
        found = divide(names, config, "here")
        assert found.root == "model."
        assert found.outside == behind("teacher.", LLAMA)


@pytest.mark.parametrize("config", [None, config_of(LLAMA)])
def test_two_models(config):
    names = [*behind("actor.", LLAMA), *behind("policy.", LLAMA)]
    message = refusal(AmbiguousCheckpointError, divide, names, config, "/run")
    assert_says(message, "2 models", "actor., policy.", "/run", "fix:")


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("optimizer.state.0.exp_avg", "optimizer"), ("app.optim.param_groups.0.lr", "optimizer"),
        ("actor_state.w.exp_avg_sq", "optimizer"), ("optimizers.0.state", "optimizer"), ("opt_1.x", "optimizer"),
        ("lr_scheduler.last_epoch", "extra state"), ("train_state.step", "extra state"), ("step", "extra state"),
        ("rng_state", "extra state"), ("dataloader.dp_rank_0", "extra state"), ("app.epoch", "extra state"),
        ("model.layers.0.steps", None), ("loss.weight", None), ("model.optional.weight", None),
        ("model.norm.weight", None), ("lm_head.weight", None), ("model.options.bias", None),
    ],
)  # fmt: skip
def test_roles(name: str, role: str | None):
    assert role_of(name) == role


_PART = st.sampled_from(["app", "model", "optim", "layers", "0", "norm", "weight", "lm_head", "x", "step", "exp_avg"])


@given(st.lists(st.lists(_PART, min_size=1, max_size=5).map(".".join), unique=True, max_size=12))
def test_every_name_is_accounted_for_once(names: list[str]):
    try:
        found = divide(names, None, "here")
    except AmbiguousCheckpointError:
        return
    told = [*found.weights.values(), *found.outside, *(name for same in found.beside.values() for name in same)]
    assert sorted(told) == sorted(names)
    assert all(found.root + new == old for new, old in found.weights.items())
