"""Where health is told: the runs it concerns, the agent's log, and hooks."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

from trackagent.agent.active import Active
from trackagent.agent.collect.contract import Incident
from trackagent.agent.health.hooks import Hooks
from trackagent.agent.shown import visible
from trackagent.agent.store.contract import EventData, ProducerInfo

logger = logging.getLogger(__name__)

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
# What stands in several runs (a node's events) goes to hooks once.
REMEMBERED = 100


class Telling:
    """Tells what the rules find, and passes on what others tell the runs: dead ranks, XIDs, the scripts' own
    warnings. node: this node's name."""

    def __init__(self, active: Active, hooks: Hooks, node: str) -> None:
        self._active = active
        self._hooks = hooks
        self._node = node
        self._passed: deque[tuple[str, str, int]] = deque(maxlen=REMEMBERED)

    def tell(
        self, level: str, message: str, data: dict[str, Any], info: ProducerInfo | None
    ) -> None:
        """What a rule has found, or that it is over, in the run of this rank, which may have ended. None: it
        concerns every run of this node."""
        self._active.tell(Incident(level, message, data), to=info)
        run_id = info.run_id if info is not None else ""
        where = f"run {_name(info)}" if info is not None else f"node {self._node}"
        logger.log(_LEVELS[level], "%s: %s", where, message)
        if level != "info" or data.get("over"):
            self._put(level, message, data, where, run_id, time.time_ns())

    def passed(self, event: EventData, info: ProducerInfo) -> None:
        """An event that was stored. What the rules found was told when they did."""
        if event.level == "info" or "rule" in event.data:
            return
        # An event of the node has one time in all of its runs.
        once = (event.level, event.message, event.time_ns)
        if once not in self._passed:
            self._passed.append(once)
            data = {"source": info.source, "step": event.step, **event.data}
            where = f"run {_name(info)}"
            self._put(event.level, event.message, data, where, info.run_id, event.time_ns)

    def _put(
        self, level: str, message: str, data: dict[str, Any], where: str, run_id: str, time_ns: int
    ) -> None:
        self._hooks.put(
            {
                "text": visible(f"[{level}] {where}: {message}"),
                "level": level,
                "message": message,
                "run_id": run_id,
                "node": self._node,
                "time_ns": time_ns,
                "data": data,
            }
        )


def _name(info: ProducerInfo) -> str:
    return info.run_name or info.run_id[:8]
