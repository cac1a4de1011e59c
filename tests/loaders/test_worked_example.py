"""The loader that CONTRIBUTING.md shows runs as it is printed there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nbmerge.engine.read import read
from nbmerge.engine.sources import LocalFiles
from nbmerge.geometry import Box
from nbmerge.loaders import choose_loader
from nbmerge.loaders.base import Loader, OpenOptions
from tests.support.guide import example


def _loader_of_the_guide() -> Loader:
    loader = example("RowwiseLoader")()
    assert isinstance(loader, Loader)
    return loader


def _write_rows(directory: Path, whole: np.ndarray, counts: list[int]) -> None:
    row, pieces = 0, []
    for rank, count in enumerate(counts):
        (directory / f"rank_{rank}.bin").write_bytes(b"head" + whole[row : row + count].tobytes())
        pieces.append([row, count, 4])
        row += count
    entry = {"dtype": "float32", "shape": list(whole.shape), "pieces": pieces}
    (directory / "parts.json").write_text(json.dumps({"world_size": len(counts), "tensors": {"w": entry}}))


def test_the_loader_of_the_guide_is_chosen_and_reads_every_bit(tmp_path: Path) -> None:
    whole = np.arange(35, dtype=np.float32).reshape(7, 5)
    _write_rows(tmp_path, whole, [3, 3, 1, 0])
    loader = choose_loader(tmp_path, "auto", [_loader_of_the_guide()])
    tensor = loader.open(tmp_path, OpenOptions())["w"]
    assert tensor.shape == (7, 5)
    with LocalFiles() as sources:
        bits = read(tensor.expr, Box.whole(tensor.shape), sources)
    assert bits.view(np.float32).tobytes() == whole.tobytes()


def test_the_loader_of_the_guide_does_not_claim_a_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert _loader_of_the_guide().evidence(tmp_path) == ()
