"""The whole of a validation: every check in one report, by function, object, magic and command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from IPython.core.interactiveshell import InteractiveShell

import nbmerge
from nbmerge import OptionError, Validator, VerificationError, cli
from nbmerge.validation.findings import FAILED, PASSED, SKIPPED
from tests.support.messages import assert_says, refusal
from tests.support.models import save_tiny_model, write_model_world

NAMES = ["headers", "index", "paths", "config", "tokenizer_files", "receipt", "digests", "structure", "dtypes", "tied",
         "source", "side_files", "reference", "health", "tokenizer", "running"]  # fmt: skip


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_model_world(tmp_path / "my actor", "qwen2", dtype="bfloat16")


@pytest.fixture
def merged(ckpt: Path, tmp_path: Path) -> Path:
    nbmerge.merge(ckpt, tmp_path / "merged", digests=True)
    return tmp_path / "merged"


def flip(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_all_checks_are_run_in_order_and_all_pass(ckpt: Path, merged: Path, tmp_path: Path):
    save_tiny_model("qwen2", tmp_path / "ref", "bfloat16")
    report = nbmerge.validate(merged, checkpoint=ckpt, reference=tmp_path / "ref", progress=False)
    assert [result.name for result in report.results] == NAMES
    assert report.ok
    assert {result.status for result in report.results if result.name != "tokenizer"} <= {PASSED, "warned"}
    assert report["running"].status == PASSED and report["source"].status == PASSED
    report.raise_if_failed()


def test_a_flipped_bit_is_seen_by_each_check_that_can(ckpt: Path, merged: Path, tmp_path: Path):
    save_tiny_model("qwen2", tmp_path / "ref", "bfloat16")
    flip(merged)
    report = nbmerge.validate(merged, checkpoint=ckpt, reference=tmp_path / "ref", progress=False)
    assert {result.name for result in report.results if result.status == FAILED} >= {"digests", "source", "reference"}
    assert_says(refusal(VerificationError, report.raise_if_failed), "model.norm.weight differs from the checkpoint")


def test_one_broken_thing_stops_no_other_check(ckpt: Path, merged: Path):
    (merged / "config.json").write_text("{")
    (merged / "model.safetensors").write_bytes((merged / "model.safetensors").read_bytes()[:-7])
    report = nbmerge.validate(merged, checkpoint=ckpt, progress=False)
    assert [result.name for result in report.results] == NAMES
    assert {report["headers"].status, report["config"].status, report["source"].status} == {FAILED}


def test_an_empty_directory_has_findings_and_raises_nothing(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    report = nbmerge.validate(tmp_path / "empty", progress=False)
    assert not report.ok
    assert report["headers"].status == FAILED and report["config"].status == FAILED


def test_only_the_checks_that_were_asked_for(merged: Path):
    report = nbmerge.validate(merged, checks=["health", "index"], progress=False)
    assert [result.name for result in report.results] == ["index", "health"]
    message = refusal(OptionError, nbmerge.validate, merged, checks=["helth"])
    assert_says(message, "no check is named 'helth'", "fix:", "health")
    left = nbmerge.validate(merged, no_run=True).results[-1]
    assert (left.name, left.status, left.outcome.said) == ("running", SKIPPED, "left out: no_run")


@pytest.mark.parametrize(("option", "value"), [("atol", -1.0), ("rtol", float("nan")), ("workers", 0), ("sample", 0.0)])
def test_options_that_mean_nothing_are_refused(merged: Path, option: str, value: float):
    assert_says(refusal(OptionError, nbmerge.validate, merged, **{option: value}), f"{option}=", "fix:")
    assert_says(refusal(OptionError, Validator, merged, no_such=1), "no option is named no_such")


def test_a_validator_keeps_its_last_report(ckpt: Path, merged: Path):
    validator = Validator(merged, ckpt, checks=("source",))
    assert "will run 1 check" in repr(validator)
    report = validator.validate(progress=False)
    assert validator.report is report
    assert repr(validator) == repr(report)


class TestCommandLine:
    def test_exits_with_0_or_1_and_prints_the_report(
        self, ckpt: Path, merged: Path, capsys: pytest.CaptureFixture[str]
    ):
        words = ["validate", str(merged), "--checkpoint", str(ckpt), "--checks", "source", "health"]
        assert cli.main(words) == 0
        said = " ".join(capsys.readouterr().out.split())  # a long path wraps lines anywhere
        assert_says(said, "is valid as far as asked: 2 checks passed", "compared every element")
        flip(merged)
        assert cli.main(words) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert_says(said, "is not valid: 1 error", "model.norm.weight differs")

    def test_a_directory_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        assert cli.main(["validate", str(tmp_path / "absent")]) == 1
        assert_says(capsys.readouterr().err, "there is no such directory", "fix:")
        assert cli.main(["validate", str(tmp_path), "--sample", "7"]) == 2


class TestMagic:
    def test_takes_paths_and_objects_and_returns_the_report(self, shell: InteractiveShell, merged: Path, ckpt: Path):
        result = shell.run_cell('%validate_ckpt merged --checkpoint "my actor" --checks source health  # prove it')
        assert [one.name for one in result.result.results] == ["source", "health"]
        assert result.result.ok and result.result["source"].status == PASSED
        shell.user_ns["ckpt"] = nbmerge.open_checkpoint(ckpt)
        assert shell.run_cell("%validate_ckpt merged --checkpoint $ckpt --checks source").result.ok
        shell.user_ns["report"] = nbmerge.merge(ckpt, "again")
        found = shell.run_cell("%validate_ckpt $report --checks source").result
        assert found.ok and found["source"].status == PASSED
        assert shell.run_cell("%validate_ckpt merged --checks source").result["source"].status == SKIPPED

    def test_help_names_every_option(self, shell: InteractiveShell, capsys: pytest.CaptureFixture[str]):
        shell.run_cell("%validate_ckpt --help").raise_error()
        assert_says(capsys.readouterr().out, "--checkpoint", "--reference", "--sample", "--no_run", "example:")


def test_the_merge_leaves_what_a_validation_needs(merged: Path):
    receipt = json.loads((merged / "nbmerge_receipt.json").read_text())
    assert receipt["options"] == {"digests": True} and "sha256" in receipt["files"][0]
