"""The gate: passes every byte on, says who connected, and has an end."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes import DEADLINE_S, short_folder
from tests.strangers import ALICE, being
from trackagent.agent.gate import Gate

MANY = os.urandom(1 << 20) * 5


class Echo:
    """What the gate leads to: sends back what it receives, and remembers who connected."""

    def __init__(self) -> None:
        self.peers: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # As gRPC writes such an address.
        self.peers.append("unix-abstract:" + writer.get_extra_info("peername")[1:].decode())
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()


class Place:
    """A gate before an echo, in a folder of its own."""

    def __init__(self, base: Path) -> None:
        self.public, self.inner = base / "agent.sock", base / "s"
        self.echo = Echo()
        self.gate: Gate

    def run(self, work: Callable[[], Awaitable[None]], *, max_connections: int = 8) -> None:
        """Does `work` while the gate is open."""

        async def main() -> None:
            server = await asyncio.start_unix_server(self.echo, self.inner)
            self.gate = Gate(self.public, self.inner, max_connections=max_connections)
            self.gate.start()
            self.public.chmod(0o666)
            try:
                await asyncio.wait_for(work(), DEADLINE_S)
            finally:
                await self.gate.stop()
                server.close()

        asyncio.run(main())

    async def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, str(self.public))
        return made

    async def answers(self, connection: socket.socket) -> bool:
        """Whether the echo is at its other end; False when it was closed."""
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(connection, b"?")
            return await loop.sock_recv(connection, 1) == b"?"
        except (BrokenPipeError, ConnectionResetError):
            return False


@pytest.fixture
def place() -> Iterator[Place]:
    base = short_folder()
    base.chmod(0o711)
    yield Place(base)
    shutil.rmtree(base)


def test_every_byte_arrives_and_so_does_the_end(place: Place) -> None:
    received = bytearray()

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with await place.connect() as connection:

            async def send() -> None:
                await loop.sock_sendall(connection, MANY)
                connection.shutdown(socket.SHUT_WR)

            sending = asyncio.create_task(send())
            while data := await loop.sock_recv(connection, 1 << 16):
                received.extend(data)
            await sending

    place.run(work)
    assert bytes(received) == MANY


@pytest.mark.parametrize("uid", [os.geteuid(), ALICE])
def test_the_user_who_connects_is_known(place: Place, uid: int) -> None:
    async def work() -> None:
        if uid == os.geteuid():
            connection = await place.connect()
        else:
            with being(uid):
                connection = await place.connect()
        with connection:
            assert await place.answers(connection)

    place.run(work)
    assert [place.gate.user_of(peer) for peer in place.echo.peers] == [uid]


@pytest.mark.parametrize(
    "peer",
    ["", "unix:", "unix:/x", "unix-abstract:trackagent-0-1-0", "unix-abstract:trackagent---0"],
)
def test_who_did_not_come_through_the_gate_is_nobody(place: Place, peer: str) -> None:
    assert Gate(place.public, place.inner, max_connections=1).user_of(peer) is None


def test_connections_beyond_the_limit_are_closed_until_one_ends(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        held = [await place.connect() for _ in range(2)]
        assert [await place.answers(one) for one in held] == [True, True]
        for _ in range(2):
            with await place.connect() as third:
                assert not await place.answers(third)
        held.pop().close()
        while True:
            with await place.connect() as again:
                if await place.answers(again):
                    break
        held.pop().close()

    place.run(work, max_connections=2)
    assert [message.startswith(f"user {os.geteuid()} has 2") for message in caplog.messages] == [
        True
    ]


def test_another_user_has_half_of_the_connections(place: Place) -> None:
    async def work() -> None:
        with being(ALICE):
            alices = [await place.connect() for _ in range(3)]
        assert [await place.answers(one) for one in alices] == [True, True, False]
        mine = [await place.connect() for _ in range(2)]
        assert [await place.answers(one) for one in mine] == [True, True]
        for one in alices + mine:
            one.close()

    place.run(work, max_connections=4)


def test_without_a_service_a_connection_is_closed(place: Place) -> None:
    async def work() -> None:
        place.inner.unlink()
        with await place.connect() as connection:
            assert not await place.answers(connection)

    place.run(work)


def test_that_no_connection_can_be_taken_is_told_once(
    place: Place, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trackagent.agent.gate.RETRY_S", 0.001)
    problems = 5 * [OSError("Too many open files")]

    async def work() -> None:
        loop = asyncio.get_running_loop()
        accept = loop.sock_accept

        async def short(listener: socket.socket) -> object:
            if problems:
                raise problems.pop()
            return await accept(listener)

        monkeypatch.setattr(loop, "sock_accept", short)
        for _ in range(2):  # the first one is awaited already
            with await place.connect() as connection:
                assert await place.answers(connection)

    place.run(work)
    assert (problems, caplog.messages) == (
        [],
        ["cannot take a connection: Too many open files; trying again"],
    )


def test_the_end_of_the_gate_ends_its_connections(place: Place) -> None:
    async def work() -> None:
        with await place.connect() as connection:
            assert await place.answers(connection)
            await place.gate.stop()
            assert not await place.answers(connection)

    place.run(work)
