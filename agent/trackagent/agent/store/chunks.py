"""Chunks: consecutive points of one stream (keys that one producer logged together) as database rows.

A small chunk is one row: a block with all columns. A larger one has one row for each column in addition,
so that reading one key of fifty does not read fifty. A block is

    0   u8    kind: 1 plain, 2 packed
    1   u32   CRC-32 of the byte 0 and of what follows (plain only; packed columns have their own)
    5         plain: int64 steps, int64 times, float64 values of each key in turn, little-endian
              packed: u32 length of each column (steps, times, keys), then the columns (columns.py)

Plain is quick to write; what stays is packed by the compaction.
"""

from __future__ import annotations

import sqlite3
import struct
import zlib
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trackagent.agent.store.columns import (
    ColumnDamaged,
    check,
    decode_floats,
    decode_ints,
    encode_floats,
    encode_ints,
)
from trackagent.agent.store.contract import Floats, Ints
from trackagent.agent.store.schema import COLUMNS_PER_CHUNK

STEPS, TIMES, FIRST_KEY = 0, 1, 2

BLOCK_POINTS = 1024  # a chunk with fewer is one row ...
BLOCK_VALUES = 65_536  # ... of at most so many values: with many keys it holds fewer points
CHUNK_POINTS = 65_536
CHUNK_VALUES = 1 << 20  # bounds what a merge holds in memory and how long it takes

FULL = 100  # level of a chunk that is never merged again
DAMAGED = -1  # level of a chunk that was set aside: never merged, read as far as it can be

_PLAIN, _PACKED = 1, 2
_BLOCK = struct.Struct("<BI")


class ChunkDamaged(Exception):
    """The bytes of chunk `chunk` are not what was written."""

    def __init__(self, chunk: int, reason: str) -> None:
        super().__init__(f"chunk {chunk} is damaged: {reason}")
        self.chunk = chunk


@dataclass(frozen=True, slots=True)
class Chunk:
    """A row of `chunks`: points [start, start + n) of a stream with `keys` keys; block None: in `columns`.
    bounds: least and greatest step, None where they are not known."""

    id: int
    start: int
    n: int
    level: int
    increasing: bool
    keys: int
    block: bytes | None
    bounds: tuple[int, int] | None = None

    @property
    def packed(self) -> bool:
        """Whether it is stored as small as it gets."""
        return self.block is None or self.block[:1] == bytes([_PACKED])


def capacity(keys: int) -> int:
    """Points in a full chunk of so many keys."""
    return min(CHUNK_POINTS, max(256, CHUNK_VALUES // max(1, keys) // 64 * 64))


def rises(steps: Ints) -> bool:
    """Whether the steps rise strictly."""
    return bool((steps[1:] > steps[:-1]).all())


# --- reading ---------------------------------------------------------------------------------------


def chunks_of(
    connection: sqlite3.Connection,
    stream: int,
    keys: int,
    *,
    first: int = 0,
    levels: range = range(DAMAGED, FULL + 1),
    limit: int = -1,
    within: tuple[int, int] | None = None,
) -> list[Chunk]:
    """The chunks of a stream that hold its points from `first` on, in order. within: only those that may hold
    a step from the one to the other."""
    bounded = "" if within is None else _WITHIN
    # CAST: a blob that damage turned into text would not come through as bytes.
    rows = connection.execute(
        "SELECT id, start, n, level, increasing, CAST(data AS BLOB), first_step, last_step FROM chunks"
        f" WHERE stream = ? AND start + n > ? AND level >= ? AND level < ?{bounded} ORDER BY start LIMIT ?",
        (stream, first, levels.start, levels.stop, *(within or ()), limit),
    )
    return [
        Chunk(
            id_,
            start,
            n,
            level,
            bool(increasing),
            keys,
            data,
            None if least is None or most is None else (least, most),
        )
        for id_, start, n, level, increasing, data, least, most in rows
    ]


_WITHIN = " AND coalesce(last_step >= ?, 1) AND coalesce(first_step <= ?, 1)"


def read_ints(connection: sqlite3.Connection, chunk: Chunk, position: int) -> Ints:
    """The steps or times of a chunk, (n,). Raises ChunkDamaged."""
    try:
        if not chunk.packed:
            return np.ascontiguousarray(_plain(chunk)[position])
        return decode_ints(_column(connection, chunk, position), chunk.n)
    except ColumnDamaged as error:
        raise ChunkDamaged(chunk.id, str(error)) from None


def read_floats(connection: sqlite3.Connection, chunk: Chunk, key: int) -> Floats:
    """The values of the `key`-th key of a chunk, (n,). Raises ChunkDamaged."""
    try:
        if not chunk.packed:
            return np.ascontiguousarray(_plain(chunk)[FIRST_KEY + key].view("<f8"))
        return decode_floats(_column(connection, chunk, FIRST_KEY + key), chunk.n)
    except ColumnDamaged as error:
        raise ChunkDamaged(chunk.id, str(error)) from None


def read_rows(connection: sqlite3.Connection, chunk: Chunk) -> Ints:
    """All of a chunk, (2 + keys, n): steps, times, and the bits of the values of each key.

    Raises ChunkDamaged.
    """
    if not chunk.packed:
        try:
            return _plain(chunk)
        except ColumnDamaged as error:
            raise ChunkDamaged(chunk.id, str(error)) from None
    rows = np.empty((FIRST_KEY + chunk.keys, chunk.n), dtype=np.int64)
    for position in (STEPS, TIMES):
        rows[position] = read_ints(connection, chunk, position)
    for key in range(chunk.keys):
        rows[FIRST_KEY + key] = read_floats(connection, chunk, key).view("<i8")
    return rows


def read_intact(connection: sqlite3.Connection, chunk: Chunk) -> tuple[list[int], Ints]:
    """The keys of a chunk that can be read, and the rows as `read_rows` gives them of these keys only."""
    try:
        return list(range(chunk.keys)), read_rows(connection, chunk)
    except ChunkDamaged:
        pass
    keys: list[int] = []
    rows: list[Ints] = []
    if chunk.packed:  # a plain block has one checksum: nothing of it can be trusted
        with suppress(ChunkDamaged):
            rows += [read_ints(connection, chunk, position) for position in (STEPS, TIMES)]
            for key in range(chunk.keys):
                with suppress(ChunkDamaged):
                    rows.append(read_floats(connection, chunk, key).view("<i8"))
                    keys.append(key)
    return keys, np.stack(rows) if keys else np.empty((FIRST_KEY, 0), dtype=np.int64)


def find_damage(connection: sqlite3.Connection, chunk: Chunk) -> dict[int, str]:
    """The keys of a chunk that cannot be read, and why: every key where steps or times are damaged.

    Compares checksums and decodes nothing.
    """
    try:
        if not chunk.packed:
            _plain(chunk)
            return {}
        for position in (STEPS, TIMES):
            check(_column(connection, chunk, position), chunk.n)
    except ColumnDamaged as error:
        return dict.fromkeys(range(chunk.keys), str(error))
    found = {}
    for key in range(chunk.keys):
        try:
            check(_column(connection, chunk, FIRST_KEY + key), chunk.n)
        except ColumnDamaged as error:
            found[key] = str(error)
    return found


def _plain(chunk: Chunk) -> Ints:
    block = chunk.block or b""
    rows = FIRST_KEY + chunk.keys
    if len(block) != _BLOCK.size + 8 * rows * chunk.n:
        raise ColumnDamaged(f"{len(block)} bytes do not make {chunk.n} points of {chunk.keys} keys")
    if zlib.crc32(block[_BLOCK.size :], _PLAIN) != _BLOCK.unpack_from(block)[1]:
        raise ColumnDamaged("the checksum does not match")
    return np.frombuffer(block, dtype="<i8", offset=_BLOCK.size).reshape(rows, chunk.n)


def _column(connection: sqlite3.Connection, chunk: Chunk, position: int) -> bytes:
    if chunk.block is None:
        row = connection.execute(
            "SELECT CAST(data AS BLOB) FROM columns WHERE id = ?",
            (chunk.id * COLUMNS_PER_CHUNK + position,),
        ).fetchone()
        if row is None or row[0] is None:
            raise ColumnDamaged(f"column {position} is missing")
        return bytes(row[0])
    columns = FIRST_KEY + chunk.keys
    at = _BLOCK.size + 4 * columns
    if chunk.block[:1] != bytes([_PACKED]) or len(chunk.block) < at:
        raise ColumnDamaged("the block has no known form")
    lengths = struct.unpack_from(f"<{columns}I", chunk.block, _BLOCK.size)
    at += sum(lengths[:position])
    return chunk.block[at : at + lengths[position]]


# --- writing ---------------------------------------------------------------------------------------


def write_fresh(
    connection: sqlite3.Connection,
    stream: int,
    start: int,
    steps: Ints,
    times: Ints,
    values: Floats,
) -> int:
    """Stores points as they arrive, (n,), (n,), (keys, n); returns the number of chunks made of them."""
    rows = np.concatenate((steps[None], times[None], values.view(np.int64)))
    n, keys = len(steps), len(values)
    packed = n >= BLOCK_POINTS
    size = capacity(keys) if packed else max(1, BLOCK_VALUES // keys)
    for at in range(0, n, size):
        part = rows[:, at : at + size]
        if packed:
            level = FULL if part.shape[1] == size else 0
            _insert_columns(connection, stream, start + at, level, part)
        else:
            _insert_block(connection, stream, start + at, 0, part, _plain_block(part))
    return -(-n // size)


def write_merged(
    connection: sqlite3.Connection, stream: int, start: int, level: int, rows: Ints, *, final: bool
) -> None:
    """Stores a merged chunk as `read_rows` gives it. final: packed however small."""
    keys, n = len(rows) - FIRST_KEY, rows.shape[1]
    if n >= BLOCK_POINTS or n * keys > BLOCK_VALUES:
        _insert_columns(connection, stream, start, level, rows)
    else:
        block = _packed_block(_columns(rows)) if final else _plain_block(rows)
        _insert_block(connection, stream, start, level, rows, block)


def delete(connection: sqlite3.Connection, chunk: Chunk) -> None:
    """Takes a chunk and its columns away."""
    connection.execute("DELETE FROM chunks WHERE id = ?", (chunk.id,))
    if chunk.block is None:
        first = chunk.id * COLUMNS_PER_CHUNK
        connection.execute(
            "DELETE FROM columns WHERE id >= ? AND id < ?", (first, first + COLUMNS_PER_CHUNK)
        )


def _insert_columns(
    connection: sqlite3.Connection, stream: int, start: int, level: int, rows: Ints
) -> None:
    chunk = _insert_block(connection, stream, start, level, rows, None)
    connection.executemany(
        "INSERT INTO columns (id, data) VALUES (?, ?)",
        enumerate(_columns(rows), chunk * COLUMNS_PER_CHUNK),
    )


def _insert_block(
    connection: sqlite3.Connection,
    stream: int,
    start: int,
    level: int,
    rows: Ints,
    block: bytes | None,
) -> int:
    steps = rows[STEPS]
    cursor = connection.execute(
        "INSERT INTO chunks (stream, start, n, level, increasing, data, first_step, last_step)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            stream,
            start,
            len(steps),
            level,
            rises(steps),
            block,
            int(steps.min()),
            int(steps.max()),
        ),
    )
    assert cursor.lastrowid is not None
    return cursor.lastrowid


def _columns(rows: Ints) -> list[bytes]:
    values = [encode_floats(row.view(np.float64)) for row in rows[FIRST_KEY:]]
    return [encode_ints(rows[STEPS]), encode_ints(rows[TIMES]), *values]


def _plain_block(rows: Ints) -> bytes:
    data = rows.astype("<i8", copy=False).tobytes()
    return _BLOCK.pack(_PLAIN, zlib.crc32(data, _PLAIN)) + data


def _packed_block(columns: list[bytes]) -> bytes:
    lengths = struct.pack(f"<{len(columns)}I", *map(len, columns))
    return _BLOCK.pack(_PACKED, 0) + lengths + b"".join(columns)
