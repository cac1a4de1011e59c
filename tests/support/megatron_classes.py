"""Classes that pickles of Megatron name: importable only while one is written, as megatron is not installed."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

MODULE = "megatron.core.dist_checkpointing.strategies.torch"


@contextmanager
def megatron_classes() -> Iterator[Mapping[str, Any]]:
    """torch's Metadata and SavePlan, and Megatron's subclasses of them, by name.

    While open, `MODULE` and its parents are in sys.modules, unless the real ones are.
    """
    from torch.distributed.checkpoint.metadata import Metadata
    from torch.distributed.checkpoint.planner import SavePlan

    made = {
        "MCoreMetadata": type("MCoreMetadata", (Metadata,), {"__module__": MODULE}),
        "MCoreSavePlan": type("MCoreSavePlan", (SavePlan,), {"__module__": MODULE}),
    }
    names = [MODULE[:end] for end in range(len(MODULE) + 1) if MODULE[end : end + 1] in (".", "")]
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for name, cls in made.items():
        setattr(sys.modules[MODULE], name, cls)
    try:
        yield {"Metadata": Metadata, "SavePlan": SavePlan, **made}
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
