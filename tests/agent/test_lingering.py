"""For which runs a hub that is told to stop waits."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.agent.samples import RUN_ID, TIME_NS, producer
from tests.fakes import DEADLINE_S
from trackagent.agent import store
from trackagent.agent.lingering import linger
from trackagent.agent.spool import Spool, SpoolError
from trackagent.agent.store.contract import (
    Batch,
    BatchId,
    ProducerEnd,
    ProducerInfo,
    Reader,
    Writer,
)

RANKS = [producer(rank, world_size=2) for rank in (0, 1)]


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    one = store.open_writer(tmp_path / "store.db")
    yield one
    one.close()


def end(writer: Writer, number: int, *infos: ProducerInfo) -> None:
    """These ranks have ended, as far as the store knows."""
    ends = [ProducerEnd(info.producer_id, TIME_NS, "finished", "", -1) for info in infos]
    writer.write(Batch(BatchId("spool", number, number), list(infos), ends=ends))


def begin_and_end(spool: Spool, info: ProducerInfo) -> None:
    spool.open_producer(info, {}).result()
    spool.end_producer(info.producer_id).result()


def lingered(
    spool: Spool, path: Path, *, looked: Callable[[int], None], limit_s: float = DEADLINE_S
) -> int:
    """How often the store was looked at until the wait was over; before each look, looked(how often)."""
    looks = 0

    def open_reader() -> Reader:
        nonlocal looks
        looks += 1
        looked(looks)
        return store.open_reader(path)

    async def wait() -> None:
        hurried = asyncio.Event()
        await linger(spool, open_reader, since_ns=0, limit_s=limit_s, hurried=hurried)

    asyncio.run(asyncio.wait_for(wait(), DEADLINE_S))
    return looks


def test_a_run_is_waited_for_that_is_not_stored_yet(
    spool: Spool, writer: Writer, tmp_path: Path
) -> None:
    begin_and_end(spool, RANKS[0])

    def looked(looks: int) -> None:
        if looks == 2:
            end(writer, 1, RANKS[0])
        if looks == 3:
            end(writer, 2, RANKS[1])

    assert lingered(spool, tmp_path / "store.db", looked=looked) == 3


def test_a_run_that_never_comes_is_not_waited_for_beyond_the_limit(
    spool: Spool, writer: Writer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin_and_end(spool, RANKS[0])
    lingered(spool, tmp_path / "store.db", looked=lambda _: None, limit_s=0.01)
    assert f"run {RUN_ID[:8]}: ranks of other nodes have not ended" in caplog.text


@pytest.mark.parametrize("failure", [SpoolError("no space left"), sqlite3.OperationalError("disk")])
def test_a_spool_that_fails_ends_the_wait(
    tmp_path: Path, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Spool):
        def producers(self) -> Future[list[ProducerInfo]]:
            failed: Future[list[ProducerInfo]] = Future()
            failed.set_exception(failure)
            return failed

    spool = Failing(tmp_path / "spool.db", max_bytes=1 << 30)
    assert lingered(spool, tmp_path / "store.db", looked=lambda _: None) == 0
    assert str(failure) in caplog.text
    spool.close()
