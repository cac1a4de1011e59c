"""Tells safetensors files that hold one rank's pieces of tensors from those that hold whole tensors.

torch.distributed.checkpoint's HuggingFaceStorageWriter writes `shard-00001-model-00001-of-00002.safetensors`, with the
offsets of the pieces in the header. Where it saves whole tensors, their names are a model's and all offsets 0.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from nbmerge.geometry import Shape

SHARD = re.compile(r"shard-(\d+)-(.+)\.safetensors")
SHARDING = "DCP_SHARDING_INFO"  # torch.distributed.checkpoint._hf_utils.CUSTOM_METADATA_KEY
_BEGINNING = 2**16  # bytes; safetensors writes the metadata first
_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
UNREADABLE = (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError)


def is_shard_of_ranks(file: Path) -> bool:
    """Whether a safetensors file holds one rank's pieces. One that cannot be read is left to whoever reads it."""
    if SHARD.fullmatch(file.name):
        return True
    try:
        return any(any(offsets) for offsets in saved_offsets(file).values())
    except UNREADABLE:
        return False


def saved_offsets(file: Path) -> dict[str, Shape]:
    """Where each piece of the file begins in its tensor, by name; empty where the header speaks of no pieces.

    Raises one of UNREADABLE for a header that says it in another way.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _LONGEST_HEADER or SHARDING.encode() not in (begin := stream.read(min(length, _BEGINNING))):
            return {}
        metadata = json.loads(begin + stream.read(length - len(begin)))["__metadata__"]
    pieces = json.loads(metadata[SHARDING])
    return {name: tuple(map(int, piece["saved_offsets"])) for name, piece in pieces.items()}


def begins_as_safetensors(file: Path) -> bool:
    """Whether a file of any name begins as a safetensors file does: eight bytes of a length, then a JSON object."""
    try:
        if not file.is_file():
            return False
        with file.open("rb") as stream:
            return stream.read(9)[8:] == b"{"
    except (OSError, ValueError):
        return False
