"""The model card of a merged directory: what its receipt, its config and its validation say, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nbmerge.engine.safetensors_file import read_header
from nbmerge.errors import CorruptFileError, OptionError, listing, one_line, plural
from nbmerge.export.proof import is_proved
from nbmerge.json_files import json_object
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.run_search import step_of
from nbmerge.validation.report import ValidationReport

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_LISTED = 8


def model_card(
    directory: Path, repo_id: str, receipt: dict[str, Any], validation: ValidationReport | None,
    base_model: str | None = None,
) -> str:  # fmt: skip
    """The text of README.md, metadata first. receipt: as it stands in the directory, or empty.

    base_model: the Hub's name of the model that training started from.
    """
    config = json_object(directory / "config.json")
    lines = ["---", *_metadata(directory, config, base_model), "---", "", f"# {repo_id.rpartition('/')[2]}", ""]
    lines += [_opening(config, receipt), ""]
    facts = list(_facts(directory, receipt))
    if facts:
        lines += ["| | |", "|---|---|", *(f"| {name} | {_plain(value)} |" for name, value in facts), ""]
    changes = list(_changes(receipt))
    if changes:
        lines += ["## What the merge changed", "", *(f"- {change}" for change in changes), ""]
    lines += ["## How it was checked", "", *_checked(receipt, validation), ""]
    return "\n".join(lines)


def _metadata(directory: Path, config: dict[str, Any], base_model: str | None) -> Iterator[str]:
    is_adapter = not config and (directory / ADAPTER_DIRECTORY).is_dir()
    yield f"library_name: {'peft' if is_adapter else 'transformers'}"
    if base_model is not None:
        yield f"base_model: {base_model}"
    if (tag := _TASKS.get(_architecture(config).rpartition("For")[2])) is not None:
        yield f"pipeline_tag: {tag}"


_TASKS = {"CausalLM": "text-generation", "TokenClassification": "token-classification"}


def check_base_model(name: str | None) -> None:
    """Raises OptionError for what cannot be a model on the Hub: the card's reader can load nothing else."""
    if name is not None and not (isinstance(name, str) and _HUB_NAME.fullmatch(name)):
        raise OptionError(
            f"base_model={str(name)!r} is no model on the Hub", why="it stands in the card, for others to load",
            fix="name it user/name, e.g. Qwen/Qwen3-8B, or leave it out",
        )  # fmt: skip


def architecture_of(directory: Path) -> str:
    """The class that config.json names; empty where it names none."""
    return _architecture(json_object(directory / "config.json"))


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
    what = _code(_architecture(config)) if _architecture(config) else "A model"
    if not receipt:
        return f"{what}, uploaded with [nbmerge](https://pypi.org/project/nbmerge-ckpt/)."
    source = _part(receipt, "source")
    averaged = source.get("averaged")
    if isinstance(averaged, list) and averaged:
        origin = f"the average of {len(averaged)} checkpoints"
    else:
        kind = "checkpoint" if source.get("backend") == "hf" else "training checkpoint"
        origin = f"a {kind} ({_plain(source.get('layout', 'of an unknown layout'))})"
    return f"{what}, merged from {origin} by nbmerge {_plain(_part(receipt, 'versions').get('nbmerge-ckpt', ''))}."


def _facts(directory: Path, receipt: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source = _part(receipt, "source")
    path = Path(str(source.get("path", "")))
    step = _step(path)
    if step is not None and not source.get("averaged"):
        yield "training step", f"{step:,}"
    if steps_and_shares := _averaged_steps(source):
        yield "training steps", steps_and_shares
    ranks = source.get("world_size")
    if isinstance(ranks, int) and ranks > 1 and not source.get("averaged"):  # whole files tell nothing of ranks
        yield "written by", plural(ranks, "rank")
    if dtypes := _dtypes(directory, receipt):
        yield "dtype", ", ".join(dtypes)
    if isinstance(receipt.get("total_size"), int):
        yield "size", f"{receipt['total_size']:,} bytes of weights in {plural(len(receipt.get('files') or ()), 'file')}"
    versions = _part(receipt, "versions")
    if versions:
        yield "merged with", ", ".join(f"{name} {version}" for name, version in versions.items())


def _step(path: Path) -> int | None:
    """Of the directory, or of one close around it (checkpoint-9/pytorch_model_fsdp_0): /data/step_2 says nothing."""
    steps = (step_of(each) for each in (path, *path.parents[:2]))
    return next((step for step in steps if step is not None), None)


def _averaged_steps(source: dict[str, Any]) -> str:
    """The steps that an average is of, with their shares; empty where one is not known."""
    entries = _entries(source, "averaged")
    steps = [_step(Path(str(entry.get("path", "")))) for entry in entries]
    weights = [entry.get("weight") for entry in entries]
    shares = [weight for weight in weights if isinstance(weight, (int, float))]
    if not entries or len(shares) != len(entries) or not sum(shares) > 0 or None in steps:
        return ""
    parts = [f"{step:,} ({share / sum(shares):.4g})" for step, share in zip(steps, shares, strict=True)]
    return listing(parts, shown=_LISTED)


def _dtypes(directory: Path, receipt: dict[str, Any]) -> list[str]:
    """The types of the weights, most bytes first: config.json names one, and not always that. None of damaged files."""
    recorded = [str(entry.get("name")) for entry in _entries(receipt, "files")]
    found: Counter[str] = Counter()
    for path in [directory / name for name in recorded] or directory.glob("*.safetensors"):
        try:
            for entry in read_header(path).values():
                found[entry.dtype.name] += entry.nbytes
        except (OSError, CorruptFileError):
            return []
    return [name for name, _ in found.most_common()]


_LISTS = {"trims": "trimmed of its padding", "fills": "not in the checkpoint, filled", "drops": "left out"}


def _changes(receipt: dict[str, Any]) -> Iterator[str]:
    casts = _entries(receipt, "casts")
    for pair in dict.fromkeys((str(cast.get("from")), str(cast.get("to"))) for cast in casts):
        count = sum((str(cast.get("from")), str(cast.get("to"))) == pair for cast in casts)
        yield f"{plural(count, 'tensor')} cast from {_plain(pair[0])} to {_plain(pair[1])}"
    for key, words in _LISTS.items():
        names = [str(entry.get("tensor")) for entry in _entries(receipt, key)]
        if names:
            yield f"{words}: {listing(map(_code, names), shown=_LISTED)}"
    lora = _part(receipt, "lora")
    if lora:
        mode, r, alpha, layers = (_plain(lora.get(key)) for key in ("mode", "r", "alpha", "layers"))
        yield f"LoRA ({mode}): r={r}, alpha={alpha}, {layers} layers"
    edits = receipt.get("config_edits")
    if isinstance(edits, dict) and edits:
        yield f"edited in config.json: {listing(map(_code, edits), shown=_LISTED)}"


def _checked(receipt: dict[str, Any], validation: ValidationReport | None) -> Iterator[str]:
    if receipt:
        yield "- every file was read again after writing: headers, sizes, names, shapes and dtypes, against the plan"
    if validation is None:
        yield "- nothing further was checked before the upload"
        return
    for result in validation.results:
        if result.outcome.ran:
            found, share = len(result.outcome.findings), result.outcome.share
            notes = [plural(found, "finding")] if found else []
            notes += [f"of a sample of {100 * share:.1f}% of the bytes"] if share < 1 else []
            yield f"- {_plain(result.title)}" + (f" ({', '.join(notes)})" if notes else "")
    if not is_proved(validation):
        yield "- **the directory did not pass, and was uploaded all the same**"


def _part(receipt: dict[str, Any], key: str) -> dict[str, Any]:
    found = receipt.get(key)
    return found if isinstance(found, dict) else {}


def _entries(receipt: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = receipt.get(key)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _plain(value: object) -> str:
    """Words that end no line or cell, and are no Markdown or HTML."""
    return _MARKS.sub(r"\\\g<0>", one_line(str(value), limit=300)).replace("<", "&lt;")


_MARKS = re.compile(r"[\\`*\[\]|]")


def _code(name: str) -> str:
    """A name as code that nothing in it ends."""
    shown = one_line(name, limit=200).replace("`", "'").replace("<", "&lt;")
    return f"`{shown}`"
