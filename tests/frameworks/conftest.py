"""All checkpoints of these tests, made once, by one start of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from nbmerge.demo import DemoCheckpoint, make_checkpoints
from tests.frameworks.recipes import EVERY


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, DemoCheckpoint]:
    """The checkpoints by name. Takes as long as about five seconds of imports and a tenth for each."""
    root = tmp_path_factory.mktemp("frameworks")
    made = make_checkpoints({root / name: recipe for name, recipe in EVERY.items()})
    return dict(zip(EVERY, made, strict=True))


@pytest.fixture(scope="session")
def whole_states(checkpoints: Mapping[str, DemoCheckpoint]):
    """The state dict of the model before it was sharded, by the checkpoint's name."""
    import torch

    return lambda name: torch.load(checkpoints[name].state, weights_only=True)
