"""The hub's port: whoever speaks no TLS, says nothing, or takes more than a share is refused with a reason,
and others go on."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from tests.agent.certificates import DAY, Authority, now
from tests.agent.hubs import (
    FORWARD,
    ONE,
    RUN_TOKEN,
    Owing,
    RunningHub,
    Start,
    bearer,
    connect,
    encrypted,
    grant,
    refused,
    request,
    token_file,
)
from tests.agent.samples import producer
from tests.fakes import DEADLINE_S, Folders, wait_until
from trackagent.agent import hubserver, tls
from trackagent.agent.listener import Listener
from trackagent.agent.refusals import EVERY_S, MOST_LINES, MOST_LINES_OF_A_HOST, Refusals
from trackagent.agent.relay import Bucket
from trackagent.agent.tls import Files, Untrusted
from trackagent.protos.v1 import hub_pb2_grpc

OTHER = "127.0.0.2"


@pytest.fixture
def start_hub(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """start_hub(limits, **settings): a hub in this test's folders; limits: of its listener."""
    made: list[RunningHub] = []

    def started(limits: dict[str, float] | None = None, **settings: object) -> RunningHub:
        def limited(*arguments: object, **options: object) -> Listener:
            return Listener(*arguments, **{**options, **(limits or {})})  # type: ignore[arg-type]

        monkeypatch.setattr(hubserver, "Listener", limited)
        made.append(RunningHub(folders.directory.parent, **settings))
        made[-1].server.tokens.note(producer().run_id, RUN_TOKEN)
        return made[-1]

    yield started
    for hub in made:
        hub.close()


@pytest.fixture
def hub(start_hub: Start) -> RunningHub:
    return start_hub()


Log = Callable[[str], str]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    """log(start): the first line that begins so, when it is there."""

    def found(start: str) -> str:
        return wait_until(
            lambda: next((one for one in caplog.messages if one.startswith(start)), ""), start
        )

    return found


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it, without another word than an alert."""
    with contextlib.suppress(ConnectionError, ssl.SSLEOFError):
        while connection.recv(1000):
            pass
    return True


def goes_on(hub: RunningHub) -> bool:
    """Whether another agent can still deliver."""
    with hub.connected() as stub:
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        tls.GREETING,
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0" * 1000,
        b"\xff" * 1000,
        os.urandom(1) + b"\x07" * 5000,
    ],
)
def test_plaintext_and_garbage_are_refused(hub: RunningHub, log: Log, said: bytes) -> None:
    with connect(hub) as connection:
        connection.sendall(said)
        assert is_closed(connection)
    assert log("refused 127.0.0.1: ") == "refused 127.0.0.1: it speaks no TLS"
    assert goes_on(hub)


def test_an_agent_without_tls_is_refused(hub: RunningHub, log: Log) -> None:
    with grpc.insecure_channel(hub.address) as channel:
        code, _ = refused(hub_pb2_grpc.HubStub(channel).Forward, request(grants=[grant()]))
    assert code == grpc.StatusCode.UNAVAILABLE
    assert log("refused 127.0.0.1: ") == "refused 127.0.0.1: it speaks no TLS"
    assert hub.spool.parts == {}


def test_garbage_after_the_handshake_harms_nobody(hub: RunningHub) -> None:
    with encrypted(hub) as connection:
        with contextlib.suppress(OSError):  # it may have hung up before the end
            connection.sendall(os.urandom(100_000))
        assert is_closed(connection)
    assert goes_on(hub)


def test_who_never_ends_a_handshake_is_cut_off(start_hub: Start, log: Log) -> None:
    hub = start_hub({"handshake_s": 0.1})
    with connect(hub) as silent, connect(hub) as slow:
        slow.sendall(b"\x16\x03\x01")
        assert is_closed(silent)
        assert is_closed(slow)
    assert log("refused") == "refused 127.0.0.1: its TLS handshake took longer than 0.1 s"


def test_a_host_has_so_many_handshakes_at_once_and_others_go_on(start_hub: Start, log: Log) -> None:
    hub = start_hub({"handshake_s": 10 * DEADLINE_S})
    with contextlib.ExitStack() as opened:
        for _ in range(32):
            opened.enter_context(connect(hub, OTHER))
        with connect(hub, OTHER) as further:
            assert is_closed(further)
        assert log("refused") == (
            "refused 127.0.0.2: 32 of its connections have not shown that they may deliver here"
        )
        assert goes_on(hub)


@pytest.mark.parametrize("said", [b"", tls.GREETING])
def test_who_says_nothing_once_encrypted_is_cut_off(
    start_hub: Start, log: Log, said: bytes
) -> None:
    hub = start_hub({"handshake_s": 0.2})
    with encrypted(hub, OTHER) as silent:
        silent.sendall(said)
        assert is_closed(silent)
    assert log("refused") == (
        "refused 127.0.0.2: it has not shown within 0.2 s that it may deliver here"
    )


def test_who_may_deliver_stays(start_hub: Start) -> None:
    hub = start_hub({"handshake_s": 0.2})
    states: list[grpc.ChannelConnectivity] = []
    channel = tls.channel(hub.address, pin=hub.server.pin)
    channel.subscribe(states.append)
    stub = hub_pb2_grpc.HubStub(channel)
    stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)
    with encrypted(hub, OTHER) as silent:
        silent.sendall(tls.GREETING)
        assert is_closed(silent)  # who came later is gone
    stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)
    assert states[-1] == grpc.ChannelConnectivity.READY
    assert states.count(grpc.ChannelConnectivity.READY) == 1
    channel.close()


@pytest.mark.parametrize("with_token", [True, False])
def test_whose_first_message_takes_its_time_stays(
    start_hub: Start, tmp_path: Path, with_token: bool
) -> None:
    hub = start_hub({"handshake_s": 0.5}, token_file=token_file(tmp_path) if with_token else None)
    cut_off = threading.Event()

    def slowly() -> Iterator[bytes]:
        assert cut_off.wait(DEADLINE_S)
        yield request(grants=[] if with_token else [grant()]).SerializeToString()

    with contextlib.closing(tls.channel(hub.address, pin=hub.server.pin)) as channel:
        metadata = bearer() if with_token else []
        call = channel.stream_unary(FORWARD).future(slowly(), DEADLINE_S, metadata)
        for _ in range(2):  # the first may be older than the call's connection
            with encrypted(hub, OTHER) as silent:
                silent.sendall(tls.GREETING)
                assert is_closed(silent)
        cut_off.set()
        call.result(DEADLINE_S)
    assert len(hub.spool.parts) == 1


def test_who_only_begins_a_call_is_cut_off(start_hub: Start, log: Log) -> None:
    hub = start_hub({"handshake_s": 0.2, "first_call_s": 0.3})
    with Owing(hub, OTHER, 1) as owing:
        assert is_closed(owing.connection)
    assert log("refused") == (
        "refused 127.0.0.2: it has not shown within 0.5 s that it may deliver here"
    )


def test_strangers_of_many_hosts_hold_no_other_up(start_hub: Start) -> None:
    hub = start_hub({"handshake_s": 10 * DEADLINE_S})
    with contextlib.ExitStack() as opened:
        for number in range(256):
            opened.enter_context(connect(hub, f"127.0.0.{2 + number // 32}"))
        assert goes_on(hub)
        # And again: who was let in did not stay a stranger.
        assert goes_on(hub)


def test_a_host_has_half_of_the_connections_and_others_go_on(start_hub: Start, log: Log) -> None:
    hub = start_hub(max_streams=8)
    with contextlib.ExitStack() as opened:
        held = [opened.enter_context(encrypted(hub, OTHER)) for _ in range(4)]
        with connect(hub, OTHER) as further:
            assert is_closed(further)
        assert log("refused") == (
            "refused 127.0.0.2: it has 4 connections, half of all (max_streams)"
        )
        assert goes_on(hub)
        assert all(one.fileno() >= 0 for one in held)


def test_a_host_that_sends_too_much_is_read_slowly_and_others_go_on(start_hub: Start) -> None:
    hub = start_hub({"bytes_per_s": 1.0, "burst_bytes": 32 * 1024})
    with encrypted(hub, OTHER) as connection:
        connection.sendall(tls.GREETING)
        connection.setblocking(False)
        # PING frames (RFC 9113, 6.7) that ask for no answer, until nobody takes them.
        ping = b"\0\0\x08\x06\x01\0\0\0\0" + b"12345678"
        sent = 0
        with contextlib.suppress(ssl.SSLWantWriteError):
            while sent < 1 << 27:
                sent += connection.send(ping * 500)
        assert 32 * 1024 < sent < 1 << 27
        assert goes_on(hub)


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    clock = [0.0]
    bucket = Bucket(100.0, 1000, lambda: clock[0])
    assert [bucket.take(600), bucket.take(400), bucket.take(50)] == [0, 0, 0.5]
    clock[0] = 10.0
    assert not bucket.is_full()
    clock[0] = 10.5
    assert (bucket.is_full(), bucket.take(1000), bucket.take(200)) == (True, 0, 2)


# --- certificates


def test_an_agent_that_looks_for_another_hub_is_told_on_both_sides(
    hub: RunningHub, log: Log
) -> None:
    with pytest.raises(Untrusted, match="is not the hub that was named"):
        tls.channel(hub.address, pin="0" * 64)
    assert log("refused") == (
        "refused 127.0.0.1: it left without a word when it had seen this hub's certificate: it may look for "
        "another hub, by its pin or its token"
    )


def test_an_agent_that_is_content_is_not_told_of(
    hub: RunningHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert goes_on(hub)
    hub.close()
    assert [one for one in caplog.messages if one.startswith("refused")] == []


@pytest.mark.parametrize(
    ("kind", "why_here", "why_there"),
    [
        ("expired", "certificate has expired", "certificate expired"),
        ("other", "unable to get local issuer certificate", "unknown ca"),
    ],
)
def test_a_certificate_that_is_not_good_is_told_on_both_sides(
    start_hub: Start, log: Log, tmp_path: Path, kind: str, why_here: str, why_there: str
) -> None:
    ca = Authority(tmp_path / "ca")
    other = Authority(tmp_path / "other", "another cluster")
    hub = start_hub(tls_ca=ca.path)
    agent = (other if kind == "other" else ca).issue("agent")
    context = tls._context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if kind == "expired":
        # As of an agent whose clock is wrong: one that is right does not even try.
        agent = ca.issue("old", end=now() - DAY / 2)
        context.load_cert_chain(agent.certificate, agent.key)
        secured = context.wrap_socket(connect(hub))
        with secured, pytest.raises(ssl.SSLError, match="CERTIFICATE_EXPIRED"):
            secured.recv(1)
    else:
        with pytest.raises(Untrusted, match=rf"refuses this agent's certificate \({why_there}\)"):
            tls.channel(
                hub.address, pin=hub.server.pin, files=Files(None, agent.certificate, agent.key)
            )
    assert log("refused") == (
        f"refused 127.0.0.1: its certificate is not good for this hub's CA: {why_here}"
    )


def test_a_peer_of_another_protocol_is_refused(hub: RunningHub, log: Log) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(connect(hub)) as connection:
        assert is_closed(connection)
    assert log("refused") == "refused 127.0.0.1: it speaks another protocol over TLS"


def test_an_older_tls_is_refused(hub: RunningHub, log: Log) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        context.wrap_socket(connect(hub))
    assert log("refused") == "refused 127.0.0.1: no TLS 1.3 with it (unsupported protocol)"


# --- what is said of it


def test_a_reason_is_told_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    refusals = Refusals(lambda: clock[0])
    for _ in range(3):
        refusals.tell(ONE, "no")
    refusals.tell(OTHER, "no")
    clock[0] = EVERY_S
    refusals.tell(ONE, "no")
    assert caplog.messages == [f"refused {host}: no" for host in (ONE, OTHER, ONE)]


def test_the_log_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    refusals = Refusals(lambda: clock[0])
    for number in range(MOST_LINES + 7):
        refusals.tell(f"host {number}", "no")
    clock[0] = EVERY_S
    refusals.tell(ONE, "no")
    assert caplog.messages[MOST_LINES - 1 :] == [
        f"refused host {MOST_LINES - 1}: no",
        "further refusals of other nodes are not told for 600 s",
        "7 more refusals of other nodes were not told",
        f"refused {ONE}: no",
    ]


def test_no_host_keeps_others_from_being_told_of(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    refusals = Refusals(lambda: clock[0])
    for number in range(MOST_LINES + 7):
        refusals.tell(ONE, f"no {number}")
    refusals.tell(OTHER, "no")
    clock[0] = EVERY_S
    refusals.tell(ONE, "no")
    assert caplog.messages == [
        *(f"refused {ONE}: no {number}" for number in range(MOST_LINES_OF_A_HOST)),
        f"further refusals of {ONE} are not told for 600 s",
        f"refused {OTHER}: no",
        "47 more refusals of other nodes were not told",
        f"refused {ONE}: no",
    ]
