"""What is wrong with an adapter is told before anything is written; what is not known is asked for by option name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import nbmerge
from nbmerge import OptionError, PlanError
from nbmerge.naming.lora.keys import saved_name, shortest_saved, shortest_targets, take_apart
from nbmerge.options import MergeOptions
from nbmerge.plan import MergePlan
from tests.support.adapters import PREFIX, adapted, save_adapter_config, write_world
from tests.support.megatron_models import megatron_state, refused_megatron
from tests.support.messages import assert_says, refusal
from tests.support.models import save_tiny_model, write_config, write_model_world
from tests.support.results import assert_same, receipt_of, saved_bits

Q_PROJ = "model.layers.0.self_attn.q_proj"
MODES = ("split", "fold", "adapter")


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A whole FSDP checkpoint of a model with an adapter of rank 3 on q_proj and down_proj. No file says alpha."""
    return write_world(tmp_path / "ckpt", adapted())


def with_meta(directory: Path, **content: Any) -> Path:
    (directory / "lora_train_meta.json").write_text(json.dumps(content))
    return directory


def with_config(directory: Path, **content: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **content}))
    return directory


def refused(directory: Path, **options: Any) -> str:
    """The refusal of a merge, which writes nothing."""
    out = directory.parent / "out"
    message = refusal(PlanError, nbmerge.merge, directory, out, **options)
    assert not out.exists()
    return message


def plan(directory: Path, **options: Any) -> MergePlan:
    made = nbmerge.plan_merge(directory, **options)
    made.raise_if_problems()
    return made


class TestAlpha:
    @pytest.mark.parametrize("mode", MODES)
    def test_that_nothing_says_is_asked_for(self, ckpt: Path, mode: str):
        assert_says(refused(ckpt, lora=mode), "nothing says lora_alpha", str(ckpt), "--lora_alpha N", "--lora_config")

    @pytest.mark.parametrize("alpha", [0, -1, "16", None, True, float("inf")])
    def test_that_makes_no_sense_is_asked_for(self, ckpt: Path, alpha: object):
        message = refused(with_meta(ckpt, r=3, lora_alpha=alpha, task_type="CAUSAL_LM"), lora="fold")
        assert_says(message, "lora_alpha", "--lora_alpha N")

    def test_zero_is_named_with_its_file(self, ckpt: Path):
        message = refused(with_meta(ckpt, r=3, lora_alpha=0), lora="split")
        assert_says(message, "lora_alpha is 0", str(ckpt / "lora_train_meta.json"), "changes nothing", "--lora_alpha N")

    def test_of_the_option_holds_against_the_file_and_both_are_recorded(self, ckpt: Path, tmp_path: Path):
        nbmerge.merge(with_meta(ckpt, r=3, lora_alpha=0), tmp_path / "out", lora="fold", lora_alpha=5)
        recorded = receipt_of(tmp_path / "out")["lora"]
        assert recorded["alpha"] == 5 and recorded["scale"] == 5 / 3
        assert recorded["known_from"]["lora_alpha"] == (
            f"the option lora_alpha; {ckpt / 'lora_train_meta.json'} says 0"
        )
        assert_same(saved_bits(tmp_path / "out"), adapted().folded())

    @pytest.mark.parametrize("place", [".", "lora_adapter", "../lora_adapter", "huggingface"])
    def test_is_found_in_and_beside_the_checkpoint(self, ckpt: Path, place: str):
        file = with_config(ckpt / place, r=3, lora_alpha=7) / "adapter_config.json"
        facts = plan(ckpt, lora="fold").lora
        assert facts is not None and facts.alpha == 7
        assert Path(facts.origins["lora_alpha"]).resolve() == file.resolve()

    @pytest.mark.parametrize("as_directory", [True, False])
    @pytest.mark.parametrize("name", ["adapter_config.json", "lora_train_meta.json"])
    def test_is_read_from_lora_config(self, ckpt: Path, tmp_path: Path, name: str, as_directory: bool):
        with_meta(ckpt, r=3, lora_alpha=99)
        (tmp_path / "elsewhere").mkdir()
        file = tmp_path / "elsewhere" / name
        file.write_text('{"r": 3, "lora_alpha": 6, "peft_type": "LORA"}')
        facts = plan(ckpt, lora="fold", lora_config=file.parent if as_directory else file).lora
        assert facts is not None and (facts.alpha, facts.origins["lora_alpha"]) == (6, str(file))

    def test_of_a_file_that_is_not_there_is_an_option_error(self, ckpt: Path, tmp_path: Path):
        message = refusal(OptionError, nbmerge.merge, ckpt, tmp_path / "out", lora="fold", lora_config=tmp_path / "no")
        assert_says(message, "lora_config names no file", str(tmp_path / "no"), "adapter_config.json")

    @pytest.mark.parametrize("options", [{"lora_alpha": 3}, {"lora_config": "x"}, {"fold_precision": "fp32"}])
    def test_and_the_other_options_need_a_mode(self, options: dict[str, Any]):
        assert_says(refusal(OptionError, MergeOptions, **options), f"{next(iter(options))} without lora", "fold")

    @pytest.mark.parametrize("alpha", [0, -2.0, float("nan"), float("inf"), True])
    def test_of_the_option_is_a_number_above_0(self, alpha: float):
        assert_says(refusal(OptionError, MergeOptions, lora="fold", lora_alpha=alpha), "lora_alpha", "above 0")

    def test_fold_precision_is_of_a_fold(self):
        message = refusal(OptionError, MergeOptions, lora="split", fold_precision="fp32")
        assert_says(message, "fold_precision with lora='split'")


class TestFiles:
    """What adapter_config.json and its like hold is checked once, and all that is wrong in it is told."""

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"peft_type": "ADALORA"}, "peft_type is 'ADALORA': the adapter is no LoRA"),
            ({"rank_pattern": ["q_proj"]}, "rank_pattern is ['q_proj']"),
            ({"rank_pattern": {"(": 3}}, "rank_pattern has '('"),
            ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern of 'q_proj' is 'x'"),
            ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern of 'q_proj' is nan"),
            ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern of 'q_proj' is None"),
            ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
            ({"r": "3"}, "r is '3'"),
            ({"use_rslora": "no"}, "use_rslora is 'no'"),
            ({"bias": "weights"}, "bias is 'weights'"),
            ({"target_modules": "("}, "target_modules is '('"),
            ({"modules_to_save": "score"}, "modules_to_save is 'score'"),
        ],
    )
    def test_a_value_that_makes_no_sense_is_told_with_its_file(self, ckpt: Path, content: dict[str, Any], said: str):
        message = refused(with_config(ckpt, **{"lora_alpha": 5, **content}), lora="fold")
        assert_says(message, said, str(ckpt / "adapter_config.json"), "fix: ")

    def test_every_wrong_value_is_told(self, ckpt: Path):
        message = refused(with_config(ckpt, r=True, bias=5, alpha_pattern={"(": 0}, lora_alpha=-1), lora="split")
        assert_says(message, "r is True", "bias is 5", "alpha_pattern has '('", "alpha_pattern of '(' is 0", "is -1")

    def test_zeros_of_verl_are_unknown_beside_real_values(self, ckpt: Path):
        with_config(ckpt, r=3, lora_alpha=5)
        facts = plan(with_meta(ckpt, r=0, lora_alpha=0), lora="fold").lora
        assert facts is not None and (facts.r, facts.alpha) == (3, 5)

    def test_a_rank_of_zero_alone_is_that_of_the_tensors(self, ckpt: Path):
        facts = plan(with_meta(ckpt, r=0), lora="adapter", lora_alpha=5).lora
        assert facts is not None and (facts.r, facts.origins["r"]) == (3, "the tensors")


class TestContradictions:
    def test_rank_of_the_file_and_of_the_tensors(self, ckpt: Path):
        message = refused(with_meta(ckpt, r=8, lora_alpha=16), lora="fold")
        assert_says(message, "r is 8", "3 in the tensors of 4 layers", "lora_train_meta.json", "--lora_config FILE")

    def test_a_rank_pattern_is_no_contradiction(self, tmp_path: Path):
        made = adapted(rank_pattern={"down_proj": 2})
        write_world(tmp_path / "ckpt", made)
        facts = plan(save_adapter_config(made, tmp_path / "ckpt"), lora="fold").lora
        assert facts is not None and facts.r == 3
        assert facts.ranks == {f"model.layers.{i}.mlp.down_proj": 2 for i in range(2)}

    def test_two_files_of_two_runs(self, ckpt: Path):
        with_config(ckpt / "lora_adapter", r=3, lora_alpha=5)
        message = refused(with_meta(ckpt, r=3, lora_alpha=16), lora="fold")
        assert_says(message, "lora_alpha is 5 in one file", "16 in another", "--lora_config FILE")

    @pytest.mark.parametrize("said", [True, False])
    def test_dora_that_the_tensors_have_or_lack(self, tmp_path: Path, said: bool):
        write_world(tmp_path / "ckpt", adapted(use_dora=not said))
        message = refused(with_config(tmp_path / "ckpt", r=3, lora_alpha=5, use_dora=said), lora="fold")
        assert_says(message, f"use_dora is {said}", "lora_magnitude_vector", "adapter_config.json")

    def test_all_that_is_wrong_is_told(self, tmp_path: Path):
        state = adapted().state()
        del state[f"{PREFIX}{Q_PROJ}.lora_B.default.weight"]
        write_world(tmp_path / "ckpt", adapted(), state)
        message = refused(with_meta(tmp_path / "ckpt", r=8, lora_alpha=0), lora="fold")
        assert_says(message, "lora_alpha is 0", "no lora_B", "r is 8")


class TestTensors:
    @pytest.mark.parametrize("part", ["lora_A", "lora_B"])
    def test_half_of_an_adapter_is_told(self, tmp_path: Path, part: str):
        state = adapted().state()
        del state[f"{PREFIX}{Q_PROJ}.{part}.default.weight"]
        write_world(tmp_path / "ckpt", adapted(), state)
        assert_says(refused(tmp_path / "ckpt", lora="fold", lora_alpha=5), Q_PROJ, f"no {part}", "save the adapter")

    def test_of_another_shape_are_told_with_both(self, tmp_path: Path):
        state = adapted().state()
        state[f"{PREFIX}{Q_PROJ}.lora_A.default.weight"] = torch.zeros(3, 15)
        write_world(tmp_path / "ckpt", adapted(), state)
        message = refused(tmp_path / "ckpt", lora="fold", lora_alpha=5)
        assert_says(message, "A [3, 15] and B [16, 3]", f"{Q_PROJ}.weight [16, 16]", "--hf_model_config_path")

    def test_of_a_module_that_the_model_lacks_are_told(self, tmp_path: Path):
        state = {
            **adapted().state(),
            f"{PREFIX}model.layers.9.x.lora_A.default.weight": torch.zeros(3, 4),
            f"{PREFIX}model.layers.9.x.lora_B.default.weight": torch.zeros(4, 3),
        }
        write_world(tmp_path / "ckpt", adapted(), state)
        message = refused(tmp_path / "ckpt", lora="fold", lora_alpha=5)
        assert_says(message, "model.layers.9.x", "which the model does not have")

    @pytest.mark.parametrize("prefix", ["_fsdp_wrapped_module.", "module._orig_mod.", "_forward_module."])
    def test_under_the_prefix_of_a_wrapper(self, tmp_path: Path, prefix: str):
        made = adapted()
        write_world(tmp_path / "ckpt", made, {prefix + name: tensor for name, tensor in made.state().items()})
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="split", lora_alpha=5)
        assert_same(saved_bits(tmp_path / "out"), made.base())
        assert_same(saved_bits(tmp_path / "out" / "lora_adapter"), made.adapter())

    @pytest.mark.parametrize("mode", MODES)
    def test_two_for_one_part_are_told_with_both_names(self, tmp_path: Path, mode: str):
        name = f"{PREFIX}{Q_PROJ}.lora_A"
        write_world(tmp_path / "ckpt", adapted(), {**adapted().state(), f"{name}.weight": torch.zeros(3, 16)})
        message = refused(tmp_path / "ckpt", lora=mode, lora_alpha=5)
        assert_says(message, f"{name}.weight", f"{name}.default.weight", "are the same part")

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("end", ["lora_E.default", "lora_C.default.weight", "lora_A.default.bias"])
    def test_of_no_known_part_are_told(self, tmp_path: Path, end: str, mode: str):
        write_world(tmp_path / "ckpt", adapted(), {**adapted().state(), f"{PREFIX}{Q_PROJ}.{end}": torch.zeros(3, 1)})
        message = refused(tmp_path / "ckpt", lora=mode, lora_alpha=5)
        assert_says(message, "1 adapter tensor of a kind that is not read", f"{Q_PROJ}.{end}")

    @pytest.mark.parametrize("mode", MODES)
    def test_of_a_whole_layer_that_is_lost_are_told(self, tmp_path: Path, mode: str):
        state = {name: tensor for name, tensor in adapted().adapter_state().items() if Q_PROJ not in name}
        write_world(tmp_path / "ckpt", adapted(), state)
        with_config(tmp_path / "ckpt", r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
        message = refused(tmp_path / "ckpt", lora=mode)
        assert_says(message, f"nothing for 1 layer that target_modules selects: {Q_PROJ}", "save the adapter whole")

    def test_beside_an_adapter_alone_that_would_be_lost_are_told(self, tmp_path: Path):
        stray = f"{PREFIX}model.layers.0.self_attn.k_proj.weight"  # its bias is not here
        write_world(tmp_path / "ckpt", adapted(), {**adapted().adapter_state(), stray: torch.zeros(8, 16)})
        message = refused(tmp_path / "ckpt", lora="adapter", lora_alpha=5)
        assert_says(message, "1 tensor beside the adapter would be in no file", "0.self_attn.k_proj.weight")

    def test_of_single_tokens_are_refused(self, tmp_path: Path):
        made = adapted(trainable_token_indices=[1, 2])
        write_world(tmp_path / "ckpt", made)
        message = refused(tmp_path / "ckpt", lora="fold", lora_alpha=5)
        assert_says(message, "trains single tokens", "trainable_token_indices", "merge_and_unload")

    def test_a_kind_of_lora_that_is_not_read_is_refused(self, ckpt: Path):
        message = refused(with_config(ckpt, r=3, lora_alpha=5, use_qalora=True), lora="fold")
        assert_says(message, "use_qalora", "adapter_config.json")


class TestAdapters:
    def two(self, names: tuple[str, str]) -> dict[str, torch.Tensor]:
        state = adapted().state()
        found = {name: tensor for name, tensor in state.items() if ".default." not in name}
        for number, adapter in enumerate(names, 1):
            for name, tensor in state.items():
                if ".default." in name:
                    found[name.replace(".default.", f".{adapter}.")] = tensor * number
        return found

    def test_the_default_one_is_taken_and_the_other_recorded(self, tmp_path: Path):
        write_world(tmp_path / "ckpt", adapted(), self.two(("default", "reference")))
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="fold", lora_alpha=5)
        assert_same(saved_bits(tmp_path / "out"), adapted().folded())
        drops = receipt_of(tmp_path / "out")["drops"]
        assert len(drops) == 4 and all("'reference'; 'default' is taken" in drop["reason"] for drop in drops)

    def test_two_of_which_none_is_the_default_are_refused(self, tmp_path: Path):
        write_world(tmp_path / "ckpt", adapted(), self.two(("actor", "reference")))
        message = refused(tmp_path / "ckpt", lora="fold", lora_alpha=5)
        assert_says(message, "holds 2 adapters", "actor", "reference", "'default' is taken")

    def test_a_single_one_may_have_any_name(self, tmp_path: Path):
        made = adapted()
        state = {name.replace(".default.", ".actor."): tensor for name, tensor in made.state().items()}
        write_world(tmp_path / "ckpt", made, state)
        nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="split", lora_alpha=5)
        assert_same(saved_bits(tmp_path / "out" / "lora_adapter"), made.adapter())
        assert receipt_of(tmp_path / "out")["lora"]["adapter"] == "actor"


class TestModes:
    def test_without_one_the_three_are_named(self, ckpt: Path):
        assert_says(refused(ckpt), "LoRA tensors", "lora='fold'", "'split'", "'adapter'", "--lora fold")

    @pytest.mark.parametrize("mode", MODES)
    def test_without_an_adapter_are_refused(self, tmp_path: Path, mode: str):
        write_model_world(tmp_path / "ckpt", "qwen2")
        assert_says(refused(tmp_path / "ckpt", lora=mode, lora_alpha=5), "holds no LoRA tensors", "leave lora out")

    @pytest.mark.parametrize("mode", MODES)
    def test_half_an_adapter_of_megatron_is_told(self, tmp_path: Path, mode: str):
        half = {"decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight": torch.zeros(2, 16)}
        message = refused_megatron(tmp_path, {**megatron_state("qwen2"), **half}, "qwen2", lora=mode, lora_alpha=5)
        assert_says(message, "model.layers.0.self_attn.q_proj has lora_A and no lora_B")

    @pytest.mark.parametrize("mode", ["split", "fold"])
    def test_that_need_the_model_ask_for_it(self, tmp_path: Path, mode: str):
        write_world(tmp_path / "ckpt", adapted(), adapted().adapter_state())
        message = refused(tmp_path / "ckpt", lora=mode, lora_alpha=5)
        assert_says(message, "weights of 4 adapted layers are not here", "--base_model DIR", "--lora adapter")

    def test_another_base_model_is_told(self, tmp_path: Path):
        write_world(tmp_path / "ckpt", adapted(), adapted().adapter_state())
        base = save_tiny_model("mistral", tmp_path / "base")
        message = refused(tmp_path / "ckpt", lora="fold", lora_alpha=5, base_model=str(base))
        assert_says(message, "do not fit", "--base_model DIR")

    def test_a_base_model_of_another_family_is_blamed(self, tmp_path: Path):
        write_world(tmp_path / "ckpt", adapted(), adapted().adapter_state())
        base = save_tiny_model("llama", tmp_path / "base")
        message = refused(tmp_path / "ckpt", lora="split", lora_alpha=5, base_model=str(base))
        assert_says(message, "the base model lacks 6 tensors of Qwen2ForCausalLM", "q_proj.bias", "another family")

    def test_a_base_model_that_is_an_adapter_is_named(self, tmp_path: Path):
        write_world(tmp_path / "ckpt", adapted(), adapted().adapter_state())
        adapted().model.save_pretrained(tmp_path / "adapter")
        message = refused(tmp_path / "ckpt", lora="fold", lora_alpha=5, base_model=str(tmp_path / "adapter"))
        assert_says(message, "the base model's directory holds an adapter", str(tmp_path / "adapter"), "--base_model")

    def test_a_base_that_training_changed_first_is_asked_for(self, tmp_path: Path):
        """PiSSA takes the adapter's first values out of the weights: the published ones do not fit it."""
        write_world(tmp_path / "ckpt", adapted(), adapted().adapter_state())
        with_config(tmp_path / "ckpt", r=3, lora_alpha=5, init_lora_weights="pissa")
        base = save_tiny_model("qwen2", tmp_path / "base")
        message = refused(tmp_path / "ckpt", lora="fold", base_model=str(base))
        assert_says(message, "'pissa' changed the base weights", "save the whole state dict")


def test_the_plan_tells_what_is_done_and_states_its_memory(ckpt: Path):
    made = plan(ckpt, lora="fold", lora_alpha=5)
    text = repr(made)
    assert_says(text, "4 layers folded into the weights, as peft adds", "r 3, alpha 5, scale 1.667", "the option")
    assert made.execution.computed_bytes == 4 * (16 * 16 + 16 * 24) * 2
    assert "peft" in made.versions
    whole = plan(ckpt, lora="split", lora_alpha=5)
    assert whole.execution.computed_bytes == 0
    assert made.digest != plan(ckpt, lora="fold", lora_alpha=6).digest
    assert made.digest != plan(ckpt, lora="fold", lora_alpha=5, fold_precision="fp32").digest


def test_the_receipt_tells_what_was_done(ckpt: Path, tmp_path: Path):
    import peft

    nbmerge.merge(with_meta(ckpt, r=3, lora_alpha=5), tmp_path / "out", lora="fold", fold_precision="fp32")
    recorded = receipt_of(tmp_path / "out")["lora"]
    assert (recorded["mode"], recorded["layers"], recorded["r"], recorded["precision"]) == ("fold", 4, 3, "fp32")
    assert recorded["peft"] == peft.__version__
    assert recorded["known_from"]["r"] == recorded["known_from"]["lora_alpha"] == str(ckpt / "lora_train_meta.json")
    assert "nothing says otherwise" in recorded["known_from"]["use_rslora"]


def test_an_adapter_alone_can_be_replaced_and_needs_no_tokenizer(ckpt: Path, tmp_path: Path):
    for alpha in (5, 6):
        nbmerge.merge(ckpt, tmp_path / "out", lora="adapter", lora_alpha=alpha, overwrite=True)
    content = json.loads((tmp_path / "out" / "lora_adapter" / "adapter_config.json").read_text())
    assert content["lora_alpha"] == 6
    assert not (tmp_path / "out" / "config.json").exists()


def test_names_are_taken_apart_and_put_together_as_peft_does():
    made = adapted(use_dora=True, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    parts = take_apart(dict.fromkeys(made.state()))  # type: ignore[arg-type]
    layers = parts.layers["default"].values()
    names = {saved_name(layer, part) for layer in layers for part in layer.parts}
    names |= {PREFIX + name for name in parts.saved["default"]}
    assert names == set(made.adapter())
    assert set(parts.model) == set(made.base())
    assert parts.whole == {"default": {"lm_head"}} and not parts.unread and not parts.doubles


@pytest.mark.parametrize(
    ("adapted_modules", "others", "targets"),
    [
        (["a.0.q", "a.1.q"], ["a.0.k"], ["q"]),
        (["a.0.q"], ["a.1.q"], ["a.0.q"]),
        (["a.0", "a.1"], ["b.k"], ["a.0", "a.1"]),
        (["lm_head"], ["x.lm"], ["lm_head"]),
    ],
)
def test_targets_select_what_is_adapted_and_nothing_else(
    adapted_modules: list[str], others: list[str], targets: list[str]
):
    assert shortest_targets(adapted_modules, [*adapted_modules, *others]) == targets


@pytest.mark.parametrize(
    ("saved", "others", "ends"),
    [
        (["model.norm"], ["model.layers.0.input_layernorm"], ["model.norm"]),
        (["a.0.mlp", "a.1.mlp"], ["a.0.mlp.up"], ["mlp"]),
        (["a.1.mlp"], ["a.0.mlp", "a.11.mlp"], ["a.1.mlp"]),
        (["lm_head"], ["model"], ["lm_head"]),
    ],
)
def test_modules_to_save_select_what_was_saved_and_nothing_else(saved: list[str], others: list[str], ends: list[str]):
    assert shortest_saved(saved, [*saved, *others]) == ends


def test_the_task_is_that_of_the_model_s_class(tmp_path: Path):
    made = adapted()
    write_world(tmp_path / "ckpt", made)
    write_config(tmp_path / "ckpt" / "huggingface", "qwen2")
    nbmerge.merge(tmp_path / "ckpt", tmp_path / "out", lora="adapter", lora_alpha=5)
    content = json.loads((tmp_path / "out" / "lora_adapter" / "adapter_config.json").read_text())
    assert content["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fold_states_what_it_holds_at_its_peak(tmp_path: Path, use_dora: bool):
    """In fp32 DoRA holds four tensors of the weight's size beside inputs and result, LoRA two."""
    write_world(tmp_path / "ckpt", adapted(target_modules=["down_proj"], use_dora=use_dora))
    made = plan(tmp_path / "ckpt", lora="fold", lora_alpha=5, workers=1)
    copied = plan(tmp_path / "ckpt", lora="split", lora_alpha=5, workers=1)
    blocks = made.execution.buffer_bytes * (6 - 2)
    inputs = 16 * 24 + 3 * 24 + 16 * 3 + (16 if use_dora else 0)
    tensors = 16 * 24 * (5 if use_dora else 3) + inputs
    assert made.execution.peak_bytes - copied.execution.peak_bytes == blocks + 4 * tensors
