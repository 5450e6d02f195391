"""Which runs log on this node at this moment, and how to tell them something.

A run is here while one of its processes has opened a producer at this agent that has not ended. Whoever needs
to know asks as often as they like: the spool is only asked again when a producer has come or ended.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from trackagent.agent import notices
from trackagent.agent.collect.contract import Incident
from trackagent.agent.errors import AgentError
from trackagent.agent.spool import Spool
from trackagent.agent.store.contract import ProducerInfo

logger = logging.getLogger(__name__)

# How long the spool may take to say who is here; until it does, those count who were.
PATIENCE_S = 1.0


class Active:
    """The runs that log at the agent of `spool`. To be used from any thread, but not from the event loop: an
    answer may take a commit, PATIENCE_S at most."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._lock = threading.Lock()
        self._seen = -1
        self._asked: tuple[int, Future[list[ProducerInfo]]] | None = None
        self._here: Sequence[ProducerInfo] = ()

    def producers(self) -> Sequence[ProducerInfo]:
        """Everyone who logs here and has not ended, what ranks have forked and what is sampled too."""
        with self._lock:
            if self._seen != self._spool.comings:
                self._refresh()
            return self._here

    def _refresh(self) -> None:
        if self._asked is None:
            self._asked = self._spool.comings, self._spool.not_ended()
        comings, answer = self._asked
        try:
            self._here = tuple(answer.result(PATIENCE_S))
            self._seen, self._asked = comings, None
        except FutureTimeout:
            pass  # it is asked for again when it is there
        except (AgentError, sqlite3.Error) as error:
            self._asked = None
            logger.debug("cannot tell who is here: %s", error)

    def loggers(self) -> list[ProducerInfo]:
        """Everyone who logs here and has not ended, without what is sampled."""
        return [info for info in self.producers() if not info.sampled]

    def ranks(self) -> list[ProducerInfo]:
        """The ranks' own processes."""
        return [info for info in self.loggers() if not info.forked]

    def runs(self) -> dict[str, ProducerInfo]:
        """By run that is here, the lowest rank of its last attempt here."""
        here = sorted(self.loggers(), key=lambda info: (info.forked, -info.attempt, info.rank))
        return {info.run_id: info for info in reversed(here)}

    def tell(self, event: Incident, *, to: ProducerInfo | None = None) -> int:
        """An event into every run that is here, or into that of one producer, ended or not; there it becomes
        durable like all that the run logs. How many there are. Returns before that is done; a failure is
        logged."""
        encoded = notices.event(event.level, event.message, event.data)
        told = list(self.runs().values()) if to is None else [to]
        for info in told:
            self._spool.append_own(info.producer_id, encoded).add_done_callback(_warn_of_failure)
        return len(told)


def _warn_of_failure(done: Future[int]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.warning("cannot tell a run what was seen on its node: %s", error)
