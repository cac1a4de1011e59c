"""What is shown of an upload."""

from __future__ import annotations

from collections.abc import Iterator

from nbmerge.display import words
from nbmerge.display.model import ATTENTION, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.errors import ConfigError, listing, plural
from nbmerge.export.hub import PushReport
from nbmerge.export.proof import is_proved
from nbmerge.naming.lora.facts import ADAPTER_DIRECTORY
from nbmerge.naming.model import auto_class_name

_ROWS = 20
_CARDS = {
    "written": "written from the receipt",
    "taken": "the directory's own",
    "kept": "the repository's own, left as it is",
}


def push_view(report: PushReport) -> View:
    """Where it is, what was uploaded and what stayed here."""
    return View(
        title="Push report",
        sentence=_sentence(report),
        alerts=tuple(_alerts(report)),
        facts=tuple(_facts(report)),
        sections=(_files(report),) if report.files else (),
        code_title="Next",
        code=_code(report),
    )


def _sentence(report: PushReport) -> str:
    where = words.elide(report.repo_id, words.PROSE_LIMIT)
    if not report.commit:
        return f"left to rank 0: one process uploads to {where}"
    return f"uploaded {plural(len(report.files), 'file')}, {words.byte_size(report.nbytes)}, to {where}"


def _alerts(report: PushReport) -> Iterator[Alert]:
    if report.validation is not None and not is_proved(report.validation):
        yield Alert(ATTENTION, f"uploaded by force: {words.elide(report.validation.sentence, words.PROSE_LIMIT)}")
    if report.stale:
        fix = "delete them if nobody needs them: push again with replace=True (--replace)"
        names = words.elide(listing(report.stale), words.PROSE_LIMIT)
        yield Alert(ATTENTION, f"the repository holds weights that are not of this model: {names}", (("fix", fix),))
    if report.local_paths:
        fix = "write the model's name on the Hub there, and push again"
        names = words.elide(listing(report.local_paths), words.PROSE_LIMIT)
        yield Alert(ATTENTION, f"what went up names a directory of this machine: {names}", (("fix", fix),))


def _facts(report: PushReport) -> Iterator[Fact]:
    yield Fact("address", words.elide(report.url, words.PROSE_LIMIT), code=True)
    yield Fact("revision", words.elide(report.revision), code=True)
    if not report.commit:
        return
    yield Fact("commit", words.elide(report.commit), code=True)
    yield Fact("model card", _CARDS[report.card])
    if report.removed:
        yield Fact("replaced", words.elide(f"{listing(report.removed)} deleted in the same commit", words.PROSE_LIMIT))
    if report.validation is not None:
        yield Fact("checked before", words.elide(report.validation.sentence, words.PROSE_LIMIT))
    if report.left_out:
        yield Fact("left here", words.elide(listing(report.left_out, shown=6), words.PROSE_LIMIT))
    yield Fact("time", words.duration(report.seconds))


def _files(report: PushReport) -> Section:
    rows = tuple((Cell(words.elide(name)),) for name in report.files[:_ROWS])
    hidden = max(len(report.files) - _ROWS, 0)
    table = Table((Column("file", code=True),), rows, hidden=hidden, rows_are="files", rest=".files")
    return Section("Files", f"{plural(len(report.files), 'file')}, {words.byte_size(report.nbytes)}", tables=(table,))


def _code(report: PushReport) -> tuple[str, ...]:
    """The lines that load it; none where no class is known."""
    where = repr(report.repo_id) + ("" if report.revision == "main" else f", revision={report.revision!r}")
    adapter = f"{where}, subfolder={ADAPTER_DIRECTORY!r}"
    has_adapter = any(name.startswith(f"{ADAPTER_DIRECTORY}/") for name in report.files)
    peft = ("from peft import PeftModel", f"model = PeftModel.from_pretrained({{}}, {adapter})")
    if has_adapter and not report.architecture:
        return peft[0], peft[1].format("base_model")
    try:
        loader = auto_class_name(report.architecture)
    except ConfigError:
        return ()
    lines = (f"from transformers import {loader}", f"model = {loader}.from_pretrained({where})")
    return (*lines, peft[0], peft[1].format("model")) if has_adapter else lines
