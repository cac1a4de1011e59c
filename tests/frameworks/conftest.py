"""All checkpoints of these tests, made once, by one start of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from nbmerge.demo import DemoCheckpoint, make_checkpoints
from tests.frameworks.recipes import EVERY
from tests.support.models import HAS_CONVERSIONS

_OF_TRANSFORMERS_5 = ("gemma4",)


class _Made(dict[str, DemoCheckpoint]):
    """The checkpoints that the installed transformers can make; a test of any other is skipped."""

    def __missing__(self, name: str) -> DemoCheckpoint:
        pytest.skip(f"transformers 4 has no {EVERY[name].arch}")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, DemoCheckpoint]:
    """The checkpoints by name. Takes as long as about five seconds of imports and a tenth for each."""
    root = tmp_path_factory.mktemp("frameworks")
    recipes = {name: each for name, each in EVERY.items() if HAS_CONVERSIONS or each.arch not in _OF_TRANSFORMERS_5}
    made = make_checkpoints({root / name: recipe for name, recipe in recipes.items()})
    return _Made(zip(recipes, made, strict=True))


@pytest.fixture(scope="session")
def whole_states(checkpoints: Mapping[str, DemoCheckpoint]):
    """The state dict of the model before it was sharded, by the checkpoint's name."""
    import torch

    return lambda name: torch.load(checkpoints[name].state, weights_only=True)
