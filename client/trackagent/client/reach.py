"""By which name or address other nodes reach this one; as good as can be told without asking them.

MASTER_ADDR where it is this node's: the ranks of other nodes use it already. Else the address from which
this node would speak to MASTER_ADDR, or to the world: two nodes may have the same name, and a name may lead
to the loopback interface. No packet is sent for that; a name may be asked of a name server.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping

# Kept for documentation (RFC 5737, RFC 3849): the route to them is the default route.
_THE_WORLD = ("192.0.2.1", "2001:db8::1")


def reachable_host(
    environ: Mapping[str, str],
    *,
    resolve: Callable[[str], list[str]] | None = None,
    is_ours: Callable[[str], bool] | None = None,
    source: Callable[[str], str] | None = None,
    hostname: Callable[[], str] = socket.gethostname,
) -> str:
    """resolve: the addresses of a name; is_ours: whether an address is this node's; source: this node's
    address for what it sends to another, "" without a route; seams for tests."""
    resolve, is_ours, source = resolve or _resolve, is_ours or _is_ours, source or _source
    master = environ.get("MASTER_ADDR", "")
    found = resolve(master) if master else []
    others_reach = all(map(_is_outward, found))
    if others_reach and any(map(is_ours, found)):
        return master
    for target in (*filter(_is_outward, found), *_THE_WORLD):
        if _is_outward(address := source(target)):
            return address
    # No route at all: the name, if it leads anywhere from here.
    name = hostname()
    for address in resolve(name):
        if _is_outward(address) and is_ours(address):
            return address
    return name


def joined(host: str, port: str) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_outward(address: str) -> bool:
    """Whether it may be known to other nodes, and means the same there."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:  # none, or one with the interface's name, which is this node's
        return False
    return not (known.is_loopback or known.is_unspecified or known.is_link_local)


def _resolve(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_ours(address: str) -> bool:
    with socket.socket(_family(address), socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _source(target: str) -> str:
    try:
        with socket.socket(_family(target), socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:  # no route, or no such protocol here
        return ""


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
