"""A Hub on the loopback device, and a client that may talk to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support.hub_server import TOKEN, Hub, running_hub
from tests.support.models import save_tiny_model, write_model_world


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The server. The client's large-file road is LFS: xet has none to a server of one's own."""
    import huggingface_hub.utils as utils
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    impatient = SimpleNamespace(**{name: getattr(time, name) for name in dir(time)})
    impatient.sleep = lambda seconds: None  # the client waits longer and longer before it tries again
    monkeypatch.setattr("huggingface_hub.utils._http.time", impatient)
    close = getattr(utils, "close_session", lambda: None)  # made anew, and not offline
    close()
    with running_hub() as state:
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        urls = state.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", urls)
        # where the client of 0.34 keeps a copy
        monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", urls, raising=False)
        yield state
    close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory as save_pretrained leaves it."""
    return save_tiny_model("qwen2", tmp_path / "model", "bfloat16")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A step of a run."""
    return write_model_world(tmp_path / "run" / "global_step_40" / "actor", "qwen2", dtype="bfloat16")
