"""What every test has: few examples by default, and fixtures that are costly to make twice."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.support import scratch

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a test runs on each core: threads that wait for each other spin
# jsonschema, which nbformat asks, builds 38 parsers of addresses with it when it is imported, and does without it.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # what Python takes for: not installed
# Where transformers keeps copies of a model's own code: not in the home directory, and one for all tests of a process,
# as the first one that is imported from stays Python's package `transformers_modules`.
os.environ["HF_MODULES_CACHE"] = str(scratch.new_directory("modules"))

_QUIET = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
settings.register_profile("quick", max_examples=60, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.register_profile("thorough", max_examples=1500, deadline=None, suppress_health_check=_QUIET, print_blob=True)
settings.load_profile(os.environ.get("NBMERGE_HYPOTHESIS", "quick"))


# Tests whose fixtures are costly to make, and which one worker therefore runs together. (pytest-xdist's own
# `xdist_group` has no effect under pytest 9.2, which makes a test's id anew each time.)
_TOGETHER = ("tests/frameworks/", "tests/browser/", "tests/test_demo.py")


# Tests that take longest, or wait for other processes. They start first, so that no worker is left alone with them.
_FIRST = ("tests/test_notebooks.py", "tests/browser/", "tests/test_demo.py", "tests/frameworks/")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the process that started the workers, or the only one
        scratch.remove()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: browsers, kernels and servers let their worker wait."""
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spreads tests over the workers one by one, but for those that belong together."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((path for path in _TOGETHER if nodeid.startswith(path)), nodeid)

    return Together(config, log)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory):
    """Makes, once for each name, the directory that `save_pretrained` writes of a tiny random model."""
    from tests.support.models import save_tiny_model

    made: dict[str, object] = {}

    def get(name: str):
        if name not in made:
            made[name] = save_tiny_model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A small FSDP2 checkpoint of a tiny Llama."""
    from tests.support.models import write_model_world

    return write_model_world(tmp_path / "run" / "actor", "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A target that does not exist."""
    return tmp_path / "out"


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    """A real IPython shell in a directory of its own, with the magics."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    InteractiveShell.clear_instance()
    made = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}), colors="NoColor")
    made.run_cell("%load_ext nbmerge").raise_error()
    yield made
    InteractiveShell.clear_instance()
