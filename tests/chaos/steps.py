"""The named steps of the agent at which it may be told to die, in the order of the data's path.

Most are the commits of its two databases: a transaction is known by a statement in it. `Connection` is what
the constructor seams of spool and store get: it dies at the step that the switch `step` names, and fails as
the switches `spool` and `store` say.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

from tests.chaos.switches import SPOOL, STORE, Switches, die_at, next_step

BEFORE, AFTER = "before", "after"


class Step(NamedTuple):
    """A step of the agent: `what` is a statement of the database `where`, at whose commit it dies, or, where
    that is "", a function, as module:name (on the thread `thread`, where one is named). fresh: it is
    reached only when the agent's files are made."""

    name: str
    where: str
    what: str
    when: str
    fresh: bool = False
    thread: str = ""


AGENT_STEPS = (
    Step("the spool is made, before its commit", SPOOL, "CREATE TABLE spool", BEFORE, fresh=True),
    Step("the spool is made, after its commit", SPOOL, "CREATE TABLE spool", AFTER, fresh=True),
    Step("the store is made, before its commit", STORE, "user_version = ", BEFORE, fresh=True),
    Step("the store is made, after its commit", STORE, "user_version = ", AFTER, fresh=True),
    Step("a producer is opened, before the commit", SPOOL, "INSERT INTO producers", BEFORE),
    Step("a producer is opened, before the answer", SPOOL, "INSERT INTO producers", AFTER),
    Step("batches are spooled, before the commit", SPOOL, "INSERT INTO batches", BEFORE),
    Step("batches are spooled, before the acknowledgement", SPOOL, "INSERT INTO batches", AFTER),
    Step("a delivery is planned, before the commit", SPOOL, "SET planned = ?", BEFORE),
    Step("a delivery is planned, before it is handed over", SPOOL, "SET planned = ?", AFTER),
    Step("a batch is stored, in its transaction", STORE, "INSERT INTO chunks", "at once"),
    Step("a batch is stored, before the commit", STORE, "INSERT INTO applied", BEFORE),
    Step("a batch is stored, after the commit", STORE, "INSERT INTO applied", AFTER),
    Step("the sink has accepted, the cursor stands", "", "sinks.store:StoreSink.deliver", AFTER),
    Step("the cursor moves, before the commit", SPOOL, "SET cursor = ?", BEFORE),
    Step("the cursor moves, after the commit", SPOOL, "SET cursor = ?", AFTER),
    Step("chunks are merged, in the transaction", STORE, "DELETE FROM chunks", "at once"),
    Step("chunks are merged, before the commit", STORE, "DELETE FROM chunks", BEFORE),
    Step("chunks are merged, after the commit", STORE, "DELETE FROM chunks", AFTER),
    Step("a rank says goodbye, before the commit", SPOOL, "SET ended_ns", BEFORE),
    Step("a rank says goodbye, before the answer", SPOOL, "SET ended_ns", AFTER),
    Step("an orphan is half read", "", "spool:Spool.append", AFTER, thread="orphans"),
    Step("an orphan is read", "", "spool:Spool.end_producer", BEFORE, thread="orphans"),
    Step("an orphan's end is noted", "", "orphans:shutil.rmtree", BEFORE),
    Step("an orphan's folder is empty", "", "orphans:os.rmdir", BEFORE),
    Step("told to stop, before the spool is drained", "", "pipeline:Pipeline.stop", BEFORE),
    Step("told to stop, before the spool is closed", "", "spool:Spool.close", BEFORE),
)


class Connection(sqlite3.Connection):
    """A connection to the database `where`."""

    where = ""
    switches: Switches
    _said: list[str]

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return self._under(statement, super().execute, statement, *parameters)

    def executemany(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return self._under(statement, super().executemany, statement, *parameters)

    def executescript(self, script: str) -> sqlite3.Cursor:
        if "COMMIT" in script:
            for statement in script.split(";")[:-1]:
                self.execute(statement)
            return self.cursor()
        return super().executescript(script)

    def _under(
        self, statement: str, call: Callable[..., sqlite3.Cursor], *arguments: Any
    ) -> sqlite3.Cursor:
        text = statement.strip()
        if not self.in_transaction:
            self._said = []
        self._said.append(text)
        is_commit = text == "COMMIT"
        # "before: disk I/O error", or "after: …": it fails, though it has been done.
        when, _, error = self.switches.get(self.where).partition(": ")
        writes = is_commit or text.startswith(("INSERT", "UPDATE", "DELETE"))
        if error and when == BEFORE and writes:
            raise sqlite3.OperationalError(error)
        if is_commit:
            self._die_if_told(self._said, BEFORE)
        cursor = call(*arguments)
        if is_commit:
            self._die_if_told(self._said, AFTER)
            if error and when == AFTER:
                raise sqlite3.OperationalError(error)
        else:
            self._die_if_told([text], "at once")
        return cursor

    def _die_if_told(self, said: list[str], when: str) -> None:
        name = next_step(self.switches)
        step = BY_NAME[name] if name else None
        if step is None or (step.where, step.when) != (self.where, when):
            return
        if any(step.what in text for text in said):
            die_at(self.switches, step.name)


BY_NAME = {step.name: step for step in AGENT_STEPS}


def connection(where: str, switches: Switches) -> type[Connection]:
    """What sqlite3.connect takes as its factory, for the database `where`."""
    return type("Connection", (Connection,), {"where": where, "switches": switches})


def watch(owner: Any, name: str, step: Step, switches: Switches) -> None:
    """Lets the function `name` of `owner` die at `step`, when it is told to."""
    function = getattr(owner, name)

    def die_if_told(when: str) -> None:
        on_it = step.thread in ("", threading.current_thread().name)
        if step.when == when and on_it and next_step(switches) == step.name:
            die_at(switches, step.name)

    @wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        die_if_told(BEFORE)
        result = function(*arguments, **named)
        die_if_told(AFTER)
        return result

    setattr(owner, name, watched)
