"""Puts what the ranks stored of one tensor together: one lazy tensor, or the problem that prevents it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from nbmerge.errors import Problem, listing
from nbmerge.explaining.table import likely_cause
from nbmerge.expressions import Expr, Paste, Stored
from nbmerge.geometry import Box, Placement, Shape, local_box, tiling_faults, unravel
from nbmerge.layout import Chunk, LazyTensor, MeshAxis
from nbmerge.loaders.pieces import BoxPiece, MeshPiece, Piece, PlainPiece

Opinion = TypeVar("Opinion")
Who = TypeVar("Who")


@dataclass(frozen=True)
class Assembler:
    """Assembles the tensors of one checkpoint of `world_size` ranks.

    expected: the global shape that the model's config demands for a name, where there is a config;
    has_meshes: whether any tensor of the checkpoint is a DTensor or ShardedTensor, so that a plain one is whole.
    """

    world_size: int
    has_meshes: bool
    expected: Callable[[str], Shape | None]

    def assemble(self, name: str, pieces: Mapping[int, Piece]) -> LazyTensor | Problem:
        """One tensor from the pieces of all ranks, by rank."""
        if problem := self._disagreement(name, pieces):
            return problem
        first = next(iter(pieces.values()))
        if isinstance(first, MeshPiece):
            return self._on_mesh(name, {r: p for r, p in pieces.items() if isinstance(p, MeshPiece)})
        if isinstance(first, BoxPiece):
            return self._from_boxes(name, {r: p for r, p in pieces.items() if isinstance(p, BoxPiece)})
        return self._plain(name, {r: p.stored for r, p in pieces.items() if isinstance(p, PlainPiece)})

    def _disagreement(self, name: str, pieces: Mapping[int, Piece]) -> Problem | None:
        absent = [rank for rank in range(self.world_size) if rank not in pieces]
        if absent:
            return Problem(
                f"{name} is missing from {len(absent)} of {self.world_size} ranks",
                where=f"rank {listing(absent)}",
                why="every rank stores every tensor, or an empty piece of it",
                fix="copy the files of these ranks again; they may be of another step",
                kind="missing",
            )
        for what, of in (("kind", _kind), ("dtype", _dtype), ("shape", _shape), ("placement", _placements)):
            if problem := disagreement(name, what, ((of(piece), rank) for rank, piece in pieces.items())):
                return problem
        return self._twice_in_one_place(name, pieces)

    def _twice_in_one_place(self, name: str, pieces: Mapping[int, Piece]) -> Problem | None:
        """Two ranks at one coordinate of a mesh that all ranks are on: one file is a copy of the other."""
        places: dict[Shape, int] = {}
        for rank, piece in pieces.items():
            if not isinstance(piece, MeshPiece) or prod(piece.mesh_shape) != self.world_size:
                return None
            other = places.setdefault(piece.coordinate, rank)
            if other != rank:
                return Problem(
                    f"{name}: ranks {other} and {rank} both stand at {list(piece.coordinate)} of the mesh",
                    where=piece.stored.file,
                    why="one file is a copy of the other under another rank's name",
                    fix="copy the file of that rank again from the machine that trained",
                    kind="contradiction",
                )
        return None

    def _on_mesh(self, name: str, pieces: Mapping[int, MeshPiece]) -> LazyTensor | Problem:
        found: list[tuple[int, Box, Stored]] = []
        for rank, piece in pieces.items():
            order = None if piece.order is None else {dim: list(dims) for dim, dims in piece.order.items()}
            try:
                box = local_box(piece.shape, piece.placements, piece.mesh_shape, piece.coordinate, order)
            except ValueError as error:
                return Problem(f"the placements of {name} make no sense: {error}", where=f"rank {rank}",
                               kind="contradiction")  # fmt: skip
            if box.shape != piece.stored.shape:
                return Problem(
                    f"{name}: rank {rank} holds {list(piece.stored.shape)} where its placements put {list(box.shape)}",
                    where=piece.stored.file,
                    why=f"global shape {list(piece.shape)}, mesh {piece.mesh_shape}, at {piece.coordinate}, "
                    + ", ".join(map(str, piece.placements))
                    + likely_cause(name, [piece.stored.shape], box.shape, prod(piece.mesh_shape)),
                    fix="if the mesh or the placements in the file are wrong, pass --mesh_shape and --placements",
                    kind="contradiction",
                )
            found.append((rank, box, piece.stored))
        any_piece = next(iter(pieces.values()))
        mesh = tuple(
            MeshAxis(axis, size, str(placement))
            for axis, size, placement in zip(
                any_piece.mesh_names, any_piece.mesh_shape, any_piece.placements, strict=True
            )
        )
        return paste(name, any_piece.shape, found, mesh)

    def _from_boxes(self, name: str, pieces: Mapping[int, BoxPiece]) -> LazyTensor | Problem:
        found: list[tuple[int, Box, Stored]] = []
        for rank, piece in pieces.items():
            for box, stored in piece.held:
                if box.shape != stored.shape:
                    return Problem(
                        f"{name}: rank {rank} holds {list(stored.shape)} where its metadata says {list(box.shape)}",
                        where=stored.file,
                        why="the file is damaged or was edited",
                        fix="copy it again from the machine that trained",
                        kind="contradiction",
                    )
                found.append((rank, box, stored))
        axes = (MeshAxis("ranks", self.world_size, f"Shard({_cut_dimension(box for _, box, _ in found)})"),)
        return paste(name, next(iter(pieces.values())).shape, found, axes)

    def _plain(self, name: str, stored: Mapping[int, Stored]) -> LazyTensor | Problem:
        """A tensor without a word on its sharding: whole on every rank, or (old checkpoints) row shards.

        With DTensors beside it, it was not sharded: FSDP leaves buffers whole. Else the config's shape decides.
        """
        shapes = {rank: tensor.shape for rank, tensor in stored.items()}
        whole = shapes[0]
        same = len(set(shapes.values())) == 1
        rows = _row_sharded_shape(list(shapes.values()))
        wanted = self.expected(name) if self.world_size > 1 and not (self.has_meshes and same) else None
        if self.world_size == 1 or whole == () or (same and (self.has_meshes or wanted == whole)):
            axes = (MeshAxis("ranks", self.world_size, "Replicate"),) if self.world_size > 1 else ()
            return paste(name, whole, [(r, Box.whole(whole), s) for r, s in stored.items()], axes)
        if rows is not None and (wanted == rows or (wanted is None and not same)):
            at, found = 0, []
            for rank, tensor in stored.items():
                found.append((rank, Box((at, *(0,) * (len(rows) - 1)), tensor.shape), tensor))
                at += tensor.shape[0]
            return paste(name, rows, found, (MeshAxis("ranks", self.world_size, "Shard(0)"),))
        held = f"{list(whole)} on each of {self.world_size} ranks" if same else _shapes_in_words(shapes)
        if wanted is not None:
            return Problem(
                f"{name}: the ranks hold {held}, and the config demands {list(wanted)}",
                why="neither one copy nor their rows put together have that shape"
                + likely_cause(name, [whole] if rows is None else [rows, whole], wanted, self.world_size),
                fix="check that the config is this model's; else say how it lies: --mesh_shape and --placements FILE",
                kind="contradiction",
            )
        return Problem(
            f"{name}: the ranks hold {held}, and nothing says whether these are copies or row shards",
            why="plain tensors carry no placement, and no config says what shape this one has",
            fix="pass --hf_model_config_path DIR, or --mesh_shape and --placements FILE",
            kind="ambiguous",
        )


def override(piece: PlainPiece | MeshPiece, names: tuple[str, ...], mesh: Shape, placements: tuple[Placement, ...],
             rank: int, shape: Shape) -> MeshPiece:  # fmt: skip
    """The piece as the user says it lies: ranks in row-major order on the mesh."""
    return MeshPiece(piece.stored, shape, names, mesh, unravel(rank, mesh), placements, None)


def global_shape(pieces: Mapping[int, Piece], mesh: Shape, placements: tuple[Placement, ...]) -> Shape:
    """The shape of the whole tensor, from the local ones along each mesh dimension that shards it.

    Raises ValueError for a placement on a dimension that the tensor does not have.
    """
    first = next(iter(pieces.values()))
    if isinstance(first, (MeshPiece, BoxPiece)):
        return first.shape
    shape = list(first.stored.shape)
    for dim in {placement.dim for placement in placements if placement.kind == "shard"}:
        if dim >= len(shape):
            raise ValueError(f"Shard({dim}) of a tensor of shape {shape}")
        cut = [i for i, placement in enumerate(placements) if placement.dim == dim]
        seen: dict[Shape, int] = {}
        for rank, piece in pieces.items():
            coordinate = unravel(rank, mesh)
            if isinstance(piece, PlainPiece) and all(coordinate[i] == 0 for i in range(len(mesh)) if i not in cut):
                seen[tuple(coordinate[i] for i in cut)] = piece.stored.shape[dim]
        shape[dim] = sum(seen.values())
    return tuple(shape)


def disagreement(name: str, what: str, opinions: Iterable[tuple[Opinion, int]]) -> Problem | None:
    """The problem that two ranks say different things of a tensor. opinions: each with the rank that has it."""
    two = two_opinions(opinions)
    if not two:
        return None
    (a, a_ranks), (b, b_ranks) = two
    return Problem(
        f"the ranks disagree on the {what} of {name}: {a} and {b}",
        where=f"rank {listing(a_ranks)}; rank {listing(b_ranks)}",
        why="the files of the ranks are not of one save",
        fix="copy all ranks' files again from one step",
        kind="contradiction",
    )


def two_opinions(said: Iterable[tuple[Opinion, Who]]) -> tuple[tuple[Opinion, list[Who]], ...]:
    """The first two values that are said, each with those who say it; empty where all say the same."""
    found: dict[Opinion, list[Who]] = {}
    for value, who in said:
        found.setdefault(value, []).append(who)
    return tuple(found.items())[:2] if len(found) > 1 else ()


def paste(
    name: str, shape: Shape, found: Iterable[tuple[int, Box, Stored]], mesh: tuple[MeshAxis, ...]
) -> LazyTensor | Problem:
    """A tensor from boxes; the same box of several ranks is kept once, the others as its replicas."""
    by_box: dict[Box, list[tuple[int, Stored]]] = {}
    for rank, box, stored in found:
        by_box.setdefault(box, []).append((rank, stored))
    chunks = tuple(
        Chunk(box, copies[0][1], copies[0][0], tuple(copies[1:]))
        for box, copies in sorted(by_box.items(), key=lambda item: item[0].offset)
    )
    faults = tiling_faults(shape, by_box)
    if faults:
        return Problem(
            f"the pieces of {name} do not make up {list(shape)}: {listing(faults)}",
            why="a rank's piece is missing, or the placements are not those of this save",
            fix="copy all ranks' files again from one step",
            kind="missing",
        )
    filled = [chunk for chunk in chunks if chunk.box.numel]
    dtype = chunks[0].stored.dtype
    expr: Expr
    if len(filled) == 1:
        expr = filled[0].stored
    else:
        expr = Paste(shape, dtype, tuple((chunk.box.offset, chunk.stored) for chunk in filled))
    return LazyTensor(name, expr, chunks, mesh)


def _row_sharded_shape(shapes: list[Shape]) -> Shape | None:
    """The shape of all rows together, or None where the tensors differ in more than their rows."""
    if any(not shape for shape in shapes) or len({shape[1:] for shape in shapes}) > 1:
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _shapes_in_words(shapes: Mapping[int, Shape]) -> str:
    groups: dict[Shape, list[int]] = {}
    for rank, shape in shapes.items():
        groups.setdefault(shape, []).append(rank)
    return listing(f"{list(shape)} (rank {listing(ranks)})" for shape, ranks in groups.items())


def _cut_dimension(boxes: Iterable[Box]) -> int:
    """The dimension along which the boxes' offsets differ; 0 where there is one box."""
    offsets = [box.offset for box in boxes]
    dims = range(len(offsets[0])) if offsets else ()
    return next((dim for dim in dims if len({offset[dim] for offset in offsets}) > 1), 0)


def _kind(piece: Piece) -> str:
    return {MeshPiece: "DTensor", BoxPiece: "ShardedTensor", PlainPiece: "plain tensor"}[type(piece)]


def _dtype(piece: Piece) -> str:
    if isinstance(piece, BoxPiece):
        return str(piece.dtype)
    return str(piece.stored.dtype)


def _shape(piece: Piece) -> Shape | None:
    return None if isinstance(piece, PlainPiece) else piece.shape


def _placements(piece: Piece) -> str:
    if not isinstance(piece, MeshPiece):
        return ""
    return f"{', '.join(map(str, piece.placements))} on {piece.mesh_shape}"
