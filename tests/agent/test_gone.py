"""A store that has lost what it had accepted, or has no room: its runs are told, once, and what comes
is kept."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from tests.agent.samples import RUN_ID, losses, producer, said
from tests.fakes import wait_until
from trackagent.agent.deadletters import DeadLetters, found, mark
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.sinks.store import StoreSink
from trackagent.agent.spool import Spool
from trackagent.agent.store import open_reader, open_writer
from trackagent.agent.store.contract import Batch, Rejected, StoreError
from trackagent.client.record import Kind

ID = producer().producer_id


class Node:
    """A spool with a store beside it, and the rank 0 that logs into it."""

    def __init__(self, spool: Spool, folder: Path) -> None:
        self.spool = spool
        self.path = folder / "store.db"
        self.letters = folder / "dead-letters"
        self.offset = 0
        spool.open_producer(producer(), {}).result()
        spool.add_sink("store").result()

    def log(self, first: int, last: int) -> None:
        data = losses(range(first, last))
        self.spool.append(ID, 0, self.offset, data).result()
        self.offset += len(data)

    def deliver(self, sink: StoreSink | None = None) -> None:
        """An agent starts, delivers all and ends."""
        letters = DeadLetters(self.letters, "store", max_bytes=1 << 30)
        pipeline = Pipeline(
            self.spool,
            sink or StoreSink(open_writer(self.path)),
            interval_s=0.0,
            dead_letters=letters,
        )
        pipeline.start()
        wait_until(self.is_empty)
        pipeline.stop(30)

    def is_empty(self) -> bool:
        return self.spool.statistics().result()["batches"] == 0

    def steps(self) -> list[int]:
        with contextlib.closing(open_reader(self.path)) as reader:
            with contextlib.suppress(StoreError):
                return reader.series(RUN_ID, "loss", "rank 0").steps.tolist()
            return []

    def told(self) -> list[str]:
        with contextlib.closing(open_reader(self.path)) as reader:
            return [event.message for event in reader.events(RUN_ID) if "any more" in event.message]

    def lost(self) -> dict[str, int]:
        with contextlib.closing(open_reader(self.path)) as reader:
            return reader.losses(RUN_ID)


@pytest.fixture
def node(spool: Spool, tmp_path: Path) -> Node:
    return Node(spool, tmp_path)


def test_a_run_whose_store_is_gone_is_told_once(node: Node) -> None:
    node.log(0, 10)
    node.deliver()
    node.path.unlink()
    node.log(10, 20)
    for _ in range(3):
        node.deliver()
    assert (node.steps(), len(node.told()), node.lost()) == (
        [*range(10, 20)],
        1,
        {"lost by the store": 1},
    )


def test_a_run_is_told_when_an_older_copy_of_its_store_comes_back(node: Node) -> None:
    node.log(0, 10)
    node.deliver()
    shutil.copy(node.path, f"{node.path}.copy")
    node.log(10, 20)
    node.deliver()
    shutil.move(f"{node.path}.copy", node.path)
    node.log(20, 30)
    node.deliver()
    node.deliver()
    assert (node.steps(), len(node.told())) == ([*range(10), *range(20, 30)], 1)


def test_a_run_is_told_when_its_stores_log_was_cut_off(node: Node) -> None:
    node.log(0, 10)
    node.deliver()
    with contextlib.closing(sqlite3.connect(node.path)) as reader:
        reader.execute("SELECT * FROM runs").fetchall()  # so that the log stays
        node.log(10, 20)
        node.deliver()
        log = node.path.with_name("store.db-wal")
        for name in (node.path, log):
            shutil.copy(name, f"{name}.copy")
    data = Path(f"{log}.copy").read_bytes()
    shutil.move(f"{node.path}.copy", node.path)
    log.write_bytes(data[: len(data) - 10])
    node.deliver()
    assert (node.steps(), len(node.told())) == ([*range(10)], 1)


def end(node: Node, status: str) -> None:
    data = said(Kind.FINISH, {"status": status, "error": "", "records": 10})
    node.spool.append(ID, 0, node.offset, data).result()
    node.offset += len(data)
    node.spool.end_producer(ID).result()


@pytest.mark.parametrize("destroyed", ["random", "empty", "missing"])
def test_a_run_whose_end_was_lost_with_its_stores_log_has_ended(node: Node, destroyed: str) -> None:
    node.log(0, 10)
    node.deliver()
    with contextlib.closing(sqlite3.connect(node.path)) as reader:
        reader.execute("SELECT * FROM runs").fetchall()  # so that the log stays
        node.log(10, 20)
        end(node, "finished")
        node.deliver()
        log = node.path.with_name("store.db-wal")
        for name in (node.path, log):
            shutil.copy(name, f"{name}.copy")
    shutil.move(f"{node.path}.copy", node.path)
    size = Path(f"{log}.copy").stat().st_size
    if destroyed == "missing":
        log.unlink(missing_ok=True)
    else:
        log.write_bytes(random.Random(1).randbytes(size) if destroyed == "random" else b"")
    node.deliver()
    with contextlib.closing(open_reader(node.path)) as reader:
        (run,) = reader.runs()
    assert (run.status, run.error) == (
        "killed",
        "it has ended; how it ended was lost with the store",
    )
    assert (node.steps(), len(node.told())) == ([*range(10)], 1)
    aside = [*node.path.parent.glob("quarantine/*-store.db-wal")]
    assert len(aside) == (destroyed == "random")


def test_an_end_that_comes_after_what_is_lost_counts(node: Node) -> None:
    node.log(0, 10)
    node.deliver()
    node.path.unlink()
    end(node, "finished")
    node.deliver()
    with contextlib.closing(open_reader(node.path)) as reader:
        (run,) = reader.runs()
    assert (run.status, run.error) == ("finished", "")


def test_nothing_is_told_of_a_store_that_has_everything(node: Node) -> None:
    for first in range(0, 30, 10):
        node.log(first, first + 10)
        node.deliver()
    assert (node.steps(), node.told(), node.lost()) == ([*range(30)], [], {})


class Rejecting(StoreSink):
    """Rejects what has a step 5."""

    def deliver(self, batch: Batch) -> None:
        if any(5 in points.steps for points in batch.points):
            raise Rejected("a step 5")
        super().deliver(batch)


def test_a_dead_letter_is_not_missing_and_can_still_be_delivered(node: Node) -> None:
    node.log(10, 20)
    node.deliver()
    node.path.unlink()
    node.log(0, 10)
    node.deliver(Rejecting(open_writer(node.path)))
    (letter,) = found(node.letters)
    node.path.unlink()
    node.deliver()
    mark(letter)
    node.deliver()
    assert (node.steps(), len(node.told())) == ([*range(10)], 1)


def test_what_a_full_disk_does_not_take_waits_in_the_spool(
    node: Node, small_file_system: Path
) -> None:
    node.path = small_file_system / "store.db"
    letters = DeadLetters(node.letters, "store", max_bytes=1 << 30)
    sink = StoreSink(open_writer(node.path))
    pipeline = Pipeline(node.spool, sink, interval_s=0.0, dead_letters=letters)
    pipeline.start()
    last = 0
    while pipeline.state != "retrying":
        node.log(last, last + 100)
        last += 100
        assert last < 100_000, "the disk takes it all"
    assert "free some space on that disk" in wait_until(lambda: pipeline.error)
    node.log(last, last + 100)
    assert not node.is_empty()
    remount = ["mount", "-o", "remount,size=64m", str(small_file_system)]
    subprocess.run(remount, check=True)
    wait_until(node.is_empty)
    pipeline.stop(30)
    assert (node.steps(), node.told()) == ([*range(last + 100)], [])
