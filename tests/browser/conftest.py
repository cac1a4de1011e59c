"""Servers and a browser that the tests of this directory share: starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.lab import Lab, browser, lab
from tests.support.models import write_model_world


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    with browser() as made:
        yield made


@pytest.fixture(scope="package", params=["light", "dark"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, str]]:
    """A server in each theme."""
    with lab(tmp_path_factory.mktemp("lab"), request.param) as made:
        yield made, request.param


@pytest.fixture(scope="package")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with a checkpoint beside its notebooks."""
    root = tmp_path_factory.mktemp("lab")
    write_model_world(root / "actor", "qwen2")
    with lab(root, "light") as server:
        yield server
