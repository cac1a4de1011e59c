"""A fresh interpreter, and another user: what cannot be tested inside the process of the tests."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter, in the project's directory."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables}
    )


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked child; raises AssertionError with its traceback where it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer = ("returned", work())
        except BaseException:  # the parent tells it  # noqa: BLE001
            answer = ("raised", traceback.format_exc())
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(answer, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        kind, value = pickle.load(stream)  # noqa: S301 - our own child's
    os.waitpid(child, 0)
    assert kind == "returned", value
    return value


def as_ordinary_user(work: Callable[[], Any]) -> Any:
    """What `work` returns in a child that is not root, so that permissions hold."""

    def unprivileged() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        return work()

    return in_child(unprivileged)
