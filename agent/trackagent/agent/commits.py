"""Group commit: many callers, one writing thread, one fsync for all who came while the last was under way.

The thread sleeps until the first job that does not want to wait, or whose patience is at its end: those that
come until then cost no wake-up of it.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MAX_JOBS = 256
MAX_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    size: int
    last: bool
    future: Future[T]

    def begins(self) -> bool:
        """False when whoever asked is gone (a stream that broke); after True they cannot go."""
        return self.future.set_running_or_notify_cancel()


class GroupCommit:
    """Runs jobs on a thread of its own, several in one transaction of `connection`.

    A job's future gets its result when the transaction is committed. A job that raises is rolled back alone.
    To find out which one it was, all of its transaction is rolled back once, and each runs again: what a job
    does outside of the database must be such that it may be done twice. When the commit fails, all is rolled
    back and all of its futures fail. After each rollback `rolled_back` is called, before anything else is
    begun and before futures are told: what jobs have remembered of the database may not be so.

    is_damage: whether an error says that the file is damaged; then all of the transaction fails, and `mend`
    gives the connection for the next one (if it cannot, the next one fails with what it raised, and it is
    asked again). committed: is called after each commit, before its futures get their results. Neither it nor
    `rolled_back` may raise.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        is_damage: Callable[[Exception], bool] = lambda _: False,
        mend: Callable[[Exception], sqlite3.Connection] | None = None,
        committed: Callable[[], None] = lambda: None,
        rolled_back: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._is_damage = is_damage
        self._mend = mend
        self._committed = committed
        self._rolled_back = rolled_back
        self._damage: Exception | None = None
        self._changed = threading.Condition(threading.Lock())
        self._jobs: deque[_Job[Any]] = deque()
        self._bytes = 0
        # When the next transaction begins, by time.monotonic().
        self._due = math.inf
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def submit(
        self,
        work: Callable[[], T],
        *,
        size: int = 0,
        patience_s: float = 0.0,
        last: bool = False,
    ) -> Future[T]:
        """Queues `work`. size: bytes it writes, to keep transactions small. patience_s: how long it may wait
        for others to share its commit; one of them with less patience takes it along. last: it comes
        behind all others of its transaction, and sees what they did. After `close` it fails."""
        future: Future[T] = Future()
        due = time.monotonic() + patience_s
        with self._changed:
            if self._closing:
                future.set_exception(sqlite3.ProgrammingError("it is closed"))
                return future
            self._jobs.append(_Job(work, size, last, future))
            self._bytes += size
            if due < self._due:
                self._due = due
                self._changed.notify()
            elif self._is_full():
                self._changed.notify()
        return future

    def close(self) -> None:
        """Finishes what was submitted and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _is_full(self) -> bool:
        return len(self._jobs) >= MAX_JOBS or self._bytes >= MAX_BYTES

    def _run(self) -> None:
        while jobs := self._gather():
            self._commit([job for job in jobs if job.begins()])

    def _gather(self) -> list[_Job[Any]]:
        """Jobs for one transaction; none at the end."""
        jobs: list[_Job[Any]] = []
        size = 0
        with self._changed:
            while not (self._closing or self._is_full()):
                left = self._due - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(None if left == math.inf else left)
            while self._jobs and len(jobs) < MAX_JOBS and size < MAX_BYTES:
                jobs.append(self._jobs.popleft())
                size += jobs[-1].size
            self._bytes -= size
            if not self._jobs:
                self._due = math.inf
        return sorted(jobs, key=lambda job: job.last)

    def _commit(self, jobs: list[_Job[Any]]) -> None:
        done: list[tuple[_Job[Any], Any]] = []
        failed: list[tuple[_Job[Any], Exception]] = []
        try:
            if self._damage is not None and self._mend is not None:
                self._connection = self._mend(self._damage)
                self._damage = None
            self._connection.execute("BEGIN IMMEDIATE")
            self._carry_out(jobs, done, failed)
            self._connection.execute("COMMIT")
            self._committed()
        except Exception as error:  # noqa: BLE001 - goes to all who asked
            if self._damage is None and self._is_damage(error):
                self._damage = error
            with contextlib.suppress(sqlite3.Error):
                # Should this fail as well, the next BEGIN fails, which leads here again.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            self._rolled_back()
            settled = {id(job) for job, _ in failed}
            failed += [(job, error) for job in jobs if id(job) not in settled]
            done = []
        for job, result in done:
            job.future.set_result(result)
        for job, problem in failed:
            job.future.set_exception(problem)

    def _carry_out(
        self,
        jobs: list[_Job[Any]],
        done: list[tuple[_Job[Any], Any]],
        failed: list[tuple[_Job[Any], Exception]],
    ) -> None:
        """All in one savepoint; where one raises, each in its own: that costs only where it is needed."""
        execute = self._connection.execute
        execute("SAVEPOINT jobs")
        try:
            results = [job.work() for job in jobs]
        except Exception as error:
            if not self._connection.in_transaction or self._is_damage(error):
                raise  # SQLite has rolled everything back by itself: its disk is full
            execute("ROLLBACK TO jobs")
            self._rolled_back()
            execute("RELEASE jobs")
            if len(jobs) == 1:
                failed.append((jobs[0], error))
            else:
                for job in jobs:
                    self._carry_out([job], done, failed)
        else:
            execute("RELEASE jobs")
            done += zip(jobs, results, strict=True)
