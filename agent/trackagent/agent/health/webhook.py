"""A hook's webhook: one POST, which ends with the time that it has, however slowly the other end answers."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

_SHOWN = 200


class Webhook:
    """`send` on one thread, `end` on any. The address may be a secret: no more than its host is shown."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.name = f"the webhook at {shown_url(url)}"
        self._url = url
        self._timeout_s = timeout_s
        self._ended = False
        self._deadline: _Deadline | None = None

    def send(self, body: bytes) -> None:
        """Posts `body`, JSON. Raises when it is not taken, or takes too long; to look up the host's name may
        take longer, which is the system's."""
        request = urllib.request.Request(
            self._url, body, {"Content-Type": "application/json; charset=utf-8"}, method="POST"
        )
        with _Deadline(self._timeout_s) as deadline:
            self._deadline = deadline
            if self._ended:
                raise RuntimeError("the agent stops")
            opener = urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline))
            try:
                with opener.open(request, timeout=self._timeout_s) as answer:
                    answer.read(_SHOWN)
            except Exception as error:
                if deadline.passed and self._ended:
                    raise RuntimeError("it had not answered when the agent stopped") from None
                if deadline.passed:
                    raise RuntimeError(f"it took longer than {self._timeout_s:g} s") from None
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                    raise RuntimeError(f"it answers {error.code}") from None
                if isinstance(error, urllib.error.URLError):
                    raise RuntimeError(str(error.reason)[:_SHOWN]) from None
                raise

    def end(self) -> None:
        """Ends what is connected; nothing is sent any more."""
        self._ended = True
        if self._deadline is not None:
            self._deadline.pass_now()


def shown_url(url: str) -> str:
    """What may be shown of a webhook's address."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}"


class _Deadline:
    """Shuts down, when the time is over, what is connected within the block: a socket's own timeout begins
    anew with each byte."""

    def __init__(self, timeout_s: float) -> None:
        self._ended = False
        self._until = time.monotonic() + timeout_s
        self._timer = threading.Timer(timeout_s, self.pass_now)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self._ended or time.monotonic() >= self._until

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()
        with self._lock:
            while self._sockets:
                self._sockets.pop().close()

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """As socket.create_connection, but all addresses of the host share the time."""
        problem: OSError = TimeoutError("timed out")
        for family, kind, protocol, _name, place in socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM
        ):
            left_s = self._until - time.monotonic()
            if left_s <= 0:
                break
            one = socket.socket(family, kind, protocol)
            try:
                one.settimeout(left_s)
                one.connect(place)
            except OSError as error:
                one.close()
                problem = error
                continue
            with self._lock:
                # TLS takes the first over, the other one stays.
                self._sockets.append(one.dup())
                if self._ended:
                    one.shutdown(socket.SHUT_RDWR)
            return one
        raise problem

    def pass_now(self) -> None:
        """The time is over."""
        with self._lock:
            self._ended = True
            for one in self._sockets:
                with contextlib.suppress(OSError):  # it has ended
                    one.shutdown(socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            return _connecting(http.client.HTTPConnection(host, **options), self._deadline)

        return self.do_open(connection, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            return _connecting(http.client.HTTPSConnection(host, **options), self._deadline)

        return self.do_open(connection, request)


def _connecting(
    connection: http.client.HTTPConnection, deadline: _Deadline
) -> http.client.HTTPConnection:
    # The one place that the library leaves for it, since `connect` also speaks to proxies and TLS.
    connection._create_connection = deadline.connect  # type: ignore[attr-defined]
    return connection


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where a webhook sends elsewhere, nothing goes: the events were not meant for that place."""

    def redirect_request(self, *_: Any) -> None:
        return None
