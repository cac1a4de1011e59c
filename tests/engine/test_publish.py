"""Which directories a merge may write, and that what stands under the target's name is always whole."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

import nbmerge
from nbmerge import SpaceError, TargetError
from nbmerge.engine.publish import workspace
from nbmerge.engine.target import check_target
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_model_world
from tests.support.processes import as_ordinary_user, in_child
from tests.support.results import assert_same, bits_of_all, content_of, saved_bits
from tests.support.worlds import write_ranks


def assert_is_the_merge(directory: Path) -> None:
    assert_same(saved_bits(directory), bits_of_all(memory_state("llama")))
    assert {"config.json", "tokenizer_config.json", "nbmerge_receipt.json"} <= {
        path.name for path in directory.iterdir()
    }


def refused_and_untouched(ckpt: Path, target: Path, *, overwrite: bool = True) -> str:
    """The refusal; neither the target nor the checkpoint nor anything beside them changes."""
    top = ckpt.parent.parent
    before = content_of(top), sorted(top.rglob("*"))
    message = refusal(TargetError, nbmerge.merge, ckpt, target, overwrite=overwrite)
    assert (content_of(top), sorted(top.rglob("*"))) == before
    dry = refusal(TargetError, nbmerge.merge, ckpt, target, overwrite=overwrite, dry_run=True)
    assert dry == message, "a dry run refuses what the merge would refuse"
    assert isinstance(TargetError("x"), FileExistsError)
    return message


class TestATargetThatExists:
    def test_is_refused_without_being_asked(self, ckpt: Path, out: Path):
        nbmerge.merge(ckpt, out)
        message = refused_and_untouched(ckpt, out, overwrite=False)
        assert_says(message, "the target exists and holds config.json, model.safetensors", str(out), "--overwrite")

    def test_is_used_when_it_is_empty(self, ckpt: Path, out: Path):
        out.mkdir()
        nbmerge.merge(ckpt, out)
        assert_is_the_merge(out)

    def test_is_replaced_when_it_has_our_receipt(self, ckpt: Path, out: Path):
        nbmerge.merge(ckpt, out, max_shard_size="4KB")
        nbmerge.merge(ckpt, out, overwrite=True)
        assert_is_the_merge(out)
        assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
        assert sorted(path.name for path in out.parent.iterdir()) == ["out", "run"]

    def test_is_replaced_when_it_holds_nothing_but_model_files(self, ckpt: Path, out: Path):
        out.mkdir()
        for name in (
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "chat_template.jinja",
            "README.md",
            "merges.txt",
        ):
            (out / name).write_text("old")
        nbmerge.merge(ckpt, out, overwrite=True)
        assert_is_the_merge(out)
        assert not (out / "merges.txt").exists()

    @pytest.mark.parametrize("name", ["thesis.docx", "train.log", "data.csv", ".git"])
    def test_is_refused_when_it_holds_anything_else(self, ckpt: Path, out: Path, name: str):
        out.mkdir()
        (out / "config.json").write_text("{}")
        (out / name).write_text("mine")
        assert_says(refused_and_untouched(ckpt, out), "no part of a model", name, "fix:")

    def test_is_refused_when_it_holds_a_folder(self, ckpt: Path, out: Path):
        (out / "runs" / "1").mkdir(parents=True)
        assert_says(refused_and_untouched(ckpt, out), "no part of a model", "runs")

    def test_is_refused_when_it_is_a_file(self, ckpt: Path, out: Path):
        out.write_text("mine")
        assert_says(refused_and_untouched(ckpt, out), "exists and is a file", str(out))

    @pytest.mark.parametrize("there", [True, False])
    def test_is_refused_when_it_is_a_link(self, ckpt: Path, out: Path, there: bool):
        if there:
            (out.parent / "elsewhere").mkdir()
        out.symlink_to(out.parent / "elsewhere")
        assert_says(refused_and_untouched(ckpt, out), "exists and is a link", str(out))
        assert out.is_symlink()


class TestATargetThatMustNotBe:
    def test_the_checkpoint_itself(self, ckpt: Path):
        assert_says(refused_and_untouched(ckpt, ckpt), "the target is the checkpoint itself", "actor-hf")

    def test_the_checkpoint_by_another_path(self, ckpt: Path, tmp_path: Path):
        (tmp_path / "link").symlink_to(ckpt)
        for path in (tmp_path / "link", tmp_path / "run" / ".." / "run" / "actor"):
            assert_says(refused_and_untouched(ckpt, path), "the target is the checkpoint itself")

    def test_a_parent_of_the_checkpoint(self, ckpt: Path, tmp_path: Path):
        for parent in (ckpt.parent, tmp_path):
            assert_says(refused_and_untouched(ckpt, parent), "the target holds the checkpoint", str(parent))

    def test_the_config_folder_of_the_checkpoint(self, ckpt: Path):
        message = refused_and_untouched(ckpt, ckpt / "huggingface")
        assert_says(message, "huggingface/ is a part of the checkpoint", "config and tokenizer", "fix:")

    def test_the_home_directory(self, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "home").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert_says(refused_and_untouched(ckpt, Path("~")), "home directory")

    def test_the_root(self, ckpt: Path):
        assert_says(refusal(TargetError, nbmerge.merge, ckpt, "/", overwrite=True), "fix:")

    def test_a_path_through_a_file(self, ckpt: Path, tmp_path: Path):
        (tmp_path / "file").touch()
        message = refused_and_untouched(ckpt, tmp_path / "file" / "out")
        assert_says(message, "a file is in the way", str(tmp_path / "file"))

    def test_a_new_folder_inside_the_checkpoint_may_be(self, ckpt: Path):
        nbmerge.merge(ckpt, ckpt / "merged")
        assert_is_the_merge(ckpt / "merged")

    def test_folders_that_are_not_there_are_made(self, ckpt: Path, out: Path):
        nbmerge.merge(ckpt, out / "a" / "b")
        assert_is_the_merge(out / "a" / "b")

    def test_a_directory_without_permission(self, ckpt: Path, tmp_path: Path):
        for path in (tmp_path, *tmp_path.parents):
            if path.owner() == "root" and path.name.startswith(("pytest", "popen", "test_")):
                path.chmod(0o755)
        (tmp_path / "closed").mkdir(mode=0o555)
        plan = nbmerge.plan_merge(ckpt)
        work = partial(refusal, TargetError, nbmerge.merge, plan, tmp_path / "closed" / "out")
        assert_says(as_ordinary_user(work), "permission denied", str(tmp_path / "closed"), "fix:")


class TestTwoMergesAtOnce:
    def test_of_one_plan_the_second_is_told_to_wait(self, ckpt: Path, out: Path):
        plan = nbmerge.plan_merge(ckpt)
        with workspace(check_target(plan, out, overwrite=False)):
            message = refusal(TargetError, nbmerge.merge, plan, out)
        assert_says(message, "another process is merging the same checkpoint to the same target", str(out), "wait")
        nbmerge.merge(plan, out)
        assert_is_the_merge(out)

    def test_of_another_plan_the_one_that_is_finished_first_stays(self, tmp_path: Path, ckpt: Path, out: Path):
        """Its target did not exist when it began, so that it was never asked to replace anything."""
        from nbmerge.merging import write_and_publish

        other = write_model_world(tmp_path / "other", "qwen2")
        plan = nbmerge.plan_merge(other)
        target = check_target(plan, out, overwrite=False)
        nbmerge.merge(ckpt, out)
        message = refusal(TargetError, write_and_publish, plan, target, lambda event: None)
        assert_says(message, "the target exists and holds", "--overwrite")
        assert_is_the_merge(out)

    def test_in_four_processes_one_wins_and_the_result_is_whole(self, ckpt: Path, out: Path):
        plan = nbmerge.plan_merge(ckpt)

        def work() -> str:
            try:
                nbmerge.merge(plan, out)
            except TargetError as error:
                return str(error)
            except Exception as error:  # noqa: BLE001 - told to the parent
                return f"{type(error).__name__}: {error}"
            return ""

        children = []
        for _ in range(4):
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.write(writing, (work() or "merged").encode()[:2000])
                finally:
                    os._exit(0)
            os.close(writing)
            children.append((child, reading))
        answers = []
        for child, reading in children:
            with os.fdopen(reading, "rb") as stream:
                answers.append(stream.read().decode())
            os.waitpid(child, 0)
        assert answers.count("merged") == 1
        assert all("another process" in a or "the target exists" in a for a in answers if a != "merged"), answers
        assert_is_the_merge(out)
        assert sorted(path.name for path in out.parent.iterdir()) == ["out", "run"]

    def test_a_working_directory_that_is_a_link_is_refused(self, ckpt: Path, out: Path, tmp_path: Path):
        plan = nbmerge.plan_merge(ckpt)
        work = check_target(plan, out, overwrite=False).work
        (tmp_path / "trap").mkdir()
        work.symlink_to(tmp_path / "trap")
        assert_says(refusal(TargetError, nbmerge.merge, plan, out), "belongs to somebody else", str(work))
        assert list((tmp_path / "trap").iterdir()) == []


class TestTheDisk:
    def test_that_is_too_small_is_told_before_anything_is_written(
        self, ckpt: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ):
        usage = shutil.disk_usage(out.parent)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        message = refusal(SpaceError, nbmerge.merge, ckpt, out)
        assert_says(message, "bytes more", "1,000 free", str(out.parent), "fix:")
        assert sorted(path.name for path in out.parent.iterdir()) == ["run"]
        assert isinstance(SpaceError("x"), OSError)

    def test_that_became_full_is_told_and_leaves_no_target(self, tmp_path: Path, full_disk: Path, monkeypatch):
        """A real file system of 64 KiB, whose free space another process took after the check."""
        ckpt = write_model_world(tmp_path / "ckpt", "qwen3_vl")
        monkeypatch.setattr("nbmerge.engine.target._check_space", lambda *_: None)
        message = refusal(SpaceError, nbmerge.merge, ckpt, full_disk / "out", max_shard_size="20KB")
        assert_says(
            message, "the disk became full", "No space left", "finished files are kept", "takes up where it stopped"
        )
        assert not (full_disk / "out").exists()

    def test_takes_up_where_it_stopped_when_there_is_space_again(self, tmp_path: Path, full_disk: Path, monkeypatch):
        ckpt = write_model_world(tmp_path / "ckpt", "llama")
        monkeypatch.setattr("nbmerge.engine.target._check_space", lambda *_: None)
        (full_disk / "ballast").write_bytes(bytes(44 * 1024))
        refusal(SpaceError, nbmerge.merge, ckpt, full_disk / "out", max_shard_size="4KB")
        (full_disk / "ballast").unlink()
        report = nbmerge.merge(ckpt, full_disk / "out", max_shard_size="4KB")
        assert 0 < len(report.reused) < len(report.plan.files)
        assert_is_the_merge(full_disk / "out")

    def test_a_limit_on_the_size_of_files_is_told(self, ckpt: Path, out: Path):
        import resource

        def work() -> str:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
            return refusal(SpaceError, nbmerge.merge, ckpt, out)

        assert_says(in_child(work), "the disk became full", "File too large", "fix:")
        assert not out.exists()
        assert list(out.parent.glob("**/*.part")) == []


@pytest.fixture
def full_disk(tmp_path: Path):
    """A file system of 64 KiB, where mounting is allowed."""
    import subprocess

    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_checkpoint_of_one_rank_beside_its_target(tmp_path: Path):
    """The sibling's name begins with a dot, so that it is no checkpoint of a glob."""
    ckpt = write_ranks(tmp_path / "a", [memory_state("llama")])
    from tests.support.models import write_config

    write_config(ckpt / "huggingface", "llama")
    plan = nbmerge.plan_merge(ckpt)
    target = check_target(plan, tmp_path / "out", overwrite=False)
    assert target.work.name.startswith(".out.nbmerge-") and target.work.parent == tmp_path
