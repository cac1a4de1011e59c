"""The model card of a merged directory: what its receipt, its config and its validation say, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbmerge.errors import listing, plural
from nbmerge.export.proof import is_proved
from nbmerge.json_files import json_object
from nbmerge.runs import step_of
from nbmerge.validation.report import ValidationReport

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LISTED = 8


def model_card(
    directory: Path, repo_id: str, receipt: dict[str, Any], validation: ValidationReport | None,
    base_model: str | None = None,
) -> str:  # fmt: skip
    """The text of README.md, metadata first. receipt: as it stands in the directory, or empty.

    base_model: the Hub's name of the model that training started from.
    """
    config = json_object(directory / "config.json")
    lines = ["---", *_metadata(config, base_model), "---", "", f"# {repo_id.rpartition('/')[2]}", ""]
    lines += [_opening(config, receipt), ""]
    facts = list(_facts(config, receipt))
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in facts), ""]
    changes = list(_changes(receipt))
    if changes:
        lines += ["## What the merge changed", "", *(f"- {_cell(change)}" for change in changes), ""]
    lines += ["## How it was checked", "", *_checked(receipt, validation), ""]
    return "\n".join(lines)


def _metadata(config: dict[str, Any], base_model: str | None) -> Iterator[str]:
    yield "library_name: transformers"
    if base_model is not None:
        yield f"base_model: {base_model}"
    if (tag := _TASKS.get(_architecture(config).rpartition("For")[2])) is not None:
        yield f"pipeline_tag: {tag}"


_TASKS = {"CausalLM": "text-generation", "TokenClassification": "token-classification"}


def base_model_of(directory: Path) -> str | None:
    """What config.json or the adapter names as the model that training started from, if the Hub can have it."""
    adapter = json_object(directory / "lora_adapter" / "adapter_config.json").get("base_model_name_or_path")
    for name in (json_object(directory / "config.json").get("_name_or_path"), adapter):
        if isinstance(name, str) and _HUB_NAME.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _opening(config: dict[str, Any], receipt: dict[str, Any]) -> str:
    what = f"`{_architecture(config)}`" if _architecture(config) else "A model"
    if not receipt:
        return f"{what}, uploaded with [nbmerge](https://pypi.org/project/nbmerge-ckpt/)."
    source = _part(receipt, "source")
    averaged = source.get("averaged")
    if isinstance(averaged, list) and averaged:
        origin = f"the average of {len(averaged)} checkpoints"
    else:
        origin = f"a training checkpoint ({source.get('layout', 'of an unknown layout')})"
    return f"{what}, merged from {origin} by nbmerge {_part(receipt, 'versions').get('nbmerge-ckpt', '')}."


def _facts(config: dict[str, Any], receipt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source = _part(receipt, "source")
    step = next(
        (step for part in Path(str(source.get("path", ""))).parents if (step := step_of(part)) is not None), None
    )
    step = step_of(Path(str(source.get("path", "")))) if step is None else step
    if step is not None and not source.get("averaged"):
        yield "training step", f"{step:,}"
    if isinstance(source.get("world_size"), int) and not source.get("averaged"):
        yield "written by", plural(source["world_size"], "rank")
    dtype = config.get("dtype") or config.get("torch_dtype")
    if isinstance(dtype, str):
        yield "dtype", dtype
    if isinstance(receipt.get("total_size"), int):
        yield "size", f"{receipt['total_size']:,} bytes of weights in {plural(len(receipt.get('files') or ()), 'file')}"
    versions = _part(receipt, "versions")
    if versions:
        yield "merged with", ", ".join(f"{name} {version}" for name, version in versions.items())


_LISTS = {"trims": "trimmed of its padding", "fills": "not in the checkpoint, filled", "drops": "left out"}


def _changes(receipt: dict[str, Any]) -> Iterator[str]:
    casts = _entries(receipt, "casts")
    for pair in dict.fromkeys((str(cast.get("from")), str(cast.get("to"))) for cast in casts):
        count = sum((str(cast.get("from")), str(cast.get("to"))) == pair for cast in casts)
        yield f"{plural(count, 'tensor')} cast from {pair[0]} to {pair[1]}"
    for key, words in _LISTS.items():
        names = [str(entry.get("tensor")) for entry in _entries(receipt, key)]
        if names:
            yield f"{words}: {listing((f'`{name}`' for name in names), shown=_LISTED)}"
    lora = _part(receipt, "lora")
    if lora:
        yield f"LoRA ({lora.get('mode')}): r={lora.get('r')}, alpha={lora.get('alpha')}, {lora.get('layers')} layers"
    edits = receipt.get("config_edits")
    if isinstance(edits, dict) and edits:
        yield f"edited in config.json: {listing((f'`{key}`' for key in edits), shown=_LISTED)}"


def _checked(receipt: dict[str, Any], validation: ValidationReport | None) -> Iterator[str]:
    if receipt:
        yield "- every file was read again after writing: headers, sizes, names, shapes and dtypes, against the plan"
    if validation is None:
        yield "- nothing further was checked before the upload"
        return
    for result in validation.results:
        if result.outcome.ran:
            state = "" if not result.outcome.findings else f" ({plural(len(result.outcome.findings), 'finding')})"
            yield f"- {_cell(result.title)}{state}"
    if not is_proved(validation):
        yield "- **the directory did not pass, and was uploaded all the same**"


def _part(receipt: dict[str, Any], key: str) -> dict[str, Any]:
    found = receipt.get(key)
    return found if isinstance(found, dict) else {}


def _entries(receipt: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = receipt.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _cell(text: str) -> str:
    """Text that ends no cell and makes no HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
