"""What lies beside the weights: nothing that decides the model or its tokens changes in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nbmerge
from nbmerge import ValidationReport
from nbmerge.receipt import receipt, sha256_of
from nbmerge.validation.findings import ERROR, FAILED, PASSED, SKIPPED, WARNED, WARNING
from nbmerge.validation.recorded import ReceiptCheck
from tests.support.messages import assert_says
from tests.support.models import HAS_CONVERSIONS, save_tiny_model, write_model_world
from tests.validation.directories import edit_json, only, run, sentences, write_tokenizer

RECEIPT = "nbmerge_receipt.json"
# The key of the rotary embedding under transformers 5, and under 4.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}} if HAS_CONVERSIONS else {"rope_theta": 3.0}


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beside")
    write_model_world(root / "actor", "llama")
    write_tokenizer(root / "actor" / "huggingface", chat_template="{{ messages }}")
    (root / "actor" / "huggingface" / "generation_config.json").write_text('{"temperature": 0.7}')
    (root / "actor" / "huggingface" / "modeling_own.py").write_text("A = 1\n")
    nbmerge.merge(root / "actor", root / "out", progress=False)
    return root


@pytest.fixture
def ckpt(_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_made / "actor", tmp_path / "actor")


@pytest.fixture
def merged(_made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(_made / "out", tmp_path / "out")


def validated(directory: Path, checkpoint: Any, *checks: str) -> ValidationReport:
    return nbmerge.validate(
        directory, checkpoint=checkpoint, checks=checks or ["receipt", "side_files"], progress=False
    )


def permute(directory: Path) -> None:
    """The same tokens with other ids."""
    content = json.loads((directory / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(vocab, reversed(vocab.values()), strict=True))
    (directory / "tokenizer.json").write_text(json.dumps(content))


CHANGES: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("config.json", lambda d: edit_json(d / "config.json", rms_norm_eps=0.5), ERROR, "rms_norm_eps 0.5 here"),
    ("config.json", lambda d: edit_json(d / "config.json", **ROPE), ERROR, "rope_theta 3.0 here, 10000"),
    ("config.json", lambda d: edit_json(d / "config.json", auto_map={"AutoModel": "x.Y"}), ERROR, "absent there"),
    ("tokenizer.json", permute, ERROR, "model.vocab."),
    ("modeling_own.py", lambda d: (d / "modeling_own.py").write_text("A = 2\n"), ERROR, "not the same"),
    ("chat_template.jinja", lambda d: (d / "chat_template.jinja").write_text("{{ evil }}"), WARNING, "not the same"),
    ("generation_config.json", lambda d: edit_json(d / "generation_config.json", temperature=1), WARNING, "0.7 there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "severity", "detail"), CHANGES, ids=lambda value: str(value)[:24])
def test_a_change_is_found_by_the_receipt_and_against_the_checkpoint(
    ckpt: Path, merged: Path, name: str, change: Callable[[Path], object], severity: str, detail: str
):
    change(merged)
    found = validated(merged, ckpt)
    assert {(f.subject, f.severity) for f in found.findings} == {(name, severity)}
    by_receipt, by_plan = found.findings
    assert (by_receipt.what, by_plan.what) == (
        "was changed after the merge", "is not what the merge of the checkpoint writes",
    )  # fmt: skip
    assert_says(by_plan.detail, detail)
    assert "checks=" in by_receipt.fix and "checks=" in by_plan.fix
    assert found.ok == (severity == WARNING)


def test_a_merge_passes_and_so_does_one_whose_json_was_only_formatted(ckpt: Path, merged: Path):
    found = validated(merged, ckpt)
    assert (found.findings, found["side_files"].status) == ((), PASSED)
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert validated(merged, ckpt, "side_files")["side_files"].status == PASSED
    assert only(run(ReceiptCheck(), merged), "was changed").subject == "config.json"


def test_a_report_and_a_plan_bring_the_side_files_too(ckpt: Path, tmp_path: Path):
    report = nbmerge.merge(ckpt, tmp_path / "again", progress=False)
    edit_json(tmp_path / "again" / "config.json", rms_norm_eps=0.5)
    for checkpoint in (None, report, report.plan):
        found = validated(report if checkpoint is None else tmp_path / "again", checkpoint, "source", "side_files")  # type: ignore[arg-type]
        assert (found["source"].status, found["side_files"].status) == (PASSED, FAILED)


@pytest.mark.parametrize("name", ["extra.py", "chat_template.json", "additional_chat_templates/evil.jinja"])
def test_code_and_templates_that_were_added_are_told(ckpt: Path, merged: Path, name: str):
    (merged / name).parent.mkdir(exist_ok=True)
    (merged / name).write_text("{}")
    found = validated(merged, ckpt)
    assert found.ok
    assert [(f.what, f.subject) for f in found.findings] == [
        ("was added after the merge", name), ("is in the directory, and not beside the checkpoint", name),
    ]  # fmt: skip


def test_a_file_that_is_missing_is_told_and_one_that_came_to_the_checkpoint_later_is_not(ckpt: Path, merged: Path):
    (merged / "tokenizer.json").unlink()
    (ckpt / "huggingface" / "notes.json").write_text("{}")
    found = validated(merged, ckpt, "side_files")
    (finding,) = found.findings
    assert (finding.subject, finding.severity) == ("tokenizer.json", ERROR)
    assert finding.what == "is beside the checkpoint, and not in the directory"


def test_a_plan_whose_config_is_gone_is_told_and_proves_what_it_holds_itself(ckpt: Path, merged: Path):
    plan = nbmerge.plan_merge(ckpt)
    shutil.rmtree(ckpt / "huggingface")
    found = validated(merged, plan, "side_files")
    assert {f.what for f in found.findings} == {"cannot be compared"}
    assert "config.json" not in {f.subject for f in found.findings}, "the plan holds its content"
    edit_json(merged / "config.json", rms_norm_eps=0.5)
    assert validated(merged, plan, "side_files")["side_files"].status == FAILED


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_another_one(ckpt: Path, merged: Path, content: str):
    (merged / "config.json").write_text(content)
    (finding,) = validated(merged, ckpt, "side_files").findings
    assert finding.detail == "they do not hold the same JSON"


class TestReceipt:
    def test_has_size_and_sha256_of_every_small_file_beside_their_plain_names(self, merged: Path):
        content = json.loads((merged / RECEIPT).read_text())
        assert "config.json" in content["side_files"] and "modeling_own.py" in content["side_files"]
        assert content["side_digests"] == [
            {"name": name, "bytes": (merged / name).stat().st_size, "sha256": sha256_of(merged / name)}
            for name in content["side_files"]
        ]

    @pytest.mark.parametrize("change", [lambda path: path.write_text("A = 2\n"), lambda path: path.unlink()])
    def test_speaks_of_no_digest_where_the_source_changed_after_it_was_copied(
        self, ckpt: Path, change: Callable[[Path], object]
    ):
        plan = nbmerge.plan_merge(ckpt)
        change(ckpt / "huggingface" / "modeling_own.py")
        content = receipt(plan, {}, [])
        assert "modeling_own.py" in content["side_files"]
        names = {entry["name"] for entry in content["side_digests"]}
        assert "config.json" in names and "modeling_own.py" not in names

    def test_of_an_earlier_version_has_names_only_and_no_false_alarm(self, ckpt: Path, merged: Path):
        edit_json(merged / RECEIPT, side_digests=...)
        edit_json(merged / "config.json", rms_norm_eps=0.5)
        outcome = run(ReceiptCheck(), merged)
        assert sentences(outcome) == [] and outcome.said.endswith("sizes of the weight files")
        assert validated(merged, ckpt)["side_files"].status == FAILED

    def test_of_another_version_is_a_warning(self, merged: Path):
        edit_json(merged / RECEIPT, schema=2)
        assert "schema is 2" in only(run(ReceiptCheck(), merged), "is of another version", WARNING).detail
        edit_json(merged / RECEIPT, schema=...)
        assert "schema is None" in only(run(ReceiptCheck(), merged), "is of another version", WARNING).detail


class TestWithoutAReceipt:
    """Another tool wrote the directory: what it may do otherwise is no error."""

    @pytest.fixture
    def saved(self, ckpt: Path, tmp_path: Path) -> Path:
        save_tiny_model("llama", tmp_path / "saved")
        write_tokenizer(tmp_path / "saved", chat_template="{{ messages }}")
        (tmp_path / "saved" / "generation_config.json").write_text('{"temperature": 0.7}')
        shutil.copy(ckpt / "huggingface" / "modeling_own.py", tmp_path / "saved")
        return tmp_path / "saved"

    def test_what_save_pretrained_writes_says_the_same(self, ckpt: Path, saved: Path):
        found = validated(saved, ckpt, "source", "side_files")
        assert {result.status for result in found.results} == {PASSED}, found

    def test_defaults_that_are_written_out_or_left_out_are_no_difference(self, ckpt: Path, saved: Path):
        edit_json(saved / "config.json", rms_norm_eps=..., transformers_version="4.40.0", torch_dtype="bfloat16")
        edit_json(ckpt / "huggingface" / "config.json", use_cache=..., attention_dropout=...)
        assert validated(saved, ckpt, "side_files")["side_files"].status == PASSED

    def test_another_value_or_a_lost_file_is_a_warning(self, ckpt: Path, saved: Path):
        edit_json(saved / "config.json", rms_norm_eps=0.5)
        (saved / "modeling_own.py").unlink()
        found = validated(saved, ckpt, "side_files")
        assert found.ok and found["side_files"].status == WARNED
        assert {f.subject: f.what for f in found.findings} == {
            "config.json": "says something else than the checkpoint's",
            "modeling_own.py": "is beside the checkpoint, and not in the directory",
        }

    def test_of_a_long_list_the_first_item_that_differs_is_told(self, ckpt: Path, saved: Path):
        tokens = json.loads((saved / "tokenizer.json").read_text())["added_tokens"]
        more = {**tokens[-1], "id": 300, "content": "<|tool|>"}
        edit_json(saved / "tokenizer.json", added_tokens=[*tokens, more])
        (finding,) = validated(saved, ckpt, "side_files").findings
        assert_says(finding.detail, f"added_tokens[{len(tokens)}] {{'id': 300, 'content': '<|tool|>'", "absent there")
        edit_json(saved / "tokenizer.json", added_tokens=[{**tokens[0], "content": "<|end|>"}, *tokens[1:]])
        (finding,) = validated(saved, ckpt, "side_files").findings
        assert finding.detail == f"added_tokens[0].content '<|end|>' here, {tokens[0]['content']!r} there"

    def test_of_a_list_with_nan_nothing_after_it_is_missed(self, ckpt: Path, saved: Path):
        for directory, last in ((saved, 1), (ckpt / "huggingface", 2)):
            edit_json(directory / "generation_config.json", long=[float("nan"), "x" * 80, last, 3, 4.0])
        (finding,) = validated(saved, ckpt, "side_files").findings
        assert finding.detail == "long[2] 1 here, 2 there"
        edit_json(saved / "generation_config.json", long=[float("nan"), "x" * 80, 2, 3.0, 4])
        assert validated(saved, ckpt, "side_files").findings == ()

    def test_a_config_that_makes_no_model_is_compared_as_it_stands(self, ckpt: Path, saved: Path):
        edit_json(saved / "config.json", architectures=["Nothing"])
        (finding,) = validated(saved, ckpt, "side_files").findings
        assert_says(finding.detail, "architectures ['Nothing'] here, ['LlamaForCausalLM'] there")


def test_a_checkpoint_without_a_config_of_its_own_proves_nothing_about_it(ckpt: Path, merged: Path):
    shutil.rmtree(ckpt / "huggingface")
    (merged / RECEIPT).unlink()
    found = nbmerge.validate(merged, checkpoint=ckpt, no_run=True, progress=False)
    assert found["side_files"].status == SKIPPED and found["source"].status == PASSED
    assert_says(found["side_files"].outcome.said, "the directory's own was taken")
    assert not validated(merged, ckpt, "side_files").ok
