"""The spool against plain lists: any order of appends, repetitions, deliveries, crashes and damage."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.agent.samples import producer
from tests.fakes import short_folder
from tests.fuzz import examples
from trackagent.agent.spool import AGENT_LANE, Delivery, OutOfOrder, Spool, UnknownSink

T = TypeVar("T")
Kept = tuple[int, int, int, bytes]  # rank, lane, first offset, bytes


class SpoolAgainstLists(RuleBasedStateMachine):
    """The lists: what each lane has, and what was kept, in order. cursors: how much of that each sink has;
    plans: up to where it gets it next; last: the last batch that each has accepted, with its origin."""

    def __init__(self) -> None:
        super().__init__()
        self.base = short_folder()
        self.opens = 0
        self.folder = self.base / "0"
        self.folder.mkdir()
        self.spool = self.opened()
        self.lanes: dict[tuple[int, int], bytes] = {}
        self.kept: list[Kept] = []
        self.cursors: dict[str, int] = {}
        self.plans: dict[str, int] = {}
        self.last: dict[str, tuple[str, int]] = {}
        self.written = 0

    def opened(self) -> Spool:
        return Spool(self.folder / "spool.db", max_bytes=1 << 30, linger_s=0)

    def teardown(self) -> None:
        self.spool.close()
        shutil.rmtree(self.base)

    @initialize()
    def add_store(self) -> None:
        self.add_sink("store")

    @rule(name=st.sampled_from(["store", "copy"]))
    def add_sink(self, name: str) -> None:
        self.spool.add_sink(name).result()
        self.cursors.setdefault(name, min(self.cursors.values(), default=0))

    @rule(rank=st.integers(0, 2), lane=st.integers(0, 1), words=st.integers(1, 800))
    def append(self, rank: int, lane: int, words: int) -> None:
        self.spool.open_producer(producer(rank), {}).result()
        before = self.lanes.get((rank, lane), b"")
        fresh = b"".join(self.word() for _ in range(words))
        end = self.spool.append(producer(rank).producer_id, lane, len(before), fresh).result()
        assert end == len(before + fresh)
        self.kept.append((rank, lane, len(before), fresh))
        self.lanes[rank, lane] = before + fresh

    def word(self) -> bytes:
        self.written += 1
        return self.written.to_bytes(8, "little")

    @precondition(lambda self: self.lanes)
    @rule(data=st.data())
    def append_again(self, data: st.DataObject) -> None:
        (rank, lane), known = data.draw(st.sampled_from(sorted(self.lanes.items())))
        start = data.draw(st.integers(0, len(known) // 8)) * 8
        fresh = data.draw(st.sampled_from([b"", self.word()]))
        repeated = known[start:] + fresh
        end = self.spool.append(producer(rank).producer_id, lane, start, repeated).result()
        assert end == len(known + fresh)
        if fresh:
            self.kept.append((rank, lane, len(known), fresh))
            self.lanes[rank, lane] = known + fresh

    @precondition(lambda self: self.lanes)
    @rule(data=st.data(), words=st.integers(1, 3))
    def append_after_a_gap(self, data: st.DataObject, words: int) -> None:
        (rank, lane), known = data.draw(st.sampled_from(sorted(self.lanes.items())))
        future = self.spool.append(
            producer(rank).producer_id, lane, len(known) + 8 * words, self.word()
        )
        assert isinstance(future.exception(), OutOfOrder)

    @rule(data=st.data(), max_bytes=st.integers(1, 20_000), accept=st.booleans())
    def deliver(self, data: st.DataObject, max_bytes: int, accept: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.cursors)))
        cursor = self.cursors[name]
        found = self.spool.next_delivery(name, max_bytes).result()
        if found is None:
            assert cursor == len(self.kept)
            return
        last = self.plans.setdefault(name, cursor + len(found.batches))
        assert [as_kept(found)[at] for at in range(last - cursor)] == self.kept[cursor:last]
        self.check_id(name, found)
        if accept:
            self.accept(name, found)
            self.cursors[name] = self.plans.pop(name)

    def check_id(self, name: str, found: Delivery) -> None:
        """No id is used again for something else."""
        origin, last = self.last.get(name, ("", 0))
        assert found.id.origin != origin or found.id.first == last + 1

    def accept(self, name: str, found: Delivery) -> None:
        last = found.id.last
        self.last[name] = found.id.origin, last
        retried(lambda: self.spool.delivered(name, last))

    @rule()
    def reopen(self) -> None:
        self.spool.close()
        self.spool = self.opened()

    @rule()
    def crash(self) -> None:
        """What is on the disk at this moment is all that the next one has."""
        self.leave_as_it_is()
        self.spool = self.opened()

    def leave_as_it_is(self) -> None:
        self.opens += 1
        following = self.base / str(self.opens)
        following.mkdir()
        for name in ("spool.db", "spool.db-wal"):
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, following / name)
        self.spool.close()
        shutil.rmtree(self.folder)
        self.folder = following

    @precondition(lambda self: self.lanes)
    @rule(
        name=st.sampled_from(["spool.db", "spool.db-wal"]),
        place=st.integers(0, 9999),
        length=st.sampled_from([1, 8, 512, 4096]),
        value=st.sampled_from([0x00, 0xFF, 0xA5]),
    )
    def damage(self, name: str, place: int, length: int, value: int) -> None:
        """It opens, each sink gets what is left, once, what is missing is told, and it goes on."""
        self.leave_as_it_is()
        overwrite(self.folder / name, place, length, value)
        self.spool = self.opened()
        ranks = {rank for rank, _ in self.lanes}
        for rank in ranks:
            held = {lane: len(known) for (of, lane), known in self.lanes.items() if of == rank}
            retried(lambda rank=rank, held=held: self.spool.open_producer(producer(rank), held))
        for sink in self.cursors:
            self.agree(sink)
        for sink, cursor in self.cursors.items():
            got, told = self.drained(sink)
            keys = {one[:3] for one in got}
            waiting = [one for one in self.kept[cursor:] if one[:3] in keys]
            assert [one[:3] for one in got] == [one[:3] for one in waiting]
            # Where not all bytes of a batch can be read, zeros stand for them.
            assert all(len(a[3]) == len(b[3]) for a, b in zip(got, waiting, strict=True))
            missing = {one[0] for one in self.kept[cursor:] if one[:3] not in keys}
            lost = retried(self.spool.statistics)["lost_batches"]
            assert lost or missing <= told
        # The senders come back.
        for (rank, lane), known in self.lanes.items():
            committed = retried(lambda rank=rank: self.spool.open_producer(producer(rank), {}))
            assert committed[lane] == len(known)
        self.cursors = dict.fromkeys(self.cursors, len(self.kept))
        self.plans.clear()

    def drained(self, sink: str) -> tuple[list[Kept], set[int]]:
        """What the sink gets, and the ranks in whose runs something is told."""
        got: list[Kept] = []
        told: set[int] = set()
        while (found := self.following(sink)) is not None:
            origin, last = self.last.get(sink, ("", 0))
            assert found.id.origin != origin or found.id.first > last
            self.accept(sink, found)
            told |= {b.producer.rank for b in found.batches if b.lane == AGENT_LANE}
            got += [one for one in as_kept(found) if one[1] != AGENT_LANE]
        return got, told

    def following(self, sink: str) -> Delivery | None:
        try:
            return retried(lambda: self.spool.next_delivery(sink, 5_000))
        except UnknownSink:
            self.agree(sink)
            return retried(lambda: self.spool.next_delivery(sink, 5_000))

    def agree(self, sink: str) -> None:
        origin = retried(lambda: self.spool.add_sink(sink))
        known, last = self.last.get(sink, ("", 0))
        retried(lambda: self.spool.reconcile_sink(sink, origin, last if known == origin else 0))

    @invariant()
    def only_what_no_sink_needs_is_deleted(self) -> None:
        if not self.cursors:
            return
        kept = self.kept[min(self.cursors.values()) :]
        statistics = self.spool.statistics().result()
        assert (statistics["batches"], statistics["bytes"]) == (
            len(kept),
            sum(len(batch[3]) for batch in kept),
        )


def as_kept(found: Delivery) -> list[Kept]:
    return [
        (batch.producer.rank, batch.lane, batch.first_offset, batch.journal_bytes)
        for batch in found.batches
    ]


def overwrite(path: Path, place: int, length: int, value: int) -> None:
    """`length` bytes, `place` ten thousandths into the file."""
    size = path.stat().st_size if path.exists() else 0
    if size:
        at = size * place // 10_000
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([value]) * min(length, size - at))


def retried(operation: Callable[[], Future[T]]) -> T:
    """As senders and pipelines do: damage that is met later fails what was asked, and is mended then."""
    for _ in range(3):
        future = operation()
        if not isinstance(future.exception(), sqlite3.DatabaseError):
            break
    return future.result()


TestSpoolAgainstLists = SpoolAgainstLists.TestCase
TestSpoolAgainstLists.settings = settings(examples(25), stateful_step_count=40)
