"""What one rank stored of one tensor, read off the stand-ins of its pickle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from nbmerge.dtypes import DType
from nbmerge.errors import CorruptFileError, UnsupportedCheckpointError
from nbmerge.expressions import Stored
from nbmerge.geometry import REPLICATE, Box, Placement, Shape, unravel
from nbmerge.loaders import standins


@dataclass(frozen=True, slots=True)
class PlainPiece:
    """A tensor without any word on how it was sharded."""

    stored: Stored


@dataclass(frozen=True, slots=True)
class MeshPiece:
    """A DTensor: the local tensor, the global shape, and the tensor's own mesh and placements.

    coordinate: where the rank stands on the mesh; order: which mesh dimensions cut which tensor dimension, in
    order, where the file says so.
    """

    stored: Stored
    shape: Shape
    mesh_names: tuple[str, ...]
    mesh_shape: Shape
    coordinate: Shape
    placements: tuple[Placement, ...]
    order: Mapping[int, tuple[int, ...]] | None

    @property
    def ranks(self) -> int:
        """How many ranks the tensor lies on."""
        return prod(self.mesh_shape)


@dataclass(frozen=True, slots=True)
class BoxPiece:
    """A ShardedTensor: the global shape, and the boxes that this rank holds. ranks: that hold any of it, at least."""

    shape: Shape
    dtype: DType
    held: tuple[tuple[Box, Stored], ...]
    ranks: int = 0


Piece = PlainPiece | MeshPiece | BoxPiece


def piece_of(value: Any, rank: int, where: str) -> Piece | None:
    """What a value of a state dict is; None for one that is no tensor.

    Raises CorruptFileError for a stand-in without the fields that a placement needs.
    """
    if isinstance(value, Stored):
        return PlainPiece(value)
    try:
        if isinstance(value, standins.DTensor):
            return _mesh_piece(value, rank)
        if isinstance(value, standins.ShardedTensor):
            return _box_piece(value)
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(
            error.problem.what, where=where, why=error.problem.why, fix=error.problem.fix
        ) from error
    except (
        TypeError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        OverflowError,
        MemoryError,
    ) as error:
        raise CorruptFileError(
            f"the sharding of this tensor cannot be read: {error}",
            where=where,
            why="its pickled DTensor or ShardedTensor lacks what a placement needs",
            fix="pass --mesh_shape and --placements, or report the torch version that wrote it",
        ) from error
    return None


def _mesh_piece(value: standins.DTensor, rank: int) -> MeshPiece:
    local, spec = value.get("_local_tensor"), value.get("_spec")
    if not isinstance(local, Stored):
        raise ValueError("no local tensor")
    meta = spec.get("tensor_meta")
    shape = tuple(int(n) for n in (meta.args[0] if meta is not None and meta.args else value.get("size")))
    placements = tuple(_placement(placement) for placement in spec.get("placements"))
    names, mesh_shape, coordinate = _mesh(spec.get("mesh"), rank)
    if len(placements) != len(mesh_shape):
        raise ValueError(f"{len(placements)} placements on a mesh of shape {mesh_shape}")
    order = None
    entries = spec.get("shard_order")
    if entries and not any(placement.split_factor > 1 for placement in placements):
        order = {int(dim): tuple(map(int, dims)) for dim, dims in (_order_entry(entry) for entry in entries)}
    return MeshPiece(local, shape, names, mesh_shape, coordinate, placements, order)


def _order_entry(entry: standins.ShardOrderEntry) -> tuple[Any, Any]:
    if entry.args:
        return entry.args[0], entry.args[1]
    return entry.get("tensor_dim"), entry.get("mesh_dims")


def _placement(value: Any) -> Placement:
    if isinstance(value, standins.Replicate):
        return REPLICATE
    if isinstance(value, standins.StridedShard):
        return Placement("shard", int(value.get("dim")), int(value.get("split_factor")))
    if isinstance(value, standins.Shard):
        return Placement("shard", int(value.get("dim")))
    if isinstance(value, standins.Partial):
        raise UnsupportedCheckpointError(
            "a tensor was saved as partial sums",
            why="a Partial placement is a value before its reduction; the ranks' parts are no parameter",
            fix="redistribute it to Shard or Replicate before saving",
        )
    raise ValueError(f"unknown placement {value!r}")


def _mesh(mesh: standins.DeviceMesh, rank: int) -> tuple[tuple[str, ...], Shape, Shape]:
    """Names, sizes and the rank's coordinate, from any of the three forms that torch has pickled.

    torch to 2.9: `mesh`, a tensor of ranks; 2.10 and 2.11: `_layout` with shape and stride;
    2.12 on: `_layout.axes`, a layout for each dimension.
    """
    ranks = mesh.get("mesh")
    if isinstance(ranks, Stored):
        shape = ranks.shape
    else:
        layout = mesh.get("_layout")
        axes = layout.get("axes")
        shape = tuple(_size(axis.get("shape")) for axis in axes) if axes is not None else _sizes(layout)
    names = mesh.get("mesh_dim_names", "_mesh_dim_names") or tuple(f"dim{i}" for i in range(len(shape)))
    coordinate = mesh.get("_coordinate_on_dim")
    if coordinate is None and isinstance(ranks, Stored):
        coordinate = unravel(_small_int_tensor(ranks).index(rank), shape)
    if coordinate is None:
        raise ValueError("the mesh does not say where the rank stands on it")
    names, coordinate = tuple(map(str, names)), tuple(map(int, coordinate))
    if not len(names) == len(shape) == len(coordinate):
        raise ValueError(f"names {names} and coordinate {coordinate} on a mesh of shape {shape}")
    if not all(0 <= at < size for at, size in zip(coordinate, shape, strict=True)):
        raise ValueError(f"coordinate {coordinate} lies outside the mesh of shape {shape}")
    return names, shape, coordinate


def _sizes(layout: Any) -> Shape:
    shape = layout.get("shape")
    return tuple(_size(size) for size in (shape if isinstance(shape, tuple) else (shape,)))


def _size(size: Any) -> int:
    """A mesh dimension's size; a dimension that was flattened from several has one for each."""
    return prod(_size(part) for part in size) if isinstance(size, (tuple, list)) else int(size)


def _small_int_tensor(stored: Stored) -> list[int]:
    """The values of a mesh's rank tensor: layout, not weights. Raises ValueError for one that is not contiguous."""
    if not stored.is_contiguous:
        raise ValueError("the mesh's ranks are a strided view")
    fd = os.open(stored.file, os.O_RDONLY)
    try:
        data = os.pread(fd, stored.nbytes, stored.offset)
    finally:
        os.close(fd)
    size = stored.dtype.itemsize
    return [int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)]


def _box_piece(value: standins.ShardedTensor) -> BoxPiece:
    state = value.get("state")  # (local shards, metadata, process group state, sharding spec, init_rrefs)
    shards, metadata = state[0], state[1]
    shape = metadata.get("size")
    if shape is None:
        shape = value.get("size")
    held = tuple((_metadata_box(shard.get("metadata")), shard.get("tensor")) for shard in shards)
    if not all(isinstance(stored, Stored) for _, stored in held):
        raise ValueError("a local shard without a tensor")
    return BoxPiece(tuple(map(int, shape)), value.get("dtype"), held, len(metadata.get("shards_metadata") or ()))


def _metadata_box(metadata: standins.ShardMetadata) -> Box:
    offsets, sizes = metadata.get("shard_offsets"), metadata.get("shard_sizes")
    return Box(tuple(map(int, offsets)), tuple(map(int, sizes)))
