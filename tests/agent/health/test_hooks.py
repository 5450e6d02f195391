"""Events reach a command and a webhook, few at a time, and neither holds anything up."""

from __future__ import annotations

import contextlib
import json
import logging
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
        held.unlink()
    assert "1000 messages wait for hooks: further ones are dropped" in caplog.text
    assert "a hook is still at work" in caplog.text
