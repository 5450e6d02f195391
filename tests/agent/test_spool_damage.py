"""Damage at every structural position of the spool's file and of its log: it opens, what is whole arrives
once, and what is missing is told."""

from __future__ import annotations

import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest

from tests.agent.samples import losses, producer
from tests.fakes import short_folder
from trackagent.agent.decode import decode
from trackagent.agent.pagelog import PAGE_BYTES
from trackagent.agent.pages import Pages, columns
from trackagent.agent.salvage import BATCH_COLUMNS
from trackagent.agent.spool import AGENT_LANE, Delivery, Spool, UnknownSink

T = TypeVar("T")

RANKS = 3
NEW_LANE = 5
FRAME_BYTES = 24 + PAGE_BYTES
MAIN, LOG = "spool.db", "spool.db-wal"
Range = tuple[int, int, int]  # rank, lane, first offset


@dataclass
class StrictSink:
    """Takes a batch id once, remembers what it took, and fails where ids overlap. told: ranks in whose run an
    event says that something is missing."""

    last: dict[str, int] = field(default_factory=dict)
    ids: set[tuple[str, int, int]] = field(default_factory=set)
    got: dict[Range, bytes] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)

    def copy(self) -> StrictSink:
        return StrictSink(dict(self.last), set(self.ids), dict(self.got), set(self.told))

    def deliver(self, delivery: Delivery, spool: Spool) -> None:
        id_ = delivery.id
        if (id_.origin, id_.first, id_.last) in self.ids:
            return
        assert id_.first > self.last.get(id_.origin, 0), "an id comes again for something else"
        self.ids.add((id_.origin, id_.first, id_.last))
        self.last[id_.origin] = id_.last
        batch = decode(delivery, spool.keys)
        told = {event.producer_id for event in batch.events}
        assert {loss.producer_id for loss in batch.losses} <= told
        self.told |= {producer_id[0] for producer_id in told}
        for one in delivery.batches:
            if one.lane != AGENT_LANE:
                key = one.producer.rank, one.lane, one.first_offset
                assert key not in self.got, "delivered twice"
                self.got[key] = one.journal_bytes


@dataclass
class Base:
    """A spool as an agent that was killed left it. sent: what it has acknowledged; places: the pages in the
    files in which each batch lies; last: the batches of the last transaction; sink: what that has; pages:
    one of each kind; frames: of the log."""

    folder: Path
    sent: dict[Range, bytes] = field(default_factory=dict)
    places: dict[Range, set[tuple[str, int]]] = field(default_factory=dict)
    last: set[Range] = field(default_factory=set)
    sink: StrictSink = field(default_factory=StrictSink)
    pages: dict[str, int] = field(default_factory=dict)
    frames: int = 0


def fill(spool: Spool, base: Base, sizes: list[int]) -> None:
    """Appends a batch of each size, to the ranks in turn."""
    for at, steps in enumerate(sizes):
        rank, lane = at % RANKS, at % 2
        info = producer(rank)
        begin = spool.open_producer(info, {}).result().get(lane, 0)
        data = losses(range(begin, begin + steps))
        spool.append(info.producer_id, lane, begin, data).result()
        base.sent[rank, lane, begin] = data
        base.last = {(rank, lane, begin)}


def take(spool: Spool, base: Base, max_bytes: int, *, confirm: bool = True) -> None:
    found = spool.next_delivery("store", max_bytes).result()
    assert found is not None
    base.sink.deliver(found, spool)
    if confirm:
        spool.delivered("store", found.id.last).result()


@pytest.fixture(scope="module")
def base() -> Iterator[Base]:
    folder = short_folder()
    made = Base(folder / "base")
    (folder / "running").mkdir()
    made.folder.mkdir()
    path = folder / "running" / MAIN
    spool = Spool(path, max_bytes=1 << 30, linger_s=0)
    spool.add_sink("store").result()
    fill(spool, made, [300, 4, 40, 7, 500, 12] * 3)
    take(spool, made, 60_000)
    other = sqlite3.connect(path)
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    fill(spool, made, [9, 300, 5, 60] * 3)
    # The sink has more than the spool knows of.
    take(spool, made, 20_000, confirm=False)
    fill(spool, made, [11, 90])
    for name in (MAIN, LOG):
        shutil.copy(folder / "running" / name, made.folder / name)
    spool.close()
    look_at_pages(made)
    yield made
    shutil.rmtree(folder)


def look_at_pages(base: Base) -> None:
    pages = Pages(base.folder / MAIN)
    for cell in pages.cells():
        values = columns(cell.local, cell.size)
        # The ranks are opened in turn, so that their numbers are one more.
        if values is None or len(values) < BATCH_COLUMNS - 1 or not isinstance(values[1], int):
            continue
        numbers = [cell.place.page]
        left, following = cell.size - len(cell.local), cell.overflow
        while left > 0:
            base.pages["overflow"] = following
            numbers.append(following)
            following = int.from_bytes(pages.page(following)[:4], "big")
            left -= PAGE_BYTES - 4
        key = int(values[1]) - 1, int(values[2] or 0), int(values[3] or 0)
        where = [pages.where(number) for number in numbers]
        base.places[key] = {(LOG if in_log else MAIN, at) for in_log, at in where}
    pages.close()
    connection = sqlite3.connect(f"file:{base.folder / MAIN}?immutable=1", uri=True)
    base.pages |= dict(
        connection.execute("SELECT name, rootpage FROM sqlite_master WHERE rootpage")
    )
    connection.close()
    data = (base.folder / MAIN).read_bytes()
    root = data[(base.pages["batches"] - 1) * PAGE_BYTES :]
    assert root[0] == 0x05
    (first_cell,) = struct.unpack_from(">H", root, 12)
    base.pages |= {
        "schema": 1,
        "map": 2,
        "first leaf": int.from_bytes(root[first_cell : first_cell + 4], "big"),
        "last leaf": int.from_bytes(root[8:12], "big"),
        "trunk": int.from_bytes(data[32:36], "big"),
    }
    trunk = data[(base.pages["trunk"] - 1) * PAGE_BYTES :]
    base.pages["unused"] = int.from_bytes(trunk[8:12], "big")
    base.frames = ((base.folder / LOG).stat().st_size - 32) // FRAME_BYTES
    assert all(base.pages.values())
    assert base.frames > 20
    assert base.places.keys() >= base.sent.keys() - base.sink.got.keys()


# --- what is done to the files


def flip(data: bytearray, at: int, length: int) -> None:
    for place in range(at, min(at + length, len(data))):
        data[place] ^= 0xA5


def zero(data: bytearray, at: int, length: int) -> None:
    data[at : at + length] = bytes(len(data[at : at + length]))


def duplicate(data: bytearray, at: int, length: int) -> None:
    """The block takes the place of the one after it, or before."""
    other = at + length if at + 2 * length <= len(data) else at - length
    data[other : other + length] = data[at : at + length]


def truncate(data: bytearray, at: int, length: int) -> None:
    del data[at:]


DAMAGES: dict[str, Callable[[bytearray, int, int], None]] = {
    "flip": flip,
    "zero": zero,
    "duplicate": duplicate,
    "truncate": truncate,
}
# Of each part: offset and length; a negative offset is from the page's end.
HEAD = {
    "magic": (0, 16),
    "page size": (16, 2),
    "write version": (18, 1),
    "read version": (19, 1),
    "reserved": (20, 1),
    "fractions": (21, 3),
    "changes": (24, 4),
    "page count": (28, 4),
    "first unused": (32, 4),
    "unused count": (36, 4),
    "cookie": (40, 4),
    "form": (44, 4),
    "cache": (48, 4),
    "largest root": (52, 4),
    "encoding": (56, 4),
    "version": (60, 4),
    "vacuum": (64, 4),
    "application": (68, 4),
    "rest": (72, 28),
}
COPIES = ("spool_copy", "producers_copy", "lanes_copy", "schemas_copy", "sinks_copy")
PAGES = (
    *("schema", "map", "trunk", "unused", "batches", "first leaf", "last leaf", "overflow"),
    *("spool", "producers", "lanes", "schemas", "sinks", "producer_ids", *COPIES),
)
PARTS = {
    "kind": (0, 1),
    "free block": (1, 2),
    "cell count": (3, 2),
    "content start": (5, 2),
    "fragments": (7, 1),
    "right child": (8, 4),
    "pointers": (8, 8),
    "last cell": (-12, 12),
    "a cell": (-40, 4),
    "all": (0, PAGE_BYTES),
}
LOG_HEAD = {
    "magic": (0, 4),
    "version": (4, 4),
    "page size": (8, 4),
    "sequence": (12, 4),
    "salt 1": (16, 4),
    "salt 2": (20, 4),
    "sum 1": (24, 4),
    "sum 2": (28, 4),
    "all": (0, 32),
}
FRAMES = ("first", "second", "middle", "last but one", "last")
FRAME = {
    "page": (0, 4),
    "pages after": (4, 4),
    "salts": (8, 8),
    "sums": (16, 8),
    "body": (24 + 2000, 64),
    "all": (0, FRAME_BYTES),
}


def cases() -> Iterator[tuple[str, str, str, str]]:
    """(file, place, part, damage)."""
    for part in HEAD:
        for damage in ("flip", "zero"):
            yield MAIN, "head", part, damage
    for page in PAGES:
        for part in ("cell count", "a cell", "all") if page in COPIES else PARTS:
            yield MAIN, page, part, "flip"
            if part in ("cell count", "pointers", "a cell", "all"):
                yield MAIN, page, part, "zero"
        yield MAIN, page, "all", "duplicate"
        yield MAIN, page, "all", "truncate"
        yield MAIN, page, "a cell", "truncate"
    for part in LOG_HEAD:
        for damage in ("flip", "zero"):
            yield LOG, "log head", part, damage
    yield LOG, "log head", "all", "truncate"
    for frame in FRAMES:
        for part in FRAME:
            for damage in ("flip", "zero"):
                yield LOG, frame, part, damage
        yield LOG, frame, "all", "duplicate"
        yield LOG, frame, "all", "truncate"
        yield LOG, frame, "body", "truncate"


def position(base: Base, place: str, part: str) -> tuple[int, int]:
    if place == "head":
        return HEAD[part]
    if place == "log head":
        return LOG_HEAD[part]
    if place in PAGES:
        at, length = PARTS[part]
        begin = (base.pages[place] - 1) * PAGE_BYTES
        if at < 0:
            return begin + PAGE_BYTES + at, length
        return begin + at + (100 if place == "schema" and part != "all" else 0), length
    last = base.frames - 1
    number = dict(zip(FRAMES, (0, 1, last // 2, last - 1, last), strict=True))[place]
    at, length = FRAME[part]
    return 32 + number * FRAME_BYTES + at, length


@pytest.fixture(scope="module")
def shared_folder() -> Iterator[Path]:
    folder = short_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def copy(shared_folder: Path, base: Base) -> Iterator[Path]:
    """A copy of the base's files, in a folder of its own."""
    folder = shared_folder / "case"
    shutil.copytree(base.folder, folder)
    yield folder / MAIN
    shutil.rmtree(folder)


def touched(base: Base, name: str, before: bytes, after: bytes) -> set[Range]:
    """Batches of which some page is damaged."""
    return {
        key
        for key, places in base.places.items()
        if any(
            file == name and before[at : at + PAGE_BYTES] != after[at : at + PAGE_BYTES]
            for file, at in places
        )
    }


def tried(operation: Callable[[], Future[T]]) -> T:
    """As senders and pipelines do: damage that is met later fails what was asked, and is mended then."""
    for _ in range(2):
        future = operation()
        if not isinstance(future.exception(), sqlite3.DatabaseError):
            return future.result()
    return operation().result()


def drained(path: Path, base: Base, sink: StrictSink) -> int:
    """Starts, lets the senders come back with something new, and delivers all; how many batches of unknown
    runs were lost."""
    spool = Spool(path, max_bytes=1 << 30, linger_s=0)

    def agree() -> None:
        origin = tried(lambda: spool.add_sink("store"))
        tried(lambda: spool.reconcile_sink("store", origin, sink.last.get(origin, 0)))

    def following() -> Delivery | None:
        try:
            return tried(lambda: spool.next_delivery("store", 30_000))
        except UnknownSink:
            agree()
            return tried(lambda: spool.next_delivery("store", 30_000))

    try:
        agree()
        for rank in range(RANKS):
            held: dict[int, int] = {}
            for (of, lane, begin), data in base.sent.items():
                if of == rank:
                    held[lane] = max(held.get(lane, 0), begin + len(data))
            come_back(spool, rank, held)
        while (found := following()) is not None:
            sink.deliver(found, spool)
            last = found.id.last
            tried(lambda last=last: spool.delivered("store", last))
        # A page that went bad since may have cost what had just come.
        statistics = tried(spool.statistics)
        assert (statistics["batches"], statistics["bytes"]) == (0, 0)
        return int(statistics["lost_batches"])
    finally:
        spool.close()


def come_back(spool: Spool, rank: int, held: dict[int, int]) -> None:
    info = producer(rank)

    def opened_and_sent() -> Future[int]:
        committed = tried(lambda: spool.open_producer(info, held))
        return spool.append(
            info.producer_id, NEW_LANE, committed.get(NEW_LANE, 0), losses(range(9))
        )

    tried(opened_and_sent)


def aside(path: Path) -> list[Path]:
    return sorted((path.parent / "quarantine").glob("*"))


def test_without_damage_nothing_is_set_aside(base: Base, copy: Path) -> None:
    sink = base.sink.copy()
    drained(copy, base, sink)
    assert {key: sink.got.get(key) for key in base.sent} == base.sent
    assert (sink.told, aside(copy)) == (set(), [])


@pytest.mark.parametrize(("name", "place", "part", "damage"), list(cases()))
def test_damage_costs_what_lies_there_only(
    base: Base, copy: Path, name: str, place: str, part: str, damage: str
) -> None:
    file = copy.with_name(name)
    before = file.read_bytes()
    data = bytearray(before)
    DAMAGES[damage](data, *position(base, place, part))
    file.write_bytes(data)
    may_miss = touched(base, name, before, bytes(data))
    if name == LOG:
        # Bad in the last transaction: nobody can tell that from a power loss before its commit.
        may_miss |= base.last

    sink = base.sink.copy()
    lost = drained(copy, base, sink)
    set_aside = aside(copy)
    drained(copy, base, sink)

    missing = {key for key in base.sent if sink.got.get(key) != base.sent[key]}
    if lost:
        # Nothing is left by which to tell whose batches these are.
        assert damage == "truncate"
        assert len(missing) >= lost
    else:
        assert missing <= may_miss
    assert {rank for rank, _, _ in missing} <= sink.told
    if missing and name == MAIN:
        assert [path.suffix for path in set_aside].count(".reason") == 1
    # What came after was not damaged once more.
    assert aside(copy) == set_aside
    assert sum(lane == NEW_LANE for _, lane, _ in sink.got) == 2 * RANKS
