"""Makes the cases colossalai_*, with a real ColossalAI over gloo on a CPU: python make_colossalai.py DIRECTORY.

Needs colossalai 0.5 with the transformers that it is made for (4.51), and torch. The truth of a case is the model that
the ranks hold, as `save_pretrained` writes it before ColossalAI cuts it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import spawn

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 32}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "zero1_w2_bf16_safetensors": {
        "what": "LowLevelZeroPlugin, stage 1, bf16, safetensors shards of 8 kB without `-of-N`",
        "world": 2, "safetensors": True, "tied": False,
    },
    "hybrid_tp2pp2_w4_bin": {
        "what": "HybridParallelPlugin, TP 2 × PP 2, fp32, a .bin file for each stage and shard, one index",
        "world": 4, "safetensors": False, "tied": False,
    },
}  # fmt: skip


def plugin_of(name: str) -> Any:
    from colossalai.booster.plugin import HybridParallelPlugin, LowLevelZeroPlugin

    if name.startswith("zero1"):
        return LowLevelZeroPlugin(stage=1, precision="bf16")
    return HybridParallelPlugin(tp_size=2, pp_size=2, num_microbatches=2, precision="fp32", custom_policy=None)


def let_a_cpu_have_random_states() -> None:
    """ColossalAI asks for the state of a device, which its own class for CPUs does not take."""
    from colossalai.accelerator import get_accelerator

    cpu = type(get_accelerator())
    cpu.get_rng_state = lambda self, device="cpu": torch.get_rng_state()
    cpu.set_rng_state = lambda self, state, device="cpu": torch.set_rng_state(state)
    cpu.manual_seed = lambda self, seed: torch.manual_seed(seed)


def train_and_save(rank: int, name: str, directory: Path, port: int) -> None:
    case = CASES[name]
    import colossalai
    from colossalai.booster import Booster
    from transformers import LlamaConfig, LlamaForCausalLM

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    colossalai.launch(rank=rank, world_size=case["world"], host="127.0.0.1", port=port, backend="gloo", seed=1)
    torch.manual_seed(7)
    config = LlamaConfig(**SIZES, tie_word_embeddings=case["tied"])
    model = LlamaForCausalLM(config)
    if "bf16" in name:
        model = model.to(torch.bfloat16)
    if rank == 0:
        model.save_pretrained(directory / "truth")
    let_a_cpu_have_random_states()
    booster = Booster(plugin=plugin_of(name))
    model, *_ = booster.boost(model)  # without an optimizer, which wants a GPU
    booster.save_model(model, str(directory / "ckpt"), shard=True, size_per_shard=0.008,
                       use_safetensors=case["safetensors"])  # fmt: skip
    torch.distributed.barrier()
    if rank == 0:
        content = {"what": f"ColossalAI 0.5.0: {case['what']}", "options": {}, "truth": "truth"}
        (directory / "case.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))


def main() -> None:
    root = Path(sys.argv[1])
    for number, (name, case) in enumerate(CASES.items()):
        directory = root / f"colossalai_{name}"
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        spawn(train_and_save, (name, directory, 29600 + number), nprocs=case["world"])


if __name__ == "__main__":
    main()
