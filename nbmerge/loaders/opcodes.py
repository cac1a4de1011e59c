"""Looks through a pickle's opcodes before it is read, for those that take memory out of all proportion to its size.

CPython's unpickler keeps its memo as an array that reaches to the highest index (Modules/_pickle.c, seen with 3.11):
five damaged bytes, LONG_BINPUT and an index, make it fill tens of gigabytes.
"""

from __future__ import annotations

import pickletools
import re
from pathlib import Path

from nbmerge.errors import CorruptFileError

_LENGTHS = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4,
            pickletools.TAKEN_FROM_ARGUMENT4U: 4, pickletools.TAKEN_FROM_ARGUMENT8U: 8}  # fmt: skip
_ARGUMENT = {ord(op.code): op.arg.n if op.arg else 0 for op in pickletools.opcodes}
_TWO_LINES = b"ic"  # INST and GLOBAL
_PUT, _LONG_PUT, _STOP = b"pr."
_SMALL = 1 << 16


def _common() -> re.Pattern[bytes]:
    """Runs of opcodes that are harmless and whose size a pattern can say: nearly all there are."""
    alternatives = []
    for size in (0, 1, 2, 4, 8):
        codes = bytes(code for code, length in _ARGUMENT.items() if length == size and code not in b"r.")
        alternatives.append(b"[" + re.escape(codes) + b"]" + b".{%d}" % size)
    alternatives.append(re.escape(b"r") + rb"..\x00\x00")
    for code, zeros in ((rb"\x8c", b""), (b"X", rb"\x00\x00\x00")):  # texts of up to 127 bytes
        texts = [re.escape(bytes([n])) + zeros + b".{%d}" % n for n in range(128)]
        alternatives.append(code + b"(?:" + b"|".join(texts) + b")")
    return re.compile(b"(?:" + b"|".join(alternatives) + b"){1,4000}", re.DOTALL)


_COMMON = _common()


def refuse_excess(data: bytes, path: Path) -> None:
    """Raises CorruptFileError for a memo index that is larger than the pickle itself, and for bytes beyond its end.

    Anything else that is wrong with the pickle is left to the unpickler, which goes the same way.
    """
    at, end = 0, len(data)
    while at < end:
        if run := _COMMON.match(data, at):
            at = run.end()
            continue
        code, at = data[at], at + 1
        length = _ARGUMENT.get(code)
        if code == _STOP or length is None:
            return
        start = at
        if length == pickletools.UP_TO_NEWLINE:
            at = data.find(b"\n", at) + 1
            if at and code in _TWO_LINES:
                at = data.find(b"\n", at) + 1
            if not at:
                return
        elif length in _LENGTHS:
            size = _LENGTHS[length]
            at += size + int.from_bytes(data[at : at + size], "little")
        else:
            at += length
        beyond = "something in it would end after it" if at > end else ""
        if code in (_PUT, _LONG_PUT) and _index(code, data[start:at]) > max(end, _SMALL):
            beyond = "it numbers more objects than it has bytes"
        if beyond:
            raise CorruptFileError(
                f"the pickle cannot be read: {beyond}", where=str(path),
                why="it is damaged, or cut short", fix="copy the file again from the machine that trained",
            )  # fmt: skip


def _index(code: int, argument: bytes) -> int:
    """The memo index that an opcode names; more than any where it is no number."""
    if code == _LONG_PUT:
        return int.from_bytes(argument, "little")
    text = argument.strip()
    return int(text) if text.isdigit() and len(text) < 20 else 1 << 64
