"""Which directory is a checkpoint, and what is said of one that is none."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import AmbiguousCheckpointError, CheckpointError, NotACheckpointError, OptionError, open_checkpoint
from nbmerge.layout import Checkpoint
from nbmerge.loaders import LOADERS, choose_loader
from nbmerge.loaders.base import Loader, OpenOptions
from nbmerge.loaders.fsdp import FSDPLoader
from nbmerge.options import BACKENDS
from tests.support.messages import assert_says, refusal
from tests.support.processes import as_ordinary_user
from tests.support.worlds import rank_file, write_ranks

STATE = {"w": torch.ones(2)}


def test_a_directory_that_is_no_checkpoint_is_told_by_what_it_holds(tmp_path: Path):
    for name in ("a.json", "b.json", "notes.txt", "LICENSE"):
        (tmp_path / name).touch()
    (tmp_path / "logs").mkdir()
    message = refusal(NotACheckpointError, open_checkpoint, tmp_path)
    assert_says(
        message, str(tmp_path), "2 .json", "1 .txt", "1 other", "1 directory (logs)", "model_world_size_N_rank_R.pt",
        "fix:", "the files of all ranks",
    )  # fmt: skip


def test_an_empty_directory_holds_nothing(tmp_path: Path):
    assert_says(refusal(NotACheckpointError, open_checkpoint, tmp_path), "it holds nothing")


def test_the_nearest_checkpoint_below_is_named(tmp_path: Path):
    for step in (100, 20):
        write_ranks(tmp_path / f"global_step_{step}" / "actor", [STATE])
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    message = refusal(NotACheckpointError, open_checkpoint, tmp_path)
    assert_says(message, "2 directories", str(tmp_path / "global_step_100" / "actor"), "global_step_20")


def test_huggingface_of_a_checkpoint_is_not_the_checkpoint(tmp_path: Path):
    write_ranks(tmp_path / "actor", [STATE])
    (tmp_path / "actor" / "huggingface").mkdir()
    message = refusal(NotACheckpointError, open_checkpoint, tmp_path / "actor" / "huggingface")
    assert_says(message, "it holds nothing")


def test_a_missing_directory_is_told_with_its_neighbours(tmp_path: Path):
    (tmp_path / "global_step_10").mkdir()
    message = refusal(NotACheckpointError, open_checkpoint, tmp_path / "global_step_1")
    assert_says(message, "no such directory", str(tmp_path / "global_step_1"), f"{tmp_path} holds global_step_10")
    assert isinstance(NotACheckpointError("x"), FileNotFoundError)


def test_a_missing_directory_in_a_missing_directory(tmp_path: Path):
    assert_says(refusal(NotACheckpointError, open_checkpoint, tmp_path / "a" / "b"), "no such directory", "fix:")


def test_a_file_in_the_place_of_the_directory(tmp_path: Path):
    write_ranks(tmp_path, [STATE])
    message = refusal(NotACheckpointError, open_checkpoint, rank_file(tmp_path, 1, 0))
    assert_says(message, "this is a file; a checkpoint is a directory", f"pass {tmp_path}")


def test_a_home_directory_given_by_mistake_is_not_searched_for_ever(tmp_path: Path):
    for i in range(60):
        for j in range(60):
            (tmp_path / f"d{i}" / f"e{j}").mkdir(parents=True)
    write_ranks(tmp_path / "d59" / "e59" / "ckpt", [STATE])
    assert_says(refusal(NotACheckpointError, open_checkpoint, tmp_path), "60 directories (d0, d1, d10 and 57 more)")


def test_the_tilde_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_ranks(tmp_path / "ckpt", [STATE])
    assert list(open_checkpoint("~/ckpt").tensors) == ["w"]


class TestPermissions:
    """As a user who may not read; root may read everything."""

    @pytest.fixture
    def ckpt(self, tmp_path: Path) -> Path:
        for path in (tmp_path, *tmp_path.parents):
            if path.owner() == "root" and path.name.startswith(("pytest", "popen", "test_")):
                path.chmod(0o755)
        return write_ranks(tmp_path / "ckpt", [STATE])

    def message(self, ckpt: Path) -> str:
        return as_ordinary_user(partial(refusal, CheckpointError, open_checkpoint, ckpt))

    def test_a_checkpoint_that_may_be_read_is_read(self, ckpt: Path):
        assert as_ordinary_user(lambda: list(open_checkpoint(ckpt).tensors)) == ["w"]

    def test_a_directory_that_may_not_be_read(self, ckpt: Path):
        ckpt.chmod(0o000)
        assert_says(self.message(ckpt), "permission denied", str(ckpt), "fix:")

    def test_a_file_that_may_not_be_read(self, ckpt: Path):
        rank_file(ckpt, 1, 0).chmod(0o000)
        assert_says(self.message(ckpt), "permission denied", str(rank_file(ckpt, 1, 0)), "fix:")

    def test_a_directory_whose_parent_may_not_be_read(self, ckpt: Path):
        ckpt.parent.chmod(0o000)
        try:
            assert_says(self.message(ckpt), "permission denied", str(ckpt), "fix:")
        finally:
            ckpt.parent.chmod(0o755)

    def test_what_is_below_and_may_not_be_read_is_passed_over(self, ckpt: Path):
        (ckpt.parent / "a").mkdir(mode=0o000)
        (ckpt.parent / "a").chmod(0o000)
        message = as_ordinary_user(partial(refusal, NotACheckpointError, open_checkpoint, ckpt.parent))
        assert_says(message, f"pass {ckpt}")


class TestTheVote:
    class Other(FSDPLoader):
        name = "other"
        recognises = "the same files"

    def test_two_layouts_in_one_directory_are_a_question_to_the_user(self, tmp_path: Path):
        write_ranks(tmp_path, [STATE])
        message = refusal(AmbiguousCheckpointError, choose_loader, tmp_path, "auto", (FSDPLoader(), self.Other()))
        assert_says(message, "2 layouts", "fsdp: 1 × model_world_size_1_rank_*.pt", "--backend fsdp or other")

    def test_the_user_decides(self, tmp_path: Path):
        write_ranks(tmp_path, [STATE])
        assert choose_loader(tmp_path, "other", (FSDPLoader(), self.Other())).name == "other"

    def test_a_backend_that_finds_nothing_of_its_own(self, tmp_path: Path):
        message = refusal(NotACheckpointError, choose_loader, tmp_path, "fsdp")
        assert_says(message, "model_world_size_N_rank_R.pt (fsdp)")

    def test_a_backend_that_this_version_has_not(self, tmp_path: Path):
        write_ranks(tmp_path, [STATE])
        assert_says(refusal(OptionError, open_checkpoint, tmp_path, "nemo"), "'nemo'", "fsdp", "leave it out")


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
class TestEveryLoader:
    """The contract that a new loader keeps."""

    def test_has_a_name_and_a_sentence(self, loader: Loader):
        assert loader.name.islower() and loader.recognises

    def test_has_no_evidence_in_an_empty_directory(self, loader: Loader, tmp_path: Path):
        assert loader.evidence(tmp_path) == ()

    def test_is_one_of_a_kind(self, loader: Loader):
        assert [other.name for other in LOADERS].count(loader.name) == 1


class Rows(Loader):
    """A layout of somebody's own: each rank's rows in a .npy file."""

    name = "rows"
    recognises = "rows_of_rank_R.npy"

    def evidence(self, directory: Path) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in directory.glob("rows_of_rank_*.npy")))

    def open(self, directory: Path, options: OpenOptions) -> Checkpoint:
        return Checkpoint(directory, self.name, "rows", {}, len(self.evidence(directory)), (), None)


@pytest.fixture
def registered() -> Iterator[None]:
    loaders, backends = list(LOADERS), list(BACKENDS)
    nbmerge.register_loader(Rows())
    yield
    LOADERS[:], BACKENDS[:] = loaders, backends


def test_a_loader_of_ones_own_votes_and_can_be_named(registered: None, tmp_path: Path) -> None:
    (tmp_path / "rows_of_rank_0.npy").touch()
    assert nbmerge.open_checkpoint(tmp_path).backend == "rows"
    assert nbmerge.open_checkpoint(tmp_path, backend="rows").world_size == 1
    nbmerge.register_loader(Rows())
    assert [loader.name for loader in LOADERS].count("rows") == BACKENDS.count("rows") == 1
    (tmp_path / "model.safetensors").write_bytes(b"")
    said = refusal(nbmerge.AmbiguousCheckpointError, nbmerge.open_checkpoint, tmp_path)
    assert_says(said, "rows: rows_of_rank_0.npy", "--backend hf or rows")


def test_a_loader_shows_its_evidence_in_the_directory_it_was_chosen_for(registered: None, tmp_path: Path) -> None:
    (tmp_path / "rows_of_rank_0.npy").touch()
    assert "evidence   rows_of_rank_0.npy" in repr(choose_loader(tmp_path, "auto"))
    assert "evidence" not in repr(Rows())


def test_a_name_of_nbmerges_own_is_refused() -> None:
    class Taken(Rows):
        name = "fsdp"

    assert_says(refusal(nbmerge.OptionError, nbmerge.register_loader, Taken()), "'fsdp' is the name of a back end")
