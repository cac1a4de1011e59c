"""A server and a browser that the tests of this directory share: starting one takes seconds."""

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


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with a checkpoint beside its notebooks."""
    root = tmp_path_factory.mktemp("lab")
    write_model_world(root / "actor", "qwen2")
    with lab(root) as made:
        yield made


@pytest.fixture(params=["light", "dark"])
def served(request: pytest.FixtureRequest, server: Lab) -> tuple[Lab, str]:
    """The server in each theme."""
    server.wear(request.param)
    return server, request.param


@pytest.fixture
def working(server: Lab) -> Lab:
    """The server in the light theme."""
    server.wear("light")
    return server
