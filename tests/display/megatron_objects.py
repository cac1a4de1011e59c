"""Megatron checkpoints made from their dataclasses alone: one copy of everything in .distcp files, rank files, zarr."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Expr, Paste, Stored
from nbmerge.geometry import Box, contiguous_strides
from nbmerge.layout import Checkpoint, Chunk, LazyTensor, MeshAxis

from .objects import checkpoint

TP, PP, EP = MeshAxis("tp", 2, "tensors"), MeshAxis("pp", 2, "layers"), MeshAxis("ep", 2, "experts")


def pieces(
    name: str, shape: Sequence[int], grid: Sequence[int], mesh: Mapping[str, int], holders: Mapping[int, Sequence[int]],
    *, file: str = "/run/dist_ckpt/__{rank}_0.distcp",
) -> LazyTensor:  # fmt: skip
    """A tensor in an even grid of pieces. mesh: name → dimension that it cuts, for axes of 2; -1 for Replicate.

    holders: of each piece by its number in row-major order, the ranks; the first is the chunk's.
    file: where it lies, with {rank} and {at}.
    """
    extent = tuple(size // count for size, count in zip(shape, grid, strict=True))
    chunks = []
    for number, at in enumerate(itertools.product(*map(range, grid))):
        box = Box(tuple(i * step for i, step in zip(at, extent, strict=True)), extent)
        first, *others = (_stored(rank, extent, file, at) for rank in holders[number])
        ranks = holders[number]
        chunks.append(Chunk(box, first, ranks[0], tuple(zip(ranks[1:], others, strict=True))))
    expr: Expr = chunks[0].stored
    if len(chunks) > 1:
        placed = tuple((chunk.box.offset, chunk.stored) for chunk in chunks)
        expr = Paste(tuple(shape), BY_NAME["bfloat16"], placed)
    axes = tuple(MeshAxis(axis, 2, "Replicate" if dim < 0 else f"Shard({dim})") for axis, dim in mesh.items())
    return LazyTensor(name, expr, tuple(chunks), axes)


def _stored(rank: int, shape: tuple[int, ...], file: str, at: tuple[int, ...]) -> Stored:
    path = file.format(rank=rank, at=".".join(map(str, at)))
    return Stored(path, 64, shape, contiguous_strides(shape), BY_NAME["bfloat16"])


def torch_dist() -> Checkpoint:
    """Four layers and four experts on tp=2 × pp=2 with ep=2 inside: stacked, gate and up halves apart."""
    stage = {layer: layer // 2 * 2 for layer in range(4)}  # the first rank of its pipeline stage
    qkv = {n: [stage[n // 2] + n % 2] for n in range(8)}
    fc1 = {n: [stage[n // 4] + n % 2] for n in range(16)}
    experts = {n: [stage[n // 4] + n % 4 // 2] for n in range(16)}
    held = (
        pieces("embedding.word_embeddings.weight", (152, 8), (2, 1), {"tp": 0}, {0: [0], 1: [1]}),
        pieces("decoder.layers.self_attention.linear_qkv.weight", (4, 24, 8), (4, 2, 1), {"pp": 0, "tp": 1}, qkv),
        pieces("decoder.layers.mlp.linear_fc1.weight", (4, 32, 8), (4, 4, 1), {"pp": 0, "tp": 1}, fc1),
        pieces("decoder.layers.mlp.experts.experts.linear_fc2.weight", (4, 4, 8, 6), (4, 4, 1, 1),
               {"pp": 0, "ep": 1}, experts),
        pieces("decoder.final_layernorm.weight", (8,), (1,), {}, {0: [2]}),
    )  # fmt: skip
    return _checkpoint(*held, layout="Megatron torch_dist", mesh=(PP, EP, TP), world_size=4)


def rank_files() -> Checkpoint:
    """Two layers of two experts each on tp=2 × pp=2 × ep=2: a file for each of eight ranks, numbered by pp, ep, tp."""
    held = []
    for layer in range(2):
        first, path = 4 * layer, f"decoder.layers.{layer}."
        qkv = {tp: [first + tp, first + 2 + tp] for tp in range(2)}
        held.append(_of_ranks(path + "self_attention.linear_qkv.weight", (24, 8), (2, 1), {"tp": 0}, qkv))
        everywhere = {0: [first + n for n in range(4)]}
        held.append(_of_ranks(path + "pre_mlp_layernorm.weight", (8,), (1,), {"tp": -1}, everywhere))
        for expert in range(2):
            halves = {n: [first + 2 * expert + n % 2] for n in range(4)}
            held.append(_of_ranks(f"{path}mlp.experts.linear_fc1.weight{expert}", (12, 8), (4, 1), {"etp": 0}, halves))
    return _checkpoint(*held, layout="Megatron-LM, a file for each rank", mesh=(PP, EP, TP), world_size=8)


def _of_ranks(
    name: str, shape: Sequence[int], grid: Sequence[int], mesh: Mapping[str, int], holders: Mapping[int, Sequence[int]]
) -> LazyTensor:
    return pieces(name, shape, grid, mesh, holders, file="/run/mp_rank_00_{rank:03}/model_optim_rng.pt")


def zarr() -> Checkpoint:
    """A stacked tensor in zarr's chunk files, which say nothing of ranks."""
    name = "decoder.layers.self_attention.linear_proj.weight"
    held = pieces(
        name, (4, 8, 8), (4, 1, 2), {"pp": 0, "tp": 2}, {n: [0] for n in range(8)}, file=f"/run/{name}/{{at}}"
    )
    return _checkpoint(replace(held, ranked=False), layout="Megatron zarr", mesh=(PP, TP), world_size=4)


def _checkpoint(*held: LazyTensor, **changes: Any) -> Checkpoint:
    notes = ("52 pickled objects (extra states and the like) left alone",)
    return checkpoint(*held, backend="megatron", names="megatron", notes=notes, path=Path("/run"), **changes)
