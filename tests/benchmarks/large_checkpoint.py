"""Writes a large real FSDP2 checkpoint: each gloo process fills only its own shards.

Run by the benchmarks, one process for each rank: python -m tests.benchmarks.large_checkpoint DIR RANK WORLD GIGABYTES
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_HIDDEN, _VOCABULARY = 2048, 32_000


def make(directory: Path, gigabytes: float, world_size: int = 4) -> None:
    """A checkpoint of about so many gigabytes of fp32 weights in the directory. Raises CalledProcessError."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.benchmarks.large_checkpoint", str(directory)]
    workers = [
        subprocess.Popen([*command, str(rank), str(world_size), str(gigabytes)], env=environment)
        for rank in range(world_size)
    ]
    for worker in workers:
        if worker.wait():
            raise subprocess.CalledProcessError(worker.returncode, command)


def config_of(gigabytes: float):  # type: ignore[no-untyped-def]
    from transformers import Qwen2Config

    intermediate = 4 * _HIDDEN
    per_layer = 2 * _HIDDEN * _HIDDEN + _HIDDEN * _HIDDEN // 2 + 3 * _HIDDEN * intermediate
    rest = 2 * _VOCABULARY * _HIDDEN
    layers = max(1, round((gigabytes * 1e9 / 4 - rest) / per_layer))
    return Qwen2Config(
        hidden_size=_HIDDEN, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=_VOCABULARY, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"],
        bos_token_id=None, eos_token_id=None, dtype="float32",
    )  # fmt: skip


def _worker(directory: Path, rank: int, world_size: int, gigabytes: float) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import Qwen2ForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    store = directory / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    config = config_of(gigabytes)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    mesh = init_device_mesh("cpu", (world_size,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(rank)
    for parameter in model.parameters():
        local = parameter.detach().to_local()
        # Random bits would be honest too, but NaNs confuse every reader; a ramp of random length is enough.
        local.copy_(torch.rand(1, generator=generator) + torch.arange(local.numel()).reshape(local.shape) * 1e-6)
    torch.save(model.state_dict(), directory / f"model_world_size_{world_size}_rank_{rank}.pt")
    if rank == 0:
        (directory / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world_size}))
        config.save_pretrained(directory / "huggingface")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        store.unlink(missing_ok=True)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
