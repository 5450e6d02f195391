"""Agents that deliver to a hub by the cluster's CA: a certificate that is not good is told on both sides,
what was logged waits in the spool, and arrives once the certificate is good."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.agent.certificates import DAY, Authority, Issued, now
from tests.fakes import AgentProcess, Folders, run_script, short_folder, wait_until

QUICK = ("--deliver-interval-s", "0.02", "--forward-interval-s", "0.02")
TRAIN = """
import sys
from trackagent import client
run = client.init("certificates", run_id=sys.argv[1])
for step in range(20):
    run.log({"loss": step}, step=step)
assert run.finish()
"""

Make = Callable[..., AgentProcess]


@pytest.fixture
def make_node() -> Iterator[Make]:
    """make_node(*flags): an agent in folders of its own, not yet started."""
    made: list[AgentProcess] = []

    def make(*flags: str) -> AgentProcess:
        made.append(AgentProcess(Folders.under(short_folder()), *QUICK, *flags))
        return made[-1]

    yield make
    for node in made:
        node.close()
        shutil.rmtree(node.folders.directory.parent)


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    """The cluster's."""
    return Authority(tmp_path / "ca")


def shows(ca: Authority, issued: Issued) -> tuple[str, ...]:
    """The flags of an agent with this certificate, which believes those of the CA."""
    files = {"--tls-ca": ca.path, "--tls-cert": issued.certificate, "--tls-key": issued.key}
    return tuple(word for flag, path in files.items() for word in (flag, str(path)))


def status(node: AgentProcess) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(node.run_cli("status", "--json").stdout)
    return found


def port(hub: AgentProcess) -> str:
    return str(status(hub)["listen"]).rpartition(":")[2]


def begin_again(hub: AgentProcess, *flags: str) -> None:
    """The hub, at the same port."""
    at = port(hub)
    hub.stop()
    hub.flags = (*QUICK, "--listen", f"127.0.0.1:{at}", *flags)
    hub.start()


def trained(node: AgentProcess) -> str:
    run_id = uuid4().hex
    run_script(node.folders, TRAIN, run_id)
    return run_id


def is_told(node: AgentProcess, said: str) -> None:
    """The node's status and log say this, and what was logged waits in its spool."""
    wait_until(lambda: said in status(node)["sinks"][0]["error"], f"{said}: {node.output}")
    wait_until(lambda: f"sink upstream: {said}" in node.output, f"{said}: {node.output}")
    assert status(node)["spool"]["batches"] > 0


def gives_all(node: AgentProcess, hub: AgentProcess, run_id: str) -> None:
    """As it would by itself some seconds later."""
    assert node.stop() == 0
    hub.wait_for_status(run_id, "finished")
    assert sorted(point.step for point in hub.exported(run_id)) == list(range(20))


def test_a_hub_gets_nothing_until_its_certificate_is_of_the_clusters_ca(
    make_node: Make, ca: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path / "other", "another cluster")
    hub = make_node("--listen", "127.0.0.1:0", *shows(other, other.issue("hub", "localhost")))
    at = f"localhost:{port(hub.start())}"
    node = make_node("--store", at, *shows(ca, ca.issue("node"))).start()
    run_id = trained(node)
    is_told(node, f"the certificate at {at} is not the hub's: ")
    refused = "refused 127.0.0.1: it does not accept this hub's certificate (unknown ca)"
    wait_until(lambda: refused in hub.output, hub.output)
    assert hub.runs() == []
    begin_again(hub, *shows(ca, ca.issue("hub", "localhost")))
    gives_all(node, hub, run_id)


def begun_and_expired(make_node: Make, ca: Authority) -> AgentProcess:
    """A hub whose certificate was good when it began, and has expired since."""
    for lifetime_s in (5, 20, 50):  # where much else runs, a longer one
        end = now() + timedelta(seconds=lifetime_s)
        flags = shows(ca, ca.issue("hub", "localhost", end=end))
        hub = make_node("--listen", "127.0.0.1:0", *flags)
        with contextlib.suppress(AssertionError):
            hub.start()
            wait_until(lambda end=end: now() > end)  # type: ignore[misc]
            return hub
        assert "expired" in hub.output
    raise AssertionError("no hub began within the time of its certificate")


def test_a_hub_whose_certificate_has_expired_gets_everything_once_it_is_renewed(
    make_node: Make, ca: Authority
) -> None:
    hub = begun_and_expired(make_node, ca)
    at = f"localhost:{port(hub)}"
    node = make_node("--store", at, *shows(ca, ca.issue("node"))).start()
    run_id = trained(node)
    is_told(node, f"the certificate of the hub at {at} has expired")
    refused = "refused 127.0.0.1: it does not accept this hub's certificate (certificate expired)"
    wait_until(lambda: refused in hub.output, hub.output)
    assert hub.runs() == []
    begin_again(hub, *shows(ca, ca.issue("hub", "localhost")))
    gives_all(node, hub, run_id)


def test_an_agent_whose_certificate_has_expired_delivers_once_it_is_renewed(
    make_node: Make, ca: Authority
) -> None:
    hub = make_node("--listen", "127.0.0.1:0", *shows(ca, ca.issue("hub", "localhost"))).start()
    mine = ca.issue("node", end=now() - DAY / 2)
    node = make_node("--store", f"localhost:{port(hub)}", *shows(ca, mine)).start()
    run_id = trained(node)
    is_told(node, f"the certificate in {mine.certificate} expired on ")
    assert hub.runs() == []
    ca.issue("node")  # in the same files: nobody restarts the agent
    gives_all(node, hub, run_id)
