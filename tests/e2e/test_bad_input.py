"""Whatever comes over the socket or lies in the folders, the agent says what is wrong and goes on."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4
from zlib import crc32

import grpc
import pytest

from tests.fakes import AgentProcess, Folders, run_script, short_folder, wait_until
from trackagent.agent.config import STORE_NAME
from trackagent.agent.store import open_reader
from trackagent.agent.store.contract import Event
from trackagent.client import record
from trackagent.client.record import NO_STEP, Kind
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

TIMEOUT_S = 20.0
GOOD = """
from trackagent import client
run = client.init(experiment="good")
for step in range(10):
    client.log({"loss": step / 7}, step=step)
print(run.id, client.finish())
"""


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """One agent for everything bad; in the end a well-behaved process finds it as it should be."""
    base = short_folder()
    process = AgentProcess(Folders.under(base), "--deliver-interval-s", "0.01")
    try:
        yield process.start()
        run_id, delivered = run_script(process.folders, GOOD).stdout.split()
        assert delivered == "True"
        process.wait_for_status(run_id, "finished")
        assert [point.value for point in process.exported(run_id)] == [s / 7 for s in range(10)]
        process.wait_for_delivery()
    finally:
        process.close()
        shutil.rmtree(base)


@pytest.fixture(scope="module")
def stub(agent: AgentProcess) -> Iterator[agent_pb2_grpc.AgentStub]:
    with grpc.insecure_channel(agent.address) as channel:
        yield agent_pb2_grpc.AgentStub(channel)


@pytest.fixture(autouse=True)
def others_are_served(stub: agent_pb2_grpc.AgentStub) -> Iterator[None]:
    """After each test, a well-behaved producer is acknowledged."""
    yield
    who, good = producer(), event("good")
    open_run(stub, who)
    assert push(stub, who, good) == [len(good)]


def events(agent: AgentProcess, run_id: str) -> list[Event]:
    """What the store has; nothing where the run is not stored yet."""
    if agent.run(run_id) is None:
        return []
    with contextlib.closing(open_reader(agent.folders.state / STORE_NAME)) as reader:
        return reader.events(run_id)


def producer(**changes: Any) -> agent_pb2.Producer:
    fields = {
        "producer_id": uuid4().bytes,
        "run_id": uuid4().hex,
        "attempt": 1,
        "world_size": 1,
        "node": "elsewhere",
        "pid": 1,
        "start_time_ns": 1_700_000_000_000_000_000,
        "experiment": "bad",
    }
    return agent_pb2.Producer(**(fields | changes))


def open_run(
    stub: agent_pb2_grpc.AgentStub, who: agent_pb2.Producer, version: int = 1
) -> agent_pb2.OpenRunResponse:
    request = agent_pb2.OpenRunRequest(protocol_version=version, producer=who)
    return stub.OpenRun(request, timeout=TIMEOUT_S)


def push(
    stub: agent_pb2_grpc.AgentStub,
    who: agent_pb2.Producer,
    data: bytes,
    *,
    lane: int = 0,
    first_offset: int = 0,
) -> list[int]:
    """Pushes one batch; the acknowledged offsets."""
    request = agent_pb2.PushRequest(
        producer_id=who.producer_id, lane=lane, first_offset=first_offset, journal_bytes=data
    )
    return [answer.offset for answer in stub.Push(iter([request]), timeout=TIMEOUT_S)]


def end(stub: agent_pb2_grpc.AgentStub, who: agent_pb2.Producer, offset: int) -> None:
    ends = [agent_pb2.LaneOffset(lane=0, offset=offset)]
    stub.CloseRun(
        agent_pb2.CloseRunRequest(producer_id=who.producer_id, ends=ends), timeout=TIMEOUT_S
    )


def refusal(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def event(message: str, size: int = 0) -> bytes:
    data = {"level": "info", "message": message + "x" * size}
    return record.encode_json(Kind.EVENT, data, step=NO_STEP, time_ns=1)


# --- the wire


@pytest.mark.parametrize("size", [1, 24, 9, 100, 100_000])
def test_random_bytes_on_the_socket(agent: AgentProcess, size: int) -> None:
    noise = random.Random(size)
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(str(agent.folders.socket))
            try:
                connection.sendall(noise.randbytes(size))
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has hung up already


def test_half_a_greeting_and_silence_hold_nobody_up(agent: AgentProcess) -> None:
    connections = [socket.socket(socket.AF_UNIX) for _ in range(50)]
    for connection in connections:
        connection.connect(str(agent.folders.socket))
        connection.sendall(b"PRI * HTTP/2.0\r\n")
    _, delivered = run_script(agent.folders, GOOD).stdout.split()
    assert delivered == "True"
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_protocol_version_is_refused_with_both_versions(
    stub: agent_pb2_grpc.AgentStub, version: int
) -> None:
    code, message = refusal(lambda: open_run(stub, producer(), version))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert f"speaks protocol version 1, the client speaks {version}: install the same" in message


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"producer_id": b"short"}, "producer_id"),
        ({"run_id": "XYZ"}, "run_id"),
        ({"attempt": 0}, "attempt"),
        ({"world_size": 0}, "world_size"),
        ({"rank": 5}, "rank"),
        ({"node": ""}, "node"),
        ({"node": "a b"}, "node"),
        ({"experiment": ""}, "experiment"),
        ({"experiment": "x" * 251}, "experiment"),
        ({"run_name": "a\nb"}, "run_name"),
        ({"start_time_ns": -1}, "start_time_ns"),
    ],
)
def test_a_bad_identity_is_refused_by_field(
    stub: agent_pb2_grpc.AgentStub, changes: dict[str, Any], field: str
) -> None:
    code, message = refusal(lambda: open_run(stub, producer(**changes)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert field in message


@pytest.mark.parametrize(
    ("lane", "offset"), [(64, 0), (255, 0), (2**32 - 1, 0), (0, 4), (0, 2**63), (0, 2**64 - 8)]
)
def test_a_bad_offset_is_refused(stub: agent_pb2_grpc.AgentStub, lane: int, offset: int) -> None:
    held = [agent_pb2.LaneOffset(lane=lane, offset=offset)]
    request = agent_pb2.OpenRunRequest(protocol_version=1, producer=producer(), held=held)
    code, message = refusal(lambda: stub.OpenRun(request, timeout=TIMEOUT_S))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"offset {offset} of lane {lane}",
    )


def test_a_bad_end_is_refused(stub: agent_pb2_grpc.AgentStub) -> None:
    who = producer()
    open_run(stub, who)
    ends = [agent_pb2.LaneOffset(lane=64, offset=8)]
    request = agent_pb2.CloseRunRequest(producer_id=who.producer_id, ends=ends)
    code, message = refusal(lambda: stub.CloseRun(request, timeout=TIMEOUT_S))
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, "offset 8 of lane 64")


def test_a_batch_over_the_limit_is_refused(stub: agent_pb2_grpc.AgentStub) -> None:
    who = producer()
    limit = open_run(stub, who).max_batch_bytes
    code, message = refusal(lambda: push(stub, who, bytes(limit + 8)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert f"a batch of {limit + 8} bytes" in message
    assert f"at most {limit}" in message


def test_a_message_far_over_the_limit_is_refused(stub: agent_pb2_grpc.AgentStub) -> None:
    who = producer()
    limit = open_run(stub, who).max_batch_bytes
    code, _ = refusal(lambda: push(stub, who, bytes(4 * limit)))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("size", [0, 7, 33])
def test_a_batch_of_broken_records_is_refused(stub: agent_pb2_grpc.AgentStub, size: int) -> None:
    who = producer()
    open_run(stub, who)
    code, message = refusal(lambda: push(stub, who, event("m")[:size]))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert f"a batch of {size} bytes" in message
    assert "expected whole records" in message


def test_an_unknown_lane_is_refused(stub: agent_pb2_grpc.AgentStub) -> None:
    who = producer()
    open_run(stub, who)
    code, message = refusal(lambda: push(stub, who, event("m"), lane=64))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "offset 0 of lane 64",
    )


def test_a_producer_that_was_never_opened_is_refused(stub: agent_pb2_grpc.AgentStub) -> None:
    code, message = refusal(lambda: push(stub, producer(), event("m")))
    assert (code, message) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "this producer was not opened at this agent: call OpenRun first",
    )


@pytest.mark.parametrize("first_offset", [8, 2**40])
def test_a_batch_after_a_gap_is_refused(stub: agent_pb2_grpc.AgentStub, first_offset: int) -> None:
    who = producer()
    open_run(stub, who)
    code, message = refusal(lambda: push(stub, who, event("m"), first_offset=first_offset))
    assert (code, message) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        f"lane 0 goes on at 0, the batch begins at {first_offset}: call OpenRun",
    )


def test_what_was_refused_changes_nothing_and_the_producer_goes_on(
    agent: AgentProcess, stub: agent_pb2_grpc.AgentStub
) -> None:
    who = producer()
    open_run(stub, who)
    first, second = event("first"), event("second")
    assert push(stub, who, first) == [len(first)]
    refusal(lambda: push(stub, who, second, first_offset=len(first) + 8))
    refusal(lambda: push(stub, who, second, lane=64))
    assert push(stub, who, second, first_offset=len(first)) == [len(first) + len(second)]
    wait_until(lambda: len(events(agent, who.run_id)) == 2)
    assert [one.message for one in events(agent, who.run_id)] == ["first", "second"]


# --- records that no client writes


def whole(kind: int, payload: bytes, *, count: int = 0, schema_id: int = 0, step: int = 0) -> bytes:
    """A record with a good checksum, whatever its content."""
    body = struct.pack("<BBHIqq", kind, 0, schema_id, count, step, 1) + payload
    length = 8 + len(body)
    return struct.pack("<II", length, crc32(body)) + body + bytes(-length % 8)


def as_json(kind: Kind, data: Any) -> bytes:
    return whole(kind, json.dumps(data).encode())


def value(*numbers: float) -> bytes:
    return struct.pack(f"<{len(numbers)}d", *numbers)


POISON = {
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
    "text": b"hello, world" * 8,
    "unknown kind": whole(99, b"{}"),
    "metrics of an unknown schema": whole(2, value(1.0), count=1, schema_id=7),
    "metrics with too few values": whole(2, value(1.0), count=4_000_000_000),
    "metrics without values": whole(2, b"", count=0),
    "a schema that is not UTF-8": whole(1, b"\xff\xfe", count=1),
    "a schema with a false count": whole(1, b"a\nb", count=200),
    "a schema with an empty key": whole(1, b"", count=1) + whole(2, value(1.0), count=1),
    "a schema that repeats a key": whole(1, b"a\na", count=2) + whole(2, value(1.0, 2.0), count=2),
    "a schema with a zero byte": whole(1, b"a\0b", count=1) + whole(2, value(1.0), count=1),
    "a schema with a long key": whole(1, b"k" * 100_000, count=1) + whole(2, value(1.0), count=1),
    "a schema of many keys": whole(1, b"\n".join(b"%d" % i for i in range(30_000)), count=30_000)
    + whole(2, value(*range(30_000)), count=30_000),
    "named metrics with a false count": whole(3, value(1.0) + b"a", count=4_000_000_000),
    "named metrics that repeat a key": whole(3, value(1.0, 2.0) + b"a\na", count=2),
    "steps at the ends": whole(3, value(1.0) + b"a", count=1, step=2**63 - 1)
    + whole(3, value(1.0) + b"a", count=1, step=-(2**63)),
    "no JSON": whole(4, b"{{{{"),
    "JSON that is no object": as_json(Kind.TAGS, [1, 2]),
    "JSON that is deep": whole(5, b'{"a":' + b"[" * 100_000),
    "JSON with a huge number": whole(5, b'{"a": 1' + b"0" * 10_000 + b"}"),
    "params that are no text": as_json(Kind.PARAMS, {"a": {"b": [1, None]}, "": None}),
    "a lone surrogate in a param": whole(4, b'{"a\\ud800": "b"}'),
    "a lone surrogate in a tag": whole(5, b'{"a": "\\ud800"}'),
    "a lone surrogate in an event": whole(6, b'{"level": "info", "message": "\\ud800"}'),
    "a lone surrogate in an event's data": whole(
        6, b'{"level": "info", "message": "m", "a": "\\ud800", "b\\udfff": 1}'
    ),
    "a zero byte in a tag": as_json(Kind.TAGS, {"a\0": "b\0"}),
    "an event without a message": as_json(Kind.EVENT, {"level": "info"}),
    "an event of an unknown level": as_json(Kind.EVENT, {"level": "fatal", "message": "m"}),
    "an event whose message is a list": as_json(Kind.EVENT, {"level": "info", "message": [1]}),
    "an event with infinite data": whole(
        6, b'{"level": "info", "message": "m", "a": Infinity, "b": NaN, "c": 1e999}'
    ),
    "an end without a status": as_json(Kind.FINISH, {"error": ""}),
    "an end of an unknown status": as_json(
        Kind.FINISH, {"status": "odd", "error": "", "records": 1}
    ),
    "an end with too many records": as_json(
        Kind.FINISH, {"status": "finished", "error": "", "records": 10**30}
    ),
    "an end with a surrogate": whole(7, b'{"status": "failed", "error": "\\ud800", "records": 0}'),
    "a loss beyond 64 bits": as_json(Kind.LOSS, {"a": 10**30, "b": -(10**30)}),
    "a loss that is no number": as_json(Kind.LOSS, {"a": "many", "b": None, "c": 1e400}),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
def test_a_record_that_no_client_writes_harms_no_other(
    agent: AgentProcess, stub: agent_pb2_grpc.AgentStub, poison: bytes
) -> None:
    who = producer()
    open_run(stub, who)
    data = event("before") + poison + event("after")
    assert push(stub, who, data) == [len(data)]
    end(stub, who, len(data))

    def both() -> bool:
        return {"before", "after"} <= {one.message for one in events(agent, who.run_id)}

    wait_until(both, f"{events(agent, who.run_id)}\n{agent.output}", timeout_s=10.0)


def test_unreadable_bytes_become_an_event_of_their_run(
    agent: AgentProcess, stub: agent_pb2_grpc.AgentStub
) -> None:
    who = producer()
    open_run(stub, who)
    push(stub, who, event("before") + bytes(64) + event("after"))
    wait_until(lambda: events(agent, who.run_id))
    errors = [one.message for one in events(agent, who.run_id) if one.level == "error"]
    assert errors == ["unreadable records: 64 bytes: zeroed"]


def test_a_batch_that_is_slow_to_search_holds_nobody_up(
    agent: AgentProcess, stub: agent_pb2_grpc.AgentStub
) -> None:
    # Every word looks like the beginning of a long record.
    batch = struct.pack("<II", 200_000, 1) * (1024 * 1024 // 8)
    who = producer()
    open_run(stub, who)
    assert push(stub, who, batch) == [len(batch)]


# --- journals in the folder


def journal(folders: Folders, name: str) -> Path:
    folder = folders.directory / "journals" / name
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "content",
    [b"", b"short", b"\xff" * 8192, bytes(4096), b"TRKJRNL1" + bytes(8184)],
    ids=["empty", "short", "ones", "zeros", "magic only"],
)
def test_a_damaged_segment_is_set_aside_and_holds_nobody_up(
    agent: AgentProcess, content: bytes
) -> None:
    folder = journal(agent.folders, uuid4().hex)
    (folder / "00000000.seg").write_bytes(content)
    wait_until(lambda: not folder.exists(), agent.output)
    kept = [path.read_bytes() for path in (agent.folders.state / "quarantine").glob("*.seg")]
    # Nothing at all and zeros are spares, made or being made, in which nothing was.
    assert (content in kept) == (content not in (b"", bytes(4096)))


def test_what_is_no_journal_is_left_alone(agent: AgentProcess) -> None:
    journals = agent.folders.directory / "journals"
    journals.mkdir(mode=0o700, exist_ok=True)
    (journals / "a file").write_text("hello")
    (journals / "a link").symlink_to("/")
    run_script(agent.folders, GOOD)
    assert ((journals / "a file").read_text(), (journals / "a link").is_symlink()) == (
        "hello",
        True,
    )
