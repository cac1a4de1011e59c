"""The index of a checkpoint: its tensors, the chunks that each is stored in, and what of it must be equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nbmerge import expressions as ex
from nbmerge.collapse import Group, collapse
from nbmerge.dtypes import DType
from nbmerge.errors import Problem
from nbmerge.expressions import Expr, Stored
from nbmerge.geometry import Box, Shape
from nbmerge.shown import Displayed, Explored, Plotted

if TYPE_CHECKING:
    from nbmerge.tensor_stats import TensorStats


@dataclass(frozen=True, slots=True)
class Chunk:
    """One stored piece of a tensor: its box in the global shape, where its bytes are, and whose they are.

    replicas: the same box as other ranks stored it, with their ranks.
    """

    box: Box
    stored: Stored
    rank: int
    replicas: tuple[tuple[int, Stored], ...] = ()


class MeshAxis(NamedTuple):
    """A dimension of the device mesh that a tensor lies on: its name, its size, and how it cuts the tensor.

    A tuple, because every tensor has one or more, and views group a hundred thousand of them by their meshes.
    """

    name: str
    size: int
    placement: str

    def __str__(self) -> str:
        return f"{self.name}={self.size}: {self.placement}"


@dataclass(frozen=True, repr=False)
class LazyTensor(Displayed, Plotted):
    """A tensor of a checkpoint: name, global shape, dtype, and the expression that makes it. Holds no data.

    ranked: whether the files say which rank stored each of its chunks; zarr's do not, nor do files of whole tensors.
    """

    name: str
    expr: Expr
    chunks: tuple[Chunk, ...] = ()
    mesh: tuple[MeshAxis, ...] = ()
    ranked: bool = True

    @property
    def shape(self) -> Shape:
        """Global shape."""
        return self.expr.shape

    @property
    def dtype(self) -> DType:
        """Element type as stored."""
        return self.expr.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.expr.nbytes

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.expr.numel

    @property
    def placement(self) -> str:
        """How it lies on the ranks, in words: `Shard(0)×4`, `Replicate×4`, `whole`; `cut along dim 0`.

        A checkpoint that keeps each piece once does not say on which ranks it lay.
        """
        if not self.mesh:
            return self._cut()
        return " · ".join(f"{axis.placement}×{axis.size}" for axis in self.mesh)

    def _cut(self) -> str:
        """The dimensions along which its boxes differ."""
        offsets = [chunk.box.offset for chunk in self.chunks if chunk.box.numel]
        dims = [str(dim) for dim, at in enumerate(zip(*offsets, strict=True)) if len(set(at)) > 1]
        return f"cut along dim{'s' if len(dims) > 1 else ''} {' and '.join(dims)}" if dims else "whole"

    def slice(self, box: Box) -> LazyTensor:
        """A box of it, as a new lazy tensor."""
        return LazyTensor(f"{self.name}{box}", ex.slice_of(self.expr, box))

    def select(self, dim: int, index: int) -> LazyTensor:
        """Row `index` of dimension `dim`, without that dimension, as a new lazy tensor."""
        return LazyTensor(f"{self.name}.select({dim}, {index})", ex.select(self.expr, dim, index))

    def reshape(self, *shape: int) -> LazyTensor:
        """The same elements in another shape, as a new lazy tensor."""
        return LazyTensor(self.name, ex.reshape(self.expr, shape))

    def cat(self, *others: LazyTensor, dim: int = 0) -> LazyTensor:
        """This tensor and the others, one after the other along `dim`, as a new lazy tensor."""
        parts = [self.expr, *(other.expr for other in others)]
        return LazyTensor(self.name, ex.cat(parts, dim))

    def stats(
        self, *, sample: float = 1.0, workers: int | None = None, progress: bool | None = None
    ) -> TensorStats:  # fmt: skip
        """Mean, deviation, extremes and a histogram of its elements. This reads the tensor, block by block.

        sample: a share of its blocks, for a very large one. Raises OptionError, and what reading raises.
        """
        from nbmerge.opening import listener_of
        from nbmerge.tensor_stats import stats_of

        with listener_of(progress) as listen:
            return stats_of(self.name, self.expr, sample=sample, workers=workers, listener=listen)


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors of one name but for its numbers, and of one shape, dtype and mesh, so that one stands for all."""

    group: Group
    first: LazyTensor

    @property
    def count(self) -> int:
        """How many they are."""
        return self.group.count

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.count * self.first.nbytes


@dataclass(frozen=True, slots=True)
class Equality:
    """Two tensors that should hold the same bytes, of which only `a` is written.

    ranks, box: for copies of one piece of `name`, whose they are and which piece. Training can leave them different,
    unless `strict`.
    kept: for a tied weight, the name that is written. If `name` differs from it, the merge would lose it.
    master: for a master weight, the file that holds it: rounded, it is the 16-bit weight that `b` is.
    """

    name: str
    a: Expr
    b: Expr
    ranks: tuple[int, int] | None = None
    box: Box | None = None
    strict: bool = False
    kept: str = ""
    master: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of one of the two."""
        return self.a.nbytes


@dataclass(frozen=True, slots=True)
class Drift:
    """Copies of one piece of a tensor that training left different.

    ranks: the one whose copy is written, and the other; box: the piece; index: the first element of the whole
    tensor in which they differ.
    """

    name: str
    ranks: tuple[int, int]
    box: Box
    index: Shape


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that a merge reads or leaves alone: path, size in bytes, times of its last change in ns, and what it is.

    role: `weights`, `index`, `optimizer`, `extra state`, `config` or `base model`.
    """

    path: Path
    size: int
    mtime_ns: int
    role: str
    ctime_ns: int = 0

    @staticmethod
    def of(path: Path, role: str) -> SourceFile:
        """The file as it is now."""
        stat = path.stat()
        return SourceFile(path, stat.st_size, stat.st_mtime_ns, role, stat.st_ctime_ns)

    def has_changed(self) -> bool:
        """Whether the file is not there any more, or was written or replaced since."""
        try:
            return SourceFile.of(self.path, self.role) != self
        except OSError:
            return True


@dataclass(frozen=True)
class Stated:
    """What a run recorded of its model and itself beside the tensors, and the file that says it.

    values: by the framework's own names; empty where nothing was recorded.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    where: str = ""


@dataclass(frozen=True)
class Absence:
    """Why tensors that the trained model had may not be in its checkpoint.

    modules: the model's, by name: a tensor of any other is missing for another reason; dtype: what the tensors would
    have, so that a base model's can be given it; None for the base model's own.
    """

    why: str
    fix: str
    modules: frozenset[str]
    dtype: DType | None = None

    def explains(self, name: str) -> bool:
        """Whether it is the reason for a missing tensor, whose name may lack a wrapper's prefix."""
        return name.rpartition(".")[0] in self._endings

    @cached_property
    def _endings(self) -> frozenset[str]:
        """The modules' names, whole and from each of their dots on."""
        parts = (name.split(".") for name in self.modules)
        return frozenset(".".join(words[at:]) for words in parts for at in range(len(words)))


@dataclass(frozen=True, repr=False)
class Checkpoint(Displayed, Explored, Plotted):
    """The index of a checkpoint. Made by a loader from headers and pickles; reads no tensor data.

    path: the directory; backend: the loader's name; layout: what was recognised, in words;
    tensors: by the names that the framework gave them; world_size: ranks that wrote it;
    mesh: the device mesh that most tensors lie on; config_dir: where config.json and the tokenizer are;
    notes: what a reader should know (files left alone, overrides); problems: what is wrong with it;
    names: whose names the tensors have, `transformers` (its own or published ones), `megatron` or `torchtitan`;
    stated: what the run recorded of its model, to be held against config.json;
    strict_copies: whether ranks that hold one tensor must hold equal copies of it, as Megatron keeps them;
    origin: for tensors that no file of `files` holds, what tells this checkpoint from another;
    opened_with: options of `open_checkpoint` that shape the tensors, where they were given;
    averaged: of an average, where each checkpoint lies that it is the mean of, with its weight;
    compared: what else must be equal when it is merged: masters and 16-bit weights; of an average, what merges of its
    checkpoints would compare;
    absence: why tensors may be missing, where saving can leave some out;
    whole: whether its files hold whole tensors, so that they tell nothing of ranks;
    is_adapter: whether it is the directory of an adapter alone, which peft loads on top of a base model;
    is_untied: whether it holds head and embedding apart, whatever config.json says.
    """

    path: Path
    backend: str
    layout: str
    tensors: Mapping[str, LazyTensor]
    world_size: int
    files: tuple[SourceFile, ...]
    config_dir: Path | None
    mesh: tuple[MeshAxis, ...] = ()
    evidence: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    overrides: Mapping[str, object] = field(default_factory=dict)
    names: str = "transformers"
    stated: Stated = field(default_factory=Stated)
    strict_copies: bool = False
    origin: str = ""
    opened_with: Mapping[str, object] = field(default_factory=dict)
    averaged: tuple[tuple[str, float], ...] = ()
    compared: tuple[Equality, ...] = ()
    problems: tuple[Problem, ...] = ()
    absence: Absence | None = None
    whole: bool = False
    is_adapter: bool = False
    is_untied: bool = False

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Its tensors, alike ones together, in the order in which each kind begins.

        Found once, when it is opened: displays of a hundred thousand tensors then look at a few dozen kinds.
        """
        named = ((name, (t.expr.shape, t.expr.dtype, t.mesh, len(t.chunks))) for name, t in self.tensors.items())
        return tuple(Kind(group, self.tensors[group.first]) for group in collapse(named))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, each counted once."""
        return sum(kind.nbytes for kind in self.kinds)

    @property
    def numel(self) -> int:
        """Elements of all tensors, each counted once."""
        return sum(kind.count * kind.first.numel for kind in self.kinds)

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)
