"""ColossalAI's model directories: names of every plugin, and saves that were interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import nbmerge
from nbmerge import IncompleteCheckpointError, open_checkpoint
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, published_state, write_config
from tests.support.results import assert_same, bits_of_all, saved_bits

STEMS = {
    "plain": "-{:05d}", "stages": "-stage-00001-shard-{:05d}", "experts": "-stage-00001-00002-shard-{:05d}",
}  # fmt: skip


def write_colossalai(directory: Path, kind: str = "plain", *, safe: bool = False, indexed: bool = True) -> Path:
    """The directory of booster.save_model: three files, an index whose total_size is in MiB, and config.json."""
    write_config(directory, "llama")
    state = memory_state("llama")
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map = {}
    for number in range(3):
        part = dict(list(state.items())[number::3])
        file = stem + STEMS[kind].format(number + 1) + f".{suffix}"
        (save_file if safe else torch.save)(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if indexed:
        content = {"metadata": {"total_size": 0.125}, "weight_map": weight_map}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", STEMS)
def test_every_kind_of_name_is_merged_bit_by_bit(tmp_path: Path, out: Path, kind: str, safe: bool):
    report = nbmerge.merge(write_colossalai(tmp_path / "ckpt", kind, safe=safe), out)
    assert report.plan.checkpoint.backend == "colossalai"
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


def test_the_folder_above_with_model_and_optimizer(tmp_path: Path, out: Path):
    write_colossalai(tmp_path / "step" / "model")
    (tmp_path / "step" / "optimizer").mkdir()
    opened = open_checkpoint(tmp_path / "step")
    assert_says(" ".join(opened.notes), "left alone beside model/", "optimizer")
    nbmerge.merge(opened, out)
    assert_same(saved_bits(out), bits_of_all(published_state("llama")))


def test_an_interrupted_save_is_refused(tmp_path: Path):
    write_colossalai(tmp_path, "stages")
    (tmp_path / "tmp_index_files").mkdir()
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), "interrupted", "tmp_index_files", "fix:")


@pytest.mark.parametrize("indexed", [True, False])
def test_a_missing_file_is_named(tmp_path: Path, indexed: bool):
    write_colossalai(tmp_path, "stages", indexed=indexed)
    gone = tmp_path / "pytorch_model-stage-00001-shard-00002.bin"
    gone.unlink()
    assert_says(refusal(IncompleteCheckpointError, open_checkpoint, tmp_path), gone.name, "fix:")
