"""Megatron's older grouped experts: all experts of a rank in `weight1` and `weight2`, inputs before outputs.

They become the two stacked tensors that the distributed format has: `experts.experts.linear_fc1.weight`
[experts, 2 * width, hidden] and `experts.experts.linear_fc2.weight` [experts, hidden, width].
Source of the layout: megatron/core/transformer/moe/experts.py, GroupedMLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from nbmerge.errors import Problem
from nbmerge.expressions import Stored
from nbmerge.geometry import Shape
from nbmerge.loaders.megatron.files import COPY_AGAIN
from nbmerge.loaders.megatron.grid import Grid
from nbmerge.loaders.megatron.names import Held
from nbmerge.loaders.megatron.parallel import TensorCut
from nbmerge.loaders.megatron.settings import Settings

_NAME = re.compile(r"((?:.*\.)?experts\.)weight([12])")


@dataclass(frozen=True)
class Stack:
    """A stacked tensor: its name, what each file holds as [experts of the rank, rows, columns], and how that is cut
    over the shards of an expert. local: experts of a rank.
    """

    name: str
    held: list[Held]
    cut: TensorCut
    local: int


def take_grouped(tensors: dict[str, list[Held]]) -> dict[str, dict[str, list[Held]]]:
    """Removes `weight1` and `weight2` from the tensors and returns them, as {"1": …, "2": …}, by what is before."""
    found: dict[str, dict[str, list[Held]]] = {}
    for name in list(tensors):
        if match := _NAME.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = tensors.pop(name)
    return found


def stacks(
    prefix: str, pair: Mapping[str, list[Held]], routers: Mapping[str, list[Held]], grid: Grid, settings: Settings
) -> list[Stack] | Problem:
    """Both stacked tensors of a layer, from its two grouped ones."""
    if len(pair) < 2:
        return Problem(f"{prefix}weight{next(iter(pair))} is alone: weight1 and weight2 belong together",
                       fix=COPY_AGAIN, kind="missing")  # fmt: skip
    up, down = pair["1"], pair["2"]
    router = routers.get(f"{prefix.removesuffix('experts.')}router.weight")
    experts = next(iter(router[0].stored.shape), 0) if router else settings.expert_count
    local = (experts or 0) // grid.ep
    if not local or experts != local * grid.ep:
        return Problem(
            f"{prefix}weight1 holds several experts, and nothing says how many: "
            f"{experts or 'no'} experts on {grid.ep} expert parallel ranks",
            why="the router's rows, the arguments or config.json tell the number of experts",
            fix="pass --hf_model_config_path DIR, with this model's config.json", kind="ambiguous",
        )  # fmt: skip
    shapes = up[0].stored.shape, down[0].stored.shape
    halves = _halves(shapes, local)
    if halves is None or not all(one.stored.is_contiguous for one in (*up, *down)):
        return Problem(
            f"{prefix}weight1 has {list(shapes[0])} and weight2 {list(shapes[1])}, which {local} experts do not fit",
            why="[hidden, experts * 2 * width] and [experts * width, hidden] belong together, stored row by row",
            fix="check that config.json is this model's, or copy the files again", kind="contradiction",
        )  # fmt: skip
    return [
        Stack(f"{prefix}experts.linear_fc1.weight", list(_transposed(up, shapes[0][0], local, first=True)),
              TensorCut(1, halves), local),
        Stack(f"{prefix}experts.linear_fc2.weight", list(_transposed(down, shapes[0][0], local, first=False)),
              TensorCut(2), local),
    ]  # fmt: skip


def _halves(shapes: tuple[Shape, Shape], local: int) -> int | None:
    """2 where weight1 has gate and up projection, 1 where it has one; None where the two do not fit."""
    up, down = shapes
    if len(up) != 2 or len(down) != 2 or up[0] != down[1] or down[0] % local or 0 in up + down:
        return None
    halves, rest = divmod(up[1], down[0])
    return halves if halves in (1, 2) and not rest else None


def _transposed(held: list[Held], hidden: int, local: int, *, first: bool) -> Iterator[Held]:
    """weight1.view(n, hidden, -1).transpose(1, 2), or weight2.view(n, -1, hidden).transpose(1, 2)."""
    for one in held:
        width = one.stored.numel // (local * hidden)
        if first:
            shape, strides = (local, width, hidden), (hidden * width, 1, width)
        else:
            shape, strides = (local, hidden, width), (hidden * width, 1, hidden)
        yield replace(one, stored=_seen_as(one.stored, shape, strides))


def _seen_as(stored: Stored, shape: Shape, strides: Shape) -> Stored:
    return replace(stored, _shape=shape, strides=strides)
