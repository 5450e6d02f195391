"""Hosts do what scenarios.py needs of them, and two of them deliver to one store, also over a bad cable."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.chaos.oracle import check, read_store
from tests.chaos.producer import BURST
from tests.chaos.records import ENDED, Producer, read_notes
from tests.fakes import DEADLINE_S, wait_until
from tests.multihost.cluster import ROOT, Cluster
from tests.multihost.network import NAMESPACES, Host, Network, why_not
from tests.multihost.scenarios import FLAGS
from trackagent.agent.config import STORE_NAME

TOKEN = "0123456789abcdef" * 4
# Whether a host answers at all: at this port it refuses.
ASK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), 1).close()
except ConnectionRefusedError:
    sys.exit(0)
except OSError:
    sys.exit(1)
"""


@pytest.fixture(scope="module", autouse=True)
def hosts_are_permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    known = (f"--token-file={token}", *FLAGS)
    hub, others = ("--listen=:7717", *known), ("--store=a:7717", *known)
    with Cluster(["a", "b"], hub=hub, others=others) as made:
        yield made


def test_what_ranks_of_two_hosts_log_is_at_the_hub_once(cluster: Cluster) -> None:
    run_id = uuid4().hex
    notes = {Producer(run_id, rank, 0, rank): cluster.base / f"notes-{rank}" for rank in (0, 1)}
    stop = cluster.base / "stop"
    cluster.network.disturb(cluster.nodes[1].host, delay_s=0.01, jitter_s=0.01, loss=0.02)
    ranks = [
        cluster.network.run(
            node.host,
            [
                sys.executable,
                "-m",
                "tests.chaos.producer",
                *map(str, (run_id, producer.rank, 0, producer.seed, path, stop, 200)),
            ],
            node.folders.environment
            | {
                "CHAOS_SWITCHES": str(cluster.base),
                "PYTHONPATH": str(ROOT),
                "RANK": str(producer.rank),
                "WORLD_SIZE": "2",
            },
            node.output,
        )
        for node, (producer, path) in zip(cluster.nodes, notes.items(), strict=True)
    ]
    try:
        wait_until(
            lambda: all(len(read_notes(*one).returned) > 5 * BURST for one in notes.items()),
            "both log",
        )
        stop.touch()
        for rank, node in zip(ranks, cluster.nodes, strict=True):
            assert rank.wait(DEADLINE_S) == 0, node.output.read_text()
    finally:
        for rank in ranks:
            rank.kill()
    cluster.hub.agent.wait_for_status(run_id, "finished")
    assert cluster.left_behind(cluster.nodes) == []
    noted = [read_notes(producer, path, ENDED) for producer, path in notes.items()]
    assert check(noted, read_store(cluster.hub.folders.state / STORE_NAME, [run_id])) == []


def test_hosts_have_names_of_their_own_and_leave_nothing() -> None:
    with Network(["a", "b"]) as network:
        names = [_said(host, ["uname", "-n"]) for host in network.hosts]
        namespaces = {host.namespace for host in network.hosts}
        assert namespaces <= set(os.listdir(NAMESPACES))
    assert names == ["a", "b"]
    assert not namespaces & set(os.listdir(NAMESPACES))


def test_a_host_that_is_cut_off_hears_nothing_until_it_rejoins() -> None:
    with Network(["a", "b"]) as network:
        one, other = network.hosts

        def is_heard() -> bool:
            ask = [sys.executable, "-c", ASK, other.address]
            return subprocess.run(one.command(ask), check=False).returncode == 0

        assert is_heard()
        network.partition(other)
        assert not is_heard()
        network.rejoin(other)
        wait_until(is_heard, "it is heard again")


def _said(host: Host, arguments: list[str]) -> str:
    done = subprocess.run(host.command(arguments), capture_output=True, text=True, check=True)
    return done.stdout.strip()
