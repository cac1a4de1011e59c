"""Directories of whole tensors that hold two of something, the remains of something, or only a part of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge import (
    AmbiguousCheckpointError,
    ConfigError,
    CorruptFileError,
    IncompleteCheckpointError,
    NotACheckpointError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, published_state, tiny_model, write_config
from tests.support.results import assert_same, bits_of, bits_of_all, saved_bits
from tests.support.whole import write_indexed
from tests.support.worlds import write_mesh_world

HF = "model-{:05d}-of-00002.safetensors"
COLOSSALAI = "model-{:05d}.safetensors"
STAGES = "pytorch_model-stage-{:05d}-shard-00001.bin"


def small() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.arange(4.0), "c.weight": torch.ones(2)}


def test_an_index_that_an_earlier_save_left_is_not_followed(tmp_path: Path):
    for name in write_indexed(tmp_path, small(), HF).values():
        (tmp_path / name).unlink(missing_ok=True)
    save_file(small(), tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert {name: bits_of(opened[name].expr) for name in opened} == bits_of_all(small())
    assert_says(" ".join(opened.notes), "left alone", "model.safetensors.index.json")


def test_a_single_file_beside_a_part_of_the_indexs_is_ambiguous(tmp_path: Path):
    write_indexed(tmp_path, small(), HF)
    (tmp_path / HF.format(1)).unlink()
    save_file(small(), tmp_path / "model.safetensors")
    said = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "two sets of weights", HF.format(2), "fix:")
    assert HF.format(1) not in said


def test_a_view_that_torch_saves_without_its_sign_is_refused(tmp_path: Path):
    """The bytes are those behind the view: taken as they are, every number would have another sign."""
    odd = torch.ones(2, 3, dtype=torch.complex64).conj().imag
    torch.save({"a.weight": odd}, tmp_path / "pytorch_model.bin")
    said = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "the negative of its bytes", "pytorch_model.bin", "resolve_neg()")


def test_a_header_that_would_shift_a_tensor_and_fits_its_bytes(tmp_path: Path):
    """Zeros after a header read as fields of it: nothing but the record's end tells that they are the tensor's."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a.weight": torch.tensor([0] * 8 + [5])}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x03\x04", 0, data.index(b"pytorch_model/data/0")) + 28] += 64
    path.write_bytes(data)
    assert_says(refusal(CorruptFileError, open_checkpoint, tmp_path), "data/0 does not end", "cut short or damaged")


@pytest.mark.parametrize("name", ["model.safetensors", HF.format(2)])
def test_a_link_to_a_blob_that_was_not_copied_is_told(tmp_path: Path, name: str):
    write_indexed(tmp_path, small(), HF)
    if name == "model.safetensors":
        for path in tmp_path.iterdir():
            path.unlink()
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("../../blobs/0f3a")
    said = refusal(IncompleteCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, f"{name} is missing", "link to ../../blobs/0f3a", "fix:")


def test_an_index_that_names_what_no_file_can_be_called(tmp_path: Path):
    write_indexed(tmp_path, small(), HF)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(HF.format(2), "x" * 300))
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), "xxx is missing")
    index.write_text("null")
    assert_says(refusal(CorruptFileError, open_checkpoint, tmp_path), "it is no JSON object", index.name)


def test_a_pointer_of_git_lfs_is_told(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0f\nsize 9\n")
    assert_says(refusal(CorruptFileError, open_checkpoint, tmp_path), "git-lfs", "git lfs pull")


def test_every_damaged_file_is_told(tmp_path: Path):
    write_indexed(tmp_path, small(), HF)
    for number in (1, 2):
        path = tmp_path / HF.format(number)
        path.write_bytes(path.read_bytes()[:-1])
    said = refusal(CorruptFileError, open_checkpoint, tmp_path)
    assert_says(said, "2 files cannot be read", HF.format(1), HF.format(2), "fix:")


def test_a_single_file_beside_colossalais_is_ambiguous(tmp_path: Path):
    write_indexed(tmp_path, small(), COLOSSALAI)
    save_file(small(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_says(refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path), "colossalai", "hf", "--backend")
    assert len(open_checkpoint(tmp_path, backend="hf")) == 3


@pytest.mark.parametrize("index", [True, False])
def test_a_lost_stage_is_named(tmp_path: Path, index: bool):
    write_indexed(tmp_path, small(), STAGES)
    if not index:
        (tmp_path / "pytorch_model.bin.index.json").unlink()
    (tmp_path / STAGES.format(1)).unlink()
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), STAGES.format(1), "is missing", "fix:")


def test_a_stage_of_several_files_without_an_index_is_whole(tmp_path: Path):
    write_indexed(tmp_path, small(), STAGES)
    (tmp_path / "pytorch_model.bin.index.json").unlink()
    opened = open_checkpoint(tmp_path)
    assert set(opened) == set(small())
    assert_says(opened.layout, "ColossalAI", "2 pipeline stages")


def test_geminis_views_of_chunks_are_read_and_the_chunks_are_not(tmp_path: Path, out: Path):
    """Gemini saves views of the chunk that holds many parameters, and every file stores the chunk."""
    write_config(tmp_path / "ckpt", "llama")
    state = memory_state("llama")
    chunk = torch.cat([tensor.flatten() for tensor in state.values()])
    pieces = chunk.split([tensor.numel() for tensor in state.values()])
    views = {name: piece.view(tensor.shape) for (name, tensor), piece in zip(state.items(), pieces, strict=True)}
    write_indexed(tmp_path / "ckpt", views, "pytorch_model-{:05d}.bin")
    opened = open_checkpoint(tmp_path / "ckpt")
    assert opened.nbytes == chunk.nbytes
    assert sum(file.size for file in opened.files if file.role == "weights") > 2 * chunk.nbytes
    nbmerge.merge(opened, out)
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


def test_colossalais_directory_fills_gaps(tmp_path: Path, out: Path):
    write_config(tmp_path / "part", "llama")
    torch.save({n: t for n, t in memory_state("llama").items() if "norm" not in n}, tmp_path / "part/pytorch_model.bin")
    (tmp_path / "base").mkdir()
    write_indexed(tmp_path / "base", memory_state("llama"), COLOSSALAI)
    nbmerge.merge(tmp_path / "part", out, base_model=tmp_path / "base")
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_alone_is_no_model(tmp_path: Path, file: str):
    state = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert open_checkpoint(tmp_path).is_adapter
    said = refusal(ConfigError, nbmerge.plan_merge, tmp_path)
    assert_says(said, "a LoRA adapter alone", "fix:", "--base_model DIR")
    assert not nbmerge.diff(tmp_path, tmp_path).changed


def test_an_adapter_under_a_name_that_peft_does_not_give_is_told(tmp_path: Path):
    save_file({"a.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_1.safetensors")
    said = refusal(NotACheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "holds an adapter", "adapter_1.safetensors", "adapter_model.safetensors", "fix:   rename")
    tiny_model("llama").save_pretrained(tmp_path / "checkpoint-3")
    assert_says(refusal(NotACheckpointError, open_checkpoint, tmp_path), f"fix:   pass {tmp_path / 'checkpoint-3'}")


def test_an_adapter_above_a_checkpoint_is_one_of_a_run(tmp_path: Path):
    save_file({"a.lora_A.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    tiny_model("llama").save_pretrained(tmp_path / "checkpoint-3")
    assert {each.path for each in nbmerge.inspect(tmp_path)} == {tmp_path, tmp_path / "checkpoint-3"}
    assert open_checkpoint(tmp_path).is_adapter


def test_a_counter_beside_the_state_dict_is_not_taken_for_it(tmp_path: Path):
    torch.save({"step": torch.tensor(7), "model": small()}, tmp_path / "pytorch_model.bin")
    opened = open_checkpoint(tmp_path)
    assert set(opened) == set(small())
    assert_says(" ".join(opened.notes), "under 'model'")


def test_an_optimizer_alone_is_no_model(tmp_path: Path):
    save_file({"exp_avg": torch.ones(2)}, tmp_path / "optimizer.safetensors")
    refusal(NotACheckpointError, open_checkpoint, tmp_path)


def test_accelerates_whole_file_of_one_model_beside_others_is_not_taken_for_all(tmp_path: Path):
    for name in ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_1.bin"):
        torch.save(small(), tmp_path / name)
    said = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "2 models", "pytorch_model_fsdp_1.bin", "fix:")


def write_ranks_of_accelerate(directory: Path) -> None:
    """Two ranks' files of DTensors under the names that Accelerate gives them, and their optimizers'."""
    write_mesh_world(directory, small(), (2,))
    for rank in range(2):
        shard = directory / f"model_world_size_2_rank_{rank}.pt"
        shard.rename(directory / f"pytorch_model_fsdp_0_rank{rank}.bin")
        torch.save({"state": {}, "param_groups": []}, directory / f"optimizer_0_rank{rank}.bin")
    (directory / "fsdp_config.json").unlink(missing_ok=True)


def test_accelerates_files_of_ranks_are_put_together(tmp_path: Path):
    write_ranks_of_accelerate(tmp_path)
    opened = open_checkpoint(tmp_path)
    assert opened.backend == "fsdp"
    assert {name: bits_of(opened[name].expr) for name in opened} == bits_of_all(small())
    assert sorted(file.path.name for file in opened.files if file.role == "optimizer") == [
        "optimizer_0_rank0.bin", "optimizer_0_rank1.bin",
    ]  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_accelerates_lost_rank_is_told(tmp_path: Path, rank: int):
    write_ranks_of_accelerate(tmp_path)
    (tmp_path / f"pytorch_model_fsdp_0_rank{rank}.bin").unlink()
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), "fix:")


def test_two_models_of_accelerates_ranks_are_not_mixed(tmp_path: Path):
    write_ranks_of_accelerate(tmp_path)
    for path in list(tmp_path.glob("*_0_rank*.bin")):
        shutil.copy(path, tmp_path / path.name.replace("_0_", "_1_"))
    said = refusal(AmbiguousCheckpointError, open_checkpoint, tmp_path)
    assert_says(said, "2 models", "pytorch_model_fsdp_1_rank*.bin", "fix:")
