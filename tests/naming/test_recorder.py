"""What the recorder writes down of a conversion on meta tensors makes, of real tensors, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nbmerge import expressions as ex
from nbmerge.expressions import Compute, Expr
from nbmerge.loaders.unpickle import load_torch_file
from nbmerge.naming.recorder import Recorder
from tests.support.results import bits, bits_of

T = torch.Tensor
Step = Callable[[T, T], object]  # of a [4, 6, 2] and a [4, 6, 2] tensor

VIEWS: dict[str, Step] = {
    "split": lambda a, b: a.split(2, 1),
    "split unevenly": lambda a, b: a.split(4, 1),
    "split by sizes": lambda a, b: torch.split(a, [1, 3, 2], dim=-2),
    "chunk": lambda a, b: a.chunk(3, dim=-2),
    "chunk unevenly": lambda a, b: a.chunk(4, dim=1),
    "tensor_split": lambda a, b: a.tensor_split(4, 1),
    "unbind": lambda a, b: a.unbind(),
    "unbind last": lambda a, b: a.unbind(-1),
    "slice": lambda a, b: a[1:3, 2:],
    "slice from the end": lambda a, b: a[-3:-1, :, -1:],
    "slice beyond the end": lambda a, b: a[2:99],
    "slice of nothing": lambda a, b: a[:, 3:3],
    "narrow": lambda a, b: a.narrow(1, 2, 3),
    "select": lambda a, b: a[2],
    "select from the end": lambda a, b: a.select(-1, -2),
    "transpose": lambda a, b: a.transpose(0, -1),
    "t": lambda a, b: a[0].t(),
    "T of a vector": lambda a, b: a[0, 0].t(),
    "mT": lambda a, b: a.mT,
    "permute": lambda a, b: a.permute(2, 0, -2),
    "movedim": lambda a, b: torch.movedim(a, 0, -1),
    "view": lambda a, b: a.view(2, 12, -1),
    "reshape": lambda a, b: a.reshape(-1),
    "reshape that copies": lambda a, b: a.transpose(0, 1).reshape(12, 4),
    "flatten": lambda a, b: a.flatten(1),
    "unflatten": lambda a, b: a.unflatten(1, (3, 2)),
    "squeeze": lambda a, b: a[:1, :, :1].squeeze(),
    "squeeze a dimension": lambda a, b: a[:1].squeeze(0),
    "squeeze dimensions": lambda a, b: a[:1, :, :1].squeeze((0, -1)),
    "squeeze what is wider": lambda a, b: a.squeeze(1),
    "unsqueeze": lambda a, b: a.unsqueeze(-1),
    "clone": lambda a, b: a.clone(),
    "contiguous": lambda a, b: a.transpose(0, 1).contiguous(),
    "detach": lambda a, b: a.detach(),
    "alias": lambda a, b: torch.ops.aten.alias(a),
    "cat": lambda a, b: torch.cat([a, b, a[:1]]),
    "cat of the last dimension": lambda a, b: torch.cat([a, b], dim=-1),
    "cat of one": lambda a, b: torch.cat([a]),
    "cat with nothing": lambda a, b: torch.cat([a[0, 0, :0], a, b]),
    "stack": lambda a, b: torch.stack([a, b]),
    "stack last": lambda a, b: torch.stack([a, b], -1),
    "a scalar": lambda a, b: torch.stack([a[0, 0, 0], b[1, 1, 1].t()]),
    "heads regrouped": lambda a, b: a.view(2, 2, 6, 2).transpose(1, 2).reshape(4, 6, 2),
    "experts merged and fused": lambda a, b: torch.cat([torch.stack(list(a)), torch.stack(list(b))], 1).transpose(1, 2),
}
MORE: dict[str, Step] = {
    "steps": lambda a, b: a[:, ::2],
    "flip": lambda a, b: a.flip(0),
    "roll": lambda a, b: a.roll(1, 1),
    "sum of two": lambda a, b: a + b,
    "scaled": lambda a, b: a * 2,
    "index_select": lambda a, b: torch.repeat_interleave(a, 2, 0),
    "expand": lambda a, b: a[:, :1].expand(4, 6, 2),
    "repeat": lambda a, b: a.repeat(2, 1, 1),
    "unfold": lambda a, b: a.unfold(0, 2, 1),
    "a part of what is computed": lambda a, b: (a.flip(1) + b).transpose(0, 1)[2:4].reshape(-1),
    "one of several that are computed": lambda a, b: torch.sort(a, 0)[0],
}


def outputs(step: Step, a: T, b: T) -> list[T]:
    made = step(a, b)
    return list(made) if isinstance(made, (tuple, list)) else [made]  # type: ignore[list-item]


def recorded(step: Step, dtype: torch.dtype = torch.float32) -> list[Expr]:
    with Recorder() as recorder:
        a, b = recorder.input("a", (4, 6, 2), dtype), recorder.input("b", (4, 6, 2), dtype)
        return [recorder.expr(made) for made in outputs(step, a, b)]


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float8_e4m3fn"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, T], dict[str, Expr]]:
    """Real tensors, and the same in a file."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(4, 6, 2).to(getattr(torch, request.param)) for name in "ab"}
    path = tmp_path_factory.mktemp("recorded") / "f.pt"
    torch.save(tensors, path)
    return tensors, load_torch_file(path)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_recorded_as_a_view_and_holds_the_same_bits(name: str, stored):
    tensors, files = stored
    rules = recorded(VIEWS[name])
    want = outputs(VIEWS[name], tensors["a"], tensors["b"])
    assert not any(isinstance(node, Compute) for rule in rules for node in ex.walk(rule)), "no bytes are computed"
    assert [bits_of(ex.substitute(rule, files)) for rule in rules] == [bits(tensor) for tensor in want]


@pytest.mark.parametrize("name", MORE)
def test_what_is_no_view_is_computed_and_holds_the_same_bits(name: str, stored):
    tensors, files = stored
    try:
        want = outputs(MORE[name], tensors["a"], tensors["b"])
    except (RuntimeError, NotImplementedError):
        pytest.skip(f"torch has no {name} of {tensors['a'].dtype}")
    rules = recorded(MORE[name])
    assert [bits_of(ex.substitute(rule, files)) for rule in rules] == [bits(tensor) for tensor in want]


def test_a_cast_is_recorded(stored):
    tensors, files = stored

    def step(a: T, b: T) -> T:
        return a.to(torch.float16)

    (rule,) = recorded(step)
    assert bits_of(ex.substitute(rule, files)) == bits(step(tensors["a"], tensors["b"]))


def test_tensors_of_two_dtypes_are_promoted_as_torch_promotes_them(tmp_path: Path):
    tensors = {"a": torch.randn(4, 6, 2), "b": torch.randn(4, 6, 2).bfloat16()}
    torch.save(tensors, tmp_path / "f.pt")
    files = load_torch_file(tmp_path / "f.pt")
    for step in (lambda a, b: torch.cat([b, a]), lambda a, b: torch.stack([b, a])):
        with Recorder() as recorder:
            made = step(recorder.input("a", (4, 6, 2), torch.float32), recorder.input("b", (4, 6, 2), torch.bfloat16))
            rule = recorder.expr(made)
        assert bits_of(ex.substitute(rule, files)) == bits(step(tensors["a"], tensors["b"]))


@pytest.mark.parametrize(
    "step",
    [lambda a, b: a.add_(b), lambda a, b: a.clone().zero_(), lambda a, b: a[0].copy_(b[0]), lambda a, b: a.mul_(2)],
    ids=["add_", "zero_", "copy_", "mul_"],
)
def test_a_change_in_place_is_refused_rather_than_recorded_wrong(step: Step):
    with pytest.raises(NotImplementedError, match="in place"):
        recorded(step)


def test_a_tensor_that_came_from_nowhere_has_no_expression():
    with Recorder() as recorder, pytest.raises(KeyError):
        recorder.expr(torch.empty(2, device="meta"))


def test_an_operation_that_gives_another_dtype_than_was_recorded_is_told(stored):
    _, files = stored
    wrong = Compute("wrong", lambda a: a.double(), (files["a"],), (4, 6, 2), files["a"].dtype)
    with pytest.raises(TypeError, match=r"wrong gave torch\.float64, its plan says"):
        bits_of(wrong)
