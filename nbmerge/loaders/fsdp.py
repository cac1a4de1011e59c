"""Per-rank FSDP checkpoints: `model_world_size_N_rank_R.pt`, the layout of verl's FSDPCheckpointManager.

And `pytorch_model_fsdp_0_rankR.bin`, Accelerate's LOCAL_STATE_DICT, whose names do not say how many ranks there are.
FSDP1 and FSDP2, on any device mesh or none, written by any torch from 2.4 on.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbmerge.errors import (
    CheckpointError,
    InconsistentCheckpointError,
    OptionError,
    Problem,
    UnsupportedCheckpointError,
    listing,
    plural,
)
from nbmerge.layout import Checkpoint, LazyTensor, MeshAxis, SourceFile
from nbmerge.loaders.assemble import Assembler, global_shape, override
from nbmerge.loaders.base import Loader, OpenOptions, Overrides, config_directory, index_error
from nbmerge.loaders.fsdp_files import ROLES, RankDirectory
from nbmerge.loaders.pieces import BoxPiece, MeshPiece, Piece, piece_of
from nbmerge.loaders.reading import read_files
from nbmerge.loaders.unpickle import load_torch_file

_FLAT_PARAMETER = re.compile(r"(^|\.)_?flat_param(_\d+)?$")


class FSDPLoader(Loader):
    """Opens per-rank FSDP checkpoints."""

    name = "fsdp"
    recognises = "pytorch_model_fsdp_0_rankR.bin or model_world_size_N_rank_R.pt"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        found = RankDirectory.scan(directory)
        words = [_in_words(found.files["model", n]) for n in found.world_sizes]
        if words and (directory / "fsdp_config.json").is_file():
            words.append("fsdp_config.json")
        return tuple(words)

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        found = RankDirectory.scan(directory.absolute())  # so that a later change of directory does not matter
        world_size, weights = found.weights()
        version = _fsdp_version(directory, world_size)
        _check_overrides(options.overrides, world_size)
        states = _read_all(weights, options)
        _refuse_flat_parameters(states[0], weights[0])
        config_dir = options.config_dir or config_directory(directory)
        pieces, objects, problems = _pieces_by_name(states, weights)
        found.refuse_lost_last(_ranks_of(pieces))
        if options.overrides.placements:
            pieces = _overridden(pieces, options.overrides)
        tensors, unassembled = _assemble(pieces, world_size, config_dir, options)
        if problems + unassembled:
            raise index_error(problems + unassembled, directory)
        return Checkpoint(
            path=directory,
            backend=self.name,
            layout=f"FSDP{version}, a file for each rank" if version else "FSDP, a file for each rank",
            tensors=tensors,
            world_size=world_size,
            files=_source_files(found),
            config_dir=config_dir,
            mesh=_common_mesh(tensors),
            evidence=self.evidence(directory),
            notes=_notes(found, objects),
            overrides=options.overrides.as_record(),
        )


def _in_words(ranks: Mapping[int, Path]) -> str:
    """`4 × model_world_size_4_rank_*.pt`."""
    pattern = re.sub(r"(rank_?)\d+(?=\.\w+$)", r"\1*", next(iter(ranks.values())).name)
    return f"{len(ranks)} × {pattern}"


def _fsdp_version(directory: Path, world_size: int) -> int | None:
    path = directory / "fsdp_config.json"
    if not path.is_file():  # verl before 0.5 wrote none
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        said, version = config.get("world_size", world_size), config.get("FSDP_version")
        version = None if version is None else int(version)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"fsdp_config.json is not as verl writes it: {error}",
            where=str(path),
            fix="delete it: the file names say enough",
        ) from error
    if said != world_size:
        raise InconsistentCheckpointError(
            f"fsdp_config.json says world size {said}, the files say {world_size}",
            where=str(directory),
            why="files of two checkpoints were mixed",
            fix="copy the directory again from the machine that trained",
        )
    return version


def _check_overrides(overrides: Overrides, world_size: int) -> None:
    mesh = overrides.mesh_shape
    if overrides.placements and mesh is None:
        raise OptionError("--placements needs --mesh_shape", fix=f"for example --mesh_shape {world_size}")
    if mesh is None:
        if overrides.mesh_dim_names:
            raise OptionError("--mesh_dim_names needs --mesh_shape and --placements", fix="give all three, or none")
        return
    size = 1
    for length in mesh:
        size *= length
    if size != world_size:
        raise OptionError(
            f"--mesh_shape {mesh} has {size} ranks, the checkpoint has {world_size}",
            fix="give the sizes of the device mesh, outermost first",
        )
    if overrides.mesh_dim_names and len(overrides.mesh_dim_names) != len(mesh):
        raise OptionError(f"{len(overrides.mesh_dim_names)} --mesh_dim_names for a mesh of {len(mesh)} dimensions")
    for pattern, placements in overrides.placements.items():
        if len(placements) != len(mesh):
            raise OptionError(
                f"--placements gives {plural(len(placements), 'placement')} for {pattern!r}, "
                f"the mesh has {len(mesh)} dimensions",
                fix="give one placement for each mesh dimension",
            )
    if not overrides.placements:
        raise OptionError(
            "--mesh_shape needs --placements", why="the sizes alone do not say how a tensor lies on the mesh",
            fix='a JSON file such as {"*": ["Shard(0)"]}, one placement for each mesh dimension',
        )  # fmt: skip


def _read_all(weights: Mapping[int, Path], options: OpenOptions) -> dict[int, Mapping[str, Any]]:
    """The state dict of each rank, tensors as byte ranges. Files are read in parallel."""

    def read(path: Path) -> Mapping[str, Any]:
        state = load_torch_file(path, trust_pickle=options.trust_pickle)
        if not isinstance(state, Mapping):
            raise UnsupportedCheckpointError(
                f"the file holds a {type(state).__name__}, not a state dict", where=str(path),
                fix="pass the directory of a checkpoint's model files",
            )  # fmt: skip
        return state

    return read_files(weights, options, read)


def _refuse_flat_parameters(state: Mapping[str, Any], path: Path) -> None:
    flat = [name for name in state if _FLAT_PARAMETER.search(str(name))]
    if flat:
        raise UnsupportedCheckpointError(
            f"the file holds {plural(len(flat), 'flat parameter')} ({listing(flat, shown=2)}) that cannot be cut",
            where=str(path),
            why="FSDP1's LOCAL_STATE_DICT stores each wrapped module as one flat vector, without the names and "
            "shapes of its parameters",
            fix="load it in the training job and save with StateDictType.SHARDED_STATE_DICT "
            "(or FULL_STATE_DICT), or save from FSDP2",
        )


def _pieces_by_name(
    states: Mapping[int, Mapping[str, Any]], weights: Mapping[int, Path]
) -> tuple[dict[str, dict[int, Piece]], list[str], list[Problem]]:
    """Pieces of each tensor by rank, names of entries that are no tensors, and what could not be read."""
    pieces: dict[str, dict[int, Piece]] = {}
    objects: dict[str, None] = {}
    problems: list[Problem] = []
    for rank, state in states.items():
        for name, value in state.items():
            try:
                piece = piece_of(value, rank, f"{name} in {weights[rank]}")
            except CheckpointError as error:
                problems.append(error.problem)
                continue
            if piece is None:
                objects[str(name)] = None
            else:
                pieces.setdefault(str(name), {})[rank] = piece
    return pieces, list(objects), problems


def _ranks_of(pieces: Mapping[str, Mapping[int, Piece]]) -> int:
    """How many ranks the tensors lie on, by what their pieces say of the mesh; 0 where none does."""
    every = (piece for by_rank in pieces.values() for piece in by_rank.values())
    return max((piece.ranks for piece in every if isinstance(piece, (MeshPiece, BoxPiece))), default=0)


def _overridden(pieces: dict[str, dict[int, Piece]], overrides: Overrides) -> dict[str, dict[int, Piece]]:
    """The pieces with the user's mesh and placements, where a pattern names the tensor."""
    mesh = overrides.mesh_shape or ()
    names = overrides.mesh_dim_names or tuple(f"dim{i}" for i in range(len(mesh)))
    result = dict(pieces)
    unused = {pattern for pattern in overrides.placements if pattern != "*"}  # for the rest, if there is any
    for name, by_rank in pieces.items():
        pattern = next((pattern for pattern in overrides.placements if fnmatch.fnmatchcase(name, pattern)), None)
        if pattern is None:
            continue
        unused.discard(pattern)
        placements = overrides.placements[pattern]
        free = {rank: piece for rank, piece in by_rank.items() if not isinstance(piece, BoxPiece)}
        if len(free) < len(by_rank):
            raise OptionError(
                f"--placements names {name}, a ShardedTensor",
                why="its file says of each piece where it lies, and nothing is left to decide",
                fix="give patterns of the other tensors only",
            )
        try:
            shape = global_shape(by_rank, mesh, placements)
        except ValueError as error:
            raise OptionError(
                f"--placements does not fit {name}: {error}",
                fix='give it a pattern of its own, before the others: {"…": ["Replicate"], "*": ["Shard(0)"]}',
            ) from error
        result[name] = {rank: override(piece, names, mesh, placements, rank, shape) for rank, piece in free.items()}
    if unused:
        raise OptionError(
            f"--placements: {listing(map(repr, sorted(unused)), shown=5)} decides on no tensor",
            why="no name fits the pattern, or a pattern before it fits them all",
            fix="the first pattern that fits a name holds; put the general ones last",
        )
    return result


def _assemble(
    pieces: Mapping[str, Mapping[int, Piece]], world_size: int, config_dir: Path | None, options: OpenOptions
) -> tuple[dict[str, LazyTensor], list[Problem]]:
    model: list[Any] = []  # made once, and only if some tensor's bytes don't decide

    def expected(name: str) -> tuple[int, ...] | None:
        if not model:
            model.append(options.shapes(config_dir))
        shapes = model[0]
        return None if shapes is None else shapes.expected_shape(name)

    sharded = any(isinstance(piece, (MeshPiece, BoxPiece)) for ranks in pieces.values() for piece in ranks.values())
    assembler = Assembler(world_size, sharded, expected)
    tensors: dict[str, LazyTensor] = {}
    problems: list[Problem] = []
    for name, by_rank in pieces.items():
        made = assembler.assemble(name, by_rank)
        if isinstance(made, Problem):
            problems.append(made)
        else:
            tensors[name] = made
    return tensors, problems


def _source_files(found: RankDirectory) -> tuple[SourceFile, ...]:
    return tuple(
        SourceFile.of(path, ROLES[role])
        for (role, _), ranks in found.files.items()
        for _, path in sorted(ranks.items())
    )


def _notes(found: RankDirectory, objects: list[str]) -> tuple[str, ...]:
    notes = [
        f"{plural(len(ranks), f'{ROLES[role]} file')} left alone"
        for (role, _), ranks in found.files.items()
        if role != "model"
    ]
    if objects:
        notes.append(f"{plural(len(objects), 'entry')} without a tensor left alone: {listing(objects)}")
    return tuple(notes)


def _common_mesh(tensors: Mapping[str, LazyTensor]) -> tuple[MeshAxis, ...]:
    """The mesh with the most dimensions (under TP the norms lie on a part of it), then with the most bytes."""
    weight: Counter[tuple[MeshAxis, ...]] = Counter()
    for tensor in tensors.values():
        weight[tensor.mesh] += tensor.nbytes
    return max(weight, key=lambda mesh: (len(mesh), weight[mesh]), default=())
