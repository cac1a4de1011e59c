"""Bytes from file to file: all of them, whatever the kernel cuts short, and never past an end."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from nbmerge import CorruptFileError
from nbmerge.dtypes import BY_NAME
from nbmerge.engine import copy, lower, sources
from nbmerge.engine.copy import Block, Run, Runs, batched, copy_run, jobs_of
from nbmerge.engine.sources import LocalFiles
from nbmerge.expressions import Cast, Fill, Paste, Stored, permute, reshape, stack
from nbmerge.geometry import Box, contiguous_strides, runs_of_box, tiling_faults
from tests.support.messages import assert_says, refusal
from tests.support.results import open_files

DATA = bytes(range(256)) * 64


@pytest.fixture
def files(tmp_path: Path):
    """A source with DATA and an open target."""
    source = tmp_path / "source"
    source.write_bytes(DATA)
    reading, writing = os.open(source, os.O_RDONLY), os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT)
    yield source, reading, writing
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("job", "wanted"),
    [
        (Runs((Run("", 9, 20, 5), Run("", 0, 10, 10))), (10, 15)),
        (Runs((Run("", 0, 10, 5), Run("", 5, 30, 5))), None),
        (Block(Box((1, 0), (2, 4)), (), Fill(0.0, (4, 4), BY_NAME["float32"]), 100), (116, 32)),
        (Block(Box((1, 0), (2, 2)), (), Fill(0.0, (4, 4), BY_NAME["float32"]), 100), None),
    ],
)
def test_the_disk_begins_with_what_a_job_wrote_in_one_piece(files, job: copy.Job, wanted, monkeypatch):
    _, _, writing = files
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, offset, length, advice: asked.append((offset, length)))
    monkeypatch.setattr(copy, "copy_run", lambda *_: None)
    monkeypatch.setattr(copy, "_make", lambda *_: None)
    with LocalFiles() as opened:
        monkeypatch.setattr(opened, "descriptor", lambda file: nullcontext(0))
        copy.carry_out(job, writing, opened)
    assert asked == ([wanted] if wanted else [])


@pytest.mark.parametrize("how", ["refused", "absent"])
def test_a_disk_that_takes_no_hint_gets_the_bytes_all_the_same(files, how: str, monkeypatch: pytest.MonkeyPatch):
    source, _, writing = files

    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "no")

    if how == "refused":
        monkeypatch.setattr(os, "posix_fadvise", refuse)
    else:
        monkeypatch.delattr(os, "posix_fadvise")
    with LocalFiles() as opened:
        copy.carry_out(Runs((Run(str(source), 3, 7, 5000),)), writing, opened)
    assert os.pread(writing, 10**6, 7) == DATA[3:5003]


def test_a_run_is_copied_whatever_its_offsets_are(files):
    source, reading, writing = files
    copy_run(reading, writing, Run(str(source), 101, 53, 5000))
    assert os.pread(writing, 10**6, 0) == bytes(53) + DATA[101:5101]


def test_a_buffer_that_is_smaller_than_the_run_is_enough(files, monkeypatch: pytest.MonkeyPatch):
    source, reading, writing = files
    monkeypatch.setattr(copy._thread, "buffer", memoryview(bytearray(7)))
    copy_run(reading, writing, Run(str(source), 1, 0, len(DATA) - 1))
    assert os.pread(writing, 10**6, 0) == DATA[1:]


def test_reads_and_writes_that_the_kernel_cuts_short_are_taken_up(files, monkeypatch: pytest.MonkeyPatch):
    """A signal, or a network file system, may return fewer bytes than were asked for."""
    source, reading, writing = files
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:100]], offset))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:33], offset))
    copy_run(reading, writing, Run(str(source), 0, 0, 5000))
    with LocalFiles() as opened:
        buffer = np.empty(5000, np.uint8)
        opened.read_into(str(source), 0, buffer)
    assert os.pread(writing, 10**6, 0) == DATA[:5000] == buffer.tobytes()


def test_a_system_without_preadv_reads_all_the_same(files, monkeypatch: pytest.MonkeyPatch):
    source, reading, writing = files
    monkeypatch.delattr(os, "preadv")
    copy_run(reading, writing, Run(str(source), 3, 0, 5000))
    assert os.pread(writing, 10**6, 0) == DATA[3:5003]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG])
def test_what_the_disk_refuses_is_raised(files, number: int, monkeypatch: pytest.MonkeyPatch):
    source, reading, writing = files

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError) as caught:
        copy_run(reading, writing, Run(str(source), 0, 0, 10))
    assert caught.value.errno == number


def test_a_source_that_ends_early_is_named(files):
    source, reading, writing = files
    message = refusal(CorruptFileError, copy_run, reading, writing, Run(str(source), 16_000, 0, 1000))
    assert_says(message, "ends before byte 17,000", str(source), "cut short or replaced", "fix:")


def stored(offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None = None, dtype: str = "uint8") -> Stored:
    return Stored("f", offset, shape, strides or contiguous_strides(shape), BY_NAME[dtype])


class TestJobs:
    def test_row_shards_are_runs(self):
        expr = Paste((5, 4), BY_NAME["uint8"], (((0, 0), stored(7, (3, 4))), ((3, 0), stored(99, (2, 4)))))
        jobs = list(jobs_of(expr, 1000, 8))
        assert jobs == [Runs((Run("f", 7, 1000, 12),)), Runs((Run("f", 99, 1012, 8),))]

    @pytest.mark.parametrize(
        "expr",
        [
            Paste((2, 6), BY_NAME["uint8"], (((0, 0), stored(0, (2, 3))), ((0, 3), stored(6, (2, 3))))),
            Fill(0, (3, 4), BY_NAME["uint8"]),
            Cast(stored(0, (3, 4), dtype="float32"), BY_NAME["bfloat16"]),
            stored(0, (3, 4), (0, 1)),
        ],
        ids=["columns", "constant", "cast", "repeated"],
    )
    def test_everything_else_is_blocks_below_the_buffer(self, expr):
        jobs = list(jobs_of(expr, 1000, 8))
        assert all(isinstance(job, Block) and job.offset == 1000 and job.nbytes <= 8 for job in jobs)
        assert sum(job.nbytes for job in jobs) == expr.nbytes
        runs = [run for job in jobs for run in runs_of_box(expr.shape, job.region)]
        assert len(runs) == len(jobs)
        assert [start for start, _ in runs] == [sum(length for _, length in runs[:i]) for i in range(len(runs))]

    @pytest.mark.parametrize(
        "expr",
        [
            permute(stored(0, (30, 40)), (1, 0)),
            stack([permute(stored(at, (30, 40)), (1, 0)) for at in (0, 1200)]),
            reshape(permute(stored(0, (2, 15, 40)), (2, 1, 0)), (40, 30)),
            Cast(permute(stored(0, (30, 40)), (1, 0)), BY_NAME["bool"]),
        ],
        ids=["matrix", "matrices", "interleaved", "cast"],
    )
    def test_what_lies_turned_in_its_file_is_tiles(self, expr, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(lower, "TILE_BYTES", 100)
        jobs = list(jobs_of(expr, 1000, 30))
        assert all(isinstance(job, Block) and job.nbytes <= 100 and job.offset == 1000 for job in jobs)
        assert tiling_faults(expr.shape, [job.region for job in jobs]) == []
        assert max(job.region.shape[-1] for job in jobs) == 10 == max(job.region.shape[-2] for job in jobs)

    def test_a_view_that_no_strides_give_is_one_piece_to_put_in_order_in_memory(self):
        expr = reshape(permute(stored(0, (2, 300, 400)), (2, 1, 0)), (400, 600))
        assert [piece.box for piece in lower.pieces(expr)] == [Box.whole((400, 600))]
        few = reshape(permute(stored(0, (2, 3, 4)), (2, 1, 0)), (4, 6))
        assert len(lower.pieces(few)) == 12
        assert all(isinstance(piece.leaf, Stored) for piece in lower.pieces(few))

    def test_a_long_run_is_cut_so_that_an_interrupt_is_soon_heard(self):
        size = 100 * 2**20
        jobs = list(jobs_of(stored(5, (size,)), 8, 8))
        assert len(jobs) > 2
        runs = [run for job in jobs for run in job.runs]
        assert sum(run.length for run in runs) == size
        assert all(run.source_offset - run.offset == -3 for run in runs)

    def test_a_tensor_without_elements_is_no_job(self):
        assert list(jobs_of(stored(0, (0, 3)), 0, 8)) == []

    def test_small_runs_share_a_job(self):
        runs = [Runs((Run("f", i, i, 1),)) for i in range(1000)]
        jobs = list(batched(iter(runs)))
        assert len(jobs) < 10
        assert [run for job in jobs for run in job.runs] == [run for job in runs for run in job.runs]


class TestOpenFiles:
    def test_many_files_do_not_stay_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sources, "_MAX_OPEN", 3)
        before = open_files()
        with LocalFiles() as opened:
            for i in range(20):
                path = tmp_path / str(i)
                path.write_bytes(bytes([i]) * 4)
                buffer = np.empty(4, np.uint8)
                opened.read_into(str(path), 0, buffer)
                assert buffer.tolist() == [i] * 4
                assert open_files() <= before + 4
        assert open_files() == before

    def test_a_file_in_use_is_not_closed_by_other_threads(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(sources, "_MAX_OPEN", 2)
        for i in range(8):
            (tmp_path / str(i)).write_bytes(bytes([i]) * 1000)
        wrong: list[object] = []

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            for _ in range(300):
                i, at = int(random.integers(8)), int(random.integers(900))
                buffer = np.empty(100, np.uint8)
                try:
                    opened.read_into(str(tmp_path / str(i)), at, buffer)
                except Exception as error:  # noqa: BLE001 - told below
                    wrong.append(error)
                if buffer.tolist() != [i] * 100:
                    wrong.append((i, buffer[:4].tolist()))

        with LocalFiles() as opened:
            threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []

    def test_a_file_that_ends_early_is_named(self, tmp_path: Path):
        (tmp_path / "f").write_bytes(b"abc")
        with LocalFiles() as opened:
            message = refusal(CorruptFileError, opened.read_into, str(tmp_path / "f"), 1, np.empty(10, np.uint8))
        assert_says(message, "ends before byte 11", str(tmp_path / "f"))

    def test_nothing_can_be_read_into_nothing(self, tmp_path: Path):
        (tmp_path / "f").touch()
        with LocalFiles() as opened:
            opened.read_into(str(tmp_path / "f"), 0, np.empty(0, np.uint8))
