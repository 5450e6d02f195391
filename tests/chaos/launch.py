"""`trackagent` as a storm starts it: the whole program, with its constructors' seams in the storm's hands.

python -m tests.chaos.launch start …          as a process of its own
python -m tests.chaos.launch again start …    again and again, each forked from one that has imported
                                              everything, so that a start takes milliseconds
"""

from __future__ import annotations

import ctypes
import os
import signal
import sqlite3
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

from tests.chaos.switches import (
    DEATHS,
    SPOOL,
    STEP,
    STORE,
    Switches,
    die_at,
    follow_clock,
    next_step,
)

PR_SET_PDEATHSIG = 1


def main() -> None:
    switches = Switches.of_this_process()
    if sys.argv[1] == "again":
        del sys.argv[1]
        take_seams(switches)
        import_module("sqlite_utils")
        while is_the_parent(switches):
            pass
    else:
        follow_clock(switches)
        take_seams(switches)
    from trackagent.agent.cli import main as trackagent

    trackagent()


def is_the_parent(switches: Switches) -> bool:
    """Forks: False at once in the child, True in the parent when the child has ended and its wait status
    is noted."""
    child = os.fork()
    if not child:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return False
    _, status = os.waitpid(child, 0)
    with open(switches.folder / DEATHS, "a") as file:
        file.write(f"{os.waitstatus_to_exitcode(status)}\n")
    return True


def take_seams(switches: Switches) -> None:
    """Gives spool and store connections that fail and die as the switches say, and watches other steps."""
    from tests.chaos.steps import AGENT_STEPS, Step, connection, watch
    from trackagent.agent import daemon, store
    from trackagent.agent.spool import Spool
    from trackagent.agent.store.database import BUSY_TIMEOUT_S
    from trackagent.agent.store.sqlite import SqliteWriter

    connect_spool = partial(sqlite3.connect, factory=connection(SPOOL, switches))

    def connect_store(uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri,
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            factory=connection(STORE, switches),
        )

    def open_writer(path: Path) -> SqliteWriter:
        return SqliteWriter(path, opener=connect_store)

    store.open_writer = open_writer
    daemon.Spool = partial(Spool, connect=connect_spool)

    def die_if_told(step: Step) -> None:
        if next_step(switches, STEP) == step.name:
            die_at(switches, STEP)

    for step in AGENT_STEPS:
        if not step.where:
            watch(step, die_if_told)


if __name__ == "__main__":
    sys.argv[0] = "trackagent"
    main()
