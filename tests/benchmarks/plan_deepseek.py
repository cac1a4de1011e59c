"""Time and memory of planning a checkpoint of DeepSeek-V3's size: 61 layers, 256 experts, TP 8 × PP 16 × EP 32.

python -m tests.benchmarks.plan_deepseek [--dir DIR]

The checkpoint is an index and the head and tail of every chunk's archive, as torch writes them; between them the
files are holes. 1.3 TB by their sizes, 0.4 GB on the disk.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

_TP, _PP, _EP = 8, 16, 32
_LIMIT_SECONDS, _LIMIT_GB = 60, 2
_KEPT = 1024  # bytes of an archive's head and tail

Chunk = tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, int]
"""Name, global shape, offset and shape of the chunk, dtype, and the rank that wrote it."""


def _cut(name: str, shape: tuple[int, ...], dim: int | None, pieces: int, stage: int) -> Iterator[Chunk]:
    """A tensor that lies on one pipeline stage, cut along a dimension."""
    step = shape[dim] // pieces if dim is not None else 0
    for piece in range(pieces if dim is not None else 1):
        offset = tuple(piece * step if d == dim else 0 for d in range(len(shape)))
        extent = tuple(step if d == dim else size for d, size in enumerate(shape))
        yield name, shape, offset, extent, torch.bfloat16, stage * _EP + piece


def chunks() -> Iterator[Chunk]:
    """Every chunk of the model, gate and up halves apart, experts one by one, as torch_dist cuts them."""
    hidden, heads, vocabulary = 7168, 128, 129_280
    yield from _cut("embedding.word_embeddings.weight", (vocabulary, hidden), 0, _TP, 0)
    yield from _cut("output_layer.weight", (vocabulary, hidden), 0, _TP, _PP - 1)
    yield from _cut("decoder.final_layernorm.weight", (hidden,), None, 1, _PP - 1)
    for layer in range(62):
        stage = min(layer // 4, _PP - 1)
        name = f"decoder.layers.{layer}." if layer < 61 else "mtp.layers.0.transformer_layer."
        yield from _layer(name, hidden, heads, layer, stage)
    for part, shape, dim in (
        ("enorm", (hidden,), None),
        ("hnorm", (hidden,), None),
        ("final_layernorm", (hidden,), None),
        ("eh_proj", (hidden, 2 * hidden), 0),
    ):
        yield from _cut(f"mtp.layers.0.{part}.weight", shape, dim, _TP, _PP - 1)


def _layer(name: str, hidden: int, heads: int, layer: int, stage: int) -> Iterator[Chunk]:
    for row, shape, dim in (
        ("input_layernorm.weight", (hidden,), None),
        ("self_attention.linear_proj.weight", (hidden, heads * 128), 1),
        ("self_attention.linear_q_down_proj.weight", (1536, hidden), None),
        ("self_attention.linear_q_up_proj.layer_norm_weight", (1536,), None),
        ("self_attention.linear_q_up_proj.weight", (heads * 192, 1536), 0),
        ("self_attention.linear_kv_down_proj.weight", (576, hidden), None),
        ("self_attention.linear_kv_up_proj.layer_norm_weight", (512,), None),
        ("self_attention.linear_kv_up_proj.weight", (heads * 256, 512), 0),
    ):
        yield from _cut(name + row, shape, dim, _TP, stage)
    if layer < 3:
        yield from _cut(name + "mlp.linear_fc1.layer_norm_weight", (hidden,), None, 1, stage)
        yield from _cut(name + "mlp.linear_fc1.weight", (2 * 18_432, hidden), 0, 2 * _TP, stage)
        yield from _cut(name + "mlp.linear_fc2.weight", (hidden, 18_432), 1, _TP, stage)
        return
    yield from _cut(name + "pre_mlp_layernorm.weight", (hidden,), None, 1, stage)
    yield from _cut(name + "mlp.router.weight", (256, hidden), None, 1, stage)
    yield name + "mlp.router.expert_bias", (256,), (0,), (256,), torch.float32, stage * _EP
    yield from _cut(name + "mlp.shared_experts.linear_fc1.weight", (4096, hidden), 0, 2 * _TP, stage)
    yield from _cut(name + "mlp.shared_experts.linear_fc2.weight", (hidden, 2048), 1, _TP, stage)
    for expert in range(256):
        rank = stage * _EP + expert // (256 // _EP)
        for half in (0, 2048):
            row = "mlp.experts.experts.linear_fc1.weight"
            yield name + row, (256, 4096, hidden), (expert, half, 0), (1, 2048, hidden), torch.bfloat16, rank
        row = "mlp.experts.experts.linear_fc2.weight"
        yield name + row, (256, hidden, 2048), (expert, 0, 0), (1, hidden, 2048), torch.bfloat16, rank


class _Ends(io.RawIOBase):
    """A file that keeps its first and last bytes, and counts the others."""

    def __init__(self) -> None:
        self.head, self.tail, self.size = b"", b"", 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        view = bytes(data[:_KEPT]) if len(self.head) < _KEPT else b""
        self.head = (self.head + view)[:_KEPT]
        self.tail = (self.tail + bytes(data[-_KEPT:]))[-_KEPT:]
        self.size += len(data)
        return len(data)


def make(directory: Path) -> None:
    """The checkpoint: `model/dist_ckpt` and `model/huggingface`, as verl lays them out."""
    from transformers import DeepseekV3Config

    weights = directory / "model" / "dist_ckpt"
    weights.mkdir(parents=True)
    DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"], num_nextn_predict_layers=1).save_pretrained(
        directory / "model" / "huggingface"
    )
    entries: dict[str, dcp.TensorStorageMetadata] = {}
    places: dict[dcp.MetadataIndex, _StorageInfo] = {}
    archives: dict[tuple[tuple[int, ...], torch.dtype], _Ends] = {}
    ends: dict[int, int] = {}
    files: dict[int, BinaryIO] = {}
    for name, shape, offset, extent, dtype, rank in chunks():
        archive = archives.get((extent, dtype))
        if archive is None:
            archive = archives[extent, dtype] = _Ends()
            torch.save(torch.empty(extent, dtype=dtype), archive)
        start = ends.get(rank, 0)
        ends[rank] = start + archive.size
        if rank not in files:
            files[rank] = (weights / f"__{rank}_0.distcp").open("wb")
        file = files[rank]
        file.seek(start)
        file.write(archive.head[: archive.size])
        file.seek(start + max(archive.size - _KEPT, 0))
        file.write(archive.tail)
        entry = entries.setdefault(
            name, dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(shape), [])
        )
        entry.chunks.append(dcp.ChunkStorageMetadata(torch.Size(offset), torch.Size(extent)))
        info = _StorageInfo(f"__{rank}_0.distcp", start, archive.size)
        places[dcp.MetadataIndex(name, torch.Size(offset))] = info
    for file in files.values():
        file.close()
    (weights / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(entries, None, places), protocol=4))
    (weights / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    sizes = {"tensor_model": _TP, "pipeline_model": _PP, "expert_model": _EP, "expert_tensor": 1}
    (directory / "transformer_config.json").write_text(
        json.dumps({f"{name}_parallel_size": size for name, size in sizes.items()})
    )


def _measure(directory: str) -> None:
    import nbmerge
    from nbmerge.naming.model import HFModel

    start = time.perf_counter()
    _ = HFModel(Path(directory) / "model" / "huggingface").facts
    ready = time.perf_counter()
    checkpoint = nbmerge.open_checkpoint(directory, progress=False)
    opened = time.perf_counter()
    plan = nbmerge.plan_merge(checkpoint)
    planned = time.perf_counter()
    digest = plan.digest
    found = {
        "start": ready - start, "open": opened - ready, "plan": planned - opened,
        "digest": time.perf_counter() - planned, "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "tensors": len(plan.tensors), "chunks": sum(len(t.chunks) for t in checkpoint.tensors.values()),
        "bytes": plan.data_bytes, "problems": [problem.what for problem in plan.problems], "plan_digest": digest,
    }  # fmt: skip
    print(json.dumps(found))


def _run(directory: Path) -> None:
    if not (directory / "model").is_dir():
        start = time.perf_counter()
        make(directory)
        print(f"made in {time.perf_counter() - start:.0f} s")
    words = [sys.executable, "-m", "tests.benchmarks.plan_deepseek", "--measure", str(directory)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    total = found["start"] + found["open"] + found["plan"] + found["digest"]
    print(f"chunks, outputs        {found['chunks']:,}, {found['tensors']:,} of {found['bytes']:,} bytes")
    print(f"meta model             {found['start']:.1f} s")
    print(f"open, plan, digest     {found['open']:.1f}, {found['plan']:.1f}, {found['digest']:.1f} s")
    print(f"in all                 {total:.1f} s (limit {_LIMIT_SECONDS})")
    print(f"memory of the process  {found['gb']:.2f} GB (limit {_LIMIT_GB})")
    print(f"problems               {found['problems'] or 'none'}")


def main() -> None:
    """Reads the options and runs."""
    if sys.argv[1:2] == ["--measure"]:
        _measure(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dir", type=Path, help="keep the checkpoint here for the next run")
    options = parser.parse_args()
    if options.dir:
        _run(options.dir)
        return
    with tempfile.TemporaryDirectory(prefix="nbmerge-benchmark-") as directory:
        _run(Path(directory) / "checkpoint")


if __name__ == "__main__":
    main()
