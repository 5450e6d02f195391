"""Batches on their way into the spool: what is refused, and that only what is committed is acknowledged."""

from __future__ import annotations

import sqlite3
import threading
from concurrent.futures import Future
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.agent.samples import Connections, losses
from tests.agent.served import (
    DATA,
    MAX_BATCH_BYTES,
    Push,
    Serve,
    Served,
    Stream,
    push,
    refusal,
    spooled,
)
from tests.fakes import DEADLINE_S, wait_until


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
