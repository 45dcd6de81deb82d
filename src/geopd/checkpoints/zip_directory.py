"""Zips of stored entries, as ``torch.save`` writes them: how many entries there are, and where each one's bytes lie."""

from __future__ import annotations

import mmap
import os
import struct
import zipfile
from typing import Protocol

ZIP_FAULTS = (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, EOFError, OverflowError)
"""What reading a damaged zip raises."""
_LOCAL_HEADER = struct.Struct("<4s5HLLLHH")
_ENTRY = b"PK\x01\x02"
_END, _END_LENGTH, _END_MARK = struct.Struct("<4s4H2LH"), 22, b"PK\x05\x06"
_END64, _END64_MARK, _LOCATOR_LENGTH = struct.Struct("<4sQ2H2L4Q"), b"PK\x06\x06", 20
_LONGEST_COMMENT = (1 << 16) - 1
_MOST_ENTRIES, _MOST_BYTES = 200_000, 64 << 20  # of a directory; parsed, an entry takes 600 bytes


class Bytes(Protocol):
    """A file, or a part of one that can be read as one."""

    def read(self, size: int = -1, /) -> bytes:
        """At most ``size`` bytes."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """The new place, from the start."""
        ...


def zip_entries(file: Bytes) -> list[zipfile.ZipInfo]:
    """The entries that a zip's directory lists; their number is known before any is parsed.

    Raises:
        ZIP_FAULTS: if it is damaged, or has more entries than weights need.
    """
    _require_small(file)
    return zipfile.ZipFile(file).infolist()


def _require_small(file: Bytes) -> None:
    end = file.seek(0, os.SEEK_END)
    first = max(0, end - _END_LENGTH - _LONGEST_COMMENT - _LOCATOR_LENGTH - _END64.size)
    file.seek(first)
    tail = file.read(end - first)
    at = tail.rfind(_END_MARK)
    if at < 0 or len(tail) < at + _END_LENGTH:
        raise ValueError("it has no directory")
    size = _END.unpack_from(tail, at)[5]
    large = at - _LOCATOR_LENGTH - _END64.size
    if large >= 0 and tail.startswith(_END64_MARK, large):
        at, size = large, _END64.unpack_from(tail, large)[8]
    if size > _MOST_BYTES:
        raise ValueError(f"a directory of {size:,} bytes, more than weights need: refused")
    start = max(0, first + at - size)
    file.seek(start)
    if (count := file.read(first + at - start).count(_ENTRY)) > _MOST_ENTRIES:
        raise ValueError(f"a directory of {count:,} entries, more than weights need: refused")


def entry_place(mapped: mmap.mmap, entry: zipfile.ZipInfo, start: int, end: int) -> tuple[int, int]:
    """Where an entry's bytes begin, and how many there are, of a zip from ``start`` to ``end`` in a mapped file.

    Raises:
        ValueError: if they are not stored as they are, or do not lie there.
    """
    if entry.flag_bits & 0x1:
        raise ValueError("is encrypted")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise ValueError("is compressed, which torch.save never does (a decompression bomb?): refused")
    at = start + entry.header_offset
    if at < start:
        raise ValueError("begins before the file does, says the directory")
    header = mapped[at : at + _LOCAL_HEADER.size]
    if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
        raise ValueError("has no header where the directory says")
    *_, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    first = at + _LOCAL_HEADER.size + name_length + extra_length
    if first + entry.file_size > end:
        raise ValueError("runs past the end of the file")
    return first, entry.file_size
