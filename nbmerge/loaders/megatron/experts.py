"""Expert tensor parallelism: how many shards an expert has, which no file name says.

The files that share an expert parallel rank are the shards of its experts, or copies of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nbmerge.errors import Problem, listing
from nbmerge.expressions import Stored
from nbmerge.geometry import Box
from nbmerge.loaders.megatron.grid import Grid
from nbmerge.loaders.megatron.names import Held
from nbmerge.loaders.megatron.settings import Settings

_PROBED = 1 << 20  # bytes of each copy that are read to tell copies from shards


@dataclass(frozen=True, slots=True)
class ExpertShards:
    """count: tensor parallel shards of each expert; note: how that was found out, where nothing said it."""

    count: int
    note: str = ""


def expert_shards(down: Mapping[str, list[Held]], grid: Grid, settings: Settings) -> ExpertShards | Problem:
    """How many shards the experts have.

    down: linear_fc2 weights of experts, [hidden, width / shards] on each rank. The arguments decide, else the width
    in config.json, else the bytes of one expert.
    """
    if not down:
        return ExpertShards(1)
    name, held = next(iter(down.items()))
    most = max(_tensor_ranks(grid).values())
    said = settings.argument("expert_tensor_parallel_size")
    local, width = next(reversed(held[0].stored.shape), 0), settings.expert_width
    if said is None and width is not None and local and width % local == 0 and grid.tp % (width // local) == 0:
        said = width // local
    if said is None and width == 2 * local and most == 1:
        said = 2  # the second shards would have the names of the first
    if said is not None:
        return _if_all_there(said, grid, name)
    if most == 1:
        return ExpertShards(1)
    return _by_bytes(name, held, grid)


def _tensor_ranks(grid: Grid) -> dict[tuple[int, int], int]:
    """How many files share each (stage, expert rank)."""
    counts: dict[tuple[int, int], int] = {}
    for at in grid.files:
        counts[at.pp, at.ep] = counts.get((at.pp, at.ep), 0) + 1
    return counts


def _if_all_there(shards: int, grid: Grid, name: str) -> ExpertShards | Problem:
    """Every (stage, expert rank) must have a file for each shard."""
    held: dict[tuple[int, int], set[int]] = {}
    for at in grid.files:
        held.setdefault((at.pp, at.ep), set()).add(at.tp % shards)
    short = [key for key, found in held.items() if len(found) < shards]
    if not short and grid.tp % shards == 0:
        return ExpertShards(shards)
    return Problem(
        f"each expert has {shards} tensor parallel shards, which {grid.tp} tensor parallel ranks do not hold",
        where=listing(f"pipeline stage {pp}, expert rank {ep}" for pp, ep in short or held) + f"; for example {name}",
        why="files are missing, or expert tensor parallelism is over tensor parallelism: then ranks of one name "
        "wrote one file after the other",
        fix="copy the missing files; else save with --ckpt-format torch_dist",
        kind="missing",
    )


def _by_bytes(name: str, held: list[Held], grid: Grid) -> ExpertShards:
    """The fewest shards with which the files that would hold the same one do."""
    first = [one for one in held if (one.at.pp, one.at.ep) == (held[0].at.pp, held[0].at.ep)]
    for shards in range(1, grid.tp):
        if grid.tp % shards:
            continue
        groups: dict[int, list[Stored]] = {}
        for one in first:
            groups.setdefault(one.at.tp % shards, []).append(one.stored)
        if all(starts_alike(group) for group in groups.values()):
            break
    else:
        shards = grid.tp
    found = "copies of each expert" if shards == 1 else f"{shards} shards of each expert"
    return ExpertShards(
        shards, f"the files of one expert rank hold {found}: told by comparing the bytes of {name}, as nothing says it"
    )


def starts_alike(tensors: Iterable[Stored], limit: int = _PROBED) -> bool:
    """Whether the tensors, of one shape, begin with the same bytes. Reads at most `limit` bytes of each."""
    from nbmerge.engine.lower import blocks
    from nbmerge.engine.read import read
    from nbmerge.engine.sources import LocalFiles

    first, *others = tensors
    region = next(blocks(first.shape, first.dtype.itemsize, limit), Box.whole(first.shape))
    with LocalFiles() as sources:
        want = read(first, region, sources)
        return all(one.shape == first.shape and bool((read(one, region, sources) == want).all()) for one in others)
