"""Directories of torch.distributed.checkpoint, as torch, Accelerate and training loops write them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

import nbmerge
from nbmerge import (
    AmbiguousCheckpointError,
    CheckpointError,
    CorruptFileError,
    IncompleteCheckpointError,
    InconsistentCheckpointError,
    NotACheckpointError,
    OptionError,
    PlanError,
    UnsafePickleError,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from nbmerge.layout import Checkpoint
from nbmerge.loaders.dcp.loader import DCPLoader
from nbmerge.loaders.dcp.metadata import METADATA
from nbmerge.testing import LoaderContract, Tensors
from tests.support.dcp import HAS_HF_WRITER, hf_writer, write_dcp, write_fsdp_run
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, published_state, save_tiny_model, write_config
from tests.support.pickles import Call, Global, pickled
from tests.support.results import assert_same, bits_of, bits_of_all, content_of, saved_bits

_NUMBERS = {"model.layers.0.mlp.weight": 1, "model.norm.weight": 2}
TABLE = {"model.layers.0.mlp.weight": torch.arange(35.0).reshape(7, 5), "model.norm.weight": torch.arange(3.0)}


class TestContractOfDCP(LoaderContract):
    loader = DCPLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_dcp(directory, tensors, (4,))


class TestContractOfHuggingFaceWriter(LoaderContract):
    loader = DCPLoader()

    def write(self, directory: Path, tensors: Tensors) -> None:
        write_dcp(directory, tensors, (4,), writer=hf_writer(directory))

    def padded(self) -> Tensors:
        """Those that lie row by row: the safetensors library, with which torch writes, refuses the others."""
        return {name: tensor.contiguous() for name, tensor in super().padded().items()}

    def weight_files(self, directory: Path) -> list[Path]:
        """Without the last rank's: no file says how many there were, and the model's config has to."""
        return [path for path in super().weight_files(directory) if not path.name.startswith("shard-00004")]


def optimizer_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """An Adam state of the tensors, as torch's get_optimizer_state_dict gives it."""
    state = {name: {"step": torch.tensor(3.0), "exp_avg": torch.zeros_like(t)} for name, t in tensors.items()}
    return {"state": state, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": list(tensors)}]}


def bits(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: bits_of(tensor.expr) for name, tensor in checkpoint.tensors.items()}


def assert_merges(directory: Path, name: str, **options: Any) -> None:
    target = directory.parent / "merged"
    nbmerge.merge(directory, target, progress=False, **options)
    assert_same(saved_bits(target), bits_of_all(published_state(name)))
    assert nbmerge.validate(target, checkpoint=directory, progress=False).ok


class TestBoxes:
    def test_fsdp_times_tp(self, tmp_path: Path):
        def place(name: str, tensor: torch.Tensor) -> list[Any]:
            return [Shard(0), Shard(1)] if tensor.dim() == 2 else [Replicate(), Shard(0)]

        checkpoint = open_checkpoint(write_dcp(tmp_path / "run", TABLE, (2, 2), place=place))
        assert_same(bits(checkpoint), bits_of_all(TABLE))
        assert len(checkpoint["model.layers.0.mlp.weight"].chunks) == 4
        assert checkpoint.world_size == 4

    @given(
        shapes=st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4),
        mesh=st.sampled_from([(1,), (2,), (3,), (5,), (2, 2), (3, 2)]),
        safetensors=st.booleans(),
        data=st.data(),
    )
    @settings(max_examples=25)
    def test_any_shapes_on_any_mesh(self, tmp_path_factory, shapes, mesh, safetensors, data):
        """Each mesh dimension shards a dimension of its own: torch's planner misplaces uneven shards of one by two."""
        directory = tmp_path_factory.mktemp("run")
        tensors = {
            f"model.layers.{number}.w": torch.arange(float(math.prod(shape))).reshape(shape) + number
            for number, shape in enumerate(shapes)
        }
        places = {}
        for name, tensor in tensors.items():
            dims = data.draw(st.permutations(range(tensor.dim())))
            places[name] = [Shard(dims[n]) if n < len(dims) else Replicate() for n in range(len(mesh))]
        writer = hf_writer(directory) if safetensors and HAS_HF_WRITER else None
        write_dcp(directory, tensors, mesh, place=lambda name, _: places[name], writer=writer)
        assert_same(bits(open_checkpoint(directory)), bits_of_all(tensors))

    def test_of_processes(self, tmp_path: Path, tiny_model_dir):
        """FSDP2 of a real model, with its optimizer, in processes that talk over gloo."""
        run = write_fsdp_run(tmp_path / "fsdp", tiny_model_dir("qwen3_moe"))
        for folder in ("run", "hf") if HAS_HF_WRITER else ("run",):
            assert_merges(run / folder, "qwen3_moe", hf_model_config_path=str(tiny_model_dir("qwen3_moe")))
            shutil.rmtree(run / "merged")
        checkpoint = open_checkpoint(run / "run")
        assert set(checkpoint) == set(memory_state("qwen3_moe"))
        assert_says(" ".join(checkpoint.notes), "of optimizer left alone", "'model.'", "pickled objects left alone")


ROOTS = {
    "flat": ((), {}),
    "model": (("model",), {"optimizer": "optimizer"}),
    "app": (("app", "model"), {"lr_scheduler": "scheduler"}),
    "another": (("actor_module",), {"actor_optim": "optimizer"}),
    "wrapped": (("state_dict", "module"), {}),
}


class TestRoots:
    @pytest.mark.parametrize("name", ["qwen2", "qwen2_tied", "qwen2_value", "qwen2_5_vl"])
    @pytest.mark.parametrize("case", ROOTS)
    def test_is_recognised_and_taken_off(self, tmp_path: Path, case: str, name: str):
        root, beside = ROOTS[case]
        state = memory_state(name)
        others: dict[str, Any] = {}
        if "optimizer" in beside.values():
            others[next(iter(beside))] = optimizer_of({"model.norm.weight": torch.ones(2)})
        others["train_state"] = {"step": torch.tensor(7), "name": "a run"}
        run = write_dcp(tmp_path / "run", state, root=root, beside=others)
        write_config(tmp_path / "config", name)
        checkpoint = open_checkpoint(run, hf_model_config_path=tmp_path / "config")
        assert set(checkpoint) == set(state)
        assert_merges(run, name, hf_model_config_path=str(tmp_path / "config"))

    def test_without_a_config(self, tmp_path: Path):
        for number, (root, _) in enumerate(ROOTS.values()):
            run = write_dcp(tmp_path / str(number), memory_state("qwen2"), root=root)
            assert set(open_checkpoint(run)) == set(memory_state("qwen2"))

    def test_a_tied_model_without_its_head(self, tmp_path: Path):
        """All names begin with `model.`, which is the model's own."""
        state = {name: tensor for name, tensor in memory_state("qwen2_tied").items() if name != "lm_head.weight"}
        assert set(open_checkpoint(write_dcp(tmp_path / "flat", state))) == set(state)
        run = write_dcp(tmp_path / "run", state, root=("model",), beside={"optimizer": optimizer_of(TABLE)})
        assert set(open_checkpoint(run)) == set(state)

    def test_an_average_beside_the_model_is_left_alone(self, tmp_path: Path):
        state = memory_state("qwen2")
        run = write_dcp(tmp_path / "run", state, root=("model",), beside={"ema": {k: v + 1 for k, v in state.items()}})
        checkpoint = open_checkpoint(run)
        assert_same(bits(checkpoint), bits_of_all(state))
        assert_says(" ".join(checkpoint.notes), "outside 'model.' left alone", "ema.")

    def test_two_models_are_ambiguous(self, tmp_path: Path):
        state = memory_state("qwen2")
        run = write_dcp(tmp_path / "run", state, root=("actor",), beside={"policy": state})
        message = refusal(AmbiguousCheckpointError, open_checkpoint, run)
        assert_says(message, "2 models are in one checkpoint", "actor.", "policy.", str(run), "fix:")

    def test_a_buffer_called_like_the_trainers_is_kept_in_the_model(self, tmp_path: Path):
        state = {"model.layers.0.loss.weight": torch.ones(2), "model.loss.weight": torch.ones(3)}
        assert set(open_checkpoint(write_dcp(tmp_path / "run", state))) == set(state)


class TestDirectories:
    def accelerate(self, directory: Path) -> Path:
        state = memory_state("qwen2")
        write_dcp(directory / "pytorch_model_fsdp_0", state, root=("model",))
        write_dcp(directory / "optimizer_0", {}, beside={"optimizer": optimizer_of(state)})
        torch.save({}, directory / "scheduler.bin")
        return directory

    def test_of_accelerate(self, tmp_path: Path):
        directory = self.accelerate(tmp_path / "checkpoint-8")
        write_config(directory, "qwen2")
        checkpoint = open_checkpoint(directory)
        assert checkpoint.evidence == ("pytorch_model_fsdp_0/.metadata, 2 × *.distcp",)
        assert checkpoint.config_dir == directory
        roles = {(file.path.parent.name, file.role) for file in checkpoint.files}
        assert roles == {
            ("pytorch_model_fsdp_0", "weights"), ("optimizer_0", "optimizer"), ("checkpoint-8", "extra state")
        }  # fmt: skip
        assert_merges(directory, "qwen2")

    def test_the_folder_in_it_finds_the_config_beside_it(self, tmp_path: Path):
        directory = self.accelerate(tmp_path / "checkpoint-8")
        write_config(directory, "qwen2")
        assert open_checkpoint(directory / "pytorch_model_fsdp_0").config_dir == directory

    def test_its_optimizer_alone_is_no_model(self, tmp_path: Path):
        directory = self.accelerate(tmp_path / "checkpoint-8")
        message = refusal(IncompleteCheckpointError, open_checkpoint, directory / "optimizer_0")
        assert_says(message, "no weights", "optimizer.", "pass", "pytorch_model_fsdp_0")

    def test_of_several_models_is_told(self, tmp_path: Path):
        directory = self.accelerate(tmp_path / "run")
        write_dcp(directory / "pytorch_model_fsdp_1", TABLE)
        message = refusal(CheckpointError, open_checkpoint, directory)
        assert_says(message, "2 models", "pass one of", "pytorch_model_fsdp_0", "pytorch_model_fsdp_1")

    def test_a_run_names_its_steps(self, tmp_path: Path):
        for step in (10, 20):
            write_dcp(tmp_path / "run" / f"step-{step}", TABLE)
        message = refusal(NotACheckpointError, open_checkpoint, tmp_path / "run")
        assert_says(message, "pass one of", "step-10", "step-20")

    def test_shards_of_a_consolidated_model_are_read_alone(self, tmp_path: Path):
        """torch's own consolidation is a Hugging Face directory, and not this loader's."""
        write_dcp(tmp_path / "run", TABLE, writer=hf_writer(tmp_path / "run", enable_consolidation=True))
        assert (tmp_path / "run" / "model-00001-of-00001.safetensors").is_file()
        assert DCPLoader().evidence(tmp_path / "run") == ()
        assert_same(bits(open_checkpoint(tmp_path / "run" / "sharded")), bits_of_all(TABLE))

    def test_shards_whose_consolidation_did_not_happen(self, tmp_path: Path):
        write_dcp(tmp_path / "run" / "sharded", TABLE, writer=hf_writer(tmp_path / "run" / "sharded"))
        assert_same(bits(open_checkpoint(tmp_path / "run")), bits_of_all(TABLE))

    def test_options_of_fsdp_are_refused(self, tmp_path: Path):
        run = write_dcp(tmp_path / "run", TABLE)
        message = refusal(OptionError, open_checkpoint, run, mesh_shape="2", mesh_dim_names="a")
        assert_says(message, "mesh_shape", "leave them out")


class TestFaults:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        run = write_dcp(tmp_path / "run", memory_state("qwen2"), (3,), root=("model",))
        write_config(run, "qwen2")
        return run

    def refused(self, error: type[BaseException], run: Path) -> str:
        before = content_of(run.parent)
        message = refusal(error, nbmerge.merge, run, run.parent / "out", progress=False)
        assert content_of(run.parent) == before
        return message

    def test_missing_files_are_all_named(self, run: Path):
        for rank in (0, 2):
            (run / f"__{rank}_0.distcp").unlink()
        assert_says(
            self.refused(IncompleteCheckpointError, run), "2 files of 3 are missing", "__0_0.distcp, __2_0.distcp",
            "each node saves to its own disk", "copy",
        )  # fmt: skip

    def test_an_optimizers_missing_file_is_no_matter(self, tmp_path: Path):
        state = memory_state("qwen2")
        run = write_dcp(tmp_path / "run", state, (2,), root=("model",), beside={"optimizer": optimizer_of(TABLE)})
        held = {Path(chunk.stored.file) for tensor in open_checkpoint(run).tensors.values() for chunk in tensor.chunks}
        for path in set(run.glob("*.distcp")) - held:
            path.unlink()
        assert_same(bits(open_checkpoint(run)), bits_of_all(state))

    def test_a_file_cut_short(self, run: Path):
        path = run / "__1_0.distcp"
        path.write_bytes(path.read_bytes()[:-9])
        assert_says(self.refused(CorruptFileError, run), "__1_0.distcp", "cut short", "copy it again")

    def test_no_metadata(self, run: Path):
        (run / METADATA).unlink()
        assert_says(
            self.refused(NotACheckpointError, run), "no .metadata", "its name begins with a dot", "copy it from"
        )

    def test_a_hostile_index_runs_nothing(self, run: Path, tmp_path: Path):
        mark = tmp_path / "ran"
        (run / METADATA).write_bytes(pickled(Call(Global("os", "system"), f"touch {mark}")))
        assert_says(self.refused(UnsafePickleError, run), "os.system", "nothing of it was run", METADATA)
        assert not mark.exists()

    def test_another_models_config_is_told_when_the_merge_is_planned(self, run: Path):
        write_config(run, "qwen2", vocab_size=99)
        assert_says(self.refused(PlanError, run), "model.embed_tokens.weight", "[37, 16]", "[99, 16]")


class TestWhatIsNotRead:
    def test_types_that_safetensors_lacks_beside_the_weights_are_no_matter(self, tmp_path: Path):
        odd = {"phase": torch.ones(2, dtype=torch.complex128)}
        run = write_dcp(tmp_path / "run", memory_state("qwen2"), root=("model",), beside={"optimizer": odd})
        assert_same(bits(open_checkpoint(run)), bits_of_all(memory_state("qwen2")))

    def test_as_weights_they_are_all_told(self, tmp_path: Path):
        odd = torch.ones(2, dtype=torch.complex128)
        run = write_dcp(tmp_path / "run", {"lm_head.weight": odd, "model.norm.weight": odd})
        message = refusal(UnsupportedCheckpointError, open_checkpoint, run)
        assert_says(message, "2 problems", "lm_head.weight is of type complex128", "model.norm.weight", "cast it")

    def test_files_in_another_format(self, tmp_path: Path):
        from torch.distributed.checkpoint import filesystem

        if not hasattr(filesystem, "SerializationFormat"):
            pytest.skip("this torch writes no other format")
        safetensors = filesystem.SerializationFormat.SAFETENSORS
        writer = filesystem.FileSystemWriter(tmp_path, serialization_format=safetensors)
        write_dcp(tmp_path, TABLE, writer=writer)
        message = refusal(UnsupportedCheckpointError, open_checkpoint, tmp_path)
        assert_says(message, "__0_0.distcp holds safetensors", "serialization_format=SAFETENSORS", "fix:")

    @pytest.mark.parametrize("options", [{"single_file_per_rank": False}, {"thread_count": 3}])
    def test_several_files_of_a_rank_are(self, tmp_path: Path, options: dict[str, Any]):
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        write_dcp(tmp_path, TABLE, writer=FileSystemWriter(tmp_path, **options))
        assert len(list(tmp_path.glob("*.distcp"))) > 2
        assert_same(bits(open_checkpoint(tmp_path)), bits_of_all(TABLE))


class TestFaultsOfShards:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        return write_dcp(tmp_path / "run", TABLE, (3,), writer=hf_writer(tmp_path / "run"))

    def edit(self, path: Path, change: Any) -> None:
        """The file with its header changed by `change`, which gets header and offsets of pieces."""
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        pieces = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
        change(header, pieces)
        header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(pieces)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    def shard(self, run: Path, rank: int) -> Path:
        return run / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"

    def test_a_missing_rank_leaves_a_gap(self, run: Path):
        self.shard(run, 1).unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, run)
        assert_says(message, "model.layers.0.mlp.weight do not make up [7, 5]", "15 of 35 elements lie in no piece")

    def test_overlapping_pieces(self, run: Path):
        def change(header: Any, pieces: Any) -> None:
            pieces["model.layers.0.mlp.weight"]["saved_offsets"] = [2, 0]

        self.edit(self.shard(run, 1), change)
        assert_says(refusal(IncompleteCheckpointError, open_checkpoint, run), "model.layers.0.mlp.weight", "overlap")

    def test_other_dtypes(self, run: Path):
        def change(header: Any, pieces: Any) -> None:
            header["model.norm.weight"]["dtype"] = "I32"

        self.edit(self.shard(run, 2), change)
        message = refusal(InconsistentCheckpointError, open_checkpoint, run)
        assert_says(message, "dtype of model.norm.weight", "float32", "int32", "rank 2")

    @pytest.mark.parametrize("offsets", [[0], [0, 0, 0], [-1, 0], "no list", None])
    def test_offsets_that_are_none(self, run: Path, offsets: Any):
        def change(header: Any, pieces: Any) -> None:
            pieces["model.layers.0.mlp.weight"] = {"saved_offsets": offsets}

        self.edit(self.shard(run, 1), change)
        message = refusal(CorruptFileError, open_checkpoint, run)
        assert_says(message, self.shard(run, 1).name, "fix:", "copy it again")

    def test_a_tensor_without_offsets(self, run: Path):
        self.edit(self.shard(run, 0), lambda header, pieces: pieces.pop("model.norm.weight"))
        message = refusal(CorruptFileError, open_checkpoint, run)
        assert_says(message, "does not say where model.norm.weight begins", self.shard(run, 0).name)

    def test_a_number_that_no_rank_has(self, tmp_path: Path):
        """Tensors of one file only are in no other, so that their absence shows in the numbers alone."""
        numbers = {"model.layers.0.mlp.weight": 1, "model.norm.weight": 2}
        run = write_dcp(tmp_path, TABLE, (2,), writer=hf_writer(tmp_path, fqn_to_index_mapping=numbers))
        assert_same(bits(open_checkpoint(run)), bits_of_all(TABLE))
        for path in run.glob("*model-00002-of-00002.safetensors"):
            path.unlink()
        message = refusal(IncompleteCheckpointError, open_checkpoint, run)
        assert_says(message, "of 2 files of each rank, 1 is missing", "shard-*-model-00002-of-00002.safetensors")

    def test_a_file_that_one_rank_lacks_is_a_note(self, tmp_path: Path):
        run = write_dcp(tmp_path, TABLE, (2,), writer=hf_writer(tmp_path, fqn_to_index_mapping=_NUMBERS))
        assert open_checkpoint(run).notes == ()
        (run / "shard-00002-model-00002-of-00002.safetensors").unlink()
        (note,) = open_checkpoint(run).notes
        assert_says(note, "other ranks have shard-00002-model-00002-of-00002.safetensors", "or it was lost")

    def test_the_last_ranks_missing_file_is_told_by_the_config(self, tmp_path: Path):
        run = write_dcp(tmp_path / "run", memory_state("qwen2"), (2,), writer=hf_writer(tmp_path / "run"))
        write_config(run, "qwen2")
        self.shard(run, 1).unlink()
        message = refusal(PlanError, nbmerge.merge, run, tmp_path / "out", progress=False)
        assert_says(message, "model.embed_tokens.weight", "[19, 16]", "[37, 16]")


def test_what_is_shown_says_how_tensors_are_cut(tmp_path: Path):
    write_dcp(tmp_path / "index", TABLE, (2,))
    write_dcp(tmp_path / "shards", TABLE, (2,), writer=hf_writer(tmp_path / "shards"))
    for folder in ("index", "shards"):
        checkpoint = open_checkpoint(tmp_path / folder)
        for text in (repr(checkpoint), checkpoint._repr_html_()):
            assert_says(text.replace("\xa0", " "), "cut along dim 0", "written by 2 ranks")
        shown = repr(checkpoint["model.layers.0.mlp.weight"])
        assert_says(shown, "in 2 uneven pieces", "written by rank", "[4:7, 0:5]")


def test_the_saved_model_of_transformers_is_not_claimed(tmp_path: Path):
    assert DCPLoader().evidence(save_tiny_model("qwen2", tmp_path)) == ()


def test_decoder_layers_of_another_model_are_no_megatron(tmp_path: Path) -> None:
    """BART, Whisper and others have a `decoder.layers.` of their own."""
    tensors = {"model.decoder.layers.0.self_attn.q_proj.weight": torch.arange(6.0).reshape(3, 2)}
    assert open_checkpoint(write_dcp(tmp_path / "ckpt", tensors)).backend == "dcp"
