"""The plan of a merge: everything that will be written, decided before the first byte is read."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from nbmerge.dtypes import BY_NAME, DType
from nbmerge.errors import PlanError, Problem, plural
from nbmerge.explaining.candidates import Mismatch
from nbmerge.explaining.diagnosis import Diagnosis
from nbmerge.expressions import Expr, fingerprint
from nbmerge.geometry import Shape
from nbmerge.layout import Checkpoint, Drift, Equality, SourceFile
from nbmerge.naming.lora.facts import LoraFacts
from nbmerge.naming.model import HFModel
from nbmerge.naming.notes import Drop, Filled, Tie, Trim
from nbmerge.options import MergeOptions
from nbmerge.shown import Displayed


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of an output file. offset: of its first byte after the file's header."""

    name: str
    expr: Expr
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.expr.nbytes


@dataclass(frozen=True)
class OutputFile:
    """A safetensors file: its header as it will be written, and its tensors in file order."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]

    @cached_property
    def bytes_by_dtype(self) -> Mapping[str, int]:
        """Bytes of the tensors by the name of their dtype."""
        forms = Counter((tensor.expr.shape, tensor.expr.dtype.name) for tensor in self.tensors)
        found: Counter[str] = Counter()
        for (shape, name), count in forms.items():
            found[name] += count * math.prod(shape) * BY_NAME[name].itemsize
        return found

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.bytes_by_dtype.values())

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class SideFile:
    """A small file beside the weights. It is copied from `source`, or written from `content`."""

    name: str
    source: SourceFile | None = None
    content: bytes | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        if self.content is not None:
            return len(self.content)
        return self.source.size if self.source else 0


@dataclass(frozen=True, slots=True)
class CastNote:
    """An output whose dtype changes, and from what to what."""

    name: str
    before: DType
    after: DType


@dataclass(frozen=True, slots=True)
class Execution:
    """How the plan is carried out: threads, bytes of buffer for each, peak memory in bytes, and why so."""

    engine: str
    workers: int
    buffer_bytes: int
    peak_bytes: int
    copied_bytes: int
    computed_bytes: int
    why: str


@dataclass(frozen=True, repr=False)
class MergePlan(Displayed):
    """What a merge will write. Data only; `nbmerge.merge` carries it out.

    config_dir: where config and tokenizer are read from; files: the safetensors files; side_files: config,
    tokenizer, index and the like; left_out: files of config_dir that are not copied;
    expected: the shapes that the model class wants by output name; unloaded: outputs that it knows and ignores;
    probed: small tensors that were compared while planning; equalities: large ones that the copy compares;
    trims: padding that is cut off; fills: outputs that the checkpoint does not hold;
    base_files: the base model's files that those are read from;
    model: that the outputs are of, whose facts are known already;
    drift: copies on several ranks that were found to differ, of which the lowest rank's is written;
    mismatches: tensors of another shape than the model's, missing or too many; diagnosis: how the config as a whole
    is another model's. `nbmerge.explain(plan)` says why;
    lora: what is done with an adapter; adapter_files: its weights, beside the model's or alone.
    """

    checkpoint: Checkpoint
    options: MergeOptions
    config_dir: Path
    model_class: str
    dialect: str
    files: tuple[OutputFile, ...]
    side_files: tuple[SideFile, ...]
    expected: Mapping[str, Shape]
    execution: Execution
    casts: tuple[CastNote, ...] = ()
    drops: tuple[Drop, ...] = ()
    ties: tuple[Tie, ...] = ()
    trims: tuple[Trim, ...] = ()
    fills: tuple[Filled, ...] = ()
    base_files: tuple[SourceFile, ...] = ()
    unloaded: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    renamed: int = 0
    config_edits: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    probed: tuple[Equality, ...] = ()
    equalities: tuple[Equality, ...] = ()
    drift: tuple[Drift, ...] = ()
    problems: tuple[Problem, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    model: HFModel | None = field(default=None, compare=False, repr=False)
    mismatches: tuple[Mismatch, ...] = ()
    diagnosis: Diagnosis | None = None
    lora: LoraFacts | None = None
    adapter_files: tuple[OutputFile, ...] = ()

    @property
    def is_untied(self) -> bool:
        """Whether head and embedding are written as two tensors where config.json ties them."""
        return self.model is not None and self.model.tie_word_embedding is False

    @property
    def weight_files(self) -> tuple[OutputFile, ...]:
        """All safetensors files: the model's, and an adapter's."""
        return (*self.files, *self.adapter_files)

    @property
    def tensors(self) -> dict[str, OutputTensor]:
        """All outputs of the model by name."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.data_bytes for file in self.weight_files)

    @property
    def total_bytes(self) -> int:
        """Bytes that the directory will take."""
        return sum(file.size for file in self.weight_files) + sum(file.size for file in self.side_files)

    def raise_if_problems(self) -> None:
        """Raises PlanError with all problems, if there are any."""
        if self.problems:
            error = PlanError(
                f"the merge cannot be planned: {plural(len(self.problems), 'problem')}", problems=self.problems
            )
            error.plan = self
            raise error

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """Every file that carrying the plan out reads."""
        weights = (file for file in self.checkpoint.files if file.role == "weights")
        return (*weights, *self.base_files, *(file.source for file in self.side_files if file.source))

    @cached_property
    def digest(self) -> str:
        """Changes with the sources (size and times), what is taken from them, the options, and the versions."""
        facts = {
            "sources": [[str(f.path), f.size, f.mtime_ns, f.ctime_ns] for f in self.sources],
            "options": self.options.shaping(),
            "origin": self.checkpoint.origin,
            "overrides": dict(self.checkpoint.overrides),
            "versions": dict(self.versions),
            "side_files": [[f.name, hashlib.sha256(f.content or b"").hexdigest()] for f in self.side_files],
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for file in self.weight_files:
            digest.update(file.name.encode() + file.header)
            for tensor in file.tensors:
                digest.update("\n".join(fingerprint(tensor.expr)).encode())
        return digest.hexdigest()
