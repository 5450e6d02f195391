"""Agents that forward to agents: a tree of them is as good as one hop, and a store as good as a spool."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.hubs import token_file
from tests.fakes import (
    DEADLINE_S,
    AgentProcess,
    Folders,
    next_line,
    run_script,
    short_folder,
    start_script,
    wait_until,
)

pytestmark = pytest.mark.slow

RUN_ID = "4" * 32
QUICK = ("--deliver-interval-s", "0.02", "--forward-interval-s", "0.02")
TRAIN = """
import sys
from trackagent import client
run = client.init("trees", run_id=sys.argv[1], params={"lr": 1})
step = 0
for line in sys.stdin:
    for step in range(step, step + int(line)):
        run.log({"loss": step, "lr": 0.5}, step=step)
    step += 1
    print("logged", flush=True)
run.finish()
"""
ALL_ONCE = """
import sys
from trackagent import client
run = client.init("trees", run_id=sys.argv[1], params={"lr": 1})
for step in range(500):
    run.log({"loss": step, "lr": 0.5}, step=step)
run.event("half way", step=250)
assert run.finish()
"""

Start = Callable[..., AgentProcess]


@pytest.fixture
def token(tmp_path: Path) -> str:
    return str(token_file(tmp_path))


@pytest.fixture
def start_node() -> Iterator[Start]:
    """start_node(*flags): an agent in folders of its own, running."""
    made: list[AgentProcess] = []

    def start(*flags: str) -> AgentProcess:
        made.append(AgentProcess(Folders.under(short_folder()), *QUICK, *flags))
        return made[-1].start()

    yield start
    for node in made:
        node.close()
        shutil.rmtree(node.folders.directory.parent)


def address(hub: AgentProcess) -> str:
    return str(json.loads(hub.run_cli("status", "--json").stdout)["listen"])


def steps(agent: AgentProcess) -> list[int]:
    if agent.run(RUN_ID) is None:
        return []
    return sorted(point.step for point in agent.exported(RUN_ID) if point.key == "loss")


def lost(agent: AgentProcess) -> int:
    run = agent.run(RUN_ID)
    assert run is not None
    return run.lost_records


def waiting(agent: AgentProcess) -> int:
    """Batches in its spool."""
    return int(json.loads(agent.run_cli("status", "--json").stdout)["spool"]["batches"])


def log(rank: subprocess.Popen[str], count: int) -> None:
    assert rank.stdin is not None
    rank.stdin.write(f"{count}\n")
    rank.stdin.flush()
    assert next_line(rank) == "logged"


def end(rank: subprocess.Popen[str]) -> None:
    output, errors = rank.communicate(timeout=DEADLINE_S)
    assert rank.returncode == 0, output + errors


def test_what_a_node_logs_passes_a_rack_that_is_killed(start_node: Start, token: str) -> None:
    hub = start_node("--listen", "127.0.0.1:0", "--token-file", token)
    rack = start_node("--listen", "127.0.0.1:0", "--store", address(hub), "--token-file", token)
    port = address(rack)
    rack.flags = (
        *rack.flags[:-6],
        "--listen",
        port,
        "--store",
        address(hub),
        "--token-file",
        token,
    )
    node = start_node("--store", port, "--token-file", token)
    rank = start_script(node.folders, TRAIN, RUN_ID)
    for _ in range(4):
        log(rank, 50)
        rack.kill()
        log(rank, 50)
        rack.start()
    end(rank)
    hub.wait_for_status(RUN_ID, "finished")
    assert steps(hub) == list(range(400))
    assert rack.runs() == []


def test_a_node_may_take_another_way_while_the_old_one_is_behind(
    start_node: Start, token: str
) -> None:
    hub = start_node("--listen", "127.0.0.1:0", "--token-file", token)
    rack = start_node("--listen", "127.0.0.1:0", "--store", address(hub), "--token-file", token)
    node = start_node("--store", address(rack), "--token-file", token)
    at = address(hub)
    hub.flags = ("--listen", at, "--token-file", token, *QUICK)
    rank = start_script(node.folders, TRAIN, RUN_ID)
    log(rank, 10)
    wait_until(lambda: len(steps(hub)) == 10)
    hub.kill()
    log(rank, 40)
    wait_until(lambda: waiting(node) == 0 and waiting(rack) > 0)  # which cannot deliver it
    node.stop()
    rack.kill()  # and is back when the hub has heard of the node by its new way
    node.flags = ("--store", at, "--token-file", token, *QUICK)
    hub.start()
    node.start()
    log(rank, 50)
    wait_until(lambda: len(steps(hub)) == 60)
    rack.start()
    end(rank)
    hub.wait_for_status(RUN_ID, "finished")
    wait_until(lambda: len(steps(hub)) >= 100)
    assert steps(hub) == list(range(100))
    assert lost(hub) == 0


def test_what_is_stored_here_is_not_missing_at_a_hub_that_comes_later(
    start_node: Start, token: str
) -> None:
    hub = start_node("--listen", "127.0.0.1:0", "--token-file", token)
    node = start_node()
    rank = start_script(node.folders, TRAIN, RUN_ID)
    log(rank, 10)
    wait_until(lambda: len(steps(node)) == 10)
    node.stop()
    node.flags = (*QUICK, "--store", address(hub), "--token-file", token)
    node.start()
    log(rank, 10)
    wait_until(lambda: len(steps(hub)) == 10)
    node.stop()
    node.flags = QUICK
    node.start()
    log(rank, 10)
    end(rank)
    wait_until(lambda: len(steps(node)) == 20)
    assert (steps(node), steps(hub)) == ([*range(10), *range(20, 30)], [*range(10, 20)])
    assert (lost(node), lost(hub)) == (0, 0)


def test_a_hub_with_a_new_spool_and_its_old_store_takes_nothing_twice(
    start_node: Start, token: str
) -> None:
    hub = start_node("--listen", "127.0.0.1:0", "--token-file", token)
    at = address(hub)
    hub.flags = ("--listen", at, "--token-file", token, *QUICK)
    node = start_node("--store", at, "--token-file", token)
    rank = start_script(node.folders, TRAIN, RUN_ID)
    for part in range(3):
        log(rank, 50)
        wait_until(lambda part=part: len(steps(hub)) == 50 * (part + 1))  # type: ignore[misc]
        hub.stop()
        for file in hub.folders.state.glob("spool.db*"):
            file.unlink()
        hub.start()
    end(rank)
    hub.wait_for_status(RUN_ID, "finished")
    assert steps(hub) == list(range(150))


def test_what_no_hub_was_named_for_is_forwarded_later(start_node: Start, token: str) -> None:
    hub = start_node("--listen", "127.0.0.1:0", "--token-file", token)
    node = start_node()
    run_script(node.folders, ALL_ONCE, RUN_ID)
    node.wait_for_status(RUN_ID, "finished")
    forward = ("forward", "--to", address(hub), "--token-file", token, "--json")
    (sent,) = json.loads(node.run_cli(*forward).stdout)
    assert (sent["run_id"], sent["points"]) == (RUN_ID, 1000)
    (again,) = json.loads(node.run_cli(*forward).stdout)
    assert again["points"] == 0
    hub.wait_for_status(RUN_ID, "finished")
    wait_until(lambda: len(steps(hub)) >= 500)
    assert sorted(hub.exported(RUN_ID)) == sorted(node.exported(RUN_ID))
    for told in ("params", "events"):
        mine, theirs = node.shown(RUN_ID)[told], hub.shown(RUN_ID)[told]
        with contextlib.suppress(TypeError):
            mine, theirs = ([{**one, "id": 0} for one in each] for each in (mine, theirs))
        assert mine == theirs


def test_forward_needs_to_be_told_who_the_hub_is(start_node: Start) -> None:
    node = start_node()
    run_script(node.folders, ALL_ONCE, RUN_ID)
    done = node.run_cli("forward", "--to", "127.0.0.1:1", check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "trackagent: --to 127.0.0.1:1 alone does not tell that hub from another, and this node from a "
        "stranger: add --token-file FILE, or --tls-ca, --tls-cert and --tls-key\n",
    )


def test_forward_says_of_what_is_no_address_that_to_is_wrong(start_node: Start) -> None:
    done = start_node().run_cli("forward", "--to", "hub:one", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("trackagent: --to is 'hub:one': give ")
