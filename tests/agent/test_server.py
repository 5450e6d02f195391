"""The service over a real socket: who logs, how it ends, what it tells, and what strangers cannot do."""

from __future__ import annotations

import asyncio
import random
import socket
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.agent.samples import metrics, producer
from tests.agent.served import (
    DATA,
    ID,
    MAX_BATCH_BYTES,
    Push,
    Serve,
    Served,
    Stream,
    offsets,
    push,
    refusal,
)
from tests.fakes import DEADLINE_S, Folders
from trackagent.agent import server
from trackagent.agent.access import Access, Sight
from trackagent.agent.owners import NotYours
from trackagent.client.segment import MAX_LANES
from trackagent.client.sender import PRODUCER_KEY
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

# --- OpenRun


def test_open_run_tells_the_agents_limit_and_version(served: Served) -> None:
    response = served.open()
    assert (response.agent_version, response.max_batch_bytes) == ("1.2.3", MAX_BATCH_BYTES)


def test_a_new_producer_has_nothing_committed(served: Served) -> None:
    assert list(served.open(1).committed) == []


def test_open_run_tells_what_is_committed(served: Served) -> None:
    served.push(push(lane=3))
    assert list(served.open().committed) == offsets({3: len(DATA)})


def test_open_run_goes_on_from_what_the_producer_holds(served: Served) -> None:
    assert list(served.open(held={0: 800}).committed) == offsets({0: 800})


def test_the_agents_own_lane_is_not_told(served: Served) -> None:
    served.spool.append_own(ID, DATA).result()
    assert list(served.open().committed) == []


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_protocol_version_is_refused_with_both(served: Served, version: int) -> None:
    request = agent_pb2.OpenRunRequest(protocol_version=version)
    assert refusal(lambda: served.stub.OpenRun(request)) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        f"this agent (1.2.3) speaks protocol version 1, the client speaks {version}: "
        "install the same trackagent on both sides",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("producer_id", b"short"),
        ("run_id", "x"),
        ("attempt", 0),
        ("rank", 64),
        ("local_rank", 1 << 24),
        ("world_size", 0),
        ("node", "a b"),
        ("start_time_ns", -1),
        ("experiment", ""),
        ("run_name", "a\nb"),
        ("sampled", "node a"),  # only the agent samples
    ],
)
def test_a_bad_identity_is_refused_with_the_field(served: Served, name: str, value: Any) -> None:
    code, message = refusal(lambda: served.open(**{name: value}))
    assert (code, name in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_no_identity_is_refused(served: Served) -> None:
    request = agent_pb2.OpenRunRequest(protocol_version=1)
    assert refusal(lambda: served.stub.OpenRun(request))[0] == grpc.StatusCode.INVALID_ARGUMENT


BAD_OFFSETS = [{MAX_LANES: 0}, {0: 4}, {0: server.MAX_OFFSET}, {0: 2**64 - 8}]


@pytest.mark.parametrize("held", BAD_OFFSETS)
def test_an_offset_that_cannot_be_is_refused(served: Served, held: dict[int, int]) -> None:
    assert refusal(lambda: served.open(held=held))[0] == grpc.StatusCode.INVALID_ARGUMENT


# --- CloseRun


def test_close_run_is_complete_when_all_is_committed(served: Served) -> None:
    served.push(push())
    assert served.close({0: len(DATA)}) is True


def test_close_run_is_complete_when_nothing_was_logged(served: Served) -> None:
    assert served.close({}) is True


def test_close_run_is_not_complete_when_bytes_are_missing(served: Served) -> None:
    served.push(push())
    assert served.close({0: len(DATA) + 8}) is False


def test_close_run_is_not_complete_when_a_lane_is_missing(served: Served) -> None:
    assert served.close({5: 8}) is False


def test_close_run_may_be_repeated(served: Served) -> None:
    assert [served.close({}), served.close({})] == [True, True]


def test_a_closed_producer_is_listed_no_longer(served: Served) -> None:
    served.close({})
    assert list(served.status().producers) == []


def test_a_producer_that_is_not_complete_stays_listed(served: Served) -> None:
    served.close({0: 8})
    assert len(served.status().producers) == 1


@pytest.mark.parametrize("ends", BAD_OFFSETS)
def test_an_end_that_cannot_be_is_refused(served: Served, ends: dict[int, int]) -> None:
    assert refusal(lambda: served.close(ends))[0] == grpc.StatusCode.INVALID_ARGUMENT


# --- Status and health


def test_status_names_the_agent(served: Served) -> None:
    status = served.status()
    assert (status.agent_version, status.pid) == ("1.2.3", 4712)


def test_status_counts_what_is_spooled(served: Served) -> None:
    served.push(push(), push(), push(first_offset=len(DATA)))
    spool = served.status().spool
    assert (spool.batches, spool.bytes, spool.received_bytes) == (2, 2 * len(DATA), 2 * len(DATA))


def test_status_shows_sinks(served: Served) -> None:
    served.push(push())
    (sink,) = served.status().sinks
    assert (sink.name, sink.batches_behind, sink.rejected) == ("store", 1, 0)


def test_status_shows_producers_with_what_is_committed(served: Served) -> None:
    served.push(push(), push(lane=1))
    (one,) = served.status().producers
    assert (one.producer.producer_id, one.producer.node, one.committed_bytes) == (
        ID,
        "host-a",
        2 * len(DATA),
    )


def test_status_of_a_producer_that_holds_as_much_as_can_be(served: Served) -> None:
    served.open(1, held=dict.fromkeys(range(MAX_LANES), server.MAX_OFFSET - 8))
    _, one = served.status().producers
    assert one.committed_bytes == MAX_LANES * (server.MAX_OFFSET - 8)


@pytest.mark.parametrize("service", ["", server.SERVICE])
def test_health_is_serving(served: Served, service: str) -> None:
    stub = health_pb2_grpc.HealthStub(served.channel)
    response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


# --- strangers


def test_random_bytes_on_the_socket_harm_no_one(served: Served) -> None:
    stream = Stream(served)
    stream.send(push())
    stream.acknowledged()
    for seed in range(20):
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(served.config.socket_path))
            stranger.sendall(random.Random(seed).randbytes(1000))
    stream.send(push(first_offset=len(DATA)))
    assert stream.acknowledged() == (0, 2 * len(DATA))
    stream.end()


def test_random_bytes_in_a_batch_harm_no_one(served: Served) -> None:
    data = random.Random(1).randbytes(MAX_BATCH_BYTES)
    served.open(1)
    assert served.push(push(data), push(metrics(0, 1, 0.5), rank=1)) == [
        (0, len(data)),
        (0, len(metrics(0, 1, 0.5))),
    ]


def test_an_address_where_nothing_can_listen_is_an_error(folders: Folders) -> None:
    address = f"unix:{folders.directory}/nowhere/agent.sock"
    with pytest.raises(OSError, match=r"cannot listen at unix:.*nowhere"):
        asyncio.run(server.start(agent_pb2_grpc.AgentServicer(), address, 1 << 20))  # type: ignore[arg-type]


def test_headers_that_are_too_long_are_refused_and_hold_nobody_up(served: Served) -> None:
    request = agent_pb2.StatusRequest()
    with pytest.raises(grpc.RpcError) as error:
        served.stub.Status(request, metadata=[("x", "y" * 64 * 1024)], timeout=DEADLINE_S)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert served.stub.Status(request, timeout=DEADLINE_S).pid == 4712


class Unsure(Access):
    """Cannot tell whose a producer is: its database fails."""

    def __init__(self, problem: Callable[[], Exception]) -> None:
        object.__setattr__(self, "problem", problem)

    def guest(self, peer: str) -> int | None:
        return None

    async def check(self, peer: str, producer_id: bytes) -> None:
        raise self.problem()  # type: ignore[attr-defined]


@pytest.mark.parametrize("named", [True, False], ids=["a named stream", "a stream"])
@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        (lambda: NotYours("whose?"), (grpc.StatusCode.PERMISSION_DENIED, "whose?")),
        (
            lambda: sqlite3.OperationalError("disk I/O error"),
            (grpc.StatusCode.UNAVAILABLE, "cannot tell whose run it is: try again"),
        ),
        (lambda: RuntimeError("?"), (grpc.StatusCode.INTERNAL, "the agent failed: see its log")),
    ],
    ids=["another user's", "not to be told", "unexpected"],
)
def test_a_stream_whose_batch_is_not_taken_does_not_end_well(
    serve: Serve,
    problem: Callable[[], Exception],
    answer: tuple[grpc.StatusCode, str],
    *,
    named: bool,
) -> None:
    served = serve(access=Unsure(problem))
    metadata = [(PRODUCER_KEY, ID)] if named else []
    calls = served.stub.Push(iter([push()]), metadata=metadata, timeout=DEADLINE_S)
    assert refusal(lambda: list(calls)) == answer


class Member(Access):
    """Lets everybody see one producer only."""

    def __init__(self, own: bytes) -> None:
        object.__setattr__(self, "own", own)

    def sight(self, peer: str) -> Sight:
        return lambda producer_id: producer_id == self.own  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", [0, 1000])
def test_a_member_sees_their_rank_among_a_thousand_of_others(serve: Serve, place: int) -> None:
    ids = [number.to_bytes(16, "big") for number in range(1001)]
    served = serve(access=Member(ids[place]))
    infos = [replace(producer(), producer_id=one) for one in ids]
    for opened in [served.spool.open_producer(info, {}) for info in infos]:
        opened.result(DEADLINE_S)
    seen = [one.producer.producer_id for one in served.status().producers]
    assert seen == [ids[place]]


@pytest.mark.parametrize("call", ["Status", "Push"])
def test_what_goes_wrong_unexpectedly_is_for_the_log_alone(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def failing(*_: object, **__: object) -> Future[int]:
        future: Future[int] = Future()
        future.set_exception(RuntimeError("/home/alice/secret"))
        return future

    for name in ("statistics", "append"):
        monkeypatch.setattr(served.spool, name, failing)
    if call == "Status":
        answer = refusal(lambda: served.stub.Status(agent_pb2.StatusRequest(), timeout=DEADLINE_S))
    else:
        batch = Push(producer_id=ID, journal_bytes=DATA)
        answer = refusal(lambda: next(served.stub.Push(iter([batch]), timeout=DEADLINE_S)))
    assert answer == (grpc.StatusCode.INTERNAL, "the agent failed: see its log")
    assert "/home/alice/secret" in caplog.text
