"""Makes the plan of a merge from an opened checkpoint: names, dtypes, files, and what must be compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nbmerge import expressions as ex
from nbmerge.dtypes import DType, parse_dtype
from nbmerge.engine.comparison import Comparison
from nbmerge.engine.safetensors_file import deal, index_json
from nbmerge.engine.sources import LocalFiles
from nbmerge.errors import Problem, plural
from nbmerge.expressions import Cast, Compute, Expr
from nbmerge.layout import Checkpoint
from nbmerge.naming.model import HFModel, ModelFacts
from nbmerge.naming.published import Named, Tie, name_tensors
from nbmerge.options import MergeOptions, parse_size
from nbmerge.plan import CastNote, Drift, Equality, Execution, MergePlan, OutputFile, SideFile

_BUFFER = 4 * 2**20  # bytes that a worker puts together in memory at a time
_PROBED = 2**20  # bytes of one tensor's replicas that are compared while planning
_PROBED_IN_ALL = 64 * 2**20
_MAX_WORKERS = 8
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".gguf", ".h5", ".msgpack")


def make_plan(checkpoint: Checkpoint, model: HFModel, options: MergeOptions) -> MergePlan:
    """The plan. Reads no tensor data but small replicas, which it compares. Problems are in `.problems`.

    Raises ConfigError where no model can be made of the config.
    """
    facts = model.facts
    exprs = {name: tensor.expr for name, tensor in checkpoint.tensors.items()}
    named = name_tensors(exprs, facts, options.dialect)
    outputs, casts = _cast(named, facts, options)
    files = deal(outputs, parse_size(options.max_shard_size))
    edits, config = _edited_config(model, outputs, options, facts)
    probed, equalities = _comparisons(checkpoint, named.ties)
    drift, unequal = _probe(probed)
    problems = [*checkpoint.problems, *named.problems, *_unsafe_names(outputs), *unequal]
    return MergePlan(
        checkpoint=checkpoint,
        options=options,
        model_class=facts.class_name,
        dialect=named.dialect,
        files=files,
        side_files=tuple(_side_files(model, files, config)),
        expected=named.expected,
        execution=_execution(files, options),
        casts=casts,
        drops=named.drops,
        ties=named.ties,
        unloaded=named.unloaded,
        renamed=named.renamed,
        config_edits=edits,
        probed=probed,
        equalities=equalities,
        drift=drift,
        problems=tuple(problems),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """The versions that shape a result."""
    found: dict[str, str] = {}
    for package in ("nbmerge-ckpt", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _cast(named: Named, facts: ModelFacts, options: MergeOptions) -> tuple[dict[str, Expr], tuple[CastNote, ...]]:
    """The outputs in the dtype that was asked for; integers and what the class keeps in fp32 stay."""
    if options.dtype is None:
        return dict(named.outputs), ()
    wanted = parse_dtype(options.dtype)
    outputs: dict[str, Expr] = {}
    notes: list[CastNote] = []
    for name, expr in named.outputs.items():
        outputs[name] = expr
        if expr.dtype.is_floating and expr.dtype != wanted and not facts.stays_fp32(name):
            notes.append(CastNote(name, expr.dtype, wanted))
            outputs[name] = Cast(expr, wanted)
    return outputs, tuple(notes)


def _edited_config(
    model: HFModel, outputs: Mapping[str, Expr], options: MergeOptions, facts: ModelFacts
) -> tuple[dict[str, tuple[object, object]], bytes | None]:
    """The keys of config.json that the merge changes, and the new file; None where it stays as it is."""
    config: dict[str, Any] = json.loads(json.dumps(model.config))
    edits: dict[str, tuple[object, object]] = {}

    def edit(key: str, value: object) -> None:
        if config.get(key) != value:
            edits[key] = (config.get(key), value)
            config[key] = value

    if dtype := _common_dtype(outputs):
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        for key in keys:
            edit(key, dtype.name)
        for section, content in config.items():
            if isinstance(content, dict) and isinstance(content.get("dtype"), str) and content["dtype"] != dtype.name:
                edits[f"{section}.dtype"] = (content["dtype"], dtype.name)
                content["dtype"] = dtype.name
    if options.tie_word_embedding:
        edit("tie_word_embeddings", True)
    if options.is_value_model:
        edit("architectures", [facts.class_name])
        if "id2label" in config or "num_labels" not in config:
            edit("id2label", {"0": "LABEL_0"})
            edit("label2id", {"LABEL_0": 0})
    if "quantization_config" in config:  # the weights that were trained are plain ones
        edits["quantization_config"] = (config.pop("quantization_config"), None)
    return edits, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if edits else None


def _common_dtype(outputs: Mapping[str, Expr]) -> DType | None:
    """The dtype of most floating bytes."""
    weight: dict[DType, int] = {}
    for expr in outputs.values():
        if expr.dtype.is_floating:
            weight[expr.dtype] = weight.get(expr.dtype, 0) + expr.numel
    return max(weight, key=lambda dtype: weight[dtype], default=None)


def _side_files(model: HFModel, files: tuple[OutputFile, ...], config: bytes | None) -> Iterator[SideFile]:
    for path in sorted(model.config_dir.iterdir()):
        if not path.is_file() or path.name.endswith(_WEIGHTS) or path.name.startswith("."):
            continue
        if path.name in ("fsdp_config.json", "config.json") or path.suffix in (".lock", ".log"):
            continue
        yield SideFile(path.name, source=path)
    yield (
        SideFile("config.json", content=config)
        if config
        else SideFile("config.json", source=model.config_dir / "config.json")
    )
    if len(files) > 1:
        yield SideFile("model.safetensors.index.json", content=index_json(files))


def _unsafe_names(outputs: Mapping[str, Expr]) -> list[Problem]:
    """Names that no safetensors header should carry."""
    bad = [name for name in outputs if not name or len(name) > 1000 or name == "__metadata__" or "\x00" in name]
    return [Problem(f"{name[:80]!r} cannot be a tensor's name in a safetensors file") for name in bad]


def _comparisons(checkpoint: Checkpoint, ties: tuple[Tie, ...]) -> tuple[tuple[Equality, ...], tuple[Equality, ...]]:
    """What must be equal: replicas of one piece, and both sides of a tie. Small ones are compared while planning.

    As many replicas of a tensor as fit in 1 MiB are compared, and at least one.
    """
    small: list[Equality] = []
    large: list[Equality] = []
    budget = _PROBED_IN_ALL
    for equality in (*_replicas(checkpoint), *_ties(ties)):
        if equality.nbytes <= _PROBED and budget >= equality.nbytes:
            small.append(equality)
            budget -= equality.nbytes
        else:
            large.append(equality)
    return tuple(small), tuple(large)


def _replicas(checkpoint: Checkpoint) -> Iterator[Equality]:
    for tensor in checkpoint.tensors.values():
        for chunk in tensor.chunks:
            if not chunk.box.numel:
                continue
            count = max(_PROBED // max(chunk.stored.nbytes, 1), 1)
            for rank, replica in chunk.replicas[:count]:
                what = f"ranks {chunk.rank} and {rank} hold copies of {tensor.name}{chunk.box}"
                yield Equality(tensor.name, what, chunk.stored, replica, must=False)


def _ties(ties: tuple[Tie, ...]) -> Iterator[Equality]:
    for tie in ties:
        a, b = tie.stored, tie.kept_stored
        if a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype and a != b:
            what = f"{tie.name} is tied to {tie.kept}, and the checkpoint holds other values for it"
            yield Equality(tie.name, what, a, b, must=True)


def _probe(equalities: tuple[Equality, ...]) -> tuple[tuple[Drift, ...], list[Problem]]:
    """Compares the small ones now."""
    found = Comparison()
    with LocalFiles() as sources:
        for equality in equalities:
            found.compare(equality, _BUFFER, sources)
    return tuple(found.drift), found.problems


def _execution(files: tuple[OutputFile, ...], options: MergeOptions) -> Execution:
    workers = options.workers or min(2 * (os.cpu_count() or 1), _MAX_WORKERS)
    copied = computed = whole = 0
    for file in files:
        for tensor in file.tensors:
            if ex.is_copy(tensor.expr):
                copied += tensor.nbytes
            else:
                computed += tensor.nbytes
                whole = max(whole, _whole_bytes(tensor.expr))
    # A worker holds a block and what is read for it; a cast holds both dtypes, once as bytes and once as a tensor.
    per_worker = _BUFFER * (2 if not computed else 6) + whole
    why = "bytes are copied from file to file" if not computed else (
        f"{plural(copied, 'byte')} are copied, {plural(computed, 'byte')} go through memory in blocks"
    )  # fmt: skip
    return Execution("threads", workers, _BUFFER, workers * per_worker, copied, computed, why)


def _whole_bytes(expr: Expr) -> int:
    """Bytes that must be in memory at once: operations that cannot be done in blocks."""
    return sum(
        node.nbytes + sum(source.nbytes for source in node.inputs)
        for node in ex.walk(expr)
        if isinstance(node, Compute) and node.axis is None
    )
