"""Directories with an adapter: proved against the checkpoint, and an adapter alone is no broken model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nbmerge
from nbmerge.errors import ConfigError, NotACheckpointError
from tests.support.adapters import adapted, write_directory
from tests.support.messages import assert_says, refusal
from tests.support.models import save_tiny_model, write_config
from tests.support.worlds import write_mesh_world


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    made = adapted()
    write_mesh_world(tmp_path / "ckpt", made.state(), (2,))
    write_config(tmp_path / "ckpt" / "huggingface", "qwen2")
    made.model.peft_config["default"].save_pretrained(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def results(directory: Path, ckpt: Path) -> dict[str, Any]:
    return {one.name: one for one in nbmerge.validate(directory, checkpoint=ckpt, no_run=True).results}


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("mode", ["fold", "split"])
def test_a_model_is_proved_and_a_flipped_bit_found(tmp_path: Path, ckpt: Path, mode: str):
    nbmerge.merge(ckpt, tmp_path / "out", lora=mode)
    assert results(tmp_path / "out", ckpt)["source"].status == "passed"
    flip_a_bit(tmp_path / "out" / "model.safetensors")
    (finding,) = results(tmp_path / "out", ckpt)["source"].outcome.findings
    assert finding.what == "differs from the checkpoint"


@pytest.mark.parametrize("mode", ["split", "adapter"])
def test_a_flipped_bit_of_the_adapter_is_found(tmp_path: Path, ckpt: Path, mode: str):
    nbmerge.merge(ckpt, tmp_path / "out", lora=mode)
    assert results(tmp_path / "out", ckpt)["source"].status == "passed"
    flip_a_bit(tmp_path / "out" / "lora_adapter" / "adapter_model.safetensors")
    (finding,) = results(tmp_path / "out", ckpt)["source"].outcome.findings
    assert finding.what == "differs from the checkpoint" and finding.subject.startswith(
        "lora_adapter/base_model.model."
    )


def test_an_adapter_alone_is_no_broken_model(tmp_path: Path, ckpt: Path):
    nbmerge.merge(ckpt, tmp_path / "out", lora="adapter")
    found = results(tmp_path / "out", ckpt)
    assert {name for name, one in found.items() if one.status == "failed"} == set()
    assert {name for name, one in found.items() if one.status == "passed"} >= {"paths", "config", "receipt", "source"}
    assert found["structure"].outcome.said == "the directory holds an adapter alone, and no model"


def test_the_files_of_an_adapter_are_no_model_to_validate(tmp_path: Path, ckpt: Path):
    nbmerge.merge(ckpt, tmp_path / "out", lora="adapter")
    write_directory(tmp_path / "peft", adapted())
    for directory, fix in (("out/lora_adapter", f"that a merge wrote it to: {tmp_path / 'out'}"),
                           ("peft", "merge it with lora='fold' and validate that")):  # fmt: skip
        error = refusal(NotACheckpointError, nbmerge.validate, tmp_path / directory, no_run=True)
        assert_says(error, "holds a LoRA adapter alone", fix)


def test_the_shapes_of_an_adapter_s_directory_are_explained_with_its_base_model(tmp_path: Path):
    write_directory(tmp_path / "peft", adapted())
    assert_says(refusal(ConfigError, nbmerge.explain, tmp_path / "peft"), "adapter alone", "--base_model DIR")
    save_tiny_model("qwen2", tmp_path / "base")
    found = nbmerge.explain(tmp_path / "peft", base_model=tmp_path / "base", lora="fold")
    assert found.subjects == () and repr(found).startswith("Explanation: every tensor fits")
    save_tiny_model("gemma2", tmp_path / "other")  # whose heads are wider
    found = nbmerge.explain(tmp_path / "peft", base_model=tmp_path / "other", lora="fold")
    assert "model.layers.1.self_attn.q_proj: A [3, 16] and B [16, 3] do not fit" in repr(found)


def test_an_adapter_that_changes_nothing_or_cannot_be_read_is_found(tmp_path: Path, ckpt: Path):
    nbmerge.merge(ckpt, tmp_path / "out", lora="split")
    config = tmp_path / "out" / "lora_adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 0}))
    (tmp_path / "out" / "lora_adapter" / "adapter_model.safetensors").write_bytes(b"short")
    whats = [(f.subject, f.what) for f in results(tmp_path / "out", ckpt)["config"].outcome.findings]
    assert whats == [
        ("lora_adapter/adapter_config.json", "has no lora_alpha"),
        ("lora_adapter/adapter_model.safetensors", "cannot be read"),
    ]
    config.write_text("{")
    assert results(tmp_path / "out", ckpt)["config"].outcome.findings[0].what == "cannot be read"
