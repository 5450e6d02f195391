"""The write-ahead log of an SQLite file, read without SQLite: also what stands after a bad frame.

Follows https://sqlite.org/fileformat2.html#the_write_ahead_log. SQLite stops at the first frame that is not
as it was written, and takes all that follows for not committed; that is right after a power loss, and wrong
after damage.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

PAGE_BYTES = 4096
_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24
_FRAME_BYTES = _FRAME_HEADER_BYTES + PAGE_BYTES
_MAGIC = 0x377F0682
_VERSION = 3007000


@dataclass(frozen=True, slots=True)
class Log:
    """What a log says. states: the last state of each page, as its place in the log: by the transactions that
    SQLite sees, and after those by the ones behind a bad frame. pages: how many the file has after the last
    of them, None without one. problem: what is damaged, None when nothing is. begins: whether it has a head,
    as every log has to which something was committed."""

    states: list[dict[int, int]] = field(default_factory=list)
    pages: int | None = None
    problem: str | None = None
    begins: bool = False


@dataclass(slots=True)
class _Transaction:
    """Frames up to a commit: page → place. whole: none is bad. pages: after it; 0: its last frame is bad or
    not there."""

    first_frame: int
    frames: dict[int, int] = field(default_factory=dict)
    whole: bool = True
    pages: int = 0


def read_log(data: bytes) -> Log:
    """What the log with the bytes `data` says.

    Each transaction is on the disk before the next one is written. So one with a bad frame is damaged when
    another follows; the last one may be of a power loss before it was committed, and does not count. A head
    that is not good is damaged even when nothing can be read behind it: one that a power loss has torn is
    treated like that at no cost, since nothing was committed behind it. All zeros: it was never written.
    """
    begins, sums, computed = _head(data)
    transactions = _transactions(data, begins, sums, computed)
    good_head = begins or data.count(0) == len(data)
    seen: list[_Transaction] = []
    for transaction in transactions if good_head else []:
        if not (transaction.whole and transaction.pages):
            break
        seen.append(transaction)
    behind = transactions[len(seen) :]
    if good_head:
        bad, committed = behind[:1], [one for one in behind[1:] if one.pages]
    else:
        bad, committed = [], [one for one in behind if one.pages]
    problem = None
    if committed:
        where = f"frame {bad[0].first_frame}" if bad else "its head"
        problem = f"the log is damaged at {where}, and transactions follow"
        behind = bad + committed
    elif not good_head:
        problem = "the log is damaged at its head, and nothing can be read behind it"
        behind = []
    else:
        behind = []
    states: list[dict[int, int]] = []
    for part in (seen, behind):
        frames: dict[int, int] = {}
        for transaction in part:
            frames.update(transaction.frames)
        if frames:
            states.append(frames)
    last = (seen + committed)[-1:]
    return Log(states, last[0].pages if last else None, problem, begins)


def _head(data: bytes) -> tuple[bool, _Sums, tuple[int, int]]:
    """Whether the head is good; by which sums its log is, and what they make of it."""
    if len(data) < _HEADER_BYTES:
        return False, _sums(big_endian=False), (0, 0)
    magic, version, size, _, *_ = struct.unpack_from(">8I", data)
    good = (magic & ~1, version, size) == (_MAGIC, _VERSION, PAGE_BYTES)
    sums = _sums(big_endian=good and bool(magic & 1))
    computed = sums.of(data[:24], (0, 0))
    if good and computed == struct.unpack_from(">2I", data, 24):
        return True, sums, computed
    # What it says of its byte order is no more to be believed.
    sums = _sums(big_endian=sys.byteorder == "big")
    return False, sums, sums.of(data[:24], (0, 0))


def _transactions(
    data: bytes, good: bool, sums: _Sums, computed: tuple[int, int]
) -> list[_Transaction]:
    """What looks like a transaction, in a log whose head is good, or not."""
    count = (len(data) - _HEADER_BYTES) // _FRAME_BYTES
    if count <= 0:
        return []
    known = struct.unpack_from(">2I", data, 24)
    # Of a log that was begun anew, older frames may follow: their salts differ.
    salts = data[16:24] if good else _first_salts(data, count, sums, [known, computed])
    found: list[_Transaction] = []
    current: _Transaction | None = None
    for frame, number, after, valid in _frames(data, 0, count, sums, salts, [known, computed]):
        if current is None:
            current = _Transaction(frame)
            found.append(current)
        if valid:
            current.frames[number] = _HEADER_BYTES + frame * _FRAME_BYTES + _FRAME_HEADER_BYTES
            current.pages = after
        else:
            current.whole = False
        if after:
            current = None
    return [one for one in found if one.frames or not one.whole]


def _first_salts(data: bytes, count: int, sums: _Sums, seeds: list[tuple[int, ...]]) -> bytes:
    """Those of the first frame that is as it was written, b"" without one: the sums do not cover them."""
    for frame in range(count):
        at = _HEADER_BYTES + frame * _FRAME_BYTES
        salts = data[at + 8 : at + 16]
        _, _, _, valid = next(_frames(data, frame, 1, sums, salts, seeds))
        if valid:
            return salts
        seeds = [struct.unpack_from(">2I", data, at + 16)]
    return b""


def _frames(
    data: bytes, first: int, count: int, sums: _Sums, salts: bytes, seeds: list[tuple[int, ...]]
) -> Iterator[tuple[int, int, int, bool]]:
    """(frame, page, pages after the transaction that it ends or 0, whether it is as it was written)."""
    for frame in range(first, first + count):
        at = _HEADER_BYTES + frame * _FRAME_BYTES
        number, after = struct.unpack_from(">2I", data, at)
        known = struct.unpack_from(">2I", data, at + 16)
        covered = data[at : at + 8] + data[at + _FRAME_HEADER_BYTES : at + _FRAME_BYTES]
        valid = (
            number > 0
            and data[at + 8 : at + 16] == salts
            and any(sums.of(covered, seed) == known for seed in seeds)
        )
        yield frame, number, after, valid
        seeds = [known]


@functools.cache
def _sums(*, big_endian: bool) -> _Sums:
    return _Sums(big_endian=big_endian)


class _Sums:
    """The log's checksum: s0 += x0 + s1, s1 += x1 + s0 over pairs of 32-bit words. It is linear, so that of a
    page is one product with the coefficients."""

    def __init__(self, *, big_endian: bool) -> None:
        self._type = ">u4" if big_endian else "<u4"
        words = (PAGE_BYTES + 8) // 4
        self._rows = np.empty((2, words), dtype=np.uint32)
        # What k steps make of (s0, s1): s0' = a*s0 + b*s1, s1' = c*s0 + d*s1.
        self._powers = [(1, 0, 0, 1)]
        for pair in range(words // 2 - 1, -1, -1):
            a, b, c, d = self._powers[-1]
            # A step makes (s0 + x0 + s1, s1 + x1 + s0 + x0 + s1): x0 adds (1, 1), x1 adds (0, 1).
            self._rows[:, 2 * pair] = (a + b) % 2**32, (c + d) % 2**32
            self._rows[:, 2 * pair + 1] = b % 2**32, d % 2**32
            self._powers.append(
                ((a + b) % 2**32, (a + 2 * b) % 2**32, (c + d) % 2**32, (c + 2 * d) % 2**32)
            )

    def of(self, data: bytes, seed: tuple[int, ...]) -> tuple[int, int]:
        words = np.frombuffer(data, dtype=self._type).astype(np.uint32)
        rows = self._rows[:, self._rows.shape[1] - len(words) :]
        s0, s1 = (int(row.sum(dtype=np.uint32)) for row in rows * words)
        a, b, c, d = self._powers[len(words) // 2]
        return (
            (s0 + a * seed[0] + b * seed[1]) % 2**32,
            (s1 + c * seed[0] + d * seed[1]) % 2**32,
        )
