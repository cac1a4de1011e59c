"""Makes the plan of a merge from an opened checkpoint: names, dtypes, files, and what must be compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nbmerge import expressions as ex
from nbmerge.dtypes import DType, parse_dtype
from nbmerge.engine.lower import TILE_BYTES, turned
from nbmerge.engine.pool import default_workers
from nbmerge.engine.safetensors_file import deal, lay_out
from nbmerge.equalities import comparisons, probe
from nbmerge.errors import Problem, plural
from nbmerge.expressions import Cast, Compute, Expr, Paste, Stored
from nbmerge.layout import Checkpoint, SourceFile
from nbmerge.loaders.hf import stored_tensors
from nbmerge.naming.adapted import outputs_with_adapter
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.naming.lora.fold import dtype_before_fold
from nbmerge.naming.lora.separate import Separated
from nbmerge.naming.model import HFModel
from nbmerge.naming.published import Base
from nbmerge.naming.versions import explained
from nbmerge.options import MergeOptions, expanded_path, parse_size
from nbmerge.plan import CastNote, Execution, MergePlan, OutputFile, SideFile
from nbmerge.side_files import Edits, SideFiles, edited_config, side_files

_log = logging.getLogger(__name__)
_BUFFER = 2 * 2**20  # bytes that a worker puts together in memory at a time
_LONGEST_NAME = 1000  # characters


def make_plan(checkpoint: Checkpoint, model: HFModel, options: MergeOptions) -> MergePlan:
    """The plan. Reads no tensor data but small replicas, which it compares. Problems are in `.problems`.

    Raises ConfigError where no model can be made of the config, NotACheckpointError for a base model without weights.
    """
    base = _base_of(options)
    named, lora = outputs_with_adapter(checkpoint, model, options, base)
    if lora is not None and lora.is_untied:
        model = model.untied
    facts = model.facts
    named = explained(named, model.config, checkpoint.tensors)
    outputs, casts = _cast(named.outputs, facts, options)
    adapter_files, adapter_casts = _adapter_files(lora, facts, options)
    unsafe = _unsafe_names(outputs)
    safe = {name: expr for name, expr in outputs.items() if name not in unsafe}
    files: tuple[OutputFile, ...] = ()
    edits: Edits = {}
    beside = SideFiles((), (), ())
    if options.lora != "adapter":
        files = deal(safe, parse_size(options.max_shard_size))
        edits, config = edited_config(model, outputs, options, facts)
        beside = side_files(model.config_dir, files, config)
    probed, equalities = comparisons(
        checkpoint, (*named.ties, *(lora.ties if lora else ())), allow_drift=options.allow_drift
    )
    _log.debug("%s: %d outputs; comparing %d small copies", facts.class_name, len(outputs), len(probed))
    drift, unequal = probe(probed)
    return MergePlan(
        checkpoint=checkpoint, options=options, config_dir=model.config_dir, model_class=facts.class_name,
        dialect=named.dialect, files=files, side_files=(*beside.files, *_adapter_side_files(lora)),
        left_out=beside.left_out, expected=named.expected,
        execution=_execution((*files, *adapter_files), options), casts=(*casts, *adapter_casts),
        drops=(*named.drops, *(lora.drops if lora else ())),
        ties=named.ties, trims=named.trims, fills=named.fills, base_files=_files_of(outputs, base),
        unloaded=named.unloaded, renamed=named.renamed, config_edits=edits, probed=probed,
        equalities=equalities, drift=drift,
        versions=versions() | ({"peft": lora.facts.peft} if lora and lora.facts else {}), model=model,
        lora=lora.facts if lora else None, adapter_files=adapter_files,
        problems=(
            *checkpoint.problems, *(lora.problems if lora else ()),
            *named.problems, *unsafe.values(), *beside.problems, *unequal,
        ),
        mismatches=named.mismatches, diagnosis=named.diagnosis,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """The versions that shape a result."""
    return {package: _version(package) for package in ("nbmerge-ckpt", "torch", "transformers", "safetensors")}


@cache
def _version(package: str) -> str:
    """As it was when it was first asked for, which is what this process has imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _base_of(options: MergeOptions) -> Base | None:
    """The tensors of the base model that was given. Raises NotACheckpointError where there are none."""
    if options.base_model is None:
        return None
    directory = expanded_path(options.base_model)
    return Base(str(directory), stored_tensors(directory, "--base_model DIR", trust_pickle=options.trust_pickle))


def _adapter_files(
    lora: Separated | None, facts: ModelFacts, options: MergeOptions
) -> tuple[tuple[OutputFile, ...], tuple[CastNote, ...]]:
    """The file of an adapter's weights, where it is written."""
    if lora is None or not lora.adapter:
        return (), ()
    outputs, casts = _cast(lora.adapter, facts, options)
    return (lay_out(f"{ADAPTER_DIRECTORY}/adapter_model.safetensors", outputs),), casts


def _adapter_side_files(lora: Separated | None) -> tuple[SideFile, ...]:
    if lora is None or not lora.adapter:
        return ()
    return (SideFile(f"{ADAPTER_DIRECTORY}/adapter_config.json", content=lora.config),)


def _files_of(outputs: Mapping[str, Expr], base: Base | None) -> tuple[SourceFile, ...]:
    """The files of the base model that outputs are read from: those that it fills, and those that are folded."""
    read = (
        {node.file for expr in base.tensors.values() for node in ex.walk(expr) if isinstance(node, Stored)}
        if base
        else ()
    )
    nodes = (node for expr in outputs.values() if read for node in ex.walk(expr))
    paths = dict.fromkeys(Path(node.file) for node in nodes if isinstance(node, Stored) and node.file in read)
    return tuple(SourceFile.of(path, "base model") for path in paths)


def _cast(
    named: Mapping[str, Expr], facts: ModelFacts, options: MergeOptions
) -> tuple[dict[str, Expr], tuple[CastNote, ...]]:
    """The outputs in the dtype that was asked for; integers and what the class keeps in fp32 stay.

    The notes tell of the loader's own casts too: what has no fp32 master is widened.
    """
    wanted = parse_dtype(options.dtype) if options.dtype is not None else None
    outputs: dict[str, Expr] = {}
    notes: list[CastNote] = []
    for name, expr in named.items():
        before_fold = dtype_before_fold(expr)
        outputs[name] = expr if before_fold is None else ex.cast(expr, before_fold)
        if wanted is not None and expr.dtype.is_floating and not facts.is_kept_from(wanted, name):
            outputs[name] = ex.cast(expr, wanted)
        before, after = before_fold or _dtype_before_casts(expr), outputs[name].dtype
        if before != after:
            notes.append(CastNote(name, before, after))
    return outputs, tuple(notes)


def _dtype_before_casts(expr: Expr) -> DType:
    """The dtype of what is stored, where nothing but a view or a cast changes it."""
    if isinstance(expr, Cast):
        return expr.source.dtype
    if isinstance(expr, Compute) or not expr.sources:
        return expr.dtype
    return next((dtype for source in expr.sources if (dtype := _dtype_before_casts(source)) != expr.dtype), expr.dtype)


def _unsafe_names(outputs: Mapping[str, Expr]) -> dict[str, Problem]:
    """Names that no safetensors header should carry: empty, overlong, not of UTF-8, or with a meaning of its own."""
    return {
        name: Problem(
            f"{name[:80]!r} cannot be a tensor's name in a safetensors file",
            why="the checkpoint was made by other means than training, or is damaged",
            fix="rename the tensor where it was saved",
        )
        for name in outputs
        if not name or len(name) > _LONGEST_NAME or name == "__metadata__" or "\x00" in name or not _is_utf8(name)
    }


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _execution(files: tuple[OutputFile, ...], options: MergeOptions) -> Execution:
    workers = options.workers or default_workers()
    copied = computed = whole = tile = 0
    for file in files:
        for tensor in file.tensors:
            if ex.is_copy(tensor.expr):
                copied += tensor.nbytes
            else:
                computed += tensor.nbytes
                whole = max(whole, _whole_bytes(tensor.expr))
            if turned(tensor.expr) is not None:
                tile = TILE_BYTES
    # A worker holds a block and what is read for it; a cast holds both dtypes, once as bytes and once as a tensor.
    per_worker = max(_BUFFER, tile) * (2 if not computed else 6) + whole
    why = "bytes are copied from file to file" if not computed else (
        f"{plural(copied, 'byte')} are copied, {plural(computed, 'byte')} go through memory in blocks"
    )  # fmt: skip
    return Execution("threads", workers, _BUFFER, workers * per_worker, copied, computed, why)


def _whole_bytes(expr: Expr) -> int:
    """Bytes that must be in memory at once: operations that cannot be done in blocks, and inputs that none cuts."""
    below = [_whole_bytes(source) for source in expr.sources]
    if isinstance(expr, Paste):  # its parts are made one after the other
        return max(below, default=0)
    if not isinstance(expr, Compute):
        return sum(below)
    if expr.axis is not None:
        return sum(below) + sum(source.nbytes for source in expr.inputs[len(expr.inputs) - expr.whole :])
    return sum(below) + expr.nbytes + expr.scratch + sum(source.nbytes for source in expr.inputs)
