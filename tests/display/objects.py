"""Checkpoints, plans and reports made from their dataclasses alone, without files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Expr, Paste, Stored
from nbmerge.geometry import Box, Placement, contiguous_strides, local_box, unravel
from nbmerge.layout import Checkpoint, Chunk, LazyTensor, MeshAxis, SourceFile
from nbmerge.options import MergeOptions
from nbmerge.plan import Execution, MergePlan, OutputFile, OutputTensor, SideFile
from nbmerge.report import MergeReport
from nbmerge.verification import Verification

SHARD, COLUMNS, REPLICATE = Placement("shard", 0), Placement("shard", 1), Placement("replicate")


def tensor(
    name: str,
    shape: tuple[int, ...],
    mesh: Mapping[str, tuple[int, Placement]] | None = None,
    dtype: str = "bfloat16",
) -> LazyTensor:
    """A tensor on a mesh {axis name: (size, placement)}, stored as its ranks would hold it."""
    axes = mesh or {}
    sizes = tuple(size for size, _ in axes.values())
    placements = [placement for _, placement in axes.values()]
    by_box: dict[Box, list[tuple[int, Stored]]] = {}
    for rank in range(math.prod(sizes)):
        box = local_box(shape, placements, sizes, unravel(rank, sizes))
        by_box.setdefault(box, []).append((rank, stored(rank, box.shape, dtype)))
    chunks = tuple(Chunk(box, found[0][1], found[0][0], tuple(found[1:])) for box, found in by_box.items())
    filled = [chunk for chunk in chunks if chunk.box.numel]
    expr: Expr = filled[0].stored
    if len(filled) > 1:
        expr = Paste(shape, BY_NAME[dtype], tuple((chunk.box.offset, chunk.stored) for chunk in filled))
    on = tuple(MeshAxis(axis, size, str(placement)) for axis, (size, placement) in axes.items())
    return LazyTensor(name, expr, chunks, on)


def stored(rank: int, shape: tuple[int, ...], dtype: str = "bfloat16") -> Stored:
    """The bytes of a rank's piece."""
    name = f"/run/model_world_size_8_rank_{rank}.pt"
    return Stored(name, 64 * (rank + 1), shape, contiguous_strides(shape), BY_NAME[dtype])


def checkpoint(*tensors: LazyTensor, **changes: Any) -> Checkpoint:
    """A checkpoint of these tensors; without any, of a small model of 4 layers on fsdp=4 × tp=2."""
    held = tensors or tuple(small_model())
    weights = tuple(SourceFile(Path(f"/run/model_{rank}.pt"), 35_367 + rank, 0, "weights") for rank in range(8))
    made = Checkpoint(
        path=Path("/run"),
        backend="fsdp",
        layout="FSDP2, a file for each rank",
        tensors={one.name: one for one in held},
        world_size=8,
        files=(*weights, SourceFile(Path("/run/optim_0.pt"), 777_001, 0, "optimizer")),
        config_dir=Path("/run/huggingface"),
        mesh=held[0].mesh,
        evidence=("8 × model_world_size_8_rank_*.pt",),
        notes=("8 optimizer files left alone",),
    )
    return replace(made, **changes)


def small_model() -> list[LazyTensor]:
    """One embedding, four layers of three tensors, one norm that lies on a part of the mesh."""
    rows, columns, part = (
        {"fsdp": (4, SHARD), "tp": (2, COLUMNS)},
        {"fsdp": (4, SHARD), "tp": (2, REPLICATE)},
        {"fsdp": (4, SHARD)},
    )
    made = [tensor("model.embed_tokens.weight", (257, 18), rows)]
    for layer in range(4):
        made.append(tensor(f"model.layers.{layer}.self_attn.q_proj.weight", (16, 18), rows))
        made.append(tensor(f"model.layers.{layer}.self_attn.q_proj.bias", (5,), columns))
        made.append(tensor(f"model.layers.{layer}.norm.weight", (3,), part))
    return [*made, tensor("model.norm.weight", (18,), part)]


def plan(source: Checkpoint | None = None, **changes: Any) -> MergePlan:
    """A plan that writes every tensor of the checkpoint to one file."""
    source = source or checkpoint()
    outputs = tuple(OutputTensor(name, one.expr, 0) for name, one in source.tensors.items())
    made = MergePlan(
        checkpoint=source,
        options=MergeOptions(),
        config_dir=source.path,
        model_class="Qwen2ForCausalLM",
        dialect="transformers",
        files=(OutputFile("model.safetensors", b"x" * 1_232, outputs),),
        side_files=(SideFile("config.json", content=b"{}"), SideFile("tokenizer.json", content=b"y" * 4_321)),
        expected={},
        execution=Execution("threads", 4, 8_388_608, 67_108_864, 9_999, 0, "bytes are copied from file to file"),
    )
    return replace(made, **changes)


def report(source: MergePlan | None = None, **changes: Any) -> MergeReport:
    """The report of a merge that wrote the plan to /out."""
    source = source or plan()
    made = MergeReport(
        plan=source,
        target=Path("/out"),
        seconds=2.5,
        written_bytes=5_000_000,
        verification=Verification(1, len(source.tensors), source.data_bytes, source.model_class),
        receipt={"schema": 1},
        drift=source.drift,
    )
    return replace(made, **changes)
