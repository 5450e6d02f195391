"""Where events are sent besides the run and the log: a command, a webhook.

On a thread of its own, so that neither holds anything up. At most a few go out at once and then one every
while; what comes in between goes with the next one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

logger = logging.getLogger(__name__)

# So many may go out at once.
BURST = 5
MAX_WAITING = 1000
# In one message, where several have come together.
MAX_TOGETHER = 20
COMMAND_TIMEOUT_S = 30.0
REQUEST_TIMEOUT_S = 10.0
TRIES = 3
RETRY_S = 2.0
_SHOWN = 200


class Hooks:
    """Sends events, each a dict that JSON can hold, of which `text` is for people.

    command: run by /bin/sh with the JSON on its standard input. url: gets the JSON by POST, as Slack's
    incoming webhooks do. interval_s: after the first BURST, one message in so many seconds. What cannot be
    sent is tried TRIES times, then counted in `failed` and told in the log, never with the url's path, which
    may be a secret.
    """

    def __init__(self, *, command: str = "", url: str = "", interval_s: float = 10.0) -> None:
        self.failed = 0
        self.dropped = 0
        self._ways: list[tuple[str, Callable[[bytes], None]]] = []
        if command:
            self._ways.append(("the hook command", lambda body: _run(command, body)))
        if url:
            self._ways.append((f"the webhook at {shown_url(url)}", lambda body: _post(url, body)))
        self._interval_s = interval_s
        self._waiting: queue.Queue[Mapping[str, Any]] = queue.Queue(MAX_WAITING)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="hooks", daemon=True)

    def start(self) -> None:
        """Begins to send, where there is anywhere to send to."""
        if self._ways:
            self._thread.start()

    def put(self, event: Mapping[str, Any]) -> None:
        """Sends an event soon; never waits."""
        if not self._ways:
            return
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            if not self.dropped:
                logger.warning(
                    "%d messages wait for hooks: further ones are dropped; they are in the runs all the same",
                    MAX_WAITING,
                )
            self.dropped += 1

    def stop(self, timeout_s: float) -> None:
        """Sends what waits, at once, for at most `timeout_s`."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if self._thread.is_alive():
            waiting = self._waiting.qsize()
            logger.warning("a hook is still at work: it and %d messages are left behind", waiting)

    def _send_all(self) -> None:
        tokens, since = float(BURST), time.monotonic()
        while True:
            try:
                events = [self._waiting.get(timeout=0.2)]
            except queue.Empty:
                if self._stopping.is_set():
                    return
                continue
            now = time.monotonic()
            tokens = min(float(BURST), tokens + (now - since) / self._interval_s)
            since = now
            if tokens < 1:
                self._stopping.wait((1 - tokens) * self._interval_s)
                tokens, since = 1.0, time.monotonic()
                with contextlib.suppress(queue.Empty):
                    while True:
                        events.append(self._waiting.get_nowait())
            tokens -= 1
            self._send(_together(events))

    def _send(self, event: Mapping[str, Any]) -> None:
        body = json.dumps(event, ensure_ascii=False).encode(errors="replace")
        for name, way in self._ways:
            for attempt in range(1, TRIES + 1):
                try:
                    way(body)
                    break
                except Exception as error:  # noqa: BLE001 - whatever a hook does, the agent goes on
                    problem = error
                    if attempt < TRIES and not self._stopping.wait(RETRY_S):
                        continue
                    self.failed += 1
                    logger.warning(
                        "%s failed: %s; the event is in the run all the same", name, problem
                    )
                    break


def _together(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(events) == 1:
        return events[0]
    shown = events[:MAX_TOGETHER]
    text = "\n".join(str(event["text"]) for event in shown)
    if len(events) > len(shown):
        text += f"\nand {len(events) - len(shown)} more"
    return {"text": text, "events": shown}


def _run(command: str, body: bytes) -> None:
    # What it prints goes nowhere: it might be endless, or a secret.
    with subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            process.communicate(body, timeout=COMMAND_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise RuntimeError(f"it took longer than {COMMAND_TIMEOUT_S:g} s") from None
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where a webhook sends elsewhere, nothing goes: the events were not meant for that place."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(
        url, body, {"Content-Type": "application/json; charset=utf-8"}, method="POST"
    )
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(request, timeout=REQUEST_TIMEOUT_S) as answer:
            answer.read(_SHOWN)
    except urllib.error.HTTPError as error:
        error.close()
        raise RuntimeError(f"it answers {error.code}") from None
    except urllib.error.URLError as error:
        raise RuntimeError(str(error.reason)[:_SHOWN]) from None


def shown_url(url: str) -> str:
    """What may be shown of a webhook's address."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}"
