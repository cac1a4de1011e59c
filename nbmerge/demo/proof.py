"""Proves a merged directory equal to the model that was sharded, without any code of the merge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbmerge.demo.recipes import DemoCheckpoint
from nbmerge.errors import listing

# dtype, shape and bytes of a tensor.
Raw = tuple[str, tuple[int, ...], bytes]


def differences(merged: Path, demo: DemoCheckpoint) -> list[str]:
    """What is not bit-equal, in words: of the files, and of the model that transformers loads from them."""
    return differences_on_disk(merged, demo.reference) + differences_when_loaded(merged, demo.state)


def differences_on_disk(merged: Path, reference: Path) -> list[str]:
    """Compares names, dtypes, shapes and bytes of the safetensors files of two directories."""
    return _compare(raw_tensors(merged), raw_tensors(reference))


def differences_when_loaded(merged: Path, state: Path) -> list[str]:
    """Loads the directory with transformers and compares every tensor of the state dict with the one in `state`."""
    import torch

    loaded = load_model(merged).state_dict()
    truth = torch.load(state, weights_only=True)
    return _compare(*({name: _raw(tensor) for name, tensor in side.items()} for side in (loaded, truth)))


def load_model(directory: Path) -> Any:
    """The model of a Hugging Face directory, in the class that its config names and the dtype of its weights."""
    import transformers

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    with _without_progress_bars():
        return getattr(transformers, config["architectures"][0]).from_pretrained(directory, dtype="auto")


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def raw_tensors(directory: Path) -> dict[str, Raw]:
    """Every tensor of the safetensors files in a directory, read byte by byte without a library."""
    found: dict[str, Raw] = {}
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            if name in found:
                raise ValueError(f"{name} stands in two files of {directory}")
            found[name] = (entry["dtype"], tuple(entry["shape"]), data[start + first : start + last])
    return found


def _raw(tensor: Any) -> Raw:
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _compare(got: Mapping[str, Raw], want: Mapping[str, Raw]) -> list[str]:
    lines = []
    for what, names in (("missing", want.keys() - got.keys()), ("not in the model", got.keys() - want.keys())):
        if names:
            lines.append(f"{what}: {listing(sorted(names))}")
    for name in sorted(got.keys() & want.keys()):
        (dtype, shape, data), (true_dtype, true_shape, true_data) = got[name], want[name]
        if (dtype, shape) != (true_dtype, true_shape):
            lines.append(f"{name} is {dtype} {list(shape)}, was {true_dtype} {list(true_shape)}")
        elif data != true_data:
            wrong = sum(a != b for a, b in zip(data, true_data, strict=True))
            lines.append(f"{name}: {wrong:,} of {len(data):,} bytes differ")
    return lines
