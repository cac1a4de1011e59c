"""The zip archives of `torch.save`: where each record's bytes lie in the file. Reads directories, never data."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nbmerge.errors import CheckpointError, CorruptFileError, UnsupportedCheckpointError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # zip specification 4.3.7
_LOCAL_SIGNATURE = b"PK\x03\x04"
_SIGNATURE = b"PK"  # what each part of an archive begins with
_UTF8 = 1 << 11  # the flag of names in UTF-8; others are in code page 437


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the archive: offset of its first byte in the file, and its size, in bytes."""

    offset: int
    size: int


class _Window(io.RawIOBase):
    """Bytes `start` to `start + length` of an open file, as a file of their own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if at < 0:
            raise OSError(f"no byte {at}")  # as a file does; zipfile relies on it
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._at, 0)
        self._stream.seek(self._start + self._at)
        data = self._stream.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


class TorchZip:
    """A file of `torch.save`: its pickle, and where the storages lie.

    start, length: the archive's place inside the file, in bytes; by default it is the file.
    Raises CorruptFileError for a file that is cut short, UnsupportedCheckpointError for one that is no
    zip archive of uncompressed little-endian records.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.path, self._start = path, start
        self._size = path.stat().st_size - start if length is None else length
        try:
            with path.open("rb") as stream:
                window = _Window(stream, start, self._size)
                self._refuse_old_format(window.read(4))
                with zipfile.ZipFile(window) as archive:
                    self._infos = {info.filename: info for info in archive.infolist()}
                    self._prefix = self._root()
                    self.pickle = archive.read(self._stored("data.pkl"))
                    order = f"{self._prefix}/byteorder"
                    if order in self._infos and archive.read(self._stored("byteorder")) != b"little":
                        raise UnsupportedCheckpointError(
                            "the file holds big-endian numbers", where=str(path),
                            fix="save it again on a little-endian machine",
                        )  # fmt: skip
        except (CheckpointError, PermissionError):
            raise
        except Exception as error:  # zipfile has no one way to say that an archive is damaged
            raise self._cut_short(str(error)) from error

    def _refuse_old_format(self, start: bytes) -> None:
        if not self._size:
            raise self._cut_short("it has 0 bytes")
        if not start.startswith(b"PK"):
            raise UnsupportedCheckpointError(
                "the file is no zip archive of torch.save",
                where=str(self.path),
                why="its first bytes are "
                + (start.hex() or "missing")
                + ": damaged, or saved with _use_new_zipfile_serialization=False (torch before 1.6)",
                fix="copy it again from the machine that trained, or load and torch.save it once with that torch",
            )

    def _cut_short(self, detail: str) -> CorruptFileError:
        return CorruptFileError(
            f"the file is cut short or damaged: {detail}",
            where=f"{self.path} ({self._place()})",
            why="a zip archive ends with its directory, which is not there or does not fit the file",
            fix="copy it again from the machine that trained; if training was stopped while saving, use an older step",
        )

    def _place(self) -> str:
        if self._start or self.path.stat().st_size != self._size:
            return f"bytes {self._start:,} to {self._start + self._size:,}"
        return f"{self._size:,} bytes"

    def _root(self) -> str:
        for name in self._infos:
            if name.endswith("/data.pkl") and name.count("/") == 1:
                return name.removesuffix("/data.pkl")
        raise KeyError("no record data.pkl in it")

    def storage(self, key: str) -> Record:
        """The record that holds the storage `key` of the pickle."""
        if f"{self._prefix}/data/{key}" not in self._infos:
            raise self._cut_short(f"the pickle names storage {key!r}, which the archive does not hold")
        info = self._stored(f"data/{key}")
        return Record(self._data_offset(info), info.file_size)

    def _stored(self, name: str) -> zipfile.ZipInfo:
        """A record as torch writes it: not compressed, so that it cannot be larger than the file."""
        info = self._infos[f"{self._prefix}/{name}"]
        if info.compress_type != zipfile.ZIP_STORED:
            raise UnsupportedCheckpointError(
                f"record {info.filename} is compressed", where=str(self.path), fix="save it with torch.save as it is"
            )
        return info

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        """Where the record's bytes begin: its local header is not as long as its directory entry says.

        A damaged length in it would shift the tensor, so that all that stands in the header must fit together.
        """
        at = self._start + info.header_offset
        fd = os.open(self.path, os.O_RDONLY)
        try:
            header = os.pread(fd, _LOCAL_HEADER.size, at)
            if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
                raise self._cut_short(f"no local header for {info.filename} at byte {info.header_offset:,}")
            name_length, extra_length = map(int, _LOCAL_HEADER.unpack(header)[-2:])
            rest = os.pread(fd, name_length + extra_length, at + len(header))
            offset = info.header_offset + len(header) + name_length + extra_length
            if offset + info.file_size > self._size:
                raise self._cut_short(f"record {info.filename} would end at byte {offset + info.file_size:,}")
            following = os.pread(fd, len(_SIGNATURE), self._start + offset + info.file_size)
        finally:
            os.close(fd)
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        if rest[:name_length] != name or not _is_whole(rest[name_length:]):
            raise self._cut_short(f"the local header of {info.filename} is not of this record")
        if following != _SIGNATURE:  # of a descriptor, the next record or the archive's directory
            raise self._cut_short(f"record {info.filename} does not end at byte {offset + info.file_size:,}")
        return self._start + offset


def _is_whole(extra: bytes) -> bool:
    """Whether the fields of a local header's extra part, each a kind and a length, fill it exactly."""
    at = 0
    while at + 4 <= len(extra):
        at += 4 + int.from_bytes(extra[at + 2 : at + 4], "little")
    return at == len(extra)
