"""A merge from end to end: what is written, what is said, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nbmerge
from nbmerge import (
    CorruptFileError,
    InconsistentCheckpointError,
    MergePlan,
    NotACheckpointError,
    OptionError,
    SpaceError,
    VerificationError,
)
from nbmerge.engine import copy
from nbmerge.engine.target import check_target
from tests.support.messages import assert_says, refusal
from tests.support.models import memory_state, write_config, write_model_world
from tests.support.results import assert_same, bits_of_all, content_of, receipt_of, saved_bits
from tests.support.worlds import rank_file, write_mesh_world, write_ranks


def assert_is_the_merge(directory: Path) -> None:
    assert_same(saved_bits(directory), bits_of_all(memory_state("llama")))


class TestWhatIsWritten:
    def test_every_side_file_is_copied_byte_for_byte(self, ckpt: Path, out: Path):
        hf = ckpt / "huggingface"
        sides = {
            "tokenizer.json": b'{"a":\t1}\r\n', "tokenizer.model": bytes(range(256)), "vocab.json": b"{}",
            "merges.txt": "ü\n".encode(), "chat_template.jinja": b"{{ x }}", "generation_config.json": b'{"a": 1}\n',
            "preprocessor_config.json": b"{}", "modeling_custom.py": b"x = 1\n",
            "additional_chat_templates/tool.jinja": b"{{ y }}",
        }  # fmt: skip
        (hf / "additional_chat_templates").mkdir()
        for name, content in sides.items():
            (hf / name).write_bytes(content)
        for name in ("pytorch_model.bin", "old.safetensors", ".hidden", "train.log", "model.safetensors.index.json"):
            (hf / name).write_bytes(b"not these")
        nbmerge.merge(ckpt, out)
        written = content_of(out)
        assert {name: written.get(name) for name in sides} == sides
        assert written.keys() - sides.keys() == {
            "config.json", "tokenizer_config.json", "model.safetensors", "nbmerge_receipt.json",
        }  # fmt: skip
        assert written["tokenizer_config.json"] == (hf / "tokenizer_config.json").read_bytes()

    def test_a_config_that_says_the_right_dtype_stays_as_it_is_byte_for_byte(self, ckpt: Path, out: Path):
        config = ckpt / "huggingface" / "config.json"
        content = json.loads(config.read_text())
        text = json.dumps({**content, "dtype": "float32", "odd": "ключ"}, indent=7, ensure_ascii=False) + "\n\n"
        config.write_text(text)
        nbmerge.merge(ckpt, out)
        assert (out / "config.json").read_text() == text
        assert receipt_of(out)["config_edits"] == {}

    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_the_dtype_of_the_config_becomes_that_of_the_weights(self, ckpt: Path, out: Path, key: str):
        config = ckpt / "huggingface" / "config.json"
        content = {k: v for k, v in json.loads(config.read_text()).items() if k != "dtype"}
        config.write_text(json.dumps({**content, key: "bfloat16", "odd": [1, {"a": None}]}))
        nbmerge.merge(ckpt, out)
        want = {**content, key: "float32", "odd": [1, {"a": None}]}
        assert json.loads((out / "config.json").read_text()) == want
        assert receipt_of(out)["config_edits"] == {key: {"from": "bfloat16", "to": "float32"}}

    def test_many_files_have_an_index_that_the_library_agrees_with(self, ckpt: Path, out: Path):
        from huggingface_hub import split_torch_state_dict_into_shards

        report = nbmerge.merge(ckpt, out, max_shard_size="4KB")
        state = memory_state("llama")
        theirs = split_torch_state_dict_into_shards(
            state, filename_pattern="model{suffix}.safetensors", max_shard_size="4KB"
        )
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == theirs.tensor_to_filename
        assert index["metadata"]["total_size"] == theirs.metadata["total_size"]
        assert len(report.plan.files) == len(list(out.glob("*.safetensors"))) > 3
        assert_is_the_merge(out)

    def test_one_file_has_no_index(self, ckpt: Path, out: Path):
        nbmerge.merge(ckpt, out)
        assert [path.name for path in out.glob("model*")] == ["model.safetensors"]

    @pytest.mark.parametrize("workers", [1, 2, 7])
    def test_the_number_of_threads_changes_nothing(self, ckpt: Path, tmp_path: Path, workers: int):
        nbmerge.merge(ckpt, tmp_path / "out", workers=workers, max_shard_size="4KB")
        assert_is_the_merge(tmp_path / "out")

    def test_the_checkpoint_is_not_touched(self, ckpt: Path, out: Path):
        before = content_of(ckpt), {path: path.stat().st_mtime_ns for path in ckpt.rglob("*")}
        nbmerge.merge(ckpt, out)
        assert (content_of(ckpt), {path: path.stat().st_mtime_ns for path in ckpt.rglob("*")}) == before

    def test_nothing_else_is_left_beside_the_target(self, ckpt: Path, out: Path):
        nbmerge.merge(ckpt, out)
        assert sorted(path.name for path in out.parent.iterdir()) == ["out", "run"]


class TestTheReceipt:
    def test_says_what_was_read_and_what_was_written(self, ckpt: Path, out: Path):
        report = nbmerge.merge(ckpt, out, max_shard_size="4KB", digests=True)
        receipt = receipt_of(out)
        assert receipt == report.receipt
        assert receipt["plan_digest"] == report.plan.digest
        assert receipt["source"]["path"] == str(ckpt)
        assert (receipt["source"]["backend"], receipt["source"]["world_size"]) == ("fsdp", 2)
        assert receipt["source"]["mesh"] == ["fsdp=2: Shard(0)"]
        read = {f["name"]: (f["bytes"], f["mtime_ns"]) for f in receipt["source"]["files"] if f["role"] == "weights"}
        assert read == {
            path.name: (path.stat().st_size, path.stat().st_mtime_ns)
            for path in (rank_file(ckpt, 2, r) for r in (0, 1))
        }
        assert {f["name"]: (f["bytes"], f["sha256"]) for f in receipt["files"]} == {
            path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in out.glob("*.safetensors")
        }
        assert receipt["options"] == {"max_shard_size": "4KB", "digests": True}
        assert receipt["model"] == {"class": "LlamaForCausalLM", "source_names": "transformers", "renamed": 0}
        assert receipt["total_size"] == sum(tensor.nbytes for tensor in memory_state("llama").values())
        assert set(receipt["versions"]) >= {"nbmerge-ckpt", "torch", "transformers", "safetensors"}
        assert (receipt["casts"], receipt["drops"], receipt["ties"], receipt["drift"]) == ([], [], [], [])

    def test_has_no_digests_unless_asked(self, ckpt: Path, out: Path):
        nbmerge.merge(ckpt, out)
        assert all("sha256" not in file for file in receipt_of(out)["files"])

    def test_two_merges_of_the_same_write_the_same_bytes(self, ckpt: Path, tmp_path: Path):
        for name in ("a", "b"):
            nbmerge.merge(ckpt, tmp_path / name, max_shard_size="8KB")
        assert content_of(tmp_path / "a") == content_of(tmp_path / "b")


class TestReplicas:
    def drifted(self, directory: Path, rows: int) -> Path:
        """HSDP whose second replica was trained apart in one element of one tensor."""
        from torch.distributed.tensor import Replicate, Shard

        state = memory_state("llama")
        place = lambda *_: [Replicate(), Shard(0)]  # noqa: E731
        write_mesh_world(directory, state, (2, 2), ("ddp", "fsdp"), place)
        state["model.norm.weight"][rows] += 1
        other = write_mesh_world(directory.with_name("other"), state, (2, 2), ("ddp", "fsdp"), place)
        rank_file(other, 4, 3).replace(rank_file(directory, 4, 3))
        write_config(directory / "huggingface", "llama")
        return directory

    @pytest.mark.parametrize("probed", [2**20, 0], ids=["while planning", "while copying"])
    def test_that_drifted_apart_are_told_and_the_lowest_rank_is_written(
        self, tmp_path: Path, out: Path, probed: int, monkeypatch: pytest.MonkeyPatch
    ):
        from nbmerge import equalities

        monkeypatch.setattr(equalities, "_PROBED", probed)
        report = nbmerge.merge(self.drifted(tmp_path / "ckpt", 13), out)
        assert [drift.name for drift in report.drift] == ["model.norm.weight"]
        (told,) = receipt_of(out)["drift"]
        assert told["tensor"] == "model.norm.weight" and told["first"] == [13]
        assert (told["ranks"], told["written"]) == ([1, 3], 1)
        assert_is_the_merge(out)

    def test_that_are_equal_are_said_to_be_compared(self, tmp_path: Path, out: Path):
        from torch.distributed.tensor import Replicate

        write_mesh_world(tmp_path / "ckpt", memory_state("llama"), (2,), ("ddp",), lambda *_: [Replicate()])
        write_config(tmp_path / "ckpt" / "huggingface", "llama")
        nbmerge.merge(tmp_path / "ckpt", out)
        assert set(receipt_of(out)["compared"]) == set(memory_state("llama"))
        assert_is_the_merge(out)

    def test_of_0_dimensional_buffers_are_compared_by_their_bits(self, tmp_path: Path):
        states = [{"scale": torch.tensor(value)} for value in (2.0, 2.0, 3.0)]
        ckpt = nbmerge.open_checkpoint(write_ranks(tmp_path, states))
        from nbmerge.engine.comparison import first_difference
        from nbmerge.engine.sources import LocalFiles

        (chunk,) = ckpt["scale"].chunks
        with LocalFiles() as sources:
            found = {rank: first_difference(chunk.stored, copy, 64, sources) for rank, copy in chunk.replicas}
        assert found == {1: None, 2: ()}


# Failures. Each leaves what stood under the target's name, and a second run completes it.


def failing(module: object, name: str, at: int, error: BaseException, *, ever_after: bool = False):
    """Makes the `at`-th call of a function fail, and every later one where it is said."""
    real, calls = getattr(module, name), [0]

    def function(*args: object, **kwargs: object) -> object:
        calls[0] += 1
        if calls[0] == at or (ever_after and calls[0] > at):
            raise error
        return real(*args, **kwargs)

    return function


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
POINTS: dict[str, tuple[str, str, int, BaseException, type[BaseException]]] = {
    "the first copy": ("copy", "carry_out", 1, FULL, SpaceError),
    "a later copy": ("copy", "carry_out", 4, FULL, SpaceError),
    "a header": ("copy", "write_all", 1, FULL, SpaceError),
    "the sync of a file": ("os", "fsync", 2, FULL, SpaceError),
    "the sync of a side file": ("os", "fsync", 8, FULL, SpaceError),
    "a broken disk": ("copy", "carry_out", 3, OSError(errno.EIO, "Input/output error"), OSError),
    "an interrupt": ("copy", "carry_out", 3, KeyboardInterrupt(), KeyboardInterrupt),
    "a side file": ("merging", "write_synced", 1, FULL, SpaceError),
    "the index": ("merging", "write_synced", 2, FULL, SpaceError),
    "the receipt": ("merging", "write_synced", 3, FULL, SpaceError),
    "the verification": ("merging", "verify", 1, VerificationError("planted"), VerificationError),
    "the publication": ("merging", "publish", 1, FULL, SpaceError),
    "a bug": ("merging", "write_files", 1, ZeroDivisionError(), ZeroDivisionError),
}


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("point", POINTS)
class TestAFailure:
    def test_leaves_what_was_there_and_a_second_run_completes_it(
        self, ckpt: Path, out: Path, point: str, existing: bool, monkeypatch: pytest.MonkeyPatch
    ):
        from nbmerge import merging

        where, name, at, error, told = POINTS[point]
        module = {"copy": copy, "os": os, "merging": merging}[where]
        if existing:
            nbmerge.merge(write_model_world(out.with_name("old"), "qwen2"), out)
        before = content_of(out)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, failing(module, name, at, error))
            with pytest.raises(told) as caught:
                nbmerge.merge(ckpt, out, max_shard_size="4KB", overwrite=existing)
        if told is SpaceError:
            assert_says(str(caught.value), "the disk became full", "No space left on device", "fix:")
        assert content_of(out) == before
        assert out.exists() == existing
        assert list(out.parent.glob("**/*.part")) == []
        assert list(out.parent.glob("**/*.lock")) == []
        nbmerge.merge(ckpt, out, max_shard_size="4KB", overwrite=existing)
        assert_is_the_merge(out)
        assert list(out.parent.glob(".out*")) == []


class TestResumption:
    def interrupted(self, ckpt: Path, out: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> MergePlan:
        plan = nbmerge.plan_merge(ckpt, max_shard_size="4KB", workers=1)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os, "fsync", at, FULL, ever_after=True))
            message = refusal(SpaceError, nbmerge.merge, plan, out)
        assert_says(message, f"{at - 1} finished files are kept")
        return plan

    def test_names_the_files_that_an_earlier_run_had_finished(self, ckpt: Path, out: Path, monkeypatch):
        plan = self.interrupted(ckpt, out, 3, monkeypatch)
        report = nbmerge.merge(ckpt, out, max_shard_size="4KB")
        assert report.reused == tuple(file.name for file in plan.files[:2])
        assert report.written_bytes == sum(file.size for file in plan.files[2:])
        assert_is_the_merge(out)

    def test_works_with_another_number_of_threads(self, ckpt: Path, out: Path, monkeypatch):
        self.interrupted(ckpt, out, 3, monkeypatch)
        assert len(nbmerge.merge(ckpt, out, max_shard_size="4KB", workers=5).reused) == 2

    def test_starts_anew_when_the_options_would_write_other_bytes(self, ckpt: Path, out: Path, monkeypatch):
        self.interrupted(ckpt, out, 3, monkeypatch)
        assert nbmerge.merge(ckpt, out, max_shard_size="4KB", dtype="bfloat16").reused == ()

    def test_starts_anew_when_a_source_was_touched(self, ckpt: Path, out: Path, monkeypatch):
        self.interrupted(ckpt, out, 3, monkeypatch)
        os.utime(rank_file(ckpt, 2, 0))
        assert nbmerge.merge(ckpt, out, max_shard_size="4KB").reused == ()

    def test_does_not_take_what_is_no_whole_file_of_the_plan(self, ckpt: Path, out: Path, monkeypatch):
        plan = self.interrupted(ckpt, out, 3, monkeypatch)
        work = check_target(plan, out, overwrite=False).work
        first, second = plan.files[:2]
        (work / first.name).write_bytes((work / first.name).read_bytes()[:-1])
        (work / (second.name + ".part")).write_bytes(b"x")
        (work / "stray.safetensors").write_bytes(b"x")
        (work / "folder").mkdir()
        report = nbmerge.merge(ckpt, out, max_shard_size="4KB")
        assert report.reused == (second.name,)
        assert_is_the_merge(out)
        assert not (out / "folder").exists() and not (out / "stray.safetensors").exists()


class TestACheckpointThatChanges:
    def changing(self, change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
        real = copy.carry_out

        def carry_out(*args: object) -> None:
            change()
            real(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(copy, "carry_out", carry_out)

    def test_while_it_is_merged(self, ckpt: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.changing(lambda: os.utime(rank_file(ckpt, 2, 1)), monkeypatch)
        message = refusal(InconsistentCheckpointError, nbmerge.merge, ckpt, out)
        assert_says(message, "changed since it was opened", "rank_1.pt", "fix:", "when that is finished")
        assert sorted(path.name for path in out.parent.iterdir()) == ["run"], "what was written cannot be trusted"

    def test_in_that_a_file_disappears(self, ckpt: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.changing(lambda: rank_file(ckpt, 2, 1).unlink(missing_ok=True), monkeypatch)
        with pytest.raises((InconsistentCheckpointError, FileNotFoundError)):
            nbmerge.merge(ckpt, out)
        assert not out.exists()

    def test_in_that_a_file_is_cut(self, ckpt: Path, out: Path, monkeypatch: pytest.MonkeyPatch):
        self.changing(lambda: os.truncate(rank_file(ckpt, 2, 1), 100), monkeypatch)
        message = refusal(CorruptFileError, nbmerge.merge, ckpt, out)
        assert_says(message, "the file ends before byte", "rank_1.pt", "fix:")
        assert sorted(path.name for path in out.parent.iterdir()) == ["run"]

    def test_between_plan_and_merge(self, ckpt: Path, out: Path):
        plan = nbmerge.plan_merge(ckpt)
        write_model_world(ckpt, "llama")
        assert_says(refusal(InconsistentCheckpointError, nbmerge.merge, plan, out), "changed")
        assert not out.exists()


class TestVerification:
    """Something between the plan and the disk went wrong: it is found, and nothing appears under the target's name."""

    def spoil(self, change: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch) -> None:
        from nbmerge import merging

        real = merging._write_side_files

        def write_side_files(plan: MergePlan, directory: Path) -> None:
            real(plan, directory)
            change(directory)

        monkeypatch.setattr(merging, "_write_side_files", write_side_files)

    @staticmethod
    def in_header(old: bytes, new: bytes) -> Callable[[Path], object]:
        def change(directory: Path) -> None:
            (path,) = (path for path in directory.glob("*.safetensors") if old in path.read_bytes())
            data = path.read_bytes()
            assert data.count(old) == 1 and len(old) == len(new)
            path.write_bytes(data.replace(old, new))

        return change

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                in_header(b'"model.norm.weight"', b'"model.norm.weighs"'),
                ["weight is missing", "weighs was not planned"],
            ),
            (
                in_header(
                    b'"lm_head.weight":{"dtype":"F32","shape":[37,16]',
                    b'"lm_head.weight":{"dtype":"F32","shape":[16,37]',
                ),
                ["lm_head.weight is float32 [16, 37], not as planned"],
            ),
            (lambda d: next(d.glob("model-00002*")).unlink(), ["model-00002-of", "was not written"]),
            (lambda d: os.truncate(next(d.glob("model-00002*")), 100), ["the safetensors header cannot be read"]),
            (lambda d: next(d.glob("model-00002*")).open("ab").write(b"x"), ["bytes that belong to no tensor"]),
            (lambda d: (d / "model.safetensors.index.json").unlink(), ["there is no index"]),
            (
                lambda d: (d / "model.safetensors.index.json").write_text(
                    '{"weight_map": {}, "metadata": {"total_size": 1}}'
                ),
                ["the index and the files name different tensors", "total_size is 1"],
            ),
            (lambda d: (d / "tokenizer_config.json").unlink(), ["tokenizer_config.json is missing or empty"]),
            (lambda d: os.truncate(d / "config.json", 0), ["config.json is missing or empty"]),
            (lambda d: os.link(next(d.glob("model-00002*")), d / "model-copy.safetensors"), ["is in two files"]),
        ],
        ids=[
            "a name",
            "a shape",
            "a file",
            "a file cut",
            "a file grown",
            "no index",
            "another index",
            "no tokenizer",
            "an empty config",
            "a tensor twice",
        ],
    )
    def test_finds(self, ckpt: Path, out: Path, change, words: list[str], monkeypatch: pytest.MonkeyPatch):
        self.spoil(change, monkeypatch)
        message = refusal(VerificationError, nbmerge.merge, ckpt, out, max_shard_size="4KB")
        assert_says(message, "was not published", *words)
        assert sorted(path.name for path in out.parent.iterdir()) == ["run"]

    def test_says_what_it_proved(self, ckpt: Path, out: Path):
        report = nbmerge.merge(ckpt, out, max_shard_size="4KB")
        assert report.verification.tensors == len(memory_state("llama"))
        assert report.verification.files == len(report.plan.files)
        assert_says(report.verification.sentence, "LlamaForCausalLM", "none missing, none extra")


class TestTheFunctions:
    def test_each_takes_what_the_other_returns(self, ckpt: Path, tmp_path: Path):
        opened = nbmerge.open_checkpoint(ckpt)
        plan = nbmerge.plan_merge(opened)
        for number, given in enumerate((ckpt, str(ckpt), opened, plan, plan)):
            report = nbmerge.merge(given, tmp_path / str(number))
            assert report.target == tmp_path / str(number)
            assert_is_the_merge(tmp_path / str(number))

    def test_a_plan_reads_no_tensor_data_and_writes_nothing(self, ckpt: Path, out: Path):
        before = sorted(out.parent.rglob("*"))
        plan = nbmerge.plan_merge(ckpt, max_shard_size="4KB")
        assert plan.problems == ()
        assert plan.data_bytes == sum(tensor.nbytes for tensor in memory_state("llama").values())
        assert plan.total_bytes > plan.data_bytes
        assert sorted(out.parent.rglob("*")) == before

    def test_a_dry_run_returns_the_plan_and_writes_nothing(self, ckpt: Path, out: Path):
        report = nbmerge.merge(ckpt, out, dry_run=True)
        assert (report.verification, report.receipt, report.written_bytes) == (None, None, 0)
        assert not out.exists()
        assert nbmerge.merge(ckpt, dry_run=True).plan.digest == report.plan.digest

    def test_a_merge_needs_a_target(self, ckpt: Path):
        assert_says(refusal(OptionError, nbmerge.merge, ckpt), "there is no target", "--target_dir")

    def test_options_that_come_too_late_are_refused(self, ckpt: Path, out: Path):
        opened = nbmerge.open_checkpoint(ckpt)
        message = refusal(OptionError, nbmerge.merge, opened, out, mesh_shape="2", trust_pickle=True)
        assert_says(message, "mesh_shape", "trust_pickle", "an opened checkpoint", "open_checkpoint")
        message = refusal(OptionError, nbmerge.merge, nbmerge.plan_merge(opened), out, dtype="bfloat16")
        assert_says(message, "dtype cannot change a plan", "plan_merge")

    def test_an_unknown_option_is_named(self, ckpt: Path):
        assert_says(refusal(OptionError, nbmerge.plan_merge, ckpt, max_shard="5GB"), "no option is named max_shard")

    def test_a_path_that_is_no_checkpoint(self, tmp_path: Path, out: Path):
        assert_says(refusal(NotACheckpointError, nbmerge.merge, tmp_path, out), str(tmp_path))

    def test_progress_is_told_in_bytes_that_add_up(self, ckpt: Path, out: Path):
        from nbmerge.engine.events import Advanced, Ended, FileDone, Started
        from nbmerge.merging import write_and_publish

        events: list[object] = []
        plan = nbmerge.plan_merge(ckpt, max_shard_size="4KB")
        write_and_publish(plan, check_target(plan, out, overwrite=False), events.append)
        (started,) = [event for event in events if isinstance(event, Started)]
        assert started.total == sum(event.nbytes for event in events if isinstance(event, Advanced))
        done = [event.name for event in events if isinstance(event, FileDone)]
        assert sorted(done) == [file.name for file in plan.files]
        assert isinstance(events[-1], Ended)
