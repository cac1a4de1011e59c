"""The zip archives of `torch.save`: where each record's bytes lie in the file. Reads directories, never data."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

from nbmerge.errors import CheckpointError, CorruptFileError, UnsupportedCheckpointError

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # zip specification 4.3.7
_LOCAL_SIGNATURE = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the archive: offset of its first byte in the file, and its size, in bytes."""

    offset: int
    size: int


class TorchZip:
    """A file of `torch.save`: its pickle, and where the storages lie.

    Raises CorruptFileError for a file that is cut short, UnsupportedCheckpointError for one that is no
    zip archive of uncompressed little-endian records.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        try:
            with path.open("rb") as stream:
                self._refuse_old_format(stream.read(4))
                with zipfile.ZipFile(stream) as archive:
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
            where=f"{self.path} ({self._size:,} bytes)",
            why="a zip archive ends with its directory, which is not there or does not fit the file",
            fix="copy it again from the machine that trained; if training was stopped while saving, use an older step",
        )

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
        """Where the record's bytes begin: its local header is not as long as its directory entry says."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            header = os.pread(fd, _LOCAL_HEADER.size, info.header_offset)
        finally:
            os.close(fd)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(_LOCAL_SIGNATURE):
            raise self._cut_short(f"no local header for {info.filename} at byte {info.header_offset:,}")
        *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        offset = info.header_offset + _LOCAL_HEADER.size + int(name_length) + int(extra_length)
        if offset + info.file_size > self._size:
            raise self._cut_short(f"record {info.filename} would end at byte {offset + info.file_size:,}")
        return offset
