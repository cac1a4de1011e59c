"""Adapters in Megatron checkpoints are folded, split off and written alone as peft does it, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from tests.support.adapters import Adapted, adapted
from tests.support.megatron import write_torch_dist
from tests.support.megatron_adapters import ALL, as_saved, index_pieces, megatron_adapter, shared, write_verl_adapter
from tests.support.megatron_forms import stacked
from tests.support.megatron_models import megatron_state
from tests.support.megatron_ranks import Ranks, write_lm
from tests.support.messages import assert_says, refusal
from tests.support.models import published_state, save_tiny_model, tiny_config, tiny_model, write_config
from tests.support.results import assert_same, receipt_of, saved_bits

ALPHA = {"lora_alpha": 5}


def write(directory: Path, tensors: Mapping[str, torch.Tensor], family: str = "qwen2", tp: int = 1) -> Path:
    """verl's directories, the adapters cut over `tp` ranks."""
    write_torch_dist(directory / "dist_ckpt", as_saved(tensors, tp), index_pieces(tp))
    write_config(directory / "huggingface", family)
    return directory


def with_adapter(made: Adapted, **options: Any) -> dict[str, torch.Tensor]:
    """The whole model under Megatron's names, adapted."""
    dtype = str(next(made.model.parameters()).dtype).removeprefix("torch.")
    return megatron_state(made.family, dtype=dtype) | megatron_adapter(made, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_fold_of_fused_layers_is_peft_s_own(tmp_path: Path, tp: int, dtype: str):
    made = shared(dtype=dtype)
    ckpt = write(tmp_path / "ckpt", with_adapter(made), tp=tp)
    report = nbmerge.merge(ckpt, tmp_path / "out", lora="fold", **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.folded())
    assert report.plan.lora is not None and report.plan.lora.layers == 14
    assert receipt_of(tmp_path / "out")["lora"]["known_from"]["lora_alpha"] == "the option lora_alpha"
    nbmerge.validate(tmp_path / "out", checkpoint=ckpt).raise_if_failed()


def test_stacked_layers_and_wrapped_names_are_the_same(tmp_path: Path):
    made = shared()
    tensors = stacked(with_adapter(made))
    assert "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight" in tensors
    wrapped = {name.replace("linear_proj.weight", "linear_proj.to_wrap.weight"): t for name, t in tensors.items()}
    nbmerge.merge(write(tmp_path / "ckpt", wrapped, tp=2), tmp_path / "out", lora="fold", **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.folded())


@pytest.mark.parametrize("tp", [1, 2])
def test_an_adapter_for_each_projection_is_put_in_order(tmp_path: Path, tp: int):
    made = adapted(r=4, target_modules=ALL)
    ckpt = write(tmp_path / "ckpt", with_adapter(made, canonical=True), tp=tp)
    nbmerge.merge(ckpt, tmp_path / "out", lora="fold", **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.folded())


def test_dora_is_folded(tmp_path: Path):
    made = shared(use_dora=True)
    nbmerge.merge(write(tmp_path / "ckpt", with_adapter(made)), tmp_path / "out", lora="fold", **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.folded())


def test_a_split_is_the_base_model_and_an_adapter_that_peft_loads(tmp_path: Path):
    from peft import PeftModel

    made = shared()
    nbmerge.merge(write(tmp_path / "ckpt", with_adapter(made)), tmp_path / "out", lora="split", **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.base())
    assert_same(saved_bits(tmp_path / "out/lora_adapter"), made.adapter())
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model("qwen2")), tmp_path / "out/lora_adapter").eval()
    assert torch.equal(made.logits(loaded), made.logits())


def test_rank_files_of_megatron_lm_are_put_together(tmp_path: Path):
    made = shared()
    adapter = tmp_path / "cut"
    ranks = Ranks(stages=[[1, 1]], tp=2)
    write_verl_adapter(adapter, megatron_adapter(made), ranks)
    from tests.support.megatron_ranks import rank_states

    states = rank_states(megatron_state("qwen2"), ranks)
    for folder, (chunk,) in states.items():
        chunk.update(torch.load(adapter / f"{folder}_adapter.pt")["adapter_state_dict"])
    write_lm(tmp_path / "ckpt", states)
    write_config(tmp_path / "ckpt/huggingface", "qwen2")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="fold", **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.folded())


@pytest.mark.parametrize("ranks", [Ranks(stages=[[2]]), Ranks(stages=[[2]], tp=2), Ranks(stages=[[1, 1]], tp=2),
                                   Ranks(stages=[[2]], tp=2, ep=2)])  # fmt: skip
def test_verls_adapter_files_are_folded_into_the_base_model(tmp_path: Path, ranks: Ranks):
    made = shared()
    write_verl_adapter(tmp_path / "actor/adapter_checkpoint", megatron_adapter(made), ranks)
    write_config(tmp_path / "actor/huggingface", "qwen2")
    base = save_tiny_model("qwen2", tmp_path / "base")
    ckpt = nbmerge.open_checkpoint(tmp_path / "actor")
    assert ckpt.layout.startswith("Megatron-Bridge's adapters") and ckpt.world_size == ranks.tp * ranks.pp * ranks.ep
    nbmerge.merge(ckpt, tmp_path / "out", lora="fold", base_model=base, **ALPHA)
    assert_same(saved_bits(tmp_path / "out"), made.folded())
    nbmerge.merge(ckpt, tmp_path / "alone", lora="adapter", **ALPHA)
    assert_same(saved_bits(tmp_path / "alone/lora_adapter"), made.adapter())


def test_verls_adapter_is_read_where_the_index_holds_no_model(tmp_path: Path):
    made = shared()
    write_torch_dist(tmp_path / "actor/dist_ckpt", {"optimizer.state.exp_avg": torch.zeros(3)})
    write_verl_adapter(tmp_path / "actor/adapter_checkpoint", megatron_adapter(made), Ranks(stages=[[2]], tp=2))
    write_config(tmp_path / "actor/huggingface", "qwen2")
    nbmerge.merge(tmp_path / "actor", tmp_path / "out", lora="adapter", **ALPHA)
    assert_same(saved_bits(tmp_path / "out/lora_adapter"), made.adapter())


def experts(count: int, *, grouped: bool, one_for_all: bool) -> dict[str, torch.Tensor]:
    """Adapters of the experts of the tiny Qwen3-MoE's first layer, with B of one layer's rows."""
    config = tiny_config("qwen3_moe")
    hidden, width, generator = config.hidden_size, config.moe_intermediate_size, torch.Generator().manual_seed(3)
    made: dict[str, torch.Tensor] = {}
    for linear, rows, columns in (("linear_fc1", 2 * width, hidden), ("linear_fc2", hidden, width)):
        a, b = (torch.randn(count, *shape, generator=generator) for shape in ((4, columns), (rows, 4)))
        if one_for_all:
            a, b = (tensor[:1].expand_as(tensor) for tensor in (a, b))
        for part, tensor in (("linear_in", a), ("linear_out", b)):
            stem = "decoder.layers.0.mlp.experts"
            if grouped:
                made[f"{stem}.{linear}.adapter.{part}.weight"] = tensor[0].clone() if one_for_all else tensor
            else:
                for e in range(count):
                    made[f"{stem}.local_experts.{e}.{linear}.adapter.{part}.weight"] = tensor[e].clone()
    return made


@pytest.mark.parametrize(("grouped", "one_for_all"), [(False, False), (True, False), (True, True)])
def test_experts_are_folded_one_by_one(tmp_path: Path, grouped: bool, one_for_all: bool):
    count = tiny_config("qwen3_moe").num_experts
    adapter = experts(count, grouped=grouped, one_for_all=one_for_all)
    tensors = megatron_state("qwen3_moe") | adapter
    nbmerge.merge(write(tmp_path / "ckpt", tensors, "qwen3_moe"), tmp_path / "out", lora="fold", lora_alpha=8)
    got = nbmerge.open_checkpoint(tmp_path / "out")
    single = experts(count, grouped=False, one_for_all=one_for_all)
    published = published_state("qwen3_moe")
    from safetensors.torch import load_file

    merged = load_file(tmp_path / "out/model.safetensors")
    assert len(got) == len(merged) == len(published)
    for e in range(count):
        stem = f"decoder.layers.0.mlp.experts.local_experts.{e}"
        for linear, names in (("linear_fc1", ("gate_proj", "up_proj")), ("linear_fc2", ("down_proj",))):
            a, b = (single[f"{stem}.{linear}.adapter.{part}.weight"] for part in ("linear_in", "linear_out"))
            for name, rows in zip(names, b.chunk(len(names)), strict=True):
                whole = f"model.layers.0.mlp.experts.{e}.{name}.weight"
                assert torch.equal(merged[whole], published[whole] + (rows @ a) * 2.0)
    untouched = "model.layers.1.mlp.experts.0.up_proj.weight"
    assert torch.equal(merged[untouched], published[untouched])


def plan_refusal(ckpt: Path, **options: Any) -> str:
    return refusal(nbmerge.PlanError, nbmerge.merge, ckpt, ckpt.parent / "out", **options)


def test_what_is_to_be_done_must_be_said(tmp_path: Path):
    ckpt = write(tmp_path / "ckpt", with_adapter(shared()))
    assert_says(plan_refusal(ckpt), "holds LoRA tensors", "linear_in.weight", "lora='fold'")


@pytest.mark.parametrize("mode", ["fold", "split", "adapter"])
def test_alpha_is_asked_for_by_name(tmp_path: Path, mode: str):
    ckpt = write(tmp_path / "ckpt", with_adapter(shared()))
    assert_says(plan_refusal(ckpt, lora=mode), "nothing says lora_alpha", "--lora_alpha N")


def test_megatron_bridges_run_config_says_alpha(tmp_path: Path):
    made = shared()
    iteration = write_torch_dist(tmp_path / "run/iter_0000010", with_adapter(made))
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("10")
    (iteration / "run_config.yaml").write_text(
        "peft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  dim: 4\n  alpha: 5\n"
    )
    config = write_config(tmp_path / "config", "qwen2")
    nbmerge.merge(tmp_path / "run", tmp_path / "out", lora="fold", hf_model_config_path=config)
    assert_same(saved_bits(tmp_path / "out"), made.folded())
    assert receipt_of(tmp_path / "out")["lora"]["known_from"]["lora_alpha"].endswith("run_config.yaml")
    (iteration / "run_config.yaml").write_text("peft:\n  dim: 8\n  alpha: 5\n")
    said = plan_refusal(tmp_path / "run", lora="fold", hf_model_config_path=config)
    assert_says(said, "r is 8 in the adapter's file and 4 in the tensors", "run_config.yaml")


def test_an_adapter_alone_asks_for_its_base_model(tmp_path: Path):
    ckpt = write(tmp_path / "ckpt", megatron_adapter(shared()))
    assert_says(plan_refusal(ckpt, lora="fold", **ALPHA), "the checkpoint holds the adapter alone", "--base_model DIR")


def test_what_no_rule_takes_is_told(tmp_path: Path):
    odd = {"decoder.layers.0.self_attention.linear_strange.adapter.linear_in.weight": torch.zeros(4, 4)}
    ckpt = write(tmp_path / "ckpt", with_adapter(shared()) | odd)
    assert_says(plan_refusal(ckpt, lora="fold", **ALPHA), "no rule takes the adapter tensor", "linear_strange")


def test_a_model_without_an_adapter_is_told(tmp_path: Path):
    ckpt = write(tmp_path / "ckpt", megatron_state("qwen2"))
    assert_says(plan_refusal(ckpt, lora="fold", **ALPHA), "holds no LoRA tensors")


def test_lost_files_of_verls_adapter_are_told(tmp_path: Path):
    made, ranks = shared(), Ranks(stages=[[1, 1]], tp=2)
    folder = write_verl_adapter(tmp_path / "actor/adapter_checkpoint", megatron_adapter(made), ranks)
    write_config(tmp_path / "actor/huggingface", "qwen2")
    (folder / "mp_rank_01_001_adapter.pt").unlink()
    said = refusal(nbmerge.IncompleteCheckpointError, nbmerge.open_checkpoint, tmp_path / "actor")
    assert_says(said, "1 file of 4 missing", "mp_rank_01_001")
    (folder / "mp_rank_00_001_adapter.pt").write_bytes(b"PK\x03\x04 cut short")
    refusal(nbmerge.CorruptFileError, nbmerge.open_checkpoint, tmp_path / "actor")


def test_a_lost_last_stage_of_verls_adapter_is_told(tmp_path: Path):
    ranks = Ranks(stages=[[1, 1]])
    folder = write_verl_adapter(tmp_path / "adapter_checkpoint", megatron_adapter(shared("qwen3")), ranks)
    layers = tiny_config("qwen3").num_hidden_layers
    write_config(tmp_path / "huggingface", "qwen3", num_hidden_layers=layers + 1)
    said = refusal(nbmerge.IncompleteCheckpointError, nbmerge.open_checkpoint, folder)
    assert_says(said, f"adapters of {layers} layers, and config.json has {layers + 1}")
