"""DeepSpeed checkpoints that are as they should be: every master, every bit, whatever the stage."""

from __future__ import annotations

import collections
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge.geometry import tiling_faults
from nbmerge.loaders.deepspeed import DeepSpeedLoader
from nbmerge.testing import LoaderContract, Tensors
from tests.support import examples
from tests.support.deepspeed import (
    Run,
    deepspeed_classes,
    run_of,
    tensors_of,
    write_deepspeed,
    write_pipeline,
    write_universal,
)
from tests.support.models import memory_state
from tests.support.results import assert_same, bits, bits_of, bits_of_all, receipt_of, saved_bits

MASTERS = tensors_of([(5, 3), (7,), (2, 3, 2), (1,), (11, 4), ()])
LAYERS = {f"{n}.weight": torch.arange(12.0).reshape(4, 3) + n + 1 / 3 for n in (0, 2)}
LAYER_NAMES = {f"layer_{n:02d}": f"model.layers.{n}" for n in range(3)}
shapes = st.lists(st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1, max_size=6)


def assert_opens_as(directory: Path, tensors: Tensors, **options: Any) -> nbmerge.Checkpoint:
    ckpt = nbmerge.open_checkpoint(directory, **options)
    assert sorted(ckpt.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        assert bits_of(ckpt[name].expr) == bits(tensor), name
    return ckpt


class OnRanks(LoaderContract):
    """The contract, for checkpoints that train the fp32 tensors and keep the others as buffers."""

    loader = DeepSpeedLoader()
    stage: int

    def write(self, directory: Path, tensors: Tensors) -> None:
        self.save(directory, self.run(tensors))

    def save(self, directory: Path, run: Run) -> None:
        write_deepspeed(directory, run)

    def run(self, tensors: Tensors) -> Run:
        first: dict[int, str] = {}
        shared = {name: first[p] for name, t in tensors.items() if first.setdefault(p := t.data_ptr(), name) != name}
        masters = {name: t for name, t in tensors.items() if t.dtype == torch.float32 and name not in shared}
        buffers = {name: t for name, t in tensors.items() if t.dtype != torch.float32}
        return Run(masters, self.stage, 3, shared=shared, buffers=buffers)

    def kept(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Masters are fp32, and what has 16 bits is widened beside them; without any master it stays."""
        return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor

    def halves(self) -> Tensors:
        return {**super().halves(), "model.embed_tokens.weight": torch.randn(5, 3)}


class TestStage2(OnRanks):
    stage = 2


class TestStage3(OnRanks):
    stage = 3


class TestUniversal(OnRanks):
    stage = 3

    def save(self, directory: Path, run: Run) -> None:
        write_universal(directory, run)


@examples(60)
@given(shapes, st.integers(1, 5), st.integers(1, 3), st.sampled_from([1, 8]), st.booleans())
def test_groups_are_cut_into_parameters_whatever_the_ranks(
    tmp_path_factory: pytest.TempPathFactory, sizes: Any, world: int, groups: int, alignment: int, keeps: bool
):
    masters = tensors_of(sizes)
    names = [list(masters)[start::groups] for start in range(min(groups, len(masters)))]
    how = {"groups": names, "alignment": 1 if keeps else alignment, "keeps_padding": keeps}
    directory = tmp_path_factory.mktemp("ckpt")
    write_deepspeed(directory, Run(masters, 1 if keeps else 2, world, **how))
    assert_opens_as(directory, masters)


@examples(60)
@given(shapes, st.integers(1, 5), st.integers(1, 3))
def test_stage_3_puts_the_parts_of_each_parameter_together(
    tmp_path_factory: pytest.TempPathFactory, sizes: Any, world: int, size: int
):
    masters = tensors_of(sizes)
    names = [list(masters)[start : start + size] for start in range(0, len(masters), size)]
    directory = tmp_path_factory.mktemp("ckpt")
    write_deepspeed(directory, Run(masters, 3, world, groups=names))
    ckpt = assert_opens_as(directory, masters)
    for tensor in ckpt.tensors.values():
        assert tiling_faults(tensor.shape, [chunk.box for chunk in tensor.chunks]) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_frozen_weights_are_widened_and_the_receipt_says_so(stage: int, tiny_model_dir, tmp_path: Path):
    model = memory_state("qwen2")
    frozen = {name: t.bfloat16() for name, t in model.items() if ".layers.0." in name}
    trained = {name: t for name, t in model.items() if name not in frozen}
    write_deepspeed(tmp_path / "run", run_of(trained, stage=stage, world=3, frozen=frozen))
    out = tmp_path / "out"
    nbmerge.merge(tmp_path / "run", out, hf_model_config_path=tiny_model_dir("qwen2"))
    want = {**{name: t.float() for name, t in trained.items()}, **{name: t.float() for name, t in frozen.items()}}
    assert_same(saved_bits(out), bits_of_all(want))
    casts = receipt_of(out)["casts"]
    assert {(cast["tensor"], cast["from"], cast["to"]) for cast in casts} == {
        (name, "bfloat16", "float32") for name in frozen
    }


def test_a_cast_back_of_what_was_widened_is_a_copy(tiny_model_dir, tmp_path: Path):
    model = memory_state("qwen2")
    frozen = {"model.norm.weight": model.pop("model.norm.weight").bfloat16()}
    write_deepspeed(tmp_path / "run", run_of(model, frozen=frozen))
    plan = nbmerge.plan_merge(tmp_path / "run", hf_model_config_path=tiny_model_dir("qwen2"), dtype="bfloat16")
    assert {cast.name for cast in plan.casts} == set(model)
    assert bits_of(plan.tensors["model.norm.weight"].expr) == bits(frozen["model.norm.weight"])


@pytest.mark.parametrize("stage", [2, 3])
def test_buffers_are_taken_from_the_module(tmp_path: Path, stage: int):
    buffers = {"bias": torch.randn(3), "count": torch.tensor(2**40), "empty": torch.zeros(0, dtype=torch.int64)}
    write_deepspeed(tmp_path, Run(MASTERS, stage, 3, buffers=buffers))
    assert_opens_as(tmp_path, {**MASTERS, **buffers})


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_alias_is_given_the_master_of_what_it_shares(tmp_path: Path, stage: int):
    shared = {"lm_head.weight": "model.layers.4.weight"}
    write_deepspeed(tmp_path, Run(MASTERS, stage, 2, shared=shared))
    ckpt = assert_opens_as(tmp_path, {**MASTERS, "lm_head.weight": MASTERS["model.layers.4.weight"]})
    assert ckpt["lm_head.weight"].expr == ckpt["model.layers.4.weight"].expr


def test_sharing_is_seen_in_files_that_do_not_tell_it(tmp_path: Path):
    run = Run(MASTERS, 2, 2, shared={"lm_head.weight": "model.layers.4.weight"})
    folder = write_deepspeed(tmp_path, run)
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path), "shared_params": {}}, path)
    assert_opens_as(tmp_path, {**MASTERS, "lm_head.weight": MASTERS["model.layers.4.weight"]})


def test_frozen_and_shared_is_widened_under_both_names(tmp_path: Path):
    frozen = {"model.embed_tokens.weight": torch.randn(6, 2).bfloat16()}
    shared = {"lm_head.weight": "model.embed_tokens.weight"}
    write_deepspeed(tmp_path, Run(MASTERS, 2, 2, frozen=frozen, shared=shared))
    wide = frozen["model.embed_tokens.weight"].float()
    ckpt = assert_opens_as(tmp_path, {**MASTERS, "model.embed_tokens.weight": wide, "lm_head.weight": wide})
    assert "2 tensors without an fp32 master" in ckpt.notes[0]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_weights_of_the_model_itself(tmp_path: Path, stage: int):
    write_deepspeed(tmp_path, Run(MASTERS, stage, 2, frozen={"head": torch.ones(2).half()}))
    ckpt = assert_opens_as(
        tmp_path, {**{name: t.bfloat16() for name, t in MASTERS.items()}, "head": torch.ones(2).half()}, weights="model"
    )
    assert "16-bit" in ckpt.layout
    assert [file.role for file in ckpt.files] == ["weights"] + ["optimizer"] * (2 if stage else 0)


def test_stage_0_has_the_weights_of_the_model_only(tmp_path: Path):
    write_deepspeed(tmp_path, Run(MASTERS, 0))
    assert_opens_as(tmp_path, {name: tensor.bfloat16() for name, tensor in MASTERS.items()})


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("weights", [None, "master", "model"])
def test_trained_in_fp32_both_are_the_same(tmp_path: Path, stage: int, weights: str | None):
    write_deepspeed(tmp_path, Run(MASTERS, stage, 2, dtype=torch.float32))
    assert_opens_as(tmp_path, MASTERS, weights=weights)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint(tmp_path: Path, stage: int):
    frozen = {"head": torch.randn(4, 2).bfloat16()}
    write_universal(tmp_path, Run(MASTERS, stage, 3, frozen=frozen))
    ckpt = assert_opens_as(tmp_path, {**MASTERS, "head": frozen["head"].float()})
    assert "universal" in ckpt.layout
    assert nbmerge.where(ckpt, "model.layers.4.weight", (3, 1)).file.name == "fp32.pt"


def test_a_universal_checkpoint_of_tensor_parallel_ranks_has_whole_masters(tmp_path: Path):
    run = Run(MASTERS, 1, 2, model_parallel=2, frozen={"head": torch.ones(2).bfloat16()})
    write_universal(tmp_path, run)
    assert_opens_as(tmp_path, MASTERS)  # what is left of `head` may be a part of it


def test_what_a_universal_checkpoint_has_of_buffers_as_floats_is_taken_from_the_module(tmp_path: Path):
    buffers, frozen = {"count": torch.tensor([2**40, 3])}, {"head": torch.randn(4, 2).bfloat16()}
    folder = write_universal(tmp_path, Run(MASTERS, 1, 2, buffers=buffers, frozen=frozen))
    for name, tensor in {**buffers, **frozen}.items():  # as 0.19.8 writes it
        (folder / "zero" / name).mkdir()
        torch.save({"param": tensor.float()}, folder / "zero" / name / "fp32.pt")
    ckpt = assert_opens_as(tmp_path, {**MASTERS, **buffers, "head": frozen["head"].float()})
    assert "1 tensor without an fp32 master" in ckpt.notes[0]


class TestPipelines:
    """Layers that look alike, each in a file of its own, with its tensors at the same place."""

    def test_a_frozen_layer_is_not_given_the_masters_of_another(self, tmp_path: Path):
        frozen = {"1.weight": torch.full((4, 3), 5.0).bfloat16()}
        write_pipeline(tmp_path, Run(LAYERS, 1, 2, frozen=frozen))
        (tmp_path / "layer_names.json").write_text(json.dumps(LAYER_NAMES))
        want = {f"model.layers.{name}": t.float() for name, t in {**LAYERS, **frozen}.items()}
        ckpt = assert_opens_as(tmp_path, want)
        assert "1 tensor without an fp32 master" in ckpt.notes[1]

    def test_a_universal_one_has_no_files_of_layers(self, tmp_path: Path):
        folder = write_universal(tmp_path, Run(LAYERS, 1, 2))
        path = folder / "mp_rank_00_model_states.pt"
        torch.save({**torch.load(path), "module": None}, path)
        with pytest.raises(nbmerge.UnsupportedCheckpointError, match=r"layer_00 \(has weight\), layer_02"):
            nbmerge.open_checkpoint(tmp_path)
        (tmp_path / "layer_names.json").write_text(json.dumps(LAYER_NAMES))
        assert_opens_as(tmp_path, {f"model.layers.{name}": t for name, t in LAYERS.items()})
        with pytest.raises(nbmerge.OptionError, match="the fp32 masters only"):
            nbmerge.open_checkpoint(tmp_path, weights="model")


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_without_elements_keeps_its_shape(tmp_path: Path, stage: int):
    write_deepspeed(tmp_path, Run(MASTERS, stage, 2, frozen={"none": torch.zeros(0, 3)}))
    assert_opens_as(tmp_path, {**MASTERS, "none": torch.zeros(0, 3)})


def test_a_parameter_with_a_master_of_its_own_is_no_alias(tmp_path: Path):
    """Parameters without elements have the address of their neighbours, by which DeepSpeed tells what is shared."""
    write_deepspeed(tmp_path, Run(MASTERS, 2, 2))
    path = tmp_path / "global_step3" / "mp_rank_00_model_states.pt"
    torch.save({**torch.load(path), "shared_params": {"model.layers.4.weight": "model.layers.0.weight"}}, path)
    assert_opens_as(tmp_path, MASTERS)


def test_masters_that_were_kept_in_bf16_are_called_so(tmp_path: Path):
    folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 1))
    path = folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    with deepspeed_classes():
        content = torch.load(path, weights_only=False)
        state = content["optimizer_state_dict"]
        state["single_partition_of_fp32_groups"] = [v.bfloat16() for v in state["single_partition_of_fp32_groups"]]
        torch.save(content, path)
    ckpt = assert_opens_as(tmp_path, {name: t.bfloat16() for name, t in MASTERS.items()})
    assert ckpt.layout == "DeepSpeed ZeRO stage 2, bfloat16 masters"


def test_a_rank_with_another_learning_rate_is_told(tmp_path: Path):
    folder = write_deepspeed(tmp_path, Run(MASTERS, 2, 2))
    path = folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    with deepspeed_classes():
        content = torch.load(path, weights_only=False)
        content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"] = [{"lr": 2e-3}]
        torch.save(content, path)
    (note,) = nbmerge.open_checkpoint(tmp_path).notes
    assert "learning rates differ" in note
    assert f"{path.name} (0.002)" in note


def test_a_parameter_that_the_optimizer_was_not_given_is_lost_at_stage_3(tmp_path: Path):
    folder = write_deepspeed(tmp_path, Run(MASTERS, 3, 2))
    for path in folder.glob("*_model_states.pt"):
        content = torch.load(path)
        content["module"]["head.weight"] = torch.empty(0, dtype=torch.bfloat16)
        torch.save({**content, "frozen_param_shapes": {}, "frozen_param_fragments": {}}, path)
    absence = assert_opens_as(tmp_path, MASTERS).absence
    assert absence is not None
    assert absence.explains("head.weight")
    assert not absence.explains("model.layers.9.weight")
    assert "neither frozen nor given to the optimizer" in absence.why


class TestDirectories:
    def test_latest_says_which_tag(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(tensors_of([(2, 2)])), "global_step9")
        write_deepspeed(tmp_path, Run(MASTERS), "global_step10")
        (tmp_path / "latest").write_text("global_step10\n")
        assert_opens_as(tmp_path, MASTERS)

    def test_the_directory_of_a_tag_itself(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("{}")
        folder = write_deepspeed(tmp_path, Run(MASTERS))
        ckpt = assert_opens_as(folder, MASTERS)
        assert ckpt.config_dir == tmp_path

    def test_one_tag_needs_no_latest(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS), "best", latest=False)
        assert_opens_as(tmp_path, MASTERS)

    def test_more_than_nine_ranks_are_taken_in_their_order(self, tmp_path: Path):
        masters = tensors_of([(40, 3), (13,)])
        write_deepspeed(tmp_path, Run(masters, 2, 12))
        assert_opens_as(tmp_path, masters)

    def test_the_files_of_the_trainer_are_beside(self, tmp_path: Path):
        write_deepspeed(tmp_path, Run(MASTERS, 3))
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "rng_state_0.pth").write_bytes(b"?")
        ckpt = assert_opens_as(tmp_path, MASTERS)
        assert ckpt.config_dir == tmp_path

    def test_a_foreign_latest_is_not_claimed(self, tmp_path: Path):
        (tmp_path / "latest").write_text("iter_0000100")
        (tmp_path / "iter_0000100").mkdir()
        assert DeepSpeedLoader().evidence(tmp_path) == ()

    def test_the_client_state_may_hold_arrays_and_options(self, tmp_path: Path):
        import argparse

        import numpy as np

        state = {"args": argparse.Namespace(lr=0.1), "loss": np.float64(0.5), "seen": {1, 2}}
        state["lr_scheduler"] = {"milestones": collections.Counter([2, 3])}  # MultiStepLR's
        state["log"] = collections.defaultdict(list, loss=[0.5])
        write_deepspeed(tmp_path, Run(MASTERS, client_state=state))
        assert_opens_as(tmp_path, MASTERS)


def test_what_is_no_tensor_is_left_alone_and_told(tmp_path: Path):
    folder = write_deepspeed(tmp_path, Run(MASTERS))
    path = folder / "mp_rank_00_model_states.pt"
    content = torch.load(path)
    content["module"]["extra_state"] = None
    torch.save(content, path)
    ckpt = assert_opens_as(tmp_path, MASTERS)
    assert ckpt.notes == ("1 entry without a tensor left alone: extra_state",)


def test_where_an_element_of_a_row_that_two_ranks_share_is(tmp_path: Path):
    masters = {"w": torch.arange(15, dtype=torch.float32).reshape(3, 5)}
    write_deepspeed(tmp_path, Run(masters, 3, 2))  # 8 elements each, so that row 1 is cut after its third
    ckpt = nbmerge.open_checkpoint(tmp_path)
    assert [(chunk.rank, str(chunk.box)) for chunk in ckpt["w"].chunks] == [
        (0, "[0:1, 0:5]"), (0, "[1:2, 0:3]"), (1, "[1:2, 3:5]"), (1, "[2:3, 0:5]"),
    ]  # fmt: skip
    for index, rank in (((1, 2), 0), ((1, 3), 1)):
        at = nbmerge.where(ckpt, "w", index)
        assert at.rank == rank
        with at.file.open("rb") as stream:
            stream.seek(at.offset)
            assert torch.frombuffer(bytearray(stream.read(4)), dtype=torch.float32).item() == masters["w"][index]


def test_displays_say_how_the_masters_lie(tmp_path: Path):
    write_deepspeed(tmp_path, Run(MASTERS, 3, 2))
    ckpt = nbmerge.open_checkpoint(tmp_path)
    assert ckpt["model.layers.4.weight"].placement == "Flat×2"
    assert "ZeRO stage 3, fp32 masters" in repr(ckpt)
    assert "Flat" in repr(ckpt["model.layers.0.weight"])
    assert "dp=2" in ckpt._repr_html_()


def test_a_merge_copies_bytes_and_computes_nothing(tiny_model_dir, tmp_path: Path):
    model = memory_state("qwen2")
    write_deepspeed(tmp_path / "run", run_of(model, stage=3, world=3))
    plan = nbmerge.plan_merge(tmp_path / "run", hf_model_config_path=tiny_model_dir("qwen2"))
    assert plan.execution.computed_bytes == 0
    assert plan.casts == ()
    nbmerge.merge(plan, tmp_path / "out")
    assert_same(saved_bits(tmp_path / "out"), bits_of_all({name: t.float() for name, t in model.items()}))


class TestFrozenWeightsThatWereLeftOut:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        model = memory_state("qwen2")
        frozen = {name: model.pop(name).bfloat16() for name in list(model) if ".layers.0." in name}
        write_deepspeed(tmp_path / "run", replace(run_of(model), frozen=frozen, excludes_frozen=True))
        return tmp_path / "run"

    def test_are_named_with_the_reason(self, run: Path, tiny_model_dir):
        plan = nbmerge.plan_merge(run, hf_model_config_path=tiny_model_dir("qwen2"))
        assert all("model.layers.0." in problem.what for problem in plan.problems)
        assert all("frozen" in problem.why and "--base_model" in problem.fix for problem in plan.problems)

    def test_are_taken_from_the_base_model_in_the_masters_dtype(self, run: Path, tiny_model_dir, tmp_path: Path):
        base = {name: tensor.bfloat16() for name, tensor in memory_state("qwen2").items()}
        write_base(tmp_path / "base", base)
        out = tmp_path / "out"
        nbmerge.merge(run, out, hf_model_config_path=tiny_model_dir("qwen2"), base_model=tmp_path / "base")
        want = {n: (base[n] if ".layers.0." in n else t).float() for n, t in memory_state("qwen2").items()}
        assert_same(saved_bits(out), bits_of_all(want))
        assert {fill["reason"] for fill in receipt_of(out)["fills"]} == {"frozen, and left out on saving"}

    def test_another_missing_tensor_has_another_reason(self, run: Path, tiny_model_dir):
        ckpt = nbmerge.open_checkpoint(run)
        assert ckpt.absence is not None
        assert ckpt.absence.explains("model.layers.0.mlp.up_proj.weight")
        assert not ckpt.absence.explains("model.layers.7.mlp.up_proj.weight")


def write_base(directory: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    directory.mkdir()
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
