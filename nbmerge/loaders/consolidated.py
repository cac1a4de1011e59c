"""The scalars of a save that torch consolidated, from the ranks' files beside it.

HuggingFaceStorageWriter(enable_consolidation=True) leaves the ranks' files in `sharded/`. Its consolidation writes no
bytes of a tensor without dimensions, so that 3.0 becomes 0.0 (torch 2.13, _consolidate_hf_safetensors.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nbmerge.expressions import Stored
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.dcp.shards import read_shards
from nbmerge.loaders.rank_shards import is_shard_of_ranks

SHARDED = "sharded"


def scalars_of_shards(directory: Path, tensors: Mapping[str, Stored], options: OpenOptions) -> dict[str, Stored]:
    """The tensors of shape [] that the ranks' files below the directory hold as well; empty without such files.

    Raises CorruptFileError and IncompleteCheckpointError for those files, where there are such tensors.
    """
    scalars = [name for name, stored in tensors.items() if not stored.shape]
    folder = directory / SHARDED
    if not scalars or not any(map(is_shard_of_ranks, folder.glob("*.safetensors"))):
        return {}
    located = read_shards(folder, options).located
    first = {name: located[name][0][2] for name in scalars if name in located}
    return {name: stored for name, stored in first.items() if (stored.shape, stored.dtype) == ((), tensors[name].dtype)}
