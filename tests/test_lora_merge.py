"""Adapters are folded, split off and written alone as peft itself does it, bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge.errors import VerificationError
from nbmerge.verification import verify
from tests.support.adapters import Adapted, adapted, save_adapter_config, write_world
from tests.support.models import HAS_CONVERSIONS, save_tiny_model, tiny_model
from tests.support.results import assert_same, bits_of_all, receipt_of, saved_bits

KINDS: dict[str, dict[str, Any]] = {
    "linear": {},
    "all_linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 1}},
    "dora": {"use_dora": True},
    "dora_rslora": {"use_dora": True, "use_rslora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "lora_bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "bias_lora_only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "bias_all": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "modules_to_save_nested": {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
    "modules_to_save_one": {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "model.norm"]},
}

# What only adapter_config.json says.
NOT_IN_NAMES = {"rslora", "dora_rslora", "patterns", "bias_lora_only", "bias_all"}


def merged(made: Adapted, path: Path, **options: Any) -> Path:
    """The merge of its checkpoint, which has peft's own adapter_config.json beside the shards."""
    write_world(path / "ckpt", made, options.pop("state", None))
    save_adapter_config(made, path / "ckpt")
    nbmerge.merge(path / "ckpt", path / "out", **options)
    return path / "out"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_peft_s_own(tmp_path: Path, kind: str, dtype: str):
    made = adapted(dtype=dtype, **KINDS[kind])
    assert_same(saved_bits(merged(made, tmp_path, lora="fold")), made.folded())


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_the_base_model_and_peft_s_own_file(tmp_path: Path, kind: str):
    made = adapted(dtype="bfloat16", **KINDS[kind])
    out = merged(made, tmp_path, lora="split")
    assert_same(saved_bits(out), made.base())
    ours, peft_s = saved_bits(out / "lora_adapter"), made.adapter()
    if kind == "bias_lora_only" and not any(name.endswith(".bias") for name in peft_s):  # up to peft 0.19 it loses them
        biases = [name for name in ours if name.endswith(".base_layer.bias")]
        assert len(biases) == 2
        ours = {name: value for name, value in ours.items() if name not in biases}
    assert_same(ours, peft_s)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_what_was_split(tmp_path: Path, kind: str):
    from peft import PeftModel
    from safetensors.torch import load_file

    made = adapted(**KINDS[kind])
    out = merged(made, tmp_path, lora="split")
    base = copy.deepcopy(tiny_model("qwen2"))  # its rotary buffers are random too, and in no file
    base.load_state_dict(load_file(out / "model.safetensors"))
    loaded = PeftModel.from_pretrained(base, out / "lora_adapter").eval()
    assert torch.equal(made.logits(loaded), made.logits())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NOT_IN_NAMES])
def test_peft_loads_the_adapter_of_tensors_and_alpha_alone(tmp_path: Path, kind: str):
    """Without any file that says more, the names and shapes give the config."""
    from peft import PeftModel

    made = adapted(**KINDS[kind])
    write_world(tmp_path / "ckpt", made)
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="adapter", lora_alpha=5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lora_adapter", "nbmerge_receipt.json"]
    base = adapted(**KINDS[kind]).model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "lora_adapter").eval()
    assert torch.equal(made.logits(loaded), made.logits())


@pytest.mark.parametrize("lora", ["fold", "split"])
@pytest.mark.parametrize("kind", ["linear", "dora", "embedding", "lora_bias", "modules_to_save"])
def test_an_adapter_without_its_model_takes_it_from_the_base_model(tmp_path: Path, kind: str, lora: str):
    made = adapted(dtype="bfloat16", **KINDS[kind])
    base = str(save_tiny_model("qwen2", tmp_path / "base", "bfloat16"))
    out = merged(made, tmp_path, lora=lora, base_model=base, state=made.adapter_state())
    assert_same(saved_bits(out), made.folded() if lora == "fold" else made.base())
    if lora == "split":
        assert_same(saved_bits(out / "lora_adapter"), made.adapter())


@pytest.mark.parametrize("lora", ["fold", "split", "adapter"])
def test_a_checkpoint_of_peft_s_own_adapter_names(tmp_path: Path, lora: str):
    """get_peft_model_state_dict leaves the adapter's name out, and `modules_to_save` too."""
    from peft import get_peft_model_state_dict

    made = adapted(**KINDS["modules_to_save"])
    base = str(save_tiny_model("qwen2", tmp_path / "base"))
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(made.model).items()}
    out = merged(made, tmp_path, lora=lora, state=state, **({} if lora == "adapter" else {"base_model": base}))
    if lora != "adapter":
        assert_same(saved_bits(out), made.folded() if lora == "fold" else made.base())
    if lora != "fold":
        assert_same(saved_bits(out / "lora_adapter"), made.adapter())


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="experts are fused in memory from transformers 5 on")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_adapters_of_fused_experts_are_folded_before_they_are_renamed(tmp_path: Path, family: str, dtype: str):
    made = adapted(
        family, dtype, target_modules=["q_proj"], r=2, target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    assert_same(saved_bits(merged(made, tmp_path, lora="fold")), made.folded())


@pytest.mark.parametrize(
    "config", [{"modules_to_save": ["norm"]}, {"bias": "lora_only"}, {"bias": "all"}], ids=["norms", "biases", "all"]
)
def test_peft_s_own_file_without_a_config_loses_nothing(tmp_path: Path, config: dict[str, Any]):
    """Modules that are whole were trained whole, and biases beside an adapter were trained."""
    from peft import PeftModel, get_peft_model_state_dict

    made = adapted(target_modules=["q_proj"], **config)
    with torch.no_grad():
        for name, tensor in made.model.named_parameters():
            if name.endswith(".bias") and tensor.requires_grad:
                tensor.add_(1)
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(made.model).items()}
    if config.get("bias") == "lora_only" and not any(name.endswith(".bias") for name in state):
        pytest.skip("this peft (up to 0.19) loses the biases of bias='lora_only' itself")
    write_world(tmp_path / "ckpt", made, state)
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="adapter", lora_alpha=5)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model("qwen2")), tmp_path / "out" / "lora_adapter").eval()
    assert_same(Adapted("qwen2", loaded).folded(), made.folded())


def test_biases_do_not_replace_those_of_a_module_that_was_trained_whole(tmp_path: Path):
    made = adapted(target_modules=["q_proj"], bias="all", modules_to_save=["k_proj"])
    out = merged(made, tmp_path, lora="adapter")
    name = "base_model.model.model.layers.0.self_attn.k_proj"
    want = bits_of_all({f"{name}.bias": made.state()[f"{name}.modules_to_save.default.bias"]})
    assert saved_bits(out / "lora_adapter")[f"{name}.bias"] == want[f"{name}.bias"]


def test_a_matrix_that_target_parameters_names_is_rounded_before_it_is_added(tmp_path: Path):
    made = adapted("qwen2", "bfloat16", target_modules=[], target_parameters=["q_proj.weight"])
    for name, tensor in made.model.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.float()
    assert_same(saved_bits(merged(made, tmp_path, lora="fold")), made.folded())


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="experts are fused in memory from transformers 5 on")
def test_patterns_are_of_the_parameter_s_own_name(tmp_path: Path):
    made = adapted(
        "qwen3_moe", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        alpha_pattern={"experts.gate_up_proj": 7, "mlp.experts": 9}, rank_pattern={"experts.down_proj": 2},
    )  # fmt: skip
    out = merged(made, tmp_path, lora="fold")
    assert_same(saved_bits(out), made.folded())
    recorded = receipt_of(out)["lora"]
    assert recorded["rank_pattern"] == {f"model.layers.{i}.mlp.experts.down_proj": 2 for i in range(2)}
    assert recorded["alpha_pattern"] == {f"model.layers.{i}.mlp.experts.gate_up_proj": 7 for i in range(2)}


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="experts are fused in memory from transformers 5 on")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_peft_loads_adapters_of_fused_experts(tmp_path: Path, family: str):
    from peft import PeftModel

    made = adapted(family, target_modules=["q_proj"], r=2, target_parameters=["experts.gate_up_proj"])
    write_world(tmp_path / "ckpt", made)
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="adapter", lora_alpha=5)
    assert_same(saved_bits(tmp_path / "out" / "lora_adapter"), made.adapter())
    want = made.folded()
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model(family)), tmp_path / "out" / "lora_adapter")
    assert_same(Adapted(family, loaded).folded(), want)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_transformers_conv1d_is_folded_turned(tmp_path: Path, square: bool, use_dora: bool):
    """GPT-2 keeps its weights [in, out]; that of attention's output is square, so that no shape tells."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=37, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False
    )
    torch.manual_seed(3)
    target = "attn.c_proj" if square else "c_fc"
    made = adapted(
        base=transformers.GPT2LMHeadModel(config), target_modules=[target], fan_in_fan_out=True, use_dora=use_dora
    )
    write_world(tmp_path / "ckpt", made)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "ckpt" / "huggingface")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="fold", lora_alpha=5)
    assert_same(saved_bits(tmp_path / "out"), made.folded())


def test_vision_convolutions_are_folded(tmp_path: Path):
    made = adapted("qwen2_5_vl", target_modules=["proj", "q_proj"])
    assert any("patch_embed.proj.lora_A" in name for name in made.state())
    assert_same(saved_bits(merged(made, tmp_path, lora="fold")), made.folded())


def test_fold_in_fp32_rounds_once(tmp_path: Path):
    made = adapted(dtype="bfloat16", target_modules=["q_proj"])
    out = merged(made, tmp_path, lora="fold", fold_precision="fp32")
    state, name = made.state(), "model.layers.0.self_attn.q_proj"
    a, b, weight = (
        state[f"base_model.model.{name}.{part}.weight"].float()
        for part in ("lora_A.default", "lora_B.default", "base_layer")
    )
    want = (weight + (b @ a) * (5 / 3)).bfloat16()
    from safetensors.torch import load_file

    assert torch.equal(load_file(out / "model.safetensors")[f"{name}.weight"], want)
    assert receipt_of(out)["casts"] == []


def test_a_fold_and_a_cast(tmp_path: Path):
    made = adapted(dtype="float32")
    out = merged(made, tmp_path, lora="fold", dtype="bfloat16")
    want = made.model.merge_and_unload().bfloat16()
    want.save_pretrained(tmp_path / "want")
    assert_same(saved_bits(out), saved_bits(tmp_path / "want"))


def test_large_matrices_are_folded_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from nbmerge import planning
    from nbmerge.naming.lora import fold

    monkeypatch.setattr(fold, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(planning, "_BUFFER", 1024)
    for kind in ("linear", "embedding", "head"):
        made = adapted(dtype="bfloat16", **KINDS[kind])
        out = merged(made, tmp_path / kind, lora="fold")
        assert_same(saved_bits(out), made.folded())


def test_the_adapter_config_names_the_base_model_and_the_task(tmp_path: Path):
    made = adapted()
    write_world(tmp_path / "ckpt", made)
    (tmp_path / "ckpt" / "lora_train_meta.json").write_text('{"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}')
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="split")
    content = json.loads((tmp_path / "out" / "lora_adapter" / "adapter_config.json").read_text())
    assert (content["r"], content["lora_alpha"], content["task_type"]) == (3, 5, "CAUSAL_LM")
    assert content["target_modules"] == ["down_proj", "q_proj"]
    assert content["peft_type"] == "LORA" and content["inference_mode"] is True


def test_a_critic_keeps_its_trained_head(tmp_path: Path):
    made = adapted("qwen2_value", task_type="TOKEN_CLS")
    assert any("score.modules_to_save" in name for name in made.state())
    assert_same(saved_bits(merged(made, tmp_path, lora="fold", is_value_model=True)), made.folded())


def test_the_tied_model_stays_tied(tmp_path: Path):
    made = adapted("qwen2_tied")
    out = merged(made, tmp_path, lora="fold")
    assert_same(saved_bits(out), made.folded())
    assert "lm_head.weight" not in saved_bits(out) and tiny_model("qwen2_tied").config.tie_word_embeddings


def test_a_comparison_folds_the_adapter_of_the_side_that_has_one(tmp_path: Path):
    made = adapted()
    write_world(tmp_path / "ckpt", made)
    base = save_tiny_model("qwen2", tmp_path / "base")
    changed = nbmerge.diff(base, tmp_path / "ckpt", lora="fold", lora_alpha=5).changed
    assert {one.name.rpartition(".")[0].rpartition(".")[2] for one in changed} == {"q_proj", "down_proj"}
    assert nbmerge.diff(base, tmp_path / "ckpt", lora="split", lora_alpha=5).is_empty
    with pytest.raises(nbmerge.PlanError, match="--lora fold"):
        nbmerge.diff(base, tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-8]), "its header describes"),
        (lambda path: path.unlink(), "was not written"),
        (lambda path: path.write_bytes(path.with_name("other").read_bytes()), "other tensors than were planned"),
    ],
)
def test_a_damaged_adapter_does_not_verify(tmp_path: Path, damage: Callable[[Path], object], what: str):
    out = merged(adapted(), tmp_path, lora="split")
    plan = nbmerge.plan_merge(tmp_path / "ckpt", lora="split")
    assert verify(plan, out).adapter > 0
    weights = out / "lora_adapter" / "adapter_model.safetensors"
    shutil.copy(out / "model.safetensors", weights.with_name("other"))
    damage(weights)
    with pytest.raises(VerificationError) as refused:
        verify(plan, out)
    (problem,) = refused.value.problems
    assert what in problem.what and str(out) in problem.where
