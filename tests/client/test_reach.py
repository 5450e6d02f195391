"""By which name or address other nodes reach this one."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import pytest

from trackagent.client.reach import joined, reachable_host

# What these names lead to; every other leads nowhere.
ADDRESSES = {
    "10.0.0.5": ["10.0.0.5"],
    "10.0.0.9": ["10.0.0.9"],
    "127.0.0.1": ["127.0.0.1"],
    "fd00::5": ["fd00::5"],
    "node-0": ["10.0.0.5"],
    "node-9": ["10.0.0.9"],
    "localhost": ["::1", "127.0.0.1"],
    "debian": ["127.0.1.1"],
    "half": ["127.0.1.1", "10.0.0.5"],
    "elsewhere": ["fe80::1"],
}
OURS = {"10.0.0.5", "fd00::5", "127.0.0.1", "127.0.1.1", "::1", "192.168.1.5", "172.16.0.5"}


def reached(
    master: str, routes: Mapping[str, str], hostname: str = "debian", **environ: str
) -> str:
    """How others reach this node, which has the addresses OURS, and these routes to others."""
    return reachable_host(
        {"MASTER_ADDR": master, **environ},
        resolve=lambda name: ADDRESSES.get(name, []),
        is_ours=OURS.__contains__,
        source=lambda target: routes.get(target, ""),
        hostname=lambda: hostname,
    )


DEFAULT = {"192.0.2.1": "192.168.1.5"}


@pytest.mark.parametrize(
    ("master", "routes", "expected"),
    [
        pytest.param("node-0", DEFAULT, "node-0", id="a name of this node"),
        pytest.param("10.0.0.5", DEFAULT, "10.0.0.5", id="an address of this node"),
        pytest.param("fd00::5", DEFAULT, "fd00::5", id="of IPv6"),
        pytest.param("localhost", DEFAULT, "192.168.1.5", id="loopback"),
        pytest.param("127.0.0.1", DEFAULT, "192.168.1.5", id="a loopback address"),
        pytest.param("debian", DEFAULT, "192.168.1.5", id="a name that leads to loopback"),
        pytest.param("half", DEFAULT, "192.168.1.5", id="a name that may lead to loopback"),
        pytest.param("unknown", DEFAULT, "192.168.1.5", id="a name that leads nowhere"),
        pytest.param("", DEFAULT, "192.168.1.5", id="none"),
        pytest.param(
            "node-9", DEFAULT | {"10.0.0.9": "172.16.0.5"}, "172.16.0.5", id="another node's"
        ),
        pytest.param("node-9", DEFAULT, "192.168.1.5", id="another node's, no route to it"),
        pytest.param("", {"2001:db8::1": "fd00::5"}, "fd00::5", id="IPv6 only"),
        pytest.param("", {"192.0.2.1": "127.0.0.1"}, "debian", id="a route by loopback"),
        pytest.param("elsewhere", {"fe80::1": "10.0.0.5"}, "debian", id="link-local"),
    ],
)
def test_others_reach_this_node_by(master: str, routes: Mapping[str, str], expected: str) -> None:
    assert reached(master, routes) == expected


def test_without_any_route_it_is_what_the_nodes_name_leads_to() -> None:
    assert reached("", {}, hostname="node-0") == "10.0.0.5"


def test_this_machine_has_a_name_or_an_address() -> None:
    host = reachable_host({})
    assert host == socket.gethostname() or not host.startswith("127.")


def test_an_ipv6_address_stands_in_brackets() -> None:
    assert [joined(host, "1") for host in ("a", "10.0.0.1", "::1")] == [
        "a:1",
        "10.0.0.1:1",
        "[::1]:1",
    ]
