"""Group commit: many callers, one writing thread, one fsync for all who came while the last was under way."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

MAX_JOBS = 256
MAX_BYTES = 16 * 1024 * 1024


@dataclass(slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    undo: Callable[[], None]
    size: int
    patient: bool
    future: Future[T]

    def begins(self) -> bool:
        """False when whoever asked is gone (a stream that broke); after True they cannot go."""
        return self.future.set_running_or_notify_cancel()


class GroupCommit:
    """Runs jobs on a thread of its own, several in one transaction of `connection`, each in a
    savepoint.

    A job's future gets its result when the transaction is committed. A job that raises is rolled back
    alone; when the commit fails, all of it is rolled back and all of its futures fail. For each job
    rolled back its `undo` is called, which takes back what the job changed in memory.

    linger_s: how long a patient job may wait for others to share its commit. is_damage: whether an error
    says that the file is damaged; then all of the transaction fails, and `mend` gives the connection for the
    next one (if it cannot, the next one fails with what it raised, and it is asked again). committed: is
    called after each commit, before its futures get their results; must not raise.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        *,
        linger_s: float,
        is_damage: Callable[[Exception], bool] = lambda _: False,
        mend: Callable[[Exception], sqlite3.Connection] | None = None,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        self._connection = connection
        self._linger_s = linger_s
        self._is_damage = is_damage
        self._mend = mend
        self._committed = committed
        self._damage: Exception | None = None
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()

    def submit(
        self,
        work: Callable[[], T],
        *,
        undo: Callable[[], None] = lambda: None,
        size: int = 0,
        patient: bool = False,
    ) -> Future[T]:
        """Queues `work`. size: bytes it writes, to keep transactions small."""
        future: Future[T] = Future()
        self._jobs.put(_Job(work, undo, size, patient, future))
        return future

    def close(self) -> None:
        """Finishes what was submitted and ends the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing:
            jobs, closing = self._gather()
            self._commit([job for job in jobs if job.begins()])

    def _gather(self) -> tuple[list[_Job[Any]], bool]:
        """Jobs for one transaction; whether the end was asked for after them."""
        jobs: list[_Job[Any]] = []
        size = 0
        deadline: float | None = None
        while len(jobs) < MAX_JOBS and size < MAX_BYTES:
            try:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                job = self._jobs.get(timeout=left)
            except Empty:
                break
            if job is None:
                return jobs, True
            jobs.append(job)
            size += job.size
            if not job.patient:
                deadline = 0.0
            elif deadline is None:
                deadline = time.monotonic() + self._linger_s
        return jobs, False

    def _commit(self, jobs: list[_Job[Any]]) -> None:
        done: list[tuple[_Job[Any], Any]] = []
        failed: list[tuple[_Job[Any], Exception]] = []
        try:
            if self._damage is not None and self._mend is not None:
                self._connection = self._mend(self._damage)
                self._damage = None
            execute = self._connection.execute
            execute("BEGIN IMMEDIATE")
            for job in jobs:
                execute("SAVEPOINT job")
                try:
                    done.append((job, job.work()))
                except Exception as error:
                    if not self._connection.in_transaction or self._is_damage(error):
                        raise  # SQLite has rolled everything back by itself: its disk is full
                    execute("ROLLBACK TO job")
                    job.undo()
                    failed.append((job, error))
                execute("RELEASE job")
            execute("COMMIT")
            self._committed()
        except Exception as error:  # noqa: BLE001 - goes to all who asked
            if self._damage is None and self._is_damage(error):
                self._damage = error
            with contextlib.suppress(sqlite3.Error):
                # Should this fail as well, the next BEGIN fails, which leads here again.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            settled = {id(job) for job, _ in failed}
            for job in jobs:
                if id(job) not in settled:
                    job.undo()
                    failed.append((job, error))
            done = []
        for job, result in done:
            job.future.set_result(result)
        for job, problem in failed:
            job.future.set_exception(problem)
