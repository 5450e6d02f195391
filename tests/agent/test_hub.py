"""The hub over its real port: who may deliver, what is taken, and what is refused with which words."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from tests.agent.certificates import Authority
from tests.agent.hubs import (
    CLUSTER_TOKEN,
    ORIGIN,
    RUN_TOKEN,
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
from tests.fakes import DEADLINE_S, Folders
from trackagent.agent import tls, wire
from trackagent.agent.hub import MAX_MESSAGE_BYTES, gather_ms
from trackagent.agent.spool import Overlaps, SpoolError, SpoolFull
from trackagent.agent.store.contract import BatchId, node_run_id
from trackagent.protos.v1 import agent_pb2, hub_pb2

RUN = producer().run_id
Code = grpc.StatusCode
MeetRequest = agent_pb2.MeetRequest


@pytest.fixture
def start_hub(folders: Folders) -> Iterator[Start]:
    """start_hub(**settings): a hub in this test's folders, which knows the token of RUN."""
    made: list[RunningHub] = []

    def started(**settings: object) -> RunningHub:
        hub = RunningHub(folders.directory.parent, **settings)
        made.append(hub)
        hub.server.tokens.note(RUN, RUN_TOKEN)
        return hub

    yield started
    for hub in made:
        hub.close()


@pytest.fixture
def hub(start_hub: Start) -> RunningHub:
    return start_hub()


# --- what is taken


def test_a_part_reaches_the_spool_as_it_came(hub: RunningHub) -> None:
    sent = part(first=3, last=7)
    with hub.connected() as stub:
        answer = stub.Forward(request(sent, grants=[grant()]), timeout=DEADLINE_S)
    assert (answer.agent_version, answer.gather_ms) == ("1.2.3", gather_ms(1))
    assert hub.spool.parts == {BatchId(ORIGIN, 3, 7): ("b", sent)}


def test_a_hub_of_many_lets_each_gather_for_longer() -> None:
    assert [gather_ms(hosts) for hosts in (0, 32, 512, 1 << 20)] == [0, 100, 1600, 10_000]


def test_a_hub_says_how_far_it_has_come(hub: RunningHub) -> None:
    asked = hub_pb2.KnownRequest(protocol_version=1, grants=[grant()], origin=ORIGIN)
    with hub.connected() as stub:
        before = stub.Known(asked, timeout=DEADLINE_S).last
        parts = [part(first=1, last=2), part(first=3, last=7)]
        stub.Forward(request(*parts, grants=[grant()]), timeout=DEADLINE_S)
        assert (before, stub.Known(asked, timeout=DEADLINE_S).last) == (0, 7)


def test_samples_of_a_node_come_with_any_good_grant(hub: RunningHub) -> None:
    info = dataclasses.replace(producer(), run_id=node_run_id("b"), node="b", sampled="node b")
    with hub.connected() as stub:
        stub.Forward(request(part(batch(info)), grants=[grant()]), timeout=DEADLINE_S)
    assert len(hub.spool.parts) == 1


def test_a_full_spool_has_the_data_kept(hub: RunningHub) -> None:
    hub.spool.fails = SpoolFull("the spool is full")
    with hub.connected() as stub:
        assert refused(stub.Forward, request(grants=[grant()])) == (
            Code.RESOURCE_EXHAUSTED,
            "the spool is full",
        )


def test_a_part_of_which_only_something_came_is_refused_for_good(hub: RunningHub) -> None:
    hub.spool.fails = Overlaps("1 to 4 overlaps 1 to 2, which came")
    with hub.connected() as stub:
        assert refused(stub.Forward, request(grants=[grant()])) == (
            Code.INVALID_ARGUMENT,
            "1 to 4 overlaps 1 to 2, which came",
        )


def test_a_spool_that_fails_has_the_data_kept(hub: RunningHub) -> None:
    hub.spool.fails = SpoolError("disk I/O error")
    with hub.connected() as stub:
        assert refused(stub.Forward, request(grants=[grant()])) == (
            Code.INTERNAL,
            "the hub's spool cannot commit: disk I/O error",
        )


# --- who may deliver


def test_a_run_that_no_grant_covers_is_refused(hub: RunningHub) -> None:
    other = dataclasses.replace(producer(1), run_id="e" * 32)
    with hub.connected() as stub:
        sent = request(part(batch(producer(), other)), grants=[grant()])
        assert refused(stub.Forward, sent) == (
            Code.PERMISSION_DENIED,
            f"no grant covers the run {'e' * 32} of these parts",
        )
    assert hub.spool.parts == {}


@pytest.mark.parametrize(
    ("grants", "why"),
    [
        ([], "neither a token nor a certificate by this hub's CA"),
        ([grant(token="f" * 32)], f"this hub does not know this token of the run {RUN}"),
        ([grant(token="")], f"this hub does not know this token of the run {RUN}"),
        ([grant(run_id="e" * 32)], f"this hub does not know this token of the run {'e' * 32}"),
        ([grant(run_id="<b>")], "this hub does not know this token of the run this run"),
    ],
)
def test_without_a_good_token_nothing_is_taken(
    hub: RunningHub, caplog: pytest.LogCaptureFixture, grants: list[hub_pb2.Grant], why: str
) -> None:
    with hub.connected() as stub:
        for call, sent in (
            (stub.Forward, request(grants=grants)),
            (stub.Known, hub_pb2.KnownRequest(protocol_version=1, grants=grants, origin=ORIGIN)),
        ):
            code, message = refused(call, sent)
            assert code == Code.UNAUTHENTICATED
            assert message.startswith(f"no right to deliver here: {why}")
    assert hub.spool.parts == {}
    # The hub's people see it too, once.
    assert [one for one in caplog.messages if why in one] == [f"refused 127.0.0.1: {message}"]


def test_strangers_are_refused_before_anything_is_unpacked(hub: RunningHub) -> None:
    with hub.connected() as stub:
        code, _ = refused(stub.Forward, request(part(b"garbage")))
    assert code == Code.UNAUTHENTICATED


@pytest.mark.parametrize("method", ["grpc.health.v1.Health/Check", "trackagent.v1.Agent/Status"])
def test_nothing_else_is_answered_there(hub: RunningHub, method: str) -> None:
    channel = tls.channel(hub.address, pin=hub.server.pin)
    code, _ = refused(channel.unary_unary(f"/{method}"), b"")
    assert code == Code.UNIMPLEMENTED
    channel.close()


def test_the_clusters_token_is_for_all_runs(start_hub: Start, tmp_path: Path) -> None:
    hub = start_hub(token_file=token_file(tmp_path))
    with hub.connected() as stub:
        stub.Forward(request(), timeout=DEADLINE_S, metadata=bearer())
    assert len(hub.spool.parts) == 1


@pytest.mark.parametrize("with_token", [True, False])
def test_a_wrong_cluster_token_is_refused_with_what_to_do(
    start_hub: Start,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    with_token: bool,
) -> None:
    hub = start_hub(token_file=token_file(tmp_path) if with_token else None)
    wrong = "w" * 64
    with hub.connected() as stub:
        code, message = refused(stub.Forward, request(), metadata=bearer(wrong))
        assert code == Code.UNAUTHENTICATED
        assert ("give both agents the same --token-file" in message) is with_token
        assert ("this hub has no cluster token" in message) is not with_token
        assert refused(stub.Meet, MeetRequest(job="j", key="k"), metadata=bearer(wrong)) == (
            code,
            message,
        )
    assert hub.spool.parts == {}
    assert wrong not in caplog.text + message
    assert CLUSTER_TOKEN not in caplog.text + message


def test_a_certificate_by_the_clusters_ca_is_for_all_runs(start_hub: Start, tmp_path: Path) -> None:
    ca = Authority(tmp_path / "ca")
    own, agent = ca.issue("hub", "127.0.0.1"), ca.issue("agent")
    hub = start_hub(tls_cert=own.certificate, tls_key=own.key, tls_ca=ca.path)
    with hub.connected(files=tls.Files(ca.path, agent.certificate, agent.key)) as stub:
        stub.Forward(request(), timeout=DEADLINE_S)
    # Who shows none may still have a run's token.
    with hub.connected(files=tls.Files(ca.path)) as stub:
        stub.Forward(request(part(first=2, last=2), grants=[grant()]), timeout=DEADLINE_S)
        assert refused(stub.Forward, request())[0] == Code.UNAUTHENTICATED
    assert len(hub.spool.parts) == 2


# --- what is refused


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (request(part(b"garbage")), f"1 to 1 of {ORIGIN}: its content is not compressed with zstd"),
        (request(part(origin="x")), "origin: expected 32 lower-case hexadecimal digits"),
        (request(part(first=0)), f"the range 0 to 1 of {ORIGIN}"),
        (request(part(first=2)), f"the range 2 to 1 of {ORIGIN}"),
        (request(part(last=1 << 63)), "the range 1 to 9223372036854775808"),
        (request(*[part()] * 65), "65 parts: expected 1 to 64"),
        (request(node="a b"), "node: expected"),
        (request(node=""), "node: expected"),
    ],
)
def test_what_cannot_be_is_refused_for_good(
    hub: RunningHub, sent: hub_pb2.ForwardRequest, why: str
) -> None:
    sent.grants.append(grant())
    with hub.connected() as stub:
        code, message = refused(stub.Forward, sent)
    assert code == Code.INVALID_ARGUMENT
    assert message.startswith(why)
    assert hub.spool.parts == {}


def test_one_bad_part_refuses_all(hub: RunningHub) -> None:
    sent = request(part(), part(b"", first=2, last=2), grants=[grant()])
    with hub.connected() as stub:
        assert refused(stub.Forward, sent)[0] == Code.INVALID_ARGUMENT
    assert hub.spool.parts == {}


def test_another_version_is_refused_with_both(hub: RunningHub) -> None:
    expected = (
        Code.FAILED_PRECONDITION,
        "this hub (1.2.3) speaks protocol version 1, the agent speaks 2: install the same trackagent on both "
        "nodes",
    )
    with hub.connected() as stub:
        newer = request(protocol_version=2, grants=[grant()])
        assert refused(stub.Forward, newer) == expected
        asked = hub_pb2.KnownRequest(protocol_version=2, grants=[grant()])
        assert refused(stub.Known, asked) == expected


def test_who_may_not_deliver_does_not_learn_the_hubs_version(hub: RunningHub) -> None:
    with hub.connected() as stub:
        code, message = refused(stub.Forward, request(protocol_version=2))
    assert code == Code.UNAUTHENTICATED
    assert "1.2.3" not in message


def test_what_is_no_message_is_refused(hub: RunningHub) -> None:
    channel = tls.channel(hub.address, pin=hub.server.pin)
    call = channel.unary_unary("/trackagent.v1.Hub/Forward")
    assert refused(call, b"\xff" * 10) == (
        Code.INVALID_ARGUMENT,
        "the message cannot be read: it is none of this protocol's",
    )
    channel.close()


def test_what_is_too_large_is_refused(hub: RunningHub) -> None:
    sent = request(part(os.urandom(MAX_MESSAGE_BYTES)), grants=[grant()])
    with hub.connected() as stub:
        code, message = refused(stub.Forward, sent)
    assert code == Code.RESOURCE_EXHAUSTED
    assert "larger than max" in message


def test_what_would_be_too_large_unpacked_is_refused(hub: RunningHub) -> None:
    import zstandard

    bomb = zstandard.ZstdCompressor().compress(b"\0" * (wire.MAX_CONTENT_BYTES + 1))
    with hub.connected() as stub:
        code, message = refused(stub.Forward, request(part(bomb), grants=[grant()]))
    assert code == Code.INVALID_ARGUMENT
    assert f"larger than {wire.MAX_CONTENT_BYTES} bytes" in message


# --- meeting


def test_ranks_of_all_nodes_meet_at_the_hub(start_hub: Start, tmp_path: Path) -> None:
    hub = start_hub(token_file=token_file(tmp_path))
    said = MeetRequest(job="j", operation=MeetRequest.SET, key="k", value=b"v")
    asked = MeetRequest(job="j", operation=MeetRequest.GET, key="k")
    with hub.connected() as one, hub.connected() as other:
        one.Meet(said, timeout=DEADLINE_S, metadata=bearer())
        answer = other.Meet(asked, timeout=DEADLINE_S, metadata=bearer())
    assert (answer.found, answer.value) == (True, b"v")


def test_strangers_do_not_meet_at_the_hub(hub: RunningHub) -> None:
    with hub.connected() as stub:
        code, message = refused(stub.Meet, MeetRequest(job="j", key="k"))
    assert (code, message) == (
        Code.UNAUTHENTICATED,
        "no right to deliver here: neither a token nor a certificate by this hub's CA",
    )


def test_what_the_tables_cannot_do_is_refused(start_hub: Start, tmp_path: Path) -> None:
    hub = start_hub(token_file=token_file(tmp_path))
    with hub.connected() as stub:
        assert refused(stub.Meet, MeetRequest(job="j"), metadata=bearer()) == (
            Code.INVALID_ARGUMENT,
            "the key has 0 characters: give 1 to 250",
        )


# --- what it says of itself


def test_what_the_ranks_read_names_the_hub_and_no_secret(start_hub: Start, tmp_path: Path) -> None:
    hub = start_hub(token_file=token_file(tmp_path), advertise="head.example.org")
    assert hub.said == {
        "version": 1,
        "address": f"head.example.org:{hub.port}",
        "pin": hub.server.pin,
        "cluster": True,
    }
    assert hub.config.hub_file_path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("settings", "address"),
    [
        ({"listen": "127.0.0.1:0"}, "127.0.0.1:{port}"),
        ({"listen": "0.0.0.0:0"}, ":{port}"),
        ({"listen": ":0"}, ":{port}"),
        ({"listen": ":0", "advertise": "a:12"}, "a:12"),
    ],
)
def test_who_listens_everywhere_lets_the_ranks_find_out(
    start_hub: Start, settings: dict[str, str], address: str
) -> None:
    hub = start_hub(**settings)
    assert hub.said["address"] == address.format(port=hub.port)
    with hub.connected() as stub:
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S)


def test_a_hub_that_ends_is_forgotten(folders: Folders) -> None:
    hub = RunningHub(folders.directory.parent)
    path = hub.config.hub_file_path
    assert path.exists()
    hub.close()
    assert not path.exists()


def test_tokens_are_in_no_log(
    start_hub: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub = start_hub(token_file=token_file(tmp_path))
    with hub.connected() as stub:
        stub.Forward(request(grants=[grant()]), timeout=DEADLINE_S, metadata=bearer())
        refused(stub.Forward, request(part(b"x"), grants=[grant()]))
    assert "node b (127.0.0.1) delivers here" in caplog.messages
    secrets = (CLUSTER_TOKEN, RUN_TOKEN, "PRIVATE KEY")
    assert [secret for secret in secrets if secret in caplog.text] == []
    kept = b"".join(path.read_bytes() for path in folders_of(hub) if path.is_file())
    assert [secret for secret in secrets if secret.encode() in kept] == []


def folders_of(hub: RunningHub) -> list[Path]:
    folders = (hub.config.directory, hub.config.state_directory)
    return [path for folder in folders for path in folder.rglob("*")]
