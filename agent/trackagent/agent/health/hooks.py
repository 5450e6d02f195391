"""Where events are sent besides the run and the log: a command, a webhook.

Each on a thread of its own, so that neither holds up the other, or anything else. At most a few go out at
once and then one every while; what comes in between goes with the next one.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trackagent.agent.health.command import Command
from trackagent.agent.health.webhook import Webhook

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
# For what is told to end.
END_S = 1.0


class Way(Protocol):
    """Somewhere to send to."""

    name: str

    def send(self, body: bytes) -> None:
        """Sends JSON; raises when it is not taken, or not in time. On one thread."""

    def end(self) -> None:
        """Ends what is being sent, if it can be ended. On any thread."""


class Hooks:
    """Sends events, each a dict that JSON can hold, of which `text` is for people.

    command: run by /bin/sh with the JSON on its standard input. url: gets the JSON by POST, as Slack's
    incoming webhooks do. interval_s: after the first BURST, one message in so many seconds. What cannot be
    sent is tried TRIES times, then counted in `failed` and told in the log, never with the url's path, which
    may be a secret.
    """

    def __init__(
        self,
        *,
        command: str = "",
        url: str = "",
        interval_s: float = 10.0,
        command_timeout_s: float = COMMAND_TIMEOUT_S,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._hooks: list[_Hook] = []
        if command:
            self._hooks.append(_Hook(Command(command, command_timeout_s), interval_s))
        if url:
            self._hooks.append(_Hook(Webhook(url, request_timeout_s), interval_s))

    @property
    def failed(self) -> int:
        """Messages that were given up."""
        return sum(hook.failed for hook in self._hooks)

    @property
    def dropped(self) -> int:
        """Events that found MAX_WAITING before them."""
        return sum(hook.dropped for hook in self._hooks)

    def start(self) -> None:
        """Begins to send, where there is anywhere to send to."""
        for hook in self._hooks:
            hook.start()

    def put(self, event: Mapping[str, Any]) -> None:
        """Sends an event soon; never waits."""
        for hook in self._hooks:
            hook.put(event)

    def stop(self, timeout_s: float) -> None:
        """Sends what waits, at once, for at most `timeout_s`, and ends what is still going on then: a
        command is killed."""
        until = time.monotonic() + timeout_s
        for hook in self._hooks:
            hook.hurry()
        for hook in self._hooks:
            hook.stop(until)


class _Hook:
    """One way, and what waits for it."""

    def __init__(self, way: Way, interval_s: float) -> None:
        self.failed = 0
        self.dropped = 0
        self._way = way
        self._interval_s = interval_s
        self._changed = threading.Condition()
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._send_all, name="hook", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, event: Mapping[str, Any]) -> None:
        with self._changed:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append(event)
                self._changed.notify()
                return
            self.dropped += 1
            first = self.dropped == 1
        if first:
            logger.warning(
                "%d messages wait for %s: further ones are dropped; they are in the runs all the same",
                MAX_WAITING,
                self._way.name,
            )

    def hurry(self) -> None:
        """What waits goes at once, and the thread ends then."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self, until: float) -> None:
        """Waits for that until time.monotonic() is `until`."""
        if not self._thread.is_alive():
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            logger.warning(
                "%s is still at work: it and %d messages are left behind",
                self._way.name,
                len(self._waiting),
            )
            self._ended = True
            self._way.end()
            self._thread.join(END_S)

    def _send_all(self) -> None:
        tokens, since = float(BURST), time.monotonic()
        while (event := self._next()) is not None:
            events = [event]
            now = time.monotonic()
            tokens = min(float(BURST), tokens + (now - since) / self._interval_s)
            since = now
            if tokens < 1:
                self._stops_within((1 - tokens) * self._interval_s)
                tokens, since = 1.0, time.monotonic()
                with self._changed:
                    events += self._waiting
                    self._waiting.clear()
            tokens -= 1
            self._send(_together(events))

    def _next(self) -> Mapping[str, Any] | None:
        """Waits for the next event; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopping)
            return self._waiting.popleft() if self._waiting and not self._ended else None

    def _stops_within(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._stopping, seconds)

    def _send(self, event: Mapping[str, Any]) -> None:
        body = json.dumps(event, ensure_ascii=False).encode(errors="replace")
        problem = self._tried(body)
        tries = 1
        while problem is not None and tries < TRIES and not self._stops_within(RETRY_S):
            problem = self._tried(body)
            tries += 1
        if problem is not None:
            self.failed += 1
            logger.warning(
                "%s failed: %s; the event is in the run all the same", self._way.name, problem
            )

    def _tried(self, body: bytes) -> Exception | None:
        """Why it was not taken, None when it was."""
        try:
            self._way.send(body)
        except Exception as error:  # noqa: BLE001 - whatever a hook does, the agent goes on
            return error
        return None


def _together(events: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    if len(events) == 1:
        return events[0]
    shown = events[:MAX_TOGETHER]
    text = "\n".join(str(event["text"]) for event in shown)
    if len(events) > len(shown):
        text += f"\nand {len(events) - len(shown)} more"
    return {"text": text, "events": shown}
