"""What is shown of a merge's plan and of its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nbmerge.display import words
from nbmerge.display.change_views import change_tables, changes_in_words
from nbmerge.display.checkpoint_views import dtypes_in_words, problem_alerts
from nbmerge.display.model import ATTENTION, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.errors import ConfigError, listing, plural
from nbmerge.layout import Checkpoint, Drift
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.naming.model import auto_class_name
from nbmerge.naming.notes import ZEROS
from nbmerge.plan import MergePlan
from nbmerge.receipt import RECEIPT_NAME
from nbmerge.report import MergeReport

_FILES = 12
_ROWS = 16


def plan_view(plan: MergePlan) -> View:
    """What will be written and how; what is wrong, and what must not be overlooked, first."""
    return View(
        title="Merge plan",
        sentence=_plan_sentence(plan),
        alerts=(*problem_alerts(plan.problems), *_drift_alert(plan.drift)),
        facts=tuple(_plan_facts(plan)),
        sections=tuple(_plan_sections(plan, plan.drift)),
        code_title="" if plan.problems else "Next",
        code=() if plan.problems else ('report = nbmerge.merge(plan, "TARGET_DIR")',),
    )


def report_view(report: MergeReport) -> View:
    """What was done and proved, and what to do next; after a dry run the plan, and that nothing was written."""
    if report.target is None:
        return _dry_run_view(report)
    return View(
        title="Merge report",
        sentence=_report_sentence(report, report.target),
        alerts=tuple(_drift_alert(report.drift)),
        facts=tuple(_report_facts(report, report.target)),
        sections=tuple(_plan_sections(report.plan, report.drift, done=True)),
        code_title="Next",
        code=_load_lines(report.plan, report.target),
    )


def _dry_run_view(report: MergeReport) -> View:
    plan = report.plan
    return View(
        title="Dry run",
        sentence=f"nothing was written; the same merge without dry_run {_would(plan)}",
        alerts=(*problem_alerts(plan.problems), *_drift_alert(report.drift or plan.drift)),
        facts=tuple(_plan_facts(plan)),
        sections=tuple(_plan_sections(plan, report.drift or plan.drift)),
    )


def _would(plan: MergePlan) -> str:
    count = sum(len(file.tensors) for file in plan.weight_files)
    return (
        f"will write {plural(count, 'tensor')}, {words.byte_size(plan.data_bytes)}, "
        f"of {plan.model_class} to {plural(len(plan.weight_files), 'safetensors file')}{changes_in_words(plan)}"
    )


def _plan_sentence(plan: MergePlan) -> str:
    if plan.problems:
        return f"cannot be carried out: {plural(len(plan.problems), 'problem')}; nothing will be written"
    return _would(plan)


def _plan_facts(plan: MergePlan) -> Iterator[Fact]:
    run = plan.execution
    yield from _sources(plan.checkpoint)
    yield Fact("model class", words.elide(plan.model_class), code=True)
    yield Fact("bytes", f"{words.exact_bytes(plan.total_bytes)} in all files")
    yield Fact("dtype", _dtypes(plan))
    yield Fact("names", _names(plan))
    yield from _lora_fact(plan)
    yield from _base_fact(plan)
    yield Fact(
        "peak memory",
        f"{words.byte_size(run.peak_bytes)} at most: {plural(run.workers, 'worker')}, "
        f"{words.byte_size(run.buffer_bytes)} at a time each",
    )
    yield Fact("execution", f"{run.engine}: {run.why}")
    if given := {name: value for name, value in plan.options.given().items() if value is not None}:
        yield Fact("options", words.elide(", ".join(f"{k}={words.value_in_words(v)}" for k, v in given.items()), 300))


def _lora_fact(plan: MergePlan) -> Iterator[Fact]:
    """What is done with an adapter, and where its alpha was known from."""
    if plan.lora is not None:
        origin = words.elide(plan.lora.origins.get("lora_alpha", ""), words.PROSE_LIMIT)
        known = f"; alpha known from {origin}" if origin else ""
        yield Fact("LoRA", words.elide(plan.lora.sentence, words.PROSE_LIMIT) + known)


def _base_fact(plan: MergePlan) -> Iterator[Fact]:
    """The base model, where anything is read from it."""
    if plan.base_files:
        count = sum(fill.origin != ZEROS for fill in plan.fills)
        where = words.elide(str(plan.base_files[0].path.parent), 2 * words.NAME_LIMIT)
        text = f"{where}: {plural(count, 'tensor')} from {plural(len(plan.base_files), 'file')}"
        yield Fact("base model", text)


def _report_sentence(report: MergeReport, target: Path) -> str:
    plan = report.plan
    count = sum(len(file.tensors) for file in plan.weight_files)
    return (
        f"merged {plural(count, 'tensor')}, {words.byte_size(plan.data_bytes)}, of {plan.model_class} "
        f"into {words.elide(str(target))}" + (" and verified them" if report.verification else "")
    ) + changes_in_words(plan)


def _report_facts(report: MergeReport, target: Path) -> Iterator[Fact]:
    plan = report.plan
    yield Fact("target", words.elide(str(target), 2 * words.NAME_LIMIT), code=True)
    yield from _sources(plan.checkpoint)
    if report.verification:
        yield Fact("verified", report.verification.sentence)
    speed = f", {words.byte_size(report.bytes_per_second)}/s" if report.written_bytes else ""
    yield Fact("written", f"{words.exact_bytes(report.written_bytes)} in {words.duration(report.seconds)}{speed}")
    if report.reused:
        text = f"{plural(len(report.reused), 'file')} of an earlier, interrupted run: {listing(report.reused)}"
        yield Fact("reused", words.elide(text, words.PROSE_LIMIT))
    yield Fact("dtype", _dtypes(plan))
    yield Fact("names", _names(plan))
    yield from _lora_fact(plan)
    yield from _base_fact(plan)
    if report.receipt:
        yield Fact("receipt", RECEIPT_NAME, code=True)
    if report.pushed is not None:
        yield Fact("uploaded to", words.elide(report.pushed.url, words.PROSE_LIMIT), code=True)


def _sources(checkpoint: Checkpoint) -> Iterator[Fact]:
    """Where the tensors are from: a directory, or all that they are the average of."""
    for path, weight in checkpoint.averaged:
        share = weight / sum(each for _, each in checkpoint.averaged)
        yield Fact(f"from {share:.4g} ×", words.elide(path, 2 * words.NAME_LIMIT), code=True)
    if not checkpoint.averaged:
        yield Fact("from", words.elide(str(checkpoint.path), 2 * words.NAME_LIMIT), code=True)


def _dtypes(plan: MergePlan) -> str:
    nbytes: Counter[str] = Counter()
    for file in plan.weight_files:
        nbytes.update(file.bytes_by_dtype)
    return (dtypes_in_words(nbytes, plan.data_bytes) or "none") + ("" if plan.casts else ", as stored")


def _names(plan: MergePlan) -> str:
    where = {"hub": "as published checkpoints have them", "transformers": "as transformers has them in memory"}
    wanted = where.get(plan.options.dialect, plan.options.dialect)
    if not plan.renamed:
        return f"{wanted}; unchanged"
    return f"{wanted}; {plural(plan.renamed, 'tensor')} renamed or cut from {_source_names(plan.dialect)}"


def _source_names(dialect: str) -> str:
    """`megatron (qwen2) names`: whose names the checkpoint's tensors have."""
    known = {"hub": "published names", "transformers": "transformers' names in memory"}
    return known.get(dialect, f"{words.elide(dialect)} names")


def _drift_alert(drift: Sequence[Drift]) -> Iterator[Alert]:
    if not drift:
        return
    names = list(dict.fromkeys(one.name for one in drift))
    yield Alert(
        ATTENTION,
        f"{'1 copy' if len(drift) == 1 else f'{len(drift):,} copies'} of {plural(len(names), 'tensor')} "
        f"{'differs' if len(drift) == 1 else 'differ'} between ranks; the lowest rank's is written",
        (
            ("tensors", words.elide(listing(words.elide(name) for name in names), words.PROSE_LIMIT)),
            ("why", "ranks that should hold the same values drifted apart in training; the receipt lists them"),
        ),
    )


def _plan_sections(plan: MergePlan, drift: Sequence[Drift], *, done: bool = False) -> Iterator[Section]:
    yield _files_section(plan, done=done)
    if drift:
        yield _drift_section(drift)
    changes = [table for table in change_tables(plan) if table.rows]
    if changes:
        summary = ", ".join(table.title.partition(":")[0] for table in changes)
        yield Section("Changes", summary, tables=tuple(changes), opened=len(changes) < 3)
    facts = tuple(Fact(name, words.value_in_words(value)) for name, value in plan.checkpoint.overrides.items())
    if facts:
        yield Section("Overrides", f"{plural(len(facts), 'fact')} of the layout as the user gave them", facts=facts[:8],
                      opened=True)  # fmt: skip


def _files_section(plan: MergePlan, *, done: bool) -> Section:
    columns = (
        Column("file", code=True),
        Column("tensors", number=True),
        Column("bytes", number=True),
        Column("share", number=True),
    )
    total = plan.total_bytes
    sizes = [(file.name, f"{len(file.tensors):,}", file.size) for file in plan.weight_files]
    sizes += [(file.name, "·", file.size) for file in plan.side_files]
    rows = tuple(
        (
            Cell(words.elide(name)),
            Cell(count),
            Cell(words.byte_size(size)),
            Cell(words.percent(size, total), bar=size / total if total else 0.0),
        )
        for name, count, size in (*sizes[: _FILES - 4], *sizes[_FILES - 4 :][-4:])
    )
    table = Table(columns, rows, hidden=len(sizes) - len(rows), rows_are="files", rest=".files and .side_files")
    title = "Files written" if done else "Files that it would write" if plan.problems else "Files to write"
    summary = f"{plural(len(sizes), 'file')}, {words.byte_size(total)}, and the receipt"
    return Section(title, summary, tables=(table,))


def _drift_section(drift: Sequence[Drift]) -> Section:
    columns = (
        Column("tensor", code=True),
        Column("copies that differ"),
        Column("piece", code=True),
        Column("first at"),
    )
    rows = tuple(_drift_row(one) for one in drift[:_ROWS])
    hidden = max(len(drift) - _ROWS, 0)
    table = Table(columns, rows, hidden=hidden, rows_are="pairs", rest=".drift")
    summary = f"{plural(len(drift), 'pair')} of copies that differ; first at: the first element of the tensor that does"
    return Section("Drift", summary, tables=(table,))


def _drift_row(drift: Drift) -> tuple[Cell, ...]:
    who = f"ranks {drift.ranks[0]} and {drift.ranks[1]}"
    texts = (drift.name, who, str(drift.box), words.shape_of(drift.index))
    return tuple(Cell(words.elide(text)) for text in texts)


def _load_lines(plan: MergePlan, target: Path) -> tuple[str, ...]:
    """The lines that load what was written."""
    try:
        loader = auto_class_name(plan.model_class, is_value_model=plan.options.is_value_model)
    except ConfigError:
        loader = plan.model_class
    side = {file.name for file in plan.side_files}
    tokenizer = side & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"}
    names = [loader, "AutoTokenizer"] if tokenizer else [loader]
    # repr() also writes out what a path could smuggle into the code.
    where = ascii(str(target)) if not str(target).isprintable() else repr(str(target))
    if not plan.files:
        return ("from peft import PeftModel", f"model = PeftModel.from_pretrained(base_model, {_adapter_in(target)})")
    lines = [f"from transformers import {', '.join(names)}", f"model = {loader}.from_pretrained({where})"]
    if tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({where})")
    if plan.adapter_files:
        lines += ["from peft import PeftModel", f"model = PeftModel.from_pretrained(model, {_adapter_in(target)})"]
    return tuple(lines)


def _adapter_in(target: Path) -> str:
    """The adapter's directory as a Python literal."""
    return ascii(str(target / ADAPTER_DIRECTORY))
