"""A process that logs, as its part of a run: its journal, the thread that delivers it, and what it refuses.

After a fork the child gives all of this up, and opens a journal of its own when it first logs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from time import time_ns
from typing import TYPE_CHECKING, Any

from trackagent.client import channel, device, record
from trackagent.client.config import ClientConfig
from trackagent.client.errors import TooManyCalls, TrackagentError
from trackagent.client.journal import Journal, Lane
from trackagent.client.landing import Landing
from trackagent.client.record import Kind
from trackagent.client.refusals import Refusals
from trackagent.client.sender import Sender
from trackagent.client.torchmemory import TorchMemory

if TYPE_CHECKING:
    from trackagent.client.identity import Identity

logger = logging.getLogger("trackagent")


class Producer:
    """What a run writes through. `_take` gives a lane of the journal, IndexError where `_another_lane` is to
    be asked; whoever has taken one gives it back. The arguments are those of `Run`."""

    _take: Callable[[], Lane]
    _opening: threading.RLock
    _is_opening: bool

    def __init__(
        self,
        *,
        config: ClientConfig,
        who: Identity,
        experiment: str,
        run_name: str,
        groups: Mapping[str, str] | None,
        strict: bool,
        rings: device.Rings,
        torch_memory: TorchMemory | None,
    ) -> None:
        self.id = who.run_id
        self.attempt = who.attempt
        self.rank = who.rank
        self.world_size = who.world_size
        self.experiment = experiment
        self.name = run_name
        self.status = "running"
        self._config = config
        self._who = who
        self._groups = dict(groups or {})
        self._strict = strict
        self._rings = rings
        self._torch_memory = torch_memory or TorchMemory()
        self._last_step = -1
        self._warned: set[tuple[str, str]] = set()
        self._open(forked=False)
        open_producers.add(self)

    def _open(self, *, forked: bool) -> None:
        """Begins a producer: a journal, and the thread that delivers it."""
        self._refusals = Refusals()
        self._warnings: deque[str] = deque(maxlen=100)
        self._finishing = threading.Lock()
        who = self._who
        producer = {
            "producer_id": os.urandom(16).hex(),
            "run_id": who.run_id,
            "attempt": who.attempt,
            "rank": who.rank,
            "local_rank": who.local_rank,
            "world_size": who.world_size,
            "node": who.node,
            "pid": os.getpid(),
            # A clock that was never set may stand before 1970, which no identity may.
            "start_time_ns": max(0, time_ns()),
            "experiment": self.experiment,
            "run_name": self.name,
            "forked": forked,
            "job_time_ns": max(0, who.job_time_ns),
            "groups": self._groups,
        }
        if who.hub is not None:
            producer["hub"] = who.hub.text()
        # gRPC does not survive a fork: such a process only writes its journal, and the agent reads that.
        if forked or channel.is_lost():
            producer["sender"] = False
            self._sender = None
        else:
            self._sender = Sender(producer, self._config, self._housekeep)
        wake = self._sender.wake if self._sender else None
        self._journal = Journal(
            producer,
            directory=self._config.directory,
            state_directory=self._config.state_directory,
            segment_bytes=self._config.segment_bytes,
            memory_bytes=self._config.memory_bytes,
            journal_bytes=self._config.journal_bytes,
            wake=wake,
        )
        self._landing = self._new_landing(wake=wake)
        self._forked_without_journal = False
        self._take = self._journal.take
        if self._sender:
            self._sender.start(self._journal)

    def _new_landing(self, wake: Callable[[], None] | None) -> Landing:
        return Landing(self._rings, self._journal, wake=wake, lose=self._lose)

    # --- writing

    def _write(self, kind: Kind, data: Mapping[str, Any], step: int = record.NO_STEP) -> None:
        lane = self._lane()
        try:
            self._journal.write(lane, encode(kind, data, step))
        finally:
            lane.give_back(lane)

    def _lane(self) -> Lane:
        try:
            return self._take()
        except IndexError:
            return self._another_lane()

    def _another_lane(self) -> Lane:
        """For a call that finds every lane taken: by other threads, by the call that a signal
        handler interrupts, or since this process was forked, or since the run has finished.
        JournalError when there is none."""
        if self._forked_without_journal:
            self._open_in_child()
            return self._lane()
        return self._journal.add_lane()

    def _open_in_child(self) -> None:
        """The first log call in a forked process opens its journal, and calls in other threads wait for
        that. One in a signal handler that interrupts it is refused: it cannot wait for itself."""
        with self._opening:
            if self._forked_without_journal and self._is_opening:
                raise TooManyCalls("a journal is just being opened for this forked process")
            if self._forked_without_journal:
                self._is_opening = True
                try:
                    self._open(forked=True)
                finally:
                    self._is_opening = False

    def _read_torch_memory(self) -> dict[str, float]:
        # Without a sender's thread of its own this is a thread of the training's; before the first step, a
        # record would begin the curves at a step of ours.
        if self._sender is None or self._last_step < 0:
            return {}
        try:
            return self._torch_memory.read()
        except Exception as error:  # noqa: BLE001 - whatever torch raises, the sender's thread goes on
            problem = (
                f"torch cannot say what it has allocated ({error!r}): it is not asked any more"
            )
            self._warn("torch memory", "cuda", problem)
            return {}

    def _journal_torch_memory(self, lane: Lane, memory: dict[str, float]) -> None:
        """At the last step: a step under way that never ends must not look like one that has."""
        if not memory:
            return
        step = self._last_step
        try:
            self._journal.write_metrics(lane, memory, step=step, time_ns=time_ns())
            lane.state.records += 1
        except TrackagentError as error:
            self._lose(error.reason, step, str(error))

    def _lose(self, reason: str, step: int, problem: str) -> None:
        """Counts a record that `log()` took and that did not come."""
        self._refusals.add(reason, step, self._journal.records)
        self._warn(reason, "log", problem)

    # --- what is refused

    def _refuse(self, refused: list[tuple[str, Exception]], *, lost_at: int | None = None) -> None:
        """Counts each by its reason and warns once of each; raises the first one if strict. lost_at: the step
        of a log call of which, by the last of these, nothing was kept."""
        for name, error in refused:
            known = isinstance(error, TrackagentError)
            reason = error.reason if isinstance(error, TrackagentError) else "error"
            at = lost_at if error is refused[-1][1] else None
            self._refusals.add(reason, at, self._journal.records)
            self._warn(reason, name, str(error) if known else repr(error))
        if refused and self._sender is None:
            # A forked process has no sender's thread that would do these.
            if not self._forked_without_journal:
                self._journal.prepare()
            self._housekeep()
        elif refused and self.status != "running":
            self._emit_warnings()
        if refused and self._strict:
            raise refused[0][1] from None

    def _warn(self, reason: str, name: str, message: str) -> None:
        """Once for each reason and name; written by the sender's thread, since a log handler may block."""
        if (reason, name) not in self._warned and len(self._warned) < 1000:
            self._warned.add((reason, name))
            self._warnings.append(message)

    def _emit_warnings(self) -> None:
        while self._warnings:
            logger.warning("%s", self._warnings.popleft())

    def _housekeep(self) -> None:
        """On the sender's thread, every flush interval."""
        self._emit_warnings()
        memory = self._read_torch_memory()
        if memory or self._landing.is_worth_a_look or self._refusals.unwritten:
            try:
                lane = self._take()
            except IndexError:
                return
            try:
                self._landing.write(lane)
                self._journal_torch_memory(lane, memory)
                # Without room now, the counts are written when there is.
                with contextlib.suppress(TrackagentError):
                    self._refusals.write(self._journal, lane)
            finally:
                lane.give_back(lane)

    def _after_fork_in_child(self) -> None:
        """Gives up the parent's lock and touches nothing else of the parent's. If this process
        logs, it opens a journal of its own."""
        self._take = no_lane
        self._forked_without_journal = True
        self._is_opening = False
        self._finishing = threading.Lock()
        self._opening = threading.RLock()
        # The parent's values come to the parent.
        self._landing = self._new_landing(wake=None)
        self._journal.abandon_in_child()


open_producers: weakref.WeakSet[Producer] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    from trackagent.client.history import run_is_inherited  # which init() has imported

    for one in list(open_producers):
        one._after_fork_in_child()
        run_is_inherited(one.id)


os.register_at_fork(after_in_child=_after_fork_in_child)


def no_lane() -> Lane:
    raise IndexError


def encode(kind: Kind, data: Mapping[str, Any], step: int = record.NO_STEP) -> bytes:
    return record.encode_json(kind, data, step=step, time_ns=time_ns())
