"""Events reach a command and a webhook, few at a time, and neither holds anything up."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import DEADLINE_S, wait_until
from trackagent.agent.health.hooks import BURST, Hooks


class Receiver:
    """A webhook on this machine: what it got, and what it answers."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.answer = 200
        self.location = ""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append(json.loads(body))
                self.send_response(receiver.answer)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/services/SECRET"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Running:
    """A command that hangs, and holds a pipe open for as long as it or anything of it is there."""

    def __init__(self, folder: Path) -> None:
        pipe = folder / "pipe"
        os.mkfifo(pipe)
        self._end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        self.command = f"exec 3>{pipe}; echo >&3; sleep 1000 & wait"

    def began(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return os.read(self._end, 1) == b"\n"
        return False

    def is_over(self) -> bool:
        """Once it began."""
        with contextlib.suppress(BlockingIOError):
            return os.read(self._end, 1) == b""
        return False

    def close(self) -> None:
        os.close(self._end)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    with contextlib.closing(Running(tmp_path)) as one:
        yield one


@contextlib.contextmanager
def hanging(drop: bytes = b"") -> Iterator[str]:
    """The address of a webhook that takes connections and never comes to an end, or even to a word: of `drop`
    it says one after the other."""
    over = threading.Event()

    def serve() -> None:
        with contextlib.ExitStack() as held:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    connection = held.enter_context(server.accept()[0])
                    with contextlib.suppress(OSError):
                        while drop and not over.wait(0.02):
                            connection.sendall(drop)

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.02)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}/"
        finally:
            over.set()
            thread.join(DEADLINE_S)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.server.shutdown()
    one.server.server_close()


@contextlib.contextmanager
def started(**options: Any) -> Iterator[Hooks]:
    hooks = Hooks(**options)
    hooks.start()
    try:
        yield hooks
    finally:
        hooks.stop(DEADLINE_S)


def event(number: int = 1) -> dict[str, Any]:
    return {"text": f"[error] run gpt: event {number}", "level": "error", "data": {"n": number}}


def test_a_command_gets_the_event_as_json(tmp_path: Path) -> None:
    out = tmp_path / "got"
    with started(command=f"cat >> {out}; echo >> {out}") as hooks:
        hooks.put(event())
        wait_until(lambda: out.exists() and out.read_text().endswith("\n"))
    assert json.loads(out.read_text()) == event()


def test_a_webhook_gets_the_event_as_json_with_a_text(receiver: Receiver) -> None:
    with started(url=receiver.url) as hooks:
        hooks.put(event())
        wait_until(lambda: receiver.got)
    assert receiver.got == [event()]


def test_many_events_go_a_few_at_once_and_then_together(receiver: Receiver) -> None:
    with started(url=receiver.url, interval_s=3600.0) as hooks:
        for number in range(BURST):
            hooks.put(event(number))
        wait_until(lambda: len(receiver.got) == BURST)
        for number in range(30):
            hooks.put(event(number))
    *few, rest = receiver.got
    assert few == [event(number) for number in range(BURST)]
    assert len(rest["events"]) == 20
    assert rest["text"].startswith("[error] run gpt: event 0\n[error] run gpt: event 1\n")
    assert rest["text"].endswith("\nand 10 more")


def test_a_webhook_that_refuses_is_told_without_its_secret(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answer = 403
    with caplog.at_level(logging.WARNING), started(url=receiver.url) as hooks:
        hooks.put(event())
        hooks.stop(DEADLINE_S)  # it is not tried again and again then
        assert hooks.failed == 1
    assert "the webhook at http://127.0.0.1 failed: it answers 403" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_webhook_that_sends_elsewhere_is_not_followed(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answer, receiver.location = 302, "http://127.0.0.1:1/"
    with caplog.at_level(logging.WARNING), started(url=receiver.url) as hooks:
        hooks.put(event())
    assert "it answers 302" in caplog.text


def test_a_command_that_fails_is_told_without_what_it_printed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        with started(command="echo no such thing >&2; exit 3") as hooks:
            hooks.put(event())
        assert hooks.failed == 1
    assert "the hook command failed: exit code 3; the event is in the run" in caplog.text
    assert "no such thing" not in caplog.text


def test_without_anywhere_to_send_to_nothing_is_kept() -> None:
    with started() as hooks:
        for number in range(2000):
            hooks.put(event(number))
        assert hooks.dropped == 0


def test_a_hook_that_hangs_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = tmp_path / "held"
    held.touch()
    with started(command=f"while [ -e {held} ]; do sleep 0.02; done") as hooks:
        for number in range(1500):
            hooks.put(event(number))
        assert hooks.dropped
        hooks.stop(0.0)
    assert "1000 messages wait for the hook command: further ones are dropped" in caplog.text
    assert "the hook command is still at work: it and " in caplog.text


def test_a_webhook_that_hangs_does_not_hold_the_command_up(tmp_path: Path) -> None:
    out = tmp_path / "got"
    with hanging() as url, started(command=f"echo >> {out}", url=url) as hooks:
        for number in range(BURST):
            hooks.put(event(number))
        wait_until(lambda: out.exists() and out.read_text() == "\n" * BURST)
        assert hooks.failed == 0  # the webhook still hangs
        hooks.stop(0.0)


def test_a_command_that_hangs_does_not_hold_the_webhook_up(
    receiver: Receiver, running: Running
) -> None:
    with started(command=running.command, url=receiver.url) as hooks:
        for number in range(BURST):
            hooks.put(event(number))
        wait_until(lambda: len(receiver.got) == BURST)
        wait_until(running.began)
        assert hooks.failed == 0
        hooks.stop(0.0)


def test_a_webhook_has_one_time_for_all_that_it_answers(caplog: pytest.LogCaptureFixture) -> None:
    # Each byte comes well within the time: only all of them together do not.
    with hanging(b"x") as url, started(url=url, request_timeout_s=0.4) as hooks:
        hooks.put(event())
        hooks.stop(DEADLINE_S)
        assert hooks.failed == 1
    assert "the webhook at http://127.0.0.1 failed: it took longer than 0.4 s" in caplog.text


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with started(command=running.command, command_timeout_s=1.0) as hooks:
        hooks.put(event())
        wait_until(running.began)
        hooks.stop(DEADLINE_S)
        assert hooks.failed == 1
    wait_until(running.is_over)
    assert "the hook command failed: it took longer than 1 s" in caplog.text


def test_a_command_that_is_running_at_the_end_ends_with_all_that_it_started(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    with started(command=running.command) as hooks:
        hooks.put(event())
        wait_until(running.began)
        hooks.stop(0.0)
    wait_until(running.is_over)
    assert "the hook command is still at work: it and 0 messages are left behind" in caplog.text
