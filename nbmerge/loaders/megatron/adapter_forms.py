"""How the tensor parallel ranks cut adapters of Megatron-Bridge, in memory and in an index.

Source: megatron/bridge/peft/utils.py (ParallelLinearAdapter and its sharded_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from nbmerge.errors import Problem, listing
from nbmerge.expressions import Stored
from nbmerge.geometry import Box, Shape, with_dim
from nbmerge.loaders.megatron.settings import Settings

# One adapter of one projection: Megatron-Bridge saves it as if it were gate and up in one (its swiglu factory).
_SPLIT = re.compile(r"\.linear_fc1\.adapter\.adapter_(?:gate|up)\.linear_out\.weight$")

Held = tuple[int, Box, Stored]
"""What a rank stored of a tensor: the rank, the box, and where its bytes are."""


def adapter_cut_dim(base: str, part: str) -> int:
    """The dimension that tensor parallel ranks cut. base: the adapted module, `linear_qkv`; part: `linear_in`, …

    B lies in pieces of its rows on every rank, whatever it adapts; A in pieces of its rank, or, before a layer whose
    input is in pieces, of its columns.
    """
    return 1 if part == "linear_in" and base in ("linear_proj", "linear_fc2") else 0


def fused_halves(rows: int, ranks: int, down: Shape | None, settings: Settings) -> int | None:
    """2 where B of linear_fc1 is [gate; up] on each rank, 1 where there is no gate; None where nothing says it.

    rows: of one rank; down: the shape of linear_fc2's A on one rank, if it is adapted.
    """
    width = down[1] if down is not None and len(down) == 2 else None
    if width is not None and rows in (width, 2 * width):
        return 2 if rows == 2 * width else 1
    names = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_hidden_size")
    sizes = [size for name in names if (size := settings.config_size(name)) is not None]
    if any(rows * ranks == 2 * size for size in sizes):
        return 2
    return 1 if any(rows * ranks == size for size in sizes) else None


def in_order(name: str, held: Sequence[Held], shape: Shape) -> list[Held] | Problem:
    """What is stored of a tensor of an index, at the places where its rows belong.

    An adapter of the gate or the up projection alone is saved in halves, like both in one: the first half of each
    rank's rows, of all ranks, then the second halves.
    """
    dim = len(shape) - 2
    starts = sorted({box.offset[dim] for _, box, _ in held}) if dim >= 0 else []
    if not _SPLIT.search(name) or len(starts) <= 2:  # of one rank, both halves are where they belong
        return list(held)
    ranks, odd = divmod(len(starts), 2)
    lengths = {box.shape[dim] for _, box, _ in held}
    if odd or len(lengths) > 1:
        return Problem(
            f"{name} is in {len(starts)} pieces of its rows, of lengths {listing(map(str, sorted(lengths)))}",
            why="Megatron-Bridge saves an adapter of one projection in two equal halves for each tensor parallel rank",
            fix="export the adapter in the training job",
            kind="unsupported",
        )
    (length,) = lengths
    places = {start: ((number % ranks) * 2 + number // ranks) * length for number, start in enumerate(starts)}
    return [
        (rank, Box(with_dim(box.offset, dim, places[box.offset[dim]]), box.shape), stored) for rank, box, stored in held
    ]
