"""Values that devices are still computing, on their way into one run's journal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from trackagent.client.device import InFlight, Rings
from trackagent.client.errors import TrackagentError
from trackagent.client.journal import Journal, Lane

# How often `wait` looks.
POLL_S = 0.005


class Landing:
    """`queue` on any thread and in signal handlers, `write` too: who comes second leaves it to the first.

    wake: called when it is time to look; None: nobody looks but who queues. lose: told of each record that
    does not come, its reason, step and what to do.
    """

    def __init__(
        self,
        rings: Rings,
        journal: Journal,
        *,
        wake: Callable[[], None] | None,
        lose: Callable[[str, int, str], None],
    ) -> None:
        self._in_flight = InFlight(rings, wake)
        self._journal = journal
        self._lose = lose
        self._alone = wake is None
        self._looking = threading.Lock()
        self.queue = self._in_flight.queue

    @property
    def is_worth_a_look(self) -> bool:
        """Whether `write` can find anything."""
        return self._in_flight.is_worth_a_look

    @property
    def is_for_loggers(self) -> bool:
        """Whether log calls should look themselves: the sender's thread may be held up for seconds, as by an
        agent that hangs."""
        return self._alone or self._in_flight.is_filled(0.75)

    def write(self, lane: Lane, most: int | None = None) -> None:
        """Writes, in the taken lane, the records whose values have come since the last look: looks for all,
        or for the `most` oldest."""
        if not self._looking.acquire(blocking=False):
            return
        try:
            for one in self._in_flight.landed(most):
                try:
                    self._journal.write_metrics(
                        lane, one.values, step=one.step, time_ns=one.time_ns
                    )
                    lane.state.records += 1
                except TrackagentError as error:
                    self._lose(error.reason, one.step, str(error))
        finally:
            self._looking.release()

    def wait(self, until: float, take: Callable[[], Lane]) -> None:
        """Until all values have come, or time.monotonic() is `until`. take: gives a lane."""
        while self._in_flight and time.monotonic() < until:
            with contextlib.suppress(TrackagentError):
                lane = take()
                try:
                    self.write(lane)
                finally:
                    lane.give_back(lane)
            if self._in_flight:
                time.sleep(POLL_S)

    def give_up(self, lane: Lane) -> None:
        """At the end, when nobody logs any more: what has not come by now is lost."""
        self.write(lane)
        for step in self._in_flight.give_up():
            self._lose(
                "not computed in time",
                step,
                "some values were still being computed by a device when the run finished, and are lost: "
                "synchronize with it before finish()",
            )
