"""Fixtures of the agent's core."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.agent.samples import Connections, producer
from tests.agent.served import MAX_BATCH_BYTES, Serve, Served
from tests.agent.sinks import FakeSink
from tests.fakes import DEADLINE_S, Folders
from trackagent.agent import server
from trackagent.agent.access import Access
from trackagent.agent.config import AgentConfig
from trackagent.agent.deadletters import DeadLetters
from trackagent.agent.orphans import Orphans
from trackagent.agent.pipeline import Pipeline
from trackagent.agent.spool import Spool
from trackagent.protos.v1 import agent_pb2


@pytest.fixture
def open_spool(folders: Folders) -> Iterator[Callable[..., Spool]]:
    """open_spool(**options): the spool of this test's state folder; what is open at the end is closed."""
    made: list[Spool] = []

    def opened(**options: Any) -> Spool:
        folders.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        spool = Spool(
            folders.state / "spool.db", **{"max_bytes": 1 << 30, "linger_s": 0.0, **options}
        )
        made.append(spool)
        return spool

    yield opened
    for spool in made:
        spool.close()


@pytest.fixture
def spool(open_spool: Callable[..., Spool]) -> Spool:
    """An empty spool."""
    return open_spool()


@pytest.fixture
def opened(spool: Spool) -> Spool:
    """A spool that knows the producer and has a sink."""
    spool.open_producer(producer(), {}).result()
    spool.add_sink("store").result()
    return spool


@pytest.fixture
def connections() -> Connections:
    """What opens connections that can be made to fail."""
    return Connections()


@pytest.fixture
def orphans(spool: Spool, folders: Folders) -> Orphans:
    """Of this test's spool, with a sink. Not running: the tests let it look."""
    spool.add_sink("store").result()
    return Orphans(spool, folders.directory, folders.state, folders.state / "quarantine")


@pytest.fixture
def start(spool: Spool, tmp_path: Path) -> Iterator[Callable[..., Pipeline]]:
    """start(sink, **options): a running pipeline of this test's spool, stopped after the test."""
    spool.open_producer(producer(), {}).result()
    running: list[tuple[Pipeline, FakeSink]] = []

    def started(
        sink: FakeSink,
        *,
        source: Spool = spool,
        interval_s: float = 0.0,
        dead_letter_bytes: int = 1 << 30,
    ) -> Pipeline:
        letters = DeadLetters(tmp_path / "dead-letters", sink.name, max_bytes=dead_letter_bytes)
        pipeline = Pipeline(source, sink, interval_s=interval_s, dead_letters=letters)
        pipeline.start()
        running.append((pipeline, sink))
        return pipeline

    yield started
    for pipeline, sink in running:
        sink.gate.set()
        pipeline.stop(0)


@pytest.fixture
def serve(folders: Folders, open_spool: Callable[..., Spool]) -> Iterator[Serve]:
    """serve(access, spool options): the service on this test's socket."""
    folders.directory.mkdir(mode=0o700)
    ends: list[Callable[[], None]] = []

    def started(
        *,
        max_streams: int = 1024,
        uncommitted_bytes: int = 1 << 26,
        access: Access | None = None,
        **options: Any,
    ) -> Served:
        served = Served(
            open_spool(**options),
            AgentConfig(
                directory=folders.directory,
                state_directory=folders.state,
                max_batch_bytes=MAX_BATCH_BYTES,
                max_streams=max_streams,
                uncommitted_bytes=uncommitted_bytes,
            ),
        )
        listening = threading.Event()
        loop = asyncio.new_event_loop()
        stop = asyncio.Event()

        async def describe(response: agent_pb2.StatusResponse) -> None:
            response.pid = 4712

        async def run() -> None:
            servicer = server.Servicer(served.spool, served.config, "1.2.3", describe, access)
            running = await server.start(
                servicer, f"unix:{served.config.socket_path}", MAX_BATCH_BYTES
            )
            listening.set()
            await stop.wait()
            await running.stop(0)

        thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
        thread.start()
        assert listening.wait(DEADLINE_S)
        served.connect()

        def end() -> None:
            served.channel.close()
            loop.call_soon_threadsafe(stop.set)
            thread.join(DEADLINE_S)
            loop.close()

        ends.append(end)
        return served

    yield started
    for end in ends:
        end()


@pytest.fixture
def served(serve: Serve) -> Served:
    """The service, with rank 0 opened."""
    found = serve()
    found.spool.add_sink("store").result()
    found.open()
    return found
