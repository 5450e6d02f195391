"""A hub that runs in this process, and what speaks to it as another node's agent does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc

from tests.agent.samples import producer
from tests.fakes import DEADLINE_S
from trackagent.agent import hubkey, tls, wire
from trackagent.agent.config import AgentConfig
from trackagent.agent.hubserver import HubServer
from trackagent.agent.meeting import Meetings
from trackagent.agent.store.contract import Batch, BatchId, EventData, ProducerInfo
from trackagent.protos.v1 import hub_pb2, hub_pb2_grpc

ORIGIN = "c" * 32
RUN_TOKEN = "d" * 32
FORWARD = "/trackagent.v1.Hub/Forward"
# As it is seen by a hub that listens at 127.0.0.1.
ONE = "127.0.0.1"
CLUSTER_TOKEN = "0123456789abcdef" * 4


class Taken:
    """In the place of the spool: what came, by id. With `fails`, every part does."""

    def __init__(self) -> None:
        self.parts: dict[BatchId, tuple[str, hub_pb2.Part]] = {}
        self.fails: Exception | None = None

    def accept(self, id_: BatchId, part: bytes, node: str) -> Future[None]:
        done: Future[None] = Future()
        if self.fails is not None:
            done.set_exception(self.fails)
            return done
        self.parts.setdefault(id_, (node, hub_pb2.Part.FromString(part)))
        done.set_result(None)
        return done

    def arrived(self, origin: str) -> Future[list[tuple[int, int]]]:
        done: Future[list[tuple[int, int]]] = Future()
        done.set_result(sorted((id_.first, id_.last) for id_ in self.parts if id_.origin == origin))
        return done


class RunningHub:
    """A hub with this configuration, in a thread of its own."""

    def __init__(self, base: Path, **settings: Any) -> None:
        self.config = AgentConfig(
            directory=base / "dir",
            state_directory=base / "state",
            **{"listen": "127.0.0.1:0", "linger_s": 10 * DEADLINE_S, **settings},
        )
        for folder in (self.config.directory, self.config.state_directory):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.spool, self.meetings = Taken(), Meetings()
        self.server = HubServer(self.config)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        listening: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(listening,))
        self._thread.start()
        listening.result(DEADLINE_S)

    def _run(self, listening: Future[None]) -> None:
        async def main() -> None:
            try:
                await self.server.start(self.spool, self.meetings, "1.2.3")
            except BaseException as error:  # noqa: BLE001 - it is the test's
                listening.set_exception(error)
                return
            listening.set_result(None)
            await self._stop.wait()
            await self.server.stop(0)

        self._loop.run_until_complete(main())

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)
        self._loop.close()
        self.server.close()

    @property
    def said(self) -> dict[str, Any]:
        """What hub.json says."""
        found: dict[str, Any] = json.loads(self.config.hub_file_path.read_text())
        return found

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    @contextlib.contextmanager
    def connected(self, **trust: Any) -> Iterator[hub_pb2_grpc.HubStub]:
        """A stub of a channel to it; by its pin, unless `trust` says otherwise."""
        channel = tls.channel(self.address, **(trust or {"pin": self.server.pin}))
        try:
            yield hub_pb2_grpc.HubStub(channel)
        finally:
            channel.close()


Start = Callable[..., RunningHub]


def batch(*infos: ProducerInfo, message: str = "hello") -> Batch:
    """What another agent would forward: an event of each producer."""
    said = [EventData(info.producer_id, 1, "info", message) for info in infos]
    return Batch(id=BatchId(ORIGIN, 1, 1), producers=infos, events=said)


def part(
    of: Batch | bytes | None = None, first: int = 1, last: int = 1, origin: str = ORIGIN
) -> hub_pb2.Part:
    if of is None:
        of = batch(producer())
    content = of if isinstance(of, bytes) else wire.encode(of)
    return hub_pb2.Part(origin=origin, first=first, last=last, content=content)


def grant(run_id: str | None = None, token: str = RUN_TOKEN) -> hub_pb2.Grant:
    return hub_pb2.Grant(run_id=producer().run_id if run_id is None else run_id, token=token)


def request(
    *parts: hub_pb2.Part,
    grants: Sequence[hub_pb2.Grant] = (),
    node: str = "b",
    protocol_version: int = 1,
) -> hub_pb2.ForwardRequest:
    return hub_pb2.ForwardRequest(
        protocol_version=protocol_version, node=node, grants=grants, parts=parts or [part()]
    )


def refused(
    call: Callable[..., object], *arguments: object, **options: Any
) -> tuple[grpc.StatusCode, str]:
    """Code and message with which a call is refused."""
    try:
        answer = call(*arguments, timeout=DEADLINE_S, **options)
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError(f"it was answered: {answer}")


def connect(hub: RunningHub, host: str = ONE) -> socket.socket:
    return socket.create_connection((ONE, hub.port), DEADLINE_S, source_address=(host, 0))


def encrypted(hub: RunningHub, host: str = ONE) -> ssl.SSLSocket:
    """A connection of a host that nobody has checked."""
    context = tls._context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context.wrap_socket(connect(hub, host))


class Owing:
    """A host that has begun calls of Forward, whose messages it owes."""

    def __init__(
        self, hub: RunningHub, host: str, calls: int, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.connection = encrypted(hub, host)
        self.connection.settimeout(DEADLINE_S)
        self.connection.sendall(tls.GREETING)
        fields = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", FORWARD),
            (":authority", "hub"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *headers,
        ]
        # HEADERS, END_HEADERS (RFC 9113, 6.2) of fields that are not compressed (RFC 7541, 6.2.2).
        said = b"".join(
            b"\0" + b"".join(bytes([len(text)]) + text.encode() for text in field)
            for field in fields
        )
        for number in range(calls):
            stream = (2 * number + 1).to_bytes(4, "big")
            self.connection.sendall(len(said).to_bytes(3, "big") + b"\x01\x04" + stream + said)

    def __enter__(self) -> Owing:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def wait_for_an_answer(self) -> None:
        """Until one of the calls has been refused."""
        file = self.connection.makefile("rb")
        while (head := file.read(9))[3] != 1:
            file.read(int.from_bytes(head[:3], "big"))


def token_file(folder: Path, token: str = CLUSTER_TOKEN) -> Path:
    path = folder / f"token-{hubkey.pin_of_token(token)[:8]}"
    path.touch(0o600)
    path.write_text(token)
    return path


def bearer(token: str = CLUSTER_TOKEN) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]
