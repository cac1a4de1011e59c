"""A rank file that holds another rank's weights is refused, and honest files never are, however alike they look."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nbmerge import InconsistentCheckpointError
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.ranks import open_rank_files
from tests.support.megatron_ranks import (
    Ranks,
    Sizes,
    Tensors,
    arguments_of,
    gpt,
    grouped,
    grouped_layer,
    rank_states,
    sequential_layer,
    stacked_layer,
    write_lm,
    write_verl,
)
from tests.support.messages import assert_says, refusal

MOE_CONFIG = {"num_experts": 4, "moe_intermediate_size": Sizes.expert_width, "intermediate_size": 99}
CONSTANT = torch.ones(())


def opened(directory: Path) -> Contents:
    return open_rank_files(directory, OpenOptions(), MOE_CONFIG)


def written(directory: Path, states: Mapping[str, list[Tensors]], ranks: Ranks, how: str = "verl") -> Path:
    return write_verl(directory, states) if how == "verl" else write_lm(directory, states, arguments_of(ranks))


def overwritten(directory: Path, source: str, target: str) -> None:
    """The file of one rank copied over that of another."""
    (name,) = {path.name for path in directory.glob("*/*.pt")}
    shutil.copy(directory / source / name, directory / target / name)


def altered(states: Mapping[str, list[Tensors]], change: Any) -> Mapping[str, list[Tensors]]:
    return {folder: [{n: change(n, t) for n, t in chunk.items()} for chunk in ch] for folder, ch in states.items()}


@pytest.mark.parametrize("how", ["verl", "megatron_lm"])
class TestCopiedFiles:
    def test_of_a_tensor_parallel_rank(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[2, 1]], tp=2)
        written(tmp_path, rank_states(gpt(3), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_001", "mp_rank_01_001")
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "the file of tp 1, pp 1, ep 0 holds the same weights as that of tp 0, pp 1, ep 0",
                    "mp_rank_00_001", "mp_rank_01_001", "one file was copied over the other", "fix:")  # fmt: skip

    def test_of_a_pipeline_stage(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[2, 2, 1]])
        written(tmp_path, rank_states(gpt(5), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_000", "mp_rank_00_001")
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "the file of tp 0, pp 1, ep 0 holds the same weights as that of tp 0, pp 0, ep 0")

    @pytest.mark.parametrize("layer", [grouped_layer, sequential_layer])
    def test_of_an_expert_parallel_rank(self, tmp_path: Path, how: str, layer: Any):
        ranks = Ranks(stages=[[2]], ep=2)
        written(tmp_path, rank_states(gpt(2, layer), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_000", "mp_rank_00_001")
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "the file of tp 0, pp 0, ep 1 holds the same weights as that of tp 0, pp 0, ep 0")

    def test_of_experts_in_one_tensor(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[2]], ep=2)
        written(tmp_path, grouped(gpt(2, stacked_layer), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_000", "mp_rank_00_001")
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "ep 1 holds the same weights")

    def test_of_one_expert_for_each_rank(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[1]], ep=4)
        written(tmp_path, rank_states(gpt(1, grouped_layer), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_003", "mp_rank_00_001")
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "the file of tp 0, pp 0, ep 3 holds the same weights as that of tp 0, pp 0, ep 1")

    def test_of_folded_ranks(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[2]], tp=2, ep=2, etp=1)
        written(tmp_path, rank_states(gpt(2, grouped_layer), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_000", "mp_rank_01_001")
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "the file of tp 1, pp 0, ep 1 holds the same weights as that of tp 0, pp 0, ep 0")

    def test_of_virtual_stages(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[1, 1, 1], [1, 1, 1]])
        written(tmp_path, rank_states(gpt(6), ranks), ranks, how)
        overwritten(tmp_path, "mp_rank_00_000", "mp_rank_00_001")
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "pp 1, ep 0 holds the same weights")

    def test_that_were_saved_again_are_told_all_the_same(self, tmp_path: Path, how: str):
        ranks = Ranks(stages=[[2]], tp=4)
        states = rank_states(gpt(2), ranks)
        states["mp_rank_03"] = [{name: t.clone() for name, t in states["mp_rank_01"][0].items()}]
        written(tmp_path, states, ranks, how)
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "the file of tp 3", "that of tp 1")


class TestHonestFiles:
    """What two ranks may share: constants, copies, experts that nothing trained yet, or all that is small."""

    @pytest.mark.parametrize("change", [
        lambda name, tensor: torch.zeros_like(tensor),
        lambda name, tensor: CONSTANT.expand(tensor.shape).to(tensor.dtype).contiguous(),
        lambda name, tensor: torch.full_like(tensor, float("nan")),
    ], ids=["zeros", "ones", "nan"])  # fmt: skip
    def test_of_constants(self, tmp_path: Path, change: Any):
        ranks = Ranks(stages=[[2, 2, 1]], tp=2)
        opened(written(tmp_path, altered(rank_states(gpt(5), ranks), change), ranks))

    def test_whose_largest_tensor_alone_is_constant(self, tmp_path: Path):
        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(tensor) if "embeddings" in name or "fc" in name else tensor

        ranks = Ranks(stages=[[2, 2, 1]], tp=2)
        opened(written(tmp_path, altered(rank_states(gpt(5), ranks), change), ranks))

    def test_of_a_stage_that_has_nothing_to_cut(self, tmp_path: Path):
        ranks = Ranks(stages=[[2, 0]], tp=2)
        opened(written(tmp_path, rank_states(gpt(2, head=1), ranks), ranks))

    def test_of_experts_that_are_whole_on_every_tensor_parallel_rank(self, tmp_path: Path):
        ranks = Ranks(stages=[[2]], tp=2, ep=1, etp=1)
        opened(written(tmp_path, rank_states(gpt(2, grouped_layer), ranks), ranks))

    @pytest.mark.parametrize("layer", [grouped_layer, sequential_layer])
    def test_of_experts_that_were_made_of_one_dense_layer(self, tmp_path: Path, layer: Any):
        """Upcycling starts with copies of one MLP on every expert parallel rank."""
        tensors = gpt(2, layer)
        first = {n.replace("local_experts.0.", "local_experts.{}.") if "local_" in n else n[:-1] + "{}": t
                 for n, t in tensors.items() if "experts.0." in n or ("experts." in n and n.endswith("0"))}  # fmt: skip
        same = {name.format(e): t for name, t in first.items() for e in range(4)}
        assert set(same) == {name for name in tensors if ".experts." in name}
        ranks = Ranks(stages=[[2]], ep=2)
        opened(written(tmp_path, rank_states(tensors | same, ranks), ranks))

    def test_that_say_which_rank_wrote_them(self, tmp_path: Path):
        ranks = Ranks(stages=[[2]], tp=2)
        states = rank_states(gpt(2), ranks)
        states["mp_rank_01"] = states["mp_rank_00"]
        for number, folder in enumerate(states):
            write_lm(tmp_path, {folder: states[folder]}, arguments_of(ranks, rank=number))
        opened(tmp_path)
        overwritten(tmp_path, "mp_rank_00", "mp_rank_01")
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "holds the same weights")

    def test_of_a_few_bytes(self, tmp_path: Path):
        ranks = Ranks(stages=[[1]], tp=2)
        tensors = {"embedding.word_embeddings.weight": torch.tensor([[1.0, 2.0], [1.0, 2.0]])}
        opened(written(tmp_path, rank_states(tensors, ranks), ranks))
