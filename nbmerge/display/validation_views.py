"""What is shown of a validation: the verdict, what is wrong with its remedy, and what every check looked at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nbmerge.display import words
from nbmerge.display.model import ATTENTION, PROBLEM, Alert, Cell, Column, Fact, Section, Table, View
from nbmerge.errors import plural
from nbmerge.validation.findings import ERROR, FAILED, PASSED, SKIPPED, WARNED, CheckResult, FindingGroup
from nbmerge.validation.report import ValidationReport
from nbmerge.validator import Validator

_SHOWN = 3  # subjects of one kind of finding
_ALERTS = 8
_FILES = (".safetensors", ".json", ".bin", ".pt", ".jinja", ".txt", ".model")
_MARKS = {PASSED: "✓", FAILED: "✗", WARNED: "▲", SKIPPED: "–"}


def validation_view(report: ValidationReport) -> View:
    """Errors and warnings first, each kind once; then a row for every check."""
    groups = [(result, group) for result in report.results for group in result.groups]
    groups.sort(key=lambda pair: pair[1].first.severity != ERROR)
    alerts = [_unproved(result) for result in report.unproved]
    alerts += [_alert(result, group) for result, group in groups[:_ALERTS]]
    if len(groups) > _ALERTS:
        alerts.append(Alert(ATTENTION, f"{len(groups) - _ALERTS:,} more kinds of findings; all are in .findings"))
    return View(
        title="Validation report",
        sentence=f"{words.elide(str(report.directory))} is {report.sentence}",
        alerts=tuple(alerts),
        facts=tuple(_facts(report)),
        sections=(_checks_section(report.results), _titles_section([(one.name, one.title) for one in report.results])),
        code_title="Next",
        code=tuple(_next_lines(report)),
    )


def validator_view(validator: Validator) -> View:
    """What it would check; after a validation, what that found."""
    if validator.report is not None:
        return validation_view(validator.report)
    wanted = validator.options.checks
    chosen = [(name, title) for name, title in validator.checks() if not wanted or name in wanted]
    return View(
        title="Validator",
        sentence=f"will run {plural(len(chosen), 'check')} on {words.elide(str(validator.directory))}",
        facts=(Fact("directory", words.elide(str(validator.directory), 2 * words.NAME_LIMIT), code=True),),
        sections=(_titles_section(chosen, opened=True),),
        code_title="Next",
        code=("report = validator.validate()",),
    )


def _unproved(result: CheckResult) -> Alert:
    said = words.elide(result.outcome.said, 2 * words.PROSE_LIMIT)
    return Alert(PROBLEM, f"{words.elide(result.name)}: was asked for, and could not be run", (("why", said),))


def _alert(result: CheckResult, group: FindingGroup) -> Alert:
    first, members = group.first, group.members
    subject = words.elide(first.subject)
    if len(members) == 1:
        what = f"{result.name}: " + " ".join(filter(None, (subject, first.what)))
        details = [("found", first.detail)]
    else:
        what = f"{result.name}: {plural(len(members), _noun(first.subject))} share this problem: {first.what}"
        shown = [": ".join(filter(None, (words.elide(one.subject), one.detail))) for one in members[:_SHOWN]]
        more = f" and {len(members) - _SHOWN:,} more" if members[_SHOWN:] else ""
        details = [("found", "; ".join(shown) + more)]
    details += [("why", first.why), ("fix", first.fix)]
    kind = PROBLEM if first.severity == ERROR else ATTENTION
    limited = tuple((label, words.elide(text, 2 * words.PROSE_LIMIT)) for label, text in details if text)
    return Alert(kind, words.elide(what, words.PROSE_LIMIT), limited)


def _noun(subject: str) -> str:
    """What the subjects of a group are, from the first one's name."""
    if subject.endswith(_FILES):
        return "file"
    return "tensor" if "." in subject else "finding"


def _facts(report: ValidationReport) -> Iterator[Fact]:
    yield Fact("directory", words.elide(str(report.directory), 2 * words.NAME_LIMIT), code=True)
    for label, source in report.sources.items():
        yield Fact(label, words.elide(source, 2 * words.NAME_LIMIT), code=True)
    yield Fact("tensors", f"{report.tensors:,}, {words.exact_bytes(report.nbytes)}")
    yield Fact("time", words.duration(report.seconds))


def _checks_section(results: tuple[CheckResult, ...]) -> Section:
    columns = (Column("check", code=True), Column("result"), Column("looked at"))
    rows = tuple(
        (
            Cell(result.name),
            Cell(_status(result)),
            Cell(words.elide(result.outcome.said, words.PROSE_LIMIT)),
        )
        for result in results
    )
    counts = [f"{sum(result.status == status for result in results)} {status}" for status in _MARKS]
    summary = ", ".join(count for count in counts if not count.startswith("0 "))
    return Section("Checks", summary, tables=(Table(columns, rows),), opened=True)


def _titles_section(titles: Sequence[tuple[str, str]], *, opened: bool = False) -> Section:
    rows = tuple((Cell(name), Cell(title)) for name, title in titles)
    table = Table((Column("check", code=True), Column("proves")), rows)
    return Section("What each check proves", plural(len(rows), "check"), tables=(table,), opened=opened)


def _status(result: CheckResult) -> str:
    count = len(result.outcome.findings)
    return f"{_MARKS[result.status]} {result.status}" + (f" ({count:,})" if count else "")


def _next_lines(report: ValidationReport) -> Iterator[str]:
    if report.findings:
        yield "report.to_dataframe()  # every finding"
    if not report.ok:
        yield "report.raise_if_failed()"
    elif "checkpoint" not in report.sources:
        where = repr(str(report.directory)) if str(report.directory).isprintable() else ascii(str(report.directory))
        yield f'nbmerge.validate({where}, checkpoint="CKPT_DIR")  # prove it against the shards'
