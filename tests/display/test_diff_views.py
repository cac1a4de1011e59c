"""What is shown of comparisons: from their dataclasses alone, without files."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest

from nbmerge.comparing.left_out import Mismatch, Unmatched
from nbmerge.comparing.model_diff import Looked, ModelDiff, TensorDiff
from nbmerge.comparing.statistics import FRACTION, Largest, Products, Statistics
from nbmerge.comparing.trajectory import Step, Trajectory, UpdateProducts
from nbmerge.display.sparklines import magnitude_line, scientific, sparkline, ulp_line
from nbmerge.dtypes import BY_NAME

BF16, F32 = BY_NAME["bfloat16"], BY_NAME["float32"]
HOSTILE = "model.layers.0.<script>alert('x')</script>\x1b[31m\u202e{}.weight"


def statistics(changed: int = 61, elements: int = 512, **changes: Any) -> Statistics:
    one = 1 << FRACTION
    made: dict[str, Any] = {
        "elements": elements, "changed": changed, "flips": 7 if changed else 0,
        "ulps": (0, changed - 11, 11) if changed else (),
        "magnitudes": {-20: changed - 13, -19: 13} if changed else {},
        "largest": Largest(0.0123, 37, 1.5, 1.5123) if changed else None,
        "products": Products(4 * one, 4 * one, 4 * one, one // 1024, 0) if changed else Products(one, one, one, 0, 0),
    }  # fmt: skip
    return Statistics(**{**made, **changes})


def tensor(name: str, changed: int = 61, **changes: Any) -> TensorDiff:
    return TensorDiff(**{"name": name, "shape": (16, 32), "dtype_a": BF16, "dtype_b": BF16, "compared_as": BF16,
                         "statistics": statistics(changed), **changes})  # fmt: skip


def diff(*tensors: TensorDiff, **changes: Any) -> ModelDiff:
    held = tensors or tuple(small())
    return ModelDiff(**{"a": "/run/base", "b": "/run/global_step_100", "tensors": {one.name: one for one in held},
                        "looked": Looked(nbytes=2_048, seconds=1.25), **changes})  # fmt: skip


def small(layers: int = 4) -> list[TensorDiff]:
    made = [tensor("model.embed_tokens.weight", 0)]
    for layer in range(layers):
        made += [tensor(f"model.layers.{layer}.self_attn.{name}_proj.weight", 50 + layer) for name in "qkvo"]
        made += [tensor(f"model.layers.{layer}.mlp.{name}_proj.weight", 80) for name in ("gate", "up", "down")]
        made.append(tensor(f"model.layers.{layer}.input_layernorm.weight", 0, shape=(512,)))
    return made


def numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d[\d.,]*", text))


def shown_html(thing: Any) -> str:
    rendered = thing._repr_html_()
    assert rendered is not None
    return rendered


def texts_of(rendered: str) -> str:
    body = re.sub(r"<style>.*?</style>", "", rendered, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]*>", " ", body)).replace("\N{NO-BREAK SPACE}", " ")


def trajectory() -> Trajectory:
    steps = [
        Step(f"/run/global_step_{10 * number}/actor", diff(), {"model.layers.0.mlp.up_proj.weight": products})
        for number, products in ((1, UpdateProducts()), (2, UpdateProducts(4, 9, 3)), (3, UpdateProducts(4, 9, -6)))
    ]
    return Trajectory("/run/global_step_0/actor", tuple(steps))


SHOWN = {
    "diff": diff(),
    "equal": diff(tensor("model.norm.weight", 0)),
    "left out": diff(
        unmatched=(Unmatched("x.bias", "A", (3, 5), BF16), Unmatched("y.bias", "B", (7,), BF16, "because")),
        mismatched=(Mismatch("z", ((2, 3), BF16), ((3, 2), F32), "no rule"),), notes=("B was renamed",),
    ),
    "frozen": diff(tensor("a.weight", frozen=True), frozen=("a.*", "nothing.*"), idle_patterns=("nothing.*",)),
    "sampled": diff(looked=Looked(0.213, 0.2, 99_000, 3.5)),
    "mixed": diff(tensor("a.weight", dtype_a=F32, compared_as=F32, statistics=statistics(changed_rounded=9))),
    "broken": diff(tensor("a.weight", statistics=statistics(nonfinite_b=17))),
    "rank one": diff(tensor("a.weight", rank_one=0.876)),
    "tensor": tensor("model.layers.3.mlp.up_proj.weight", rank_one=0.4321, note="A ties it to b"),
    "equal tensor": tensor("model.norm.weight", 0),
    "integers": tensor("steps", statistics=statistics(products=None, ulps=(), flips=0)),
    "trajectory": trajectory(),
    "nothing": ModelDiff("a", "b", {}),
}  # fmt: skip


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN.keys())
def test_text_and_html_say_the_same_numbers(shown: Any) -> None:
    assert numbers(texts_of(shown_html(shown))) == numbers(repr(shown))
    assert not repr(shown).startswith("<")


@pytest.mark.parametrize("shown", SHOWN.values(), ids=SHOWN.keys())
def test_text_fits_a_terminal(shown: Any) -> None:
    assert max(len(line) for line in repr(shown).splitlines()) <= 112


def test_the_sentence_comes_first() -> None:
    assert repr(diff()).startswith("Model diff: training changed 10.6% of all elements, in all 28 matrices;")


def test_a_frozen_tensor_that_moved_comes_before_all_facts() -> None:
    rendered = shown_html(SHOWN["frozen"])
    assert rendered.index("✗ Problem:") < rendered.index("compared")
    assert "no tensor has a name like nothing.*" in rendered


def test_layers_and_modules_make_a_table() -> None:
    lines = repr(diff()).splitlines()
    head = next(line for line in lines if line.strip().startswith("layer "))
    assert head.split() == [
        "layer",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "norms",
    ]
    row = next(line for line in lines if re.match(r"\s+3 ", line))
    assert row.split() == ["3", "10.4%", "10.4%", "10.4%", "10.4%", "15.6%", "15.6%", "15.6%", "0"]


def test_a_kind_that_ends_as_another_keeps_its_name() -> None:
    moved = [tensor(f"model.layers.0.{name}.up_proj.weight") for name in ("mlp", "mlp.shared_expert")]
    assert "mlp.shared_expert.up_proj" in repr(diff(*moved))


def test_neighbouring_layers_are_put_together() -> None:
    text = repr(diff(*small(61)))
    assert re.search(r"^\s+0–5 ", text, re.MULTILINE)
    assert re.search(r"^\s+60 ", text, re.MULTILINE)


@pytest.mark.parametrize("layers", [94, 400])
def test_a_large_model_takes_few_bytes(layers: int) -> None:
    held = small(layers)
    held += [tensor(f"model.layers.{i % layers}.mlp.experts.{i}.up_proj.weight") for i in range(3000)]
    left = tuple(Unmatched(f"model.mtp.{i}.x{i * 7919 % 1000}.weight", "A", (i, 3), BF16) for i in range(3000))
    made = diff(*held, unmatched=left)
    assert len(shown_html(made).encode()) <= 30_000
    assert "2,988 of 3,000" in repr(made) or "not shown" in repr(made)


def test_a_long_run_takes_few_bytes() -> None:
    steps = tuple(Step(f"/run/global_step_{n}", diff(*small(30)), {}) for n in range(100))
    assert len(shown_html(Trajectory("/run/global_step_0", steps)).encode()) <= 30_000


@pytest.mark.parametrize("make", [
    lambda: diff(tensor(HOSTILE, frozen=True), a=HOSTILE, b=HOSTILE, frozen=(HOSTILE,), idle_patterns=(HOSTILE,),
                 frozen_unseen=(HOSTILE,), notes=(HOSTILE,), unmatched=(Unmatched(HOSTILE, "A", (1,), BF16, HOSTILE),),
                 mismatched=(Mismatch(HOSTILE, ((1,), BF16), ((2,), BF16), HOSTILE),)),
    lambda: tensor(HOSTILE, note=HOSTILE),
    lambda: Trajectory(HOSTILE, (Step(HOSTILE, diff(tensor(HOSTILE)), {HOSTILE: UpdateProducts(1, 1, 1)}),)),
    lambda: diff(tensor("x" * 2_000_000), a="y" * 2_000_000),
])  # fmt: skip
def test_hostile_names_do_nothing(make: Any) -> None:
    shown = make()
    rendered, text = shown_html(shown), repr(shown)
    assert "<script" not in rendered
    for output in (rendered, text):
        assert "\x1b" not in output
        assert "\u202e" not in output
    assert len(rendered.encode()) <= 30_000
    assert not text.startswith("<")


def test_bars_are_as_high_as_their_share() -> None:
    assert sparkline([0, 1, 50, 100]) == "·▁▅█"
    assert sparkline([]) == ""


def test_a_histogram_names_its_ends() -> None:
    assert magnitude_line({-24: 1, -22: 8}) == "2⁻²⁴ ▂·█ 2⁻²¹"
    assert magnitude_line({}) == "·"
    assert magnitude_line({-133: 1, -9: 10, -8: 100}).startswith("<2⁻¹⁹ ▁··")
    assert ulp_line((0, 4, 2)) == "0 ·█▅ 2"
    assert ulp_line((0, 8, 8, 8, 8, 0, 1)) == "0 ·████·▂ 2⁵"
    assert ulp_line((0, *[1] * 24)) == "0 ▅███████████▅ 2²³"
    assert ulp_line((3,)) == "0 █ 0"
    assert ulp_line(()) == "·"


def test_small_numbers_have_a_power_of_ten() -> None:
    values = (0.0, 0.012, 1e-3, 9.996e-4, 9.999, 12345.6, 4.5e-5, -2e-9, 99999, 3.4e38, float("inf"), float("nan"))
    assert [scientific(value) for value in values] == [
        "0", "0.0120", "0.00100", "0.00100", "10.0", "12300", "4.50×10⁻⁵", "-2.00×10⁻⁹", "1.00×10⁵", "3.40×10³⁸",
        "inf", "nan",
    ]  # fmt: skip


def test_a_cosine_near_one_says_how_near() -> None:
    assert "1 − " in repr(diff())
    assert re.search(r"cosine +·", repr(tensor("a", statistics=statistics(products=Products(0, 5, 0, 5, 0)))))
