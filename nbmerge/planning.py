"""Makes the plan of a merge from an opened checkpoint: names, dtypes, files, and what must be compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nbmerge import expressions as ex
from nbmerge.dtypes import parse_dtype
from nbmerge.engine.lower import TILE_BYTES, turned
from nbmerge.engine.pool import default_workers
from nbmerge.engine.safetensors_file import deal, stored_tensors
from nbmerge.equalities import comparisons, probe
from nbmerge.errors import Problem, plural
from nbmerge.expressions import Cast, Compute, Expr, Stored
from nbmerge.layout import Checkpoint, SourceFile
from nbmerge.naming.facts import ModelFacts
from nbmerge.naming.model import HFModel
from nbmerge.naming.notes import Filled
from nbmerge.naming.outputs import outputs_of
from nbmerge.naming.published import Base, Named
from nbmerge.options import MergeOptions, expanded_path, parse_size
from nbmerge.plan import CastNote, Execution, MergePlan, OutputFile
from nbmerge.side_files import edited_config, side_files

_log = logging.getLogger(__name__)
_BUFFER = 2 * 2**20  # bytes that a worker puts together in memory at a time
_LONGEST_NAME = 1000  # characters


def make_plan(checkpoint: Checkpoint, model: HFModel, options: MergeOptions) -> MergePlan:
    """The plan. Reads no tensor data but small replicas, which it compares. Problems are in `.problems`.

    Raises ConfigError where no model can be made of the config, NotACheckpointError for a base model without weights.
    """
    facts = model.facts
    exprs = {name: tensor.expr for name, tensor in checkpoint.tensors.items()}
    recorded_ranks = None if checkpoint.overrides else checkpoint.world_size
    named = outputs_of(
        exprs, checkpoint.names, facts, options.dialect, _base_of(options), recorded_ranks, checkpoint.stated
    )
    outputs, casts = _cast(named, facts, options)
    unsafe = _unsafe_names(outputs)
    safe = {name: expr for name, expr in outputs.items() if name not in unsafe}
    files = deal(safe, parse_size(options.max_shard_size))
    edits, config = edited_config(model, outputs, options, facts)
    beside = side_files(model.config_dir, files, config)
    probed, equalities = comparisons(checkpoint, named.ties, allow_drift=options.allow_drift)
    _log.debug("%s: %d outputs; comparing %d small copies", facts.class_name, len(outputs), len(probed))
    drift, unequal = probe(probed)
    return MergePlan(
        checkpoint=checkpoint, options=options, config_dir=model.config_dir, model_class=facts.class_name,
        dialect=named.dialect, files=files, side_files=beside.files, left_out=beside.left_out,
        expected=named.expected, execution=_execution(files, options), casts=casts, drops=named.drops,
        ties=named.ties, trims=named.trims, fills=named.fills, base_files=_files_of(named.fills, outputs),
        unloaded=named.unloaded, renamed=named.renamed, config_edits=edits, probed=probed, equalities=equalities,
        drift=drift, versions=versions(), model=model,
        problems=(*checkpoint.problems, *named.problems, *unsafe.values(), *beside.problems, *unequal),
        mismatches=named.mismatches, diagnosis=named.diagnosis,
    )  # fmt: skip


def versions() -> dict[str, str]:
    """The versions that shape a result."""
    found: dict[str, str] = {}
    for package in ("nbmerge-ckpt", "torch", "transformers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _base_of(options: MergeOptions) -> Base | None:
    """The tensors of the base model that was given. Raises NotACheckpointError where there are none."""
    if options.base_model is None:
        return None
    directory = expanded_path(options.base_model)
    return Base(str(directory), stored_tensors(directory, "--base_model DIR"))


def _files_of(fills: tuple[Filled, ...], outputs: Mapping[str, Expr]) -> tuple[SourceFile, ...]:
    """The files of the base model that outputs are read from."""
    nodes = (node for fill in fills for node in ex.walk(outputs[fill.name]))
    paths = dict.fromkeys(Path(node.file) for node in nodes if isinstance(node, Stored))
    return tuple(SourceFile.of(path, "base model") for path in paths)


def _cast(named: Named, facts: ModelFacts, options: MergeOptions) -> tuple[dict[str, Expr], tuple[CastNote, ...]]:
    """The outputs in the dtype that was asked for; integers and what the class keeps in fp32 stay."""
    if options.dtype is None:
        return dict(named.outputs), ()
    wanted = parse_dtype(options.dtype)
    outputs: dict[str, Expr] = {}
    notes: list[CastNote] = []
    for name, expr in named.outputs.items():
        outputs[name] = expr
        if expr.dtype.is_floating and expr.dtype != wanted and not facts.is_kept_from(wanted, name):
            notes.append(CastNote(name, expr.dtype, wanted))
            outputs[name] = Cast(expr, wanted)
    return outputs, tuple(notes)


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
    """Bytes that must be in memory at once: operations that cannot be done in blocks."""
    return sum(
        node.nbytes + sum(source.nbytes for source in node.inputs)
        for node in ex.walk(expr)
        if isinstance(node, Compute) and node.axis is None
    )
