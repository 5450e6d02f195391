"""The service over a real socket: what it refuses, and that it acknowledges only what is committed."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.agent.samples import Connections, losses, metrics, producer
from tests.fakes import DEADLINE_S, Folders, wait_until
from trackagent.agent import server
from trackagent.agent.access import Access
from trackagent.agent.config import AgentConfig
from trackagent.agent.owners import NotYours
from trackagent.agent.spool import Spool
from trackagent.client.segment import MAX_LANES
from trackagent.client.sender import PRODUCER_KEY
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

Push = agent_pb2.PushRequest
ID = producer().producer_id
DATA = losses(range(4))
MAX_BATCH_BYTES = 1024 * 1024


@dataclass
class Served:
    """A running service and a client of it."""

    spool: Spool
    config: AgentConfig
    channel: grpc.Channel = field(init=False)
    stub: agent_pb2_grpc.AgentStub = field(init=False)

    def connect(self) -> None:
        self.channel = grpc.insecure_channel(
            f"unix:{self.config.socket_path}", [("grpc.use_local_subchannel_pool", 1)]
        )
        self.stub = agent_pb2_grpc.AgentStub(self.channel)

    def open(
        self, rank: int = 0, *, held: dict[int, int] | None = None, **changes: Any
    ) -> agent_pb2.OpenRunResponse:
        """OpenRun for this rank; `changes` to its identity."""
        fields = dataclasses.asdict(producer(rank)) | changes
        return self.stub.OpenRun(
            agent_pb2.OpenRunRequest(
                protocol_version=server.PROTOCOL_VERSION,
                producer=agent_pb2.Producer(**fields),
                held=offsets(held or {}),
            ),
            timeout=DEADLINE_S,
        )

    def push(self, *requests: Push) -> list[tuple[int, int]]:
        """One stream with these requests; the acknowledgements (lane, offset)."""
        responses = self.stub.Push(iter(requests), timeout=DEADLINE_S)
        return [(one.lane, one.offset) for one in responses]

    def close(self, ends: dict[int, int]) -> bool:
        request = agent_pb2.CloseRunRequest(producer_id=ID, ends=offsets(ends))
        return bool(self.stub.CloseRun(request, timeout=DEADLINE_S).complete)

    def status(self) -> agent_pb2.StatusResponse:
        return self.stub.Status(agent_pb2.StatusRequest(), timeout=DEADLINE_S)


def offsets(by_lane: dict[int, int]) -> list[agent_pb2.LaneOffset]:
    return [agent_pb2.LaneOffset(lane=lane, offset=offset) for lane, offset in by_lane.items()]


def push(data: bytes = DATA, first_offset: int = 0, lane: int = 0, rank: int = 0) -> Push:
    return Push(
        producer_id=producer(rank).producer_id,
        lane=lane,
        first_offset=first_offset,
        journal_bytes=data,
    )


Serve = Callable[..., Served]


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


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    """Code and message with which a call is refused."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


def spooled(served: Served) -> list[bytes]:
    delivery = served.spool.next_delivery("store", 1 << 30).result()
    return [batch.journal_bytes for batch in delivery.batches] if delivery else []


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


# --- Push


def test_a_batch_is_acknowledged_with_the_offset_it_ends_at(served: Served) -> None:
    assert served.push(push()) == [(0, len(DATA))]


def test_acknowledgements_are_cumulative(served: Served) -> None:
    requests = [push(first_offset=number * len(DATA)) for number in range(3)]
    assert served.push(*requests) == [(0, len(DATA)), (0, 2 * len(DATA)), (0, 3 * len(DATA))]


def test_a_repeated_batch_is_acknowledged_and_kept_once(served: Served) -> None:
    assert served.push(push(), push()) == [(0, len(DATA))] * 2
    assert spooled(served) == [DATA]


def test_a_batch_sent_again_on_another_stream_is_kept_once(served: Served) -> None:
    for _ in range(3):
        served.push(push())
    assert spooled(served) == [DATA]


def test_a_stream_may_carry_several_lanes(served: Served) -> None:
    assert served.push(push(lane=0), push(lane=63)) == [(0, len(DATA)), (63, len(DATA))]


def test_an_empty_stream_ends_well(served: Served) -> None:
    assert served.push() == []


def test_a_batch_of_the_largest_size_is_taken(served: Served) -> None:
    data = bytes(MAX_BATCH_BYTES)
    assert served.push(push(data)) == [(0, MAX_BATCH_BYTES)]


REFUSED = {
    "empty": (push(b""), "a batch of 0 bytes"),
    "unaligned": (push(DATA[:-1]), f"a batch of {len(DATA) - 1} bytes"),
    "an unaligned offset": (push(first_offset=4), "at 4"),
    "too large": (push(bytes(MAX_BATCH_BYTES + 8)), f"at most {MAX_BATCH_BYTES} bytes"),
    "lane 64": (push(lane=64), "offset 0 of lane 64"),
    "the agent's own lane": (push(lane=255), "offset 0 of lane 255"),
    "an offset out of range": (push(first_offset=2**63), f"offset {2**63} of lane 0"),
    "a gap": (push(first_offset=8), "lane 0 goes on at 0, the batch begins at 8"),
}


@pytest.mark.parametrize(("request_", "message"), REFUSED.values(), ids=REFUSED)
def test_a_batch_that_breaks_a_rule_is_refused_with_the_rule(
    served: Served, request_: Push, message: str
) -> None:
    code, details = refusal(lambda: served.push(request_))
    assert (code, message in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@pytest.mark.parametrize(("request_", "message"), REFUSED.values(), ids=REFUSED)
def test_a_refused_batch_is_not_kept(served: Served, request_: Push, message: str) -> None:
    refusal(lambda: served.push(request_))
    assert spooled(served) == []


def test_what_came_before_a_refused_batch_is_kept(served: Served) -> None:
    refusal(lambda: served.push(push(), push(b"", len(DATA))))
    assert spooled(served) == [DATA]


def test_a_message_over_the_transports_limit_is_refused(served: Served) -> None:
    code, _ = refusal(lambda: served.push(push(bytes(MAX_BATCH_BYTES + (1 << 20)))))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("producer_id", [b"", b"x", bytes([9]) * 16, bytes(1000)])
def test_an_unknown_producer_is_told_to_open_first(served: Served, producer_id: bytes) -> None:
    request = Push(producer_id=producer_id, journal_bytes=DATA)
    code, details = refusal(lambda: served.push(request))
    assert (code, details) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this producer was not opened at this agent: call OpenRun first",
    )


def test_a_full_spool_asks_to_come_back(serve: Serve) -> None:
    served = serve(max_bytes=len(DATA))
    served.open()
    code, details = refusal(lambda: served.push(push(), push(first_offset=len(DATA))))
    assert (code, details) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"the spool holds {len(DATA)} bytes, its limit is {len(DATA)}: a sink is behind",
    )


def test_a_full_spool_keeps_what_it_had_room_for(serve: Serve) -> None:
    served = serve(max_bytes=len(DATA))
    served.spool.add_sink("store").result()
    served.open()
    refusal(lambda: served.push(push(), push(first_offset=len(DATA))))
    assert spooled(served) == [DATA]


class Stream:
    """A Push stream under way."""

    def __init__(self, served: Served) -> None:
        self._requests: SimpleQueue[Push | None] = SimpleQueue()
        self.call = served.stub.Push(iter(self._requests.get, None))

    def send(self, request: Push) -> None:
        self._requests.put(request)

    def acknowledged(self) -> tuple[int, int]:
        """The next acknowledgement."""
        response = next(self.call)
        return response.lane, response.offset

    def end(self) -> None:
        self._requests.put(None)


def test_streams_beyond_the_limit_are_refused(serve: Serve) -> None:
    served = serve(max_streams=1)
    served.open()
    first = Stream(served)
    first.send(push())
    first.acknowledged()
    code, details = refusal(lambda: served.push(push()))
    first.end()
    assert (code, details) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "this agent serves 1 streams, its limit: raise max_streams",
    )


@pytest.mark.parametrize("how", ["ends", "is cancelled", "is refused"])
def test_a_stream_that_has_ended_makes_room_for_another(serve: Serve, how: str) -> None:
    served = serve(max_streams=1)
    served.open()
    first = Stream(served)
    first.send(push())
    first.acknowledged()
    if how == "ends":
        first.end()
        assert list(first.call) == []
    elif how == "is cancelled":
        first.call.cancel()
    else:
        first.send(push(b""))
        assert refusal(first.acknowledged)[0] == grpc.StatusCode.INVALID_ARGUMENT

    def taken() -> bool:
        try:
            return served.push(push()) == [(0, len(DATA))]
        except grpc.RpcError:
            return False

    wait_until(taken, "there is room for another")
    first.end()


# --- commits


@pytest.fixture
def faulty(serve: Serve, connections: Connections) -> Served:
    """A service over a spool whose statements can fail or be held back, with rank 0 opened."""
    found = serve(connect=connections)
    found.spool.add_sink("store").result()
    found.open()
    return found


def test_nothing_is_acknowledged_before_its_commit(
    faulty: Served, connections: Connections
) -> None:
    connections.last.held_back = "COMMIT"
    stream = Stream(faulty)
    answer: Future[tuple[int, int]] = Future()
    reader = threading.Thread(target=lambda: answer.set_result(stream.acknowledged()))
    reader.start()
    stream.send(push())
    assert connections.last.reached.wait(DEADLINE_S)
    before = answer.done()
    connections.last.released.set()
    assert (before, answer.result(DEADLINE_S)) == (False, (0, len(DATA)))
    stream.end()
    reader.join()


def test_what_awaits_its_commit_is_bounded(
    serve: Serve, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = MAX_BATCH_BYTES
    served = serve(connect=connections, uncommitted_bytes=cap)
    served.spool.add_sink("store").result()
    served.open()
    append = served.spool.append
    lock = threading.Lock()
    held, most = 0, 0

    def counted(*arguments: Any, **keywords: Any) -> Future[int]:
        nonlocal held, most
        size = len(arguments[3])
        with lock:
            held += size
            most = max(most, held)

        def committed(_: object) -> None:
            nonlocal held
            with lock:
                held -= size

        commit = append(*arguments, **keywords)
        commit.add_done_callback(committed)
        return commit

    monkeypatch.setattr(served.spool, "append", counted)
    connections.last.held_back = "COMMIT"
    data = losses(range(8_000))
    batches = [push(data, number * len(data)) for number in range(8)]
    answers: Future[list[tuple[int, int]]] = Future()
    sender = threading.Thread(target=lambda: answers.set_result(served.push(*batches)))
    sender.start()
    assert connections.last.reached.wait(DEADLINE_S)
    wait_until(lambda: held > cap - len(data), "no other batch fits")
    # The service is alive meanwhile, and could have read on.
    health = health_pb2_grpc.HealthStub(served.channel)
    for _ in range(50):
        health.Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
    connections.last.released.set()
    assert answers.result(DEADLINE_S)[-1] == (0, 8 * len(data))
    sender.join()
    assert 0 < most <= cap


def test_a_commit_that_fails_is_not_acknowledged(faulty: Served, connections: Connections) -> None:
    connections.last.failing = "COMMIT"
    assert refusal(lambda: faulty.push(push())) == (
        grpc.StatusCode.INTERNAL,
        "the spool cannot commit: database or disk is full",
    )


def test_after_a_commit_that_failed_the_batch_can_be_sent_again(
    faulty: Served, connections: Connections
) -> None:
    connections.last.failing = "COMMIT"
    refusal(lambda: faulty.push(push()))
    connections.last.failing = None
    assert faulty.push(push()) == [(0, len(DATA))]
    assert spooled(faulty) == [DATA]


def test_open_run_says_that_the_spool_cannot_commit(
    faulty: Served, connections: Connections
) -> None:
    connections.last.failing = "COMMIT"
    connections.last.error = sqlite3.OperationalError("disk I/O error")
    assert refusal(lambda: faulty.open(1)) == (
        grpc.StatusCode.INTERNAL,
        "the spool cannot commit: disk I/O error",
    )


def test_a_damaged_spool_that_cannot_be_replaced_is_named(
    faulty: Served, connections: Connections
) -> None:
    connections.last.failing = "COMMIT"
    connections.last.error = sqlite3.DatabaseError("database disk image is malformed")
    connections.full = True
    refusal(lambda: faulty.push(push()))
    assert refusal(lambda: faulty.push(push())) == (
        grpc.StatusCode.INTERNAL,
        "the spool cannot commit: the spool is damaged (database disk image is malformed) and cannot be "
        "replaced: No space left on device",
    )


def test_a_rank_that_is_gone_before_its_commit_harms_no_other(
    faulty: Served, connections: Connections
) -> None:
    faulty.open(1)
    connections.last.held_back = "COMMIT"
    gone = Stream(faulty)
    gone.send(push())
    assert connections.last.reached.wait(DEADLINE_S)
    gone.send(push(first_offset=len(DATA)))
    gone.call.cancel()
    gone.end()
    connections.last.released.set()
    assert faulty.push(push(rank=1)) == [(0, len(DATA))]


def test_requests_behind_a_refused_one_leave_nothing_in_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [push(first_offset=8 * number) for number in range(1, 20)]
    refusal(lambda: served.push(*requests))
    served.push(push())
    assert caplog.messages == []


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

    def __init__(self, problem: Exception) -> None:
        object.__setattr__(self, "problem", problem)

    def guest(self, peer: str) -> int | None:
        return None

    async def check(self, peer: str, producer_id: bytes) -> None:
        raise self.problem  # type: ignore[attr-defined]


@pytest.mark.parametrize("named", [True, False], ids=["a named stream", "a stream"])
@pytest.mark.parametrize(
    ("problem", "answer"),
    [
        (NotYours("whose?"), (grpc.StatusCode.PERMISSION_DENIED, "whose?")),
        (
            sqlite3.OperationalError("disk I/O error"),
            (grpc.StatusCode.UNAVAILABLE, "cannot tell whose run it is: try again"),
        ),
        (RuntimeError("?"), (grpc.StatusCode.INTERNAL, "the agent failed: see its log")),
    ],
    ids=["another user's", "not to be told", "unexpected"],
)
def test_a_stream_whose_batch_is_not_taken_does_not_end_well(
    serve: Serve, problem: Exception, answer: tuple[grpc.StatusCode, str], *, named: bool
) -> None:
    served = serve(access=Unsure(problem))
    metadata = [(PRODUCER_KEY, ID)] if named else []
    calls = served.stub.Push(iter([push()]), metadata=metadata, timeout=DEADLINE_S)
    assert refusal(lambda: list(calls)) == answer


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
