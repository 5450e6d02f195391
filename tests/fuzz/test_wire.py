"""Whatever is called or sent over its socket: the agent answers as its protocol says, does not grow, and goes
on serving."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import grpc
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes import AgentProcess, Folders, Point, run_script, short_folder, wait_until
from tests.fuzz import SCALE, examples
from tests.fuzz.hostile import STREAMS
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

TIMEOUT_S = 20.0
# What agent.proto documents.
DOCUMENTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
GOOD = """
from trackagent import client
run = client.init(experiment="good")
for step in range(10):
    client.log({"loss": step / 7}, step=step)
print(run.id, client.finish())
"""
SERVICE = "/trackagent.v1.Agent"


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    """One agent for everything hostile; in the end it has said nothing of an exception of its own, and a
    well-behaved process finds it as it should be."""
    base = short_folder()
    process = AgentProcess(Folders.under(base), "--deliver-interval-s", "0.01")
    try:
        yield process.start()
        is_served(process)
        assert "Traceback" not in process.output
    finally:
        process.close()
        shutil.rmtree(base)


def is_served(agent: AgentProcess) -> None:
    """A normal producer's records arrive, once each."""
    run_id, delivered = run_script(agent.folders, GOOD).stdout.split()
    assert delivered == "True"
    agent.wait_for_status(run_id, "finished")
    assert agent.exported(run_id) == [Point("loss", "rank 0", s, s / 7) for s in range(10)]


@pytest.fixture(scope="module")
def channel(agent: AgentProcess) -> Iterator[grpc.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(agent.address, options) as made:
        yield made


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> agent_pb2_grpc.AgentStub:
    return agent_pb2_grpc.AgentStub(channel)


def code_of(call: Callable[[], Any]) -> grpc.StatusCode:
    """How a call ends; what it says is for people."""
    ended: grpc.RpcError | None = None
    try:
        call()
    except grpc.RpcError as error:
        ended = error
    if ended is not None:
        # "Unexpected" is how gRPC begins to tell of an exception.
        assert not {"Traceback", "Unexpected"} & set((ended.details() or "").split())
        code: grpc.StatusCode = ended.code()
        return code
    return grpc.StatusCode.OK


# --- messages of which every field may be something else

U32 = st.sampled_from([0, 1, 63, 64, 255, 2**31, 2**32 - 1])
OFFSETS = st.sampled_from([0, 8, 4, 7, 2**20, 2**55, 2**56 - 8, 2**56, 2**63, 2**64 - 8, 2**64 - 1])
TEXTS = st.sampled_from(["", "x" * 251, "a\nb", "\x00", "ü", "a b", "../..", "x" * 60_000])
KNOWN = [bytes([number]) * 16 for number in range(1, 4)]
IDS = st.sampled_from([*KNOWN, *KNOWN, b"", b"short", bytes(16), b"x" * 50_000]) | st.binary(
    min_size=16, max_size=16
)
LANES = st.lists(st.builds(agent_pb2.LaneOffset, lane=U32, offset=OFFSETS), max_size=4)


def good_fields(producer_id: bytes) -> dict[str, Any]:
    return {
        "producer_id": producer_id,
        "run_id": sha256(producer_id).hexdigest()[:32],
        "attempt": 1,
        "world_size": 1,
        "node": "elsewhere",
        "pid": 1,
        "start_time_ns": 1_700_000_000_000_000_000,
        "experiment": "fuzz",
    }


@st.composite
def producers(draw: st.DrawFn) -> agent_pb2.Producer:
    """A producer with at most two fields that are something else."""
    fields = good_fields(draw(IDS))
    strange: dict[str, st.SearchStrategy[Any]] = {
        "run_id": TEXTS | st.sampled_from(["0" * 32, "1" * 32]),
        "attempt": U32,
        "rank": U32,
        "local_rank": U32,
        "world_size": U32,
        "node": TEXTS,
        "pid": U32,
        "start_time_ns": st.integers(-(2**63), 2**63 - 1),
        "experiment": TEXTS,
        "run_name": TEXTS,
        "forked": st.booleans(),
        "job_time_ns": st.integers(-(2**63), 2**63 - 1),
    }
    for name in draw(st.lists(st.sampled_from(sorted(strange)), max_size=2)):
        fields[name] = draw(strange[name])
    return agent_pb2.Producer(**fields)


OPENED = st.builds(
    agent_pb2.OpenRunRequest,
    protocol_version=st.sampled_from([1, 1, 1, 1, 0, 2**32 - 1]),
    producer=producers(),
    held=LANES,
    schemas=st.lists(STREAMS, max_size=3) | st.just([b""] * 50_000),
)
CLOSED = st.builds(agent_pb2.CloseRunRequest, producer_id=IDS, ends=LANES)
PUSHED = st.builds(
    agent_pb2.PushRequest,
    producer_id=IDS,
    lane=st.sampled_from([0, 0, 1, 63]) | U32,
    first_offset=st.sampled_from([0, 0, 0]) | OFFSETS,
    journal_bytes=STREAMS | st.sampled_from([b"", bytes(7), bytes(8), bytes(3 << 20)]),
)


@examples(30)
@given(
    st.lists(
        OPENED.map(lambda request: ("OpenRun", request))
        | CLOSED.map(lambda request: ("CloseRun", request))
        | st.just(("Status", agent_pb2.StatusRequest())),
        min_size=1,
        max_size=4,
    )
)
def test_calls_with_hostile_messages_end_with_documented_codes(
    stub: agent_pb2_grpc.AgentStub, calls: list[tuple[str, Any]]
) -> None:
    for name, request in calls:
        method = getattr(stub, name)
        assert code_of(lambda m=method, r=request: m(r, timeout=TIMEOUT_S)) in DOCUMENTED


@examples(30)
@given(
    st.lists(PUSHED, max_size=6),
    st.booleans(),
    st.sampled_from(["to its end", "not at all", "one answer"]),
)
def test_streams_of_hostile_messages_end_with_documented_codes(
    stub: agent_pb2_grpc.AgentStub, requests: list[Any], opened: bool, read: str
) -> None:
    """Also those that are abandoned before they end."""
    if opened:
        for producer_id in KNOWN:
            who = agent_pb2.Producer(**good_fields(producer_id))
            request = agent_pb2.OpenRunRequest(protocol_version=1, producer=who)
            stub.OpenRun(request, timeout=TIMEOUT_S)
    stream = stub.Push(iter(requests), timeout=TIMEOUT_S)
    if read == "to its end":
        assert code_of(lambda: list(stream)) in DOCUMENTED
    elif read == "one answer":
        with contextlib.suppress(StopIteration):
            assert code_of(lambda: next(stream)) in DOCUMENTED
    stream.cancel()


@examples(20)
@given(
    st.sampled_from(["OpenRun", "CloseRun", "Status", "Nothing", "Push"]), st.binary(max_size=500)
)
def test_calls_with_bytes_that_are_no_message_are_refused_or_answered(
    channel: grpc.Channel, method: str, data: bytes
) -> None:
    if method == "Push":
        call = channel.stream_stream(f"{SERVICE}/{method}")
        code = code_of(lambda: list(call(iter([data, data]), timeout=TIMEOUT_S)))
    else:
        code = code_of(lambda: channel.unary_unary(f"{SERVICE}/{method}")(data, timeout=TIMEOUT_S))
    assert code in DOCUMENTED | {grpc.StatusCode.UNIMPLEMENTED}


# --- the socket itself

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes(3) + b"\x04\x00" + bytes(4)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """HTTP/2 frames of any type, flags, stream and content, whose lengths may lie."""
    content = draw(st.binary(max_size=60))
    length = draw(st.sampled_from([len(content)] * 3 + [0, 16_384, 2**24 - 1]))
    kind, flags = draw(st.integers(0, 10)), draw(st.integers(0, 255))
    stream = draw(st.sampled_from([0, 1, 2, 3, 2**31 - 1]))
    head = length.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + content


@examples(25)
@given(
    st.sampled_from([b"", PREFACE[:10], PREFACE, PREFACE + SETTINGS]),
    st.lists(frames() | st.binary(max_size=300), max_size=5),
    st.booleans(),
)
def test_garbage_on_the_socket_ends_that_connection_only(
    agent: AgentProcess, begin: bytes, rest: list[bytes], half_closed: bool
) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(agent.folders.socket))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(begin + b"".join(rest))
            if half_closed:
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass


# --- nothing stays


def flood(stub: agent_pb2_grpc.AgentStub, agent: AgentProcess, noise: random.Random) -> None:
    """Much of everything that is refused or abandoned."""
    for _ in range(20):
        requests = [
            agent_pb2.PushRequest(producer_id=noise.randbytes(1_500_000), journal_bytes=bytes(8))
            for _ in range(2)
        ]
        code_of(lambda r=requests: list(stub.Push(iter(r), timeout=TIMEOUT_S)))
    abandoned = [stub.Push(iter(lambda: None, None), timeout=TIMEOUT_S) for _ in range(60)]
    for stream in abandoned:
        stream.cancel()
    small = [agent_pb2.PushRequest(producer_id=KNOWN[0], journal_bytes=bytes(8))] * 3000
    code_of(lambda: list(stub.Push(iter(small), timeout=TIMEOUT_S)))
    for _ in range(5):
        big = agent_pb2.PushRequest(producer_id=KNOWN[0], journal_bytes=noise.randbytes(8 << 20))
        code_of(lambda b=big: list(stub.Push(iter([b]), timeout=TIMEOUT_S)))
    connections = [socket.socket(socket.AF_UNIX) for _ in range(60)]
    for connection in connections:
        connection.connect(str(agent.folders.socket))
        connection.sendall(PREFACE + noise.randbytes(50))
        connection.close()


@pytest.mark.fuzz
def test_floods_of_refused_and_abandoned_calls_leave_nothing_in_the_agent(
    agent: AgentProcess, stub: agent_pb2_grpc.AgentStub
) -> None:
    who = agent_pb2.Producer(**good_fields(KNOWN[0]))
    request = agent_pb2.OpenRunRequest(protocol_version=1, producer=who)
    stub.OpenRun(request, timeout=TIMEOUT_S)
    assert agent.process is not None
    process = psutil.Process(agent.process.pid)
    flood(stub, agent, random.Random(0))
    wait_until(lambda: process.num_fds() < 60, "its connections are closed")
    files, threads, memory = process.num_fds(), process.num_threads(), process.memory_info().rss
    for turn in range(SCALE):
        flood(stub, agent, random.Random(turn + 1))
    wait_until(lambda: process.num_fds() <= files, "its connections are closed")
    wait_until(lambda: process.num_threads() <= threads + 2, "its threads have ended")
    assert process.memory_info().rss < memory + (24 << 20)
