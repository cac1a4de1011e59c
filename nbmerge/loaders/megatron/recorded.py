"""What a run recorded of itself beside its weights: verl's transformer_config.json, or Megatron-LM's arguments.

The arguments are in common.pt, or, from core 0.19 on and with Megatron-FSDP, in an object of the index. None of it is
needed for the weights: what cannot be read, or may not be, is a note.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbmerge.errors import CheckpointError, UnsafePickleError
from nbmerge.layout import Stated
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.dcp.metadata import Index, StoredObject
from nbmerge.loaders.dcp.storage import read_object
from nbmerge.loaders.megatron.directories import Place
from nbmerge.loaders.megatron.pickles import ALLOWED, saved_arguments
from nbmerge.loaders.unpickle import load_torch_file

_COMMON = "common.pt"

Recorded = tuple[Stated, tuple[str, ...]]
"""What is said, and notes on what could not be read."""

NOTHING: Recorded = (Stated(), ())


def beside_weights(place: Place, options: OpenOptions) -> Recorded:
    """What a file beside the weights of a distributed checkpoint says."""
    if place.transformer_config.values:
        return place.transformer_config, ()
    path = place.weights / _COMMON
    if not path.is_file():
        return NOTHING
    return _arguments(str(path), lambda: load_torch_file(path, allowed=ALLOWED, trust_pickle=options.trust_pickle))


def in_index(directory: Path, index: Index, options: OpenOptions) -> Recorded:
    """What an object of the index says: `common_state`, of core 0.19 on, or `args`, of Megatron-FSDP."""
    for name, place in index.objects.items():
        if place is not None and (name == "args" or name.startswith("common_state/")):

            def read(place: StoredObject = place, *, alone: bool = name == "args") -> Any:
                value = read_object(directory, place, ALLOWED, trust_pickle=options.trust_pickle)
                if alone:
                    return {"args": value}
                return value[0] if isinstance(value, list) and len(value) == 1 else value

            return _arguments(f"{directory / place.file}: {name}", read)
    return NOTHING


def _arguments(where: str, read: Callable[[], Any]) -> Recorded:
    try:
        found: Mapping[str, Any] = saved_arguments(read())
    except (CheckpointError, UnsafePickleError, OSError) as error:
        said = getattr(error, "problem", None)
        return Stated(), (
            f"what the run recorded of its model was not compared with config.json: {where} cannot be read "
            f"({said.what if said else error})",
        )
    return (Stated(found, where), ()) if found else NOTHING
