"""Directories of torch.distributed.checkpoint, written with torch's own planner and writers.

In one process for pretend ranks (`write_dcp`), or by ranks that are processes (`write_fsdp_run`).
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as dcp

from tests.support.processes import ROOT
from tests.support.worlds import Place, by_rows, mesh_states, rank_of

HAS_HF_WRITER = hasattr(dcp, "HuggingFaceStorageWriter")  # torch 2.8 and newer


def write_dcp(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    mesh_shape: tuple[int, ...] = (2,),
    *,
    place: Place = by_rows,
    root: tuple[str, ...] = (),
    beside: Mapping[str, Any] | None = None,
    writer: Any = None,
) -> Path:
    """What `dcp.save` writes of DTensors on a mesh, rank by rank.

    root: keys around the model's state dict, outermost first; beside: what else the state holds; writer: the
    storage writer of the directory, by default torch's FileSystemWriter.
    """
    names = tuple(f"dim{number}" for number in range(len(mesh_shape)))
    states = [wrapped(state, root) | dict(beside or {}) for state in mesh_states(tensors, mesh_shape, names, place)]
    return save_ranks(directory, states, math.prod(mesh_shape), writer)


def wrapped(state: Mapping[str, Any], root: Iterable[str]) -> dict[str, Any]:
    """The state dict as the value of these keys."""
    nested = dict(state)
    for key in reversed(tuple(root)):
        nested = {key: nested}
    return nested


def save_ranks(directory: Path, states: list[dict[str, Any]], world_size: int, writer: Any = None) -> Path:
    """The steps of torch.distributed.checkpoint.state_dict_saver.save, one rank after the other."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    writer = writer or FileSystemWriter(directory)
    planners, plans = [], []
    for rank, state in enumerate(states):
        with rank_of(rank, world_size):
            planner = DefaultSavePlanner()
            planner.set_up_planner(state, writer.storage_meta(), is_coordinator=rank == 0)
            writer.set_up_storage_writer(rank == 0)
            planners.append(planner)
            plans.append(writer.prepare_local_plan(planner.create_local_plan()))
    plans, metadata = planners[0].create_global_plan(plans)
    results = []
    for rank, plan in enumerate(writer.prepare_global_plan(plans)):
        with rank_of(rank, world_size):
            results.append(writer.write_data(planners[rank].finish_plan(plan), planners[rank]).value())
    writer.finish(metadata, results)
    return directory


def hf_writer(directory: Path, *, save_distributed: bool = True, **options: Any) -> Any:
    """torch's HuggingFaceStorageWriter, for pieces of ranks; the test is skipped where torch has none."""
    if not HAS_HF_WRITER:
        pytest.skip("this torch has no HuggingFaceStorageWriter")
    directory.mkdir(parents=True, exist_ok=True)
    return dcp.HuggingFaceStorageWriter(str(directory), save_distributed=save_distributed, **options)


_RANK = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from pathlib import Path
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

source, target, rank, world_size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
dist.init_process_group("gloo", init_method=f"file://{target}.store", rank=rank, world_size=world_size)
model = AutoModelForCausalLM.from_pretrained(source)
mesh = dist.device_mesh.init_device_mesh("cpu", (world_size,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
dcp.save(state, checkpoint_id=target / "run")
if hasattr(dcp, "HuggingFaceStorageWriter"):
    writer = dcp.HuggingFaceStorageWriter(str(target / "hf"), save_distributed=True)
    dcp.save(model.state_dict(), storage_writer=writer)
dist.destroy_process_group()
"""


def write_fsdp_run(directory: Path, source: Path, world_size: int = 2) -> Path:
    """A model of `source` under FSDP2 in processes that talk over gloo.

    `run/` is written by DCP, `hf/` by its writer of Hugging Face files, where torch has one.
    """
    directory.mkdir(parents=True)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(source), str(directory), str(rank), str(world_size)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    for rank in ranks:
        output, _ = rank.communicate(timeout=300)
        assert rank.returncode == 0, output
    return directory
