"""The port of a hub: ends TLS, knows who is at the other end, and passes the bytes on to the service's own
socket, which only the agent's user can reach.

gRPC would do the TLS too, but says neither why a handshake failed nor how much a peer sends. Here each
connection has a deadline for its handshake, and another to show that it may deliver: until then it is a
stranger's, of whom few are let in at a time; each host has a share of the connections and of the bytes per
second, and whoever sends more is read more slowly. As at the gate (gate.py), this end of the second
connection has a name of its own, which gRPC shows as the peer. All of it runs in the loop that starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from trackagent.agent import tls
from trackagent.agent.refusals import Refusals
from trackagent.agent.relay import Bucket, Secured, Side

logger = logging.getLogger(__name__)

BACKLOG = 512
RETRY_S = 0.1
HANDSHAKE_S = 10.0
# So much longer where a call has begun: what shows that the peer may deliver comes with its message.
FIRST_CALL_S = 20.0
MAX_STRANGERS, MAX_STRANGERS_OF_A_HOST = 256, 32
# What one host may send on all its connections, and at once.
BYTES_PER_S, BURST_BYTES = 32 * 1024 * 1024, 64 * 1024 * 1024
_MAX_BUCKETS = 4096
_LAST_WORDS_S = 5.0
_LEFT = (
    "it left without a word when it had seen this hub's certificate: it may look for another hub, by its pin "
    "or its token"
)
# A peer that is gone without a word is noticed after about a minute.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


@dataclass(slots=True)
class Peer:
    """Who is at the other end: its address, and the name in its certificate by the hub's CA, "" if none.

    welcome: it has shown that it may deliver. calls: those of it that the service has begun with."""

    host: str
    certified: str = ""
    welcome: bool = False
    calls: int = 0


class Listener:
    """Takes connections of `port` (see `open_port`) for the service at `inner`.

    max_connections: of all hosts together; one may have half of them."""

    def __init__(
        self,
        port: socket.socket,
        inner: Path,
        context: ssl.SSLContext,
        refusals: Refusals,
        *,
        max_connections: int,
        handshake_s: float = HANDSHAKE_S,
        first_call_s: float = FIRST_CALL_S,
        bytes_per_s: float = BYTES_PER_S,
        burst_bytes: int = BURST_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._port, self._inner = port, inner
        self._context, self._refusals = context, refusals
        self._most = max_connections
        self._handshake_s, self._first_call_s = handshake_s, first_call_s
        self._new_bucket = partial(Bucket, bytes_per_s, burst_bytes, clock)
        # In the names of this listener's ends, so that nobody else's can look like one.
        self._token = secrets.token_hex(8)
        self._numbers = count()
        self._peers: dict[str, Peer] = {}
        self._connections: Counter[str] = Counter()
        # By host, those that have not shown yet that they may deliver, the oldest first.
        self._strangers: dict[str, dict[asyncio.Task[None], None]] = {}
        # Of those that are encrypted, by the names of this end.
        self._unknown: dict[str, asyncio.Future[None]] = {}
        self._buckets: dict[str, Bucket] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._spawn(self._accept(self._port))

    async def stop(self) -> None:
        """Ends all connections, and closes the port."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def peer(self, name: str) -> Peer | None:
        """Who is behind a peer as gRPC names it; None for one that did not come through here."""
        return self._peers.get(name)

    def hosts(self) -> int:
        """How many have a connection."""
        return len(self._connections)

    def welcome(self, name: str) -> None:
        """A peer, as gRPC names it, has shown that it may deliver."""
        if (peer := self._peers.get(name)) is not None:
            peer.welcome = True
        known = self._unknown.pop(name, None)
        if known is not None and not known.done():
            known.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        told = False
        with listener:
            while True:
                try:
                    client, address = await loop.sock_accept(listener)
                except OSError as error:
                    # Most likely no descriptor is left.
                    if not told:
                        logger.warning("cannot take a connection: %s; trying again", error)
                    told = True
                    await asyncio.sleep(RETRY_S)
                else:
                    told = False
                    self._spawn(self._serve(client, _plain(address[0])))

    async def _serve(self, client: socket.socket, host: str) -> None:
        with contextlib.closing(client):
            if (why := self._too_many(host)) is not None:
                self._refusals.tell(host, why)
                return
            self._connections[host] += 1
            self._note_stranger(host)
            try:
                with contextlib.suppress(OSError):
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in _KEEPALIVE:
                        client.setsockopt(socket.IPPROTO_TCP, option, value)
                outer = await self._greeted(client, host)
                if outer is not None:
                    await self._joined(outer, host)
            except OSError as error:
                logger.debug("a connection of %s ended: %s", host, error)
            finally:
                _less(self._connections, host)
                self._forget_stranger(host)

    def _note_stranger(self, host: str) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._strangers.setdefault(host, {})[task] = None

    def _forget_stranger(self, host: str) -> None:
        task = asyncio.current_task()
        ones = self._strangers.get(host, {})
        if task is not None and ones.pop(task, self) is not self and not ones:
            del self._strangers[host]

    def _make_room(self, host: str) -> bool:
        """Where there are too many strangers, the oldest of the host that has most of them goes; False where
        that is this one."""
        if sum(map(len, self._strangers.values())) < MAX_STRANGERS:
            return True
        most = max(self._strangers, key=lambda one: len(self._strangers[one]))
        if len(self._strangers[most]) <= len(self._strangers.get(host, {})) + 1:
            return False
        oldest = next(iter(self._strangers[most]))
        del self._strangers[most][oldest]
        self._refusals.tell(most, "there are too many who have not shown that they may deliver")
        oldest.cancel()
        return True

    def _too_many(self, host: str) -> str | None:
        """Why the host may not connect now."""
        strangers = len(self._strangers.get(host, {}))
        if strangers >= MAX_STRANGERS_OF_A_HOST or not self._make_room(host):
            return f"{strangers} of its connections have not shown that they may deliver here"
        if self._connections[host] >= self._most // 2:
            return f"it has {self._connections[host]} connections, half of all (max_streams)"
        if self._connections.total() >= self._most:
            return f"there are {self._most} connections (max_streams)"
        return None

    async def _greeted(self, client: socket.socket, host: str) -> Secured | None:
        """The encrypted connection; None, with a line in the log, where there is none."""
        _, side = await asyncio.get_running_loop().connect_accepted_socket(
            partial(Secured, self._context, self._bucket(host)), client
        )
        try:
            await asyncio.wait_for(side.greeted, self._handshake_s)
        except asyncio.CancelledError:
            side.transport.abort()
            raise
        except (OSError, asyncio.TimeoutError) as error:
            why = self._why(error)
        else:
            if side.protocol == tls.PROTOCOL:
                return side
            why = "it speaks another protocol over TLS"
        self._refusals.tell(host, why)
        side.close()
        await asyncio.wait([side.lost], timeout=_LAST_WORDS_S)
        side.transport.abort()
        return None

    def _why(self, error: Exception) -> str:
        """Why a handshake failed."""
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not good for this hub's CA: {error.verify_message}"
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            reason = error.reason or "unknown"
            if reason in tls.PLAINTEXT:
                return "it speaks no TLS"
            if "ALERT" in reason and "PROTOCOL" not in reason:
                return f"it does not accept this hub's certificate ({tls.alert(reason)})"
            return f"no TLS 1.3 with it ({tls.alert(reason)})"
        if isinstance(error, asyncio.TimeoutError):
            return f"its TLS handshake took longer than {self._handshake_s:g} s"
        return "it closed the connection before it was encrypted"

    async def _joined(self, outer: Secured, host: str) -> None:
        """Passes everything on, until one end has ended."""
        loop = asyncio.get_running_loop()
        name = f"trackagent-{self._token}-{next(self._numbers)}"
        known = f"unix-abstract:{name}"
        with socket.socket(socket.AF_UNIX) as own:
            own.setblocking(False)
            own.bind(f"\0{name}")
            peer = self._peers[known] = Peer(host, outer.certified)
            welcome = self._unknown[known] = loop.create_future()
            inner = None
            try:
                await loop.sock_connect(own, str(self._inner))
                _, inner = await loop.create_unix_connection(Side, sock=own)
                outer.join(inner)
                inner.join(outer)
                waited_s = await self._shown(peer, (outer.lost, inner.lost, welcome))
                if outer.lost.done() and not outer.received:
                    self._refusals.tell(host, _LEFT)
                elif peer.welcome:
                    self._forget_stranger(host)
                    ends = (outer.lost, inner.lost)
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                elif not outer.lost.done() and not inner.lost.done():
                    waited = f"within {waited_s:g} s"
                    self._refusals.tell(host, f"it has not shown {waited} that it may deliver here")
                outer.close()
                inner.close()
                await asyncio.wait((outer.lost, inner.lost), timeout=_LAST_WORDS_S)
            finally:
                del self._peers[known]
                self._unknown.pop(known, None)
                outer.transport.abort()
                if inner is not None:
                    inner.transport.abort()

    async def _shown(self, peer: Peer, any_of: Iterable[asyncio.Future[None]]) -> float:
        """Waits for one of them. How long that may take: longer where the peer is in the middle of a call."""
        wait = partial(asyncio.wait, tuple(any_of), return_when=asyncio.FIRST_COMPLETED)
        done, _ = await wait(timeout=self._handshake_s)
        if done or not peer.calls:
            return self._handshake_s
        await wait(timeout=self._first_call_s)
        return self._handshake_s + self._first_call_s

    def _bucket(self, host: str) -> Bucket:
        """The host's; who comes again goes on with it."""
        if len(self._buckets) > _MAX_BUCKETS:
            self._buckets = {one: had for one, had in self._buckets.items() if not had.is_full()}
        return self._buckets.setdefault(host, self._new_bucket())


def open_port(host: str, port: int) -> socket.socket:
    """Where connections wait for a Listener: "" and "::" are all addresses, 0 is any port that is free.
    OSError when nothing can listen there."""
    both = host in ("", "::") and socket.has_dualstack_ipv6()
    if both:
        family, address = socket.AF_INET6, ("::", port)
    else:
        family, _, _, _, found = socket.getaddrinfo(
            host or "0.0.0.0", port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        address = (str(found[0]), port)
    listener = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener


def _plain(host: str) -> str:
    """An IPv4 address as such, also where it came to a socket of both families."""
    return host.removeprefix("::ffff:")


def _less(counter: Counter[str], host: str) -> None:
    counter[host] -= 1
    if not counter[host]:
        del counter[host]
