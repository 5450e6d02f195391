"""The named steps of agent and rank at which they may be told to die, in the order of the data's path.

Most of the agent's are the commits of its two databases: a transaction is known by a statement in it.
`Connection` is what the constructor seams of spool and store get: it dies at the step that the switch `step`
names, and fails as the switches `spool` and `store` say. All other steps are functions.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from functools import reduce, wraps
from importlib import import_module
from typing import Any, NamedTuple

from tests.chaos.switches import SPOOL, STEP, STORE, Switches, die_at, next_step

BEFORE, AFTER = "before", "after"


class Step(NamedTuple):
    """`what` is a statement of the agent's database `where`, at whose commit it dies, or, where that is "", a
    function of trackagent, as module:name (on the thread `thread`, where one is named). fresh: it is reached
    only when the agent's files are made. nth: which time it is to die there. at_end: it is reached by a rank
    that is told to end. with_agent: the agent dies with the rank, a moment before."""

    name: str
    where: str
    what: str
    when: str
    fresh: bool = False
    thread: str = ""
    nth: int = 1
    at_end: bool = False
    with_agent: bool = False


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
    Step(
        "the sink has accepted, the cursor stands", "", "agent.sinks.store:StoreSink.deliver", AFTER
    ),
    Step("the cursor moves, before the commit", SPOOL, "SET cursor = ?", BEFORE),
    Step("the cursor moves, after the commit", SPOOL, "SET cursor = ?", AFTER),
    Step("chunks are merged, in the transaction", STORE, "DELETE FROM chunks", "at once"),
    Step("chunks are merged, before the commit", STORE, "DELETE FROM chunks", BEFORE),
    Step("chunks are merged, after the commit", STORE, "DELETE FROM chunks", AFTER),
    Step("a rank says goodbye, before the commit", SPOOL, "SET ended_ns", BEFORE),
    Step("a rank says goodbye, before the answer", SPOOL, "SET ended_ns", AFTER),
    Step("an orphan is half read", "", "agent.spool:Spool.append", AFTER, thread="orphans"),
    Step("an orphan is read", "", "agent.spool:Spool.end_producer", BEFORE, thread="orphans"),
    Step("an orphan's end is noted", "", "agent.orphans:shutil.rmtree", BEFORE),
    Step("an orphan's folder is empty", "", "agent.orphans:os.rmdir", BEFORE),
    Step("told to stop, before the spool is drained", "", "agent.pipeline:Pipeline.stop", BEFORE),
    Step("told to stop, before the spool is closed", "", "agent.spool:Spool.close", BEFORE),
)


RANK_STEPS = (
    Step(
        "a segment is made, in no lane yet",
        "",
        "client.segment:Segment.publish_header",
        BEFORE,
        nth=4,
    ),
    Step(
        "a segment is published, in no lane yet",
        "",
        "client.segment:Segment.publish_header",
        AFTER,
        nth=4,
    ),
    Step("a lane has a new segment", "", "client.journal:Journal.roll", AFTER, nth=4),
    Step("records are taken to be sent", "", "client.journal:Journal.unsent", AFTER, nth=3),
    Step(
        "a segment is acknowledged, not yet unlinked",
        "",
        "client.segment:Segment.remove",
        BEFORE,
        nth=2,
        with_agent=True,
    ),
    Step(
        "a segment is unlinked, before the checkpoint",
        "",
        "client.segment:Segment.remove",
        AFTER,
        nth=2,
        with_agent=True,
    ),
    Step(
        "the checkpoint is written",
        "",
        "client.segment:Segment.acknowledge",
        AFTER,
        nth=5,
        with_agent=True,
    ),
    Step(
        "the run has ended, its last word is not written",
        "",
        "client.journal:Journal.seal",
        AFTER,
        at_end=True,
    ),
    Step("the last word is delivered", "", "client.sender:Sender.drain", AFTER, at_end=True),
    Step(
        "the agent knows of the end, the journal is there",
        "",
        "client.journal:Journal.close",
        BEFORE,
        at_end=True,
    ),
    Step(
        "the journal is empty, its folder is there",
        "",
        "client.folder:Path.rmdir",
        BEFORE,
        at_end=True,
    ),
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
        if "COMMIT" not in script:
            return super().executescript(script)
        statement = ""
        for part in script.split(";"):
            statement += f"{part};"
            if sqlite3.complete_statement(statement):
                self.execute(statement)
                statement = ""
        return self.cursor()

    def _under(
        self, statement: str, call: Callable[..., sqlite3.Cursor], *arguments: Any
    ) -> sqlite3.Cursor:
        text = statement.strip()
        if not self.in_transaction:
            self._said = []
        self._said.append(text)
        is_commit = text.rstrip(";") == "COMMIT"
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
        name = next_step(self.switches, STEP)
        step = BY_NAME[name] if name else None
        if step is None or (step.where, step.when) != (self.where, when):
            return
        if any(step.what in text for text in said):
            die_at(self.switches, STEP)


BY_NAME = {step.name: step for step in AGENT_STEPS}


def connection(where: str, switches: Switches) -> type[Connection]:
    """What sqlite3.connect takes as its factory, for the database `where`."""
    return type("Connection", (Connection,), {"where": where, "switches": switches})


def watch(step: Step, reached: Callable[[Step], None]) -> None:
    """Lets the function that the step is about call `reached`, which may not return."""
    module, names = step.what.split(":")
    *owners, name = names.split(".")
    owner: Any = reduce(getattr, owners, import_module(f"trackagent.{module}"))
    function = getattr(owner, name)

    def at(when: str) -> None:
        if step.when == when and step.thread in ("", threading.current_thread().name):
            reached(step)

    @wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        at(BEFORE)
        result = function(*arguments, **named)
        at(AFTER)
        return result

    setattr(owner, name, watched)
