"""torchtitan's names and rotary layout become Hugging Face's, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nbmerge
from nbmerge import PlanError, open_checkpoint
from nbmerge import expressions as ex
from nbmerge.loaders.dcp.roots import has_torchtitan_names
from nbmerge.naming.torchtitan import half_by_half
from tests.support.dcp import write_dcp
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, published_state, tiny_config, write_config
from tests.support.results import assert_same, bits_of, bits_of_all, saved_bits

State = dict[str, torch.Tensor]

PARTS = {
    "self_attn.q_proj": "attention.qkv_linear.wq", "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv", "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """torchtitan's `_reverse_permute`: what its loader of Hugging Face models does to query and key weights."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def titan_state(name: str, *, rotary: bool = True) -> State:
    """A model's tensors as torchtitan has them in memory."""
    config = tiny_config(name)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    state = {}
    for key, tensor in memory_state(name).items():
        match = re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", key)
        if match is None:
            state[key.removeprefix("model.").replace("embed_tokens", "tok_embeddings")] = tensor
            continue
        count = heads.get(match[2].rpartition(".")[2])
        state[f"{match[1]}.{PARTS[match[2]]}.weight"] = pairs(tensor, count) if count and rotary else tensor
    return state


def fused(state: State) -> State:
    """Query, key and value in one tensor, as FusedQKVLinear has them: by groups of query heads."""
    config, made = tiny_config("llama"), dict(state)
    n_kv, size = config.num_key_value_heads, config.head_dim
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}.attention.qkv_linear."
        q, k, v = (made.pop(f"{prefix}{part}.weight") for part in ("wq", "wk", "wv"))
        parts = [tensor.reshape(n_kv, -1, size, q.shape[1]) for tensor in (q, k, v)]
        made[f"{prefix}wqkv.weight"] = torch.cat(parts, dim=1).reshape(-1, q.shape[1])
    return made


def older(state: State) -> State:
    """The names before 0.3: no `qkv_linear`, `output` for the head, and the saved table of rotations."""
    names = {name: name.replace("qkv_linear.", "").replace("lm_head", "output") for name in state}
    return {names[name]: tensor for name, tensor in state.items()} | {
        "freqs_cis": torch.ones(64, 2).to(torch.complex64)
    }


def merged(tmp_path: Path, state: State, name: str, root: tuple[str, ...] = ()) -> dict[str, object]:
    run = write_dcp(tmp_path / "step-7", state, (3,), root=root, beside={"train_state": {"step": torch.tensor(7)}})
    write_config(tmp_path / "config", name)
    checkpoint = open_checkpoint(run)
    assert checkpoint.names == "torchtitan"
    assert set(checkpoint) == set(state)
    nbmerge.merge(run, tmp_path / "out", hf_model_config_path=tmp_path / "config", progress=False)
    assert nbmerge.validate(tmp_path / "out", checkpoint=run, progress=False).ok
    return saved_bits(tmp_path / "out")


@pytest.mark.parametrize("form", [dict, fused, older])
@pytest.mark.parametrize("root", [(), ("model",)])
def test_a_llama_in_every_form(tmp_path: Path, form: Callable[[State], State], root: tuple[str, ...]):
    assert_same(merged(tmp_path, form(titan_state("llama")), "llama", root), bits_of_all(published_state("llama")))


def test_the_table_of_rotations_is_dropped_with_a_word(tmp_path: Path):
    run = write_dcp(tmp_path / "run", older(titan_state("llama")))
    write_config(run, "llama")
    plan = nbmerge.plan_merge(run)
    assert [drop.name for drop in plan.drops] == ["freqs_cis"]
    assert plan.dialect == "torchtitan (llama)"


def test_a_qwen3_keeps_its_rows(tmp_path: Path):
    state = titan_state("qwen3", rotary=False)
    assert_same(merged(tmp_path, state, "qwen3"), bits_of_all(published_state("qwen3")))


def test_a_tied_model(tmp_path: Path):
    """Both names are saved; only the table of the embeddings is written."""
    state = titan_state("llama")
    state["lm_head.weight"] = state["tok_embeddings.weight"]
    run = write_dcp(tmp_path / "run", state)
    write_config(run, "llama", tie_word_embeddings=True)
    nbmerge.merge(run, tmp_path / "out", progress=False)
    want = {name: tensor for name, tensor in published_state("llama").items() if name != "lm_head.weight"}
    assert_same(saved_bits(tmp_path / "out"), bits_of_all(want))


def test_wrappers_are_taken_off(tmp_path: Path):
    state = {re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name): t for name, t in titan_state("llama").items()}
    assert_same(merged(tmp_path, state, "llama"), bits_of_all(published_state("llama")))


def test_no_bytes_go_through_memory_to_be_turned(tmp_path: Path):
    run = write_dcp(tmp_path / "run", fused(titan_state("llama")))
    write_config(run, "llama")
    plan = nbmerge.plan_merge(run)
    assert plan.execution.computed_bytes == 0
    assert all(ex.is_copy(tensor.expr) for tensor in plan.tensors.values())


class TestProblems:
    def problems(self, directory: Path, state: State, name: str = "llama", **changes: object) -> str:
        run = write_dcp(directory / "run", state)
        write_config(run, name, **changes)
        return refusal(PlanError, nbmerge.merge, run, directory / "out", progress=False)

    def test_a_family_without_a_table(self, tmp_path: Path):
        message = self.problems(tmp_path, titan_state("llama"), "mixtral")
        assert_says(message, "torchtitan's names", "'mixtral'", "llama, qwen3", "fix:")

    def test_a_name_that_no_table_has(self, tmp_path: Path):
        message = self.problems(tmp_path, titan_state("llama") | {"layers.0.moe.router.gate.weight": torch.ones(2, 16)})
        assert_says(message, "layers.0.moe.router.gate.weight", "[2, 16]")

    def test_one_parameter_under_two_names(self, tmp_path: Path):
        state = titan_state("llama")
        message = self.problems(tmp_path, state | {"output.weight": state["lm_head.weight"]})
        assert_says(message, "output.weight", "both become lm_head.weight")

    def test_a_missing_tensor(self, tmp_path: Path):
        state = titan_state("llama")
        del state["layers.1.feed_forward.w2.weight"]
        assert_says(self.problems(tmp_path, state), "model.layers.1.mlp.down_proj.weight")

    @pytest.mark.parametrize("form", [dict, fused])
    def test_another_number_of_heads(self, tmp_path: Path, form: Callable[[State], State]):
        message = self.problems(tmp_path, form(titan_state("llama")), num_key_value_heads=4)
        assert_says(message, "[32, 16]" if form is fused else "[8, 16]")


def test_names_of_torchtitan_are_told_from_hugging_faces():
    assert has_torchtitan_names(titan_state("llama"))
    assert has_torchtitan_names(["layers.3.attention.wq.weight"])
    assert not has_torchtitan_names(memory_state("llama"))
    assert not has_torchtitan_names(["layers.0.self_attn.q_proj.weight", "norm.weight", "output.weight"])


@given(heads=st.integers(1, 5), half=st.integers(1, 4), columns=st.integers(1, 4))
def test_halves_are_the_inverse_of_pairs(tmp_path_factory, heads: int, half: int, columns: int):
    weight = torch.randn(heads * 2 * half, columns)
    path = tmp_path_factory.mktemp("w") / "bytes"
    path.write_bytes(pairs(weight, heads).numpy().tobytes())
    from nbmerge.dtypes import BY_NAME

    stored = ex.Stored(str(path), 0, tuple(weight.shape), (columns, 1), BY_NAME["float32"])
    assert_same({"w": bits_of(half_by_half(stored, 2 * half))}, bits_of_all({"w": weight}))
