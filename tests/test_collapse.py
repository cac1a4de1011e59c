from __future__ import annotations

from nbmerge.collapse import collapse


def _names(names: list[str]) -> list[tuple[str, int]]:
    return [(group.name, group.count) for group in collapse((name, None) for name in names)]


def test_the_same_tensor_of_all_layers_is_one_row() -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(36) for part in ("q", "k")]
    assert _names(names) == [("model.layers.{0..35}.q.weight", 36), ("model.layers.{0..35}.k.weight", 36)]


def test_layers_and_experts_collapse_together() -> None:
    names = [f"layers.{i}.experts.{j}.up" for i in range(3, 6) for j in range(8)]
    assert _names(names) == [("layers.{3..5}.experts.{0..7}.up", 24)]


def test_grouped_experts_collapse_by_the_number_that_ends_their_names() -> None:
    names = [f"decoder.layers.{i}.mlp.experts.linear_fc1.{kind}{j}" for i in (0, 1) for kind in ("weight", "bias")
             for j in range(8)]  # fmt: skip
    assert _names(names) == [
        ("decoder.layers.{0..1}.mlp.experts.linear_fc1.weight{0..7}", 16),
        ("decoder.layers.{0..1}.mlp.experts.linear_fc1.bias{0..7}", 16),
    ]
    assert _names(["a.weight0", "a.b.weights1", "my_weight2", "a.weight_3"]) == [
        (name, 1) for name in ("a.weight0", "a.b.weights1", "my_weight2", "a.weight_3")
    ]


def test_numbers_that_make_no_range_are_listed_or_counted() -> None:
    assert _names([f"a.{i}" for i in (0, 2, 5)]) == [("a.{0, 2, 5}", 3)]
    assert _names([f"a.{i}" for i in (0, 2, 4, 6, 8)]) == [("a.{0..8 step 2}", 5)]
    assert _names([f"a.{i}" for i in (0, 2, 4, 6, 9)]) == [("a.{5 of 0..9}", 5)]
    assert _names(["a.7", "a.8"]) == [("a.{7..8}", 2)]


def test_a_different_shape_is_another_row() -> None:
    groups = collapse([("l.0.w", (4,)), ("l.1.w", (4,)), ("l.2.w", (8,))])
    assert [(group.name, group.key) for group in groups] == [("l.{0..1}.w", (4,)), ("l.2.w", (8,))]


def test_names_that_only_look_numbered_stay_as_they_are() -> None:
    names = ["a.{}", "a.0", "w1.x", "w2.x", "a.007.x", "a.²", "12", "a." + "9" * 40]
    assert [name for name, _ in _names(names)] == names
