"""A hub under more than it can hold: what it has not read stays with whoever sends it, and others go on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.agent.hubs import (
    FORWARD,
    RUN_TOKEN,
    Owing,
    RunningHub,
    Start,
    batch,
    bearer,
    grant,
    part,
    refused,
    request,
    token_file,
)
from tests.agent.samples import producer
from tests.fakes import DEADLINE_S, Folders, wait_until
from trackagent.agent import hubserver, listener, tls
from trackagent.agent.hub import MAX_MESSAGE_BYTES, Hub
from trackagent.agent.meeting import Elsewhere, NoHub
from trackagent.agent.relay import Bucket
from trackagent.agent.store.contract import BatchId
from trackagent.protos.v1 import agent_pb2, hub_pb2

Code = grpc.StatusCode
MeetRequest = agent_pb2.MeetRequest
LARGE_BYTES = 4 * 1024 * 1024


@pytest.fixture
def start_hub(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start_hub(limits, **settings): a hub in this test's folders; limits: of its service."""
    made: list[RunningHub] = []

    def started(limits: dict[str, Any], **settings: object) -> RunningHub:
        def limited(*arguments: Any, **options: Any) -> Hub:
            return Hub(*arguments, **{**options, **limits})

        monkeypatch.setattr(hubserver, "Hub", limited)
        made.append(RunningHub(folders.directory.parent, **settings))
        made[-1].server.tokens.note(producer().run_id, RUN_TOKEN)
        return made[-1]

    yield started
    for hub in made:
        hub.close()


class Slow:
    """A commit for which whoever delivers waits."""

    def __init__(self, hub: RunningHub) -> None:
        self.commits: list[Future[None]] = []
        self._spool = hub.spool
        self._accept = hub.spool.accept
        hub.spool.accept = self._begun  # type: ignore[assignment]

    def _begun(self, id_: BatchId, data: bytes, node: str) -> Future[None]:
        self._accept(id_, data, node)
        self.commits.append(Future())
        return self.commits[-1]

    def end(self) -> None:
        self._spool.accept = self._accept  # type: ignore[method-assign]
        for commit in self.commits:
            commit.set_result(None)


class Counted(Bucket):
    """What a hub reads of others."""

    taken = 0

    def take(self, size: int) -> float:
        Counted.taken += size
        return super().take(size)


@contextlib.contextmanager
def raw(hub: RunningHub) -> Iterator[grpc.Channel]:
    channel = tls.channel(hub.address, pin=hub.server.pin)
    try:
        yield channel
    finally:
        channel.close()


def large(first: int) -> hub_pb2.ForwardRequest:
    """A request that can be delivered, of LARGE_BYTES and a little."""
    said = batch(producer(), message=os.urandom(LARGE_BYTES).hex())
    return request(part(said, first=first, last=first), grants=[grant()])


def test_what_a_hub_has_no_room_for_stays_where_it_is(
    start_hub: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "Bucket", Counted)
    hub = start_hub({"held_bytes": MAX_MESSAGE_BYTES + LARGE_BYTES // 2, "turn_timeout_s": 0.2})
    with hub.connected() as stub:
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)
        slow = Slow(hub)
        held = stub.Forward.future(large(2), timeout=DEADLINE_S)
        wait_until(lambda: slow.commits, "the first")
        assert Counted.taken > LARGE_BYTES
        Counted.taken = 0
        assert refused(stub.Forward, large(3)) == (
            Code.UNAVAILABLE,
            "the hub is busy: come back",
        )
        assert Counted.taken < LARGE_BYTES // 2
        slow.end()
        held.result(DEADLINE_S)
        stub.Forward(large(3), timeout=DEADLINE_S)
    assert len(hub.spool.parts) == 3


def test_a_message_has_so_long_to_come(start_hub: Start) -> None:
    hub = start_hub({"read_timeout_s": 0.1, "strange_bytes": MAX_MESSAGE_BYTES})
    ends = threading.Event()

    def never() -> Iterator[bytes]:
        ends.wait(DEADLINE_S)
        yield from ()

    with raw(hub) as channel:
        assert refused(channel.stream_unary(FORWARD), never()) == (
            Code.DEADLINE_EXCEEDED,
            "the message did not arrive within 0.1 s",
        )
        ends.set()
    # And what was taken for it is free.
    with hub.connected() as stub:
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)
    assert len(hub.spool.parts) == 1


def test_strangers_hold_up_none_who_may_deliver(start_hub: Start) -> None:
    hub = start_hub({"turn_timeout_s": 0.2})
    with hub.connected() as stub, hub.connected() as new, contextlib.ExitStack() as opened:
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)
        for number in range(8):
            owing = opened.enter_context(Owing(hub, f"127.0.0.{2 + number}", 8))
            owing.wait_for_an_answer()
        assert refused(new.Forward, request(grants=[grant()]))[1] == "the hub is busy: come back"
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)


@pytest.mark.parametrize("with_token", [True, False])
def test_a_host_that_owes_its_messages_holds_no_other_up(
    start_hub: Start, tmp_path: Path, with_token: bool
) -> None:
    limits = {
        "turn_timeout_s": 0.2,
        "held_bytes": 3 * MAX_MESSAGE_BYTES,
        "strange_bytes": 2 * MAX_MESSAGE_BYTES,
    }
    hub = start_hub(limits, token_file=token_file(tmp_path))
    metadata = bearer() if with_token else []
    with hub.connected() as stub, Owing(hub, "127.0.0.2", 8, metadata) as owing:
        owing.wait_for_an_answer()
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S, metadata=metadata)
    assert len(hub.spool.parts) == 1


def test_ranks_that_meet_at_a_busy_hub_may_ask_again(start_hub: Start, tmp_path: Path) -> None:
    limits = {"turn_timeout_s": 0.2, "held_bytes": MAX_MESSAGE_BYTES}
    hub = start_hub(limits, token_file=token_file(tmp_path))
    said = MeetRequest(job="j", operation=MeetRequest.SET, key="k", value=b"v")
    table = Elsewhere(partial(tls.channel, hub.address, pin=hub.server.pin), bearer())
    with contextlib.closing(table):
        with Owing(hub, "127.0.0.2", 2, bearer()) as owing:
            owing.wait_for_an_answer()
            with pytest.raises(NoHub, match="the hub says: the hub is busy: come back"):
                asyncio.run(table.meet(said))

        def met() -> bool:
            """Whether they could, now that the other is gone."""
            with contextlib.suppress(NoHub):
                return asyncio.run(table.meet(said)).found
            return False

        wait_until(met, "they have met")


def test_ranks_whose_connection_another_has_closed_may_ask_again(
    start_hub: Start, tmp_path: Path
) -> None:
    hub = start_hub({}, token_file=token_file(tmp_path))
    said = MeetRequest(job="j", operation=MeetRequest.SET, key="k", value=b"v")
    channels = [tls.channel(hub.address, pin=hub.server.pin) for _ in range(2)]
    table = Elsewhere(iter(channels).__next__, bearer())
    with contextlib.closing(table):
        assert asyncio.run(table.meet(said)).found
        channels[0].close()
        with pytest.raises(NoHub, match="has just been closed"):
            asyncio.run(table.meet(said))
        assert asyncio.run(table.meet(said)).found
