"""Which runs log on this node at this moment, and how to tell them something.

A run is here while one of its processes has opened a producer at this agent that has not ended. Whoever needs
to know asks as often as they like: the spool is only asked again when a producer has come or ended.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from functools import partial
from typing import Any

from trackagent.agent import notices
from trackagent.agent.collect.contract import Incident
from trackagent.agent.errors import AgentError
from trackagent.agent.spool import Spool, UnknownProducer
from trackagent.agent.store.contract import ProducerInfo

logger = logging.getLogger(__name__)

# How long the spool may take to say who is here; until it does, those count who were.
PATIENCE_S = 1.0


class Active:
    """The runs that log at the agent of `spool`, on the node `node`. To be used from any thread, but not from
    the event loop: an answer may take a commit, PATIENCE_S at most."""

    def __init__(self, spool: Spool, node: str = "") -> None:
        self._spool = spool
        self._node = node
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
        """An event into every run that is here, or into that of one producer, ended or not, or known from
        another node; there it becomes durable like all that the run logs. How many there are. Returns before
        that is done; a failure is logged."""
        encoded = notices.event(event.level, event.message, event.data)
        told = list(self.runs().values()) if to is None else [to]
        for info in told:
            asked = self._spool.append_own(info.producer_id, encoded)
            asked.add_done_callback(partial(self._appended, info, encoded))
        return len(told)

    def _appended(self, info: ProducerInfo, encoded: bytes, done: Future[int]) -> None:
        """On the spool's thread. Of a rank on another node the run is told by this node itself."""
        if not done.cancelled() and isinstance(done.exception(), UnknownProducer):
            voice = _voice(self._node or info.node, info)
            self._spool.open_producer(voice, {}).add_done_callback(_warn_of_failure)
            done = self._spool.append_own(voice.producer_id, encoded)
            self._spool.end_producer(voice.producer_id)
            done.add_done_callback(_warn_of_failure)
        else:
            _warn_of_failure(done)


def _voice(node: str, rank: ProducerInfo) -> ProducerInfo:
    """What speaks for a node in the run of a rank that is not there. It samples nothing, and has ended before
    anybody could take it for somebody who logs."""
    said = f"trackagent voice {node} {rank.run_id} {rank.attempt} {rank.job_time_ns}"
    return replace(
        rank,
        producer_id=hashlib.blake2b(said.encode(), digest_size=16).digest(),
        rank=0,
        local_rank=0,
        node=node,
        pid=0,
        start_time_ns=0,
        forked=False,
        groups=(),
        sampled=f"node {node}",
        hub="",
    )


def _warn_of_failure(done: Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()) is not None:
        logger.warning("cannot tell a run what was seen on its node: %s", error)
