"""A real agent whose store cannot take some batches: what becomes of them, and what people can do."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import DEADLINE_S, AgentProcess, Folders, next_line, start_script, wait_until
from trackagent.agent.config import STORE_NAME

# `trackagent`, but its store rejects what holds the key "poison" for as long as a file is there.
PICKY = """
import os
from pathlib import Path
import trackagent.agent.store as store
from trackagent.agent.cli import main
from trackagent.agent.store.contract import Rejected

real = store.open_writer

def open_writer(path):
    writer = real(path)
    write = writer.write

    def picky(batch):
        if Path(os.environ["PICKY"]).exists() and any("poison" in part.keys for part in batch.points):
            raise Rejected("it is poisoned")
        write(batch)

    writer.write = picky
    return writer

store.open_writer = open_writer
main()
"""
TRAIN = """
import sys
from trackagent import client
run = client.init(experiment="poisoned")
print(run.id, flush=True)
for step in range(300):
    client.log({"loss": float(step)}, step=step)
    if step == 150:
        # The poison goes into a batch of its own.
        sys.stdin.readline()
        client.log({"poison": 1.0}, step=step)
        sys.stdin.readline()
client.finish()
"""
ALL = sorted([("loss", step) for step in range(300)] + [("poison", 150)])


@pytest.fixture
def picky(tmp_path: Path) -> Path:
    """While it is there, the store is picky."""
    path = tmp_path / "picky"
    path.touch()
    return path


@pytest.fixture
def agent(folders: Folders, picky: Path) -> Iterator[AgentProcess]:
    process = AgentProcess(
        folders,
        "--deliver-interval-s",
        "0.02",
        command=(sys.executable, "-c", PICKY),
        variables={"PICKY": str(picky)},
    )
    yield process
    process.close()


@pytest.fixture
def run_id(agent: AgentProcess, folders: Folders) -> str:
    """A run of which one batch was rejected."""
    agent.start()
    with start_script(folders, TRAIN) as training:
        name = next_line(training)
        wait_until(lambda: (run := agent.run(name)) is not None and run.records_stored == 151)
        # What the run finds out of its machine comes at a moment of its own.
        wait_until(lambda: "trackagent.user" in agent.shown(name)["tags"])
        training.stdin.write("go on\n")
        training.stdin.flush()
        wait_until(lambda: listed(agent), "the poison is set aside")
        training.communicate("go on\n", timeout=DEADLINE_S)
    agent.wait_for_delivery()
    return name


def stored(agent: AgentProcess, run_id: str) -> list[tuple[str, int]]:
    return sorted((point.key, point.step) for point in agent.exported(run_id))


def letters(agent: AgentProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    return agent.run_cli("dead-letters", *arguments, check=False)


def listed(agent: AgentProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(letters(agent, "list", "--json").stdout)
    return found


def test_a_poisoned_batch_can_be_seen_judged_and_delivered_after_all(
    agent: AgentProcess, run_id: str, picky: Path
) -> None:
    # All else is there.
    assert stored(agent, run_id) == [("loss", step) for step in range(300)]
    (letter,) = listed(agent)
    assert (letter["run_id"], letter["reason"], letter["records"]) == (run_id, "it is poisoned", 1)
    assert letter["id"] in letters(agent, "list").stdout
    (sink,) = json.loads(agent.run_cli("status", "--json").stdout)["sinks"]
    assert (sink["rejected"], sink["dead_letters"]) == (1, 1)
    messages = [event["message"] for event in agent.shown(run_id)["events"]]
    assert messages == [
        "sink store rejects 1 records for good: it is poisoned; they are kept as dead letter "
        f"{letter['id']}"
    ]

    # It can be read.
    shown = letters(agent, "show", letter["id"][:14]).stdout
    assert "metrics  step 150  poison=1" in shown
    assert f"trackagent dead-letters retry {letter['id']}" in shown

    # The store still cannot take it.
    again = letters(agent, "retry", "--all")
    assert (again.returncode, again.stdout) == (1, "0 dead letters delivered\n")
    assert again.stderr == f"{letter['id']} is rejected again: it is poisoned\n"
    assert listed(agent)[0]["times"] == 2

    # Now it can.
    picky.unlink()
    done = letters(agent, "retry", letter["id"])
    assert (done.returncode, done.stdout) == (0, "1 dead letter delivered\n")
    assert (listed(agent), stored(agent, run_id)) == ([], ALL)
    assert letters(agent, "retry", "--all").stdout == "no dead letters\n"
    run = agent.run(run_id)
    assert run is not None
    assert (run.status, run.records_stored, run.records_logged) == ("finished", 301, 301)


def test_a_letter_marked_without_an_agent_is_delivered_by_the_next_once(
    agent: AgentProcess, run_id: str, picky: Path
) -> None:
    agent.kill()
    (letter,) = listed(agent)
    for _ in range(2):
        done = letters(agent, "retry", letter["id"])
        assert (done.returncode, done.stdout) == (
            0,
            "1 dead letter to be delivered again: no agent runs, `trackagent start` does it\n",
        )
    assert listed(agent)[0]["retry"] is True
    picky.unlink()
    agent.start()
    wait_until(lambda: not listed(agent))
    assert stored(agent, run_id) == ALL


def test_a_letter_can_be_thrown_away(agent: AgentProcess, run_id: str) -> None:
    asked = agent.run_cli("dead-letters", "discard", "--all", check=False)
    assert (asked.returncode, len(listed(agent))) == (130, 1)
    done = letters(agent, "discard", "--all", "--yes")
    assert done.stdout == "1 dead letter with 1 record thrown away\n"
    assert (listed(agent), len(stored(agent, run_id))) == ([], 300)
    assert agent.shown(run_id)["losses"] == {"dead letters thrown away": 1}
    lost = json.loads(agent.run_cli("status", "--json").stdout)["lost_records"]
    assert lost == {"dead letters thrown away": 1}


def test_a_damaged_store_is_not_replaced_beside_the_agent_that_writes_to_it(
    agent: AgentProcess, run_id: str, picky: Path
) -> None:
    store = agent.folders.state / STORE_NAME
    damage(store, "copy_of_params")
    refused = letters(agent, "discard", "--all", "--yes")
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert "damaged" in refused.stderr
    assert "restart the agent" in refused.stderr
    assert (len(listed(agent)), (store.parent / "quarantine").exists()) == (1, False)

    # What the agent writes now is in the store.
    picky.unlink()
    assert letters(agent, "retry", "--all").returncode == 0
    assert stored(agent, run_id) == ALL


def damage(store: Path, index: str) -> None:
    """Writes noise over an index that a running agent does not look at."""
    with contextlib.closing(sqlite3.connect(store)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        (page,) = connection.execute(query, (index,)).fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    with store.open("r+b") as file:
        file.seek((page - 1) * page_bytes)
        file.write(b"\xff" * 100)


def test_what_there_is_not_is_said(folders: Folders) -> None:
    agent = AgentProcess(folders)
    assert letters(agent, "list").stdout == "no dead letters\n"
    missing = letters(agent, "show", "4f2a")
    assert (missing.returncode, missing.stderr) == (
        3,
        "trackagent: no dead letter '4f2a': see `trackagent dead-letters list`\n",
    )
    neither = letters(agent, "retry")
    assert (neither.returncode, "give ids of dead letters, or --all" in neither.stderr) == (2, True)
