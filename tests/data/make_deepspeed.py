"""Makes the cases deepspeed_*, with a real DeepSpeed over gloo on a CPU: python make_deepspeed.py DIRECTORY.

Needs deepspeed, torch and transformers; the weights of the truth are what DeepSpeed itself gathers while it trains.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing import spawn

SIZES = {"vocab_size": 37, "hidden_size": 12, "intermediate_size": 10, "num_attention_heads": 2,
         "num_key_value_heads": 1, "num_hidden_layers": 2, "max_position_embeddings": 32}  # fmt: skip
BF16 = {"bf16": {"enabled": True}}
CASES: dict[str, dict[str, Any]] = {
    "z2_w3_bf16_groups_frozen": {
        "what": "ZeRO stage 2 on 3 ranks, two parameter groups, round robin gradients, a frozen layer",
        "world": 3, "frozen": "layers.0", "groups": True,
        "config": {**BF16, "zero_optimization": {"stage": 2, "round_robin_gradients": True}},
    },
    "z3_w3_bf16_tied_frozen": {
        "what": "ZeRO stage 3 on 3 ranks, tied embeddings, small sub-groups, a frozen layer", "world": 3,
        "frozen": "layers.1", "tied": True,
        "config": {**BF16, "zero_optimization": {
            "stage": 3, "sub_group_size": 500, "stage3_param_persistence_threshold": 0}},
    },
    "z1_w4_bf16_optimizer": {
        "what": "BF16_Optimizer on 4 ranks, two parameter groups: padding stays in the files",
        "world": 4, "groups": True,
        "config": {**BF16, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    },
    "pipeline_z1_w4_bf16": {
        "what": "a PipelineModule of two stages on 4 ranks, with layer_names.json beside its layers", "world": 4,
        "pipeline": True, "config": {**BF16, "zero_optimization": {"stage": 1}},
    },
}  # fmt: skip


class Embedding(nn.Module):
    """The first layer of the pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZES["vocab_size"], SIZES["hidden_size"]) / 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(tokens, self.weight)


class Block(nn.Module):
    """A decoder layer's parameters, and a forward pass that gives each of them a gradient."""

    def __init__(self, number: int) -> None:
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

        super().__init__()
        layer = Qwen2DecoderLayer(model_config(False), number)
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * sum(parameter.square().mean() for parameter in self.parameters())


class Last(nn.Module):
    """A layer with one matrix or vector: the final norm, or the head."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / 9)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.weight.T if self.weight.dim() > 1 else hidden * self.weight


def model_config(tied: bool) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(**SIZES, tie_word_embeddings=tied, architectures=["Qwen2ForCausalLM"])


LAYERS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def pipeline() -> nn.Module:
    from deepspeed.pipe import LayerSpec, PipelineModule

    layers = [LayerSpec(Embedding), LayerSpec(Block, 0), LayerSpec(Block, 1), LayerSpec(Last, SIZES["hidden_size"]),
              LayerSpec(Last, SIZES["vocab_size"], SIZES["hidden_size"])]  # fmt: skip
    return PipelineModule(layers, num_stages=2, partition_method="uniform", loss_fn=lambda out, _: out.square().mean())


def parameter_groups(model: nn.Module, split: bool) -> list[dict[str, Any]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not split:
        return [{"params": trained}]
    matrices = [parameter for parameter in trained if parameter.dim() > 1]
    rest = [parameter for parameter in trained if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def in_model(name: str) -> str:
    """The name in the model of a pipeline's parameter, `1.self_attn.q_proj.weight`."""
    number, dot, rest = name.partition(".")
    return f"{LAYERS[int(number)]}{dot}{rest}" if number.isdecimal() else name


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """The masters of stage 2 by name, gathered from the optimizer: with round robin, `safe_get_full_fp32_param` of
    0.19.8 gives parts of other parameters. Each is proven by the live weight, which is its rounding."""
    from torch import distributed

    optimizer, names = engine.optimizer, engine.param_names
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, [part.detach().clone() for part in optimizer.single_partition_of_fp32_groups])
    found = {}
    for number, parameters in enumerate(optimizer.round_robin_bit16_groups):
        vector, at = torch.cat([part[number] for part in parts]), 0
        for parameter in parameters:
            master = vector[at : at + parameter.numel()].view(parameter.shape).clone()
            at += parameter.numel()
            if not torch.equal(master.bfloat16(), parameter.detach()):
                raise SystemExit(f"{names[parameter]} is not its master, rounded")
            found[names[parameter]] = master
    return found


def train_and_save(rank: int, case: dict[str, Any], folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["world"]), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT="29733")  # fmt: skip
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param
    from safetensors.torch import save_file
    from transformers import Qwen2ForCausalLM

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    torch.manual_seed(7)
    is_pipeline = case.get("pipeline", False)
    model = pipeline() if is_pipeline else Qwen2ForCausalLM(model_config(case.get("tied", False)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.get("frozen", "nothing") not in name)
    groups = parameter_groups(model, case.get("groups", False))
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1,
              "zero_allow_untested_optimizer": True, **case["config"]}  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=3e-3), config=config)
    torch.manual_seed(100 + rank)
    for _ in range(3):
        tokens = torch.randint(0, SIZES["vocab_size"], (2, 6))
        if is_pipeline:
            engine.train_batch(data_iter=iter([(tokens, tokens)]))
        else:
            loss = engine(input_ids=tokens, labels=tokens).loss
            engine.backward(loss)
            engine.step()
    engine.save_checkpoint(str(folder / "ckpt"))
    weights = gathered(engine) if config["zero_optimization"].get("round_robin_gradients") else {}
    for name, parameter in model.named_parameters():
        if name in weights:
            continue
        if parameter.requires_grad:
            weights[in_model(name)] = safe_get_full_fp32_param(parameter).clone()
        else:
            with deepspeed.zero.GatheredParameters(parameter):
                weights[in_model(name)] = parameter.detach().float().clone()
    save_file(weights, folder / f"of_rank_{rank}.safetensors")


def make(name: str, target: Path) -> None:
    from safetensors.torch import load_file, save_file

    case, folder = CASES[name], target / f"deepspeed_{name}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "truth").mkdir(parents=True)
    (folder / "hf").mkdir()
    spawn(train_and_save, (case, folder), nprocs=case["world"])
    weights: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("of_rank_*.safetensors")):
        weights |= load_file(part)
        part.unlink()
    save_file(weights, folder / "truth" / "model.safetensors", {"format": "pt"})
    for script in (folder / "ckpt").glob("*.py"):  # DeepSpeed's own converters, which it copies beside
        script.unlink()
    model_config(case.get("tied", False)).to_json_file(folder / "hf" / "config.json")
    if case.get("pipeline"):
        names = {f"layer_{number:02d}": layer for number, layer in enumerate(LAYERS)}
        (folder / "ckpt" / "layer_names.json").write_text(json.dumps(names, indent=1) + "\n")
    record = {"what": f"DeepSpeed: {case['what']}", "options": {"hf_model_config_path": "./hf"}, "truth": "truth"}
    (folder / "case.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    for each in sys.argv[2:] or CASES:
        make(each, Path(sys.argv[1]).absolute())
