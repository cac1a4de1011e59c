"""What every loader must keep, as a test class: subclass it in a test module, say how to write a checkpoint.

class TestMyLoader(LoaderContract):
    loader = MyLoader()

    def write(self, directory, tensors):
        ...                             # as the framework does, on several ranks
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nbmerge.errors import NbmergeError
from nbmerge.expressions import Stored, fingerprint, walk
from nbmerge.geometry import Box
from nbmerge.layout import Checkpoint
from nbmerge.loaders.base import Loader, OpenOptions

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]


class LoaderContract(ABC):
    """The promises of a loader: it gives back what was saved, reads no tensor data for it, and misses nothing.

    A subclass sets `loader` and defines `write`; where its framework stores less than all dtypes, layouts or names, it
    overrides `kept` or a set of tensors, and says why. pytest collects the subclass; this class needs no pytest.
    """

    loader: ClassVar[Loader]

    @abstractmethod
    def write(self, directory: Path, tensors: Tensors) -> None:
        """Saves the tensors into the directory, which is there, as the framework does on two ranks or more."""

    def kept(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """What the checkpoint holds of a tensor that was saved: by default the tensor itself."""
        return tensor

    def opened(self, directory: Path) -> Checkpoint:
        """The directory as this loader opens it. Raises what opening raises."""
        return self.loader.open(directory, OpenOptions())

    def weight_files(self, directory: Path) -> list[Path]:
        """The files without any of which the checkpoint is not whole: by default all that hold weights."""
        return [file.path for file in self.opened(directory).files if file.role == "weights"]

    # The tensors that the tests save; `layer.N.` stands where frameworks have it.

    def even(self) -> Tensors:
        """Rows that divide by 2 and 4."""
        return {"model.layers.0.mlp.weight": _numbers(8, 6), "model.norm.weight": _numbers(4)}

    def uneven(self) -> Tensors:
        """Rows that no number of ranks divides."""
        return {"model.layers.0.mlp.weight": _numbers(7, 3), "model.layers.1.mlp.weight": _numbers(5, 2, 3)}

    def empty(self) -> Tensors:
        """Fewer rows than ranks, so that some hold nothing."""
        return {"model.layers.0.mlp.weight": _numbers(1, 6), "model.norm.weight": _numbers(1)}

    def scalars(self) -> Tensors:
        """Tensors without a dimension."""
        import torch

        return {"model.layers.0.scale": torch.tensor(3.25), "model.layers.0.mlp.weight": _numbers(4, 2)}

    def integers(self) -> Tensors:
        """Counters, indices and flags beside the weights."""
        import torch

        return {
            "model.layers.0.steps": torch.tensor(2**40 + 1),
            "model.layers.0.index": torch.arange(9, dtype=torch.int64) - 4,
            "model.layers.0.mask": torch.tensor([True, False, True]),
            "model.layers.0.mlp.weight": _numbers(4, 2),
        }

    def halves(self) -> Tensors:
        """The 16-bit dtypes, with infinities, -0.0 and a NaN that has a payload."""
        import torch

        odd = torch.tensor([0x7F80, -0x80, 0x7FC1, -0x8000, 1, 0], dtype=torch.int16).view(torch.bfloat16)
        return {"model.layers.0.mlp.weight": odd.reshape(2, 3), "model.norm.weight": _numbers(5).half()}

    def tied(self) -> Tensors:
        """One tensor under two names."""
        table = _numbers(6, 4)
        return {"model.embed_tokens.weight": table, "lm_head.weight": table}

    def padded(self) -> Tensors:
        """A view of a larger storage, and one that is turned."""
        return {"model.layers.0.mlp.weight": _numbers(9, 4)[1:6], "model.layers.1.mlp.weight": _numbers(3, 5).t()}

    def replicated(self) -> Tensors:
        """What frameworks keep whole on every rank: buffers and norms."""
        return {"model.norm.weight": _numbers(3), "model.layers.0.mlp.weight": _numbers(6, 3)}

    # The promises.

    def test_recognises_its_own(self, tmp_path: Path) -> None:
        """Evidence, a layout in words, every file with its role."""
        self.write(tmp_path, self.even())
        assert self.loader.evidence(tmp_path), "a checkpoint of its own layout is not recognised"
        checkpoint = self.opened(tmp_path)
        assert checkpoint.backend == self.loader.name
        assert checkpoint.layout
        assert checkpoint.world_size >= 1
        assert not checkpoint.problems
        assert {file.path.resolve() for file in checkpoint.files if file.role == "weights"}

    def test_claims_no_foreign_directory(self, tmp_path: Path) -> None:
        """Nothing, papers, pictures, a config alone, files of the same suffix that are something else."""
        for number, files in enumerate(_FOREIGN):
            directory = tmp_path / f"foreign {number}"
            directory.mkdir()
            for name, content in files.items():
                (directory / name).write_bytes(content)
            assert not self.loader.evidence(directory), f"claims a directory of {sorted(files)}"

    def test_gives_back_even_shards(self, tmp_path: Path) -> None:
        """See `even`."""
        self._gives_back(tmp_path, self.even())

    def test_gives_back_uneven_shards(self, tmp_path: Path) -> None:
        """See `uneven`."""
        self._gives_back(tmp_path, self.uneven())

    def test_gives_back_what_some_ranks_hold_nothing_of(self, tmp_path: Path) -> None:
        """See `empty`."""
        self._gives_back(tmp_path, self.empty())

    def test_gives_back_scalars(self, tmp_path: Path) -> None:
        """See `scalars`."""
        self._gives_back(tmp_path, self.scalars())

    def test_gives_back_integers(self, tmp_path: Path) -> None:
        """See `integers`."""
        self._gives_back(tmp_path, self.integers())

    def test_gives_back_every_bit_of_16(self, tmp_path: Path) -> None:
        """See `halves`."""
        self._gives_back(tmp_path, self.halves())

    def test_gives_back_tied_tensors(self, tmp_path: Path) -> None:
        """See `tied`. A framework may leave out a name; what it keeps must be right."""
        self._gives_back(tmp_path, self.tied())

    def test_gives_back_views_of_larger_storages(self, tmp_path: Path) -> None:
        """See `padded`."""
        self._gives_back(tmp_path, self.padded())

    def test_gives_back_replicated_tensors(self, tmp_path: Path) -> None:
        """See `replicated`."""
        self._gives_back(tmp_path, self.replicated())

    def test_misses_every_missing_file(self, tmp_path: Path) -> None:
        """Without any one of its files a checkpoint is an error, never a smaller checkpoint."""
        self.write(tmp_path, self.even())
        for path in self.weight_files(tmp_path):
            content = path.read_bytes()
            path.unlink()
            assert self._error(tmp_path) is not None, f"opens without {path.name}"
            path.write_bytes(content)

    def test_misses_every_truncated_file(self, tmp_path: Path) -> None:
        """A file that lost its end, or half of it, is an error that names it."""
        self.write(tmp_path, self.even())
        for path in self.weight_files(tmp_path):
            content = path.read_bytes()
            for length in (len(content) - 1, len(content) // 2, 0):
                path.write_bytes(content[:length])
                said = self._error(tmp_path)
                assert said is not None, f"opens with {length:,} of {len(content):,} bytes of {path.name}"
                assert path.name in said or path.parent.name in said, f"does not name {path.name}: {said}"
            path.write_bytes(content)

    def test_reads_no_tensor_data(self, tmp_path: Path) -> None:
        """Where every byte of every tensor is another one, the index is the same."""
        self.write(tmp_path, self.even())
        before = self.opened(tmp_path)
        for stored in _stored(before):
            assert stored.offset >= 0, "bytes before the file's first"
            assert stored.offset + stored.nbytes <= Path(stored.file).stat().st_size, "bytes beyond the file's end"
            _invert(stored)
        after = self.opened(tmp_path)
        assert _index(after) == _index(before)

    def _gives_back(self, directory: Path, tensors: Tensors) -> None:
        from nbmerge.engine.read import read, to_torch
        from nbmerge.engine.sources import LocalFiles

        self.write(directory, tensors)
        checkpoint = self.opened(directory)
        assert set(checkpoint.tensors) <= set(tensors), "names that were not saved"
        pointers = {tensors[name].data_ptr() for name in checkpoint.tensors}
        lost = [name for name in tensors if name not in checkpoint and tensors[name].data_ptr() not in pointers]
        assert not lost, f"lost {lost}"
        with LocalFiles() as files:
            for name, lazy in checkpoint.tensors.items():
                want = self.kept(name, tensors[name])
                assert lazy.shape == tuple(want.shape), name
                assert f"torch.{lazy.dtype}" == str(want.dtype), name
                got = to_torch(read(lazy.expr, Box.whole(lazy.shape), files), lazy.dtype)
                assert _bytes(got) == _bytes(want), f"{name} has other bits"

    def _error(self, directory: Path) -> str | None:
        """What opening says; None where it opens. A directory that is not recognised any more is not opened."""
        if not self.loader.evidence(directory):
            return f"not recognised: {directory} " + " ".join(path.name for path in directory.rglob("*"))
        try:
            self.opened(directory)
        except NbmergeError as error:
            return str(error)
        return None


_FOREIGN: tuple[Mapping[str, bytes], ...] = (
    {},
    {"README.md": b"# notes\n", "paper.pdf": b"%PDF-1.7\n", "run.log": b"step 1\n"},
    {"config.json": json.dumps({"model_type": "llama"}).encode(), "tokenizer.json": b"{}"},
    {"latest": b"not a tag\n", "metadata.json": b"[]", ".metadata": b"", "model.txt": b""},
    {"weights.npz": b"PK\x03\x04", "photo.png": b"\x89PNG\r\n", "events.out.tfevents.1": b"\0" * 16},
)


def _numbers(*shape: int) -> torch.Tensor:
    """Other values in every tensor of another shape, none of which is a 16-bit number."""
    import torch

    count = 1
    for size in shape:
        count *= size
    return (torch.arange(count, dtype=torch.float32) + count / 3 + 1 / 7).reshape(shape)


def _bytes(tensor: torch.Tensor) -> bytes:
    import torch

    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _stored(checkpoint: Checkpoint) -> Iterable[Stored]:
    """Every range of bytes that tensors are made of, each once."""
    nodes = (node for tensor in checkpoint.tensors.values() for node in walk(tensor.expr))
    return dict.fromkeys(node for node in nodes if isinstance(node, Stored) and node.is_contiguous and node.nbytes)


def _invert(stored: Stored) -> None:
    with Path(stored.file).open("r+b") as stream:
        stream.seek(stored.offset)
        content = stream.read(stored.nbytes)
        stream.seek(stored.offset)
        stream.write(bytes(byte ^ 0xFF for byte in content))


def _index(checkpoint: Checkpoint) -> Mapping[str, list[str]]:
    return {name: list(fingerprint(tensor.expr)) for name, tensor in checkpoint.tensors.items()}
