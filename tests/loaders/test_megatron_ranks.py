"""Megatron's rank files become the tensors of the whole model, bit by bit, or a message that says what is wrong."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nbmerge import (
    AmbiguousCheckpointError,
    CorruptFileError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NotACheckpointError,
    UnsafePickleError,
    UnsupportedCheckpointError,
)
from nbmerge.display.shards import cut_of
from nbmerge.engine.events import Advanced, Ended, Event, Started
from nbmerge.errors import Problem
from nbmerge.layout import MeshAxis
from nbmerge.loaders.base import OpenOptions
from nbmerge.loaders.megatron.contents import Contents
from nbmerge.loaders.megatron.parallel import TensorCut, tensor_cut
from nbmerge.loaders.megatron.ranks import open_rank_files
from nbmerge.loaders.megatron.settings import Settings
from tests.support.megatron_ranks import (
    Ranks,
    Sizes,
    Tensors,
    arguments_of,
    attention,
    dense_layer,
    gpt,
    grouped,
    grouped_layer,
    latent_layer,
    mlp,
    random_tensor,
    rank_states,
    sequential_layer,
    stacked_layer,
    write_lm,
    write_verl,
)
from tests.support.messages import assert_says, refusal
from tests.support.pickles import Call, Global, write_archive
from tests.support.results import assert_same, bits, bits_of, bits_of_all

MOE_CONFIG = {"num_experts": 4, "moe_intermediate_size": Sizes.expert_width, "intermediate_size": 99}


def opened(directory: Path, config: Mapping[str, Any] | None = None) -> Contents:
    return open_rank_files(directory, OpenOptions(), config)


def assert_read(contents: Contents, want: Tensors) -> None:
    assert_same({name: bits_of(tensor.expr) for name, tensor in contents.tensors.items()}, bits_of_all(want))


def assert_replicas_equal(contents: Contents) -> int:
    """Every replica has the bits of its chunk; how many there are."""
    pairs = [(c.stored, copy) for t in contents.tensors.values() for c in t.chunks for _, copy in c.replicas]
    assert all(bits_of(kept) == bits_of(copy) for kept, copy in pairs)
    return len(pairs)


def changed(path: Path, change: Any) -> None:
    """Saves a file of verl's again after `change` has changed its list of state dicts."""
    chunks = torch.load(path)
    change(chunks)
    torch.save(chunks, path)


class TestDenseModels:
    def test_tensor_and_uneven_pipeline_parallel(self, tmp_path: Path):
        want, ranks = gpt(3), Ranks(stages=[[2, 1]], tp=2)
        contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments_of(ranks)))
        assert_read(contents, want)
        assert contents.mesh == (MeshAxis("pp", 2, "layers"), MeshAxis("tp", 2, "tensors"))
        assert contents.world_size == 4
        assert assert_replicas_equal(contents) > 0

    def test_virtual_stages_one_of_them_without_layers(self, tmp_path: Path):
        want, ranks = gpt(5), Ranks(stages=[[2, 1], [2, 0]])
        contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments_of(ranks)))
        assert_read(contents, want)
        assert "2 virtual pipeline stages" in contents.layout

    def test_virtual_stages_of_verl(self, tmp_path: Path):
        want, ranks = gpt(4), Ranks(stages=[[1, 1], [1, 1]], tp=2)
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks))), want)

    def test_one_rank(self, tmp_path: Path):
        want, ranks = gpt(2), Ranks(stages=[[2]])
        contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments_of(ranks)))
        assert_read(contents, want)
        assert contents.mesh == ()
        assert {tensor.placement for tensor in contents.tensors.values()} == {"whole"}

    def test_an_up_projection_without_gates_is_cut_once(self, tmp_path: Path):
        want, ranks = gpt(2, lambda prefix: dense_layer(prefix, gated=False)), Ranks(stages=[[2]], tp=2)
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks, gated=False))), want)

    def test_gates_and_ups_are_two_chunks_of_each_rank(self, tmp_path: Path):
        want, ranks = gpt(1), Ranks(stages=[[1]], tp=2)
        contents = opened(write_verl(tmp_path, rank_states(want, ranks)))
        tensor = contents.tensors["decoder.layers.0.mlp.linear_fc1.weight"]
        assert [chunk.rank for chunk in tensor.chunks] == [0, 1, 0, 1]
        assert cut_of(tensor).in_words == "into 4 boxes on 2 ranks, as many elements on each"
        assert tensor.mesh == (MeshAxis("tp", 2, "Shard(0)"),)
        assert contents.tensors["decoder.final_layernorm.weight"].placement == "Replicate×2"

    def test_a_value_head_of_one_row_is_replicated(self, tmp_path: Path):
        want, ranks = gpt(2, head=1), Ranks(stages=[[1, 1]], tp=2)
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks))), want)

    def test_the_output_layer_of_a_tied_model_keeps_its_name(self, tmp_path: Path):
        ranks, want = Ranks(stages=[[1, 1]], tp=2), gpt(2, head=0)
        want["output_layer.weight"] = want["embedding.word_embeddings.weight"].clone()
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks))), want)

    def test_the_last_stage_holds_a_copy_of_the_embedding_for_its_prediction_layers(self, tmp_path: Path):
        ranks, want = Ranks(stages=[[1, 1]], tp=2), gpt(2)
        want["mtp.layers.0.enorm.weight"] = random_tensor(Sizes.hidden)
        want["mtp.layers.0.eh_proj.weight"] = random_tensor(Sizes.hidden, 2 * Sizes.hidden)
        want |= dense_layer("mtp.layers.0.transformer_layer.")
        states = rank_states(want, ranks)
        name = "embedding.word_embeddings.weight"
        for tp in range(2):
            states[f"mp_rank_0{tp}_001"][0][name] = states[f"mp_rank_0{tp}_000"][0][name]
        contents = opened(write_verl(tmp_path, states))
        assert_read(contents, want)
        chunks = contents.tensors[name].chunks
        assert [(chunk.rank, [rank for rank, _ in chunk.replicas]) for chunk in chunks] == [(0, [2]), (1, [3])]

    def test_layers_of_a_vision_model_are_counted_apart(self, tmp_path: Path):
        ranks = Ranks(stages=[[1, 2]], tp=2)
        want = {f"language_model.{name}": tensor for name, tensor in gpt(3).items()}
        for layer in range(2):
            want |= dense_layer(f"vision_model.decoder.layers.{layer}.")
        want["vision_model.decoder.final_layernorm.weight"] = random_tensor(Sizes.hidden)
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks))), want)

    def test_wrapper_prefixes_stay(self, tmp_path: Path):
        want = {f"module.module.{name}": tensor for name, tensor in gpt(2).items()}
        ranks = Ranks(stages=[[1, 1]], tp=2)
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks))), want)

    def test_a_name_without_a_rule_is_taken_as_copies_and_noted(self, tmp_path: Path):
        want, ranks = gpt(1), Ranks(stages=[[1]], tp=2)
        want["decoder.layers.0.novelty.scale"] = random_tensor(3)
        contents = opened(write_verl(tmp_path, rank_states(want, ranks)))
        assert_read(contents, want)
        assert any("novelty.scale" in note for note in contents.notes)

    def test_files_have_roles_and_progress_is_told(self, tmp_path: Path):
        want, ranks = gpt(2), Ranks(stages=[[1, 1]])
        states = rank_states(want, ranks)
        write_lm(tmp_path, states, arguments_of(ranks))
        torch.save({}, tmp_path / "mp_rank_00_000" / "distrib_optim.pt")
        events: list[Event] = []
        contents = open_rank_files(tmp_path, OpenOptions(listener=events.append), None)
        assert [file.role for file in contents.files] == ["weights", "weights", "optimizer"]
        size = sum(file.size for file in contents.files if file.role == "weights")
        assert events[0] == Started("reading", size)
        assert events[-1] == Ended("reading")
        assert sum(event.nbytes for event in events if isinstance(event, Advanced)) == size
        assert "1 optimizer file left alone" in contents.notes
        assert "the optimizer state inside the files left alone" in contents.notes

    def test_files_of_verl_beside_the_model_are_named(self, tmp_path: Path):
        ranks = Ranks(stages=[[1]])
        write_verl(tmp_path / "model", rank_states(gpt(1), ranks))
        for name in ("optim/distrib_optimizer.pt", "rng_states/rng_states_0.pt"):
            (tmp_path / name).parent.mkdir()
            torch.save({}, tmp_path / name)
        assert [file.role for file in opened(tmp_path / "model").files] == ["weights", "optimizer", "extra state"]


class TestSecondNumber:
    """mp_rank_TT_NNN: NNN is the pipeline stage or the expert parallel rank."""

    def test_arguments_say_which(self, tmp_path: Path):
        want, ranks = gpt(2, sequential_layer), Ranks(stages=[[2]], ep=2)
        contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments_of(ranks)))
        assert_read(contents, want)
        assert contents.notes[0].startswith("the optimizer")

    def test_without_arguments_the_final_norm_tells_expert_ranks(self, tmp_path: Path):
        want, ranks = gpt(2, sequential_layer), Ranks(stages=[[2]], ep=2)
        contents = opened(write_verl(tmp_path, rank_states(want, ranks)))
        assert_read(contents, want)
        assert "taken as expert parallel rank" in contents.notes[0]

    def test_without_arguments_the_missing_final_norm_tells_stages(self, tmp_path: Path):
        want, ranks = gpt(2), Ranks(stages=[[1, 1]])
        contents = opened(write_verl(tmp_path, rank_states(want, ranks)))
        assert_read(contents, want)
        assert "taken as pipeline stage" in contents.notes[0]

    def test_foreign_arguments_do_not_help(self, tmp_path: Path):
        want, ranks = gpt(2), Ranks(stages=[[1, 1]])
        states = rank_states(want, ranks)
        assert_read(opened(write_lm(tmp_path, states, {"learning_rate": 1e-4, "layers": [1, 2], "tp": 2})), want)


class TestExperts:
    @pytest.mark.parametrize("layer", [sequential_layer, grouped_layer])
    @pytest.mark.parametrize("etp", [1, 2])
    @pytest.mark.parametrize("evidence", ["arguments", "config"])
    def test_expert_and_tensor_parallel(self, tmp_path: Path, layer: Any, etp: int, evidence: str):
        want, ranks = gpt(2, layer), Ranks(stages=[[1, 1]], tp=2, ep=2, etp=etp)
        if evidence == "arguments":
            arguments = arguments_of(ranks, expert_tensor_parallel_size=etp)
            contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments))
        else:
            contents = opened(write_verl(tmp_path, rank_states(want, ranks)), MOE_CONFIG)
        assert_read(contents, want)
        assert contents.world_size == (4 if etp == 1 else 8)  # folded: only the diagonal of (tp, ep) is there
        assert assert_replicas_equal(contents) > 0
        assert not any("comparing" in note for note in contents.notes)
        expert = next(t for name, t in contents.tensors.items() if ".experts." in name and "fc2.weight" in name)
        assert expert.placement == ("whole" if etp == 1 else "Shard(1)×2")

    @pytest.mark.parametrize(("tp", "ep", "etp"), [(4, 2, 2), (2, 4, 1), (4, 2, 1), (4, 1, 2), (4, 1, 4), (2, 1, 1)])
    @pytest.mark.parametrize("config", [None, {"text_config": MOE_CONFIG}])
    def test_foldings(self, tmp_path: Path, tp: int, ep: int, etp: int, config: Any):
        def layer(prefix: str) -> Tensors:
            return {name: t for name, t in grouped_layer(prefix).items() if "attention" not in name}

        want, ranks = gpt(1, layer), Ranks(stages=[[1]], tp=tp, ep=ep, etp=etp)
        want["embedding.word_embeddings.weight"] = random_tensor(24, Sizes.hidden)
        want["output_layer.weight"] = random_tensor(24, Sizes.hidden)
        assert_read(opened(write_verl(tmp_path, rank_states(want, ranks)), config), want)

    def test_experts_of_other_ranks_stand_beside_each_other(self, tmp_path: Path):
        ranks = Ranks(stages=[[1], [1]], ep=2)
        contents = opened(write_verl(tmp_path, rank_states(gpt(2, grouped_layer), ranks)))
        names = list(contents.tensors)
        at = names.index("decoder.layers.1.mlp.experts.linear_fc1.weight0")
        assert names[at : at + 4] == [f"decoder.layers.1.mlp.experts.linear_fc1.weight{e}" for e in range(4)]
        assert names[-2:] == ["decoder.final_layernorm.weight", "output_layer.weight"]

    def test_without_a_word_bytes_tell_copies_from_shards(self, tmp_path: Path):
        for etp, found in ((1, "copies of each expert"), (2, "2 shards of each expert")):
            want, ranks = gpt(1, sequential_layer), Ranks(stages=[[1]], tp=2, etp=etp)
            contents = opened(write_verl(tmp_path / str(etp), rank_states(want, ranks)))
            assert_read(contents, want)
            assert any(found in note and "comparing the bytes" in note for note in contents.notes)

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize("etp", [1, 2])
    def test_older_grouped_experts_are_stacked(self, tmp_path: Path, gated: bool, etp: int):
        def layer(prefix: str) -> Tensors:
            made = stacked_layer(prefix, gated=gated)
            return {name: t for name, t in made.items() if gated or "shared" not in name}

        want, ranks = gpt(2, layer), Ranks(stages=[[2]], tp=2, ep=2, etp=etp)
        contents = opened(write_lm(tmp_path, grouped(want, ranks, gated=gated), arguments_of(ranks)), MOE_CONFIG)
        assert_read(contents, want)
        name = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
        shards = (MeshAxis("etp", 2, "Shard(2)"),) if etp == 2 else ()
        assert contents.tensors[name].mesh == (MeshAxis("ep", 2, "Shard(0)"), *shards)

    @pytest.mark.parametrize("config", [None, {"num_local_experts": 4, "intermediate_size": Sizes.expert_width}])
    def test_older_grouped_experts_without_a_router(self, tmp_path: Path, config: Any):
        want = {name: tensor for name, tensor in gpt(1, stacked_layer).items() if "router" not in name}
        write_verl(tmp_path, grouped(want, Ranks(stages=[[1]], tp=2, ep=2)))
        if config:
            assert_read(opened(tmp_path, config), want)
        else:
            message = refusal(AmbiguousCheckpointError, opened, tmp_path)
            assert_says(message, "nothing says how many", "fix:", "config")

    def test_shards_that_overwrote_each_other_are_missed(self, tmp_path: Path):
        ranks = Ranks(stages=[[1]])
        write_verl(tmp_path, rank_states(gpt(1, grouped_layer), ranks))
        config = {**MOE_CONFIG, "moe_intermediate_size": 2 * Sizes.expert_width}
        assert_says(refusal(IncompleteCheckpointError, opened, tmp_path, config), "2 tensor parallel shards", "fix:")

    def test_a_missing_expert_rank_shows_in_the_router(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1, grouped_layer), Ranks(stages=[[1]], ep=2)))
        shutil.rmtree(tmp_path / "mp_rank_00_001")
        message = refusal(IncompleteCheckpointError, opened, tmp_path)
        assert_says(message, "2 experts", "4 rows", "decoder.layers.0.mlp.experts.", "fix:")

    def test_expert_ranks_with_different_numbers_of_experts(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1, sequential_layer), Ranks(stages=[[1]], ep=2)))
        path = tmp_path / "mp_rank_00_001" / "model.pt"
        changed(path, lambda chunks: [chunks[0].pop(name) for name in list(chunks[0]) if "experts.1." in name])
        message = refusal(IncompleteCheckpointError, opened, tmp_path)
        assert_says(message, "1 expert on one rank and 2 on another", "ep 1", "3 experts", "4 rows")

    def test_experts_with_a_gap(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1, sequential_layer), Ranks(stages=[[1]])))
        path = tmp_path / "mp_rank_00" / "model.pt"
        changed(path, lambda chunks: [chunks[0].pop(name) for name in list(chunks[0]) if "experts.1." in name])
        assert_says(refusal(IncompleteCheckpointError, opened, tmp_path), "numbered 0, 2, 3", "without a gap")


class TestLatentAttention:
    @pytest.mark.parametrize("cut_latent", [False, True])
    @pytest.mark.parametrize("evidence", ["arguments", "config", "shapes"])
    def test_down_projections_are_copies_or_shards(self, tmp_path: Path, cut_latent: bool, evidence: str):
        want, ranks = gpt(2, latent_layer), Ranks(stages=[[1, 1]], tp=2, cut_latent=cut_latent)
        sizes = {"q_lora_rank": Sizes.q_rank, "kv_lora_rank": Sizes.kv_rank}
        arguments = arguments_of(ranks)
        if evidence == "arguments":
            arguments |= {**sizes, "qk_pos_emb_head_dim": Sizes.rotary}
        config = {**sizes, "qk_rope_head_dim": Sizes.rotary} if evidence == "config" else None
        contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments), config)
        assert_read(contents, want)

    def test_a_down_projection_that_fits_nothing(self, tmp_path: Path):
        want, ranks = gpt(1, latent_layer), Ranks(stages=[[1]], tp=2)
        want["decoder.layers.0.self_attention.linear_q_down_proj.weight"] = random_tensor(7, Sizes.hidden)
        write_verl(tmp_path, rank_states(want, ranks))
        message = refusal(InconsistentCheckpointError, opened, tmp_path, {"q_lora_rank": 5})
        assert_says(message, "linear_q_down_proj.weight has 7 rows", "[5, 6]", "fix:")

    def test_a_down_projection_that_was_put_together_from_copies_is_explained(self, tmp_path: Path):
        want = gpt(1, latent_layer)
        name = "decoder.layers.0.self_attention.linear_q_down_proj.weight"
        want[name] = torch.cat([want[name]] * 2)
        write_verl(tmp_path, rank_states(want, Ranks(stages=[[1]], tp=2)))
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "12 rows", "12 = 2 · 6: a replicated tensor was concatenated once for each of 2 ranks")

    def test_a_down_projection_of_which_nothing_is_known(self, tmp_path: Path):
        want = {name: t for name, t in gpt(1, latent_layer).items() if "_up_proj" not in name}
        write_verl(tmp_path, rank_states(want, Ranks(stages=[[1]], tp=2)))
        assert_says(refusal(AmbiguousCheckpointError, opened, tmp_path), "where nothing is expected", "fix:")


class TestFiles:
    def test_every_missing_file_is_named(self, tmp_path: Path):
        ranks = Ranks(stages=[[1, 1]], tp=2)
        write_lm(tmp_path, rank_states(gpt(2), ranks), arguments_of(ranks))
        for name in ("mp_rank_01_000", "mp_rank_00_001"):
            shutil.rmtree(tmp_path / name)
        message = refusal(IncompleteCheckpointError, opened, tmp_path)
        assert_says(message, "2 files of 4 missing", "mp_rank_01_000", "mp_rank_00_001", "fix:", "copy")

    @pytest.mark.parametrize("gone", ["mp_rank_01_000", "mp_rank_01_001"])
    def test_arguments_know_of_ranks_that_no_file_is_left_of(self, tmp_path: Path, gone: str):
        ranks = Ranks(stages=[[1]], tp=2, ep=2)
        write_lm(tmp_path, rank_states(gpt(1, grouped_layer), ranks), arguments_of(ranks))
        shutil.rmtree(tmp_path / gone)
        assert_says(refusal(IncompleteCheckpointError, opened, tmp_path), "1 file of 4 missing", gone)

    def test_a_whole_tensor_rank_is_missing(self, tmp_path: Path):
        ranks = Ranks(stages=[[1]], tp=2)
        write_lm(tmp_path, rank_states(gpt(1), ranks), arguments_of(ranks))
        shutil.rmtree(tmp_path / "mp_rank_01")
        assert_says(refusal(IncompleteCheckpointError, opened, tmp_path), "1 file of 2 missing", "mp_rank_01")

    def test_the_last_stage_is_missing_and_no_arguments_say_so(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(3), Ranks(stages=[[1, 1, 1]])))
        shutil.rmtree(tmp_path / "mp_rank_00_002")
        message = refusal(IncompleteCheckpointError, opened, tmp_path)
        assert_says(message, "last pipeline stage is missing", "final_layernorm", "2 stages", "fix:")

    def test_a_folder_without_weights(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(2), Ranks(stages=[[1, 1]])))
        (tmp_path / "mp_rank_00_001" / "model.pt").unlink()
        assert_says(refusal(IncompleteCheckpointError, opened, tmp_path), "1 folder of 2", "mp_rank_00_001", "fix:")

    def test_no_folders(self, tmp_path: Path):
        assert_says(refusal(NotACheckpointError, opened, tmp_path), "mp_rank_*", "iter_NNNNNNN")

    def test_two_runs_in_one_directory(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1), Ranks(stages=[[1]], tp=2)))
        write_verl(tmp_path, rank_states(gpt(2), Ranks(stages=[[1, 1]])))
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "2 with model.pt such as mp_rank_00", "fix")

    def test_two_frameworks_in_one_folder(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1), Ranks(stages=[[1]])))
        torch.save({}, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "2 files of weights", "mp_rank_00", "fix")

    def test_two_folders_of_one_rank(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1), Ranks(stages=[[1]])))
        shutil.copytree(tmp_path / "mp_rank_00", tmp_path / "mp_rank_000")
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "mp_rank_00 and mp_rank_000", "fix")

    def test_a_file_that_is_cut_short(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(2), Ranks(stages=[[1, 1]])))
        path = tmp_path / "mp_rank_00_001" / "model.pt"
        path.write_bytes(path.read_bytes()[:-500])
        assert_says(refusal(CorruptFileError, opened, tmp_path), "cut short", str(path), "fix:")

    @pytest.mark.parametrize("content", [3, {"optimizer": {}}, {"model0": {}, "model2": {}}, [], [1]])
    def test_a_file_without_a_model(self, tmp_path: Path, content: Any):
        (tmp_path / "mp_rank_00").mkdir()
        torch.save(content, tmp_path / "mp_rank_00" / "model.pt")
        assert_says(refusal(UnsupportedCheckpointError, opened, tmp_path), "holds no model", "mp_rank_00", "fix:")

    def test_the_names_before_megatron_core(self, tmp_path: Path):
        (tmp_path / "mp_rank_00").mkdir()
        old = {"model": {"language_model": {"encoder": {"layers.0.input_norm.weight": random_tensor(3)}}}}
        torch.save(old, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
        assert_says(refusal(UnsupportedCheckpointError, opened, tmp_path), "before megatron-core", "convert.py")


class TestHostileFiles:
    @pytest.mark.parametrize("where", ["args", "model"])
    def test_a_pickle_that_names_a_command_is_refused(self, tmp_path: Path, where: str):
        (tmp_path / "mp_rank_00").mkdir()
        content = {"model": {}, where: Call(Global("os", "system"), f"touch {tmp_path / 'ran'}")}
        path = write_archive(tmp_path / "mp_rank_00" / "model_optim_rng.pt", content)
        assert_says(refusal(UnsafePickleError, opened, tmp_path), "os.system", str(path), "fix:")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("module", "name", "args"),
        [
            ("argparse", "Namespace", ()),
            ("_codecs", "encode", ("x", "zip")),
            ("numpy._core.multiarray", "_reconstruct", (Global("numpy", "ndarray"), (9**9,), "b")),
            ("_io", "BytesIO", (b"x",)),
            ("pathlib", "PosixPath", ("/etc",)),
        ],
    )
    def test_what_is_on_the_list_runs_nothing(self, tmp_path: Path, module: str, name: str, args: Any):
        (tmp_path / "mp_rank_00").mkdir()
        state = {"shape": 1, "_shape": (9,), "file": "/etc/passwd"}
        content = {"model": {"a": Call(Global(module, name), *args, state=state)}, "args": Call(Global(module, name))}
        write_archive(tmp_path / "mp_rank_00" / "model_optim_rng.pt", content)
        message = refusal(UnsupportedCheckpointError, opened, tmp_path)
        assert_says(message, "a is a", "not a plain tensor", "torch_dist")

    def test_arguments_of_absurd_size(self, tmp_path: Path):
        ranks = Ranks(stages=[[1]])
        arguments = arguments_of(ranks, num_experts=True) | {"tensor_model_parallel_size": 10**12}
        write_lm(tmp_path, rank_states(gpt(1), ranks), arguments)
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "nobody trains with", "fix:")

    @given(
        name=st.sampled_from([
            "linear_fc1.weight", "linear_fc1.bias3", "linear_fc2.weight0", "linear_proj.weight", "output_layer.weight",
            "linear_q_down_proj.weight", "linear_kv_down_proj.weight", "core_attention.softmax_offset", "x", "x.", ".",
        ]),
        shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
        other=st.none() | st.lists(st.integers(0, 4), max_size=3).map(tuple),
    )  # fmt: skip
    def test_any_shape_under_any_name_is_cut_or_told(self, name: str, shape: Any, other: Any):
        cut = tensor_cut(name, shape, 2, lambda _: other, Settings({}, {}))
        if isinstance(cut, TensorCut):
            boxes = [box for rank in range(2) for box, _ in cut.boxes(shape, 2, rank)]
            assert len(boxes) == 2 * cut.halves
            assert sum(box.numel for box in boxes) >= torch.Size(cut.whole(shape, 2)).numel()
        else:
            assert isinstance(cut, Problem)


class TestContradictions:
    def test_all_disagreements_are_told_at_once(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(2), Ranks(stages=[[1, 1]], tp=2)))

        def change(chunks: Any) -> None:
            chunks[0]["decoder.final_layernorm.weight"] = random_tensor(3)
            chunks[0]["output_layer.weight"] = chunks[0]["output_layer.weight"].float()
            chunks[0]["decoder.layers.0.self_attention.linear_proj.weight"] = random_tensor(Sizes.hidden, 5)

        changed(tmp_path / "mp_rank_01_001" / "model.pt", change)
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "3 problems", "shape of decoder.final_layernorm.weight: [10] and [3]", "mp_rank_00_001",
                    "dtype of output_layer.weight: bfloat16 and float32", "decoder.layers.1.self_attention.linear_proj",
                    "fix:")  # fmt: skip

    def test_a_disagreement_that_has_a_known_cause_names_it(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1), Ranks(stages=[[1]], tp=2)))

        def change(chunks: Any) -> None:
            chunks[0]["decoder.final_layernorm.weight"] = random_tensor(2 * Sizes.hidden)

        changed(tmp_path / "mp_rank_01" / "model.pt", change)
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(
            message, "not of one save: ", "1/2 of the tensor", "; or 20 = 2 · 10: a replicated tensor was concaten"
        )

    def test_an_up_projection_that_was_padded_is_explained(self, tmp_path: Path):
        want = gpt(1)
        want["decoder.layers.0.mlp.linear_fc1.weight"] = random_tensor(56, Sizes.hidden)
        want["decoder.layers.0.mlp.linear_fc2.weight"] = random_tensor(Sizes.hidden, 14)
        write_verl(tmp_path, rank_states(want, Ranks(stages=[[1]], tp=2)))
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "linear_fc1.weight has [28, 10]", "28 = 2 · 14: a replicated tensor was concatenated")

    def test_a_tensor_that_one_rank_does_not_have(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1), Ranks(stages=[[1]], tp=2)))
        changed(tmp_path / "mp_rank_01" / "model.pt", lambda chunks: chunks[0].pop("output_layer.weight"))
        message = refusal(IncompleteCheckpointError, opened, tmp_path)
        assert_says(message, "output_layer.weight is missing from 1 file", "mp_rank_01", "fix:")

    def test_layers_with_a_gap(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(3), Ranks(stages=[[3]])))
        path = tmp_path / "mp_rank_00" / "model.pt"
        changed(path, lambda chunks: [chunks[0].pop(name) for name in list(chunks[0]) if "layers.1." in name])
        message = refusal(IncompleteCheckpointError, opened, tmp_path)
        assert_says(message, "layers of decoder.layers are numbered 0, 2", "pipeline stage 0", "fix:")

    def test_an_up_projection_that_does_not_fit_its_down_projection(self, tmp_path: Path):
        want = gpt(1)
        want["decoder.layers.0.mlp.linear_fc2.weight"] = random_tensor(Sizes.hidden, 14)
        write_verl(tmp_path, rank_states(want, Ranks(stages=[[1]], tp=2)))
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "linear_fc1.weight has [12, 10]", "[10, 7]")

    def test_an_up_projection_without_its_down_projection(self, tmp_path: Path):
        want = {name: tensor for name, tensor in gpt(1).items() if "fc2" not in name}
        write_verl(tmp_path, rank_states(want, Ranks(stages=[[1]], tp=2)))
        assert_says(refusal(AmbiguousCheckpointError, opened, tmp_path), "linear_fc2.weight is not there", "fix:")

    def test_shards_under_a_name_without_a_rule_are_no_copies(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(1), Ranks(stages=[[1]], tp=2)))
        name = "decoder.layers.0.mixer.in_proj.weight"
        for rank in range(2):
            path = tmp_path / f"mp_rank_0{rank}" / "model.pt"
            changed(path, lambda chunks: chunks[0].update({name: random_tensor(4, 4)}))
        message = refusal(UnsupportedCheckpointError, opened, tmp_path)
        assert_says(message, f"no rule says how {name}", "different values", "torch_dist")

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"tensor_model_parallel_size": 1}, ["tensor_model_parallel_size 1", "tp rank 1"]),
            ({"pipeline_model_parallel_size": 1, "expert_model_parallel_size": 2}, None),
            ({"expert_model_parallel_size": 2}, ["stages 2", "expert parallel size 2"]),
            ({"pipeline_model_parallel_size": 1}, ["stages 1", "expert parallel size 1"]),
            ({"virtual_pipeline_model_parallel_size": 2}, ["virtual pipeline stages", "2 by the arguments"]),
        ],
    )
    def test_arguments_that_contradict_the_files(self, tmp_path: Path, changes: Any, words: list[str] | None):
        ranks = Ranks(stages=[[1, 1]], tp=2)
        write_lm(tmp_path, rank_states(gpt(2), ranks), {**arguments_of(ranks), **changes})
        if words is None:  # expert ranks hold the same names, pipeline stages do not
            refusal(IncompleteCheckpointError, opened, tmp_path)
        else:
            assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), *words, "fix:")

    def test_names_without_a_number_that_the_arguments_demand(self, tmp_path: Path):
        ranks = Ranks(stages=[[1]], tp=2)
        write_lm(tmp_path, rank_states(gpt(1), ranks), arguments_of(ranks) | {"pipeline_model_parallel_size": 4})
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "parallel_size 4", "no number for it")

    @pytest.mark.parametrize("change", ["iteration", "arguments"])
    def test_files_of_two_saves(self, tmp_path: Path, change: str):
        ranks = Ranks(stages=[[1]], tp=2)
        write_lm(tmp_path, rank_states(gpt(1), ranks), arguments_of(ranks))
        path = tmp_path / "mp_rank_01" / "model_optim_rng.pt"
        state = {"model": rank_states(gpt(1), ranks)["mp_rank_01"][0], "iteration": 10}
        state |= {"args": argparse.Namespace(iteration=10, **arguments_of(ranks))}
        if change == "iteration":
            state["iteration"] = 20
        else:
            state["args"].tensor_model_parallel_size = 4
        torch.save(state, path)
        message = refusal(InconsistentCheckpointError, opened, tmp_path)
        assert_says(message, "not of one save", "10 and 20" if change == "iteration" else "2 and 4", str(path), "fix:")

    def test_files_with_different_numbers_of_virtual_stages(self, tmp_path: Path):
        write_verl(tmp_path, rank_states(gpt(4), Ranks(stages=[[1, 1], [1, 1]])))
        changed(tmp_path / "mp_rank_00_001" / "model.pt", lambda chunks: chunks.pop(0))
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "2 in", "1 in", "virtual")

    def test_grouped_experts_that_do_not_fit(self, tmp_path: Path):
        states = grouped(gpt(1, stacked_layer), Ranks(stages=[[1]]))
        states["mp_rank_00"][0]["decoder.layers.0.mlp.experts.weight1"] = random_tensor(Sizes.hidden, 33)
        write_verl(tmp_path, states)
        assert_says(refusal(InconsistentCheckpointError, opened, tmp_path), "weight1 has [10, 33]", "4 experts", "fix:")

    def test_grouped_experts_of_which_one_tensor_is_missing(self, tmp_path: Path):
        states = grouped(gpt(1, stacked_layer), Ranks(stages=[[1]]))
        del states["mp_rank_00"][0]["decoder.layers.0.mlp.experts.weight2"]
        write_verl(tmp_path, states)
        assert_says(refusal(IncompleteCheckpointError, opened, tmp_path), "weight1 is alone", "fix:")


def test_layers_of_several_kinds_in_one_model(tmp_path: Path):
    def layer(prefix: str) -> Tensors:
        if prefix.endswith(".0."):
            return attention(prefix) | mlp(f"{prefix}mlp.", Sizes.ffn)
        return grouped_layer(prefix)

    want, ranks = gpt(5, layer), Ranks(stages=[[1, 2], [1, 1]], tp=2, ep=2)
    contents = opened(write_lm(tmp_path, rank_states(want, ranks), arguments_of(ranks)), MOE_CONFIG)
    assert_read(contents, want)
    chunk = contents.tensors["decoder.layers.1.mlp.router.weight"].chunks[0]
    assert (chunk.rank, [rank for rank, _ in chunk.replicas]) == (4, [5, 6, 7])


def test_a_tensor_stored_in_another_order_is_read_as_it_is(tmp_path: Path):
    want, ranks = gpt(1), Ranks(stages=[[1]])
    states = rank_states(want, ranks)
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    states["mp_rank_00"][0][name] = want[name].T.contiguous().T
    contents = opened(write_verl(tmp_path, states))
    assert bits_of(contents.tensors[name].expr) == bits(want[name])
