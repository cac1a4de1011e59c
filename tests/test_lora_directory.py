"""The directory that peft writes of an adapter alone is folded as peft loads and merges it, bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import nbmerge
from nbmerge.cli import main
from tests.support.adapters import Adapted, adapted, loaded_by_peft, save_adapter_config, write_directory, write_world
from tests.support.messages import assert_says, refusal
from tests.support.models import HAS_CONVERSIONS, save_tiny_model, write_config
from tests.support.results import assert_same, receipt_of, saved_bits
from tests.test_lora_merge import KINDS

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

EXPERTS = {"target_modules": ["q_proj"], "r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def both(path: Path, made: Adapted, dtype: str = "bfloat16") -> tuple[Path, Path]:
    """Its base model's directory and the adapter's."""
    base = save_tiny_model(made.family, path / "base", dtype)
    return base, write_directory(path / "adapter", made)


def folded(path: Path, base: Path, adapter: Path, **options: Any) -> Path:
    nbmerge.merge(adapter, path / "out", lora="fold", base_model=base, **options)
    return path / "out"


@pytest.mark.parametrize("adapter_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fold_is_peft_s_own(tmp_path: Path, kind: str, adapter_dtype: str):
    """An adapter of 16 bits is widened when peft loads it; what was trained whole gets the base model's dtype."""
    base, adapter = both(tmp_path, adapted(dtype=adapter_dtype, **KINDS[kind]))
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2", base, adapter).folded())


@pytest.mark.parametrize("kind", ["linear", "dora", "embedding", "modules_to_save"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_fold_into_other_dtypes_is_peft_s_own(tmp_path: Path, kind: str, dtype: str):
    base, adapter = both(tmp_path, adapted(dtype="bfloat16", **KINDS[kind]), dtype)
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2", base, adapter).folded())


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="experts are fused in memory from transformers 5 on")
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "qwen3_vl_moe"])
def test_adapters_of_fused_experts(tmp_path: Path, family: str):
    base, adapter = both(tmp_path, adapted(family, "bfloat16", **EXPERTS))
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft(family, base, adapter).folded())


@pytest.mark.skipif(not HAS_CONVERSIONS, reason="experts are fused in memory from transformers 5 on")
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_adapters_of_single_experts_are_folded_as_peft_does_into_fused_ones(tmp_path: Path, family: str):
    """As transformers 4 trained them: peft turns them into adapters of the fused parameters."""
    base = save_tiny_model(family, tmp_path / "base", "bfloat16")
    experts = {name: each for name, each in load_file(base / "model.safetensors").items() if ".experts." in name}
    torch.manual_seed(5)
    parts = {
        f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight": torch.randn(shape) / 4
        for name, each in experts.items()
        for part, shape in (("A", (2, each.shape[1])), ("B", (each.shape[0], 2)))
    }
    (tmp_path / "adapter").mkdir()
    save_file(parts, tmp_path / "adapter" / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in experts})
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(content))
    want = loaded_by_peft(family, base, tmp_path / "adapter").folded()
    assert_same(saved_bits(folded(tmp_path, base, tmp_path / "adapter")), want)


def test_a_pickled_adapter(tmp_path: Path):
    made = adapted(dtype="bfloat16")
    base = save_tiny_model("qwen2", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", made, safe_serialization=False)
    assert (adapter / "adapter_model.bin").is_file()
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2", base, adapter).folded())


def test_a_critic_s_head(tmp_path: Path):
    base, adapter = both(tmp_path, adapted("qwen2_value", "bfloat16", task_type="TOKEN_CLS"))
    assert_same(saved_bits(folded(tmp_path, base, adapter)), loaded_by_peft("qwen2_value", base, adapter).folded())


@pytest.mark.parametrize("kind", KINDS)
def test_split_and_adapter_write_what_peft_loads_to_the_same_model(tmp_path: Path, kind: str):
    base, adapter = both(tmp_path, adapted(dtype="bfloat16", **KINDS[kind]))
    want = loaded_by_peft("qwen2", base, adapter).folded()
    nbmerge.merge(adapter, tmp_path / "split", lora="split", base_model=base)
    nbmerge.merge(adapter, tmp_path / "alone", lora="adapter", base_model=base)
    assert_same(loaded_by_peft("qwen2", tmp_path / "split", tmp_path / "split" / "lora_adapter").folded(), want)
    assert_same(loaded_by_peft("qwen2", base, tmp_path / "alone" / "lora_adapter").folded(), want)
    assert_same(saved_bits(tmp_path / "alone" / "lora_adapter"), saved_bits(adapter))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_split_is_folded_to_what_is_folded_at_once(tmp_path: Path, kind: str):
    """Of adapters in float32, which peft trains by default."""
    write_world(tmp_path / "ckpt", made := adapted(**KINDS[kind]))
    save_adapter_config(made, tmp_path / "ckpt")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "split", lora="split")
    out = folded(tmp_path, tmp_path / "split", tmp_path / "split" / "lora_adapter")
    assert_same(saved_bits(out), made.folded())
    message = refusal(nbmerge.PlanError, nbmerge.merge, tmp_path / "split", tmp_path / "x", lora="fold")
    assert_says(message, f"{tmp_path / 'split' / 'lora_adapter'} --base_model {tmp_path / 'split'}")


def test_an_embedding_that_was_saved_with_the_adapter_replaces_the_base_model_s(tmp_path: Path):
    made = adapted(dtype="bfloat16")
    with torch.no_grad():
        made.model.get_input_embeddings().weight.add_(1)
    base = save_tiny_model("qwen2", tmp_path / "base", "bfloat16")
    adapter = write_directory(tmp_path / "adapter", made, save_embedding_layers=True)
    want = loaded_by_peft("qwen2", base, adapter).folded()
    assert want["model.embed_tokens.weight"] != saved_bits(base)["model.embed_tokens.weight"]
    assert_same(saved_bits(folded(tmp_path, base, adapter)), want)
    nbmerge.merge(adapter, tmp_path / "alone", lora="adapter", base_model=base)
    assert_same(saved_bits(tmp_path / "alone" / "lora_adapter"), saved_bits(adapter))


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Directories of a base model and of an adapter, both in float32."""
    return both(tmp_path, adapted(), "float32")


def said(adapter: Path, *, error: type[Exception] = nbmerge.PlanError, **options: Any) -> str:
    """The refusal of a merge, which writes nothing."""
    out = adapter.parent / "out"
    message = refusal(error, nbmerge.merge, adapter, out, **options)
    assert not out.exists()
    return message


def with_file(adapter: Path, **content: Any) -> Path:
    """The directory with other values in adapter_config.json; None removes one."""
    path = adapter / "adapter_config.json"
    values = {**json.loads(path.read_text()), **content}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return adapter


def with_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    return adapter


class TestWhatIsLacking:
    def test_a_base_model_is_asked_for(self, pair: tuple[Path, Path]):
        message = said(pair[1], error=nbmerge.ConfigError, lora="fold")
        assert_says(message, "a LoRA adapter alone, and no base model was given", str(pair[1]), "--base_model DIR")

    def test_one_that_the_adapter_names_is_told_and_not_read(self, pair: tuple[Path, Path]):
        adapter = with_file(pair[1], base_model_name_or_path=str(pair[0]))
        told = f"--base_model {pair[0]} (adapter_config.json names it)"
        assert_says(said(adapter, error=nbmerge.ConfigError, lora="fold"), told)
        assert_says(said(adapter, lora="fold", hf_model_config_path=pair[0]), "weights of 4 adapted layers", told)

    @pytest.mark.parametrize("name", ["x\0y", "n" * 9000, "", 5])
    def test_one_that_no_directory_has_is_not_told(self, pair: tuple[Path, Path], name: object):
        message = said(with_file(pair[1], base_model_name_or_path=name), error=nbmerge.ConfigError, lora="fold")
        assert_says(message, "--base_model DIR")

    def test_a_base_model_that_is_not_there(self, pair: tuple[Path, Path]):
        message = said(pair[1], error=nbmerge.ConfigError, lora="fold", base_model=pair[0] / "no")
        assert_says(message, "there is no directory of the base model", str(pair[0] / "no"))

    def test_a_mode_is_asked_for(self, pair: tuple[Path, Path]):
        assert_says(said(pair[1], base_model=pair[0]), "holds LoRA tensors", "lora='fold'", "--lora fold")

    @pytest.mark.parametrize("alpha", [None, 0])
    @pytest.mark.parametrize("mode", ["fold", "split", "adapter"])
    def test_alpha_is_asked_for(self, pair: tuple[Path, Path], mode: str, alpha: int | None):
        (pair[1].parent / "lora_adapter").mkdir()  # of another adapter: it says nothing of this one
        (pair[1].parent / "lora_adapter" / "adapter_config.json").write_text('{"lora_alpha": 9, "peft_type": "LORA"}')
        message = said(with_file(pair[1], lora_alpha=alpha), lora=mode, base_model=pair[0])
        assert_says(message, "lora_alpha", "--lora_alpha N")

    def test_without_its_file_alpha_is_enough(self, pair: tuple[Path, Path], tmp_path: Path):
        want = loaded_by_peft("qwen2", *pair).folded()
        (pair[1] / "adapter_config.json").unlink()
        assert_same(saved_bits(folded(tmp_path, *pair, lora_alpha=5)), want)


class TestWhatIsWrong:
    def test_a_model_of_another_shape(self, pair: tuple[Path, Path], tmp_path: Path):
        other = save_tiny_model("qwen3_moe", tmp_path / "other")
        assert_says(said(pair[1], lora="fold", base_model=other), "which the model does not have", "--hf_model_config")

    def test_a_base_model_of_another_family_than_the_config(self, pair: tuple[Path, Path], tmp_path: Path):
        config = write_config(tmp_path / "llama", "llama")
        message = said(pair[1], lora="fold", base_model=pair[0], hf_model_config_path=config)
        assert_says(message, "the base model has 6 tensors beyond those of LlamaForCausalLM", "q_proj.bias")

    def test_a_base_model_of_another_name_is_told(self, pair: tuple[Path, Path], tmp_path: Path):
        out = folded(tmp_path, pair[0], with_file(pair[1], base_model_name_or_path="Qwen/Qwen3-8B"))
        assert receipt_of(out)["lora"]["trained_on"] == "Qwen/Qwen3-8B"

    def test_an_adapter_for_a_base_model(self, pair: tuple[Path, Path]):
        message = said(pair[1], lora="fold", base_model=pair[1], hf_model_config_path=pair[0])
        assert_says(message, "the base model's directory holds an adapter")

    def test_a_method_that_is_no_lora(self, pair: tuple[Path, Path]):
        message = said(with_file(pair[1], peft_type="IA3"), lora="fold", base_model=pair[0])
        assert_says(message, "peft_type is 'IA3'")
        with_tensors(with_file(pair[1], peft_type="LORA"), lambda _: {"prompt_embeddings": torch.ones(3)})
        assert_says(said(pair[1], lora="fold", base_model=pair[0]), "holds no LoRA tensors: prompt_embeddings")

    @pytest.mark.parametrize("mode", ["fold", "split", "adapter"])
    @pytest.mark.parametrize("name", ["../../etc/passwd", "<b>.weight", f"{Q_PROJ}.base_layer.scales"])
    def test_tensors_of_no_model(self, pair: tuple[Path, Path], mode: str, name: str):
        adapter = with_tensors(pair[1], lambda held: {**held, name: torch.ones(3, 4)})
        assert_says(said(adapter, lora=mode, base_model=pair[0]), "1 tensor in the adapter that Qwen2ForCausalLM")

    @pytest.mark.parametrize(
        ("part", "told"), [("lora_B", "has lora_A and no lora_B"), ("layers.1", "has nothing for 2 layers")]
    )
    def test_lost_parts(self, pair: tuple[Path, Path], part: str, told: str):
        adapter = with_tensors(pair[1], lambda held: {name: each for name, each in held.items() if part not in name})
        assert_says(said(adapter, lora="fold", base_model=pair[0]), told)

    @pytest.mark.parametrize("size", [-10, 6, 0])
    def test_a_file_that_is_cut_short(self, pair: tuple[Path, Path], size: int):
        path = pair[1] / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        assert_says(said(pair[1], error=nbmerge.CorruptFileError, lora="fold", base_model=pair[0]), str(path))


class TestOthers:
    def test_a_comparison_with_what_it_makes(self, pair: tuple[Path, Path]):
        diff = nbmerge.diff(*pair, lora="fold", base_model=pair[0])
        assert {one.name.rpartition(".")[0].rpartition(".")[2] for one in diff.changed} == {"q_proj", "down_proj"}
        assert_says(refusal(nbmerge.OptionError, nbmerge.diff, *pair), "is a LoRA adapter alone", "--lora fold")
        assert nbmerge.diff(pair[1], pair[1]).is_empty

    def test_the_mean_of_two_is_that_of_the_folded_models(self, pair: tuple[Path, Path], tmp_path: Path):
        out = folded(tmp_path, *pair)
        nbmerge.average([pair[1], pair[1]], tmp_path / "mean", lora="fold", base_model=pair[0])
        assert_same(saved_bits(tmp_path / "mean"), saved_bits(out))
        assert nbmerge.validate(tmp_path / "mean", checkpoint=[pair[1], pair[1]], no_run=True).ok
        message = refusal(nbmerge.ConfigError, nbmerge.average, [pair[1], pair[1]], tmp_path / "x", lora="fold")
        assert_says(message, "--base_model DIR")

    def test_the_magics(self, pair: tuple[Path, Path], shell: InteractiveShell, tmp_path: Path):
        shell.run_cell(f"ckpt = %inspect_ckpt {pair[1]}").raise_error()
        assert shell.user_ns["ckpt"].is_adapter and "a merge needs --base_model" in str(shell.user_ns["ckpt"])
        line = f"%merge_ckpt $ckpt --target_dir made --lora fold --base_model {pair[0]}"
        shell.run_cell(line).raise_error()
        assert_same(saved_bits(tmp_path / "made"), loaded_by_peft("qwen2", *pair).folded())

    def test_the_command_line(self, pair: tuple[Path, Path], tmp_path: Path):
        words = ["merge", "--local_dir", pair[1], "--target_dir", tmp_path / "made"]
        assert main([*map(str, words), "--lora", "fold", "--base_model", str(pair[0])]) == 0
        assert_same(saved_bits(tmp_path / "made"), loaded_by_peft("qwen2", *pair).folded())
        assert main([*map(str, words), "--lora", "fold"]) == 1

    def test_a_tokenizer_beside_it_is_left_alone_and_told(self, pair: tuple[Path, Path]):
        assert nbmerge.open_checkpoint(pair[1]).notes == ()
        (pair[1] / "tokenizer.json").write_text("{}")
        assert nbmerge.open_checkpoint(pair[1]).notes == (
            "left alone, as the base model's are written: tokenizer.json",
        )

    def test_a_run_of_adapters_is_told_with_its_steps(self, pair: tuple[Path, Path], tmp_path: Path):
        run = tmp_path / "run"
        for step in (100, 200):
            shutil.copytree(pair[1], run / f"checkpoint-{step}")
        found = nbmerge.inspect(run)
        assert [(each.step, each.backends, each.is_whole) for each in found] == [
            (100, ("hf",), True), (200, ("hf",), True)
        ]  # fmt: skip

    def test_shards_that_it_lies_beside_are_opened_in_its_place(self, pair: tuple[Path, Path], tmp_path: Path):
        ckpt = write_world(tmp_path / "ckpt", adapted())
        for file in pair[1].iterdir():
            shutil.copy(file, ckpt)
        assert nbmerge.open_checkpoint(ckpt).backend == "fsdp"
        assert nbmerge.open_checkpoint(ckpt, backend="hf").is_adapter
