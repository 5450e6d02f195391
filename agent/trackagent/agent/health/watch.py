"""The thread that asks the rules, once a second, and tells what they find."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from trackagent.agent.health.alarms import Alarms, Change, Finding
from trackagent.agent.health.hardware import NodeView, Readings
from trackagent.agent.health.hardware import findings as node_findings
from trackagent.agent.health.settings import Thresholds
from trackagent.agent.health.training import findings as run_findings
from trackagent.agent.health.views import RunView, Views
from trackagent.agent.store.contract import Batch, EventData, ProducerInfo

logger = logging.getLogger(__name__)

INTERVAL_S = 1.0

Tell = Callable[[str, str, dict[str, Any], "ProducerInfo | None"], None]
"""Called with level, message, data and a rank of the run (None: it concerns every run of this node)."""


class Watch:
    """Judges the runs and the node.

    `take` and `caught_up` are for the thread that delivers: the first gets each batch once the store has it,
    the second is called when there is none left. passed: told of each event in a batch. A rule that says that
    something has not come is asked about the time until then only: a slow store is no rank that hangs.
    """

    def __init__(
        self,
        thresholds: Thresholds,
        *,
        rules: frozenset[str],
        readings: Callable[[], Readings],
        tell: Tell,
        passed: Callable[[EventData, ProducerInfo], None] = lambda event, info: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._thresholds = thresholds
        self._rules = rules
        self._readings = readings
        self._tell = tell
        self._passed = passed
        self._clock = clock
        self._lock = threading.Lock()
        self._views = Views(thresholds)
        self._node = NodeView()
        self._alarms = Alarms()
        self._complete_until_s = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        """Begins to judge."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the look under way."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def take(self, batch: Batch) -> None:
        """What was just delivered; not what was copied from another store, which is no news. Raises nothing:
        what the rules cannot take does not concern the store."""
        if batch.history:
            batch = _without(batch, batch.history)
        with self._lock:
            try:
                self._views.take(batch, self._clock())
            except Exception:
                logger.exception(
                    "health: a batch cannot be judged; what was known of the runs is forgotten"
                )
                self._views = Views(self._thresholds)
        infos = {info.producer_id: info for info in batch.producers}
        for event in batch.events:
            if (info := infos.get(event.producer_id)) is not None:
                self._passed(event, info)

    def caught_up(self) -> None:
        """Everything that was received is delivered."""
        self._complete_until_s = self._clock()

    def standing(self) -> list[Finding]:
        """What is wrong now, oldest first."""
        with self._lock:
            return self._alarms.standing()

    def describe(self, describe: Callable[[RunView], Any]) -> list[Any]:
        """What `describe` says of each run that goes on. It is called while nothing changes."""
        with self._lock:
            return [describe(run) for run in self._views.runs.values()]

    def look(self) -> None:
        """Asks every rule once, and tells what has changed."""
        with self._lock:
            now_s = self._clock()
            self._node.take(self._readings(), now_s)
            # What a run that has ended meanwhile did last is looked at too.
            runs = [*self._views.runs.values(), *self._views.ended.values()]
            found = [
                finding
                for run in runs
                for finding in run_findings(run, self._thresholds, self._complete_until_s)
            ]
            found += node_findings(self._node, self._thresholds, now_s)
            found = [finding for finding in found if finding.rule in self._rules]
            changes = self._alarms.look(found, now_s)
            for run_id in self._views.settle():
                self._alarms.forget(run_id)
        by_run = {run.run_id: run.first for run in runs}
        for change in changes:
            level, message, data = _told(change)
            self._tell(level, message, data, by_run.get(change.finding.run_id))

    def _run(self) -> None:
        while not self._stopping.wait(INTERVAL_S):
            try:
                self.look()
            except Exception:
                logger.exception("health: a look failed; trying again")


def _without(batch: Batch, ids: frozenset[bytes]) -> Batch:
    """The batch without what it says of these producers."""
    names = ("producers", "params", "tags", "events", "points", "ends", "losses", "gaps")
    rest: dict[str, Any] = {
        name: [one for one in getattr(batch, name) if one.producer_id not in ids] for name in names
    }
    return replace(batch, **rest)


def _told(change: Change) -> tuple[str, str, dict[str, Any]]:
    """Level, message and data of the event."""
    finding = change.finding
    data: dict[str, Any] = {"rule": finding.rule, "subject": finding.subject, **finding.numbers}
    if not change.over:
        return finding.level, finding.message, data
    data |= {"over": True, "lasted_s": round(change.lasted_s, 1)}
    return "info", f"over after {change.lasted_s:.0f} s: {finding.message}", data
