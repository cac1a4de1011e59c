"""Which files a stage needs where tensor and expert parallel sizes do not divide each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nbmerge import IncompleteCheckpointError
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.megatron.ranks import open_rank_files
from tests.support.megatron_ranks import (
    Ranks,
    Sizes,
    Tensors,
    arguments_of,
    gpt,
    grouped_layer,
    random_tensor,
    rank_states,
    write_lm,
    write_verl,
)
from tests.support.messages import assert_says, refusal
from tests.support.results import assert_same, bits_of, bits_of_all

CONFIG = {"num_experts": 6, "moe_intermediate_size": Sizes.expert_width, "intermediate_size": 99}
TABLE = "embedding.word_embeddings.weight"
GRIDS = [(2, 3, 1), (4, 3, 2), (4, 6, 1)]  # tensor, expert and expert tensor parallel sizes


def model() -> Tensors:
    tables = {name: random_tensor(24, Sizes.hidden) for name in (TABLE, "output_layer.weight")}  # in four parts
    return gpt(2, lambda prefix: grouped_layer(prefix, 6)) | tables


def first_ranks(tp: int, ep: int, etp: int) -> set[str]:
    """The folders that the ranks write whose data parallel or expert data parallel rank is 0."""
    return {f"mp_rank_{r % tp:02}_{r // etp % ep:03}" for r in range(max(tp, ep * etp))}


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize(("tp", "ep", "etp"), GRIDS)
@pytest.mark.parametrize("how", ["verl", "megatron_lm"])
class TestRanksThatRepeat:
    def checkpoint(self, directory: Path, want: Tensors, kept: Any, how: str, sizes: Ranks, *, said: bool) -> Path:
        states = {folder: state for folder, state in rank_states(want, sizes).items() if kept(folder)}
        if how == "verl":
            return write_verl(directory, states)
        more = {"expert_tensor_parallel_size": sizes.expert_shards} if said else {}
        return write_lm(directory, states, arguments_of(sizes, **more))

    def test_the_first_of_them_are_enough(self, tmp_path: Path, how: str, tp: int, ep: int, etp: int, said: bool):
        want, sizes = model(), Ranks(stages=[[2]], tp=tp, ep=ep, etp=etp)
        kept = first_ranks(tp, ep, etp)
        directory = self.checkpoint(tmp_path, want, lambda folder: folder in kept, how, sizes, said=said)
        contents = open_rank_files(directory, OpenOptions(), CONFIG)
        assert contents.world_size == len(kept) < len(list(sizes.files()))
        assert_same({name: bits_of(tensor.expr) for name, tensor in contents.tensors.items()}, bits_of_all(want))

    def test_all_of_them_are_read_too(self, tmp_path: Path, how: str, tp: int, ep: int, etp: int, said: bool):
        want, sizes = model(), Ranks(stages=[[2]], tp=tp, ep=ep, etp=etp)
        directory = self.checkpoint(tmp_path, want, lambda folder: True, how, sizes, said=said)
        contents = open_rank_files(directory, OpenOptions(), CONFIG)
        assert_same({name: bits_of(tensor.expr) for name, tensor in contents.tensors.items()}, bits_of_all(want))

    def test_one_that_is_missing_among_them_is_named(
        self, tmp_path: Path, how: str, tp: int, ep: int, etp: int, said: bool
    ):
        sizes = Ranks(stages=[[2]], tp=tp, ep=ep, etp=etp)
        first = first_ranks(tp, ep, etp)
        kept = first - {sorted(first)[1]}
        directory = self.checkpoint(tmp_path, model(), lambda folder: folder in kept, how, sizes, said=said)
        message = refusal(IncompleteCheckpointError, open_rank_files, directory, OpenOptions(), CONFIG)
        assert_says(message, "missing", "fix:")
