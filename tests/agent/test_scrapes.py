"""Who asks for metrics over HTTP: what is answered, and that nobody can keep others from an answer."""

from __future__ import annotations

import contextlib
import http.client
import select
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent.errors import AgentError
from trackagent.agent.scrapes import MAX_CONNECTIONS, MAX_REQUEST_BYTES, Scrapes

TEXT = b"a_metric 1\n"


@pytest.fixture
def scrapes() -> Iterator[Scrapes]:
    """Answers TEXT."""
    with Scrapes("127.0.0.1:0") as found:
        found.start(lambda: TEXT)
        yield found


def address(scrapes: Scrapes) -> tuple[str, int]:
    parts = urlsplit(scrapes.url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def ask(
    scrapes: Scrapes, path: str = "/metrics", method: str = "GET", **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*address(scrapes), timeout=DEADLINE_S)
    with contextlib.closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def connect(scrapes: Scrapes) -> socket.socket:
    return socket.create_connection(address(scrapes), timeout=DEADLINE_S)


def ended(connection: socket.socket) -> bool:
    """Waits for what comes: whether the other end closed without a word."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("path", ["/metrics", "/metrics?name[]=x"])
def test_metrics_are_answered(scrapes: Scrapes, path: str) -> None:
    assert ask(scrapes, path) == (200, TEXT)


def test_the_root_says_where_they_are(scrapes: Scrapes) -> None:
    status, text = ask(scrapes, "/")
    assert (status, b"/metrics" in text) == (200, True)


@pytest.mark.parametrize("path", ["/metrics/", "/etc/passwd", "/metrics/../x", "*"])
def test_nothing_else_is_there(scrapes: Scrapes, path: str) -> None:
    assert ask(scrapes, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "HEAD", "PUT", "DELETE", "OPTIONS"])
def test_only_get_is_answered(scrapes: Scrapes, method: str) -> None:
    assert ask(scrapes, method=method)[0] == 405


@pytest.mark.parametrize("host", ["localhost", "localhost:9464", "127.0.0.1", "[::1]:9464"])
def test_who_asks_by_an_address_is_answered(scrapes: Scrapes, host: str) -> None:
    assert ask(scrapes, Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:9464", "localhost.evil.example"])
def test_a_web_page_whose_name_leads_here_is_refused(scrapes: Scrapes, host: str) -> None:
    assert ask(scrapes, Host=host)[0] == 403


def test_a_request_that_is_too_large_is_refused(scrapes: Scrapes) -> None:
    with connect(scrapes) as connection:
        # As it is read at once, nothing of it is left that would reset the connection.
        connection.sendall(b"GET /metrics HTTP/1.1\r\nX: " + bytes(MAX_REQUEST_BYTES))
        assert connection.recv(13) == b"HTTP/1.1 431 "
    assert ask(scrapes) == (200, TEXT)


@pytest.mark.parametrize("sent", [b"\r\n\r\n", b"\xff\xfe\x00\r\n\r\n", b"GET /metrics\r\n\r\n"])
def test_what_is_no_request_is_refused(scrapes: Scrapes, sent: bytes) -> None:
    with connect(scrapes) as connection:
        connection.sendall(sent)
        assert connection.recv(13) == b"HTTP/1.1 400 "


def test_a_client_that_sends_no_end_is_sent_away() -> None:
    with Scrapes("127.0.0.1:0", request_s=0.05) as scrapes:
        scrapes.start(lambda: TEXT)
        with connect(scrapes) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n")
            assert ended(connection)


def test_a_client_that_takes_nothing_is_sent_away() -> None:
    with Scrapes("127.0.0.1:0", exchange_s=0.05) as scrapes:
        scrapes.start(lambda: bytes(64 << 20))
        with connect(scrapes) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")

            def reset() -> bool:
                try:
                    return connection.send(b"x") == 0
                except OSError:
                    return True

            wait_until(reset, "the connection is reset")


def test_connections_that_are_held_open_shut_nobody_out() -> None:
    with contextlib.ExitStack() as opened:
        scrapes = opened.enter_context(Scrapes("127.0.0.1:0", request_s=DEADLINE_S))
        scrapes.start(lambda: TEXT)
        held = [opened.enter_context(connect(scrapes)) for _ in range(MAX_CONNECTIONS)]
        for connection in held:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert ask(scrapes) == (200, TEXT)
        assert ended(held[0])  # which has owed its request the longest
        held[-1].sendall(b"\r\n")
        assert held[-1].recv(13) == b"HTTP/1.1 200 "


def test_who_is_being_answered_keeps_their_place() -> None:
    def render() -> bytes:
        assert may_answer.wait(DEADLINE_S)
        return TEXT

    def asking(connection: socket.socket) -> socket.socket:
        opened.enter_context(connection).sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        return connection

    may_answer = threading.Event()
    with contextlib.ExitStack() as opened:
        scrapes = opened.enter_context(Scrapes("127.0.0.1:0"))
        scrapes.start(render)
        first = [asking(connect(scrapes)) for _ in range(MAX_CONNECTIONS - 1)]
        assert ask(scrapes, "/")[0] == 200  # so what they sent before has been read
        others = [asking(connect(scrapes)) for _ in range(3)]
        # For which there is one place.
        wait_until(lambda: len(select.select(others, [], [], 0)[0]) >= 2, "others are sent away")
        may_answer.set()
        assert {connection.recv(13) for connection in first} == {b"HTTP/1.1 200 "}


def test_what_cannot_be_made_is_an_error_and_tried_again() -> None:
    def render() -> bytes:
        if not failed:
            failed.append(True)
            raise ValueError("a bad sample")
        return TEXT

    failed: list[bool] = []
    with Scrapes("127.0.0.1:0") as scrapes:
        scrapes.start(render)
        assert [ask(scrapes)[0] for _ in range(2)] == [500, 200]


def test_metrics_are_made_for_one_at_a_time() -> None:
    together = threading.Semaphore(1)

    def render() -> bytes:
        assert together.acquire(blocking=False)
        threading.Event().wait(0.01)
        together.release()
        return TEXT

    found: list[tuple[int, bytes]] = []
    with Scrapes("127.0.0.1:0") as scrapes:
        scrapes.start(render)
        threads = [threading.Thread(target=lambda: found.append(ask(scrapes))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert found == [(200, TEXT)] * 8


def test_a_port_that_is_taken_is_an_error_that_names_it(scrapes: Scrapes) -> None:
    where = f"127.0.0.1:{address(scrapes)[1]}"
    with pytest.raises(AgentError) as refused:
        Scrapes(where)
    assert str(refused.value) == (
        f"cannot listen at {where} for Prometheus: Address already in use; give another --prometheus"
    )


def test_nobody_listens_after_the_end() -> None:
    with Scrapes("127.0.0.1:0") as scrapes:
        scrapes.start(lambda: TEXT)
        assert ask(scrapes) == (200, TEXT)
    with pytest.raises(ConnectionRefusedError):
        connect(scrapes)


def test_a_connection_at_the_end_is_closed_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with Scrapes("127.0.0.1:0") as scrapes:
        scrapes.start(lambda: TEXT)
        connection = connect(scrapes)
        # The one that came later was answered: this one is waited for.
        assert ask(scrapes) == (200, TEXT)
    with connection:
        assert ended(connection)
    assert caplog.records == []


def test_one_that_never_began_lets_go_of_its_port() -> None:
    with Scrapes("127.0.0.1:0") as scrapes:
        pass
    with Scrapes(f"127.0.0.1:{address(scrapes)[1]}") as again:
        assert again.url == scrapes.url
