"""Memory that a thread uses again for every piece: fresh memory costs more, page by page, than what is done in it."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

_OWN = threading.local()


def scratch(name: str, dtype: npt.DTypeLike, length: int) -> npt.NDArray[Any]:
    """An array of this thread's own with whatever is left in it; the same name gives the same memory.

    It is freed with its thread.
    """
    arrays: dict[str, npt.NDArray[Any]] = _OWN.__dict__.setdefault("arrays", {})
    found = arrays.get(name)
    if found is None or len(found) < length or found.dtype != dtype:
        found = arrays[name] = np.empty(length, dtype)
    return found[:length]
