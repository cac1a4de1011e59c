"""The receipt of a merge: what was done, next to the weights, so that it can be checked later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbmerge.layout import Drift
from nbmerge.plan import MergePlan, OutputFile, SideFile

RECEIPT_NAME = "nbmerge_receipt.json"
SCHEMA = 1  # changes when a reader of the old form would misread the new one
_CHUNK = 2**20


def receipt(plan: MergePlan, digests: Mapping[str, str], drift: Sequence[Drift]) -> dict[str, Any]:
    """The receipt of a plan that was carried out. digests: sha256 by file name, or empty; drift: copies that differ."""
    return {
        "schema": SCHEMA,
        "plan_digest": plan.digest,
        "versions": dict(plan.versions),
        "source": _source(plan),
        "options": _plain({**plan.checkpoint.opened_with, **plan.options.given()}),
        "model": {"class": plan.model_class, "source_names": plan.dialect, "renamed": plan.renamed},
        **_changes(plan),
        "compared": [equality.name for equality in (*plan.probed, *plan.equalities)],
        "drift": [
            {"tensor": d.name, "piece": str(d.box), "ranks": [*d.ranks], "written": d.ranks[0], "first": [*d.index]}
            for d in drift
        ],
        **({"lora": plan.lora.as_record()} if plan.lora else {}),
        "files": [_file(file, digests) for file in plan.weight_files],
        "left_out": list(plan.left_out),
        "side_files": [file.name for file in plan.side_files],
        "side_digests": [entry for file in plan.side_files if (entry := _side_file(file))],
        "total_size": plan.data_bytes,
    }


def _source(plan: MergePlan) -> dict[str, Any]:
    """What was read."""
    checkpoint = plan.checkpoint
    averaged = [{"path": str(Path(path).absolute()), "weight": weight} for path, weight in checkpoint.averaged]
    return {
        "path": str(checkpoint.path.absolute()),
        **({"averaged": averaged} if averaged else {}),
        "backend": checkpoint.backend,
        "layout": checkpoint.layout,
        "world_size": checkpoint.world_size,
        "mesh": [str(axis) for axis in checkpoint.mesh],
        "config_dir": str(plan.config_dir.absolute()),
        "overrides": dict(checkpoint.overrides),
        "files": [
            {"name": file.path.name, "role": file.role, "bytes": file.size, "mtime_ns": file.mtime_ns}
            for file in (*checkpoint.files, *plan.base_files)
        ],
    }


def _changes(plan: MergePlan) -> dict[str, Any]:
    """What is not as the checkpoint has it."""
    return {
        "casts": [{"tensor": cast.name, "from": cast.before.name, "to": cast.after.name} for cast in plan.casts],
        "drops": [{"tensor": drop.name, "reason": drop.reason} for drop in plan.drops],
        "ties": [{"tensor": tie.name, "kept": tie.kept} for tie in plan.ties],
        "trims": [{"tensor": t.name, "source": t.source, "rows": t.rows, "kept": t.kept} for t in plan.trims],
        "fills": [{"tensor": fill.name, "from": fill.origin, "reason": fill.reason} for fill in plan.fills],
        "unloaded": list(plan.unloaded),
        "config_edits": {key: {"from": a, "to": b} for key, (a, b) in plan.config_edits.items()},
    }


def _file(file: OutputFile, digests: Mapping[str, str]) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": file.name, "bytes": file.size, "tensors": len(file.tensors)}
    return {**entry, "sha256": digests[file.name]} if file.name in digests else entry


def _side_file(file: SideFile) -> dict[str, Any]:
    """Size and sha256 of a small file as it was written; empty for one whose source changed since it was copied."""
    if file.content is not None:
        digest = hashlib.sha256(file.content).hexdigest()
    elif file.source is None:
        return {}
    else:
        try:
            digest = sha256_of(file.source.path)
        except OSError:
            return {}
        if file.source.has_changed():
            return {}
    return {"name": file.name, "bytes": file.size, "sha256": digest}


def _plain(options: Mapping[str, object]) -> dict[str, object]:
    return {name: dict(v) if isinstance(v, Mapping) else v for name, v in options.items()}


def encoded(content: Mapping[str, Any]) -> bytes:
    """The receipt as it is written."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()
