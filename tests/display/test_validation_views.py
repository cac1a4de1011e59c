"""What is shown of a validation: the verdict first, each kind of finding once with its remedy, a row for each check."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbmerge import ValidationReport, Validator, VerificationError
from nbmerge.display.html import render_html
from nbmerge.display.model import ATTENTION, PROBLEM
from nbmerge.display.text import render_text
from nbmerge.display.views import view_of
from nbmerge.validation.findings import WARNING, CheckResult, Finding, Outcome
from tests.support.messages import assert_says, refusal

_HOSTILE = "a.<img src=x onerror=alert(1)>.</style><script>alert(2)</script>.\x1b[31m\u202e'\"&.weight"
LOST = [
    Finding("differs from the checkpoint", f"model.layers.{n}.mlp.up_proj.weight", f"{n} of 9", "why so", "merge again")
    for n in range(64)
]


def result(name: str, *findings: Finding, said: str = "looked", ran: bool = True) -> CheckResult:
    return CheckResult(name, f"{name} is right", Outcome(findings, said, ran), 0.5)


def made(*results: CheckResult) -> ValidationReport:
    return ValidationReport(Path("/out/merged"), results, {"checkpoint": "/run/actor"}, 12, 3456, 1.5)


def test_a_clean_report_says_what_was_proven_and_what_was_not():
    report = made(
        result("files"), result("source", said="compared 12 tensors"), result("running", ran=False, said="too big")
    )
    view = view_of(report)
    assert report.ok
    assert view.sentence == "/out/merged is valid: 2 checks passed; not run: running"
    assert view.alerts == ()
    (table,) = view.sections[0].tables
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["files", "✓ passed", "looked"],
        ["source", "✓ passed", "compared 12 tensors"],
        ["running", "– not run", "too big"],
    ]
    proves = view.sections[1].tables[0].rows[0]
    assert [cell.text for cell in proves] == ["files", "files is right"]
    assert view.sections[0].summary == "2 passed, 1 not run"
    report.raise_if_failed()


def test_findings_of_one_kind_are_told_once_with_three_of_them():
    view = view_of(made(result("source", *LOST)))
    (alert,) = view.alerts
    assert alert.kind == PROBLEM
    assert alert.what == "source: 64 tensors share this problem: differs from the checkpoint"
    details = dict(alert.details)
    assert details["found"].count("up_proj") == 3 and details["found"].endswith(" and 61 more")
    assert (details["why"], details["fix"]) == ("why so", "merge again")


def test_errors_come_before_warnings_whatever_the_order_of_the_checks():
    warning = Finding("is odd", "a.b", severity=WARNING)
    report = made(result("one", warning), result("two", Finding("is wrong", "config.json")))
    assert [(alert.kind, alert.what) for alert in view_of(report).alerts] == [
        (PROBLEM, "two: config.json is wrong"), (ATTENTION, "one: a.b is odd"),
    ]  # fmt: skip
    assert view_of(report).sentence == "/out/merged is not valid: 1 error, and warnings of one"
    assert made(result("one", warning)).ok


def test_many_kinds_are_cut_and_said():
    view = view_of(made(*(result(f"c{n}", Finding(f"is wrong {n}", "x.y")) for n in range(20))))
    assert view.alerts[-1].what == "12 more kinds of findings; all are in .findings"


def test_failing_raises_with_all_errors():
    message = refusal(VerificationError, made(result("source", *LOST)).raise_if_failed)
    assert_says(message, "/out/merged is not valid: 64 errors", "model.layers.0.mlp.up_proj.weight differs", "61 more")


def test_the_data_frame_has_a_row_for_each_finding_and_each_check_without_any():
    frame = made(
        result("files"), result("source", *LOST[:2]), result("one", ran=False, said="no reference")
    ).to_dataframe()
    assert list(frame.columns) == ["check", "status", "severity", "subject", "what", "detail", "why", "fix"]
    assert frame["check"].tolist() == ["files", "source", "source", "one"]
    assert frame["status"].tolist() == ["passed", "failed", "failed", "not run"]
    assert frame["subject"].tolist()[1:3] == [finding.subject for finding in LOST[:2]]
    assert frame["what"].tolist()[3] == "no reference"


@pytest.mark.parametrize("count", [1, 3000])
def test_hostile_names_and_large_reports_stay_text_and_small(count: int):
    findings = [Finding(_HOSTILE, f"{_HOSTILE}{n}", _HOSTILE, _HOSTILE, _HOSTILE) for n in range(count)]
    report = made(*(result(f"{_HOSTILE}{n}", *findings) for n in range(12)))
    html, text = render_html(view_of(report)), render_text(view_of(report))
    assert "<script" not in html and "<img" not in html and len(html.encode()) <= 30_000
    assert "\x1b" not in text and "\u202e" not in text


def test_a_validator_lists_what_it_would_prove(tmp_path: Path):
    validator = Validator(tmp_path / "merged", checks=("source", "health"))
    view = view_of(validator)
    assert view.sentence == f"will run 2 checks on {tmp_path / 'merged'}"
    assert [row[0].text for row in view.sections[0].tables[0].rows] == ["source", "health"]
    assert len(Validator(tmp_path).checks()) >= 10
