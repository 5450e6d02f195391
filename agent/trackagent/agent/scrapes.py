"""Answers HTTP at an address of this node: `GET /metrics`, and `GET /`, which says so; nothing else.

On a thread of its own, away from the ranks. How large a request may be, how long it may take to come, and
until its answer was taken, is bounded. Where all places are taken, whoever has owed a request the longest is
sent away for a new one; only where all are being answered is the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable

from trackagent.agent.config import loopback_address
from trackagent.agent.errors import AgentError

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 8 * 1024
MAX_CONNECTIONS = 16
# On the node itself a request comes in one piece.
REQUEST_S = 3.0
EXCHANGE_S = 10.0
STOP_S = 5.0
PLAIN = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"


class Scrapes:
    """Listens at HOST:PORT from its construction on; AgentError where it cannot. Leaving it closes it."""

    def __init__(
        self, address: str, *, request_s: float = REQUEST_S, exchange_s: float = EXCHANGE_S
    ) -> None:
        host, port = loopback_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=16)
        except OSError as error:
            # create_server puts the address into the text, errno says it better.
            raise AgentError(
                f"cannot listen at {address} for Prometheus: {_reason(error)}; give another --prometheus"
            ) from error
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        self.url = f"http://{shown}:{self._socket.getsockname()[1]}/metrics"
        self._request_s = request_s
        self._exchange_s = exchange_s
        self._render: Callable[[], bytes] = bytes
        self._connections = 0
        # Those that have not sent a whole request, in the order in which they came.
        self._owing: dict[asyncio.StreamWriter, None] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrapes", daemon=True)

    def __enter__(self) -> Scrapes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, render: Callable[[], bytes]) -> None:
        """Answers with what `render` gives, which is called in a thread, one at a time."""
        self._render = render
        self._thread.start()
        self._began.wait(STOP_S)

    def stop(self) -> None:
        """Ends what is under way, and the listening."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(STOP_S)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._rendering = asyncio.Lock()
        server = await asyncio.start_server(
            self._answer, sock=self._socket, limit=MAX_REQUEST_BYTES
        )
        self._began.set()
        await self._stopping.wait()
        server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        if self._connections >= MAX_CONNECTIONS:
            if not self._owing:
                writer.transport.abort()
                return
            longest = next(iter(self._owing))
            del self._owing[longest]
            longest.transport.abort()  # which ends what is done for it
        self._connections += 1
        self._owing[writer] = None
        try:
            await asyncio.wait_for(self._exchange(reader, writer), self._exchange_s)
        except (asyncio.TimeoutError, OSError, EOFError):
            pass  # too slow, or gone
        except asyncio.CancelledError:
            pass  # this is the end; asyncio would log an error for each that ends cancelled
        finally:
            self._connections -= 1
            self._owing.pop(writer, None)
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self._request_s)
        except asyncio.LimitOverrunError:
            answer = _response(431, f"more than {MAX_REQUEST_BYTES} bytes of headers\n")
        else:
            self._owing.pop(writer, None)
            status, problem = _judged(head)
            if status != 200:
                answer = _response(status, problem)
            elif _path(head) == "/":
                answer = _response(200, "an agent of trackagent: its metrics are at /metrics\n")
            else:
                answer = await self._metrics()
        writer.write(answer)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def _metrics(self) -> bytes:
        async with self._rendering:
            try:
                text = await asyncio.to_thread(self._render)
            except Exception as error:  # noqa: BLE001 - whatever it is, the one who asks should know
                logger.warning("cannot answer Prometheus: %s: %s", type(error).__name__, error)
                return _response(500, "see the agent's log\n")
        return _response(200, text, METRICS)


def _judged(head: bytes) -> tuple[int, str]:
    """Whether a request is answered: a status of HTTP, and what to say."""
    method, _, rest = head.partition(b" ")
    if b" HTTP/1." not in rest.partition(b"\r\n")[0]:
        return 400, "not a request of HTTP/1.1\n"
    if not _is_host_here(head):
        # A web page whose name leads here would be read by a browser as the page's own.
        return 403, "ask for this by localhost or an IP address\n"
    if _path(head) not in ("/", "/metrics"):
        return 404, "there is only /metrics\n"
    if method != b"GET":
        return 405, "there is only GET\n"
    return 200, ""


def _path(head: bytes) -> str:
    return head.split(b" ", 2)[1].partition(b"?")[0].decode("latin-1")


def _is_host_here(head: bytes) -> bool:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"host":
            host = value.decode("latin-1").strip()
            # Without the port, and the brackets of an IPv6 address.
            host = host.partition("]")[0][1:] if host[:1] == "[" else host.partition(":")[0]
            if host.lower() == "localhost":
                continue
            try:
                ipaddress.ip_address(host)
            except ValueError:
                return False
    return True


def _response(status: int, body: str | bytes, kind: str = PLAIN) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = [
        f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(content)}",
        "X-Content-Type-Options: nosniff",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET"] if status == 405 else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def _reason(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)
