"""The pages of an SQLite file, and the rows on them, read without SQLite: what is left when that gives up.

Follows https://sqlite.org/fileformat2.html. What cannot be read is left out, and a row may
be an older state of itself. So rows need checksums of their own, and must be such that the later state can be
told.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from trackagent.agent.pagelog import PAGE_BYTES, read_log

_HEADER_BYTES = 100
TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR = 0x0D, 0x0A, 0x02
_WITH_ROWS = (TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR)
FREE_PAGE = 2  # in the pointer map
_MAX_PAYLOAD_BYTES = 1 << 30
# Fields of the head that are the same in every file of ours: offset → bytes.
_CONSTANTS = {
    0: b"SQLite format 3\0",
    16: PAGE_BYTES.to_bytes(2, "big"),
    18: bytes([2, 2, 0, 64, 32, 32]),  # with a write-ahead log; no bytes reserved
    44: (4).to_bytes(4, "big"),  # form of the schema
    48: bytes(4),  # size of the cache
    56: (1).to_bytes(4, "big"),  # UTF-8
    64: (1).to_bytes(4, "big"),  # vacuum bit by bit
    68: bytes(24),
}
_MAY_BE_ZERO = (44, 56)  # before there are tables

Value = int | float | str | bytes | None


class Place(NamedTuple):
    """Where a row lies: a state of a page, and the offset there."""

    view: int
    page: int
    at: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A row as it lies on a page: `local` is the beginning of `size` bytes, the rest follows on other pages
    from `overflow` on. rowid: None in an index and in a table without."""

    place: Place
    rowid: int | None
    size: int
    local: bytes
    overflow: int


class Pages:
    """The file at `path` with its write-ahead log; either may be missing. OSError when they cannot be read.

    A page may have several states: in the file, in the readable beginning of the log, and after a bad part of
    the log. Each is a view that falls back on those before it.

    log_problem: what is wrong with the log, None when nothing is. A transaction that was being written at the
    end is no damage. log_begins: whether the log has a head, as every one has to which something was
    committed.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("rb") if path.exists() else io.BytesIO()
        log = path.with_name(f"{path.name}-wal")
        self._log: BinaryIO = log.open("rb") if log.exists() else io.BytesIO()
        said = read_log(self._log.read())
        self.log_problem = said.problem
        self.log_begins = said.begins
        self._states: list[dict[int, int]] = [{}, *said.states]
        self._count_after = said.pages
        self._size = self._file.seek(0, os.SEEK_END)
        self._count = self._size // PAGE_BYTES

    def close(self) -> None:
        self._file.close()
        self._log.close()

    @property
    def is_database(self) -> bool:
        """Whether the file begins as databases do."""
        return self.page(1, 0).startswith(_CONSTANTS[0])

    @property
    def version(self) -> int:
        """What the writing program said of its tables; 0 where there are none."""
        return int.from_bytes(self.page(1)[60:64], "big")

    @property
    def views(self) -> int:
        return len(self._states)

    def page(self, number: int, view: int = -1) -> bytes:
        """The page, b"" where there is none."""
        if number < 1:
            return b""
        in_log, at = self.where(number, view)
        file = self._log if in_log else self._file
        file.seek(at)
        data = file.read(PAGE_BYTES)
        return data if len(data) == PAGE_BYTES else b""

    def where(self, number: int, view: int = -1) -> tuple[bool, int]:
        """Whether a page's state stands in the log, and its offset there or in the file."""
        for frames in reversed(self._states[: view + 1] if view >= 0 else self._states):
            if number in frames:
                return True, frames[number]
        return False, (number - 1) * PAGE_BYTES

    def cells(self) -> Iterator[Cell]:
        """What looks like a row, on every page that is in use, in every state."""
        for view, frames in enumerate(self._states):
            for number in sorted(frames) if view else range(1, self._count + 1):
                if not self._is_free(number, view):
                    yield from self.cells_on(number, view)

    def cells_on(self, number: int, view: int = -1) -> Iterator[Cell]:
        """What looks like a row on a page."""
        data = self.page(number, view)
        head = _head_bytes(number)
        if data and data[head] in _WITH_ROWS:
            for at in _pointers(data, head):
                cell = _cell(data, Place(view, number, at))
                if cell is not None:
                    yield cell

    @property
    def highest(self) -> int:
        """The greatest number of a page."""
        return max(self._count, *(max(frames, default=0) for frames in self._states))

    def cell(self, place: Place) -> Cell | None:
        """The row that `cells` has found there."""
        return _cell(self.page(place.page, place.view), place)

    def payload(self, cell: Cell, view: int | None = None) -> bytes:
        """The bytes of a row as far as they can be followed."""
        view = cell.place.view if view is None else view
        parts = [cell.local]
        left = cell.size - len(cell.local)
        following = cell.overflow
        seen = set()
        while left > 0 and following not in seen:
            seen.add(following)
            data = self.page(following, view)
            if not data:
                break
            following = int.from_bytes(data[:4], "big")
            parts.append(data[4 : 4 + min(left, PAGE_BYTES - 4)])
            left -= len(parts[-1])
        return b"".join(parts)

    def head_problem(self) -> str | None:
        """What is wrong with the file's head or its length; None when nothing is."""
        if not self._size and self.views == 1:
            return None  # it has yet to be made
        for view in (0, -1):
            head = self.page(1, view)
            for at, known in _CONSTANTS.items():
                said = head[at : at + len(known)]
                if said != known and (any(said) or at not in _MAY_BE_ZERO):
                    return f"file is not a database of this program (byte {at} of its head)"
        (count,) = struct.unpack_from(">I", self.page(1), 28)
        there = self._count if self._count_after is None else self._count_after
        if count != there or (self._count_after is None and self._size % PAGE_BYTES):
            return f"its head says that it has {count} pages, and there are {self._size} bytes"
        return None

    def freelist_problem(self) -> str | None:
        """What is wrong with the list of unused pages, which SQLite believes; None when nothing is."""
        trunk, expected = struct.unpack_from(">II", self.page(1) or bytes(_HEADER_BYTES), 32)
        found: list[int] = []
        trunks: set[int] = set()
        while trunk:
            data = self.page(trunk)
            if not data or trunk in trunks or len(found) > expected:
                return f"the list of unused pages leads to page {trunk}"
            following, leaves = struct.unpack_from(">II", data)
            if leaves > PAGE_BYTES // 4 - 2:
                return f"a list of {leaves} unused pages on page {trunk}"
            trunks.add(trunk)
            found += (trunk, *struct.unpack_from(f">{leaves}I", data, 8))
            trunk = following
        if len(found) != expected or len(set(found)) != expected:
            return f"{len(set(found))} unused pages where {expected} should be"
        # In order, so that each page of the map is read once.
        mapped, types = 0, b""
        for number in sorted(found):
            if map_of(number) != mapped:
                mapped = map_of(number)
                types = self.page(mapped)[::5]
            at = number - mapped - 1
            if at < 0 or types[at : at + 1] != bytes([FREE_PAGE]):
                return f"page {number} is listed as unused and is used"
        return None

    def _is_free(self, number: int, view: int) -> bool:
        """What the pointer map says of a page (every file of ours has one)."""
        mapped = map_of(number)
        at = 5 * (number - mapped - 1)
        return at >= 0 and self.page(mapped, view)[at : at + 1] == bytes([FREE_PAGE])


def map_of(number: int) -> int:
    """The page of the pointer map that says what page `number` is for."""
    apart = PAGE_BYTES // 5 + 1
    return max(0, number - 2) // apart * apart + 2


# --- rows


def _head_bytes(number: int) -> int:
    return _HEADER_BYTES if number == 1 else 0


def _pointers(data: bytes, head: int) -> tuple[int, ...]:
    """Where the rows of a page begin."""
    (count,) = struct.unpack_from(">H", data, head + 3)
    first = head + (12 if data[head] == INDEX_INTERIOR else 8)
    return struct.unpack_from(f">{min(count, (PAGE_BYTES - first) // 2)}H", data, first)


def _cell(data: bytes, place: Place) -> Cell | None:
    try:
        kind = data[_head_bytes(place.page)]
        size, at = _varint(data, place.at + (4 if kind == INDEX_INTERIOR else 0))
        rowid = None
        if kind == TABLE_LEAF:
            rowid, at = _varint(data, at)
            rowid -= 1 << 64 if rowid >> 63 else 0
    except IndexError:
        return None
    if not 0 < size <= _MAX_PAYLOAD_BYTES:
        return None
    local = _local_bytes(size, kind == TABLE_LEAF)
    payload = data[at : at + local]
    overflow = 0
    if local < size:
        overflow = int.from_bytes(data[at + local : at + local + 4], "big")
    return Cell(place, rowid, size, payload, overflow) if len(payload) == local else None


def _local_bytes(size: int, table: bool) -> int:
    """How much of a payload lies on its own page."""
    most = PAGE_BYTES - 35 if table else (PAGE_BYTES - 12) * 64 // 255 - 23
    if size <= most:
        return size
    least = (PAGE_BYTES - 12) * 32 // 255 - 23
    local = least + (size - least) % (PAGE_BYTES - 4)
    return local if local <= most else least


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(8):
        byte = data[at + place]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + place + 1
    return value << 8 | data[at + 8], at + 9


def columns(payload: bytes, size: int) -> list[Value] | None:
    """The columns of a row of `size` bytes, of which `payload` is the beginning: those that it holds whole; a
    last one that is a blob and goes on as far as it is there. None when it is no row."""
    try:
        head_bytes, at = _varint(payload, 0)
        if not 1 < head_bytes <= min(len(payload), 200):
            return None
        kinds = []
        while at < head_bytes:
            kind, at = _varint(payload, at)
            kinds.append(kind)
    except IndexError:
        return None
    if at != head_bytes or head_bytes + sum(map(_length, kinds)) != size:
        return None
    values: list[Value] = []
    for kind in kinds:
        data = payload[at : at + _length(kind)]
        if len(data) < _length(kind) and (kind < 12 or kind % 2):
            break
        at += len(data)
        try:
            values.append(_value(kind, data))
        except UnicodeDecodeError:
            return None
    return values


_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0)


def _length(kind: int) -> int:
    return _LENGTHS[kind] if kind < 12 else (kind - 12) // 2


def _value(kind: int, data: bytes) -> Value:
    if kind == 0:
        return None
    if kind < 7:
        return int.from_bytes(data, "big", signed=True)
    if kind == 7:
        return float(struct.unpack(">d", data)[0])
    if kind < 10:
        return kind - 8
    return data.decode() if kind % 2 else data
