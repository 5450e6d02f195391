"""Which hub rank 0 names: what its agent says in hub.json, and what the user is told where there is none."""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.client.runs import warnings
from tests.fakes import FakeAgent, Folders, in_a_forked_process, read_segments, wait_until
from trackagent import client
from trackagent.client.config import ClientConfig, socket_address
from trackagent.client.hub import Hub
from trackagent.client.naming import AGENT_GRACE_S, NodeHubs
from trackagent.client.ranks import Ranks
from trackagent.client.run import Run

PIN = "0a" * 32
TWO_NODES = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node-0"}
ONE_NODE = {"LOCAL_WORLD_SIZE": "4"}
FOUR_RANKS = Ranks(rank=0, local_rank=0, world_size=4)
OFFER = {"version": 1, "address": "node-7:7717", "pin": PIN}


class Node:
    """A node: what lies in its folders, and time that passes only while somebody waits."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.now = 0.0
        self.listener: socket.socket | None = None
        self.agent_comes_at = 0.0

    @property
    def hub_file(self) -> Path:
        return self.folders.directory / "hub.json"

    def says(self, said: Any) -> None:
        self.folders.directory.mkdir(exist_ok=True, mode=0o700)
        self.hub_file.write_text(said if isinstance(said, str) else json.dumps(said))
        self.hub_file.chmod(0o600)

    def listen(self) -> None:
        """As an agent does."""
        self.folders.directory.mkdir(exist_ok=True, mode=0o700)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.folders.socket))
        self.listener.listen()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.agent_comes_at and self.now >= self.agent_comes_at and self.listener is None:
            self.listen()

    def hubs(self, **environ: str) -> NodeHubs:
        directory, state = self.folders
        config = ClientConfig(
            directory=directory, state_directory=state, agent=socket_address(directory)
        )
        return NodeHubs(
            config,
            environ=environ,
            host=lambda environ: f"reached-by-{environ.get('MASTER_ADDR')}",
            sleep=self.sleep,
            clock=self.clock,
        )

    def named(self, **environ: str) -> tuple[str | None, str]:
        """The address of the hub that rank 0 of 4 names, and what the user is told."""
        hub, problem = self.hubs(**environ).name(FOUR_RANKS)
        return hub and hub.address, problem


@pytest.fixture
def node(folders: Folders) -> Iterator[Node]:
    node = Node(folders)
    yield node
    if node.listener is not None:
        node.listener.close()


@pytest.mark.parametrize("environ", [TWO_NODES, {}], ids=["two nodes", "nobody knows"])
def test_rank_0_names_its_agent(node: Node, environ: dict[str, str]) -> None:
    node.listen()
    node.says(OFFER)
    assert node.named(**environ) == ("node-7:7717", "")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "[::]"])
def test_an_agent_that_listens_everywhere_is_named_by_how_others_reach_it(
    node: Node, host: str
) -> None:
    node.listen()
    node.says(OFFER | {"address": f"{host}:4000"})
    assert node.named(**TWO_NODES) == ("reached-by-node-0:4000", "")


def test_every_naming_has_a_token_of_its_own(node: Node) -> None:
    node.listen()
    node.says(OFFER)
    hubs = [node.hubs(**TWO_NODES).name(FOUR_RANKS)[0] for _ in range(2)]
    assert len({hub.token for hub in hubs if hub}) == 2


@pytest.mark.parametrize(
    ("ranks", "environ"),
    [(FOUR_RANKS, ONE_NODE), (Ranks(rank=0, local_rank=0, world_size=1), {})],
    ids=["all ranks here", "one process"],
)
def test_a_run_of_one_node_needs_no_hub(node: Node, ranks: Ranks, environ: dict[str, str]) -> None:
    assert node.hubs(**environ).name(ranks) == (None, "")


def test_an_agent_that_takes_nothing_from_others_is_told_with_the_flag(node: Node) -> None:
    node.listen()
    assert node.named(**TWO_NODES) == (
        None,
        "the run spans nodes and rank 0's agent takes nothing from the others: start it with "
        "`trackagent start --listen ADDR`; until then each node's records stay with that node's agent, and "
        "`trackagent forward --to` delivers them later",
    )


def test_nothing_is_told_where_nobody_knows_whether_the_run_spans_nodes(node: Node) -> None:
    assert node.named() == (None, "")
    node.listen()
    assert (node.named(), node.now) == ((None, ""), 0.0)


def test_where_everything_goes_to_one_store_there_is_nothing_to_name(node: Node) -> None:
    node.listen()
    node.says({"version": 1, "store": True})
    assert node.named(**TWO_NODES) == (None, "")
    assert node.hubs(**TWO_NODES).unheard(FOUR_RANKS) == ""


def test_rank_0_waits_a_little_for_an_agent_that_was_started_with_it(node: Node) -> None:
    node.says(OFFER)
    node.agent_comes_at = AGENT_GRACE_S - 1
    assert node.named(**TWO_NODES) == ("node-7:7717", "")


@pytest.mark.parametrize("stale", [True, False])
def test_what_an_agent_left_that_does_not_answer_is_not_heeded(node: Node, stale: bool) -> None:
    if stale:
        node.says(OFFER)
        node.listen()
        assert node.listener is not None
        node.listener.close()
    hub, problem = node.named(**TWO_NODES)
    assert hub is None
    assert "no agent answers at unix:/" in problem
    assert "before the ranks, with `trackagent start --listen ADDR`" in problem
    assert node.now == pytest.approx(AGENT_GRACE_S, abs=0.1)


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ("", "no JSON of an agent's"),
        ("[1]", "no JSON of an agent's"),
        ("[" * 3000, "no JSON of an agent's"),
        ({"version": 1}, "no JSON of an agent's"),
        ({"version": 2, "store": True}, "its version is 2, not 1"),
        (OFFER | {"address": "node-7"}, "address"),
        (OFFER | {"address": ":0"}, "address"),
        (OFFER | {"address": 7}, "address"),
        (OFFER | {"pin": "A" * 64}, "pin"),
        (OFFER | {"more": "x" * 5000}, "more than 4096 bytes"),
    ],
)
def test_what_is_not_understood_is_told_and_nothing_more(
    node: Node, said: Any, problem: str
) -> None:
    node.listen()
    node.says(said)
    hub, told = node.named(**TWO_NODES)
    assert hub is None
    assert told.startswith(f"the run has no hub: {node.hub_file} is not heeded (")
    assert problem in told


@pytest.mark.parametrize("what", ["link", "pipe", "open to all"])
def test_what_others_may_have_put_there_is_not_heeded(node: Node, what: str) -> None:
    node.listen()
    node.says(OFFER)
    if what == "open to all":
        node.hub_file.chmod(0o666)
    else:
        node.hub_file.rename(node.hub_file.with_name("other.json"))
        if what == "link":
            node.hub_file.symlink_to("other.json")
        else:
            os.mkfifo(node.hub_file)
    hub, told = node.named(**TWO_NODES)
    assert hub is None
    assert "is not heeded" in told


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_another_users_file_is_not_heeded(node: Node) -> None:
    node.listen()
    node.says(OFFER)
    os.chown(node.hub_file, 12345, 12345)
    assert "belongs to user 12345" in node.named(**TWO_NODES)[1]


@pytest.mark.parametrize("listens", [True, False])
def test_ranks_that_cannot_hear_of_a_hub_are_told_where_the_run_spans_nodes(
    node: Node, listens: bool
) -> None:
    if listens:
        node.listen()
        node.says(OFFER)
    assert "start every agent with `trackagent start --store" in node.hubs(**TWO_NODES).unheard(
        FOUR_RANKS
    )
    assert [node.hubs(**environ).unheard(FOUR_RANKS) for environ in (ONE_NODE, {})] == ["", ""]


@pytest.mark.parametrize(
    ("rank", "local_rank", "cluster", "told"),
    [(0, 0, True, False), (1, 1, True, False), (2, 0, True, True), (0, 0, False, True)],
    ids=["rank 0", "on its node", "on another node", "without the cluster's token"],
)
def test_ranks_beside_the_clusters_hub_are_not_told(
    node: Node, rank: int, local_rank: int, cluster: bool, told: bool
) -> None:
    node.listen()
    node.says(OFFER | {"cluster": cluster})
    ranks = Ranks(rank=rank, local_rank=local_rank, world_size=4)
    assert bool(node.hubs(**TWO_NODES).unheard(ranks)) is told


# --- a whole run


@pytest.fixture
def spanning(start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of two nodes, in a process group."""
    monkeypatch.setattr(
        "trackagent.client.identity.find_link", lambda environ: (Silent(), None, "")
    )
    for name, text in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, text)


class Silent:
    """A store that never opens."""

    name = "the store"
    standing = False

    def open(self) -> None:
        return None

    def alive(self) -> bool:
        return False

    def close(self) -> None:
        pass


@pytest.mark.usefixtures("spanning")
def test_a_runs_hub_stands_in_its_journal_and_goes_to_the_agent(
    start: Callable[..., Run], folders: Folders, node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    agent = FakeAgent(folders.socket)
    agent.start()
    node.says(OFFER)
    with caplog.at_level(logging.DEBUG):
        run = start()
        wait_until(lambda: agent.opened)
    told = agent.opened[0].hub
    hub = Hub(told.address, told.pin, told.token)
    assert (hub.address, hub.pin) == ("node-7:7717", PIN)
    [segment, *_] = read_segments(folders.journals()[0])
    assert segment.header.identity["hub"] == hub.text()
    client.finish()
    agent.stop()
    shown = f"{caplog.text} {os.environ} {run._who} {agent.opened[0].producer}"
    assert hub.pin in f"{run._who}"
    assert hub.token not in shown


@pytest.mark.usefixtures("spanning")
def test_a_process_that_a_rank_starts_and_gives_its_runs_id_has_its_hub(
    start: Callable[..., Run], folders: Folders, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = FakeAgent(folders.socket)
    agent.start()
    node.says(OFFER)
    run = start()
    wait_until(lambda: agent.opened)
    hub = run._who.hub
    assert hub is not None
    agent.stop()

    def of(run_id: str) -> Hub | None:
        return client.init("again", run_id=run_id)._who.hub

    assert in_a_forked_process(lambda: of(run.id)) == hub
    assert in_a_forked_process(lambda: of("f" * 32)) is None


@pytest.mark.usefixtures("spanning")
def test_a_run_that_spans_nodes_says_once_which_flag_is_missing(
    start: Callable[..., Run], folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    agent = FakeAgent(folders.socket)
    agent.start()
    start()
    client.finish()
    agent.stop()
    assert [line for line in warnings(caplog) if "--listen" in line] == warnings(caplog)
    assert len(warnings(caplog)) == 1
