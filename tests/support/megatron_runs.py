"""Whole directories of Megatron checkpoints, as the frameworks lay them out, of one small model."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from nbmerge.demo.megatron.pieces import ParallelSizes
from nbmerge.geometry import Box
from tests.support.megatron import Pieces, megatron_pieces, whole, write_torch_dist
from tests.support.megatron_classes import megatron_classes
from tests.support.megatron_forms import stacked
from tests.support.megatron_models import megatron_state
from tests.support.models import save_tiny_model, write_config
from tests.support.pickles import Call, Global

Tensors = dict[str, torch.Tensor]
TWO_BY_TWO = ParallelSizes(layers=2, tp=2, pp=2)
PARALLEL = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
LAYOUT = {  # the directory of the weights, of the config, and of transformer_config.json
    "verl_v1": ("dist_ckpt", "huggingface"),
    "verl_v2": ("model/dist_ckpt", "model/huggingface"),
    "megatron_lm": ("iter_0000010", ""),
}


def llama() -> Tensors:
    """A dense model, its two layers stacked."""
    return stacked(megatron_state("llama"))


def saved_beside(sizes: ParallelSizes) -> Pieces:
    """The pieces of weights, and of optimizer tensors of the weights' shapes; whatever else is in one piece."""
    cut = megatron_pieces(sizes)

    def pieces(name: str, tensor: torch.Tensor) -> Iterator[tuple[int, Box]]:
        inner = name.split(".", 3)[3] if name.startswith("optimizer.state.") else name
        same = "layers." in inner or "word_embeddings" in inner or "output_layer" in inner
        yield from cut(inner, tensor) if same and not name.startswith("optimizer.state.fp32") else whole(name, tensor)

    return pieces


def write_run(directory: Path, layout: str = "verl_v1", tensors: Tensors | None = None, **options: Any) -> Path:
    """A checkpoint of two by two ranks in verl's or Megatron-LM's directories. options: of `write_torch_dist`."""
    inside, config = LAYOUT[layout]
    write_torch_dist(directory / inside, llama() if tensors is None else tensors,
                     options.pop("pieces", megatron_pieces(TWO_BY_TWO)), **options)  # fmt: skip
    if layout == "megatron_lm":
        (directory / "latest_checkpointed_iteration.txt").write_text("10")
        torch.save({"args": argparse.Namespace(**PARALLEL), "iteration": 10}, directory / inside / "common.pt")
        return directory
    write_config(directory / config, "llama")
    (directory / "transformer_config.json").write_text(json.dumps(PARALLEL))
    if layout == "verl_v2":
        write_contents(directory, "megatron_dist_checkpoint")
    return directory


def write_contents(directory: Path, form: str) -> None:
    """verl's ckpt_contents.json, which says in which form the weights are."""
    directory.mkdir(parents=True, exist_ok=True)
    model = {"format": form, "path": "model/huggingface" if form == "huggingface" else "model/dist_ckpt"}
    (directory / "ckpt_contents.json").write_text(json.dumps({"schema_version": 2, "contents": {"model": model}}))


def write_huggingface(directory: Path) -> Path:
    """A directory with config and weights, as mbridge saves them."""
    return save_tiny_model("llama", directory)


def edit_metadata(directory: Path, change: Callable[[Any], object]) -> None:
    """Writes `.metadata` again after `change` has changed torch's Metadata."""
    path = directory / ".metadata"
    with megatron_classes():
        made = pickle.loads(path.read_bytes())  # noqa: S301 - our own file
        change(made)
        path.write_bytes(pickle.dumps(made, protocol=4))


# .metadata as no torch would write it


def torch_class(name: str, module: str = "metadata") -> Global:
    """A class of torch.distributed.checkpoint."""
    return Global(f"torch.distributed.checkpoint.{module}", name)


def made(name: str, module: str = "metadata", **attributes: Any) -> Call:
    """An object of such a class, of these attributes."""
    return Call(torch_class(name, module), state=attributes)


def index_of(entries: Mapping[Any, Any], storage: Any) -> Call:
    """A Metadata, of any entries and any storage."""
    return made("Metadata", state_dict_metadata=dict(entries), storage_data=storage)


def tensor_entry(shape: Any = (4,), offsets: Any = (0,), sizes: Any = (4,), dtype: Any = None, **given: Any) -> Call:
    """A TensorStorageMetadata of one chunk."""
    dtype = Global("torch", "float32") if dtype is None else dtype
    chunks = [made("ChunkStorageMetadata", offsets=offsets, sizes=sizes)]
    properties = Call(torch_class("TensorProperties"), state=(dtype, None, False, None, False))
    return made("TensorStorageMetadata", **{"properties": properties, "size": shape, "chunks": chunks, **given})


def stored_at(
    name: Any = "w", at: Any = (0,), *, file: Any = "__0_0.distcp", offset: Any = 0, length: Any = 100
) -> tuple[Call, Call]:
    """A key and a value of storage_data."""
    key = made("MetadataIndex", fqn=name, offset=at, index=None)
    return key, made("_StorageInfo", "filesystem", relative_path=file, offset=offset, length=length)
