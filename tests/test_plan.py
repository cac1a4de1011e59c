"""What a plan pins: no two plans that would write other bytes have one digest, and nothing it reads may change."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nbmerge
from nbmerge import InconsistentCheckpointError, TargetError
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, save_tiny_model, write_model_world
from tests.support.results import assert_same, bits_of_all, content_of, saved_bits


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return write_model_world(tmp_path / "run" / "actor", "llama")


def test_two_checkpoints_with_the_same_shapes_have_other_digests(ckpt: Path):
    opened = nbmerge.open_checkpoint(ckpt)
    a, b = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    swapped = replace(opened, tensors={**opened.tensors, a: opened[b], b: opened[a]})
    assert nbmerge.plan_merge(opened).digest == nbmerge.plan_merge(opened).digest
    assert nbmerge.plan_merge(opened).digest != nbmerge.plan_merge(swapped).digest


def test_a_source_that_was_replaced_with_its_old_time_has_another_digest(ckpt: Path):
    before = nbmerge.plan_merge(ckpt).digest
    (file,) = list(ckpt.glob("model_*_rank_0.pt"))
    stat = file.stat()
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert nbmerge.plan_merge(ckpt).digest != before


def test_the_config_is_written_as_it_was_planned(ckpt: Path, tmp_path: Path):
    plan = nbmerge.plan_merge(ckpt)
    config = ckpt / "huggingface" / "config.json"
    planned = config.read_bytes()
    config.write_bytes(planned.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 7'))
    assert config.read_bytes() != planned
    nbmerge.merge(plan, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_bytes())
    assert {**written, "dtype": None} == {**json.loads(planned), "dtype": None}


def test_a_side_file_that_changed_since_the_plan_is_told_before_a_byte_is_written(ckpt: Path, tmp_path: Path):
    plan = nbmerge.plan_merge(ckpt)
    (ckpt / "huggingface" / "tokenizer_config.json").write_text("{}")
    message = refusal(InconsistentCheckpointError, nbmerge.merge, plan, tmp_path / "out")
    assert_says(message, "changed since it was opened", "tokenizer_config.json", "fix:")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_dry_run_is_no_property_of_the_plan(ckpt: Path, tmp_path: Path):
    report = nbmerge.merge(ckpt, tmp_path / "out", dry_run=True)
    assert report.target is None and not (tmp_path / "out").exists()
    assert nbmerge.merge(report.plan, tmp_path / "out").target == tmp_path / "out"
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(memory_state("llama")))


def test_the_directory_that_the_config_came_from_is_no_target(ckpt: Path, tmp_path: Path):
    base = tmp_path / "base"
    (ckpt / "huggingface").rename(base)
    plan = nbmerge.plan_merge(ckpt, hf_model_config_path=base)
    before = content_of(base)
    message = refusal(TargetError, nbmerge.merge, plan, base, overwrite=True)
    assert_says(message, "config and tokenizer are read from", str(base), "fix:")
    assert content_of(base) == before


@pytest.mark.parametrize("name", ["train.py", "notes.md", "results.json", "requirements.txt", "photo.png"])
def test_a_file_that_no_merge_wrote_is_not_overwritten_even_beside_a_receipt(ckpt: Path, tmp_path: Path, name: str):
    nbmerge.merge(ckpt, tmp_path / "out")
    (tmp_path / "out" / name).write_text("weeks of work")
    message = refusal(TargetError, nbmerge.merge, ckpt, tmp_path / "out", overwrite=True)
    assert_says(message, name, "no part of a model", "fix:")
    assert (tmp_path / "out" / name).read_text() == "weeks of work"


def test_a_link_out_of_the_configs_directory_is_not_followed(ckpt: Path, tmp_path: Path):
    (tmp_path / "secret").write_text("PRIVATE KEY")
    (ckpt / "huggingface" / "tokenizer.json").unlink(missing_ok=True)
    (ckpt / "huggingface" / "tokenizer.json").symlink_to(tmp_path / "secret")
    message = refusal(nbmerge.PlanError, nbmerge.merge, ckpt, tmp_path / "out")
    assert_says(message, "tokenizer.json", "link", "fix:")
    assert not (tmp_path / "out").exists()


def test_a_crash_between_the_two_renames_loses_nothing(ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out"
    nbmerge.merge(ckpt, out)
    before = content_of(out)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target == out and ".old" not in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        nbmerge.merge(ckpt, out, overwrite=True, dtype="bfloat16")
    assert content_of(out) == before
    monkeypatch.undo()
    nbmerge.merge(ckpt, out, overwrite=True, dtype="bfloat16")
    assert not list(tmp_path.glob(".out*"))


def test_lazy_tensors_given_to_a_merger_pin_their_files(ckpt: Path, tmp_path: Path):
    config = nbmerge.ModelMergerConfig(local_dir=str(ckpt), target_dir=str(tmp_path / "out"))
    merger = nbmerge.FSDPModelMerger(config)
    report = merger.save_hf_model_and_tokenizer(merger.open().tensors)
    assert {file["name"] for file in report.receipt["source"]["files"]} == {p.name for p in ckpt.glob("model_*.pt")}


def test_a_strided_tensor_in_memory_is_written_as_it_reads(ckpt: Path, tmp_path: Path):
    state = memory_state("llama")
    turned = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in state.items()}
    assert any(not t.is_contiguous() for t in turned.values())
    config = nbmerge.ModelMergerConfig(local_dir=str(ckpt), target_dir=str(tmp_path / "out"))
    nbmerge.FSDPModelMerger(config).save_hf_model_and_tokenizer(turned)
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(state))


def test_a_merger_object_takes_what_the_function_takes(ckpt: Path, tmp_path: Path):
    options = {"dry_run": True, "max_shard_size": "4KB", "workers": 1}
    config = nbmerge.ModelMergerConfig(local_dir=str(ckpt), target_dir=str(tmp_path / "out"), options=options)
    report = nbmerge.FSDPModelMerger(config).merge_and_save()
    assert len(report.plan.files) > 1
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_the_class_keeps_in_fp32_is_cast_up_and_not_down(tmp_path: Path):
    ckpt = write_model_world(tmp_path / "ckpt", "deepseek_v3")
    bias = next(name for name in memory_state("deepseek_v3") if name.endswith("e_score_correction_bias"))
    down = nbmerge.plan_merge(ckpt, dtype="bfloat16")
    assert down.tensors[bias].expr.dtype.name == "float32"
    state = {name: t.bfloat16() for name, t in memory_state("deepseek_v3").items()}
    low = tmp_path / "low"
    low.mkdir()
    torch.save(state, low / "model_world_size_1_rank_0.pt")
    up = nbmerge.plan_merge(low, hf_model_config_path=ckpt / "huggingface", dtype="float32")
    assert {tensor.expr.dtype.name for tensor in up.tensors.values()} == {"float32"}


def test_a_head_that_differs_from_what_it_is_tied_to_is_refused_under_published_names_too(tmp_path: Path):
    saved = save_tiny_model("qwen2_5_vl", tmp_path / "saved")
    published = load_file(saved / "model.safetensors")
    assert "model.embed_tokens.weight" in published, "the family renames its parts"
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    torch.save(published, ckpt / "model_world_size_1_rank_0.pt")
    assert not torch.equal(published["lm_head.weight"], published["model.embed_tokens.weight"])
    options = {"hf_model_config_path": saved, "tie_word_embedding": True}
    message = refusal(nbmerge.PlanError, nbmerge.merge, ckpt, tmp_path / "out", **options)
    assert_says(message, "lm_head.weight", "tied to model.embed_tokens.weight", "fix:")
    published["lm_head.weight"] = published["model.embed_tokens.weight"].clone()
    torch.save(published, ckpt / "model_world_size_1_rank_0.pt")
    report = nbmerge.merge(ckpt, tmp_path / "out", **options)
    assert [tie.name for tie in report.plan.ties] == ["lm_head.weight"]
    assert "lm_head.weight" not in saved_bits(tmp_path / "out")


def test_what_interrupted_merges_of_other_plans_left_is_removed_and_nothing_else(ckpt: Path, tmp_path: Path):
    abandoned, running = tmp_path / ".out.nbmerge-0123456789ab", tmp_path / ".out.nbmerge-ba9876543210"
    foreign = tmp_path / ".out.nbmerge-notes"
    for directory in (abandoned, running, foreign):
        directory.mkdir()
        (directory / "model.safetensors").touch()
    (tmp_path / ".out.nbmerge-ba9876543210.lock").touch()
    nbmerge.merge(ckpt, tmp_path / "out")
    assert not abandoned.exists()
    assert (running / "model.safetensors").exists() and (foreign / "model.safetensors").exists()


def test_files_that_are_not_copied_are_named(ckpt: Path, tmp_path: Path):
    (ckpt / "huggingface" / "runs").mkdir()
    (ckpt / "huggingface" / "old.safetensors").touch()
    report = nbmerge.merge(ckpt, tmp_path / "out")
    assert report.plan.left_out == ("old.safetensors", "runs")
    assert report.receipt["left_out"] == ["old.safetensors", "runs"]
    assert "2 left out" in repr(report)


def test_what_speaks_of_the_run_is_not_copied(ckpt: Path, tmp_path: Path):
    """A Trainer keeps its config beside DeepSpeed's `latest`, with which a result would look like a checkpoint."""
    beside = ("latest", "latest_checkpointed_iteration.txt", "trainer_state.json", "zero_to_fp32.py")
    for name in beside:
        (ckpt / "huggingface" / name).write_text("global_step2")
    report = nbmerge.merge(ckpt, tmp_path / "out")
    assert report.plan.left_out == beside
    assert not {*beside} & {path.name for path in (tmp_path / "out").iterdir()}
    assert nbmerge.open_checkpoint(tmp_path / "out").backend == "hf"
