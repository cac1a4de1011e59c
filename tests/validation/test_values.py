"""Every element of a merged directory against its shards and against a reference: nothing passes that differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import nbmerge
from nbmerge import NotACheckpointError, OptionError, ValidationReport
from nbmerge.engine.safetensors_file import read_header
from nbmerge.geometry import unravel
from nbmerge.validation.findings import FAILED, PASSED, SKIPPED, WARNED
from tests.support import examples
from tests.support.megatron_models import megatron_state, write_megatron
from tests.support.messages import assert_says, refusal
from tests.support.models import published_state, save_tiny_model, write_config, write_model_world
from tests.support.worlds import write_mesh_world

WEIGHTS = "model.safetensors"


def validated(directory: Path, **options: Any) -> ValidationReport:
    """The checks of values, of those for which there is something to compare with."""
    given = {"source": not isinstance(directory, Path) or "checkpoint" in options, "reference": "reference" in options}
    options.setdefault("checks", [name for name, has in given.items() if has])
    return nbmerge.validate(directory, progress=False, **options)


def rewritten(directory: Path, changes: dict[str, Any]) -> None:
    """The directory's file with other tensors; None takes one away."""
    tensors = {**load_file(directory / WEIGHTS), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_model_world(tmp_path / "actor", "qwen2", dtype="bfloat16")


@pytest.fixture
def merged(ckpt: Path, tmp_path: Path) -> Path:
    nbmerge.merge(ckpt, tmp_path / "merged")
    return tmp_path / "merged"


class TestSource:
    @pytest.mark.parametrize(
        "options",
        [
            {}, {"dtype": "float16"}, {"dialect": "transformers"}, {"max_shard_size": "4KB"},
            {"tie_word_embedding": True},
            {"mesh_dim_names": "fsdp", "mesh_shape": "2", "placements": {"*": ["Shard(0)"]}},
        ],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
    def test_a_merge_passes_with_whatever_options_its_receipt_has(self, tmp_path: Path, model: str, options: Any):
        if options.get("tie_word_embedding"):
            model = "qwen2_tied"
        ckpt = write_model_world(tmp_path / "actor", model, dtype="bfloat16")
        report = nbmerge.merge(ckpt, tmp_path / "out", **options)
        for source in (ckpt, nbmerge.plan_merge(ckpt, **options)):
            found = validated(tmp_path / "out", checkpoint=source)
            assert found.ok and found["source"].status == PASSED, found
            said = found["source"].outcome.said
            assert said.startswith(f"compared every element of {len(report.plan.tensors)} tensors with {ckpt}")

    def test_an_opened_checkpoint_is_taken_too(self, ckpt: Path, merged: Path):
        assert validated(merged, checkpoint=nbmerge.open_checkpoint(ckpt)).ok

    def test_a_report_brings_its_checkpoint(self, ckpt: Path, tmp_path: Path):
        report = nbmerge.merge(ckpt, tmp_path / "out")
        found = validated(report)  # type: ignore[arg-type]
        assert found["source"].status == PASSED
        assert found.sources == {"checkpoint": str(ckpt)}
        message = refusal(OptionError, nbmerge.validate, nbmerge.merge(ckpt, dry_run=True))
        assert_says(message, "dry run wrote nothing", "fix:")

    @pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
    def test_megatron_is_compared_after_its_rules(self, tmp_path: Path, model: str):
        ckpt = write_megatron(tmp_path / "ckpt", megatron_state(model), model)
        nbmerge.merge(ckpt, tmp_path / "out")
        assert validated(tmp_path / "out", checkpoint=ckpt)["source"].status == PASSED
        rewritten(tmp_path / "out", {"model.norm.weight": torch.full((16,), 0.5)})
        assert validated(tmp_path / "out", checkpoint=ckpt)["source"].status == FAILED

    def test_a_value_model_made_of_a_causal_config(self, tmp_path: Path):
        state = published_state("qwen2_value")
        write_mesh_world(tmp_path / "critic", state, (2,))
        write_config(tmp_path / "critic" / "huggingface", "qwen2")
        nbmerge.merge(tmp_path / "critic", tmp_path / "out", is_value_model=True)
        assert validated(tmp_path / "out", checkpoint=tmp_path / "critic")["source"].status == PASSED

    def test_the_config_that_the_merge_was_given_is_not_needed_any_more(self, tmp_path: Path, monkeypatch):
        ckpt = write_model_world(tmp_path / "actor", "qwen2")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        shutil.move(ckpt / "huggingface", tmp_path / "config")
        nbmerge.merge(ckpt, tmp_path / "out", hf_model_config_path="config")
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert validated(tmp_path / "out", checkpoint=ckpt)["source"].status == PASSED
        shutil.rmtree(tmp_path / "config")
        assert validated(tmp_path / "out", checkpoint=ckpt)["source"].status == PASSED

    @examples(40)
    @given(data=st.data())
    def test_one_flipped_bit_anywhere_fails_and_is_named(self, whole: Any, data: st.DataObject):
        plan, directory, raw = whole
        path = directory / WEIGHTS
        entries = read_header(path)
        entry = entries[data.draw(st.sampled_from(sorted(entries)))]
        byte = data.draw(st.integers(0, entry.nbytes - 1))
        changed = bytearray(raw)
        changed[entry.offset + byte] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(changed)
        found = validated(directory, checkpoint=plan, checks=("source",), workers=data.draw(st.integers(1, 3)))
        (finding,) = found.findings
        index = list(unravel(byte // entry.dtype.itemsize, entry.shape))
        assert not found.ok and finding.subject == entry.name
        assert f"1 of {entry.nbytes // entry.dtype.itemsize:,} elements, the first at {index}" in finding.detail

    @pytest.fixture(scope="class")
    def whole(self, tmp_path_factory: pytest.TempPathFactory):
        """A plan, its directory, and the bytes of its weights as they were merged."""
        root = tmp_path_factory.mktemp("bits")
        plan = nbmerge.plan_merge(write_model_world(root / "actor", "qwen2", dtype="bfloat16"))
        nbmerge.merge(plan, root / "out")
        return plan, root / "out", (root / "out" / WEIGHTS).read_bytes()

    def test_all_that_differs_is_told_with_how_much(self, ckpt: Path, merged: Path):
        norm = load_file(merged / WEIGHTS)["model.norm.weight"]
        norm[3:7] += 1
        head = load_file(merged / WEIGHTS)["lm_head.weight"][:30].clone()
        extra = torch.zeros(2)
        rewritten(merged, {"model.norm.weight": norm, "lm_head.weight": head, "extra": extra,
                           "model.layers.0.input_layernorm.weight": None})  # fmt: skip
        found = validated(merged, checkpoint=ckpt)
        told = {finding.subject: f"{finding.what}: {finding.detail}" for finding in found.findings}
        assert_says(told["model.norm.weight"], "differs from the checkpoint", "4 of 16 elements, the first at [3]")
        assert_says(told["lm_head.weight"], "another shape or dtype", "bfloat16 [30, 16] here, bfloat16 [37, 16] by")
        assert_says(told["extra"], "no tensor of the checkpoint becomes it")
        assert_says(told["model.layers.0.input_layernorm.weight"], "and not in the directory")
        assert len(told) == 4
        assert_says(
            refusal(nbmerge.VerificationError, found.raise_if_failed), "is not valid: 4 errors", "4 of 16", "fix:"
        )

    def test_without_a_checkpoint_it_says_which_one_to_pass(self, ckpt: Path, merged: Path):
        found = validated(merged, checks=["source", "headers"])
        assert found["source"].status == SKIPPED
        assert_says(found["source"].outcome.said, "pass checkpoint=", f"the receipt names {ckpt}")
        assert nbmerge.validate(merged, no_run=True, progress=False).ok
        assert not found.ok, "it was asked for by name"
        assert found.sentence == "not proved: source could not be run"
        assert_says(refusal(nbmerge.VerificationError, found.raise_if_failed), "source was asked for", "checkpoint=")

    def test_a_checkpoint_that_is_not_there_is_the_caller_s_mistake(self, merged: Path, tmp_path: Path):
        message = refusal(NotACheckpointError, validated, merged, checkpoint=tmp_path / "absent")
        assert_says(message, "no such directory", "absent")
        assert_says(refusal(NotACheckpointError, validated, tmp_path / "absent"), "no such directory", "fix:")
        assert_says(refusal(NotACheckpointError, validated, merged / WEIGHTS), "a model is a directory")

    def test_a_checkpoint_that_cannot_be_read_any_more_is_a_finding(self, ckpt: Path, merged: Path):
        (ckpt / "model_world_size_2_rank_1.pt").unlink()
        found = validated(merged, checkpoint=ckpt, checks=["source", "side_files", "reference"])
        (finding,) = found.findings
        assert_says(
            f"{finding.what}: {finding.detail}",
            "the checkpoint cannot be compared",
            "1 rank of 2 is missing",
            "rank_1.pt",
        )
        assert found["reference"].status == found["side_files"].status == SKIPPED
        assert validated(merged, checkpoint=ckpt, checks=["side_files"])["side_files"].status == FAILED

    def test_a_step_further_on_is_not_the_same(self, ckpt: Path, merged: Path, tmp_path: Path):
        other = {name: tensor + 1 for name, tensor in published_state("qwen2", "bfloat16").items()}
        write_model_world(tmp_path / "next", "qwen2", dtype="bfloat16", state=other)
        found = validated(merged, checkpoint=tmp_path / "next")
        assert len(found.findings) == len(load_file(merged / WEIGHTS))
        assert len(found["source"].groups) == 1


class TestTied:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> tuple[Path, Path]:
        ckpt = write_model_world(tmp_path / "actor", "qwen2_tied", dtype="bfloat16")
        nbmerge.merge(ckpt, tmp_path / "out")
        return ckpt, tmp_path / "out"

    @pytest.mark.parametrize("receipt", [True, False])
    @pytest.mark.parametrize("only_the_alias", [True, False])
    def test_a_tied_copy_is_compared_with_what_it_is_tied_to(self, tied: Any, receipt: bool, only_the_alias: bool):
        ckpt, directory = tied
        kept = "model.embed_tokens.weight"
        copy = load_file(directory / WEIGHTS)[kept].clone()
        if not receipt:
            (directory / "nbmerge_receipt.json").unlink()
        rewritten(directory, {"lm_head.weight": copy, **({kept: None} if only_the_alias else {})})
        found = validated(directory, checkpoint=ckpt)
        assert found["source"].status == PASSED, found
        copy[1, 2] += 1
        rewritten(directory, {"lm_head.weight": copy})
        (finding,) = validated(directory, checkpoint=ckpt).findings
        assert finding.subject == "lm_head.weight" and "the first at [1, 2]" in finding.detail


class TestWithoutAReceipt:
    def test_names_in_memory_are_recognised(self, tmp_path: Path):
        ckpt = write_model_world(tmp_path / "actor", "qwen3_moe", dtype="bfloat16")
        nbmerge.merge(ckpt, tmp_path / "out", dialect="transformers")
        (tmp_path / "out" / "nbmerge_receipt.json").unlink()
        found = validated(tmp_path / "out", checkpoint=ckpt)
        assert found["source"].status == PASSED
        assert_says(found["source"].outcome.said, "the default options, for want of a receipt")

    def test_a_silent_cast_of_another_tool_is_told_and_proved(self, tmp_path: Path):
        ckpt = write_model_world(tmp_path / "actor", "qwen2", dtype="float32")
        save_tiny_model("qwen2", tmp_path / "out", "float32")
        cast = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "out" / WEIGHTS).items()}
        rewritten(tmp_path / "out", cast)
        found = validated(tmp_path / "out", checkpoint=ckpt)
        assert found.ok and found["source"].status == WARNED
        assert_says(found.findings[0].what + found.findings[0].detail, "was cast, and nothing says so", "bfloat16")
        cast["model.norm.weight"] = cast["model.norm.weight"] + 1
        rewritten(tmp_path / "out", cast)
        assert validated(tmp_path / "out", checkpoint=ckpt)["source"].status == FAILED

    def test_a_receipt_that_is_no_receipt_breaks_nothing(self, ckpt: Path, merged: Path):
        for content in ("[]", "{", "null", '{"options": []}', '{"options": {"dtype": 7}, "source": 3}',
                        json.dumps({"options": {"hf_model_config_path": "\x00", "backend": "nonsense"}})):  # fmt: skip
            (merged / "nbmerge_receipt.json").write_text(content)
            found = validated(merged, checkpoint=ckpt)
            assert found["source"].status in (PASSED, FAILED)


class TestReference:
    def test_the_same_bits(self, merged: Path, tmp_path: Path):
        save_tiny_model("qwen2", tmp_path / "ref", "bfloat16")
        found = validated(merged, reference=tmp_path / "ref")
        assert found["reference"].status == PASSED
        assert_says(found["reference"].outcome.said, str(tmp_path / "ref"), "which holds the same bits")

    def test_the_unmerged_checkpoint_of_the_other_run(self, ckpt: Path, merged: Path):
        assert validated(merged, reference=ckpt)["reference"].status == PASSED

    @pytest.mark.parametrize(("by", "atol", "rtol", "ok"), [
        (4e-7, 1e-6, 1e-6, True), (4e-6, 1e-6, 1e-6, False), (4e-6, 1e-5, 0.0, True), (4e-6, 0.0, 1.0, True),
        (0.0, 0.0, 0.0, True), (4e-7, 0.0, 0.0, False),
    ])  # fmt: skip
    def test_tolerances_are_those_of_assert_close(self, tmp_path: Path, by: float, atol: float, rtol: float, ok: bool):
        ckpt = write_model_world(tmp_path / "actor", "qwen2")
        nbmerge.merge(ckpt, tmp_path / "out")
        save_tiny_model("qwen2", tmp_path / "ref")
        ours = load_file(tmp_path / "out" / WEIGHTS)["model.norm.weight"]
        theirs = ours.clone()
        theirs[5] += by
        rewritten(tmp_path / "ref", {"model.norm.weight": theirs})
        torch_says = torch.allclose(ours, theirs, atol=atol, rtol=rtol)
        found = validated(tmp_path / "out", reference=tmp_path / "ref", atol=atol, rtol=rtol)
        assert found.ok == torch_says == ok
        if not ok:
            largest = float((ours.double() - theirs.double()).abs().max())
            assert_says(found.findings[0].detail, "1 of 16 elements", f"largest difference is {largest:g} at [5]")

    def test_the_largest_difference_is_shown_whatever_the_order(self, merged: Path, tmp_path: Path):
        save_tiny_model("qwen2", tmp_path / "ref", "bfloat16")
        head = load_file(tmp_path / "ref" / WEIGHTS)["lm_head.weight"]
        head[2, 1] += 1
        head[30, 7] += 5
        head[31, 0] = float("nan")
        head[36, 15] = float("inf")
        rewritten(tmp_path / "ref", {"lm_head.weight": head})
        detail = validated(merged, reference=tmp_path / "ref").findings[0].detail
        assert_says(detail, "4 of 592 elements", "the largest difference is inf at [31, 0]", "nan there")

    def test_another_dtype_is_told(self, merged: Path, tmp_path: Path):
        save_tiny_model("qwen2", tmp_path / "ref", "float32")
        found = validated(merged, reference=tmp_path / "ref")
        assert {finding.what for finding in found.findings} == {"has another shape or dtype than the reference"}
        assert len(found["reference"].groups) == 1

    def test_names_in_memory_are_the_same_model(self, tmp_path: Path):
        ckpt = write_model_world(tmp_path / "actor", "qwen3_moe", dtype="bfloat16")
        for dialect in ("hub", "transformers"):
            nbmerge.merge(ckpt, tmp_path / dialect, dialect=dialect)
        assert validated(tmp_path / "hub", reference=tmp_path / "transformers")["reference"].status == PASSED

    def test_missing_and_further_tensors(self, merged: Path, tmp_path: Path):
        save_tiny_model("qwen2", tmp_path / "ref", "bfloat16")
        rewritten(tmp_path / "ref", {"model.norm.weight": None, "model.more": torch.zeros(1)})
        told = {f.subject: f.what for f in validated(merged, reference=tmp_path / "ref").findings}
        assert told == {"model.norm.weight": "is not in the reference", "model.more": "is in the reference only"}


class TestSample:
    def test_says_what_it_looked_at(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("nbmerge.engine.scan.scan.__kwdefaults__", {**scan_defaults(), "block_bytes": 64})
        ckpt = write_model_world(tmp_path / "actor", "qwen2")
        nbmerge.merge(ckpt, tmp_path / "out")
        found = validated(tmp_path / "out", checkpoint=ckpt, sample=0.2)
        said = found["source"].outcome.said
        assert_says(said, "sampled", "blocks", "% of the bytes", "of 27 tensors")
        looked, of_all = (int(word.replace(",", "")) for word in (said.split()[1], said.split()[3]))
        assert 0 < looked < of_all
        assert "sample" in found["source"].title and "every element" not in found["source"].title
        assert_says(found.sentence, "only a sample of ", "% of the bytes: source")
        whole = validated(tmp_path / "out", checkpoint=ckpt, sample=1)
        assert "every element" in whole["source"].title and "sample" not in whole.sentence
        assert validated(tmp_path / "out", checkpoint=ckpt, sample=0.2)["source"].outcome.said == said

    def test_one_that_leaves_nothing_out_is_no_sample(self, ckpt: Path, merged: Path):
        found = validated(merged, checkpoint=ckpt, sample=0.5)
        assert "every element" in found["source"].title and "sample" not in found.sentence

    @pytest.mark.parametrize("sample", [0, -1, 1.5, float("nan"), "0.5", None, True])
    def test_must_be_a_share(self, merged: Path, sample: Any):
        assert_says(refusal(OptionError, validated, merged, sample=sample), "sample=", "fix:", "0.01")


def scan_defaults() -> dict[str, Any]:
    from nbmerge.engine.scan import scan

    return dict(scan.__kwdefaults__ or {})
