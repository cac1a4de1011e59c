"""Reads error messages: every error of ours says what, where and the fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nbmerge.errors import NbmergeError


def refusal(error: type[BaseException], work: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The message with which `work(*args, **kwargs)` is refused. It must be of exactly this class, and be short."""
    with pytest.raises(error) as caught:
        work(*args, **kwargs)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {caught.value}"
    message = str(caught.value)
    if isinstance(caught.value, NbmergeError):
        assert message.count("\n") < 40
    return message


def assert_says(message: str, *words: str) -> None:
    """Every one of the words is in the message; a failure shows the message."""
    absent = [word for word in words if word.lower() not in message.lower()]
    assert not absent, f"{absent} not in:\n{message}"
