"""A segment: the memory-mapped file that records are published in.

0    8 bytes  magic "TRKJRNL1", written last: a segment without it is a prepared spare
8    u16      version, 1
10   u16      byte-order mark, 0xFEFF
12   u32      CRC-32 of bytes 16 to 40 + identity length
16   u32      size of the segment file
20   u32      lane
24   u64      offset in the lane of the first record
32   u32      number of the segment in its lane, from 0
36   u32      identity length, bytes
40            identity, JSON with the fields of trackagent.v1.Producer; "hub": where rank 0 wants the records,
              the text of trackagent.client.hub; "sender": false where nobody sends the journal, and the
              agent reads it while its owner lives
4080 u64      offset in the lane that was acknowledged when last heard of; not in the checksum
4088 u64      the same again: where they differ, the smaller counts
4096          records (trackagent.client.record); a length of 0: nothing more is published
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from trackagent.client import record
from trackagent.client.record import Packer

HEADER_BYTES = 4096
# At a segment's end, kept for what a full journal must still say: what was lost, and how the run ended.
LAST_WORDS_BYTES = 8192
ACKNOWLEDGED_AT = HEADER_BYTES - 16
MAX_IDENTITY_BYTES = ACKNOWLEDGED_AT - 40
MAGIC = b"TRKJRNL1"
VERSION = 1
BYTE_ORDER_MARK = 0xFEFF
SUFFIX = ".seg"
MAX_LANES = 64
# The offsets of all of a producer's lanes together fit 64 bits.
MAX_OFFSET = 1 << 56

_FIXED = struct.Struct("<8sHHIIIQII")
_POPULATE: int = getattr(mmap, "MAP_POPULATE", 0)


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """What a segment says of itself."""

    segment_bytes: int
    lane: int
    base: int
    number: int
    acknowledged: int
    identity: Mapping[str, Any]


def read_header(data: bytes | memoryview | mmap.mmap) -> SegmentHeader | None:
    """The header at the start of `data`; None for a spare that was never used.

    ValueError, with what is wrong, when it is neither.
    """
    if len(data) < HEADER_BYTES:
        raise ValueError(f"{len(data)} bytes, shorter than the header of {HEADER_BYTES}")
    magic, version, mark, crc, size, lane, base, number, length = _FIXED.unpack_from(data)
    if magic == bytes(8):
        return None
    if magic != MAGIC:
        raise ValueError(f"the magic is {magic!r} instead of {MAGIC!r}")
    if mark != BYTE_ORDER_MARK:
        raise ValueError("written on a machine with another byte order")
    if version != VERSION:
        raise ValueError(f"version {version}; this program reads version {VERSION}")
    if length > MAX_IDENTITY_BYTES:
        raise ValueError(f"an identity of {length} bytes")
    if crc32(data[16 : _FIXED.size + length]) != crc:
        raise ValueError("the header's checksum does not match")
    if lane >= MAX_LANES:
        raise ValueError(f"lane {lane}")
    if base % 8 or base + size > MAX_OFFSET:
        raise ValueError(f"offset {base} in its lane")
    try:
        identity = json.loads(bytes(data[_FIXED.size : _FIXED.size + length]))
    except RecursionError:
        raise ValueError("the identity is nested too deeply") from None
    if not isinstance(identity, dict):
        raise ValueError("the identity is no JSON object")
    # Too small an offset costs nothing while the spool knows better; too large a one would cost records.
    words = struct.unpack_from("<2Q", data, ACKNOWLEDGED_AT)
    known = [word for word in words if base <= word <= base + size and word % 8 == 0]
    return SegmentHeader(size, lane, base, number, min(known, default=base), identity)


class Segment:
    """One mapped segment file.

    `position` is where the next record goes: everything before it is published. `limit`: where records end,
    LAST_WORDS_BYTES before the file does. `schemas` maps the keys of a
    log call to what packs them, for keys whose SCHEMA record stands in this segment. `previous` is the
    segment before it in its lane, None once that is freed.
    """

    __slots__ = (
        "base",
        "limit",
        "map",
        "number",
        "path",
        "position",
        "previous",
        "schemas",
        "view",
        "words",
    )

    def __init__(self, path: Path, size: int, identity: bytes) -> None:
        """Creates and maps the file, its pages reserved and faulted in, all of the header but lane
        and base set.

        OSError (ENOSPC and others) leaves nothing behind.
        """
        self.path = path
        self.base = 0
        self.number = 0
        self.position = HEADER_BYTES
        self.limit = size - LAST_WORDS_BYTES
        self.previous: Segment | None = None
        self.schemas: dict[tuple[str, ...], Packer] = {}
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # Without its pages reserved, a full file system would be a SIGBUS in the training loop.
            os.posix_fallocate(fd, 0, size)
            self.map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED | _POPULATE)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(fd)
        self.map[_FIXED.size : _FIXED.size + len(identity)] = identity
        self.view = memoryview(self.map)
        self.words = self.view.cast("Q")

    def publish_header(self, lane: int, base: int, number: int, identity_bytes: int) -> None:
        """Makes the spare a segment of a lane; after this its records count."""
        self.base = base
        self.number = number
        size = len(self.map)
        fields = (VERSION, BYTE_ORDER_MARK, 0, size, lane, base, number, identity_bytes)
        _FIXED.pack_into(self.map, 0, bytes(8), *fields)
        crc = crc32(self.view[16 : _FIXED.size + identity_bytes])
        self.map[12:16] = crc.to_bytes(4, "little")
        self.map[0:8] = MAGIC

    def acknowledge(self, offset: int) -> None:
        """Notes, for who finds the file, what need not be delivered again."""
        self.words[ACKNOWLEDGED_AT >> 3] = offset
        self.words[(ACKNOWLEDGED_AT >> 3) + 1] = offset

    def cut(self, start: int, max_bytes: int) -> int:
        """Where whole records from `start` on, published and of `max_bytes` at most, end; after the
        first in any case."""
        at = start
        while True:
            following = at + record.padded(self.words[at >> 3] & 0xFFFFFFFF)
            if at > start and following - start > max_bytes:
                return at
            at = following
            if at >= self.position:
                return at

    def abandon_in_child(self) -> None:
        """In a forked child: what a call that the fork interrupted still writes goes nowhere. It is the
        parent's call, which ends it there."""
        self.map = mmap.mmap(-1, len(self.map), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.map)
        self.words = self.view.cast("Q")

    def unmap(self) -> None:
        """Gives the memory up; the file stays. Idempotent."""
        self.words.release()
        self.view.release()
        self.map.close()

    def remove(self) -> None:
        """Unmaps and deletes the file."""
        self.unmap()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
