"""`where`: which file, rank and byte an element of a tensor comes from."""

from __future__ import annotations

import difflib
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nbmerge.dtypes import DType
from nbmerge.errors import OptionError, listing, plural
from nbmerge.expressions import Cast, Compute, Expr, Fill, Paste, Permute, Reshape, Slice, Stored
from nbmerge.geometry import Box, Shape, ravel, unravel
from nbmerge.layout import Checkpoint, Chunk, LazyTensor
from nbmerge.opening import PathLike, merge_options, open_checkpoint, plan_merge
from nbmerge.options import OPEN_ONLY, OPEN_OPTIONS
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.shown import Displayed

Index = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Copy:
    """The same element as another rank stored it: rank, file, and the offset of its first byte there."""

    rank: int
    file: Path
    offset: int


@dataclass(frozen=True, repr=False)
class Location(Displayed):
    """Where one element of a tensor is stored.

    name, shape, index: the tensor that was asked for, and the element in it; dtype: of the tensor that was asked for.
    source: the checkpoint's tensor that holds the element; source_index: the element in that; file, offset, nbytes:
    the bytes, from `offset` of the file on; stored_dtype: what they are; rank: which wrote them, as the files say;
    box: the part of the source that this rank stored; shard_index: the element in that part; copies: of other ranks;
    steps: what happens to the element on its way (`cast from float32 to bfloat16`).

    Where no file has the element (a constant, or what an operation makes of several), `file` is None, and `steps`
    says so; `inputs` are then the elements or tensors that the operation takes.
    """

    name: str
    shape: Shape
    index: Shape
    dtype: DType
    source: str = ""
    source_index: Shape = ()
    file: Path | None = None
    offset: int = 0
    nbytes: int = 0
    stored_dtype: DType | None = None
    rank: int | None = None
    box: Box | None = None
    shard_index: Shape = ()
    copies: tuple[Copy, ...] = ()
    steps: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        element = f"{self.name}{list(self.index)}"
        if self.file is None:
            return f"{element} is in no file: {'; '.join(self.steps)}"
        by = f" of rank {self.rank}" if self.rank is not None else ""
        return f"{element} is at byte {self.offset:,} of {self.file.name}{by}, {self.nbytes} bytes"


def where(
    checkpoint: Checkpoint | MergePlan | MergeReport | PathLike,
    name: str,
    index: Index,
    *,
    progress: bool | None = None,
    **options: Any,
) -> Location:
    """Where an element comes from: file, rank, byte offset, and its place in that rank's shard. Reads no tensor data.

        at = nbmerge.where("global_step_100/actor", "model.norm.weight", 7)
        at.file, at.offset, at.rank                # (…/model_world_size_8_rank_0.pt, 4352, 0)

    name: the checkpoint's own, or, where a config is there, the name that a merge gives it; of a plan, or with
    an option that changes what a merge writes (`dtype=`), what is written under it comes first. index: a tuple with a
    number for each dimension, or one number that counts row by row; negative ones count from the end. options: the
    keywords of `nbmerge.merge` that open and plan a checkpoint.

    Raises OptionError for a name, an index or an option that is not there, and what `open_checkpoint` raises.
    """
    check_name(name)
    given = merge_options(options).given()
    opened, plan = _opened(checkpoint, options, given, progress)
    planning = {key: value for key, value in options.items() if key not in OPEN_ONLY}
    changing = given.keys() - set(OPEN_OPTIONS)  # what a merge with these options changes, the checkpoint's own has not
    has_config = opened.config_dir is not None or "hf_model_config_path" in given
    if plan is None and (changing or (name not in opened.tensors and has_config)):
        plan = plan_merge(opened, progress=progress, **planning)
    outputs = {} if plan is None else {each: tensor.expr for each, tensor in plan.tensors.items()}
    tied = {} if plan is None else {tie.name: tie.kept for tie in plan.ties}
    if name in outputs:
        return locate(opened, name, outputs[name], index)
    if name in opened.tensors:
        return locate(opened, name, opened.tensors[name].expr, index)
    if tied.get(name) in outputs:
        found = locate(opened, name, outputs[tied[name]], index)
        return replace(found, steps=(f"tied to {tied[name]}, which is the one that is written", *found.steps))
    raise unknown_name(name, [*opened.tensors, *outputs])


def check_name(name: object) -> None:
    """Raises OptionError for what is no name of a tensor; None is left to the caller."""
    if name is not None and not isinstance(name, str):
        raise OptionError(f"name={name!r} is no name", fix="the name of a tensor as text, e.g. 'model.norm.weight'")


def _opened(
    source: Any, options: Mapping[str, Any], given: Mapping[str, Any], progress: bool | None
) -> tuple[Checkpoint, MergePlan | None]:
    if isinstance(source, MergeReport):
        source = source.plan
    if isinstance(source, MergePlan):
        if given:
            raise OptionError(f"{', '.join(given)} cannot change a plan", fix="pass the checkpoint instead")
        return source.checkpoint, source
    if isinstance(source, Checkpoint):
        if late := [key for key in given if key in OPEN_ONLY]:
            raise OptionError(f"{', '.join(late)} cannot change an opened checkpoint", fix="pass it to open_checkpoint")
        return source, None
    if not isinstance(source, (str, os.PathLike)):
        raise OptionError(
            f"a {type(source).__name__} is no checkpoint", fix="pass a directory, an opened checkpoint or a plan"
        )
    opening = {key: value for key, value in options.items() if key in OPEN_OPTIONS}
    return open_checkpoint(source, progress=progress, **opening), None


def unknown_name(name: str, names: Sequence[str]) -> OptionError:
    """The error for a name that neither the checkpoint nor its merge has, with the names that are near."""
    near = difflib.get_close_matches(name, names[:20_000], n=3, cutoff=0.5) or list(names[:3])
    return OptionError(f"there is no tensor {name!r}", fix=f"for example {listing(near)}" if near else "")


def locate(checkpoint: Checkpoint, name: str, expr: Expr, index: Index) -> Location:
    """The location of one element of an expression over the checkpoint's stored bytes. Raises OptionError."""
    at = checked_index(index, expr.shape, name)
    found = Location(name, expr.shape, at, expr.dtype)
    steps: list[str] = []
    leaf, place = _leaf(expr, at, steps)
    if isinstance(leaf, Stored):
        offset = leaf.offset + sum(i * s for i, s in zip(place, leaf.strides, strict=True)) * leaf.dtype.itemsize
        size = leaf.dtype.itemsize
        found = replace(found, file=Path(leaf.file), offset=offset, nbytes=size, stored_dtype=leaf.dtype)
        found = _owned(found, checkpoint, leaf)
    elif isinstance(leaf, Fill):
        steps.append(f"the constant {leaf.value:g}, which no file holds")
    elif isinstance(leaf, Compute):
        steps.append(f"made by {leaf.name} from {len(leaf.inputs)} tensors")
        found = replace(found, inputs=tuple(_input_names(leaf, checkpoint)))
    return replace(found, steps=tuple(steps))


def checked_index(index: Index, shape: Shape, name: str) -> Shape:
    """The index as a number for each dimension, from 0 on. Raises OptionError for one outside of the tensor."""
    try:
        flat = operator.index(index)  # type: ignore[arg-type]
        given: Shape = (flat,)
        sizes: Shape = (Box.whole(shape).numel,)
        is_flat = len(shape) != 1
    except TypeError:
        given, sizes, is_flat = _as_tuple(index), shape, False
    if len(given) != len(sizes):
        raise OptionError(
            f"index {list(given)} has {plural(len(given), 'number')}; {name} has shape {list(shape)}",
            fix=_index_words(shape),
        )
    if any(not -size <= i < size for i, size in zip(given, sizes, strict=True)):
        raise OptionError(
            f"index {given[0] if is_flat else list(given)} is outside of {name}, which has shape {list(shape)}",
            fix="each number is below its dimension's size; negative ones count from the end"
            if sizes and all(sizes)
            else "the tensor has no elements",
        )
    at = tuple(i + size if i < 0 else i for i, size in zip(given, sizes, strict=True))
    return unravel(at[0], shape) if is_flat else at


def _index_words(shape: Shape) -> str:
    """What an index is for a tensor of the shape."""
    if not shape:
        return "give (), for a tensor without dimensions"
    rows = ", or one that counts row by row" if shape[1:] else ""
    return f"give {plural(len(shape), 'number')}{rows}"


def _as_tuple(index: Any) -> Shape:
    try:
        return tuple(operator.index(i) for i in index)
    except TypeError as error:
        raise OptionError(
            f"{index!r} is no index", fix="a number, or a tuple with a number for each dimension, e.g. (3, 7)"
        ) from error


def _leaf(expr: Expr, index: Shape, steps: list[str]) -> tuple[Expr, Shape]:
    """The node that has the element, and its index there. Notes in `steps` what changes the element."""
    while True:
        if isinstance(expr, Slice):
            index = tuple(i + start for i, start in zip(index, expr.box.offset, strict=True))
        elif isinstance(expr, Permute):
            source = [0] * len(index)
            for i, dim in zip(index, expr.dims, strict=True):
                source[dim] = i
            index = tuple(source)
        elif isinstance(expr, Reshape):
            index = unravel(ravel(index, expr.shape), expr.source.shape)
        elif isinstance(expr, Cast):
            steps.append(f"cast from {expr.source.dtype} to {expr.to}")
        elif isinstance(expr, Paste):
            expr, index = _part(expr, index)
            continue
        else:
            return expr, index
        expr = expr.source


def _part(paste: Paste, index: Shape) -> tuple[Expr, Shape]:
    element = Box(index, (1,) * len(index))
    for offset, part in paste.parts:
        if Box(offset, part.shape).intersect(element) is not None:
            return part, element.relative_to(offset).offset
    raise OptionError(f"no part of the tensor holds {list(index)}", fix="report it: a paste that does not tile")


def _owned(found: Location, checkpoint: Checkpoint, leaf: Stored) -> Location:
    """The location with the checkpoint's tensor and chunk that the bytes belong to."""
    for tensor in _with_name_first(checkpoint, found.name):
        for chunk in tensor.chunks:
            for rank, stored in ((chunk.rank, chunk.stored), *chunk.replicas):
                if stored.file == leaf.file and (inside := index_at(stored, found.offset)) is not None:
                    return _in_chunk(found, tensor, chunk, rank, inside)
    return found


def _with_name_first(checkpoint: Checkpoint, name: str) -> list[LazyTensor]:
    """All tensors; the one of the name that was asked for before others that share its storage."""
    first = checkpoint.tensors.get(name)
    return [*([first] if first else []), *(each for each in checkpoint.tensors.values() if each is not first)]


def _in_chunk(found: Location, tensor: LazyTensor, chunk: Chunk, rank: int, inside: Shape) -> Location:
    copies = [
        Copy(other, Path(stored.file), _offset(stored, inside))
        for other, stored in ((chunk.rank, chunk.stored), *chunk.replicas)
        if other != rank
    ]
    source = tuple(a + b for a, b in zip(chunk.box.offset, inside, strict=True))
    return replace(
        found, source=tensor.name, source_index=source, rank=rank if tensor.ranked else None,
        box=chunk.box, shard_index=inside, copies=tuple(copies),
    )  # fmt: skip


def _offset(stored: Stored, index: Shape) -> int:
    return stored.offset + sum(i * s for i, s in zip(index, stored.strides, strict=True)) * stored.dtype.itemsize


def index_at(stored: Stored, offset: int) -> Shape | None:
    """The index of the element whose first byte is at `offset` of the file; None where none of them is there."""
    rest, misaligned = divmod(offset - stored.offset, stored.dtype.itemsize)
    if rest < 0 or misaligned or not stored.numel:
        return None
    index = [0] * len(stored.shape)
    for dim in sorted(range(len(stored.shape)), key=lambda dim: -stored.strides[dim]):
        if stored.strides[dim] > 0 and stored.shape[dim] > 1:
            index[dim], rest = divmod(rest, stored.strides[dim])
    fits = not rest and all(i < size for i, size in zip(index, stored.shape, strict=True))
    return tuple(index) if fits else None


def _input_names(node: Compute, checkpoint: Checkpoint) -> list[str]:
    """The checkpoint's tensors that an operation takes."""
    names: dict[str, None] = {}
    for source in node.inputs:
        if source.numel:
            leaf, place = _leaf(source, (0,) * len(source.shape), [])
            if isinstance(leaf, Stored):
                at = Location("", source.shape, place, source.dtype, offset=_offset(leaf, place))
                names[_owned(at, checkpoint, leaf).source] = None
    return [name for name in names if name]
