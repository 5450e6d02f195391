"""Two agents, as on two nodes: what one takes the other stores, only for those who may, and the secrets stay
where they are."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from tests.agent.certificates import Authority
from tests.agent.hubs import CLUSTER_TOKEN, RUN_TOKEN, token_file
from tests.agent.samples import RUN_ID, losses, producer
from tests.agent.served import push
from tests.fakes import DEADLINE_S, AgentProcess, Folders, run_script, short_folder, wait_until
from trackagent.agent.producers import to_message
from trackagent.agent.server import PROTOCOL_VERSION
from trackagent.protos.v1 import agent_pb2, agent_pb2_grpc

TRAIN = """
import sys
from trackagent import client
run = client.init("gpt", run_id=sys.argv[1])
for step in range(20):
    run.log({"loss": step}, step=step)
assert run.finish()
"""
QUICK = ("--deliver-interval-s", "0.02", "--forward-interval-s", "0.02")
OTHER_TOKEN = "fedcba9876543210" * 4

StartNode = Callable[..., AgentProcess]


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of the cluster's token."""
    return str(token_file(tmp_path_factory.mktemp("cluster")))


@contextlib.contextmanager
def nodes() -> Iterator[StartNode]:
    made: list[AgentProcess] = []

    def start(*flags: str) -> AgentProcess:
        made.append(AgentProcess(Folders.under(short_folder()), *QUICK, *flags))
        return made[-1].start()

    try:
        yield start
    finally:
        for node in made:
            node.close()
            shutil.rmtree(node.folders.directory.parent)


@pytest.fixture(scope="module")
def hub(token: str) -> Iterator[AgentProcess]:
    """The hub of a cluster with a token."""
    with nodes() as start:
        yield start("--listen", "127.0.0.1:0", "--token-file", token)


@pytest.fixture(scope="module")
def node(hub: AgentProcess, token: str) -> Iterator[AgentProcess]:
    """Another node of that cluster."""
    with nodes() as start:
        yield start("--store", address(hub), "--token-file", token)


@pytest.fixture
def start_node() -> Iterator[StartNode]:
    """start_node(*flags): an agent in folders of its own, running."""
    with nodes() as start:
        yield start


def status(node: AgentProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.run_cli("status", "--json").stdout)
    return found


def address(hub: AgentProcess) -> str:
    """Where it listens, with the port that was free."""
    return str(status(hub)["listen"])


def listening(node: AgentProcess) -> list[str]:
    """The TCP addresses at which the process listens, as /proc/net/tcp writes them."""
    assert node.process is not None
    proc = Path(f"/proc/{node.process.pid}")
    inodes = set()
    for one in (proc / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has closed it
            inodes.add(os.readlink(one).removeprefix("socket:[")[:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in (proc / "net" / table).read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A" and line.split()[9] in inodes:
                found.append(local)
    return found


def train(node: AgentProcess) -> str:
    run_id = uuid4().hex
    run_script(node.folders, TRAIN, run_id)
    return run_id


def is_stored(hub: AgentProcess, run_id: str) -> bool:
    hub.wait_for_status(run_id, "finished")
    return sorted(point.step for point in hub.exported(run_id)) == list(range(20))


def shown_error(node: AgentProcess) -> str:
    """What status says of the sink that cannot deliver."""

    def found() -> str:
        return next((str(one["error"]) for one in status(node)["sinks"] if one["error"]), "")

    return wait_until(found, f"an error of a sink; the agent said:\n{node.output}")


def everything(node: AgentProcess) -> bytes:
    """All that lies in the folders of an agent, its log and its command line."""
    assert node.process is not None
    base = node.folders.directory.parent
    kept = [path.read_bytes() for path in base.rglob("*") if path.is_file()]
    return b"\n".join([*kept, Path(f"/proc/{node.process.pid}/cmdline").read_bytes()])


# --- what listens


def test_nothing_listens_beyond_the_node_unless_asked(agent: AgentProcess) -> None:
    assert listening(agent) == []
    assert status(agent)["listen"] == ""
    assert not (agent.folders.directory / "hub.json").exists()


def test_one_port_listens_where_asked(hub: AgentProcess) -> None:
    port = int(address(hub).rpartition(":")[2])
    assert listening(hub) == [f"0100007F:{port:04X}"]
    said = json.loads((hub.folders.directory / "hub.json").read_text())
    assert said == {
        "version": 1,
        "address": f"127.0.0.1:{port}",
        "pin": status(hub)["pin"],
        "cluster": True,
    }
    assert f"other nodes may deliver at 127.0.0.1:{port}" in hub.run_cli("status").stdout


def test_what_a_killed_hub_has_said_is_forgotten(own_agent: Callable[..., AgentProcess]) -> None:
    killed = own_agent("--listen", "127.0.0.1:0").start()
    said = killed.folders.directory / "hub.json"
    assert said.exists()
    killed.kill()
    killed.flags = ()
    killed.start()
    assert not said.exists()


def test_a_port_that_is_taken_is_told(own_agent: Callable[..., AgentProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        wanted = f"127.0.0.1:{taken.getsockname()[1]}"
        other = own_agent("--listen", wanted)
        assert other.launch().wait(DEADLINE_S) == 1
    assert f"cannot listen at {wanted}: Address already in use" in other.output


# --- by the cluster's token


def test_a_run_is_stored_at_the_hub_that_has_the_token(
    hub: AgentProcess, node: AgentProcess
) -> None:
    assert is_stored(hub, train(node))
    assert node.runs() == []
    for agent in (hub, node):
        assert CLUSTER_TOKEN.encode() not in everything(agent)


def test_another_token_is_told_on_both_sides_and_nothing_is_lost(
    hub: AgentProcess, start_node: StartNode, token: str, tmp_path: Path
) -> None:
    other = str(token_file(tmp_path, OTHER_TOKEN))
    stranger = start_node("--store", address(hub), "--token-file", other)
    run_id = train(stranger)
    said = shown_error(stranger)
    assert f"{address(hub)} is not the hub that was named" in said
    assert "the tokens of both sides differ" in said
    wait_until(lambda: "refused 127.0.0.1: it left without a word" in hub.output, hub.output)
    for secret in (CLUSTER_TOKEN, OTHER_TOKEN):
        assert secret.encode() not in everything(hub) + everything(stranger)
    stranger.stop()
    stranger.flags = (*QUICK, "--store", address(hub), "--token-file", token)
    stranger.start()
    assert is_stored(hub, run_id)


@pytest.mark.parametrize("flags", [("--listen", "127.0.0.1:0"), ("--store", "127.0.0.1:1")])
def test_an_agent_does_not_start_with_a_token_that_others_may_read(
    own_agent: Callable[..., AgentProcess], tmp_path: Path, flags: tuple[str, str]
) -> None:
    path = token_file(tmp_path)
    path.chmod(0o644)
    agent = own_agent(*flags, "--token-file", str(path))
    assert agent.launch().wait(DEADLINE_S) == 1
    assert (
        f"cannot use the cluster's token in {path}: others than its user may read" in agent.output
    )


# --- by the cluster's CA


def test_a_run_is_stored_at_the_hub_of_the_ca(start_node: StartNode, tmp_path: Path) -> None:
    ca = Authority(tmp_path / "ca")
    own, mine = ca.issue("hub", "localhost"), ca.issue("node")
    hub = start_node(
        *("--listen", "127.0.0.1:0", "--tls-ca", str(ca.path)),
        *("--tls-cert", str(own.certificate), "--tls-key", str(own.key)),
    )
    node = start_node(
        *("--store", f"localhost:{address(hub).rpartition(':')[2]}", "--tls-ca", str(ca.path)),
        *("--tls-cert", str(mine.certificate), "--tls-key", str(mine.key)),
    )
    assert is_stored(hub, train(node))


# --- by a run's token


def opened(node: AgentProcess, rank: int, hub: dict[str, str], token: str) -> None:
    """What a rank does whose rank 0 has named this hub: opens a producer, logs four losses, and ends."""
    info = producer(rank)
    with grpc.insecure_channel(node.address) as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        stub.OpenRun(
            agent_pb2.OpenRunRequest(
                protocol_version=PROTOCOL_VERSION,
                producer=to_message(info),
                hub=agent_pb2.HubAddress(address=hub["address"], pin=hub["pin"], token=token),
            ),
            timeout=DEADLINE_S,
        )
        requests = iter([push(losses(range(4)), rank=rank)])
        list(stub.Push(requests, timeout=DEADLINE_S))


def steps(hub: AgentProcess, source: str) -> list[int]:
    if hub.run(RUN_ID) is None:
        return []
    return sorted({point.step for point in hub.exported(RUN_ID) if point.source == source})


def test_who_knows_a_runs_token_may_deliver_it(hub: AgentProcess, start_node: StartNode) -> None:
    node = start_node()
    said = json.loads((hub.folders.directory / "hub.json").read_text())
    # The node's rank is the first to come: rank 0 has not named its token to the hub yet.
    opened(node, 1, said, RUN_TOKEN)
    wait_until(lambda: "does not know this token of the run" in shown_error(node))
    wait_until(lambda: "refused 127.0.0.1: no right to deliver here" in hub.output, hub.output)
    opened(hub, 0, said, RUN_TOKEN)
    for source in ("rank 0", "rank 1"):
        wait_until(lambda source=source: steps(hub, source) == [0, 1, 2, 3], hub.output)
    assert node.runs() == []
    assert RUN_TOKEN.encode() not in everything(hub)
    assert RUN_TOKEN not in node.output


# --- where ranks meet


def meet(node: AgentProcess, **fields: Any) -> tuple[bool, bytes]:
    with grpc.insecure_channel(node.address) as channel:
        request = agent_pb2.MeetRequest(job="job", key="key", **fields)
        answer = agent_pb2_grpc.AgentStub(channel).Meet(request, timeout=DEADLINE_S)
        return answer.found, answer.value


def test_ranks_of_two_nodes_meet_at_their_hub(hub: AgentProcess, node: AgentProcess) -> None:
    assert meet(node) == (False, b"")
    meet(hub, operation=agent_pb2.MeetRequest.SET, value=b"word")
    assert meet(node) == (True, b"word")


def test_ranks_whose_hub_does_not_answer_are_told(start_node: StartNode, token: str) -> None:
    node = start_node("--store", "127.0.0.1:1", "--token-file", token)
    with pytest.raises(grpc.RpcError) as found:
        meet(node)
    assert (found.value.code(), found.value.details()) == (
        grpc.StatusCode.UNAVAILABLE,
        "cannot reach the hub at 127.0.0.1:1: nobody listens there; is its agent running with --listen?",
    )
