"""Receipts and directories that no merge left: findings, never a traceback; and what callers get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbmerge
from nbmerge import CheckpointError, NotACheckpointError, OptionError, Validator, VerificationError, cli
from nbmerge.errors import NbmergeError
from nbmerge.validation.files import HeadersCheck
from nbmerge.validation.findings import FAILED, PASSED
from nbmerge.validation.health import HealthTally
from nbmerge.validation.on_disk import content_of, digest_of, size_of
from tests.support.messages import assert_says, refusal
from tests.support.models import write_model_world
from tests.validation.directories import edit_json

RECEIPT = "nbmerge_receipt.json"
NAMES = ["b" * 300, "a\0b", "a\ud800b", "x/" * 3000, "~nouser/x", ".", "", "/etc/passwd", "../x", 7, None, ["a"]]


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    nbmerge.merge(write_model_world(root / "actor", "qwen2"), root / "out", digests=True, progress=False)
    return root


@pytest.fixture
def ckpt(_made: Path) -> Path:
    return _made / "actor"


@pytest.fixture
def merged(_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_made / "out", tmp_path / "out")


def looked_at(directory: Path, ckpt: Path) -> nbmerge.ValidationReport:
    """The report, which can be shown."""
    found = nbmerge.validate(directory, checkpoint=ckpt, no_run=True, progress=False)
    for text in (repr(found), found._repr_html_()):
        assert text and not text.startswith("<nbmerge")
        assert text.encode()
    if not found.ok:
        assert str(refusal(VerificationError, found.raise_if_failed)).encode()
    return found


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:12])
@pytest.mark.parametrize("key", ["side_files", "side_digests", "files", "unloaded"])
def test_whatever_the_receipt_lists(ckpt: Path, merged: Path, key: str, name: object):
    receipt = json.loads((merged / RECEIPT).read_text())
    entry: Any = {"name": name, "bytes": "many", "sha256": [3]} if key in ("files", "side_digests") else name
    edit_json(merged / RECEIPT, **{key: [*receipt[key], entry]})
    assert looked_at(merged, ckpt)["source"].status == PASSED


@pytest.mark.parametrize("name", NAMES[:5], ids=lambda name: repr(name)[:12])
def test_whatever_paths_the_receipt_names(ckpt: Path, merged: Path, name: str):
    edit_json(merged / RECEIPT, options={"hf_model_config_path": name}, source={"config_dir": name, "path": name})
    assert looked_at(merged, ckpt)["source"].status == PASSED
    edit_json(merged / RECEIPT, options={"base_model": name})
    assert looked_at(merged, ckpt)["source"].status == FAILED


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"base_model": "/nonexist"}, "no such directory"),
        ({"backend": "nonsense"}, "nonsense"),
        ({"backend": "megatron"}, "no checkpoint that can be read"),
        ({"dialect": "klingon"}, "klingon"),
        ({"placements": {"*": ["Nothing(0)"]}}, "Nothing"),
        ({"placements": "/nonexist.json"}, "nonexist"),
        ({"mesh_shape": "a,b"}, "mesh shape"),
        ({"lora": "fold"}, "lora"),
        ({"dtype": "int8"}, "int8"),
        ({"max_shard_size": "0"}, "no size"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_a_finding_of_the_source(ckpt: Path, merged: Path, options: Any, words: str):
    edit_json(merged / RECEIPT, options=options)
    found = looked_at(merged, ckpt)
    (finding,) = found["source"].outcome.findings
    assert finding.what == "the checkpoint cannot be compared" and finding.fix
    assert_says(finding.detail, words)


def test_a_path_that_the_caller_gave_raises_whatever_the_receipt_says(merged: Path, tmp_path: Path):
    edit_json(merged / RECEIPT, options={"backend": "fsdp", "base_model": "/nonexist"})
    assert_says(refusal(NotACheckpointError, nbmerge.validate, merged, checkpoint=tmp_path / "absent"), "absent")
    for path in ("~nouser/x", "a" * 300, "a\0b"):
        with pytest.raises(NbmergeError):
            nbmerge.validate(path)


def test_an_error_that_no_one_foresaw_is_a_finding_and_stops_no_other_check(
    ckpt: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Any) -> Any:
        raise KeyError("what\nis this")

    monkeypatch.setattr(HeadersCheck, "run", broken)
    monkeypatch.setattr(HealthTally, "outcome", broken)
    monkeypatch.setattr("nbmerge.validation.value_checks.same_beside", broken)
    found = looked_at(merged, ckpt)
    for name in ("headers", "health", "side_files"):
        (finding,) = found[name].outcome.findings
        assert_says(finding.detail, "KeyError", "what")
        assert finding.fix
    assert found["index"].status == PASSED


def test_a_directory_that_may_not_be_read(merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def denied(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    assert_says(refusal(CheckpointError, nbmerge.validate, merged), "permission denied", str(merged), "fix:")
    assert cli.main(["validate", str(merged)]) == 1
    assert_says(capsys.readouterr().err, "CheckpointError: the directory cannot be read: permission denied", "fix:")


def test_a_file_that_may_not_be_read(ckpt: Path, merged: Path, monkeypatch: pytest.MonkeyPatch):
    def denied(self: Path, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    monkeypatch.setattr(Path, "open", denied)
    assert (content_of(merged / "config.json"), digest_of(merged / "config.json")) == (None, "")
    assert size_of(merged / "config.json") and size_of(merged / "absent") is None


def test_a_reference_that_may_not_be_read(ckpt: Path, merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def denied(directory: Path, *_: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr("nbmerge.validation.against.stored_tensors", denied)
    assert cli.main(["test", "--local_dir", str(ckpt), "--test_hf_dir", str(merged)]) == 1
    assert_says(capsys.readouterr().err, "CheckpointError: the directory cannot be read", str(merged), "fix:")
    monkeypatch.setattr("nbmerge.validation.value_checks.weights_of", denied)
    found = nbmerge.validate(merged, reference=merged, checks=["reference"], progress=False)
    assert_says(found.findings[0].what, "the reference cannot be compared")


@pytest.mark.parametrize("command", ["validate", "diff", "test", "merge"])
def test_only_a_merge_that_was_interrupted_can_be_taken_up(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    def interrupt(_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli._COMMANDS[command], "run", interrupt)
    assert cli.main([command, "x"]) == 130
    said = capsys.readouterr().err
    assert said.startswith("interrupted") and ("take up where it stopped" in said) == (command == "merge")


class TestNothingIsNoProof:
    def test_no_check_that_could_be_run(self, tmp_path: Path):
        (tmp_path / "empty").mkdir()
        for checks in (["health"], ["index"], ["index", "receipt"]):
            found = nbmerge.validate(tmp_path / "empty", checks=checks, progress=False)
            assert not found.ok and found.sentence.startswith("not proved: ")
            assert all(name in found.sentence for name in checks)
            assert "was asked for, and could not be run" in repr(found)
        assert cli.main(["validate", str(tmp_path / "empty"), "--checks", "health"]) == 1

    def test_what_was_not_asked_for_by_name_may_be_left_out(self, merged: Path):
        assert nbmerge.validate(merged, no_run=True, progress=False).ok
        assert nbmerge.validate(merged, checks=["digests"], progress=False).ok
        edit_json(merged / RECEIPT, files=[
            {key: value for key, value in each.items() if key != "sha256"}
            for each in json.loads((merged / RECEIPT).read_text())["files"]
        ])  # fmt: skip
        assert not nbmerge.validate(merged, checks=["digests", "headers"], progress=False).ok


class TestArguments:
    def test_a_report_is_a_checkpoint_too(self, ckpt: Path, merged: Path):
        dry = nbmerge.merge(ckpt, dry_run=True, progress=False)
        found = Validator(merged, dry, checks=["source", "side_files"]).validate(progress=False)
        assert found.ok and found.sources == {"checkpoint": str(ckpt)}

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"checkpoint": RuntimeError()}, "checkpoint= is a RuntimeError"),
            ({"checkpoint": b"x"}, "checkpoint= is a bytes"),
            ({"reference": 3}, "reference= is a int"),
            ({"sample": "0.5"}, "sample='0.5'"),
            ({"workers": "2"}, "workers='2'"),
            ({"workers": 1.5}, "workers=1.5"),
            ({"workers": True}, "workers=True"),
            ({"atol": None}, "atol=None"),
            ({"rtol": "1"}, "rtol='1'"),
            ({"checks": [3]}, "checks="),
            ({"checks": ["running"], "no_run": True}, "no_run leaves it out"),
        ],
        ids=str,
    )
    def test_what_cannot_be_taken_says_what_can(self, merged: Path, options: Any, words: str):
        assert_says(refusal(OptionError, Validator, merged, **options), words, "fix:")

    def test_a_checkpoint_or_another_object_is_no_merged_directory(self, ckpt: Path, merged: Path):
        opened = nbmerge.open_checkpoint(ckpt, progress=False)
        assert_says(refusal(OptionError, nbmerge.validate, opened), "a Checkpoint is no merged directory", "merge it")
        assert_says(refusal(OptionError, nbmerge.validate, RuntimeError()), "a RuntimeError is no directory", "fix:")

    def test_numbers_of_numpy_and_one_check_by_itself_are_taken(self, merged: Path):
        found = Validator(merged, checks="headers", sample=np.float32(0.5), workers=np.int64(2)).validate()
        assert [result.name for result in found.results] == ["headers"]
        message = refusal(OptionError, Validator, merged, checks=tuple("headers"))
        assert_says(message, "are letters", "checks=['headers']")
