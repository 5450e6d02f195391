"""Two connections that are joined: what one receives the other sends, no faster than that goes. `Secured` is
the end of TLS at which a hub stands; it sends the alert that says why a handshake failed, which asyncio's own
keeps to itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Any

_CHUNK_BYTES = 64 * 1024
_LAST_WORDS_S = 1.0


class Bucket:
    """What may be sent: `burst` bytes at once, and `rate` bytes a second. clock: seconds that only grow."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]) -> None:
        self._rate, self._burst, self._clock = rate, burst, clock
        self._level, self._at = float(burst), clock()

    def take(self, size: int) -> float:
        """So much was sent: how many seconds until more may be."""
        self._fill()
        self._level -= size
        return max(0.0, -self._level / self._rate)

    def is_full(self) -> bool:
        self._fill()
        return self._level >= self._burst

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now


class Side(asyncio.Protocol):
    """One of the two, as its bytes come. It reads nothing before it is joined.

    lost: done when the connection is. received: bytes that it passed on."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self.received = 0
        self._other: Side | None = None
        self._early: list[bytes] = []
        # Why nothing is read now: not joined, the other cannot send more, too much came.
        self._holds = 0

    def join(self, other: Side) -> None:
        self._other = other
        for data in self._early:
            other.send(data)
        self._early.clear()
        self.release()

    def send(self, data: bytes) -> None:
        self.transport.write(data)

    def close(self) -> None:
        """Ends when all is sent."""
        self.transport.close()

    def hold(self) -> None:
        self._holds += 1
        self.transport.pause_reading()

    def release(self) -> None:
        self._holds -= 1
        if not self._holds:
            self.transport.resume_reading()

    def pass_on(self, data: bytes) -> None:
        self.received += len(data)
        if self._other is None:
            self._early.append(data)
        else:
            self._other.send(data)

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.hold()

    def data_received(self, data: bytes) -> None:
        self.pass_on(data)

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.hold()

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other.release()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)


class Secured(Side):
    """The encrypted one, as a server. What it receives is taken from `bucket`: where that is empty, nothing
    more is read for a while.

    greeted: done when the handshake is; fails with the OSError (ssl.SSLError) for which there is none."""

    def __init__(self, context: ssl.SSLContext, bucket: Bucket) -> None:
        super().__init__()
        self.greeted: asyncio.Future[None] = self._loop.create_future()
        self._bucket = bucket
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)
        # Whether all is said; what still comes is not looked at.
        self._ended = False

    @property
    def protocol(self) -> str | None:
        """The one that both ends have agreed on."""
        return self._tls.selected_alpn_protocol()

    @property
    def certified(self) -> str:
        """The name in the peer's certificate, which was verified; "" without one."""
        certificate: Any = self._tls.getpeercert() or {}
        for part in certificate.get("subject", ()):
            for key, value in part:
                if key == "commonName":
                    return str(value)
        return "a certificate without a name" if certificate else ""

    def send(self, data: bytes) -> None:
        if not self._ended and not self.transport.is_closing():
            self._tls.write(data)
            self._flush()

    def close(self) -> None:
        if self._ended or self.transport.is_closing():
            return
        if self.greeted.done():
            with contextlib.suppress(ssl.SSLError):  # it wants to read the peer's last word
                self._tls.unwrap()
        self._end()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if wait_s := self._bucket.take(len(data)):
            self.hold()
            self._loop.call_later(wait_s, self.release)
        self._in.write(data)
        try:
            if not self.greeted.done():
                self._tls.do_handshake()
                self.greeted.set_result(None)
                self.hold()
            while plain := self._tls.read(_CHUNK_BYTES):
                self.pass_on(plain)
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLError as error:
            if not self.greeted.done():
                self.greeted.set_exception(error)
        # The peer has ended, or what it sends is no TLS.
        self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(ConnectionResetError("closed during the handshake"))
        super().connection_lost(error)

    def _end(self) -> None:
        """Says the last word, such as the alert. Closed at once, with something of the peer's not read, the
        connection would be reset, and the peer not hear it."""
        if self._ended or self.transport.is_closing():
            return
        self._ended = True
        self._flush()
        self.transport.write_eof()
        self._holds = 0
        self.transport.resume_reading()
        self._loop.call_later(_LAST_WORDS_S, self.transport.close)

    def _flush(self) -> None:
        if data := self._out.read():
            self.transport.write(data)
