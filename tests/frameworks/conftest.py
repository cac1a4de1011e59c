"""All checkpoints of these tests, made once, by one start of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from nbmerge.demo import DemoCheckpoint, Recipe, make_checkpoints
from tests.frameworks.recipes import EVERY
from tests.support.models import HAS_CONVERSIONS
from tests.support.worlds import IS_TORCH_2_7

_OF_TRANSFORMERS_5 = ("gemma4",)


def _why_not(recipe: Recipe) -> str:
    """Why the installed frameworks cannot make it; empty where they can."""
    if recipe.arch in _OF_TRANSFORMERS_5 and not HAS_CONVERSIONS:
        return f"transformers 4 has no {recipe.arch}"
    if (
        recipe.has_tp and not recipe.is_megatron and not recipe.config and not IS_TORCH_2_7
    ):  # the model's own dimensions are odd
        return "torch 2.6 cannot shard by FSDP what tensor parallelism has cut unevenly"
    return ""


class _Made(dict[str, DemoCheckpoint]):
    """The checkpoints that the installed transformers can make; a test of any other is skipped."""

    def __missing__(self, name: str) -> DemoCheckpoint:
        pytest.skip(_why_not(EVERY[name]))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, DemoCheckpoint]:
    """The checkpoints by name. Takes as long as about five seconds of imports and a tenth for each."""
    root = tmp_path_factory.mktemp("frameworks")
    recipes = {name: recipe for name, recipe in EVERY.items() if not _why_not(recipe)}
    made = make_checkpoints({root / name: recipe for name, recipe in recipes.items()})
    return _Made(zip(recipes, made, strict=True))


@pytest.fixture(scope="session")
def whole_states(checkpoints: Mapping[str, DemoCheckpoint]):
    """The state dict of the model before it was sharded, by the checkpoint's name."""
    import torch

    return lambda name: torch.load(checkpoints[name].state, weights_only=True)
