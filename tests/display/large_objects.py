"""Indexes of DeepSeek-V3's size, 61 layers of 256 experts: as published in fp8, sharded by FSDP, and by Megatron."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import cache, wraps
from pathlib import Path
from typing import TypeVar

from nbmerge.comparing.model_diff import ModelDiff, TensorDiff
from nbmerge.comparing.statistics import FRACTION, Largest, Products, Statistics
from nbmerge.comparing.trajectory import Step, Trajectory, UpdateProducts
from nbmerge.dtypes import BY_NAME
from nbmerge.expressions import Paste, Stored
from nbmerge.geometry import Box, Shape, contiguous_strides
from nbmerge.layout import Checkpoint, Chunk, LazyTensor, MeshAxis
from nbmerge.plan import MergePlan
from nbmerge.report import MergeReport
from nbmerge.validation.findings import CheckResult, Finding, Outcome
from nbmerge.validation.report import ValidationReport
from tests.benchmarks.plan_deepseek import chunks

from .objects import checkpoint, plan, report

_Made = TypeVar("_Made")

_HIDDEN, _VOCABULARY, _BLOCK = 7168, 129_280, 128


def _kept(make: Callable[[], _Made]) -> Callable[[], _Made]:
    """Made once; its millions of parts are kept from the garbage collector, which looks through all that it knows."""

    @cache
    @wraps(make)
    def made() -> _Made:
        gc.collect()
        gc.disable()
        try:
            return make()
        finally:
            gc.freeze()
            gc.enable()

    return made


def published_names() -> Iterator[tuple[str, Shape, str]]:
    """(name, shape, dtype) of every tensor as it was published: matrices in fp8, each with its scales."""
    whole = (_VOCABULARY, _HIDDEN)
    extra = "model.layers.61"  # the layer that predicts one token further has ends of its own
    ends = (("model.embed_tokens", whole), ("lm_head", whole), ("model.norm", (_HIDDEN,)),
                        (f"{extra}.embed_tokens", whole), (f"{extra}.shared_head.head", whole),
                        (f"{extra}.shared_head.norm", (_HIDDEN,)), (f"{extra}.enorm", (_HIDDEN,)),
                        (f"{extra}.hnorm", (_HIDDEN,)), (f"{extra}.eh_proj", (_HIDDEN, 2 * _HIDDEN)))  # fmt: skip
    for name, shape in ends:
        yield f"{name}.weight", shape, "bfloat16"
    for layer in range(62):
        name = f"model.layers.{layer}."
        for norm, size in (("input_layernorm", _HIDDEN), ("post_attention_layernorm", _HIDDEN),
                           ("self_attn.q_a_layernorm", 1536), ("self_attn.kv_a_layernorm", 512)):  # fmt: skip
            yield f"{name}{norm}.weight", (size,), "bfloat16"
        for matrix, shape in (("q_a_proj", (1536, _HIDDEN)), ("q_b_proj", (24_576, 1536)),
                              ("kv_a_proj_with_mqa", (576, _HIDDEN)), ("kv_b_proj", (32_768, 512)),
                              ("o_proj", (_HIDDEN, 16_384))):  # fmt: skip
            yield from _quantised(f"{name}self_attn.{matrix}", shape)
        if layer < 3:
            yield from _mlp(f"{name}mlp", 18_432)
            continue
        yield f"{name}mlp.gate.weight", (256, _HIDDEN), "bfloat16"
        yield f"{name}mlp.gate.e_score_correction_bias", (256,), "float32"
        yield from _mlp(f"{name}mlp.shared_experts", 2048)
        for expert in range(256):
            yield from _mlp(f"{name}mlp.experts.{expert}", 2048)


def _mlp(name: str, width: int) -> Iterator[tuple[str, Shape, str]]:
    for part, shape in (("gate", (width, _HIDDEN)), ("up", (width, _HIDDEN)), ("down", (_HIDDEN, width))):
        yield from _quantised(f"{name}.{part}_proj", shape)


def _quantised(name: str, shape: tuple[int, int]) -> Iterator[tuple[str, Shape, str]]:
    yield f"{name}.weight", shape, "float8_e4m3fn"
    yield f"{name}.weight_scale_inv", (-(-shape[0] // _BLOCK), -(-shape[1] // _BLOCK)), "float32"


@_kept
def published() -> Checkpoint:
    """Whole tensors in files as they are published: no mesh, a chunk each."""
    return checkpoint(
        *(_whole(name, shape, dtype) for name, shape, dtype in published_names()),
        backend="hf", layout="Hugging Face safetensors", world_size=1, whole=True, mesh=(),
    )  # fmt: skip


@_kept
def sharded() -> Checkpoint:
    """The same names in rows on two ranks, each tensor with a mesh of its own as a loader makes it."""
    return checkpoint(*(_in_rows(*one) for one in published_names()), world_size=2)


@_kept
def megatron() -> Checkpoint:
    """What TP 8 × PP 16 × EP 32 wrote as torch_dist: a tensor for each layer's experts, 48,806 pieces."""
    found: dict[str, tuple[Shape, list[Chunk]]] = {}
    for name, shape, offset, extent, dtype, rank in chunks():
        stored = _stored(f"/run/dist_ckpt/__{rank}_0.distcp", extent, str(dtype).removeprefix("torch."))
        found.setdefault(name, (shape, []))[1].append(Chunk(Box(offset, extent), stored, rank))
    tensors = [
        LazyTensor(name, Paste(shape, held[0].stored.dtype, tuple((c.box.offset, c.stored) for c in held)), tuple(held))
        for name, (shape, held) in found.items()
    ]
    mesh = (MeshAxis("pp", 16, "layers"), MeshAxis("ep", 32, "experts"), MeshAxis("tp", 8, "tensors"))
    return checkpoint(*tensors, backend="megatron", names="megatron", layout="Megatron torch_dist", world_size=512,
                      mesh=mesh)  # fmt: skip


@_kept
def large_plan() -> MergePlan:
    """That every published name is written."""
    return plan(published())


@_kept
def large_report() -> MergeReport:
    """That every published name was written."""
    return report(large_plan())


@_kept
def large_diff() -> ModelDiff:
    """That every published tensor changed, each a little otherwise."""
    tensors = {}
    for number, (name, shape, dtype) in enumerate(published_names()):
        elements, size = math.prod(shape), 1.0 / (3 + number % 97)
        found = Statistics(
            elements, elements // 3, flips=number, ulps=(0, elements // 4, elements // 12),
            magnitudes={-20 - number % 5: elements // 4, -19: elements // 12},
            largest=Largest(size, number % elements, 0.5, 0.5 + size),
            products=Products(number + 7 << FRACTION, number + 8 << FRACTION, number + 5 << FRACTION,
                              1 + number % 11 << FRACTION - 20, 3 << FRACTION - 20),
        )  # fmt: skip
        tensors[name] = TensorDiff(name, shape, BY_NAME[dtype], BY_NAME[dtype], BY_NAME[dtype], found)
    return ModelDiff("/run/base", "/run/global_step_100", tensors).summed_up()


@_kept
def large_trajectory() -> Trajectory:
    """Three steps of a run that changed every published tensor."""
    diff = large_diff()
    products = {name: UpdateProducts(5 << FRACTION, 4 << FRACTION, 3 << FRACTION) for name in diff.tensors}
    labels = [f"/run/global_step_{step}" for step in (10, 20, 30)]
    return Trajectory("/run/base", tuple(Step(label, diff, products).summed_up() for label in labels))


@_kept
def large_validation() -> ValidationReport:
    """That a check has a finding of every published tensor."""
    findings = tuple(
        Finding(
            "differs from the checkpoint", name, f"1 of {math.prod(shape):,} elements", "a bit turned", "merge again"
        )
        for name, shape, _ in published_names()
    )
    outcome = Outcome(findings, f"compared {len(findings):,} tensors", True)
    return ValidationReport(Path("/out"), (CheckResult("source", "the values are right", outcome, 0.5),))


def _whole(name: str, shape: Shape, dtype: str) -> LazyTensor:
    stored = _stored("/run/model-00001-of-000163.safetensors", shape, dtype)
    return LazyTensor(name, stored, (Chunk(Box.whole(shape), stored, 0),))


def _in_rows(name: str, shape: Shape, dtype: str) -> LazyTensor:
    half = (shape[0] + 1) // 2
    held = []
    for rank, (start, rows) in enumerate(((0, half), (half, shape[0] - half))):
        box = Box((start, *(0 for _ in shape[1:])), (rows, *shape[1:]))
        held.append(Chunk(box, _stored(f"/run/model_world_size_2_rank_{rank}.pt", box.shape, dtype), rank))
    parts = tuple((chunk.box.offset, chunk.stored) for chunk in held if chunk.box.numel)
    return LazyTensor(name, Paste(shape, BY_NAME[dtype], parts), tuple(held), (MeshAxis("fsdp", 2, "Shard(0)"),))


def _stored(file: str, shape: Shape, dtype: str) -> Stored:
    return Stored(file, 64, shape, contiguous_strides(shape), BY_NAME[dtype])


LARGE = (published, sharded, megatron, large_plan, large_report, large_diff, large_trajectory, large_validation)
"""Makers of everything that grows with the number of tensors."""
